//! The table as operators see it, and the end of a lease that an operator takes away. A walk looks at a bounded
//! number of leases in each call. Ids ascend and are used once, so a lease that lives through a whole walk is
//! seen exactly once.

use std::time::Instant;

use super::{
    LeaseId, LeaseTable,
    ended::Ended,
    entry::{Lease, State},
    time::{NEVER, Nanos},
};

/// The state of a lease, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseStage {
    /// It is held.
    Held,
    /// A settlement is under way.
    Settling,
    /// A settlement was sent, and nobody knows whether it arrived.
    Uncertain,
}

/// A lease at one moment.
#[derive(Debug)]
pub struct LeaseView<'t, T> {
    /// Its id.
    pub id: LeaseId,
    /// The message's sequence in its stream.
    pub sequence: u64,
    /// Its state.
    pub stage: LeaseStage,
    /// It is the last attempt: a Nak would destroy the message.
    pub last_attempt: bool,
    /// The end for its holder. `None`: the proxy holds a last attempt until a caller comes.
    pub expires: Option<Instant>,
    /// Its payload.
    pub payload: &'t T,
}

/// The outcome of [`LeaseTable::revoke`].
#[derive(Debug, PartialEq, Eq)]
pub enum Revoked<T> {
    /// The lease has ended. A Nak with this payload is harmless if it arrives by this time. `None`: the time is
    /// too short for a Nak, and JetStream redelivers the message by itself.
    Done(T, Option<Instant>),
    /// It is the last attempt, and stays.
    LastAttempt,
    /// It is being settled, or may have been settled, and stays.
    Settling,
    /// There is no such lease, or it is over.
    Gone,
}

impl<T> LeaseTable<T> {
    /// Shows living leases after `after` to `visit`, in the order of their ids, until `visit` returns `false`.
    /// Looks at no more than `limit` leases. Returns the id to continue after, or `None` at the end. Changes nothing.
    pub fn walk(
        &self,
        after: Option<LeaseId>,
        limit: usize,
        now: Instant,
        mut visit: impl FnMut(LeaseView<'_, T>) -> bool,
    ) -> Option<LeaseId> {
        let now = self.now.max(self.origin.since(now));
        let (mut last, mut seen) = (None, 0);
        for (id, lease) in self.store.after(after).take(limit) {
            (last, seen) = (Some(id), seen + 1);
            if self.standing(id, now).is_ok() && !visit(self.seen(id, lease)) {
                return last;
            }
        }
        last.filter(|_| seen == limit)
    }

    /// The lease of this id, if it is alive.
    pub fn view(&self, id: LeaseId, now: Instant) -> Option<LeaseView<'_, T>> {
        let now = self.now.max(self.origin.since(now));
        Some(self.seen(id, self.standing(id, now).ok()?))
    }

    /// Ends a lease that is held, so that its message can be delivered again. A last attempt ends only if `forced`.
    pub fn revoke(&mut self, id: LeaseId, forced: bool, now: Instant) -> Revoked<T> {
        let now = self.advance(now);
        let Ok(lease) = self.standing(id, now) else { return Revoked::Gone };
        if lease.state != State::Held {
            return Revoked::Settling;
        }
        if lease.is_last_attempt() && !forced {
            return Revoked::LastAttempt;
        }
        let by = lease.nak_by(now).map(|by| self.origin.at(by));
        self.store
            .remove(id, Ended::Lapsed)
            .map_or(Revoked::Gone, |payload| Revoked::Done(payload, by))
    }

    fn seen<'t>(&self, id: LeaseId, lease: &'t Lease<T>) -> LeaseView<'t, T> {
        let end: Nanos = match lease.state {
            State::Held | State::Settling { .. } => lease.deadline(),
            State::Uncertain(_) => lease.ack_by(),
        };
        LeaseView {
            id,
            sequence: lease.sequence,
            stage: match lease.state {
                State::Held => LeaseStage::Held,
                State::Settling { .. } => LeaseStage::Settling,
                State::Uncertain(_) => LeaseStage::Uncertain,
            },
            last_attempt: lease.is_last_attempt(),
            expires: (end != NEVER).then(|| self.origin.at(end)),
            payload: &lease.payload,
        }
    }
}
