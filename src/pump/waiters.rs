//! The open Fetch calls, first come, first served. Sums and orders are kept up to date, so that no question
//! takes longer with ten thousand waiters.
//!
//! ```text
//!  join ──▶ EMPTY ──hand──▶ HOLDER ──hand, room for more──▶ HOLDER
//!             │               │ has n, or no room for another: full
//!             ▼ remove        ▼ remove
//!            gone            gone, with its messages
//! ```
//! 1. No full waiter is here between two calls of the pump: [`Waiters::hand`] reports a full waiter, and the
//!    pump removes it.
//! 2. `ends` has one entry for each waiter that waits, `impatient` has one for each `no_wait` waiter, and
//!    `holders` has one for each waiter with a message.
//! 3. `sums` are equal to the sums over all waiters.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::{Item, OVERHEAD, WaiterId, Want};

/// The number of waiters that are tried for one message. A message that is too large for all of them is
/// reported to the first one, and not carried past ten thousand more.
const SEARCH: usize = 64;

#[derive(Debug)]
pub(super) struct Waiter<M> {
    want: Want,
    joined: Instant,
    /// The time of its answer at the latest. A linger makes it earlier.
    end: Instant,
    /// The bytes that its answer may still take.
    room: u64,
    pub(super) messages: Vec<Item<M>>,
}

/// The waiter for a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fit {
    /// The message fits this waiter.
    Fits(WaiterId),
    /// The next waiter has messages and no room for this one. It must be answered first.
    NextIsFull(WaiterId),
    /// The message fits nobody. It would not fit this waiter, the first of all, even alone.
    TooLarge(WaiterId),
    /// Nobody waits.
    Nobody,
}

#[derive(Debug)]
pub(super) struct Waiters<M> {
    queue: BTreeMap<WaiterId, Waiter<M>>,
    ends: BTreeSet<(Instant, WaiterId)>,
    impatient: BTreeSet<WaiterId>,
    holders: BTreeSet<WaiterId>,
    next: WaiterId,
    sums: Sums,
}

/// The sums over all waiters.
#[derive(Debug, Default)]
struct Sums {
    wanted: u64,
    /// A wider integer than the room of one waiter, which may be without bound.
    room: u128,
}

impl<M> Waiters<M> {
    pub(super) fn new() -> Self {
        Self {
            queue: BTreeMap::new(),
            ends: BTreeSet::new(),
            impatient: BTreeSet::new(),
            holders: BTreeSet::new(),
            next: WaiterId(0),
            sums: Sums::default(),
        }
    }

    pub(super) fn join(&mut self, want: Want, now: Instant) -> WaiterId {
        let id = self.turn();
        let (end, room) = (want.until, want.max_bytes);
        let want = Want { n: want.n.max(1), ..want };
        let waiter = Waiter { want, joined: now, end, room, messages: Vec::new() };
        self.sums.add(&waiter);
        if waiter.want.no_wait {
            self.impatient.insert(id);
        } else {
            self.ends.insert((end, id));
        }
        self.queue.insert(id, waiter);
        id
    }

    /// The next number in the order of all who come. A waiter has it as its id.
    pub(super) fn turn(&mut self) -> WaiterId {
        let turn = self.next;
        self.next = WaiterId(turn.0 + 1);
        turn
    }

    pub(super) fn remove(&mut self, id: WaiterId) -> Option<Waiter<M>> {
        let waiter = self.queue.remove(&id)?;
        self.sums.subtract(&waiter);
        self.ends.remove(&(waiter.end, id));
        self.impatient.remove(&id);
        self.holders.remove(&id);
        Some(waiter)
    }

    /// Removes all waiters. Returns them and their messages, both in order.
    pub(super) fn remove_all(&mut self) -> (Vec<WaiterId>, Vec<Item<M>>) {
        let all = std::mem::replace(self, Self { next: self.next, ..Self::new() }).queue;
        let ids = all.keys().copied().collect();
        (ids, all.into_values().flat_map(|waiter| waiter.messages).collect())
    }

