//! The command line as clap parses it. `config` gives it a meaning.
//!
//! The doc comments are the `--help` texts and `docs/reference/flags.md`. The first paragraph is the
//! summary that `-h` shows.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};

use super::{
    client_args as by_hand,
    dev_args::{DevArgs, DevCommand, GuardArgs},
    limit_args::LimitArgs,
    listen::Listen,
    operator_args as operators, paper_args as papers,
    policy_args::{KeygenArgs, PolicyArgs},
    security_args::{SecurityArgs, SwitchArg},
    tls_args::TlsArgs,
    values,
    work_args::WorkArgs,
};
use crate::{metrics::DEFAULT_MAX_CONSUMERS, request_log::RequestLogScope};

const EXAMPLES: &str = "\
Examples:
  fetch-proxy dev
      For a first look. Starts a private nats-server with a stream, a consumer and sample
      messages, serves in front of it, and prints lines to paste.

  fetch-proxy serve --nats-url nats://nats:4222 --nats-creds /etc/nats/proxy.creds \\
                    --token-key-file /etc/fetch-proxy/token-keys
      Serve on this machine in front of an existing NATS. Streams and consumers must exist already.
      For other machines, add --listen :50051, --policy-file, --tls-cert and --tls-key.

  (umask 077; fetch-proxy keygen > token-keys)
      Make a key for --token-key-file, which nobody else can read. Give the same file to every replica.

  fetch-proxy policy check policy.yaml
      Look for mistakes in a policy file, and explain its decisions.

  fetch-proxy probe --addr 127.0.0.1:50052
      Check the health, for exec probes. The exit code is 0 if the replica serves.

  fetch-proxy whoami --addr https://proxy.example:50051 --token-file key
      Show the identity, the principal and the verbs of a credential.

  fetch-proxy leases ORDERS worker
      Show who holds which message. In a container: kubectl exec POD -- /fetch-proxy leases

  fetch-proxy work ORDERS worker -j 10 -- ./handle-order
      Run a command for each message. Its exit code settles the message.

  fetch-proxy fetch ORDERS worker -n 3
  fetch-proxy ack TOKEN
      Fetch messages and settle them by hand, like any client.";

/// A gRPC service in front of NATS JetStream pull consumers: Fetch messages, then Ack, Nak or
/// Term each message by its token.
#[derive(Debug, Parser)]
#[command(name = "fetch-proxy", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// The command to run.
    #[command(subcommand)]
    pub command: Command,
}

/// The command to run.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve in front of an existing NATS.
    #[command(after_help = EXAMPLES)]
    Serve {
        /// The settings of the service.
        #[command(flatten)]
        serve: Box<ServeArgs>,
        /// The settings of the log.
        #[command(flatten)]
        log: LogArgs,
    },
    /// Start a private nats-server with samples and serve in front of it, for a first look.
    ///
    /// Ctrl-C ends both. The settings of `serve` that have no flag here can be set by their variables.
    #[command(args_conflicts_with_subcommands = true)]
    Dev {
        /// A command for a `dev` that runs.
        #[command(subcommand)]
        command: Option<DevCommand>,
        /// The settings of the first look.
        #[command(flatten)]
        dev: DevArgs,
        /// The settings of the log.
        #[command(flatten)]
        log: LogArgs,
    },
    /// Ask a running fetch-proxy for its health. The exit code is 0 if it serves, and 1 otherwise.
    Probe(by_hand::ProbeArgs),
    /// Run a command for each message of a consumer, and settle the message by the exit code.
    ///
    /// With --http, each message is posted to a URL in place of a command.
    Work(Box<WorkArgs>),
    /// Fetch messages by hand, and print them with their tokens.
    Fetch(by_hand::FetchArgs),
    /// Settle messages by hand as done.
    Ack(by_hand::AckArgs),
    /// Settle messages by hand as not done: they are delivered again.
    Nak(by_hand::NakArgs),
    /// Settle messages by hand as impossible: they are never delivered again.
    Term(by_hand::TermArgs),
    /// Move the end of leases by hand.
    Extend(by_hand::ExtendArgs),
    /// Give the messages of a fetch with a name back, by hand.
    GiveBack(by_hand::GiveBackArgs),
    /// Show a consumer: its settings, what waits, and how long its leases are.
    Consumer(by_hand::ConsumerArgs),
    /// Show who a credential is to a fetch-proxy: its identity, its principal and its verbs.
    #[command(name = "whoami")]
    WhoAmI(Box<operators::OperatorArgs>),
    /// List the replicas of the cluster.
    Replicas(Box<operators::ReplicasArgs>),
    /// List the consumers that the replicas serve, with what they hold and what waits.
    Consumers(Box<operators::ConsumersArgs>),
    /// List the leases of all replicas: who holds which message, and for how long.
    Leases(Box<operators::LeasesArgs>),
    /// List the connections of clients to all replicas.
    Connections(Box<operators::ConnectionsArgs>),
    /// Take leases away from their holders, so that other workers get the messages.
    ///
    /// Each message loses one attempt. The command shows the leases and asks, unless --yes is given.
    Release(Box<operators::ReleaseArgs>),
    /// Print a new key for --token-key-file, or a new API key.
    Keygen(KeygenArgs),
    /// Check a policy file, explain its decisions, or compare two policy files.
    ///
    /// `serve` obeys a policy file by --policy-file.
    Policy(PolicyArgs),
    /// Print the completions for a shell.
    Completions(papers::CompletionsArgs),
    /// Write the man pages: one for the program, and one for each command.
    Man(papers::ManArgs),
    /// Run a command that ends with this program.
    #[command(hide = true)]
    Guard(GuardArgs),
}

