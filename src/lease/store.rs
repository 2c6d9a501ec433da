//! Where leases are kept, with the indexes that find them. Owns invariants 1, 3 and 6 of the table:
//! a lease comes in, changes and leaves through here, and the indexes follow.
//!
//! B-trees throughout: no call ever pays for the growth of a whole table, as it would with a hash
//! map (a million leases rehashed at once), and the order is the same in every run.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Bound,
};

use super::{
    ConsumerId, LeaseId,
    ended::{Ended, OutcomeRing},
    entry::{Lease, State},
    time::{Nanos, PAST},
};

#[derive(Debug)]
pub(super) struct Store<T> {
    /// Boxed: ids only ever grow, which leaves the nodes of a B-tree half empty.
    leases: BTreeMap<LeaseId, Box<Lease<T>>>,
    due: BTreeSet<(Nanos, LeaseId)>,
    /// Those that have leases.
    consumers: BTreeMap<ConsumerId, Consumer>,
    /// Dead ones, and from which stream sequence on their leases are still to be looked at.
    dying: BTreeMap<ConsumerId, u64>,
    memory: OutcomeRing,
}

#[derive(Debug)]
struct Consumer {
    by_sequence: BTreeMap<u64, LeaseId>,
    /// Deleted or made anew: all its leases are lost.
    dead: bool,
    /// Progress sent until then does not count: the server has forgotten since.
    distrusted: Nanos,
}

