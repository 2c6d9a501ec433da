//! What happens to all leases of a consumer at once: it changes, it goes, its server forgets.
//!
//! Each walk is in steps, so that no call is long: start with `after: None`, and go on with what it
//! returned until that is `None`. Leases may come and go between the steps.

use std::time::{Duration, Instant};

use super::{ConsumerId, LeaseTable, entry::Lease, time::nanos};

impl<T> LeaseTable<T> {
    /// The consumer is gone, or another one has its name: all its leases are lost from now on, and
    /// come out of the next sweeps. Nothing may be granted under this id any more.
    pub fn end_consumer(&mut self, consumer: ConsumerId) {
        self.store.kill(consumer);
    }

    /// The consumer's configuration has changed: looks at up to `limit` of its leases after the
    /// stream sequence `after`, and gives each the ack wait of its delivery count. Returns where
    /// to go on, until there is nothing left.
    ///
    /// What was over by the latest time the table was told of stays over.
    pub fn retune(
        &mut self,
        consumer: ConsumerId,
        ack_wait: impl Fn(u64) -> Duration,
        after: Option<u64>,
        limit: usize,
    ) -> Option<u64> {
        let now = self.now;
        self.revise(consumer, after, limit, |lease| {
            lease.retune(|count| nanos(ack_wait(count)), now);
        })
    }

    /// The server may have forgotten the last moments of what it promised to this consumer: it
    /// restarted, or another one leads. `when` is the earliest moment at which that may have been:
    /// where a connection was lost, that moment, not the one at which it came back. In steps, like
    /// [`LeaseTable::retune`].
    pub fn distrust(
        &mut self,
        consumer: ConsumerId,
        when: Instant,
        after: Option<u64>,
        limit: usize,
    ) -> Option<u64> {
        self.advance(when);
        let when = self.origin.since(when);
        self.store.distrust(consumer, when);
        self.revise(consumer, after, limit, |lease| lease.distrust(when))
    }

    /// The server remembers deliveries up to this consumer sequence only: leases after it are
    /// lost. In steps, like [`LeaseTable::retune`]; nothing may be granted under this id between
    /// them, for that would be newer than what the server said.
    pub fn lose_after(
        &mut self,
        consumer: ConsumerId,
        delivered: u64,
        after: Option<u64>,
        limit: usize,
    ) -> Option<u64> {
        self.revise(consumer, after, limit, |lease| lease.lose_after(delivered))
    }

    fn revise(
        &mut self,
        consumer: ConsumerId,
        after: Option<u64>,
        limit: usize,
        change: impl Fn(&mut Lease<T>),
    ) -> Option<u64> {
        let step: Vec<_> = self.store.leases_of(consumer, after).take(limit).collect();
        for (_, id) in &step {
            self.store.update(*id, &change);
        }
        step.last().filter(|_| step.len() == limit).map(|(sequence, _)| *sequence)
    }
}