/// The settings of the service.
#[derive(Debug, Args)]
pub struct ServeArgs {
    #[command(flatten)]
    pub(super) listen: ListenArgs,
    #[command(flatten)]
    pub(super) tls: TlsArgs,
    #[command(flatten)]
    pub(super) nats: NatsArgs,
    /// File with the keys that seal tokens, one per line.
    ///
    /// The first key seals, and all keys open. Give the same file to every replica. A changed file is
    /// read again. Without a file, the replica makes a key of its own: then no other replica accepts
    /// its tokens, and tokens do not survive a restart.
    #[arg(long, env = "FETCH_PROXY_TOKEN_KEY_FILE", value_name = "FILE", help_heading = "Tokens")]
    pub token_key_file: Option<PathBuf>,
    /// Name of this group of replicas.
    ///
    /// Tokens of another group are invalid here. The name is part of the NATS subjects between
    /// replicas: at most 64 bytes, without a dot, a blank, `*` or `>`.
    #[arg(
        long,
        env = "FETCH_PROXY_CLUSTER",
        default_value = "default",
        value_name = "NAME",
        help_heading = "Tokens"
    )]
    pub cluster: String,
    /// Name of this replica for people [default: the name of the host, which is that of the pod]
    ///
    /// The name stands next to the id of the replica in its own log and in the logs of the others.
    /// Name the pod and its node.
    #[arg(long, env = "FETCH_PROXY_REPLICA_NAME", value_name = "NAME", help_heading = "Replicas")]
    pub replica_name: Option<String>,
    #[command(flatten)]
    pub(super) security: SecurityArgs,
    #[command(flatten)]
    pub(super) limits: LimitArgs,
    #[command(flatten)]
    pub(super) drain: DrainArgs,
    #[command(flatten)]
    pub(super) metrics: MetricsArgs,
    #[command(flatten)]
    pub(super) request_log: RequestLogArgs,
}

