//! The listener for clients: limits, reflection, health and the service.

use std::{future::Future, time::Duration};

use tokio::net::TcpListener;
use tonic::{
    codec::CompressionEncoding,
    transport::{Server, server::TcpIncoming},
};
use tonic_health::pb::health_server::{Health, HealthServer};

use super::{Service, reasons::ReasonsLayer};
use crate::{broker::Broker, pb, pb::fetch_service_server::FetchServiceServer};

/// Largest request that is read, in bytes.
const LARGEST_REQUEST: usize = 4 * 1024 * 1024;
/// Calls that one connection may have open; hyper has no limit of its own.
const MOST_STREAMS: u32 = 1000;
/// Headers of one request, in bytes.
const LARGEST_HEADERS: u32 = 16 * 1024;
/// A peer that does not answer a ping within the timeout is gone, and its waiters with it.
const KEEPALIVE: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a listener does not serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// It broke.
    #[error("the listener failed: {0}")]
    Listener(#[from] tonic::transport::Error),
    /// The contract built into this program cannot be read: a bug.
    #[error("the contract cannot be reflected: {0}")]
    Contract(#[from] tonic_reflection::server::Error),
}

/// Serves until `stop` is ready and every call has ended.
///
/// # Errors
/// When the listener breaks.
pub async fn serve<B: Broker>(
    listener: TcpListener,
    service: Service<B>,
    health: HealthServer<impl Health>,
    stop: impl Future<Output = ()>,
) -> Result<(), ServeError> {
    let service = FetchServiceServer::new(service)
        .accept_compressed(CompressionEncoding::Gzip)
        .max_decoding_message_size(LARGEST_REQUEST);
    Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        .http2_max_header_list_size(Some(LARGEST_HEADERS))
        .max_concurrent_streams(Some(MOST_STREAMS))
        .layer(ReasonsLayer)
        .add_service(service)
        .add_service(health)
        .add_service(reflection().build_v1()?)
        .add_service(reflection().build_v1alpha()?)
        .serve_with_incoming_shutdown(TcpIncoming::from(listener).with_nodelay(Some(true)), stop)
        .await?;
    Ok(())
}

/// The error details are registered too: without them grpcurl shows them as base64.
fn reflection<'b>() -> tonic_reflection::server::Builder<'b> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
}
