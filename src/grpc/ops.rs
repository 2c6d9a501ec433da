//! The listener for operators and probes, always in plain text: gRPC health beside `/livez` and
//! `/readyz` over HTTP/1.1 and HTTP/2. It serves nothing that a client needs.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use axum::{Router, routing::get};
use http::StatusCode;
use tokio::{net::TcpListener, sync::watch};
use tonic::service::Routes;
use tonic_health::pb::health_server::{Health, HealthServer};

use super::{
    connection::Used,
    edge::{self, Behind, EdgeLimits},
};
use crate::readiness::Verdict;

/// Probes are few and short. A connection that is not used for a minute is no probe's, and makes room
/// for one before that.
const LIMITS: EdgeLimits = EdgeLimits {
    max_connections: 256,
    max_age: None,
    max_idle: Some(Duration::from_secs(60)),
    http1: true,
};

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
    let behind = Behind {
        listener: "ops",
        beyond: false,
        service: |connection: &_, _| Used::new(connection, service.clone()),
    };
    edge::serve(listener, LIMITS, behind, stop, std::future::ready(())).await;
}

fn readyz(verdict: &Verdict) -> (StatusCode, String) {
    match verdict {
        Verdict::Serving => (StatusCode::OK, "ok\n".to_owned()),
        Verdict::NotServing(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}