impl ServeArgs {
    /// The settings of a `dev` with these addresses, in front of its private server.
    ///
    /// # Errors
    /// A mistake in a variable of `serve`.
    pub fn of_dev(
        (listen, ops_listen): (&Listen, &Listen),
        ports_file: Option<&Path>,
        nats_url: &str,
    ) -> Result<Self, clap::Error> {
        let mut typed = vec!["fetch-proxy".to_owned(), "serve".to_owned()];
        let (listen, ops_listen) = (listen.to_string(), ops_listen.to_string());
        let flags =
            [("--listen", &*listen), ("--ops-listen", &ops_listen), ("--nats-url", nats_url)];
        // A person who presses Ctrl-C should not wait for a load balancer or for a lease.
        let at_once = [("--drain-delay", "0s"), ("--drain-timeout", "1s")];
        for (flag, value) in flags.into_iter().chain(at_once) {
            typed.extend([flag.to_owned(), value.to_owned()]);
        }
        let ports_file = ports_file.and_then(Path::to_str);
        typed.extend(ports_file.map(|file| format!("--ports-file={file}")));
        let Command::Serve { serve, .. } = Cli::try_parse_from(typed)?.command else {
            return Err(clap::Error::new(clap::error::ErrorKind::InvalidSubcommand));
        };
        Ok(*serve)
    }
}

#[derive(Debug, Args)]
pub(super) struct ListenArgs {
    /// Address of the client port: IP:PORT, NAME:PORT, or :PORT for all addresses.
    ///
    /// Port 0 is any free port. The default is only reachable from this machine. Other addresses need
    /// credentials and TLS, or one of --insecure and --plaintext.
    #[arg(
        long,
        env = "FETCH_PROXY_LISTEN",
        default_value = "127.0.0.1:50051",
        value_name = "ADDR"
    )]
    pub(super) listen: Listen,
    /// Address of the ops port, for operators and probes: IP:PORT, NAME:PORT, or :PORT for all addresses.
    ///
    /// It has /livez, /readyz, /metrics and a page for people over HTTP, and gRPC health, all in plain text.
    #[arg(
        long,
        env = "FETCH_PROXY_OPS_LISTEN",
        default_value = "127.0.0.1:50052",
        value_name = "ADDR"
    )]
    pub(super) ops_listen: Listen,
    /// File for the addresses that are listened on, as {"grpc": "…", "ops": "…"}.
    ///
    /// The file is written when both addresses are known. It shows the ports that port 0 has chosen.
    #[arg(long, env = "FETCH_PROXY_PORTS_FILE", value_name = "FILE")]
    pub(super) ports_file: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Metrics")]
pub(super) struct MetricsArgs {
    /// Whether things are counted, and shown at /metrics of --ops-listen.
    #[arg(long, env = "FETCH_PROXY_METRICS", default_value = "on", value_name = "SWITCH")]
    pub(super) metrics: SwitchArg,
    /// Most consumers with series of their own.
    ///
    /// Each has about 90 series. Further consumers share the series of `_other`. A consumer that nobody
    /// has used for 20 minutes gives its place back.
    #[arg(long, env = "FETCH_PROXY_METRICS_MAX_CONSUMERS", value_name = "COUNT",
          default_value_t = DEFAULT_MAX_CONSUMERS, value_parser = values::count)]
    pub(super) metrics_max_consumers: usize,
    /// Whether there is a page for people at / of --ops-listen.
    ///
    /// It only answers requests that come through loopback, such as those of `kubectl port-forward`. A
    /// sidecar that passes requests on through loopback opens it to others: switch it off there.
    #[arg(long, env = "FETCH_PROXY_STATUS_PAGE", default_value = "on", value_name = "SWITCH")]
    pub(super) status_page: SwitchArg,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Log")]
pub(super) struct RequestLogArgs {
    /// Calls that have a line in the log.
    ///
    /// The lines have the level info, and the field `target` with the value `request`.
    #[arg(long, env = "FETCH_PROXY_REQUEST_LOG", default_value = "errors", value_name = "CALLS")]
    pub(super) request_log: RequestLogArg,
}

/// The calls that have a line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum RequestLogArg {
    /// None.
    Off,
    /// Calls that fail. Calls that are refused by a limit, by a drain, or for a lease that has ended have no line.
    Errors,
    /// Every call. Every call costs more then.
    All,
}

