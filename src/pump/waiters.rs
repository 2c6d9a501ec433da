//! The open Fetch calls, first come first served, with sums and orders kept up to date so that no
//! question takes longer for ten thousand of them.
//!
//! ```text
//!  join ──▶ EMPTY ──hand──▶ HOLDER ──hand, room for more──▶ HOLDER
//!             │               │ has n, or no room for another: full
//!             ▼ remove        ▼ remove
//!            gone            gone, with what it has
//! ```
//! 1. A waiter that is full is never left here between two calls of the pump: [`Waiters::hand`]
//!    says so, and the pump removes it.
//! 2. `ends` has one entry for each waiter that waits, `impatient` one for each that does not,
//!    `holders` one for each that has a message.
//! 3. `sums` are what adding up over all waiters would give.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::{Item, OVERHEAD, WaiterId, Want};

/// Waiters that are looked at for one message: one that is too large for all of these is not
/// carried past ten thousand more, but told to the first.
const SEARCH: usize = 64;

#[derive(Debug)]
pub(super) struct Waiter<M> {
    want: Want,
    joined: Instant,
    /// When it is answered whatever it has; a linger brings it forward.
    end: Instant,
    /// Bytes that its answer may still take.
    room: u64,
    pub(super) messages: Vec<Item<M>>,
}

/// Where a message can go.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// To this one.
    Free(WaiterId),
    /// To nobody before this one has been answered: it has some, and this one comes too much.
    Full(WaiterId),
    /// It fits nobody; this is the first whom it would not fit even alone.
    TooSmall(WaiterId),
    /// Nobody waits.
    None,
}

#[derive(Debug)]
pub(super) struct Waiters<M> {
    line: BTreeMap<WaiterId, Waiter<M>>,
    ends: BTreeSet<(Instant, WaiterId)>,
    impatient: BTreeSet<WaiterId>,
    holders: BTreeSet<WaiterId>,
    next: WaiterId,
    sums: Sums,
}

/// What is added up over all waiters.
#[derive(Debug, Default)]
struct Sums {
    wanted: u64,
    /// Wider than that of one, whose bytes may be without bound.
    room: u128,
}

impl<M> Waiters<M> {
    pub(super) fn new() -> Self {
        Self {
            line: BTreeMap::new(),
            ends: BTreeSet::new(),
            impatient: BTreeSet::new(),
            holders: BTreeSet::new(),
            next: WaiterId(0),
            sums: Sums::default(),
        }
    }

    pub(super) fn join(&mut self, want: Want, now: Instant) -> WaiterId {
        let id = self.next;
        self.next = WaiterId(id.0 + 1);
        let (end, room) = (want.until, want.max_bytes);
        let want = Want { n: want.n.max(1), ..want };
        let waiter = Waiter { want, joined: now, end, room, messages: Vec::new() };
        self.sums.add(&waiter);
        if waiter.want.no_wait {
            self.impatient.insert(id);
        } else {
            self.ends.insert((end, id));
        }
        self.line.insert(id, waiter);
        id
    }

    pub(super) fn remove(&mut self, id: WaiterId) -> Option<Waiter<M>> {
        let waiter = self.line.remove(&id)?;
        self.sums.subtract(&waiter);
        self.ends.remove(&(waiter.end, id));
        self.impatient.remove(&id);
        self.holders.remove(&id);
        Some(waiter)
    }

    /// All of them, and what they had, both in order.
    pub(super) fn remove_all(&mut self) -> (Vec<WaiterId>, Vec<Item<M>>) {
        let all = std::mem::replace(self, Self { next: self.next, ..Self::new() }).line;
        let ids = all.keys().copied().collect();
        (ids, all.into_values().flat_map(|waiter| waiter.messages).collect())
    }

    /// Where a message of this size can go.
    pub(super) fn fit(&self, size: u64) -> Fit {
        let mut too_small = Fit::None;
        for (&id, waiter) in self.line.iter().take(SEARCH) {
            if size <= waiter.room {
                return Fit::Free(id);
            }
            if size <= waiter.want.max_bytes {
                return Fit::Full(id);
            }
            if too_small == Fit::None {
                too_small = Fit::TooSmall(id);
            }
        }
        too_small
    }

    /// Gives it a message for which [`Waiters::fit`] is free; whether it is full then.
    pub(super) fn hand(&mut self, id: WaiterId, item: Item<M>, now: Instant) -> bool {
        let Some(waiter) = self.line.get_mut(&id) else { return false };
        self.sums.subtract(waiter);
        if self.holders.insert(id) && waiter.lingers() {
            self.ends.remove(&(waiter.end, id));
            waiter.end = waiter.end.min(now + waiter.want.linger);
            self.ends.insert((waiter.end, id));
        }
        waiter.room = waiter.room.saturating_sub(item.size);
        waiter.messages.push(item);
        self.sums.add(waiter);
        waiter.is_full()
    }

    pub(super) fn first(&self) -> Option<WaiterId> {
        self.line.first_key_value().map(|(id, _)| *id)
    }

    pub(super) fn last(&self) -> Option<WaiterId> {
        self.line.last_key_value().map(|(id, _)| *id)
    }

    /// Who joins next: all that are here, and all that were, come before.
    pub(super) fn next(&self) -> WaiterId {
        self.next
    }

    pub(super) fn first_holder(&self) -> Option<WaiterId> {
        self.holders.first().copied()
    }

    /// The first that has some, and does not linger for more. Those who linger are few: one, and
    /// those who took what was too large for somebody before them.
    pub(super) fn first_brisk_holder(&self) -> Option<WaiterId> {
        let brisk = |id: &&WaiterId| self.line.get(id).is_some_and(|waiter| !waiter.lingers());
        self.holders.iter().find(brisk).copied()
    }

    /// The first that does not wait, and when it joined.
    pub(super) fn first_impatient(&self) -> Option<(WaiterId, Instant)> {
        let id = *self.impatient.first()?;
        self.line.get(&id).map(|waiter| (id, waiter.joined))
    }

    /// The one whose wait ends first.
    pub(super) fn first_end(&self) -> Option<(Instant, WaiterId)> {
        self.ends.first().copied()
    }

    /// When the last wait ends. `None` if nobody waits, but for those who do not.
    pub(super) fn last_end(&self) -> Option<Instant> {
        self.ends.last().map(|(end, _)| *end)
    }

    /// Messages that can be used, at least one for each waiter.
    pub(super) fn wanted(&self) -> u64 {
        self.sums.wanted
    }

    /// Bytes that the answers may still take.
    pub(super) fn room(&self) -> u128 {
        self.sums.room
    }

    pub(super) fn len(&self) -> usize {
        self.line.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.line.is_empty()
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
    /// Messages that it can use: no more than its room lets it have if half of that is overhead.
    /// Small messages by the thousand would else arrive within the bytes of a pull, and find that
    /// the answer has no room for what surrounds them.
    fn wanted(&self) -> u64 {
        let missing = u64::from(self.want.n).saturating_sub(self.messages.len() as u64);
        missing.min((self.room / (2 * OVERHEAD)).max(1))
    }

    /// It has all that it wants, or no room for even an empty message.
    fn is_full(&self) -> bool {
        self.messages.len() as u64 >= u64::from(self.want.n) || self.room < OVERHEAD
    }

    fn lingers(&self) -> bool {
        !self.want.no_wait && self.want.linger > Duration::ZERO
    }
}
