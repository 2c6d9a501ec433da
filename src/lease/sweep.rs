//! Time passes for the whole table: due leases, and the outcomes of progress.

use std::time::{Duration, Instant};

use super::{
    ConsumerEnd, Due, LeaseId, LeaseTable, SettleKind,
    ended::Ended,
    entry::{Lease, State},
    time::{Nanos, PAST},
};

impl<T> LeaseTable<T> {
    /// Returns at most `limit` leases that are due now. More are due while [`LeaseTable::next_due`] is not
    /// later than `now`.
    ///
    /// A lease whose progress is due is returned once in each eighth of its ack wait, until
    /// [`LeaseTable::progressed`] counts progress.
    pub fn sweep(&mut self, now: Instant, limit: usize) -> Vec<Due<T>> {
        let now = self.advance(now);
        let mut swept = self.sweep_ended_consumers(limit);
        for _ in swept.len()..limit {
            let Some((at, id)) = self.store.first_due() else { break };
            if at > now {
                break;
            }
            swept.extend(self.sweep_one(id, now));
        }
        swept
    }

    /// Whether progress may still be sent for a lease that was due. Behind a Nak it would end the delay of the Nak.
    pub fn may_progress(&self, id: LeaseId) -> bool {
        self.store.get(id).is_some_and(|lease| match lease.state {
            State::Held => true,
            State::Settling { kind, .. } | State::Uncertain(kind) => kind != SettleKind::Nak,
        })
    }

    /// Takes in the outcome of progress that was sent at `sent_at`. Progress counts only if it was
    /// confirmed before `ack_by`: later JetStream confirms it and does nothing. If it counts, JetStream's
    /// clock starts again at the sending.
    pub fn progressed(&mut self, id: LeaseId, sent_at: Instant, confirmed: bool, now: Instant) {
        let (sent_at, now) = (self.origin.since(sent_at), self.advance(now));
        let Some(lease) = self.store.get(id) else { return };
        if confirmed && self.store.trusts(lease.consumer, sent_at) {
            self.store.update(id, |lease| lease.progressed(sent_at, now));
        }
    }

    /// The callers' clock stood still for `gap`, because the machine was suspended. `now` is the time at
    /// which this was noticed, by that clock. JetStream's clock and the holders' clocks continued, so every
    /// lease ends that much sooner.
    pub fn slept(&mut self, gap: Duration, now: Instant) {
        self.origin.slept(gap, now);
        self.advance(now);
    }

    /// The time at which [`LeaseTable::sweep`] has something to do next.
    pub fn next_due(&self) -> Option<Instant> {
        let unswept = self.store.has_unswept().then_some(PAST);
        let next = unswept.or_else(|| self.store.first_due().map(|(at, _)| at));
        next.map(|at| self.origin.at(at))
    }

    /// Takes out leases of consumers that have ended, and looks at no more than `limit`. A lease that is
    /// being settled stays: it ends with its settlement.
    fn sweep_ended_consumers(&mut self, limit: usize) -> Vec<Due<T>> {
        let mut swept = Vec::new();
        for _ in 0..limit {
            let Some(id) = self.store.next_unswept() else { break };
            let settling = |lease: &Lease<T>| matches!(lease.state, State::Settling { .. });
            if !self.store.get(id).is_some_and(settling) {
                swept.extend(self.lose(id));
            }
        }
        swept
    }

    fn sweep_one(&mut self, id: LeaseId, now: Nanos) -> Option<Due<T>> {
        let lease = self.store.get(id)?;
        let ended = self.store.has_ended(lease.consumer);
        if self.is_over(lease, now) && (ended || !lease.runs_out()) {
            return self.lose(id);
        }
        if lease.state == State::Held && now >= lease.deadline() {
            let release = lease.release_by(now).map(|by| self.origin.at(by));
            let payload = self.store.remove(id, Ended::Lapsed)?;
            return Some(Due::Lapsed { id, payload, release });
        }
        self.store.update(id, |lease| lease.try_progress(now));
        Some(Due::Progress { id })
    }

    fn lose(&mut self, id: LeaseId) -> Option<Due<T>> {
        let consumer = self.store.get(id)?.consumer;
        let gone = self.store.end_of_consumer(consumer) == Some(ConsumerEnd::Gone);
        let payload = self.store.remove(id, if gone { Ended::Gone } else { Ended::Lost })?;
        Some(Due::Lost { id, payload })
    }
}
