//! Leases that live as long as the stream of their caller. The table does not know streams: whoever owns the stream
//! says when it has ended.

use std::time::{Duration, Instant};

use super::{Assigned, LeaseError, LeaseId, LeaseOutcome, LeaseTable, ended::Ended, time::nanos};

impl<T> LeaseTable<T> {
    /// Assigns a lease to a caller until [`LeaseTable::end_kept`], and for `grace` after that, but for at most `at_most`
    /// from now. Longer times than the table's longest lease are lowered to that. A later assignment or extension takes
    /// the place of this one.
    ///
    /// # Errors
    /// The lease is no longer held.
    pub fn assign_kept(
        &mut self,
        id: LeaseId,
        (at_most, grace): (Duration, Duration),
        now: Instant,
    ) -> Result<Assigned, LeaseError> {
        let now = self.advance(now);
        let [at_most, grace] = [at_most, grace].map(|length| nanos(length).min(self.longest));
        self.assign_with(id, now, |lease| lease.assign_kept(now + at_most, grace))
    }

    /// The stream of the caller has ended. A kept lease ends after its grace, also if it is being settled now and that
    /// fails. Other leases do not change.
    pub fn end_kept(&mut self, id: LeaseId, now: Instant) {
        let now = self.advance(now);
        self.store.update(id, |lease| lease.end_kept(now));
    }

    /// How a lease has left the table. `None`: it is here, or it has moved to another table, or its end is forgotten.
    pub fn end_of(&self, id: LeaseId) -> Option<LeaseOutcome> {
        Some(match self.store.ended(id)? {
            Ended::Settled(by) | Ended::Overtaken(by) => LeaseOutcome::Settled { by },
            Ended::Lapsed | Ended::Lost => LeaseOutcome::Expired,
            Ended::Gone => LeaseOutcome::ConsumerGone,
        })
    }
}
