//! Leases that leave for another replica's table and leases that come from one: their clocks as what
//! is left of them, how the others ended, and what the heir knows of the leaver's ids.
//!
//! 1. No clock ends later in the table that a lease comes to than in the one that it left, if `at`
//!    is no later than the moment at which [`LeaseSnapshot`] was true.
//! 2. An old id is answered as the old table would: by the lease that is here, or by how it ended.
//! 3. A newer delivery of the same message wins: an older one is not taken in.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use super::{
    ConsumerId, LeaseError, LeaseId, LeaseSnapshot, LeaseTable,
    ended::{self, Ended},
    entry::{Lease, RESTORED_TIME_TRUNCATION},
};

/// Ids of one [`OutcomeSlice`]: half a byte each.
const SLICE_IDS: u64 = 1 << 16;

/// What became of a lease that came.
#[derive(Debug, PartialEq, Eq)]
pub enum Adopted<T> {
    /// It has this id here. An older lease of the same message ended, and its payload came out.
    Here(LeaseId, Option<T>),
    /// Its message is leased here anew.
    Not(T),
}

/// How some leases with ids in a row ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutcomeSlice {
    first: LeaseId,
    /// Half a byte each, the lower half first.
    nibbles: Vec<u8>,
}

/// What a replica knows of the leases of another, whose names it took over.
#[derive(Debug, Default)]
pub struct AdoptedLeases {
    /// Ids there, and the ids that they have here.
    here: BTreeMap<LeaseId, LeaseId>,
    /// By their first ids.
    ended: BTreeMap<LeaseId, OutcomeSlice>,
}

/// What an old id is answered by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// This lease of ours.
    Here(LeaseId),
    /// It ended.
    Ended(LeaseError),
}

impl<T> LeaseTable<T> {
    /// Up to `limit` leases after `after` that can be handed over: alive, and not being settled.
    /// Nothing changes by it. Returns where to go on, until there is nothing left.
    pub fn leaving(
        &self,
        after: Option<LeaseId>,
        limit: usize,
        now: Instant,
    ) -> (Vec<(LeaseId, LeaseSnapshot, &T)>, Option<LeaseId>) {
        let now = self.now.max(self.origin.since(now));
        let (mut leaving, mut last, mut seen) = (Vec::new(), None, 0);
        for (id, lease) in self.store.after(after).take(limit) {
            (last, seen) = (Some(id), seen + 1);
            let alive = self.standing(id, now).is_ok();
            if let Some(moving) = lease.moving(now).filter(|_| alive) {
                leaving.push((id, moving, &lease.payload));
            }
        }
        (leaving, last.filter(|_| seen == limit))
    }

    /// Takes in a lease of another table. `at` is no later than the moment at which `moving` was
    /// true.
    pub fn adopt(
        &mut self,
        moving: &LeaseSnapshot,
        consumer: ConsumerId,
        at: Instant,
        payload: T,
        now: Instant,
    ) -> Adopted<T> {
        self.advance(now);
        let known = self.store.lease_of(consumer, moving.sequence);
        if known.is_some_and(|known| known.consumer_sequence() >= moving.consumer_sequence) {
            return Adopted::Not(payload);
        }
        let id = self.next;
        self.next = LeaseId(id.0.saturating_add(1));
        let lease = Lease::adopted(moving, consumer, payload, self.origin.since(at));
        Adopted::Here(id, self.store.insert(id, lease).map(|(_, older)| older))
    }

    /// Takes out a lease that another table has now. Nothing is remembered of it.
    pub fn moved(&mut self, id: LeaseId) -> Option<T> {
        self.store.take(id)
    }

    /// How the next leases after `after` ended, as far as it is remembered. `None`: there are none.
    pub fn memories(&self, after: Option<LeaseId>) -> Option<OutcomeSlice> {
        let oldest = self.store.oldest_remembered()?;
        let first = match after {
            Some(after) => LeaseId(after.0.checked_add(1)?).max(oldest),
            None => oldest,
        };
        let count = SLICE_IDS.min(self.next.get().checked_sub(first.get())?);
        let ids = (0..count).filter_map(|place| LeaseId::new(first.get() + place));
        OutcomeSlice::of(first, ids.map(|id| self.store.ended(id)))
    }
}

