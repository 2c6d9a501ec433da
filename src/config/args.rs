//! What can be typed. Says nothing of what it means.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::{
    client_args::{AckArgs, ExtendArgs, FetchArgs, NakArgs, TermArgs},
    listen::Listen,
    values,
};

const EXAMPLES: &str = "\
Examples:
  fetch-proxy dev
      A first look: starts a private nats-server with a stream, a consumer and sample
      messages, serves in front of it, and prints grpcurl lines to paste.

  fetch-proxy serve --nats-url nats://nats:4222 --nats-creds /etc/nats/proxy.creds \\
                    --token-key-file /etc/fetch-proxy/token-keys --listen :50051
      In front of an existing NATS. Streams and consumers must be there already.

  fetch-proxy keygen > token-keys
      A key for --token-key-file; give the same file to every replica.

  fetch-proxy probe --addr 127.0.0.1:50052
      A health check for exec probes: exit code 0 when serving.

  fetch-proxy fetch ORDERS worker -n 3
  fetch-proxy ack TOKEN
      Take messages and settle them by hand, as any client would.";

/// A gRPC service in front of NATS JetStream pull consumers: Fetch messages, then Ack, Nak or
/// Term each by its token.
#[derive(Debug, Parser)]
#[command(name = "fetch-proxy", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve in front of an existing NATS.
    #[command(after_help = EXAMPLES)]
    Serve {
        /// How to serve.
        #[command(flatten)]
        serve: Box<ServeArgs>,
        /// What to log.
        #[command(flatten)]
        log: LogArgs,
    },
    /// Start a private nats-server with samples and serve in front of it, for a first look.
    Dev {
        /// What to start.
        #[command(flatten)]
        dev: DevArgs,
        /// What to log.
        #[command(flatten)]
        log: LogArgs,
    },
    /// Ask a running fetch-proxy for its health; exit code 0 when it is serving.
    Probe(ProbeArgs),
    /// Take messages by hand, and print them with the tokens that settle them.
    Fetch(FetchArgs),
    /// Settle by hand: done.
    Ack(AckArgs),
    /// Settle by hand: to be delivered again.
    Nak(NakArgs),
    /// Settle by hand: never to be delivered again.
    Term(TermArgs),
    /// Move the end of a lease by hand.
    Extend(ExtendArgs),
    /// Print a new key for --token-key-file.
    Keygen,
    /// Run a command that ends with us.
    #[command(hide = true)]
    Guard(GuardArgs),
}

/// How to serve.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub(super) listen: ListenArgs,
    #[command(flatten)]
    pub(super) nats: NatsArgs,
    /// Keys that seal tokens, one a line: the first seals, all open. Share it among replicas.
    /// Without it a key is made up, and tokens do not survive a restart.
    #[arg(long, env = "FETCH_PROXY_TOKEN_KEY_FILE", value_name = "FILE", help_heading = "Tokens")]
    pub token_key_file: Option<PathBuf>,
    /// Name of this group of replicas; tokens of another are invalid here.
    #[arg(
        long,
        env = "FETCH_PROXY_CLUSTER",
        default_value = "default",
        value_name = "NAME",
        help_heading = "Tokens"
    )]
    pub cluster: String,
    /// What people call this replica: it stands beside its id in the log, here and at the other
    /// replicas. Name the pod and its host [default: the name of the host, which is that of the pod]
    #[arg(long, env = "FETCH_PROXY_REPLICA_NAME", value_name = "NAME", help_heading = "Replicas")]
    pub replica_name: Option<String>,
    #[command(flatten)]
    pub(super) limits: LimitArgs,
    #[command(flatten)]
    pub(super) drain: DrainArgs,
}

#[derive(Debug, Args)]
pub(super) struct ListenArgs {
    /// Where clients connect: IP:PORT, NAME:PORT, or :PORT for all addresses; port 0 is any free one.
    #[arg(
        long,
        env = "FETCH_PROXY_LISTEN",
        default_value = "127.0.0.1:50051",
        value_name = "ADDR"
    )]
    pub(super) listen: Listen,
    /// Where operators and probes connect, in plain text: /livez, /readyz and gRPC health.
    #[arg(
        long,
        env = "FETCH_PROXY_OPS_LISTEN",
        default_value = "127.0.0.1:50052",
        value_name = "ADDR"
    )]
    pub(super) ops_listen: Listen,
    /// Write the bound addresses to this file, as {"grpc": "…", "ops": "…"}.
    #[arg(long, env = "FETCH_PROXY_PORTS_FILE", value_name = "FILE")]
    pub(super) ports_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Drain")]
pub(super) struct DrainArgs {
    /// On SIGTERM, serve on for this long after health has said NOT_SERVING.
    #[arg(long, env = "FETCH_PROXY_DRAIN_DELAY", default_value = "5s", value_name = "TIME",
          value_parser = values::time)]
    pub(super) drain_delay: Duration,
    /// After that, wait this long for open calls to end and for leases to be settled.
    #[arg(long, env = "FETCH_PROXY_DRAIN_TIMEOUT", default_value = "20s", value_name = "TIME",
          value_parser = values::time)]
    pub(super) drain_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "NATS")]
