//! The listener for operators and probes, always in plain text: gRPC health beside `/livez` and
//! `/readyz` over HTTP/1.1 and HTTP/2. It serves nothing that a client needs.

use std::future::Future;

use axum::{Router, routing::get};
use http::StatusCode;
use tokio::{net::TcpListener, sync::watch};
use tonic::{
    service::Routes,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::pb::health_server::{Health, HealthServer};

use super::server::ServeError;
use crate::readiness::Verdict;

/// Serves until `stop` is ready.
///
/// # Errors
/// When the listener breaks.
pub async fn serve_ops(
    listener: TcpListener,
    health: HealthServer<impl Health>,
    verdict: watch::Receiver<Verdict>,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let pages = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(move || std::future::ready(readyz(&verdict.borrow()))));
    let routes = Routes::from(pages).add_service(health);
    let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
    Server::builder()
        .accept_http1(true)
        .add_routes(routes)
        .serve_with_incoming_shutdown(incoming, stop)
        .await?;
    Ok(())
}

fn readyz(verdict: &Verdict) -> (StatusCode, String) {
    match verdict {
        Verdict::Serving => (StatusCode::OK, "ok\n".to_owned()),
        Verdict::NotServing(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}
