//! The listener for operators and probes, always without TLS: gRPC health, `/livez`, `/readyz`, `/metrics` and
//! the page for people at `/`, over HTTP/1.1 and HTTP/2. It serves nothing that a client needs.

use std::{
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    Router,
    extract::Request,
    response::{IntoResponse as _, Response},
    routing::get,
};
use http::{StatusCode, header};
use tokio::{net::TcpListener, sync::watch};
use tonic::service::Routes;
use tonic_health::pb::health_server::{Health, HealthServer};
use tower::Layer as _;

use super::{
    page::{StatusPages, StatusSources},
    scrape::Scrapes,
};
use crate::{
    api_error::ApiError,
    grpc::to_status,
    limits::ListenerLimits,
    metrics::Metrics,
    net::{self, CountOpenCalls, LastService, MiddlewareLayer, Services},
    readiness::Verdict,
    reason::Reason,
};

/// Calls open at once on one connection: checks, and a few Watch streams.
const MAX_OPS_STREAMS: u32 = 16;
/// Longest time without a call. Probes are few and short, so an older idle connection is no probe's. A new
/// connection may replace an idle one earlier.
const MAX_IDLE_CONNECTION: Duration = Duration::from_secs(60);

/// The content of the pages.
pub struct Pages {
    /// Whether this replica serves.
    pub verdict: watch::Receiver<Verdict>,
    /// The metrics; `None` for no such page.
    pub metrics: Option<Metrics>,
    /// What the page for people shows; `None` for no such page.
    pub status: Option<StatusSources>,
}

/// Serves until `stop` gives the time by which to have ended, at most `max_connections` at once.
pub async fn serve(
    listener: TcpListener,
    max_connections: usize,
    health: HealthServer<impl Health>,
    Pages { verdict, metrics, status }: Pages,
    stop: impl Future<Output = Instant>,
) {
    let pages = Router::new()
        .route("/livez", get(|| async { "ok\n" }))
        .route("/readyz", get(move || std::future::ready(readyz(&verdict.borrow()))))
        .fallback(|request: Request| std::future::ready(not_here(&request)));
    let meter = metrics.clone().unwrap_or_else(Metrics::off).connections("ops", max_connections);
    let pages = match metrics.map(Scrapes::new) {
        Some(scrapes) => {
            pages.route("/metrics", get(move |request: Request| scrapes.answer(request)))
        }
        None => pages,
    };
    let pages = match status.map(StatusPages::new) {
        Some(status) => pages.route("/", get(move |request: Request| status.answer(request))),
        None => pages,
    };
    let service = Routes::from(pages).add_service(health).prepare();
    let behind = Services {
        listener: "ops",
        meter,
        beyond: false,
        tls: None,
        // Operators are shown the connections of clients alone.
        connections: Arc::default(),
        service: |connection: &_, _| {
            MiddlewareLayer(CountOpenCalls::new(connection)).layer(LastService(service.clone()))
        },
    };
    let limits = ListenerLimits {
        max_connections,
        max_age: None,
        max_idle: Some(MAX_IDLE_CONNECTION),
        max_streams: MAX_OPS_STREAMS,
        http1: true,
    };
    net::serve(listener, limits, behind, stop, std::future::ready(())).await;
}

/// Answers every other request with a hint: a gRPC call with a status, others with a page.
fn not_here(request: &Request) -> Response {
    let content = request.headers().get(header::CONTENT_TYPE);
    if content.is_some_and(|content| content.as_bytes().starts_with(b"application/grpc")) {
        let text = "this is the ops port, with health and metrics; the service is on the other \
                    port, that of --listen";
        let refused = ApiError::Foreign(Reason::Unsupported, text.to_owned());
        return to_status(&refused).into_http();
    }
    (StatusCode::NOT_FOUND, "there are /, /livez, /readyz and /metrics here, and gRPC health\n")
        .into_response()
}

fn readyz(verdict: &Verdict) -> (StatusCode, String) {
    match verdict {
        Verdict::Serving => (StatusCode::OK, "ok\n".to_owned()),
        Verdict::NotServing(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}