    /// The waiter for a message of this size.
    pub(super) fn fit(&self, size: u64) -> Fit {
        let mut too_large = Fit::Nobody;
        for (&id, waiter) in self.queue.iter().take(SEARCH) {
            if size <= waiter.room {
                return Fit::Fits(id);
            }
            if size <= waiter.want.max_bytes {
                return Fit::NextIsFull(id);
            }
            if too_large == Fit::Nobody {
                too_large = Fit::TooLarge(id);
            }
        }
        too_large
    }

    /// Gives a waiter a message that fits it. With its first message it lingers, for `longest` at most.
    /// `true`: the waiter is full now.
    pub(super) fn hand(
        &mut self,
        id: WaiterId,
        item: Item<M>,
        longest: Duration,
        now: Instant,
    ) -> bool {
        let Some(waiter) = self.queue.get_mut(&id) else { return false };
        self.sums.subtract(waiter);
        if self.holders.insert(id) && waiter.lingers() {
            self.ends.remove(&(waiter.end, id));
            waiter.end = waiter.end.min(now + waiter.want.linger.min(longest));
            self.ends.insert((waiter.end, id));
        }
        waiter.room = waiter.room.saturating_sub(item.size);
        waiter.messages.push(item);
        self.sums.add(waiter);
        waiter.is_full()
    }

    pub(super) fn first(&self) -> Option<WaiterId> {
        self.queue.first_key_value().map(|(id, _)| *id)
    }

    pub(super) fn last(&self) -> Option<WaiterId> {
        self.queue.last_key_value().map(|(id, _)| *id)
    }

    /// The id of the next waiter to join. All present and former waiters have smaller ids.
    pub(super) fn next(&self) -> WaiterId {
        self.next
    }

    pub(super) fn first_holder(&self) -> Option<WaiterId> {
        self.holders.first().copied()
    }

    /// The first waiter that has messages and does not linger for more. Few waiters with messages linger: the
    /// first one, and those that got a message which was too large for an earlier waiter.
    pub(super) fn first_brisk_holder(&self) -> Option<WaiterId> {
        let brisk = |id: &&WaiterId| self.queue.get(id).is_some_and(|waiter| !waiter.lingers());
        self.holders.iter().find(brisk).copied()
    }

    /// The first `no_wait` waiter, and the time at which it joined.
    pub(super) fn first_impatient(&self) -> Option<(WaiterId, Instant)> {
        let id = *self.impatient.first()?;
        self.queue.get(&id).map(|waiter| (id, waiter.joined))
    }

    /// The waiter whose wait ends first.
    pub(super) fn first_end(&self) -> Option<(Instant, WaiterId)> {
        self.ends.first().copied()
    }

    /// The end of the last wait. `None`: all waiters are `no_wait`, or there is none.
    pub(super) fn last_end(&self) -> Option<Instant> {
        self.ends.last().map(|(end, _)| *end)
    }

    /// The number of messages that the waiters can use, at least one for each.
    pub(super) fn wanted(&self) -> u64 {
        self.sums.wanted
    }

    /// The bytes that all answers may still take.
    pub(super) fn room(&self) -> u128 {
        self.sums.room
    }

    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }
}

impl Sums {
    fn add<M>(&mut self, waiter: &Waiter<M>) {
        self.wanted += waiter.wanted();
        self.room += u128::from(waiter.room);
    }

    fn subtract<M>(&mut self, waiter: &Waiter<M>) {
        self.wanted -= waiter.wanted();
        self.room -= u128::from(waiter.room);
    }
}

impl<M> Waiter<M> {
    /// The number of messages that it can use: at most what fits if half of the room is overhead. Otherwise
    /// thousands of small messages could arrive within the bytes of a pull, and the answer would have no
    /// room for their overhead.
    fn wanted(&self) -> u64 {
        let missing = u64::from(self.want.n).saturating_sub(self.messages.len() as u64);
        missing.min((self.room / (2 * OVERHEAD)).max(1))
    }

    /// Whether it has all that it wants, or no room for even an empty message.
    fn is_full(&self) -> bool {
        self.messages.len() as u64 >= u64::from(self.want.n) || self.room < OVERHEAD
    }

    fn lingers(&self) -> bool {
        !self.want.no_wait && self.want.linger > Duration::ZERO
    }
}
