//! The leases and the indexes that find them. Owns invariants 1, 3 and 6 of the table: a lease enters,
//! changes and leaves only here, and the indexes follow.
//!
//! All maps are B-trees. A hash map would sometimes rehash a million leases in one call. The order of a
//! B-tree is also the same in every run.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use super::{
    ConsumerEnd, ConsumerId, LeaseId,
    ended::{Ended, OutcomeRing},
    entry::{Lease, State},
    time::{Nanos, PAST},
};

#[derive(Debug)]
pub(super) struct Store<T> {
    /// Boxed, because ids only grow, and growing keys leave the nodes of a B-tree half empty.
    leases: BTreeMap<LeaseId, Box<Lease<T>>>,
    due: BTreeSet<(Nanos, LeaseId)>,
    /// The consumers that have leases.
    consumers: BTreeMap<ConsumerId, Consumer>,
    /// Consumers that have ended, each with the stream sequence from which its leases are not yet swept.
    unswept: BTreeMap<ConsumerId, u64>,
    outcomes: OutcomeRing,
}

#[derive(Debug)]
struct Consumer {
    by_sequence: BTreeMap<u64, LeaseId>,
    /// All its leases are lost.
    ended: Option<ConsumerEnd>,
    /// Progress that was sent until then does not count, because the server has lost it since.
    distrusted: Nanos,
}

impl<T> Store<T> {
    pub(super) fn new(remembered: usize) -> Self {
        Self {
            leases: BTreeMap::new(),
            due: BTreeSet::new(),
            consumers: BTreeMap::new(),
            unswept: BTreeMap::new(),
            outcomes: OutcomeRing::new(remembered),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.leases.len()
    }

    pub(super) fn get(&self, id: LeaseId) -> Option<&Lease<T>> {
        self.leases.get(&id).map(Box::as_ref)
    }

    /// The end of a lease that is not here.
    pub(super) fn ended(&self, id: LeaseId) -> Option<Ended> {
        self.outcomes.ended(id)
    }

    pub(super) fn remember(&mut self, id: LeaseId, ended: Ended) {
        self.outcomes.remember(id, ended);
    }

    /// The leases after this id, in the order of their ids.
    pub(super) fn after(
        &self,
        after: Option<LeaseId>,
    ) -> impl Iterator<Item = (LeaseId, &Lease<T>)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.leases.range((from, Bound::Unbounded)).map(|(id, lease)| (*id, &**lease))
    }

    /// The lease of a message.
    pub(super) fn lease_of(&self, consumer: ConsumerId, sequence: u64) -> Option<&Lease<T>> {
        let id = self.consumers.get(&consumer)?.by_sequence.get(&sequence)?;
        self.get(*id)
    }

    /// The oldest id whose end may be known.
    pub(super) fn oldest_remembered(&self) -> Option<LeaseId> {
        self.outcomes.oldest()
    }

    /// Adds a lease under the next id. An older lease of the same message leaves: the new delivery proves
    /// that JetStream gave the message away.
    pub(super) fn insert(&mut self, id: LeaseId, lease: Lease<T>) -> Option<(LeaseId, T)> {
        self.outcomes.extend_to(id);
        let consumer = self.consumers.entry(lease.consumer).or_default();
        let older = consumer.by_sequence.insert(lease.sequence, id);
        self.due.extend(lease.due_at().map(|at| (at, id)));
        self.leases.insert(id, Box::new(lease));
        let older = older.and_then(|older| Some((older, *self.leases.remove(&older)?)));
        let superseded = older.map(|(older, lease)| {
            let ended = match lease.state {
                State::Settling { kind, .. } => Ended::Overtaken(kind),
                State::Held | State::Uncertain(_) => Ended::Lost,
            };
            self.finish_removal(older, lease, ended)
        });
        self.check(id);
        superseded
    }

    /// Changes a lease, and updates the index of due leases.
    pub(super) fn update(&mut self, id: LeaseId, change: impl FnOnce(&mut Lease<T>)) {
        let Some(lease) = self.leases.get_mut(&id) else { return };
        let before = lease.due_at();
        change(lease);
        let after = lease.due_at();
        if before != after {
            before.map(|at| self.due.remove(&(at, id)));
            after.map(|at| self.due.insert((at, id)));
        }
        self.check(id);
    }

    /// Takes a lease out, and remembers its end.
    pub(super) fn remove(&mut self, id: LeaseId, ended: Ended) -> Option<T> {
        let payload = self.take(id)?;
        self.outcomes.remember(id, ended);
        self.check(id);
        Some(payload)
    }

    /// Gives a lease the next id. Its old id has lapsed.
    pub(super) fn rename(&mut self, id: LeaseId, new: LeaseId) {
        self.outcomes.extend_to(new);
        let Some(lease) = self.leases.remove(&id) else { return };
        if let Some(consumer) = self.consumers.get_mut(&lease.consumer) {
            consumer.by_sequence.insert(lease.sequence, new);
        }
        if let Some(at) = lease.due_at() {
            self.due.remove(&(at, id));
            self.due.insert((at, new));
        }
        self.leases.insert(new, lease);
        self.outcomes.remember(id, Ended::Lapsed);
        self.check(new);
    }

    /// Takes a lease out, and does not remember its end.
    pub(super) fn take(&mut self, id: LeaseId) -> Option<T> {
        let lease = *self.leases.remove(&id)?;
        let name = lease.consumer;
        if let Some(consumer) = self.consumers.get_mut(&name) {
            consumer.by_sequence.remove(&lease.sequence);
            if consumer.by_sequence.is_empty() {
                self.consumers.remove(&name);
                self.unswept.remove(&name);
            }
        }
        lease.due_at().map(|at| self.due.remove(&(at, id)));
        Some(lease.payload)
    }

