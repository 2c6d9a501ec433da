//! Leases that move between the tables of two replicas. A lease travels as a snapshot, with the time that
//! is left on its clocks. The ends of other leases travel, too, and the receiver keeps the sender's ids.
//!
//! 1. No clock ends later in the receiving table than in the sending table, if `at` is not later than the
//!    moment at which the [`LeaseSnapshot`] was true.
//! 2. An old id has the same answer as in the old table: the lease that is here, or its end.
//! 3. A newer delivery of the same message wins. An older delivery is not adopted.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::{
    ConsumerId, LeaseError, LeaseId, LeaseSnapshot, LeaseTable,
    ended::{self, Ended},
    entry::{Lease, RESTORED_TIME_TRUNCATION},
    time::margin,
};

/// The number of ids in one [`OutcomeSlice`], at half a byte each.
const SLICE_IDS: u64 = 1 << 16;

/// The result of an adoption.
#[derive(Debug, PartialEq, Eq)]
pub enum Adopted<T> {
    /// The lease has this id here. With it comes the payload of an older lease of the same message, which
    /// ended.
    Here(LeaseId, Option<T>),
    /// Not adopted: a newer delivery of the message is leased here.
    Not(T),
}

/// The ends of some leases with consecutive ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutcomeSlice {
    first: LeaseId,
    /// Half a byte for each id, the lower half first.
    nibbles: Vec<u8>,
}

/// The leases of another replica that this replica has taken over.
#[derive(Debug, Default)]
pub struct AdoptedLeases {
    /// The id there, and the id here.
    here: BTreeMap<LeaseId, LeaseId>,
    /// By the first id of the slice.
    ended: BTreeMap<LeaseId, OutcomeSlice>,
}

/// The answer for an old id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// It is this lease here.
    Here(LeaseId),
    /// It ended.
    Ended(LeaseError),
}

impl<T> LeaseTable<T> {
    /// Looks at up to `limit` leases after `after`, and returns those that can be handed over: alive, and
    /// not being settled. Changes nothing. Also returns the id to continue after, or `None` at the end.
    /// `seen` says when the leader of a lease's consumer was last seen.
    pub fn leaving(
        &self,
        after: Option<LeaseId>,
        limit: usize,
        now: Instant,
        seen: impl Fn(&T) -> Instant,
    ) -> (Vec<(LeaseId, LeaseSnapshot, &T)>, Option<LeaseId>) {
        let now = self.now.max(self.origin.since(now));
        let (mut leaving, mut last, mut looked) = (Vec::new(), None, 0);
        for (id, lease) in self.store.after(after).take(limit) {
            (last, looked) = (Some(id), looked + 1);
            let alive = self.standing(id, now).is_ok();
            let seen = self.origin.since(seen(&lease.payload));
            if let Some(snapshot) = lease.snapshot(now, seen).filter(|_| alive) {
                leaving.push((id, snapshot, &lease.payload));
            }
        }
        (leaving, last.filter(|_| looked == limit))
    }

    /// Adopts a lease of another table. `at` is not later than the moment at which the snapshot was true.
    pub fn adopt(
        &mut self,
        snapshot: &LeaseSnapshot,
        consumer: ConsumerId,
        at: Instant,
        payload: T,
        now: Instant,
    ) -> Adopted<T> {
        self.advance(now);
        let known = self.store.lease_of(consumer, snapshot.sequence);
        if known.is_some_and(|known| known.consumer_sequence() >= snapshot.consumer_sequence) {
            return Adopted::Not(payload);
        }
        let id = self.next;
        self.next = LeaseId(id.0.saturating_add(1));
        let lease = Lease::adopted(snapshot, consumer, payload, self.origin.since(at));
        Adopted::Here(id, self.store.insert(id, lease).map(|(_, older)| older))
    }

    /// Takes out a lease that another table has adopted. Its end is not remembered.
    pub fn remove_moved(&mut self, id: LeaseId) -> Option<T> {
        self.store.take(id)
    }

    /// The ends of the next leases after `after`, as far as they are remembered. `None`: no lease is left.
    pub fn outcomes(&self, after: Option<LeaseId>) -> Option<OutcomeSlice> {
        let oldest = self.store.oldest_remembered()?;
        let first = match after {
            Some(after) => LeaseId(after.0.checked_add(1)?).max(oldest),
            None => oldest,
        };
        let count = SLICE_IDS.min(self.next.get().checked_sub(first.get())?);
        let ids = (0..count).filter_map(|offset| LeaseId::new(first.get() + offset));
        OutcomeSlice::of(first, ids.map(|id| self.store.ended(id)))
    }
}

impl LeaseSnapshot {
    /// The snapshot if another server has taken over since the leader was last seen, as after
    /// [`LeaseTable::distrust`].
    #[must_use]
    pub fn distrusted(self) -> Self {
        let less = self.doubt.max(self.doubt_unseen)
            + Duration::from_nanos(RESTORED_TIME_TRUNCATION.unsigned_abs());
        let (doubt, doubt_unseen) = (Duration::ZERO, Duration::ZERO);
        Self { ack_by: self.ack_by.saturating_sub(less), doubt, doubt_unseen, ..self }
    }

