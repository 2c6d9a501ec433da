//! What the page for people shows of this replica: asks the owners each time.

use std::sync::Arc;

use crate::{
    admin::Inspector,
    config::{Admission, Serve},
    lessor::Lessor,
    metrics::NatsMeter,
    nats::Nats,
    ops::{NatsShown, StatusSources},
    refusal_log::RefusalLog,
};

/// The part of the settings that the page shows.
pub(super) struct ShownSettings {
    cluster: String,
    nats_servers: String,
    insecure: bool,
    has_metrics: bool,
}

impl ShownSettings {
    pub(super) fn of(config: &Serve) -> Self {
        Self {
            cluster: config.cluster.clone(),
            nats_servers: config.nats.redacted(),
            insecure: config.admission == Some(Admission::Insecure),
            has_metrics: config.metrics.is_some(),
        }
    }
}

/// The owners of what the page shows.
pub(super) fn sources(
    ShownSettings { cluster, nats_servers, insecure, has_metrics }: ShownSettings,
    (inspector, lessor): (Arc<Inspector<Nats>>, Lessor<Nats>),
    (refusals, meter): (Arc<RefusalLog>, NatsMeter),
) -> StatusSources {
    StatusSources {
        overview: Box::new(move |until| {
            let inspector = inspector.clone();
            Box::pin(async move { inspector.overview(until).await })
        }),
        refusals,
        nats: Box::new(move || NatsShown {
            servers: nats_servers.clone(),
            connections: lessor.broker().connections().into(),
            own_connections: lessor.own_connections(),
            round_trip: meter.last_round_trip(),
        }),
        cluster,
        insecure,
        has_metrics,
    }
}
