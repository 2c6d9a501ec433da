//! The listener for clients: the service behind its limits, reflection and health.

use std::{future::Future, time::Instant};

use tokio::net::TcpListener;
use tonic::{codec::CompressionEncoding, service::Routes};
use tonic_health::pb::health_server::{Health, HealthServer};
use tower::Layer as _;

use super::{Service, calls::Calls, protocol::GrpcAlone, reasons::Reasons};
use crate::{
    broker::Broker,
    bus::Bus,
    limits::{CallLimits, ListenerLimits},
    net::{self, Services},
    pb,
    pb::fetch_service_server::FetchServiceServer,
};

/// Longest request of reflection, in bytes: a name.
const MAX_REFLECTION_REQUEST_BYTES: usize = 16 * 1024;

/// The contract built into this program cannot be read: a bug.
#[derive(Debug, thiserror::Error)]
#[error("the contract cannot be reflected: {0}")]
pub struct ContractError(#[from] tonic_reflection::server::Error);

/// Serves until `stop` says by when to be gone. Open calls may end in that time; what is open then is
/// cut off.
///
/// # Errors
/// See [`ContractError`].
pub async fn serve<B: Broker + Bus>(
    listener: TcpListener,
    service: Service<B>,
    health: HealthServer<impl Health>,
    limits: ListenerLimits,
    calls: &CallLimits,
    stop: impl Future<Output = Instant>,
) -> Result<(), ContractError> {
    // Requests arrive here unpacked; what can be unpacked is told to those who send anything else.
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
    let calls = Calls::new(calls, limits.max_connections);
    let behind = Services {
        listener: "grpc",
        beyond: true,
        service: |connection: &_, beyond| {
            let bounded = calls.on(connection, beyond).layer(Reasons::new(routes.clone()));
            GrpcAlone.layer(bounded)
        },
    };
    net::serve(listener, limits, behind, stop, calls.idle()).await;
    Ok(())
}

/// The error details are registered too: without them grpcurl shows them as base64.
fn reflection<'b>() -> tonic_reflection::server::Builder<'b> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}