    /// The rest of a removal, for a lease that the index by sequence no longer points to.
    fn finish_removal(&mut self, id: LeaseId, lease: Lease<T>, ended: Ended) -> (LeaseId, T) {
        lease.due_at().map(|at| self.due.remove(&(at, id)));
        self.outcomes.remember(id, ended);
        (id, lease.payload)
    }

    /// The lease that is due first.
    pub(super) fn first_due(&self) -> Option<(Nanos, LeaseId)> {
        self.due.first().copied()
    }

    /// The number of leases that are being settled: by invariant 6, all that are not due.
    pub(super) fn settling(&self) -> usize {
        self.leases.len() - self.due.len()
    }

    pub(super) fn held_by(&self, consumer: ConsumerId) -> usize {
        self.consumers.get(&consumer).map_or(0, |consumer| consumer.by_sequence.len())
    }

    /// One lease of each consumer that has leases, and their number.
    pub(super) fn consumers(&self) -> impl Iterator<Item = (&Lease<T>, usize)> {
        self.consumers.values().filter_map(|consumer| {
            let (_, id) = consumer.by_sequence.first_key_value()?;
            Some((self.get(*id)?, consumer.by_sequence.len()))
        })
    }

    /// The leases of a consumer after this stream sequence, in stream order.
    pub(super) fn leases_of(
        &self,
        consumer: ConsumerId,
        after: Option<u64>,
    ) -> impl Iterator<Item = (u64, LeaseId)> {
        let from = match after {
            None => Some(0),
            Some(after) => after.checked_add(1),
        };
        let leases = self.consumers.get(&consumer).zip(from);
        let leases = leases.map(|(consumer, from)| consumer.by_sequence.range(from..));
        leases.into_iter().flatten().map(|(sequence, id)| (*sequence, *id))
    }

    pub(super) fn end_consumer(&mut self, name: ConsumerId, how: ConsumerEnd) {
        if let Some(consumer) = self.consumers.get_mut(&name)
            && consumer.ended.is_none()
        {
            consumer.ended = Some(how);
            self.unswept.insert(name, 0);
        }
    }

    pub(super) fn has_ended(&self, consumer: ConsumerId) -> bool {
        self.end_of_consumer(consumer).is_some()
    }

    pub(super) fn end_of_consumer(&self, consumer: ConsumerId) -> Option<ConsumerEnd> {
        self.consumers.get(&consumer)?.ended
    }

    /// Whether a consumer that has ended has leases that are not yet swept.
    pub(super) fn has_unswept(&self) -> bool {
        !self.unswept.is_empty()
    }

    /// The next lease of a consumer that has ended. Each lease is returned once.
    pub(super) fn next_unswept(&mut self) -> Option<LeaseId> {
        while let Some(mut unswept) = self.unswept.first_entry() {
            let consumer = self.consumers.get(unswept.key());
            let next =
                consumer.and_then(|consumer| consumer.by_sequence.range(unswept.get()..).next());
            if let Some((sequence, id)) = next {
                match sequence.checked_add(1) {
                    Some(from) => drop(unswept.insert(from)),
                    None => drop(unswept.remove()),
                }
                return Some(*id);
            }
            unswept.remove();
        }
        None
    }

    pub(super) fn distrust(&mut self, consumer: ConsumerId, when: Nanos) {
        if let Some(consumer) = self.consumers.get_mut(&consumer) {
            consumer.distrusted = consumer.distrusted.max(when);
        }
    }

    /// Whether the server still knows the progress that was sent at `sent_at`.
    pub(super) fn trusts(&self, consumer: ConsumerId, sent_at: Nanos) -> bool {
        self.consumers.get(&consumer).is_some_and(|consumer| sent_at > consumer.distrusted)
    }

    /// Panics if an invariant does not hold for this lease. Every step calls it in debug builds.
    fn check(&self, id: LeaseId) {
        if !cfg!(debug_assertions) {
            return;
        }
        assert!(self.due.len() <= self.leases.len(), "6: more due than leased");
        let Some(lease) = self.get(id) else { return };
        assert_eq!(self.outcomes.ended(id), None, "1: {id:?} is held, and has ended");
        let consumer = self.consumers.get(&lease.consumer);
        let found = consumer.and_then(|consumer| consumer.by_sequence.get(&lease.sequence));
        assert_eq!(found, Some(&id), "3: {id:?} is not the lease of its message");
        let due = lease.due_at().is_none_or(|at| self.due.contains(&(at, id)));
        assert!(due, "6: {id:?} is not due when it should be");
    }

    /// Panics if an invariant does not hold for a lease, or an index has an entry without a lease.
    pub(super) fn check_all(&self) {
        self.leases.keys().for_each(|id| self.check(*id));
        let due = self.leases.values().filter(|lease| lease.due_at().is_some()).count();
        assert_eq!(self.due.len(), due, "6: due without a lease");
        let lens = self.consumers.values().map(|consumer| consumer.by_sequence.len());
        assert_eq!(lens.sum::<usize>(), self.leases.len(), "3: a message without a lease");
        let empty = self.consumers.values().any(|consumer| consumer.by_sequence.is_empty());
        assert!(!empty, "a consumer without leases is kept");
        assert!(
            self.unswept.keys().all(|consumer| self.has_ended(*consumer)),
            "unswept, but not ended"
        );
    }
}

impl Default for Consumer {
    fn default() -> Self {
        Self { by_sequence: BTreeMap::new(), ended: None, distrusted: PAST }
    }
}
