//! The configuration: `args` is what was typed, and [`Serve`] is its meaning, valid by construction.
//!
//! Every flag of `serve` has an environment variable. No secret has a flag, because everybody on the
//! machine can read command lines. A mistake is reported in one line, and ends the process with code 2.

mod admin_socket;
mod admission;
mod args;
mod client_args;
mod dev_args;
mod limit_args;
mod listen;
mod operator_args;
mod paper_args;
mod policy_args;
mod security_args;
mod tls_args;
mod values;
mod work_args;

use std::{env, io, path::PathBuf, time::Duration};

pub use self::{
    admin_socket::AdminSocket,
    admission::Admission,
    args::{Cli, Command, LogArgs, LogFormat, ServeArgs},
    client_args::{
        AckArgs, BY_HAND, CallArgs, ClientTlsArgs, CodecArg, ConsumerArgs, ExtendArgs, FetchArgs,
        GiveBackArgs, NakArgs, ProbeArgs, ServerArgs, TermArgs,
    },
    dev_args::{DevArgs, DevCommand, GuardArgs, PublishArgs},
    listen::Listen,
    operator_args::{
        ConnectionsArgs, ConsumersArgs, LeasesArgs, OperatorArgs, ReleaseArgs, ReplicasArgs,
        WatchArgs,
    },
    paper_args::{CompletionsArgs, ManArgs, ShellArg},
    policy_args::{KeygenArgs, PolicyArgs, PolicyCheckArgs, PolicyCommand, PolicyDiffArgs},
    work_args::{OutputArg, WorkArgs},
};
use self::{
    admission::Exposure,
    args::{DrainArgs, ListenArgs, MetricsArgs, NatsArgs},
    limit_args::LimitArgs,
    security_args::{SecurityArgs, SwitchArg},
    tls_args::{ClientAuthArg, TlsArgs, TlsMinArg},
};
use crate::{
    credentials::{AccessFileError, Gatekeeper},
    keys::{Keys, KeysError},
    lessor::LeaseLimits,
    limits::{CallLimits, ListenerLimits, MOST_MAX_BYTES, SHORTEST_LEASE},
    nats::{Auth, Settings, parse_servers},
    request_log::RequestLogScope,
    secrets::{self, OpenTo},
    tls::{ClientAuth, ServerTls, TlsFileError, TlsSettings, TlsVersion},
    traces::{TraceSettings, TraceSettingsError},
};

/// Longest name of a cluster, in bytes. The name is part of every subject between replicas.
const MAX_CLUSTER_NAME: usize = 64;
/// Range of `--max-pull-bytes`. Below it, hardly a message fits. Above it, no server lets so much wait
/// for one client.
const PULL_BYTES: std::ops::RangeInclusive<usize> = (64 << 10)..=(1 << 30);

/// Most `--threads`. Threads wait for each other, so that many cores need several replicas.
const MOST_THREADS: usize = 64;
/// Calls that one connection of a client may have open. Further calls wait at the client.
const MAX_CLIENT_STREAMS: u32 = 1000;
/// Least `--max-request-bytes`: the largest request, 4 MiB, must find room while others are read.
const LEAST_REQUEST_BYTES: usize = 8 * 1024 * 1024;
/// Least `--max-answer-bytes`: the largest answer is in memory twice.
const LEAST_ANSWER_BYTES: usize = 2 * MOST_MAX_BYTES as usize;