pub(super) struct NatsArgs {
    /// Servers to connect to, separated by commas.
    #[arg(
        long,
        env = "NATS_URL",
        default_value = "nats://127.0.0.1:4222",
        value_name = "URL",
        hide_env_values = true
    )]
    pub(super) nats_url: String,
    /// Credentials file; read anew for every connection.
    #[arg(long = "nats-creds", env = "NATS_CREDS", value_name = "FILE")]
    pub(super) creds: Option<PathBuf>,
    /// User name. Its password is taken from the environment alone, as NATS_PASSWORD; so is a bare
    /// token, as NATS_TOKEN.
    #[arg(long = "nats-user", env = "NATS_USER", value_name = "NAME")]
    pub(super) user: Option<String>,
    /// File with an nkey seed.
    #[arg(long = "nats-nkey", env = "NATS_NKEY", value_name = "FILE")]
    pub(super) nkey: Option<PathBuf>,
    /// Certificate authorities (PEM) to trust instead of the system's. With this, or a client
    /// certificate, a server without TLS is not connected to.
    #[arg(long = "nats-ca", env = "NATS_CA", value_name = "FILE")]
    pub(super) ca: Option<PathBuf>,
    /// Client certificate (PEM).
    #[arg(long = "nats-cert", env = "NATS_CERT", value_name = "FILE")]
    pub(super) cert: Option<PathBuf>,
    /// Key of the client certificate (PEM).
    #[arg(long = "nats-key", env = "NATS_KEY", value_name = "FILE")]
    pub(super) key: Option<PathBuf>,
    /// Begin TLS before the server has said anything, for servers with `handshake_first: true`. A
    /// server without TLS is not connected to then.
    #[arg(long = "nats-tls-first", env = "NATS_TLS_FIRST",
          value_parser = clap::builder::BoolishValueParser::new())]
    pub(super) tls_first: bool,
    /// JetStream domain.
    #[arg(long, env = "FETCH_PROXY_JS_DOMAIN", value_name = "NAME")]
    pub(super) js_domain: Option<String>,
    /// First part of every inbox subject, which our NATS user must be allowed to subscribe to.
    #[arg(
        long,
        env = "FETCH_PROXY_INBOX_PREFIX",
        default_value = "_INBOX",
        value_name = "SUBJECT"
    )]
    pub(super) inbox_prefix: String,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitArgs {
    /// Longest lease; one that is longer is lowered to this, also where it is the ack wait.
    #[arg(long, env = "FETCH_PROXY_MAX_LEASE", default_value = "1h", value_name = "TIME",
          value_parser = values::time)]
    pub(super) max_lease: Duration,
    /// Messages leased at once, by all clients together; about 400 bytes each.
    #[arg(long, env = "FETCH_PROXY_MAX_LEASES", default_value_t = 100_000, value_name = "COUNT",
          value_parser = values::count)]
    pub(super) max_leases: usize,
    /// Fetch calls open at once.
    #[arg(long, env = "FETCH_PROXY_MAX_WAITERS", default_value_t = 10_000, value_name = "COUNT",
          value_parser = values::count)]
    pub(super) max_waiters: usize,
    /// Messages of one consumer leased at once [default: nine tenths of what is free and its own].
    /// Whatever is given, that much is left for other consumers.
    #[arg(long, env = "FETCH_PROXY_MAX_LEASES_PER_CONSUMER", value_name = "COUNT",
          value_parser = values::count)]
    pub(super) max_leases_per_consumer: Option<usize>,
    /// Bytes that the open pulls of one connection to NATS may bring together, shared by its
    /// consumers: 64 KiB to 1 GiB. Keep it far below the server's max_pending.
    #[arg(
        long,
        env = "FETCH_PROXY_MAX_PULL_BYTES",
        default_value_t = 16 << 20,
        value_name = "BYTES",
        value_parser = values::bytes
    )]
    pub(super) max_pull_bytes: usize,
    /// Calls under way at once, of all kinds.
    #[arg(long, env = "FETCH_PROXY_MAX_CALLS", default_value_t = 20_000, value_name = "COUNT",
          value_parser = values::count)]
    pub(super) max_calls: usize,
    /// Bytes of requests that are being read or worked on, of all clients together.
    #[arg(
        long,
        env = "FETCH_PROXY_MAX_REQUEST_BYTES",
        default_value_t = 32 * 1024 * 1024,
        value_name = "BYTES",
        value_parser = values::bytes
    )]
    pub(super) max_request_bytes: usize,
    /// Bytes of memory for answers that their clients have not read yet; an answer takes twice its
    /// size.
    #[arg(
        long,
        env = "FETCH_PROXY_MAX_ANSWER_BYTES",
        default_value_t = 96 * 1024 * 1024,
        value_name = "BYTES",
        value_parser = values::bytes
    )]
    pub(super) max_answer_bytes: usize,
    /// Connections of clients open at once; each takes a file descriptor.
    #[arg(
        long,
        env = "FETCH_PROXY_MAX_CONNECTIONS",
        default_value_t = 10_000,
        value_name = "COUNT",
        value_parser = values::count
    )]
    pub(super) max_connections: usize,
    /// Ask a client to connect anew after this, give or take a tenth, so that clients spread over
    /// the replicas; no call is lost by it. 0s: never.
    #[arg(long, env = "FETCH_PROXY_MAX_CONNECTION_AGE", default_value = "10m", value_name = "TIME",
          value_parser = values::time)]
    pub(super) max_connection_age: Duration,
    /// Longest wait for JetStream to confirm a settlement.
    #[arg(long, env = "FETCH_PROXY_SETTLE_TIMEOUT", default_value = "5s", value_name = "TIME",
          value_parser = values::time)]
    pub(super) settle_timeout: Duration,
}

