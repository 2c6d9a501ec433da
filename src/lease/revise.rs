//! Changes that concern all leases of a consumer: its configuration changes, it ends, its server loses
//! state.
//!
//! Each change works in steps, so that no call is long. Start with `after: None`, and continue with the
//! returned value until it is `None`. Leases may come and go between the steps.

use std::time::{Duration, Instant};

use super::{ConsumerEnd, ConsumerId, LeaseTable, entry::Lease, time::nanos};

impl<T> LeaseTable<T> {
    /// The consumer is gone, or another consumer has its name. All its leases are lost from now on, and the
    /// next sweeps return them. Nothing may be granted under this id any more.
    pub fn end_consumer(&mut self, consumer: ConsumerId, how: ConsumerEnd) {
        self.store.end_consumer(consumer, how);
    }

    /// The consumer's configuration has changed. Looks at up to `limit` leases after the stream sequence
    /// `after`, and gives each the ack wait of its delivery count. Returns the sequence to continue after,
    /// or `None` at the end.
    ///
    /// A lease that was over by the table's latest time stays over.
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

    /// The server may have lost its latest state of this consumer: it restarted, or another server leads.
    /// `when` is the earliest possible moment. After a lost connection it is the moment of the loss, not of
    /// the return. Works in steps, like [`LeaseTable::retune`].
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

    /// The server knows deliveries up to this consumer sequence only, so later leases are lost. Works in
    /// steps, like [`LeaseTable::retune`]. Nothing may be granted under this id between the steps: it would
    /// be newer than the server's answer.
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