impl<T> Store<T> {
    pub(super) fn new(remembered: usize) -> Self {
        Self {
            leases: BTreeMap::new(),
            due: BTreeSet::new(),
            consumers: BTreeMap::new(),
            dying: BTreeMap::new(),
            memory: OutcomeRing::new(remembered),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.leases.len()
    }

    pub(super) fn get(&self, id: LeaseId) -> Option<&Lease<T>> {
        self.leases.get(&id).map(Box::as_ref)
    }

    /// How a lease that is not here ended.
    pub(super) fn ended(&self, id: LeaseId) -> Option<Ended> {
        self.memory.ended(id)
    }

    pub(super) fn remember(&mut self, id: LeaseId, ended: Ended) {
        self.memory.remember(id, ended);
    }

    /// Leases after this id, in the order of their ids.
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

    /// The oldest id of which it may be known how it ended.
    pub(super) fn oldest_remembered(&self) -> Option<LeaseId> {
        self.memory.oldest()
    }

    /// Adds a lease under the next id. An older one of the same message leaves: the arrival of the
    /// new delivery is the proof that JetStream gave it away.
    pub(super) fn insert(&mut self, id: LeaseId, lease: Lease<T>) -> Option<(LeaseId, T)> {
        self.memory.extend_to(id);
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
            self.forget(older, lease, ended)
        });
        self.check(id);
        superseded
    }

    /// Changes a lease, and its place among those due.
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

    /// Takes a lease out, and remembers how it ended.
    pub(super) fn remove(&mut self, id: LeaseId, ended: Ended) -> Option<T> {
        let payload = self.take(id)?;
        self.memory.remember(id, ended);
        self.check(id);
        Some(payload)
    }

    /// Takes a lease out, and remembers nothing.
    pub(super) fn take(&mut self, id: LeaseId) -> Option<T> {
        let lease = *self.leases.remove(&id)?;
        let name = lease.consumer;
        if let Some(consumer) = self.consumers.get_mut(&name) {
            consumer.by_sequence.remove(&lease.sequence);
            if consumer.by_sequence.is_empty() {
                self.consumers.remove(&name);
                self.dying.remove(&name);
            }
        }
        lease.due_at().map(|at| self.due.remove(&(at, id)));
        Some(lease.payload)
    }

    /// The rest of a removal, for a lease that the index by sequence does not point to any more.
    fn forget(&mut self, id: LeaseId, lease: Lease<T>, ended: Ended) -> (LeaseId, T) {
        lease.due_at().map(|at| self.due.remove(&(at, id)));
        self.memory.remember(id, ended);
        (id, lease.payload)
    }

    /// The lease that time comes to first.
    pub(super) fn first_due(&self) -> Option<(Nanos, LeaseId)> {
        self.due.first().copied()
    }

    /// By invariant 6 they are those that are not due.
    pub(super) fn settling(&self) -> usize {
        self.leases.len() - self.due.len()
    }

    pub(super) fn held_by(&self, consumer: ConsumerId) -> usize {
        self.consumers.get(&consumer).map_or(0, |consumer| consumer.by_sequence.len())
    }

    /// Leases of a consumer after this stream sequence, in its order.
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

    pub(super) fn kill(&mut self, name: ConsumerId) {
        if let Some(consumer) = self.consumers.get_mut(&name)
            && !consumer.dead
        {
            consumer.dead = true;
            self.dying.insert(name, 0);
        }
    }

    pub(super) fn is_dead(&self, consumer: ConsumerId) -> bool {
        self.consumers.get(&consumer).is_some_and(|consumer| consumer.dead)
    }

    /// Whether leases of dead consumers are still to be looked at.
    pub(super) fn has_dying(&self) -> bool {
        !self.dying.is_empty()
    }

    /// The next lease of a dead consumer; each is looked at once.
    pub(super) fn next_dying(&mut self) -> Option<LeaseId> {
        while let Some(mut dying) = self.dying.first_entry() {
            let consumer = self.consumers.get(dying.key());
            let next =
                consumer.and_then(|consumer| consumer.by_sequence.range(dying.get()..).next());
            if let Some((sequence, id)) = next {
                match sequence.checked_add(1) {
                    Some(from) => drop(dying.insert(from)),
                    None => drop(dying.remove()),
                }
                return Some(*id);
            }
            dying.remove();
        }
        None
    }

    pub(super) fn distrust(&mut self, consumer: ConsumerId, when: Nanos) {
        if let Some(consumer) = self.consumers.get_mut(&consumer) {
            consumer.distrusted = consumer.distrusted.max(when);
        }
    }

    /// Whether what this consumer was told at `sent_at` is still known to the server.
    pub(super) fn trusts(&self, consumer: ConsumerId, sent_at: Nanos) -> bool {
        self.consumers.get(&consumer).is_some_and(|consumer| sent_at > consumer.distrusted)
    }

    /// What every step leaves true of the lease that it touched.
    fn check(&self, id: LeaseId) {
        if !cfg!(debug_assertions) {
            return;
        }
        assert!(self.due.len() <= self.leases.len(), "6: more due than leased");
        let Some(lease) = self.get(id) else { return };
        assert_eq!(self.memory.ended(id), None, "1: {id:?} is held, and has ended");
        let consumer = self.consumers.get(&lease.consumer);
        let found = consumer.and_then(|consumer| consumer.by_sequence.get(&lease.sequence));
        assert_eq!(found, Some(&id), "3: {id:?} is not the lease of its message");
        let due = lease.due_at().is_none_or(|at| self.due.contains(&(at, id)));
        assert!(due, "6: {id:?} is not due when it should be");
    }

    /// The same of all, and that there is nothing in an index without a lease.
    pub(super) fn check_all(&self) {
        self.leases.keys().for_each(|id| self.check(*id));
        let due = self.leases.values().filter(|lease| lease.due_at().is_some()).count();
        assert_eq!(self.due.len(), due, "6: due without a lease");
        let lens = self.consumers.values().map(|consumer| consumer.by_sequence.len());
        assert_eq!(lens.sum::<usize>(), self.leases.len(), "3: a message without a lease");
        let empty = self.consumers.values().any(|consumer| consumer.by_sequence.is_empty());
        assert!(!empty, "a consumer without leases is kept");
        assert!(self.dying.keys().all(|consumer| self.is_dead(*consumer)), "dying, but not dead");
    }
}

impl Default for Consumer {
    fn default() -> Self {
        Self { by_sequence: BTreeMap::new(), dead: false, distrusted: PAST }
    }
}
