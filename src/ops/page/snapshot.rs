//! What the page shows, at one moment. Asks the owners, and keeps nothing.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use crate::{
    admin::Overview,
    clock,
    refusal_log::{RecentRefusal, RefusalLog},
};

/// The owners of what the page shows.
pub struct StatusSources {
    /// Looks at all replicas until a time.
    pub overview: OverviewSource,
    /// The last refusals of this replica.
    pub refusals: Arc<RefusalLog>,
    /// Its connections to NATS.
    pub nats: Box<dyn Fn() -> NatsShown + Send + Sync>,
    /// The name of its cluster.
    pub cluster: String,
    /// Everybody who reaches the client port may do everything.
    pub insecure: bool,
    /// There is a page of metrics.
    pub has_metrics: bool,
}

type OverviewSource =
    Box<dyn Fn(Instant) -> Pin<Box<dyn Future<Output = Overview> + Send>> + Send + Sync>;

/// The connections to NATS at one moment.
#[derive(Debug, Clone, Default)]
pub struct NatsShown {
    /// The servers that may be tried, without user names and passwords.
    pub servers: String,
    /// Each connection: its purpose, and why it is down.
    pub connections: Vec<(&'static str, Option<String>)>,
    /// Consumers that have a connection of their own.
    pub own_connections: usize,
    /// The time of the last message to ourselves.
    pub round_trip: Option<Duration>,
}

/// See the [module](self).
pub(super) struct Snapshot {
    pub(super) overview: Overview,
    /// Each with the time since it was seen last.
    pub(super) refusals: Vec<(RecentRefusal, Duration)>,
    pub(super) nats: NatsShown,
    pub(super) cluster: String,
    pub(super) insecure: bool,
    pub(super) has_metrics: bool,
}

impl StatusSources {
    /// Looks until `until`.
    pub(super) async fn look(&self, until: Instant) -> Snapshot {
        let overview = (self.overview)(until).await;
        let now = clock::now();
        let ago = |refusal: RecentRefusal| {
            let ago = now.saturating_duration_since(refusal.last);
            (refusal, ago)
        };
        Snapshot {
            overview,
            refusals: self.refusals.recent().into_iter().map(ago).collect(),
            nats: (self.nats)(),
            cluster: self.cluster.clone(),
            insecure: self.insecure,
            has_metrics: self.has_metrics,
        }
    }
}
