//! The listener for clients: the service behind its limits, reflection and health.

use std::{future::Future, time::Instant};

use tokio::net::TcpListener;
use tonic::{codec::CompressionEncoding, service::Routes};
use tonic_health::pb::health_server::{Health, HealthServer};

use super::{
    Service,
    calls::Calls,
    edge::{self, Behind, EdgeLimits},
    reasons::Reasons,
};
use crate::{broker::Broker, bus::Bus, pb, pb::fetch_service_server::FetchServiceServer};

/// Largest request that is read, in bytes.
const LARGEST_REQUEST: usize = 4 * 1024 * 1024;

/// The contract built into this program cannot be read: a bug.
#[derive(Debug, thiserror::Error)]
#[error("the contract cannot be reflected: {0}")]
pub struct ContractError(#[from] tonic_reflection::server::Error);

/// Serves until `stop` says by when to be gone, with at most `max_calls` calls of the service
/// under way. Open calls may end in that time; what is open then is cut off.
///
/// # Errors
/// See [`ContractError`].
pub async fn serve<B: Broker + Bus>(
    listener: TcpListener,
    service: Service<B>,
    health: HealthServer<impl Health>,
    limits: EdgeLimits,
    max_calls: usize,
    stop: impl Future<Output = Instant>,
) -> Result<(), ContractError> {
    let service = FetchServiceServer::new(service)
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(LARGEST_REQUEST);
    let routes = Routes::new(service)
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .prepare();
    let (calls, beyond) = (Calls::new(max_calls), Calls::none(limits.max_connections));
    let behind = Behind {
        listener: "grpc",
        service: calls.before(Reasons::new(routes.clone())),
        beyond: Some(beyond.before(Reasons::new(routes))),
    };
    edge::serve(listener, limits, behind, stop, calls.idle()).await;
    Ok(())
}

/// The error details are registered too: without them grpcurl shows them as base64.
fn reflection<'b>() -> tonic_reflection::server::Builder<'b> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}
