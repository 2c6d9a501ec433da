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

/// The addresses of a service.
#[derive(Debug, Clone, Copy)]
pub struct ServedAt<'u> {
    /// The port of the clients.
    pub grpc: SocketAddr,
    /// Whether that port has TLS.
    pub tls: bool,
    /// The port of the operators.
    pub ops: SocketAddr,
    /// The URL of the private nats-server.
    pub nats: &'u str,
}

/// Lines for a person with a terminal: the addresses, and commands to paste.
pub fn hints(at: ServedAt<'_>, grpcurl: Option<&Path>) -> String {
    let ServedAt { grpc, tls, ops, nats } = at;
    let grpcurl = grpcurl.map_or(PathBuf::from("grpcurl"), Path::to_path_buf);
    let security = if tls { "-cacert CA_FILE" } else { "-plaintext" };
    let grpcurl = format!("{} {security}", grpcurl.display());
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_to_paste_speak_as_the_port_does() {
        let [grpc, ops] = [50_051, 8_080].map(|port| ([127, 0, 0, 1], port).into());
        for (tls, spoken, not) in
            [(false, "-plaintext", "-cacert"), (true, "-cacert CA_FILE", "-plaintext")]
        {
            let text = hints(ServedAt { grpc, tls, ops, nats: "nats://127.0.0.1:4222" }, None);
            assert_eq!(text.matches(spoken).count(), 5, "{text}");
            assert!(!text.contains(not), "{text}");
        }
    }
}
