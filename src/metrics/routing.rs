//! The meter of tokens on their way to the replica that holds their lease.

use std::time::Duration;

use super::{
    labels::{ForwardFailure, SettlementRoute},
    store::{Counts, SeriesStore, Times},
    table::FamilyId,
};

/// Counts tokens by their way.
#[derive(Debug)]
pub struct RouteMeter {
    routes: Counts<SettlementRoute>,
    time: Times,
    failures: Counts<ForwardFailure>,
}

impl RouteMeter {
    pub(super) fn new(store: &SeriesStore) -> Self {
        Self {
            routes: Counts::new(store, FamilyId::SettlementsRouted, &[]),
            time: store.times(FamilyId::ForwardTime, Vec::new()),
            failures: Counts::new(store, FamilyId::ForwardFailures, &[]),
        }
    }

    /// So many tokens took this way.
    pub fn routed(&self, route: SettlementRoute, tokens: usize) {
        self.routes.of(route).add(tokens as u64);
    }

    /// Another replica has answered.
    pub fn answered(&self, after: Duration) {
        self.time.observe(after.as_secs_f64());
    }

    /// No replica has answered.
    pub fn failed(&self, why: ForwardFailure) {
        self.failures.of(why).add(1);
    }
}
