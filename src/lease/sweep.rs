//! Time passing over the whole table: what is due, and what came of progress.

use std::time::{Duration, Instant};

use super::{
    Due, LeaseId, LeaseTable,
    ended::Ended,
    entry::{Lease, State},
    time::{Nanos, PAST},
};

impl<T> LeaseTable<T> {
    /// What is due by now, at most `limit` of it; there may be more when it is as much, and there
    /// is while [`LeaseTable::next_due`] is not after `now`.
    ///
    /// A lease whose progress is due is reported once per eighth of its ack wait, until
    /// [`LeaseTable::progressed`] says that it counted.
    pub fn sweep(&mut self, now: Instant, limit: usize) -> Vec<Due<T>> {
        let now = self.advance(now);
        let mut swept = self.bury(limit);
        for _ in swept.len()..limit {
            let Some((at, id)) = self.store.first_due() else { break };
            if at > now {
                break;
            }
            swept.extend(self.come_to(id, now));
        }
        swept
    }

    /// What came of a progress that was sent at `sent_at`. It counts only if it was confirmed
    /// before `ack_by` as it was: after that JetStream confirms, and does nothing. Then the clock
    /// starts anew, from the sending.
    pub fn progressed(&mut self, id: LeaseId, sent_at: Instant, confirmed: bool, now: Instant) {
        let (sent_at, now) = (self.origin.since(sent_at), self.advance(now));
        let Some(lease) = self.store.get(id) else { return };
        if confirmed && self.store.trusts(lease.consumer, sent_at) {
            self.store.update(id, |lease| lease.progressed(sent_at, now));
        }
    }

    /// The clock of the callers stood still for so long, as it does while a machine is suspended;
    /// `now`, by that clock, is when this was noticed. JetStream's clock did not stand still, nor did
    /// the holders': every lease ends that much sooner.
    pub fn slept(&mut self, gap: Duration, now: Instant) {
        self.origin.slept(gap, now);
        self.advance(now);
    }

    /// When [`LeaseTable::sweep`] next has something to do.
    pub fn next_due(&self) -> Option<Instant> {
        let dying = self.store.has_dying().then_some(PAST);
        let next = dying.or_else(|| self.store.first_due().map(|(at, _)| at));
        next.map(|at| self.origin.at(at))
    }

    /// Takes out leases of dead consumers, looking at no more than `limit`. Those being settled
    /// are passed over: the end of their settlement is theirs.
    fn bury(&mut self, limit: usize) -> Vec<Due<T>> {
        let mut buried = Vec::new();
        for _ in 0..limit {
            let Some(id) = self.store.next_dying() else { break };
            let settling = |lease: &Lease<T>| matches!(lease.state, State::Settling { .. });
            if !self.store.get(id).is_some_and(settling) {
                buried.extend(self.lose(id));
            }
        }
        buried
    }

    fn come_to(&mut self, id: LeaseId, now: Nanos) -> Option<Due<T>> {
        let lease = self.store.get(id)?;
        if self.is_over(lease, now) {
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
        let payload = self.store.remove(id, Ended::Lost)?;
        Some(Due::Lost { id, payload })
    }
}
