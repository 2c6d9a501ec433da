//! The meter of the connections to NATS.

use std::{sync::Arc, time::Duration};

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
    }
}
