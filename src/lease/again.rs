//! A lease that is given to its caller a second time, or taken from its caller under a new id.

use std::time::{Duration, Instant};

use super::{
    Assigned, LeaseError, LeaseId, LeaseTable,
    entry::{Lease, State},
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
        self.assign_by(Lease::assign_again, id, length, now)
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