/// What to log.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// How log lines look; auto is text on a terminal and json elsewhere.
    #[arg(long, env = "FETCH_PROXY_LOG_FORMAT", default_value = "auto", value_name = "FORMAT")]
    pub log_format: LogFormat,
    /// What is logged: error, warn, info, debug, trace, or off; or filters like info,h2=debug, as
    /// RUST_LOG has them, which goes before this.
    #[arg(long, env = "FETCH_PROXY_LOG_LEVEL", default_value = "info", value_name = "FILTER")]
    pub log_level: String,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Text,
    /// For machines, one object a line.
    Json,
}

/// What to start for a first look.
#[derive(Debug, Args)]
pub struct DevArgs {
    #[command(flatten)]
    pub(super) listen: ListenArgs,
    /// The nats-server to start [default: the one on the PATH]
    #[arg(long, env = "FETCH_PROXY_NATS_SERVER_BIN", value_name = "FILE")]
    pub nats_server: Option<PathBuf>,
    /// Keep the stream's data here [default: a temporary folder, removed at the end]
    #[arg(long, env = "FETCH_PROXY_STORE_DIR", value_name = "DIR")]
    pub store_dir: Option<PathBuf>,
    /// Sample messages to publish.
    #[arg(long, default_value_t = 10, value_name = "COUNT",
          value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub samples: u32,
    /// The grpcurl that the printed lines name [default: grpcurl]
    #[arg(long, env = "FETCH_PROXY_GRPCURL", value_name = "FILE")]
    pub grpcurl: Option<PathBuf>,
}

impl DevArgs {
    /// The `serve` of a `dev`, in front of its private server.
    pub fn serve(&self, nats_url: &str) -> Result<ServeArgs, clap::Error> {
        let mut typed = vec!["fetch-proxy".to_owned(), "serve".to_owned()];
        let ListenArgs { listen, ops_listen, ports_file } = &self.listen;
        let (listen, ops_listen) = (listen.to_string(), ops_listen.to_string());
        let flags =
            [("--listen", &*listen), ("--ops-listen", &ops_listen), ("--nats-url", nats_url)];
        // A person who presses Ctrl-C waits for no load balancer, and for no lease of their own.
        let at_once = [("--drain-delay", "0s"), ("--drain-timeout", "1s")];
        for (flag, value) in flags.into_iter().chain(at_once) {
            typed.extend([flag.to_owned(), value.to_owned()]);
        }
        let ports_file = ports_file.as_deref().and_then(Path::to_str);
        typed.extend(ports_file.map(|file| format!("--ports-file={file}")));
        match Cli::try_parse_from(typed)?.command {
            Command::Serve { serve, .. } => Ok(*serve),
            Command::Dev { .. }
            | Command::Probe(_)
            | Command::Fetch(_)
            | Command::Ack(_)
            | Command::Nak(_)
            | Command::Term(_)
            | Command::Extend(_)
            | Command::Keygen
            | Command::Guard(_) => Err(clap::Error::new(clap::error::ErrorKind::InvalidSubcommand)),
        }
    }
}

/// Whom to ask.
#[derive(Debug, Args)]
pub struct ProbeArgs {
    /// Either listener of a fetch-proxy.
    #[arg(
        long,
        env = "FETCH_PROXY_OPS_LISTEN",
        default_value = "127.0.0.1:50052",
        value_name = "ADDR"
    )]
    pub addr: String,
    /// What to ask for: nothing for readiness, `liveness` for whether the process answers.
    #[arg(long, default_value = "", value_name = "NAME")]
    pub service: String,
    /// Give up after this; until then, ask again where nobody is.
    #[arg(long, default_value = "3s", value_name = "TIME", value_parser = values::time)]
    pub timeout: Duration,
}

/// What to run.
#[derive(Debug, Args)]
pub struct GuardArgs {
    /// Remove this folder afterwards.
    #[arg(long)]
    pub remove: Option<PathBuf>,
    /// The server, and its arguments.
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}
