//! A lease that is given to its caller a second time, or taken from its caller under a new id.

use std::time::{Duration, Instant};

use super::{
    Assigned, LeaseError, LeaseId, LeaseTable,
    entry::{Lease, State},
    time::nanos,
};

impl<T> LeaseTable<T> {
    /// Assigns a lease to its caller again, for `length` from now, as [`LeaseTable::assign`] does. The lease does not
    /// end earlier by this.
    ///
    /// # Errors
    /// The lease is no longer held.
    pub fn assign_again(
        &mut self,
        id: LeaseId,
        length: Option<Duration>,
        now: Instant,
    ) -> Result<Assigned, LeaseError> {
        let now = self.advance(now);
        let (length, latest) = (length.map(nanos), now + self.longest);
        let lease = self.change(id, now, |lease| lease.assign_again(length, now, latest))?;
        let (deadline, ack_by) = (lease.deadline(), lease.ack_by());
        let settle_by = self.origin.at(deadline.min(ack_by));
        Ok(Assigned { deadline: self.origin.at(deadline), settle_by })
    }

    /// Takes a lease from its caller, for the next caller. Its old id has ended, because somebody may have the token.
    /// The proxy itself has the lease under a new id, as after [`LeaseTable::reclaim`]. `None`: it is no longer held.
    pub fn reissue(&mut self, id: LeaseId, now: Instant) -> Option<LeaseId> {
        let now = self.advance(now);
        self.standing(id, now).ok().filter(|lease| lease.state == State::Held)?;
        let new = self.next_id();
        self.store.rename(id, new);
        self.store.update(new, Lease::reclaim);
        Some(new)
    }
}
