//! The listener for operators and probes, always in plain text: gRPC health beside `/livez` and
//! `/readyz` over HTTP/1.1 and HTTP/2. It serves nothing that a client needs.

use std::{future::Future, time::Instant};

use axum::{Router, routing::get};
use http::StatusCode;
use tokio::{net::TcpListener, sync::watch};
use tonic::service::Routes;
use tonic_health::pb::health_server::{Health, HealthServer};

use super::edge::{self, Behind, EdgeLimits};
use crate::readiness::Verdict;

/// Probes are few and short; whoever opens more is no probe.
const LIMITS: EdgeLimits = EdgeLimits { max_connections: 256, max_age: None, http1: true };

/// Serves until `stop` says by when to be gone.
pub async fn serve_ops(
    listener: TcpListener,
    health: HealthServer<impl Health>,
    verdict: watch::Receiver<Verdict>,
    stop: impl Future<Output = Instant>,
) {
    let pages = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(move || std::future::ready(readyz(&verdict.borrow()))));
    let service = Routes::from(pages).add_service(health).prepare();
    let behind = Behind { listener: "ops", service, beyond: None };
    edge::serve(listener, LIMITS, behind, stop, std::future::ready(())).await;
}

fn readyz(verdict: &Verdict) -> (StatusCode, String) {
    match verdict {
        Verdict::Serving => (StatusCode::OK, "ok\n".to_owned()),
        Verdict::NotServing(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}
