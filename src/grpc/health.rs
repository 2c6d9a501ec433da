//! Readiness as gRPC health tells it: `""` and our service follow it, `liveness` only says that
//! the process answers.

use tokio::sync::watch;
use tonic_health::{
    ServingStatus,
    pb::health_server::{Health as HealthService, HealthServer},
    server::{HealthReporter, health_reporter},
};

use super::SERVICE;
use crate::readiness::Verdict;

/// The health name that does not depend on NATS: for liveness probes.
pub const LIVENESS: &str = "liveness";

/// Tells readiness to whoever asks.
pub struct Health {
    reporter: HealthReporter,
    verdict: watch::Sender<Verdict>,
}

impl Health {
    /// Not serving until told otherwise. The service may be put on several listeners.
    pub async fn new(verdict: Verdict) -> (Self, HealthServer<impl HealthService>) {
        let (reporter, service) = health_reporter();
        let health = Self { reporter, verdict: watch::channel(verdict.clone()).0 };
        // tonic-health begins with "" serving.
        health.tell(verdict).await;
        health.reporter.set_service_status(LIVENESS, ServingStatus::Serving).await;
        (health, service)
    }

    /// Tells this from now on.
    pub async fn tell(&self, verdict: Verdict) {
        let status = match verdict {
            Verdict::Serving => ServingStatus::Serving,
            Verdict::NotServing(_) => ServingStatus::NotServing,
        };
        for name in ["", SERVICE] {
            self.reporter.set_service_status(name, status).await;
        }
        self.verdict.send_replace(verdict);
    }

    /// Follows what is told.
    pub fn watch(&self) -> watch::Receiver<Verdict> {
        self.verdict.subscribe()
    }
}