impl From<RequestLogArg> for RequestLogScope {
    fn from(typed: RequestLogArg) -> Self {
        match typed {
            RequestLogArg::Off => Self::Off,
            RequestLogArg::Errors => Self::Errors,
            RequestLogArg::All => Self::All,
        }
    }
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Drain")]
pub(super) struct DrainArgs {
    /// After SIGTERM, continue serving for this time while health says NOT_SERVING.
    ///
    /// This gives load balancers time to notice. The default fits the readiness probe of the chart.
    #[arg(long, env = "FETCH_PROXY_DRAIN_DELAY", default_value = "5s", value_name = "TIME",
          value_parser = values::time)]
    pub(super) drain_delay: Duration,
    /// After the drain delay, wait at most this time until open calls end and leases are handed over.
    ///
    /// If no other replica takes the leases, this is the time in which workers can still settle them.
    /// A second signal ends the wait.
    #[arg(long, env = "FETCH_PROXY_DRAIN_TIMEOUT", default_value = "20s", value_name = "TIME",
          value_parser = values::time)]
    pub(super) drain_timeout: Duration,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "NATS")]
pub(super) struct NatsArgs {
    /// URLs of the NATS servers, separated by commas.
    ///
    /// A URL may have a user and a password. In that case use the variable, because everybody on the
    /// machine can read command lines.
    #[arg(
        long,
        env = "NATS_URL",
        default_value = "nats://127.0.0.1:4222",
        value_name = "URL",
        hide_env_values = true
    )]
    pub(super) nats_url: String,
    /// File with credentials, read again for every connection.
    #[arg(long = "nats-creds", env = "NATS_CREDS", value_name = "FILE")]
    pub(super) creds: Option<PathBuf>,
    /// Name of the NATS user.
    ///
    /// The password has no flag: set NATS_PASSWORD. A token in place of a user has no flag: set
    /// NATS_TOKEN.
    #[arg(long = "nats-user", env = "NATS_USER", value_name = "NAME")]
    pub(super) user: Option<String>,
    /// File with an nkey seed, read again for every connection.
    #[arg(long = "nats-nkey", env = "NATS_NKEY", value_name = "FILE")]
    pub(super) nkey: Option<PathBuf>,
    /// File with the certificate authorities (PEM) to trust, in place of the system's.
    ///
    /// With this flag, or with a client certificate, the proxy does not connect to a server without
    /// TLS.
    #[arg(long = "nats-ca", env = "NATS_CA", value_name = "FILE")]
    pub(super) ca: Option<PathBuf>,
    /// File with the client certificate (PEM).
    #[arg(long = "nats-cert", env = "NATS_CERT", value_name = "FILE")]
    pub(super) cert: Option<PathBuf>,
    /// File with the key of the client certificate (PEM).
    #[arg(long = "nats-key", env = "NATS_KEY", value_name = "FILE")]
    pub(super) key: Option<PathBuf>,
    /// Start TLS at once, for servers with `handshake_first: true`.
    ///
    /// The proxy then does not connect to a server without TLS.
    #[arg(long = "nats-tls-first", env = "NATS_TLS_FIRST",
          value_parser = clap::builder::BoolishValueParser::new())]
    pub(super) tls_first: bool,
    /// JetStream domain of the streams.
    #[arg(long, env = "FETCH_PROXY_JS_DOMAIN", value_name = "NAME")]
    pub(super) js_domain: Option<String>,
    /// First part of every inbox subject.
    ///
    /// The NATS user of the proxy must have the right to subscribe to the subjects below it.
    #[arg(
        long,
        env = "FETCH_PROXY_INBOX_PREFIX",
        default_value = "_INBOX",
        value_name = "SUBJECT"
    )]
    pub(super) inbox_prefix: String,
}

/// The settings of the log.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// Format of the log lines.
    #[arg(long, env = "FETCH_PROXY_LOG_FORMAT", default_value = "auto", value_name = "FORMAT")]
    pub log_format: LogFormat,
    /// Least level that is logged: error, warn, info, debug, trace, or off.
    ///
    /// Filters such as info,h2=debug are also accepted, with the syntax of RUST_LOG. If RUST_LOG is
    /// set, it takes precedence.
    #[arg(long, env = "FETCH_PROXY_LOG_LEVEL", default_value = "info", value_name = "FILTER")]
    pub log_level: String,
}

/// The format of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// For people.
    Text,
    /// For machines, one object per line.
    Json,
}
