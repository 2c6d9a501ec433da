//! The open Fetch calls, first come first served, with sums and orders kept up to date so that no
//! question takes longer for ten thousand of them.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use super::Item;

/// How long somebody who wants what is there now waits beside a pull that brings nothing.
const IMPATIENCE: Duration = Duration::from_millis(50);

/// Names one waiter of one pump, in the order of joining.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WaiterId(u64);

/// What a waiter wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Most messages, at least 1.
    pub n: u32,
    /// Most bytes of them, encoded.
    pub max_bytes: u64,
    /// Wait until then.
    pub until: Instant,
    /// After the first message, go on this long.
    pub linger: Duration,
    /// Only what is there now.
    pub no_wait: bool,
}

#[derive(Debug)]
pub(super) struct Waiter<M> {
    want: Want,
    joined: Instant,
    pub(super) messages: Vec<Item<M>>,
    bytes_left: u64,
    /// When it is answered at the latest.
    deadline: Instant,
    linger_until: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Waiters<M> {
    all: BTreeMap<WaiterId, Waiter<M>>,
    by_deadline: BTreeSet<(Instant, WaiterId)>,
    impatient: BTreeSet<WaiterId>,
    filling: Option<WaiterId>,
    next: WaiterId,
    wanted: u64,
    bytes_left: u64,
}

impl<M> Default for Waiters<M> {
    fn default() -> Self {
        Self {
            all: BTreeMap::new(),
            by_deadline: BTreeSet::new(),
            impatient: BTreeSet::new(),
            filling: None,
            next: WaiterId::default(),
            wanted: 0,
            bytes_left: 0,
        }
    }
}

impl<M> Waiters<M> {
    pub(super) fn join(&mut self, want: Want, now: Instant) -> WaiterId {
        let id = self.next;
        self.next = WaiterId(id.0 + 1);
        let deadline = if want.no_wait { now + IMPATIENCE } else { want.until };
        self.by_deadline.insert((deadline, id));
        if want.no_wait {
            self.impatient.insert(id);
        }
        self.wanted += u64::from(want.n);
        self.bytes_left += want.max_bytes;
        let bytes_left = want.max_bytes;
        let waiter = Waiter {
            want,
            joined: now,
            messages: Vec::new(),
            bytes_left,
            deadline,
            linger_until: None,
        };
        self.all.insert(id, waiter);
        id
    }

    pub(super) fn remove(&mut self, id: WaiterId) -> Option<Waiter<M>> {
        let waiter = self.all.remove(&id)?;
        self.by_deadline.remove(&(waiter.deadline, id));
        self.impatient.remove(&id);
        self.filling.take_if(|filling| *filling == id);
        self.wanted -= waiter.still_wanted();
        self.bytes_left -= waiter.bytes_left;
        Some(waiter)
    }

    /// Gives it a message that fits; whether it has all that it wants now.
    pub(super) fn hand(&mut self, id: WaiterId, item: Item<M>, now: Instant) -> bool {
        let Some(waiter) = self.all.get_mut(&id) else { return false };
        self.wanted -= 1;
        self.bytes_left -= item.size;
        waiter.bytes_left -= item.size;
        if waiter.messages.is_empty() {
            let until = now + waiter.want.linger;
            waiter.linger_until = Some(until);
            if !waiter.want.linger.is_zero() && until < waiter.deadline {
                self.by_deadline.remove(&(waiter.deadline, id));
                waiter.deadline = until;
                self.by_deadline.insert((until, id));
            }
        }
        waiter.messages.push(item);
        self.filling = Some(id);
        waiter.still_wanted() == 0
    }

    pub(super) fn first(&self) -> Option<WaiterId> {
        self.all.first_key_value().map(|(id, _)| *id)
    }

    pub(super) fn last(&self) -> Option<WaiterId> {
        self.all.last_key_value().map(|(id, _)| *id)
    }

    pub(super) fn next_id(&self) -> WaiterId {
        self.next
    }

    /// The one that has messages.
    pub(super) fn filling(&self) -> Option<WaiterId> {
        self.filling
    }

    pub(super) fn first_that_fits(&self, size: u64) -> Option<WaiterId> {
        self.all.iter().find(|(_, waiter)| size <= waiter.bytes_left).map(|(id, _)| *id)
    }

    pub(super) fn fits(&self, id: WaiterId, size: u64) -> bool {
        self.all.get(&id).is_some_and(|waiter| size <= waiter.bytes_left)
    }

    /// Until when it goes on after its first message.
    pub(super) fn linger_until(&self, id: WaiterId) -> Option<Instant> {
        self.all.get(&id).and_then(|waiter| waiter.linger_until)
    }

    /// Gives it more time.
    pub(super) fn postpone(&mut self, id: WaiterId, deadline: Instant) {
        if let Some(waiter) = self.all.get_mut(&id) {
            self.by_deadline.remove(&(waiter.deadline, id));
            waiter.deadline = deadline;
            self.by_deadline.insert((deadline, id));
        }
    }

    /// The first who joined later than then.
    pub(super) fn joined_after(&self, then: Instant) -> WaiterId {
        let later = self.all.iter().rev().take_while(|(_, waiter)| waiter.joined > then);
        later.last().map_or(self.next, |(id, _)| *id)
    }

    /// One whose time is over.
    pub(super) fn due(&self, now: Instant) -> Option<WaiterId> {
        self.by_deadline.first().filter(|(at, _)| now >= *at).map(|(_, id)| *id)
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.by_deadline.first().map(|(at, _)| *at)
    }

    pub(super) fn last_deadline(&self) -> Option<Instant> {
        self.by_deadline.last().map(|(at, _)| *at)
    }

    pub(super) fn joined(&self, id: WaiterId) -> Option<Instant> {
        self.all.get(&id).map(|waiter| waiter.joined)
    }

    pub(super) fn is_impatient(&self, id: WaiterId) -> bool {
        self.impatient.contains(&id)
    }

    /// Those who want what is there now and joined by then.
    pub(super) fn impatient(&self, by: Instant) -> Vec<WaiterId> {
        let joined = |id: &&WaiterId| self.all.get(id).is_some_and(|waiter| waiter.joined <= by);
        self.impatient.iter().filter(joined).copied().collect()
    }

    pub(super) fn all_impatient(&self) -> bool {
        self.impatient.len() == self.all.len()
    }

    pub(super) fn wanted(&self) -> u64 {
        self.wanted
    }

    pub(super) fn bytes_left(&self) -> u64 {
        self.bytes_left
    }

    pub(super) fn first_bytes_left(&self) -> u64 {
        self.all.first_key_value().map_or(0, |(_, waiter)| waiter.bytes_left)
    }

    pub(super) fn take_all(&mut self) -> Vec<WaiterId> {
        let ids: Vec<WaiterId> = self.all.keys().copied().collect();
        *self = Self { next: self.next, ..Self::default() };
        ids
    }

    pub(super) fn len(&self) -> usize {
        self.all.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.all.is_empty()
    }
}

impl<M> Waiter<M> {
    fn still_wanted(&self) -> u64 {
        u64::from(self.want.n).saturating_sub(self.messages.len() as u64)
    }
}
