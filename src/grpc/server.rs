//! The listener for clients: our service, reflection and health, behind a row of layers.
//!
//! ```text
//!  connection ─▶ protocol ─▶ trace* ─▶ metrics* ─▶ callers ─▶ limits ─▶ reasons ─▶ delivery ─▶ handlers
//! ```
//! Layers with a star are not there yet; this is their place. The order has reasons:
//!
//! - protocol: a request that is no gRPC is no call, so no other layer sees it;
//! - trace and metrics: they see refused calls too;
//! - callers before limits: a stranger takes no permit;
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
    layers::{AnswerDelivery, CallLimiter, ErrorReasons, GrpcOnly},
};
use crate::{
    broker::Broker,
    bus::Bus,
    limits::{CallLimits, ListenerLimits},
    net::{self, MiddlewareLayer, Services},
    pb,
    pb::fetch_service_server::FetchServiceServer,
    tls::ServerTls,
};

/// Longest request of reflection, in bytes. A request is a name.
const MAX_REFLECTION_REQUEST_BYTES: usize = 16 * 1024;

/// The contract built into this program cannot be read: a bug.
#[derive(Debug, thiserror::Error)]
#[error("the contract cannot be reflected: {0}")]
pub struct ContractError(#[from] tonic_reflection::server::Error);

/// Serves until `stop` gives the time by which to have ended. Open calls may end until then and are cut
/// after that.
///
/// # Errors
/// See [`ContractError`].
pub async fn serve<B: Broker + Bus>(
    listener: TcpListener,
    service: Service<B>,
    health: HealthServer<impl Health>,
    tls: Option<Arc<ServerTls>>,
    limits: ListenerLimits,
    calls: &CallLimits,
    stop: impl Future<Output = Instant>,
) -> Result<(), ContractError> {
    // The limits unpack requests. The list of accepted encodings is for clients that use another one.
    let callers = service.callers();
    let service = FetchServiceServer::new(service).accept_compressed(CompressionEncoding::Gzip);
    let routes = Routes::new(service)
        .add_service(health)
        .add_service(
            reflection().build_v1()?.max_decoding_message_size(MAX_REFLECTION_REQUEST_BYTES),
        )
        .add_service(
            reflection().build_v1alpha()?.max_decoding_message_size(MAX_REFLECTION_REQUEST_BYTES),
        )
        .prepare();
    let limiter = CallLimiter::new(calls, limits.max_connections);
    let behind = Services {
        listener: "grpc",
        beyond: true,
        tls,
        service: |connection: &_, beyond| {
            ServiceBuilder::new()
                .layer(MiddlewareLayer(GrpcOnly))
                .layer(MiddlewareLayer(callers.clone()))
                .layer(MiddlewareLayer(limiter.connection(beyond)))
                .layer(MiddlewareLayer(ErrorReasons))
                .layer(MiddlewareLayer(AnswerDelivery::new(connection)))
                .service(routes.clone())
        },
    };
    net::serve(listener, limits, behind, stop, limiter.idle()).await;
    Ok(())
}

/// Reflection of the contract. It includes the error details, which grpcurl would show as base64 otherwise.
fn reflection<'b>() -> tonic_reflection::server::Builder<'b> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}
