//! `fetch-proxy dev`: a complete service on one machine, for a first look. Starts a private nats-server,
//! makes a stream and a consumer with sample tasks, and serves in front of them.
//!
//! Owns the private server and its content. `serve` uses nothing of this.

pub mod guard;
mod samples;
mod server;

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
};

pub use self::server::{PrivateServer, StartError};
use crate::nats::{self, Provisioned};

/// The stream that `dev` makes.
pub const STREAM: &str = "TASKS";
/// The subjects of that stream.
pub const SUBJECTS: &str = "tasks.>";
/// The durable consumer that `dev` makes.
pub const CONSUMER: &str = "batch-worker";

/// Makes the stream, the consumer and the sample tasks.
///
/// # Errors
/// The error of NATS, in its own words.
pub async fn fill(
    server: &PrivateServer,
    count: usize,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let what = Provisioned { stream: STREAM, subjects: SUBJECTS, consumer: CONSUMER };
    nats::provision(server.url(), &what, samples::samples(count)).await
}

/// Lines for a person with a terminal: the addresses, and commands to paste.
pub fn hints(grpc: SocketAddr, ops: SocketAddr, nats: &str, grpcurl: Option<&Path>) -> String {
    let grpcurl = grpcurl.map_or(PathBuf::from("grpcurl"), Path::to_path_buf);
    let grpcurl = format!("{} -plaintext", grpcurl.display());
    let fetch = format!(
        r#"{{"stream":"{STREAM}","consumer":"{CONSUMER}","n":2,"codec":"CODEC_AUTO","lease":"600s"}}"#
    );
    format!(
        "\n\
         fetch-proxy serves stream {STREAM}, consumer {CONSUMER}:\n  \
           gRPC  {grpc}\n  \
           ops   http://{ops}/readyz\n  \
           NATS  {nats}\n\n\
         Take two messages, leased to you for ten minutes:\n  \
           {grpcurl} -d '{fetch}' {grpc} {service}/Fetch\n\n\
         Settle one by the token that came with it:\n  \
           {grpcurl} -d '{{\"token\":\"TOKEN\"}}' {grpc} {service}/Ack\n  \
           {grpcurl} -d '{{\"token\":\"TOKEN\",\"delay\":\"5s\"}}' {grpc} {service}/Nak\n  \
           {grpcurl} -d '{{\"token\":\"TOKEN\",\"reason\":\"cannot be done\"}}' {grpc} {service}/Term\n\n\
         Read the contract:\n  \
           {grpcurl} {grpc} describe {service}\n\n\
         Ctrl-C ends everything.\n",
        service = crate::grpc::SERVICE,
    )
}