    /// The snapshot if the ack wait was lowered since, as after [`LeaseTable::retune`]. A raised one gives no time.
    #[must_use]
    pub fn lowered(self, ack_wait: Duration) -> Self {
        if ack_wait >= self.ack_wait {
            return self;
        }
        let usable = |wait: Duration| wait.saturating_sub(margin(wait));
        let less = usable(self.ack_wait).saturating_sub(usable(ack_wait));
        Self { ack_wait, ack_by: self.ack_by.saturating_sub(less), ..self }
    }
}

impl OutcomeSlice {
    /// A slice from another replica. Any content is harmless.
    pub fn new(first: LeaseId, nibbles: Vec<u8>) -> Self {
        Self { first, nibbles }
    }

    fn of(first: LeaseId, ends: impl Iterator<Item = Option<Ended>>) -> Option<Self> {
        let mut nibbles = Vec::new();
        for (index, end) in ends.enumerate() {
            // Another replica need not know that the consumer is gone.
            let end = end.map(|end| if end == Ended::Gone { Ended::Lost } else { end });
            let nibble = end.map_or(0, Ended::nibble);
            match nibbles.last_mut().filter(|_| index % 2 == 1) {
                Some(byte) => *byte |= nibble << 4,
                None => nibbles.push(nibble),
            }
        }
        (!nibbles.is_empty()).then_some(Self { first, nibbles })
    }

    /// The first id.
    pub fn first(&self) -> LeaseId {
        self.first
    }

    /// Half a byte for each id, the lower half first. 0 means that the end is unknown.
    pub fn nibbles(&self) -> &[u8] {
        &self.nibbles
    }

    /// The last id of the slice. Its end is unknown if the number of ids is odd.
    pub fn last(&self) -> LeaseId {
        let count = (self.nibbles.len() as u64 * 2).saturating_sub(1);
        LeaseId(self.first.0.saturating_add(count))
    }

    fn ended(&self, id: LeaseId) -> Option<Ended> {
        let index = usize::try_from(id.get().checked_sub(self.first.get())?).ok()?;
        let byte = self.nibbles.get(index / 2)?;
        ended::of_nibble(byte >> (index % 2 * 4) & 0xf)
    }

    /// `false`: the slice does not cover the id.
    fn set(&mut self, id: LeaseId, ended: Ended) -> bool {
        let index = id.get().checked_sub(self.first.get()).and_then(|at| usize::try_from(at).ok());
        let byte = index.and_then(|index| Some((index % 2 * 4, self.nibbles.get_mut(index / 2)?)));
        let Some((shift, byte)) = byte else { return false };
        *byte = *byte & !(0xf << shift) | ended.nibble() << shift;
        true
    }
}

impl AdoptedLeases {
    /// Nothing is known of the other replica yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the ends of some of its leases.
    pub fn remember(&mut self, slice: &OutcomeSlice) {
        self.ended.insert(slice.first, slice.clone());
    }

    /// Notes that one of its leases is here now.
    pub fn adopt(&mut self, there: LeaseId, here: LeaseId) {
        self.here.insert(there, here);
    }

    /// The answer for the id of one of its leases.
    pub fn find(&self, there: LeaseId) -> Found {
        if let Some(here) = self.here.get(&there) {
            return Found::Here(*here);
        }
        let slice = self.ended.range(..=there).next_back();
        Found::Ended(match slice.and_then(|(_, slice)| slice.ended(there)) {
            Some(Ended::Settled(by)) => LeaseError::Settled { by },
            // The outcome of an overtaken settlement never arrives here, and the message has been redelivered.
            Some(Ended::Overtaken(_) | Ended::Lapsed | Ended::Lost | Ended::Gone) => {
                LeaseError::Expired { forgotten: false }
            }
            None => LeaseError::Expired { forgotten: true },
        })
    }

    /// The ids there and here of all adopted leases. Some may have ended here.
    pub fn adopted(&self) -> impl Iterator<Item = (LeaseId, LeaseId)> {
        self.here.iter().map(|(there, here)| (*there, *here))
    }

    /// Notes the ends of adopted leases in `table`, so that everything can be handed over again. The
    /// remaining adopted leases are alive.
    pub fn record_ends<T>(&mut self, table: &LeaseTable<T>) {
        let ended: Vec<_> = self
            .adopted()
            .filter(|(_, here)| table.payload(*here).is_none())
            .map(|(there, here)| (there, table.store.ended(here)))
            .collect();
        for (there, end) in ended {
            self.here.remove(&there);
            let Some(end) = end else { continue };
            let slice = self.ended.range_mut(..=there).next_back();
            if !slice.is_some_and(|(_, slice)| slice.set(there, end)) {
                self.ended.extend(
                    OutcomeSlice::of(there, [Some(end)].into_iter()).map(|one| (there, one)),
                );
            }
        }
    }

    /// The ends of its leases, in slices.
    pub fn outcomes(&self) -> impl Iterator<Item = &OutcomeSlice> {
        self.ended.values()
    }
}
