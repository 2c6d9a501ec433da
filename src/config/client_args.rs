//! The command line of the client commands, as clap parses it. `main` gives it a meaning.
//!
//! The doc comments are the `--help` texts and `docs/reference/flags.md`.

use std::{env, path::PathBuf, time::Duration};

use clap::{Args, ValueEnum};

use super::values;

const TLS: &str = "TLS, for an address with https://";
const SETTLE_FIRST: &str = "Settlements before the fetch";
const ATTEMPT: &str = "A fetch that can be repeated";

/// The reason of a Term that has none.
pub const BY_HAND: &str = "terminated by hand";

const TAKE: &str = "\
Example:
  fetch-proxy fetch ORDERS worker -n 3 --lease 5m
      Fetch up to three messages. They are yours for five minutes, each with its token.

  fetch-proxy ack TOKEN
      Ack one of them. A message that is not settled comes back when its lease ends.

  fetch-proxy fetch ORDERS worker --ack TOKEN
      Ack a message, and fetch the next one, in one call.

  fetch-proxy fetch ORDERS worker --attempt NAME
      Fetch under a new name. The same with --again has the same messages, and give-back returns them.

In a running container: kubectl exec POD -- /fetch-proxy fetch ORDERS worker";

/// The address to call, and the format of the answer.
#[derive(Debug, Args)]
pub struct CallArgs {
    /// The address and the credential.
    #[command(flatten)]
    pub server: ServerArgs,
    /// Print JSON for programs: the messages of the contract, as grpcurl prints them.
    #[arg(long)]
    pub json: bool,
}

/// The address to call, and the credential.
#[derive(Debug, Args)]
pub struct ServerArgs {
    /// Address of a fetch-proxy for clients [default: FETCH_PROXY_LISTEN if that is set, else 127.0.0.1:50051]
    ///
    /// With TLS it begins with https://.
    #[arg(long, env = "FETCH_PROXY_ADDR", value_name = "ADDR")]
    pub addr: Option<String>,
    /// The files for TLS.
    #[command(flatten)]
    pub tls: ClientTlsArgs,
    /// File with the API key or the token of this client, for a fetch-proxy with a policy.
    ///
    /// It is sent with TLS, or to this machine.
    #[arg(long, env = "FETCH_PROXY_BEARER_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
}

impl ServerArgs {
    /// The address to call. In a container it is that of the service, which has its address from a variable.
    pub fn address(&self) -> String {
        address(self.addr.as_ref(), "FETCH_PROXY_LISTEN", "127.0.0.1:50051")
    }
}

/// The address that was given, or else that of `variable`, or else the default.
fn address(given: Option<&String>, variable: &str, default: &str) -> String {
    let of_the_service = || env::var(variable).ok().filter(|address| !address.is_empty());
    given.cloned().or_else(of_the_service).unwrap_or_else(|| default.to_owned())
}

/// The fetch-proxy whose health is asked for.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Address of a fetch-proxy, for clients or for operators [default: FETCH_PROXY_OPS_LISTEN if that is set, else 127.0.0.1:50052]
    ///
    /// With TLS it begins with https://.
    #[arg(long, env = "FETCH_PROXY_ADDR", value_name = "ADDR")]
    pub addr: Option<String>,
    /// The files for TLS.
    #[command(flatten)]
    pub tls: ClientTlsArgs,
    /// Name of the health service. Empty is readiness, `liveness` is whether the process answers.
    #[arg(long, default_value = "", value_name = "NAME")]
    pub service: String,
    /// Longest wait for an answer. Until then, a connection that fails is tried again.
    #[arg(long, default_value = "3s", value_name = "TIME", value_parser = values::time)]
    pub timeout: Duration,
}

impl ProbeArgs {
    /// The address to ask. In a container it is that for operators.
    pub fn address(&self) -> String {
        address(self.addr.as_ref(), "FETCH_PROXY_OPS_LISTEN", "127.0.0.1:50052")
    }
}

/// The files for TLS.
#[derive(Debug, Args)]
pub struct ClientTlsArgs {
    /// File with the certificate authorities (PEM) to trust, in place of the system's.
    #[arg(long, env = "FETCH_PROXY_CA", value_name = "FILE", help_heading = TLS)]
    pub ca: Option<PathBuf>,
    /// File with the certificate of this client (PEM).
    #[arg(long, env = "FETCH_PROXY_CERT", value_name = "FILE", help_heading = TLS)]
    pub cert: Option<PathBuf>,
    /// File with the key of the certificate (PEM), without a password.
    #[arg(long, env = "FETCH_PROXY_KEY", value_name = "FILE", help_heading = TLS)]
    pub key: Option<PathBuf>,
    /// Name that the certificate of the server must have [default: the host of the address]
    #[arg(long, value_name = "NAME", help_heading = TLS)]
    pub server_name: Option<String>,
}

