//! `fetch-proxy dev`: a complete service on one machine, for a first look. Starts a private nats-server,
//! makes a stream and a consumer with sample tasks, and serves in front of them.
//!
//! Owns the private server and its content. `serve` uses nothing of this.

pub mod guard;
mod ports;
mod samples;
mod server;

use std::{error::Error, net::SocketAddr, ops::RangeInclusive, path::Path};

pub use self::{
    ports::{GRPC, NATS, OPS, UsualPort},
    samples::subject,
    server::{PrivateServer, StartError},
};
use crate::nats::{self, Provisioned};

/// The stream that `dev` makes.
pub const STREAM: &str = "TASKS";
/// The subjects of that stream.
pub const SUBJECTS: &str = "tasks.>";
/// The durable consumer that `dev` makes.
pub const CONSUMER: &str = "batch-worker";

/// Makes the stream and the consumer at a private server, if they are not there, and publishes `count` samples.
/// Returns the numbers of the samples. They continue the numbers of the samples that were published before.
///
/// # Errors
/// There is no server, or no private server of a `dev`: nothing was published. Otherwise the error of NATS, in its own
/// words: some samples may be published.
pub async fn fill(
    url: &str,
    count: u32,
) -> Result<RangeInclusive<u64>, Box<dyn Error + Send + Sync>> {
    let what = Provisioned {
        server: server::SERVER_NAME,
        stream: STREAM,
        subjects: SUBJECTS,
        consumer: CONSUMER,
    };
    let numbers = |last: u64| last + 1..=last + u64::from(count);
    let last = nats::provision(url, &what, |last| samples::samples(numbers(last))).await?;
    Ok(numbers(last))
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
    /// The usual ports that other programs have.
    pub taken: &'u [UsualPort],
}

/// Lines for a person with a terminal: the addresses, and commands to paste. `program` is the name by which the person
/// has started this program.
pub fn hints(at: ServedAt<'_>, program: &str, grpcurl: &Path) -> String {
    let ServedAt { grpc, tls, ops, nats, taken } = at;
    let is_usual = |address: &str, UsualPort { port, .. }| address == format!("127.0.0.1:{port}");
    let addr = match tls {
        true => format!(" --addr https://{grpc} --ca CA_FILE"),
        false if is_usual(&grpc.to_string(), GRPC) => String::new(),
        false => format!(" --addr {grpc}"),
    };
    let is_usual_nats = is_usual(nats.trim_start_matches("nats://"), NATS);
    let nats_url = if is_usual_nats { String::new() } else { format!(" --nats-url {nats}") };
    let security = if tls { "-cacert CA_FILE" } else { "-plaintext" };
    let grpcurl = format!("{} {security}", grpcurl.display());
    let fetch = format!(
        r#"{{"stream":"{STREAM}","consumer":"{CONSUMER}","n":2,"codec":"CODEC_AUTO","lease":"600s"}}"#
    );
    let moved = |UsualPort { name, port }: &UsualPort| {
        format!("Another program uses port {port}, so {name} has another port.\n")
    };
    let moved: String = taken.iter().map(moved).collect();
    let certificate = match tls {
        true => {
            "If clients must show a certificate, add --cert FILE --key FILE, and for grpcurl -cert FILE -key FILE.\n"
        }
        false => "",
    };
    format!(
        "\n\
         fetch-proxy serves stream {STREAM}, consumer {CONSUMER}:\n  \
           gRPC  {grpc}\n  \
           ops   http://{ops}/readyz\n  \
           NATS  {nats}\n\
         {moved}{certificate}\n\
         In another terminal, take two messages, leased to you for ten minutes:\n  \
           {program} fetch {STREAM} {CONSUMER} -n 2 --lease 10m{addr}\n\n\
         Settle a message by the token that came with it:\n  \
           {program} ack TOKEN{addr}\n\n\
         Publish ten more samples:\n  \
           {program} dev publish 10{nats_url}\n\n\
         The same calls by grpcurl, as any gRPC client makes them:\n  \
           {grpcurl} -d '{fetch}' {grpc} {service}/Fetch\n  \
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

    fn at(port: u16, nats: &str) -> ServedAt<'_> {
        let [grpc, ops] = [port, port + 1].map(|port| ([127, 0, 0, 1], port).into());
        ServedAt { grpc, tls: false, ops, nats, taken: &[] }
    }

    #[test]
    fn commands_to_paste_speak_as_the_port_does() {
        for (tls, spoken, not) in
            [(false, "-plaintext", "-cacert"), (true, "-cacert CA_FILE", "-plaintext")]
        {
            let at = ServedAt { tls, ..at(50_051, "nats://127.0.0.1:4222") };
            let text = hints(at, "fetch-proxy", Path::new("grpcurl"));
            assert_eq!(text.matches(spoken).count(), 5, "{text}");
            assert!(!text.contains(not), "{text}");
            let by_hand = text.matches("--addr https://127.0.0.1:50051 --ca CA_FILE").count();
            assert_eq!(by_hand, if tls { 2 } else { 0 }, "{text}");
            assert_eq!(text.contains("add --cert FILE --key FILE"), tls, "{text}");
        }
    }

    #[test]
    fn commands_to_paste_name_an_address_only_if_it_is_not_the_usual() {
        let text = hints(at(50_051, "nats://127.0.0.1:4222"), "bin/fp", Path::new("grpcurl"));
        for line in ["bin/fp ack TOKEN", "bin/fp dev publish 10"] {
            assert!(text.contains(&format!("  {line}\n")), "{line} is not in:\n{text}");
        }
        let taken = [NATS];
        let at = ServedAt { taken: &taken, ..at(50_061, "nats://127.0.0.1:4223") };
        let text = hints(at, "bin/fp", Path::new("grpcurl"));
        for line in [
            "  bin/fp ack TOKEN --addr 127.0.0.1:50061",
            "  bin/fp dev publish 10 --nats-url nats://127.0.0.1:4223",
            "Another program uses port 4222, so NATS has another port.",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} is not in:\n{text}");
        }
    }
}
