//! The meter of the connections to NATS.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use super::{
    labels::{Label as _, NatsRight, NatsRole},
    store::{Counts, SeriesStore, Times},
    table::FamilyId,
};

/// Counts what happens to the connections. A copy is the same meter.
#[derive(Debug, Clone)]
pub struct NatsMeter(Arc<NatsCounts>);

#[derive(Debug)]
struct NatsCounts {
    connects: Counts<NatsRole>,
    losses: Counts<NatsRole>,
    denied: Counts<NatsRight>,
    round_trip: Times,
    /// The last round trip in nanoseconds. 0: there was none.
    last_round_trip: AtomicU64,
}

impl NatsMeter {
    pub(super) fn new(store: &SeriesStore) -> Self {
        // The library does not tell how long its own pings take.
        let settling = vec![NatsRole::Settling.value().into()];
        Self(Arc::new(NatsCounts {
            connects: Counts::new(store, FamilyId::NatsConnects, &[]),
            losses: Counts::new(store, FamilyId::NatsLosses, &[]),
            denied: Counts::new(store, FamilyId::NatsDenied, &[]),
            round_trip: store.times(FamilyId::NatsRoundTrip, settling),
            last_round_trip: AtomicU64::new(0),
        }))
    }

    /// A connection was made.
    pub fn connected(&self, role: NatsRole) {
        self.0.connects.of(role).add(1);
    }

    /// A connection was lost.
    pub fn lost(&self, role: NatsRole) {
        self.0.losses.of(role).add(1);
    }

    /// The server has refused a subject.
    pub fn denied(&self, right: NatsRight) {
        self.0.denied.of(right).add(1);
    }

    /// A message to ourselves has come back.
    pub fn returned(&self, after: Duration) {
        self.0.round_trip.observe(after.as_secs_f64());
        let nanos = u64::try_from(after.as_nanos()).unwrap_or(u64::MAX);
        self.0.last_round_trip.store(nanos.max(1), Ordering::Relaxed);
    }

    /// The time of the last message to ourselves, also without metrics.
    pub fn last_round_trip(&self) -> Option<Duration> {
        let nanos = self.0.last_round_trip.load(Ordering::Relaxed);
        (nanos > 0).then(|| Duration::from_nanos(nanos))
    }
}
