//! The listener for clients: our service, reflection and health, behind a row of layers.
//!
//! ```text
//!  connection ─▶ protocol ─▶ record ─▶ callers ─▶ quotas ─▶ limits ─▶ reasons ─▶ delivery ─▶ handlers
//! ```
//! The order has reasons:
//!
//! - protocol: a request that is no gRPC is no call, so no other layer sees it;
//! - record: it sees refused calls too, and the layers behind it fill it;
//! - callers before limits: a stranger takes no permit;
//! - quotas after callers: a limit of a principal needs to know it, and a principal over its limit takes no permit;
//! - limits: before the request is read, and until the answer is written;
//! - reasons: they rename errors of the handlers' library, and the limits need no renaming;
//! - delivery: it alone knows the guard that a handler leaves.

use std::{future::Future, sync::Arc, time::Instant};

use tokio::net::TcpListener;
use tonic::{codec::CompressionEncoding, service::Routes};
use tonic_health::pb::health_server::{Health, HealthServer};
use tower::ServiceBuilder;

use super::{
    Service,
    admin::Admin,
    layers::{AnswerDelivery, CallLimiter, ErrorReasons, GrpcOnly, RecordCalls},
    reflection::{ContractError, reflected},
};
use crate::{
    admin::Inspector,
    broker::Broker,
    bus::Bus,
    limits::{CallLimits, ListenerLimits},
    net::{self, LastService, MiddlewareLayer, Services},
    pb::fetch_service_server::FetchServiceServer,
    request_log::{RequestLog, RequestLogScope},
    tls::ServerTls,
    traces::Traces,
};

/// The services of the listener for clients.
pub struct Served<B: Broker + Bus, H: Health> {
    /// Our service.
    pub service: Service<B>,
    /// The answers for operators.
    pub inspector: Arc<Inspector<B>>,
    /// Health.
    pub health: HealthServer<H>,
    /// Whether there is reflection too.
    pub reflection: bool,
    /// The traces of calls.
    pub traces: Traces,
    /// The calls that have a line in the request log.
    pub request_log: RequestLogScope,
}

/// Serves until `stop` gives the time by which to have ended. Open calls may end until then and are cut
/// after that.
///
/// # Errors
/// See [`ContractError`].
pub async fn serve<B: Broker + Bus>(
    listener: TcpListener,
    Served { service, inspector, health, reflection, traces, request_log }: Served<B, impl Health>,
    tls: Option<Arc<ServerTls>>,
    limits: ListenerLimits,
    calls: &CallLimits,
    stop: impl Future<Output = Instant>,
) -> Result<(), ContractError> {
    // The limits unpack requests. The list of accepted encodings is for clients that use another one.
    let (callers, quotas) = (service.callers(), service.quotas());
    let metrics = service.metrics().clone();
    let record = RecordCalls::new(&metrics, traces, RequestLog::new(request_log));
    let admin = Admin::server(service.gatekeeper().clone(), inspector.clone());
    let service = FetchServiceServer::new(service).accept_compressed(CompressionEncoding::Gzip);
    let routes = Routes::new(service).add_service(admin).add_service(health);
    let routes = if reflection { reflected(routes)? } else { routes };
    let routes = routes.prepare();
    let limiter = CallLimiter::new(calls, limits.max_connections);
    limiter.show(&metrics);
    quotas.show(&metrics);
    let behind = Services {
        listener: "grpc",
        meter: metrics.connections("grpc", limits.max_connections),
        beyond: true,
        tls,
        connections: inspector.connections().clone(),
        service: |connection: &_, beyond| {
            ServiceBuilder::new()
                .layer(MiddlewareLayer(GrpcOnly))
                .layer(MiddlewareLayer(record.clone()))
                .layer(MiddlewareLayer(callers(connection)))
                .layer(MiddlewareLayer(quotas.clone()))
                .layer(MiddlewareLayer(limiter.connection(beyond)))
                .layer(MiddlewareLayer(ErrorReasons))
                .layer(MiddlewareLayer(AnswerDelivery::new(connection)))
                .service(LastService(routes.clone()))
        },
    };
    net::serve(listener, limits, behind, stop, limiter.idle()).await;
    Ok(())
}
