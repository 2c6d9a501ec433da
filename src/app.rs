//! Wires the modules together and runs them until a signal: the only place that knows them all. The way
//! down is `drain`.

mod drain;
mod listening;
mod observed;
mod status;

use std::{
    fs,
    future::Future,
    io,
    net::SocketAddr,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    net::TcpListener,
    sync::oneshot,
    task::{JoinError, JoinSet},
};
use tokio_util::task::TaskTracker;

use self::{
    drain::{Background, Drain},
    observed::Observed,
    status::ShownSettings,
};
use crate::{
    access::Policy,
    admin::{Inspector, ReplicaFacts},
    broker::{Broker, Link},
    bus::Bus,
    clock,
    cluster::Cluster,
    config::{AdminSocket, Admission, Listen, Serve},
    credentials::Gatekeeper,
    fd_limit,
    grpc::{self, AdminSocketError, ContractError, Served, Service},
    lessor::Lessor,
    limits::ListenerLimits,
    metrics::{LogMeter, Metrics},
    nats::Nats,
    ops::{self, Health, Pages},
    readiness::{Readiness, Verdict},
    refusal_log::RefusalLog,
    signals::Signals,
    tls::ClientAuth,
    token::InstanceId,
    traces::Traces,
};

/// The time from one check of readiness to the next.
const READINESS_INTERVAL: Duration = Duration::from_secs(1);

/// The addresses that the service listens on.
#[derive(Debug, Clone, Copy)]
pub struct BoundAddresses {
    /// For clients.
    pub grpc: SocketAddr,
    /// For operators and probes.
    pub ops: SocketAddr,
}

