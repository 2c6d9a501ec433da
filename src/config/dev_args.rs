//! The command line of `dev` and of its guard, as clap parses it.
//!
//! The doc comments are the `--help` texts and `docs/reference/flags.md`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{listen::Listen, values};

const MORE: &str = "\
Example:
  fetch-proxy dev publish 5
      Publish five more samples, while `fetch-proxy dev` runs in another terminal.";

/// The settings of the first look.
#[derive(Debug, Args)]
pub struct DevArgs {
    /// Address of the client port [default: 127.0.0.1:50051, or any free port if 50051 is taken]
    ///
    /// It is IP:PORT, NAME:PORT, or :PORT for all addresses. Port 0 is any free port. Addresses beyond
    /// this machine need credentials and TLS, or one of --insecure and --plaintext of `serve`.
    #[arg(long, env = "FETCH_PROXY_LISTEN", value_name = "ADDR")]
    pub listen: Option<Listen>,
    /// Address of the ops port, for operators and probes [default: 127.0.0.1:50052, or any free port if 50052 is taken]
    ///
    /// It has /livez, /readyz, /metrics and a page for people over HTTP, and gRPC health, all in plain text.
    #[arg(long, env = "FETCH_PROXY_OPS_LISTEN", value_name = "ADDR")]
    pub ops_listen: Option<Listen>,
    /// File for the addresses that are listened on, as {"grpc": "…", "ops": "…"}.
    ///
    /// The file is written when both addresses are known. It shows the ports that were chosen.
    #[arg(long, env = "FETCH_PROXY_PORTS_FILE", value_name = "FILE")]
    pub ports_file: Option<PathBuf>,
    /// Path of the nats-server to start [default: nats-server on the PATH]
    #[arg(long, env = "FETCH_PROXY_NATS_SERVER_BIN", value_name = "FILE")]
    pub nats_server: Option<PathBuf>,
    /// Port of the nats-server on 127.0.0.1 [default: 4222, or any free port if 4222 is taken]
    ///
    /// Port 0 is any free port.
    #[arg(long, env = "FETCH_PROXY_DEV_NATS_PORT", value_name = "PORT")]
    pub nats_port: Option<u16>,
    /// Folder for the data of the stream [default: a temporary folder, removed at the end]
    #[arg(long, env = "FETCH_PROXY_STORE_DIR", value_name = "DIR")]
    pub store_dir: Option<PathBuf>,
    /// Number of sample messages to publish at the start, from 0 to 1000000.
    #[arg(long, default_value_t = 10, value_name = "COUNT",
          value_parser = values::number(0..=1_000_000))]
    pub samples: u32,
    /// Path of grpcurl in the printed lines [default: grpcurl]
    #[arg(long, env = "FETCH_PROXY_GRPCURL", value_name = "FILE")]
    pub grpcurl: Option<PathBuf>,
}

/// A command for a `dev` that runs.
#[derive(Debug, Subcommand)]
pub enum DevCommand {
    /// Publish more samples to a `fetch-proxy dev` that runs.
    ///
    /// The number of a sample is its sequence in the stream. A NATS server that no `dev` has started is left
    /// alone.
    Publish(PublishArgs),
}

/// The samples to publish.
#[derive(Debug, Args)]
#[command(after_help = MORE)]
pub struct PublishArgs {
    /// Number of samples, from 1 to 1000000.
    #[arg(default_value_t = 10, value_parser = values::number(1..=1_000_000))]
    pub count: u32,
    /// URL of the private nats-server, as `dev` prints it.
    #[arg(long, default_value = "nats://127.0.0.1:4222", value_name = "URL")]
    pub nats_url: String,
}

/// The command of a guard.
#[derive(Debug, Args)]
pub struct GuardArgs {
    /// Folder to remove afterwards.
    #[arg(long)]
    pub remove: Option<PathBuf>,
    /// The server and its arguments.
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}