/// The valid configuration of a service.
#[derive(Debug)]
pub struct Serve {
    /// Address of the client port. Port 0 is any free port.
    pub listen: Listen,
    /// Address of the ops port, for operators and probes.
    pub ops_listen: Listen,
    /// The TLS of the client port. `None`: clients speak without TLS.
    pub tls: Option<ServerTls>,
    /// File for the addresses that are listened on, as JSON.
    pub ports_file: Option<PathBuf>,
    /// Servers of NATS and how to connect to them.
    pub nats: Settings,
    /// Keys that seal tokens.
    pub keys: Keys,
    /// Who is accepted, and what each caller may do.
    pub gatekeeper: Gatekeeper,
    /// The admission with which this replica listens beyond loopback.
    pub admission: Option<Admission>,
    /// The socket for operators on this machine.
    pub admin_socket: AdminSocket,
    /// Whether tools can read the contract.
    pub reflection: bool,
    /// The calls that have a line in the log.
    pub request_log: RequestLogScope,
    /// The most consumers that have metrics of their own. `None`: nothing is counted.
    pub metrics: Option<usize>,
    /// Whether there is a page for people.
    pub status_page: bool,
    /// Name of the group of replicas that accepts the tokens.
    pub cluster: String,
    /// Name of this replica for people.
    pub replica_name: String,
    /// Limits of leases, Fetch calls and pulls.
    pub limits: LeaseLimits,
    /// Limits of client connections, and their age.
    pub edge: ListenerLimits,
    /// Limits of calls and of their bytes.
    pub calls: CallLimits,
    /// The number of threads that answer calls, from 1 to 64.
    pub threads: usize,
    /// How long to continue serving after health says NOT_SERVING.
    pub drain_delay: Duration,
    /// How long to wait after that for open calls and leases.
    pub drain_timeout: Duration,
    /// The receiver of traces. `None`: there are no traces.
    pub traces: Option<TraceSettings>,
}