/// Why the service does not run.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// An address cannot be listened on.
    #[error("cannot listen on {0}: {1}; --listen and --ops-listen choose other addresses")]
    Listen(Listen, io::Error),
    /// There is no admin socket, and the command line asks for one.
    #[error(transparent)]
    AdminSocket(#[from] AdminSocketError),
    /// The ports file cannot be written.
    #[error("cannot write the ports file: {0}")]
    PortsFile(io::Error),
    /// The operating system refuses something that every process may do.
    #[error("cannot start: {0}")]
    System(io::Error),
    /// The contract cannot be served: a bug.
    #[error(transparent)]
    Contract(#[from] ContractError),
    /// A listener ended without an error: a bug.
    #[error("a listener ended by itself")]
    Ended,
}

/// Serves until a signal, then drains. `ready` is called when the service is ready for the first time.
///
/// # Errors
/// See [`AppError`]. An absent NATS is no error: the service starts, and its health says NOT_SERVING.
pub async fn run(
    config: Serve,
    log: &LogMeter,
    ready: impl FnOnce(BoundAddresses),
) -> Result<(), AppError> {
    let mut signals = Signals::listen().map_err(AppError::System)?;
    let room = fd_limit::raise(config.edge.max_connections);
    if let Some(fd_limit::FdLimitTooLow { allowed, needed }) = room.short {
        tracing::warn!(
            allowed,
            needed,
            connections = room.connections,
            "the limit of open files is too low for --max-connections"
        );
    }
    let owner = InstanceId::random().map_err(|error| AppError::System(io::Error::other(error)))?;
    introduce(&config, owner);
    let shown = ShownSettings::of(&config);
    let grpc = listening::listen(config.listen).await?;
    let ops = listening::listen(config.ops_listen).await?;
    let local = |listener: &TcpListener| listener.local_addr().map_err(AppError::System);
    let bound = BoundAddresses { grpc: local(&grpc)?, ops: local(&ops)? };

    let metrics = config.metrics.map_or_else(Metrics::off, |most| Metrics::new(log, most));
    let traces = config.traces.map(|settings| Traces::start(settings, &owner.to_string()));
    let traces = traces.unwrap_or_default();
    let nats_tasks = TaskTracker::new();
    let nats = Nats::metered(config.nats, &nats_tasks, &metrics);
    let lessor = Lessor::metered(nats, config.limits, metrics.clone());
    let readiness = Readiness::new(Link::Down("not connected yet".into()), clock::now());
    let (health, health_service) = Health::new(readiness.verdict(clock::now()).0);
    let keys = Arc::new(config.keys);
    let refusals = Arc::new(RefusalLog::metered(&metrics, config.request_log));
    let us = (owner, &*config.replica_name);
    let (name, log) = (&config.cluster, refusals.clone());
    let cluster = Cluster::new(lessor.clone(), keys.clone(), log, name, us, traces.clone());
    let gatekeeper = Arc::new(config.gatekeeper);
    cluster.obeys(digest(&gatekeeper));
    let service = Service::new(
        lessor.clone(),
        cluster.clone(),
        keys.clone(),
        gatekeeper.clone(),
        refusals.clone(),
        owner,
    );
    let (verdicts, rights) = (health.watch(), gatekeeper.clone());
    let facts = ReplicaFacts {
        instance: owner,
        name: config.replica_name.clone(),
        keys: keys.clone(),
        why_not_ready: Box::new(move || match &*verdicts.borrow() {
            Verdict::Serving => None,
            Verdict::NotServing(why) => Some(why.clone()),
        }),
        policy_digest: Box::new(move || {
            rights.rights().policy().map(Policy::digest).unwrap_or_default()
        }),
    };
    let inspector = Arc::new(Inspector::new(lessor.clone(), cluster.clone(), facts));
    let tls = config.tls.map(Arc::new);
    let certified = tls.as_ref().and_then(|tls| tls.names_clients()) == Some(ClientAuth::Require);
    // Only the authority of their certificates then says who may call.
    let all_may = certified && gatekeeper.rights().policy().is_none();
    let background =
        Background::start(cluster.clone(), keys.clone(), gatekeeper.clone(), tls.clone(), &metrics);
    let admin_socket = listen_to_operators(
        &config.admin_socket,
        bound.ops.port(),
        (&gatekeeper, &inspector),
        &background,
    )?;

    let ((stop_grpc, grpc_stopped), (stop_ops, ops_stopped)) = (stop(), stop());
    let mut listeners = JoinSet::new();
    let (verdict, probes) = (health.watch(), room.probes);
    observed::show_credentials(&metrics, (keys, tls.clone()), gatekeeper.clone());
    let observed = Observed::show(&metrics, (&health, traces.clone()), config.admission);
    background.spawn(observed::lag(metrics.runtime().clone(), background.stop()));
    let inspected = (inspector.clone(), lessor.clone());
    let status = status::sources(shown, inspected, (refusals, metrics.nats().clone()));
    let shown_metrics = config.metrics.map(|_| metrics.clone());
    let pages =
        Pages { verdict, metrics: shown_metrics, status: config.status_page.then_some(status) };
    let ops = ops::serve(ops, probes, health_service.clone(), pages, ops_stopped);
    let limits = ListenerLimits { max_connections: room.connections, ..config.edge };
    let (calls, secured, reflection) = (config.calls, tls.is_some(), config.reflection);
    let call_traces = traces.clone();
    listeners.spawn(async move {
        let served = Served {
            service,
            inspector,
            health: health_service,
            reflection,
            traces: call_traces,
            request_log: config.request_log,
        };
        grpc::serve(grpc, served, tls, limits, &calls, grpc_stopped).await
    });
    listeners.spawn(async move {
        ops.await;
        Ok(())
    });
    if all_may {
        tracing::info!(
            "there is no policy: each client with a certificate of --tls-client-ca may do everything"
        );
    }
    tracing::info!(grpc = %bound.grpc, ops = %bound.ops, tls = secured, admin_socket, traces = traces.is_on(), "listening");
    announce(bound, config.admission, config.ports_file.as_deref())?;

    tokio::select! {
        ended = listeners.join_next() => return Err(why_ended(ended)),
        never = follow(&lessor, &cluster, &gatekeeper, (&health, readiness), || ready(bound)) => match never {},
        () = signals.next() => {}
    }
    observed.draining();
    let first_at = clock::now();
    let drain = Drain {
        lessor: &lessor,
        cluster: &cluster,
        health: &health,
        background,
        nats_tasks,
        traces: &traces,
        listeners,
        stop_grpc,
        stop_ops,
    };
    let delay = config.drain_delay;
    tokio::select! {
        () = drain.run(delay, first_at + delay + config.drain_timeout) => tracing::info!("drained"),
        () = signals.second(first_at) => tracing::warn!("second signal: ending at once"),
    }
    Ok(())
}

/// Serves operators on this machine. Returns the name of the socket. A socket that nobody asked for may fail: the
/// service does not depend on it.
fn listen_to_operators<B: Broker + Bus>(
    socket: &AdminSocket,
    ops_port: u16,
    (gatekeeper, inspector): (&Arc<Gatekeeper>, &Arc<Inspector<B>>),
    background: &Background,
) -> Result<Option<String>, AdminSocketError> {
    let Some(name) = socket.name(ops_port) else { return Ok(None) };
    match grpc::serve_admin(&name, gatekeeper.clone(), inspector.clone(), background.stop()) {
        Ok(serving) => background.spawn(serving),
        Err(error) if *socket == AdminSocket::ByOpsPort => {
            tracing::warn!(%error, "there is no admin socket: its default name cannot be used");
            return Ok(None);
        }
        Err(error) => return Err(error),
    }
    Ok(Some(name))
}

/// Stops a listener: the sender takes the time by which the listener must have ended. Without a time the
/// listener never ends.
fn stop() -> (oneshot::Sender<Instant>, impl Future<Output = Instant>) {
    let (stop, stopped) = oneshot::channel();
    let stopped = async move {
        match stopped.await {
            Ok(by) => by,
            Err(_) => std::future::pending().await,
        }
    };
    (stop, stopped)
}

/// The digest of the policy, if there is one.
fn digest(gatekeeper: &Gatekeeper) -> Option<[u8; 8]> {
    gatekeeper.rights().policy().map(Policy::digest_bytes)
}

/// Updates health from readiness, which follows the link, JetStream, the other replicas and time.
async fn follow<B: Broker + Bus>(
    lessor: &Lessor<B>,
    cluster: &Cluster<B>,
    gatekeeper: &Gatekeeper,
    (health, mut readiness): (&Health, Readiness),
    ready: impl FnOnce(),
) -> std::convert::Infallible {
    let (mut last, mut met, mut ready) = (None, false, Some(ready));
    let mut link = lessor.broker().link();
    loop {
        if !met && matches!(link, Link::Up(_)) {
            // If two replicas are incompatible, each must know the other before it serves.
            cluster.announce().await;
            met = true;
        }
        readiness.link(link.clone(), clock::now());
        readiness.jetstream(&lessor.broker().jetstream(), clock::now());
        readiness.incompatibility(cluster.incompatibility());
        let (verdict, changes_at) = readiness.verdict(clock::now());
        cluster.obeys(digest(gatekeeper));
        // Without NATS this replica hears no other replica.
        cluster.serves(verdict == Verdict::Serving && matches!(link, Link::Up(_)));
        if last.as_ref() != Some(&verdict) {
            match &verdict {
                Verdict::Serving => tracing::info!("ready"),
                Verdict::NotServing(why) => tracing::warn!(why, "not ready"),
            }
            health.set(verdict.clone());
            if let Some(ready) = ready.take_if(|_| verdict == Verdict::Serving) {
                ready();
            }
            last = Some(verdict);
        }
        tokio::select! {
            next = lessor.broker().link_change(&link) => link = next,
            () = clock::sleep_until(changes_at) => {}
            () = tokio::time::sleep(READINESS_INTERVAL) => {}
        }
    }
}

/// Logs the start line: the identity and the settings of this replica, without any secret.
fn introduce(config: &Serve, owner: InstanceId) {
    let Serve { nats, limits, edge, cluster, replica_name, drain_delay, drain_timeout, .. } =
        config;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        id = %owner,
        name = replica_name,
        process = std::process::id(),
        cluster,
        nats = nats.redacted(),
        nats_user = ?nats.auth,
        js_domain = nats.domain,
        inbox_prefix = nats.inbox_prefix,
        key_file = config.keys.shared(),
        max_leases = limits.max_leases,
        max_leases_per_consumer = limits.max_leases_per_consumer,
        max_waiters = limits.max_waiters,
        max_pull_bytes = limits.max_pull_bytes,
        max_connections = edge.max_connections,
        ?drain_delay,
        ?drain_timeout,
        "starting"
    );
}