/// The messages to fetch.
#[derive(Debug, Args)]
#[command(after_help = TAKE)]
pub struct FetchArgs {
    /// The address and the format.
    #[command(flatten)]
    pub call: CallArgs,
    /// Name of the stream.
    pub stream: String,
    /// Name of a pull consumer of the stream.
    pub consumer: String,
    /// Most messages to fetch. A number above 1000 is lowered to 1000.
    #[arg(short, long = "count", default_value_t = 1, value_name = "COUNT",
          value_parser = values::number(1..=values::MAX_COUNT))]
    pub n: u32,
    /// Longest wait for a first message.
    #[arg(long, default_value = "5s", value_name = "TIME", value_parser = values::time)]
    pub max_wait: Duration,
    /// How long the messages are leased [default: a little less than the consumer's ack wait]
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    pub lease: Option<Duration>,
    /// How payloads are checked. A payload that is not `text` or `json` as asked is terminated.
    #[arg(long, default_value = "auto", value_name = "CODEC")]
    pub codec: CodecArg,
    /// Ack this earlier message first. It may be given several times.
    ///
    /// If a settlement fails, nothing is fetched.
    #[arg(long, value_name = "TOKEN", help_heading = SETTLE_FIRST)]
    pub ack: Vec<String>,
    /// Nak this earlier message first, without a delay. It may be given several times.
    #[arg(long, value_name = "TOKEN", help_heading = SETTLE_FIRST)]
    pub nak: Vec<String>,
    /// Terminate this earlier message first. It may be given several times.
    #[arg(long, value_name = "TOKEN", help_heading = SETTLE_FIRST)]
    pub term: Vec<String>,
    /// New name of this fetch, at most 128 bytes. A fetch with the same name has the same messages.
    #[arg(long, value_name = "NAME", help_heading = ATTEMPT)]
    pub attempt: Option<String>,
    /// This fetch is a repeat: ask the other replicas for its messages, too.
    #[arg(long, requires = "attempt", help_heading = ATTEMPT)]
    pub again: bool,
}

/// The fetch to give back.
#[derive(Debug, Args)]
pub struct GiveBackArgs {
    /// The address and the format.
    #[command(flatten)]
    pub call: CallArgs,
    /// Name of the stream.
    pub stream: String,
    /// Name of the consumer.
    pub consumer: String,
    /// Name of the fetch, as in `fetch --attempt`.
    #[arg(value_name = "NAME")]
    pub attempt: String,
}

/// The consumer to show.
#[derive(Debug, Args)]
pub struct ConsumerArgs {
    /// The address and the format.
    #[command(flatten)]
    pub call: CallArgs,
    /// Name of the stream.
    pub stream: String,
    /// Name of a pull consumer of the stream.
    pub consumer: String,
}

/// How payloads are checked.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum CodecArg {
    /// No check. A payload that is UTF-8 is shown as text.
    Auto,
    /// A payload must be UTF-8.
    Text,
    /// A payload must be JSON.
    Json,
}

/// The messages that are done.
#[derive(Debug, Args)]
pub struct AckArgs {
    /// The address and the format.
    #[command(flatten)]
    pub call: CallArgs,
    /// Tokens that `fetch` printed. Blanks and quotes around a token are ignored.
    #[arg(required = true, value_name = "TOKEN")]
    pub tokens: Vec<String>,
}

/// The messages to deliver again.
#[derive(Debug, Args)]
pub struct NakArgs {
    /// The tokens.
    #[command(flatten)]
    pub ack: AckArgs,
    /// Time before the messages are delivered again, at most 24h.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = values::time)]
    pub delay: Duration,
}

/// The messages that are never delivered again.
#[derive(Debug, Args)]
pub struct TermArgs {
    /// The tokens.
    #[command(flatten)]
    pub ack: AckArgs,
    /// Reason for JetStream's advisory, cut to 1 KiB.
    #[arg(long, default_value = BY_HAND, value_name = "TEXT")]
    pub reason: String,
}

/// The leases that end later, or sooner.
#[derive(Debug, Args)]
pub struct ExtendArgs {
    /// The tokens.
    #[command(flatten)]
    pub ack: AckArgs,
    /// Time from now until the leases end, at least 1s [default: the length that was granted]
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    pub lease: Option<Duration>,
}