/// A mistake on the command line, or in a file that it names.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Two settings contradict each other, or one is out of range.
    #[error("{0}")]
    Invalid(String),
    /// A named file cannot be read.
    #[error("{what}: cannot read {path}: {error}")]
    Unreadable {
        /// The flag that names the file.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        error: io::Error,
    },
    /// The policy cannot be used.
    #[error("--policy-file: {0}")]
    Policy(#[from] AccessFileError),
    /// The token keys cannot be used.
    #[error("--token-key-file: {0}")]
    Keys(#[from] KeysError),
    /// The files of TLS cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsFileError),
    /// A variable of OpenTelemetry cannot be used.
    #[error(transparent)]
    Traces(#[from] TraceSettingsError),
}

impl Serve {
    /// Checks what was typed, and reads the files that it names.
    ///
    /// # Errors
    /// See [`ConfigError`].
    pub fn load(args: ServeArgs) -> Result<Self, ConfigError> {
        // Every flag by name: one that is added and not handled does not compile.
        let ServeArgs {
            listen,
            tls,
            nats,
            token_key_file,
            cluster,
            replica_name,
            security,
            limits,
            drain,
            metrics,
            request_log,
        } = args;
        let MetricsArgs { metrics, metrics_max_consumers, status_page } = metrics;
        let SecurityArgs { policy_file, insecure, plaintext, audit, admin_socket, reflection } =
            security;
        let ListenArgs { listen, ops_listen, ports_file } = listen;
        let DrainArgs { drain_delay, drain_timeout } = drain;
        let LimitArgs {
            threads,
            max_lease,
            max_leases,
            max_waiters,
            max_leases_per_consumer,
            max_pull_bytes,
            max_calls,
            max_request_bytes,
            max_answer_bytes,
            max_connections,
            max_connection_age,
            settle_timeout,
        } = limits;
        if threads > MOST_THREADS {
            return invalid(format!("--threads must be at most {MOST_THREADS}"));
        }
        if max_lease < SHORTEST_LEASE {
            return invalid("--max-lease must be at least 1s");
        }
        for (flag, bytes, least) in [
            ("--max-request-bytes", max_request_bytes, LEAST_REQUEST_BYTES),
            ("--max-answer-bytes", max_answer_bytes, LEAST_ANSWER_BYTES),
        ] {
            if bytes < least {
                return invalid(format!("{flag} must be at least {least}"));
            }
        }
        if !PULL_BYTES.contains(&max_pull_bytes) {
            return invalid("--max-pull-bytes must be from 65536 (64 KiB) to 1073741824 (1 GiB)");
        }
        if settle_timeout < Duration::from_millis(100) {
            return invalid("--settle-timeout must be at least 100ms");
        }
        let bad = |c: char| c.is_whitespace() || c.is_control() || matches!(c, '.' | '*' | '>');
        if cluster.is_empty() || cluster.len() > MAX_CLUSTER_NAME || cluster.contains(bad) {
            return invalid(
                "--cluster must be one part of a NATS subject: 1 to 64 bytes, without a dot, a blank, `*` or `>`",
            );
        }
        if let Some(folder) = ports_file.as_ref().filter(|file| file.is_dir()) {
            return invalid(format!("--ports-file: {} is a folder", folder.display()));
        }
        let certificates = tls.tls_client_ca.is_some();
        let mut gatekeeper = match policy_file {
            Some(file) => Gatekeeper::load(file, certificates)?,
            None => Gatekeeper::open(),
        };
        // A client without a certificate is then refused before its first call.
        let certified =
            certificates && !matches!(tls.tls_client_auth, Some(ClientAuthArg::Optional));
        let exposure = Exposure {
            beyond: listen.is_beyond_loopback(),
            tls: tls.tls_cert.is_some(),
            authenticates: certified || gatekeeper.authenticates(),
        };
        let admission = exposure.admit(insecure, plaintext).map_err(ConfigError::Invalid)?;
        if exposure.beyond && !certified && admission != Some(Admission::Insecure) {
            gatekeeper.must_authenticate()?;
        }
        gatekeeper.write_audit(audit.into());
        Ok(Self {
            gatekeeper,
            admission,
            admin_socket: admin_socket.unwrap_or_default(),
            reflection: reflection == SwitchArg::On,
            request_log: request_log.request_log.into(),
            metrics: (metrics == SwitchArg::On).then_some(metrics_max_consumers),
            status_page: status_page == SwitchArg::On,
            listen,
            ops_listen,
            ports_file,
            tls: server_tls(tls)?,
            nats: settings(nats)?,
            keys: Keys::load(token_key_file, &cluster)?,
            cluster,
            replica_name: replica_name.unwrap_or_else(host_name),
            limits: LeaseLimits {
                max_leases,
                max_lease,
                max_leases_per_consumer: max_leases_per_consumer.unwrap_or(max_leases),
                max_waiters,
                max_pull_bytes: max_pull_bytes as u64,
                settle_timeout,
            },
            edge: ListenerLimits {
                max_connections,
                max_age: Some(max_connection_age).filter(|age| !age.is_zero()),
                max_idle: None,
                max_streams: MAX_CLIENT_STREAMS,
                http1: false,
            },
            calls: CallLimits { max_calls, max_waiters, max_request_bytes, max_answer_bytes },
            threads,
            drain_delay,
            drain_timeout,
            traces: TraceSettings::load()?,
        })
    }
}

fn server_tls(args: TlsArgs) -> Result<Option<ServerTls>, ConfigError> {
    let TlsArgs { tls_cert, tls_key, tls_client_ca, tls_client_auth, tls_min } = args;
    let (cert, key) = match (tls_cert, tls_key) {
        (Some(cert), Some(key)) => (cert, key),
        (None, None) if tls_client_ca.is_none() && tls_min.is_none() => {
            return match tls_client_auth {
                None => Ok(None),
                Some(_) => invalid("--tls-client-auth needs --tls-client-ca"),
            };
        }
        (None, None) => {
            return invalid("--tls-client-ca and --tls-min need --tls-cert and --tls-key");
        }
        _ => return invalid("--tls-cert and --tls-key must be given together"),
    };
    if tls_client_auth.is_some() && tls_client_ca.is_none() {
        return invalid("--tls-client-auth needs --tls-client-ca");
    }
    let client_auth = match tls_client_auth {
        Some(ClientAuthArg::Require) | None => ClientAuth::Require,
        Some(ClientAuthArg::Optional) => ClientAuth::Optional,
    };
    let min = match tls_min {
        Some(TlsMinArg::Tls12) => TlsVersion::Tls12,
        Some(TlsMinArg::Tls13) | None => TlsVersion::Tls13,
    };
    let settings = TlsSettings { cert, key, client_ca: tls_client_ca, client_auth, min };
    Ok(Some(ServerTls::load(settings)?))
}

fn settings(args: NatsArgs) -> Result<Settings, ConfigError> {
    let NatsArgs { nats_url, creds, user, nkey, ca, cert, key, tls_first, js_domain, inbox_prefix } =
        args;
    let servers = parse_servers(&nats_url)
        // Not the URL itself: a password may be in it.
        .map_err(|error| ConfigError::Invalid(format!("--nats-url or NATS_URL: {error}")))?;
    let (user, password) = (user.map(one_line), secret("NATS_PASSWORD"));
    if user.as_ref().is_some_and(String::is_empty) {
        return invalid("--nats-user or NATS_USER: the name is empty");
    }
    if user.is_none() && password.is_some() {
        return invalid("NATS_PASSWORD is set without a user: set --nats-user or NATS_USER");
    }
    let auth = match (creds, user, secret("NATS_TOKEN"), nkey) {
        (None, None, None, None) => Auth::None,
        (Some(creds), None, None, None) => Auth::credentials(secret_file("--nats-creds", creds)?),
        (None, Some(user), None, None) => Auth::User(user, password.unwrap_or_default()),
        (None, None, Some(token), None) => Auth::Token(token),
        (None, None, None, Some(nkey)) => Auth::nkey(secret_file("--nats-nkey", nkey)?),
        _ => return invalid("only one of NATS credentials, user, token and nkey may be given"),
    };
    let identity = match (cert, key) {
        (None, None) => None,
        (Some(cert), Some(key)) => {
            Some((readable("--nats-cert", cert)?, secret_file("--nats-key", key)?))
        }
        _ => return invalid("--nats-cert and --nats-key must be given together"),
    };
    let ca = ca.map(|ca| readable("--nats-ca", ca)).transpose()?;
    for (flag, value) in
        [("--js-domain", js_domain.as_deref()), ("--inbox-prefix", Some(&*inbox_prefix))]
    {
        let bad = |c: char| c.is_whitespace() || matches!(c, '*' | '>');
        let ends = |value: &str| value.is_empty() || value.starts_with('.') || value.ends_with('.');
        if value.is_some_and(|value| value.contains(bad) || ends(value)) {
            return invalid(format!("{flag} must be part of a NATS subject, without wildcards"));
        }
    }
    Ok(Settings { servers, auth, ca, identity, tls_first, domain: js_domain, inbox_prefix })
}

/// The name of this machine. In a pod of Kubernetes it is the name of the pod.
pub fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// A secret from the environment. Everybody on the machine can read command lines, so secrets have no
/// flag.
fn secret(name: &str) -> Option<String> {
    env::var(name).ok().map(one_line).filter(|value| !value.is_empty())
}

/// The value without a line break at its end. A Secret that was made from a file keeps the line break of
/// the file, which is not part of the password.
fn one_line(value: String) -> String {
    value.trim_end_matches(['\r', '\n']).to_owned()
}

/// Checks a file at the start, so that a wrong path is reported at once. Files for NATS are read again for
/// each connection.
fn readable(what: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    looked_at(what, path).map(|(path, _)| path)
}

/// The same for a file with a secret. Logs a warning if others can read the file.
fn secret_file(what: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    let (path, open_to) = looked_at(what, path)?;
    open_to.warn(&path);
    Ok(path)
}

fn looked_at(what: &'static str, path: PathBuf) -> Result<(PathBuf, OpenTo), ConfigError> {
    match secrets::look_at_start(&path) {
        Ok(open_to) => Ok((path, open_to)),
        Err(error) => Err(ConfigError::Unreadable { what, path, error }),
    }
}

fn invalid<T>(why: impl Into<String>) -> Result<T, ConfigError> {
    Err(ConfigError::Invalid(why.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn load(flags: &[&str]) -> Result<Serve, String> {
        let typed = [&["fetch-proxy", "serve"], flags].concat();
        let typed = Cli::try_parse_from(typed).map_err(|error| error.to_string())?;
        let Command::Serve { serve, .. } = typed.command else { panic!("{typed:?}") };
        Serve::load(*serve).map_err(|error| error.to_string())
    }

    #[test]
    fn defaults_are_safe_for_a_laptop() {
        let serve = load(&[]).unwrap();
        assert_eq!(serve.listen, "127.0.0.1:50051".parse().unwrap());
        assert_eq!(serve.ops_listen, "127.0.0.1:50052".parse().unwrap());
        assert_eq!(serve.limits.max_lease, Duration::from_secs(3600));
        assert_eq!(serve.limits.settle_timeout, Duration::from_secs(5));
        assert_eq!(serve.drain_delay, Duration::from_secs(5));
    }

    #[test]
    fn contradictions_are_refused_in_one_line() {
        for (flags, said) in [
            (&["--nats-user", "a", "--nats-creds", "/dev/null"][..], "only one of"),
            (&["--nats-cert", "/dev/null"], "given together"),
            (&["--nats-ca", "/nowhere/ca.pem"], "cannot read /nowhere/ca.pem"),
            (&["--tls-cert", "/dev/null"], "--tls-cert and --tls-key must be given together"),
            (&["--tls-client-ca", "/dev/null"], "need --tls-cert and --tls-key"),
            (&["--tls-min", "1.2"], "need --tls-cert and --tls-key"),
            (&["--tls-min", "1.1"], "possible values: 1.2, 1.3"),
            (&["--tls-client-auth", "optional"], "needs --tls-client-ca"),
            (&["--tls-cert", "c", "--tls-key", "/nowhere/k"], "--tls-key: cannot read /nowhere/k"),
            (&["--token-key-file", "/nowhere/keys"], "cannot read /nowhere/keys"),
            (&["--token-key-file", "/dev/null"], "it is not a regular file"),
            (&["--max-leases", "0"], "from 1 to 100000000"),
            (&["--max-lease", "500ms"], "at least 1s"),
            (&["--max-request-bytes", "1000"], "at least 8388608"),
            (&["--max-answer-bytes", "1000"], "at least 33554432"),
            (&["--max-lease", "367d"], "at most 366 days"),
            (&["--nats-url", ""], "a server is missing"),
            (&["--nats-url", "nats://a,"], "a server is missing"),
            (&["--nats-user", ""], "the name is empty"),
            (&["--nats-creds", "/"], "cannot read /: it is a folder"),
            (&["--nats-nkey", "/dev/null"], "cannot read /dev/null: it is not a regular file"),
            (&["--ports-file", "/"], "/ is a folder"),
            (&["--max-pull-bytes", "65535"], "64 KiB"),
            (&["--max-pull-bytes", "2000000000"], "1 GiB"),
            (&["--cluster", "a.b"], "without a dot"),
            (&["--inbox-prefix", "a.*"], "without wildcards"),
            (&["--nats-url", "nats://u:hunter2@:x"], "--nats-url"),
            (&["--nats-url", "nats://a,wss://b"], "WebSocket is not supported"),
            (&["--drain-delay", "soon"], "--drain-delay"),
        ] {
            let error = load(flags).unwrap_err();
            assert!(error.contains(said) && !error.contains("hunter2"), "{flags:?}: {error}");
        }
    }

    /// Every number and every time of every command, by the name of its value.
    #[test]
    fn numbers_and_times_that_could_overflow_are_refused() {
        use clap::CommandFactory as _;
        let mut seen = 0;
        for command in Cli::command().get_subcommands() {
            let needed: &[&str] = match command.get_name() {
                "fetch" => &["S", "c"],
                "ack" | "nak" | "term" | "extend" => &["TOKEN"],
                _ => &[],
            };
            for argument in command.get_arguments() {
                let names = argument.get_value_names().unwrap_or_default();
                let name = names.first().map_or("", |name| name.as_str());
                let wrong: &[&str] = match name {
                    "TIME" => &["367d", "584942417355y", "18446744073709551615s", "9e9s", "-1s"],
                    "COUNT" => {
                        &["100000001", "18446744073709551615", "18446744073709551616", "-1", "1.5"]
                    }
                    "BYTES" => {
                        &["1099511627777", "18446744073709551615", "18446744073709551616", "-1"]
                    }
                    _ => continue,
                };
                seen += 1;
                let flag = format!("--{}", argument.get_long().unwrap());
                for value in wrong {
                    let typed = format!("{flag}={value}");
                    let typed = [&["fetch-proxy", command.get_name(), &*typed], needed].concat();
                    let error = Cli::try_parse_from(&typed).unwrap_err();
                    let said = error.to_string();
                    assert!(said.contains(&flag), "{typed:?}: {said}");
                    assert_eq!(error.exit_code(), 2, "{typed:?}: {said}");
                }
            }
        }
        assert!(seen > 14, "only {seen} are found: the walk is broken");
    }

    #[test]
    fn command_line_is_well_formed() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }
}