/// Publishes the bound addresses: in the log, and in the ports file for the parent process.
fn announce(
    bound: BoundAddresses,
    admission: Option<Admission>,
    file: Option<&Path>,
) -> Result<(), AppError> {
    let BoundAddresses { grpc, ops } = bound;
    match admission {
        None => {}
        Some(Admission::Insecure) => tracing::warn!(
            %grpc,
            "listening beyond loopback without credentials (--insecure): everybody who reaches this \
             port can take and settle messages"
        ),
        Some(Admission::Plaintext) => tracing::warn!(
            %grpc,
            "listening beyond loopback without TLS (--plaintext): everybody on the way can read \
             credentials and messages"
        ),
    }
    let Some(file) = file else { return Ok(()) };
    let ports = serde_json::json!({ "grpc": grpc.to_string(), "ops": ops.to_string() });
    // A rename makes the complete file appear at once, so no reader sees a part of it.
    let part = file.with_extension("part");
    let written = fs::write(&part, format!("{ports}\n")).and_then(|()| fs::rename(&part, file));
    if written.is_err() {
        // A full disk leaves a part of the file.
        let _ = fs::remove_file(&part);
    }
    written.map_err(AppError::PortsFile)
}

fn why_ended(ended: Option<Result<Result<(), ContractError>, JoinError>>) -> AppError {
    match ended {
        Some(Ok(Err(error))) => error.into(),
        Some(Ok(Ok(())) | Err(_)) | None => AppError::Ended,
    }
}
