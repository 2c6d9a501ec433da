//! The command line of the commands for operators, as clap parses it. `commands` gives it a meaning.
//!
//! The doc comments are the `--help` texts and `docs/reference/flags.md`.

use std::{path::PathBuf, time::Duration};

use clap::Args;

use super::{admin_socket::AdminSocket, client_args::ClientTlsArgs, listen::Listen, values};

const WHO: &str = "\
Examples:
  fetch-proxy leases ORDERS worker --older-than 10m
      Show who has held a message for ten minutes or longer.

  fetch-proxy release ORDERS worker --worker worker-7
      Show what this worker holds, ask, and then release it to other workers.

In a container: kubectl exec deploy/fetch-proxy -- /fetch-proxy leases";

/// The fetch-proxy to ask, the credential to ask with, and the format of the answer.
#[derive(Debug, Args)]
pub struct OperatorArgs {
    /// Address of a fetch-proxy for clients [default: the admin socket of a fetch-proxy on this machine]
    ///
    /// With TLS it begins with https://. Without a policy, only the admin socket answers.
    #[arg(long, env = "FETCH_PROXY_ADDR", value_name = "ADDR")]
    pub addr: Option<String>,
    /// Admin socket, as in `serve` [default: that of --ops-listen]
    #[arg(long, env = "FETCH_PROXY_ADMIN_SOCKET", value_name = "NAME")]
    pub admin_socket: Option<AdminSocket>,
    /// Address of the ops port of the fetch-proxy on this machine. The number of the port names the admin socket.
    #[arg(
        long,
        env = "FETCH_PROXY_OPS_LISTEN",
        default_value = "127.0.0.1:50052",
        value_name = "ADDR"
    )]
    pub ops_listen: Listen,
    /// The files for TLS.
    #[command(flatten)]
    pub tls: ClientTlsArgs,
    /// File with the API key or the token to ask with, for --addr.
    #[arg(long, env = "FETCH_PROXY_BEARER_FILE", value_name = "FILE")]
    pub token_file: Option<PathBuf>,
    /// Print JSON for programs, with the names of the contract: one object on each line.
    #[arg(long)]
    pub json: bool,
}

/// How often a list is shown.
#[derive(Debug, Args)]
pub struct WatchArgs {
    /// Show the list again and again, with this time between. On a terminal it is painted anew.
    #[arg(long, value_name = "TIME", num_args = 0..=1, default_missing_value = "2s",
          require_equals = true, value_parser = values::time)]
    pub watch: Option<Duration>,
}

/// The replicas to list.
#[derive(Debug, Args)]
pub struct ReplicasArgs {
    /// The fetch-proxy to ask.
    #[command(flatten)]
    pub operator: OperatorArgs,
    /// How often.
    #[command(flatten)]
    pub watch: WatchArgs,
}

/// The consumers to list.
#[derive(Debug, Args)]
pub struct ConsumersArgs {
    /// The fetch-proxy to ask.
    #[command(flatten)]
    pub operator: OperatorArgs,
    /// How often.
    #[command(flatten)]
    pub watch: WatchArgs,
    /// Name of the stream [default: all]
    pub stream: Option<String>,
    /// Name of the consumer [default: all]
    pub consumer: Option<String>,
}

/// The leases to list.
#[derive(Debug, Args)]
#[command(after_help = WHO)]
pub struct LeasesArgs {
    /// The fetch-proxy to ask.
    #[command(flatten)]
    pub operator: OperatorArgs,
    /// How often.
    #[command(flatten)]
    pub watch: WatchArgs,
    /// Name of the stream [default: all]
    pub stream: Option<String>,
    /// Name of the consumer [default: all]
    pub consumer: Option<String>,
    /// Only leases of this principal.
    #[arg(long, value_name = "NAME")]
    pub principal: Option<String>,
    /// Only leases of the worker that gave itself this name in its Fetch.
    #[arg(long, value_name = "NAME")]
    pub worker: Option<String>,
    /// Only leases that a caller has had for at least this long.
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    pub older_than: Option<Duration>,
    /// Only leases that end within this time.
    #[arg(long, value_name = "TIME", value_parser = values::time)]
    pub expiring_within: Option<Duration>,
    /// Only leases of this replica, by its instance.
    #[arg(long, value_name = "INSTANCE")]
    pub replica: Option<String>,
    /// Most leases to show.
    #[arg(long, default_value_t = 100, value_name = "COUNT",
          value_parser = values::number(1..=values::MAX_COUNT))]
    pub limit: u32,
}

/// The connections to list.
#[derive(Debug, Args)]
pub struct ConnectionsArgs {
    /// The fetch-proxy to ask.
    #[command(flatten)]
    pub operator: OperatorArgs,
    /// How often.
    #[command(flatten)]
    pub watch: WatchArgs,
}

/// The leases to release.
#[derive(Debug, Args)]
#[command(after_help = WHO)]
#[command(group = clap::ArgGroup::new("which").required(true).multiple(true))]
pub struct ReleaseArgs {
    /// The fetch-proxy to ask.
    #[command(flatten)]
    pub operator: OperatorArgs,
    /// Name of the stream.
    pub stream: String,
    /// Name of the consumer.
    pub consumer: String,
    /// The lease of the message with this sequence in its stream.
    #[arg(long, value_name = "NUMBER", group = "which",
          value_parser = clap::value_parser!(u64).range(1..))]
    pub sequence: Option<u64>,
    /// Leases of the worker that gave itself this name in its Fetch.
    #[arg(long, value_name = "NAME", group = "which")]
    pub worker: Option<String>,
    /// Leases of this principal.
    #[arg(long, value_name = "NAME", group = "which")]
    pub principal: Option<String>,
    /// Leases that a caller has had for at least this long.
    #[arg(long, value_name = "TIME", group = "which", value_parser = values::time)]
    pub older_than: Option<Duration>,
    /// All leases of the consumer.
    #[arg(long, group = "which")]
    pub all: bool,
    /// Time before the messages are delivered again, at most 24h.
    #[arg(long, default_value = "0s", value_name = "TIME", value_parser = values::time)]
    pub delay: Duration,
    /// Show what would be released, and release nothing.
    #[arg(long)]
    pub dry_run: bool,
    /// Release last attempts, too. Their messages are not delivered again.
    #[arg(long)]
    pub force_last_attempts: bool,
    /// Do not ask.
    #[arg(long)]
    pub yes: bool,
}