impl LeaseSnapshot {
    /// What it is if another server has taken over since: as [`LeaseTable::distrust`] would leave it.
    #[must_use]
    pub fn distrusted(self) -> Self {
        let less = self.doubt + Duration::from_nanos(RESTORED_TIME_TRUNCATION.unsigned_abs());
        Self { ack_by: self.ack_by.saturating_sub(less), doubt: Duration::ZERO, ..self }
    }
}

impl OutcomeSlice {
    /// What another replica told; whatever it is, it is harmless.
    pub fn new(first: LeaseId, nibbles: Vec<u8>) -> Self {
        Self { first, nibbles }
    }

    fn of(first: LeaseId, ends: impl Iterator<Item = Option<Ended>>) -> Option<Self> {
        let mut nibbles = Vec::new();
        for (place, end) in ends.enumerate() {
            let nibble = end.map_or(0, Ended::nibble);
            match nibbles.last_mut().filter(|_| place % 2 == 1) {
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

    /// Half a byte for each id, the lower half first; 0 is that nothing is known.
    pub fn nibbles(&self) -> &[u8] {
        &self.nibbles
    }

    /// The last id; there may be one more that is not known of.
    pub fn last(&self) -> LeaseId {
        let count = (self.nibbles.len() as u64 * 2).saturating_sub(1);
        LeaseId(self.first.0.saturating_add(count))
    }

    fn ended(&self, id: LeaseId) -> Option<Ended> {
        let place = usize::try_from(id.get().checked_sub(self.first.get())?).ok()?;
        let byte = self.nibbles.get(place / 2)?;
        ended::of_nibble(byte >> (place % 2 * 4) & 0xf)
    }

    fn note(&mut self, id: LeaseId, ended: Ended) -> bool {
        let place = id.get().checked_sub(self.first.get()).and_then(|at| usize::try_from(at).ok());
        let byte = place.and_then(|place| Some((place % 2 * 4, self.nibbles.get_mut(place / 2)?)));
        let Some((shift, byte)) = byte else { return false };
        *byte = *byte & !(0xf << shift) | ended.nibble() << shift;
        true
    }
}

impl AdoptedLeases {
    /// Of a replica of which nothing is known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// How some of its leases ended.
    pub fn remember(&mut self, piece: &OutcomeSlice) {
        self.ended.insert(piece.first, piece.clone());
    }

    /// One of its leases is here now.
    pub fn took(&mut self, there: LeaseId, here: LeaseId) {
        self.here.insert(there, here);
    }

    /// What the id of one of its leases is answered by.
    pub fn find(&self, there: LeaseId) -> Found {
        if let Some(here) = self.here.get(&there) {
            return Found::Here(*here);
        }
        let piece = self.ended.range(..=there).next_back();
        Found::Ended(match piece.and_then(|(_, piece)| piece.ended(there)) {
            Some(Ended::Settled(by) | Ended::Overtaken(by)) => LeaseError::Settled { by },
            Some(Ended::Lapsed | Ended::Lost) => LeaseError::Expired { forgotten: false },
            None => LeaseError::Expired { forgotten: true },
        })
    }

    /// Leases that were taken over, by their id there and here, also those that have ended here.
    pub fn taken(&self) -> impl Iterator<Item = (LeaseId, LeaseId)> {
        self.here.iter().map(|(there, here)| (*there, *here))
    }

    /// Notes how leases that were taken over have ended in `table`, so that all of it can be handed
    /// on: what remains taken is alive.
    pub fn settle_up<T>(&mut self, table: &LeaseTable<T>) {
        let ended: Vec<_> = self
            .taken()
            .filter(|(_, here)| table.payload(*here).is_none())
            .map(|(there, here)| (there, table.store.ended(here)))
            .collect();
        for (there, end) in ended {
            self.here.remove(&there);
            let Some(end) = end else { continue };
            let piece = self.ended.range_mut(..=there).next_back();
            if !piece.is_some_and(|(_, piece)| piece.note(there, end)) {
                self.ended.extend(
                    OutcomeSlice::of(there, [Some(end)].into_iter()).map(|one| (there, one)),
                );
            }
        }
    }

    /// How leases ended, piece by piece.
    pub fn memories(&self) -> impl Iterator<Item = &OutcomeSlice> {
        self.ended.values()
    }
}
