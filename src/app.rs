//! Wires the rooms together, and takes them down in order: the only place that knows them all.
//!
//! Drain, on SIGTERM, SIGINT or SIGHUP, each step once and in this order:
//! 1. health says NOT_SERVING, and everything is served on for the drain delay, so that whoever
//!    balances the load has heard of it;
//! 2. new Fetch calls are refused, open ones return when their pull has ended;
//! 3. leases are handed to a replica that stays; where none does, settling goes on until no lease
//!    is held;
//! 4. no more connections, and GOAWAY on those that are open; calls under way end;
//! 5. the lessor's tasks end, what is on its way to NATS is flushed.
//!
//! Steps 2 to 4 together take at most the drain timeout. A second signal ends the process at once, if it
//! is not one with the first: supervisors signal a process and its group, within a moment.

mod listening;

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
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
    task::{JoinError, JoinSet},
    time::{timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    broker::{Broker, Link},
    bus::Bus,
    clock,
    cluster::Peers,
    config::{Listen, Serve},
    fd_limit,
    grpc::{self, ContractError, Health, ListenerLimits, Router, Service},
    keys::Keys,
    lessor::Lessor,
    nats::Nats,
    readiness::{Readiness, Verdict},
    token::InstanceId,
};

/// What is under way may take this long at the very end; so may questions of other replicas, then
/// flushing to NATS, then those who still ask for health.
const FINAL_STEP_TIMEOUT: Duration = Duration::from_secs(2);

/// Signals that come closer than this to the first are one with it.
const DOUBLE_SIGNAL_WINDOW: Duration = Duration::from_secs(1);

/// Handing leases over takes no longer than this.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is looked whether this replica fits in with the others.
const READINESS_INTERVAL: Duration = Duration::from_secs(1);

/// Where the service listens.
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
    #[error("cannot listen on {0}: {1}")]
    Listen(Listen, io::Error),
    /// The ports file cannot be written.
    #[error("cannot write the ports file: {0}")]
    PortsFile(io::Error),
    /// The operating system refuses something that every process may do.
    #[error("cannot start: {0}")]
    System(io::Error),
    /// The contract cannot be served: a bug.
    #[error(transparent)]
    Contract(#[from] ContractError),
    /// A listener ended without a word: a bug.
    #[error("a listener ended by itself")]
    Ended,
}

/// Serves until a signal, then drains. `ready` is called when it is ready for the first time.
///
/// # Errors
/// See [`AppError`]. That NATS is away is not one: the service starts, and says so in its health.
pub async fn run(config: Serve, ready: impl FnOnce(BoundAddresses)) -> Result<(), AppError> {
    let mut signals = Signals::listen().map_err(AppError::System)?;
    let room = fd_limit::raise(config.edge.max_connections);
    if let Some(fd_limit::FdLimitTooLow { allowed, needed }) = room.short {
        tracing::warn!(
            allowed,
            needed,
            connections = room.connections,
            "not as many files may be open as --max-connections needs"
        );
    }
    let owner = InstanceId::random().map_err(|error| AppError::System(io::Error::other(error)))?;
    introduce(&config, owner);
    let grpc = listening::listen(config.listen).await?;
    let ops = listening::listen(config.ops_listen).await?;
    let local = |listener: &TcpListener| listener.local_addr().map_err(AppError::System);
    let bound = BoundAddresses { grpc: local(&grpc)?, ops: local(&ops)? };

    let nats_tasks = TaskTracker::new();
    let lessor = Lessor::start(Nats::start(config.nats, &nats_tasks), config.limits);
    let readiness = Readiness::new(Link::Down("not connected yet".into()), clock::now());
    let (health, health_service) = Health::new(readiness.verdict(clock::now()).0);
    let keys = Arc::new(config.keys);
    let peers =
        Peers::new(lessor.clone(), keys.clone(), &config.cluster, (owner, &config.replica_name));
    let router = Router::new(lessor.clone(), peers.clone(), keys.clone());
    let router = Arc::new(router);
    let service = Service::new(lessor.clone(), router.clone(), keys.clone(), owner);
    let background = Background::start(peers.clone(), router, keys);

    let ((stop_grpc, grpc_stopped), (stop_ops, ops_stopped)) = (stop(), stop());
    let mut listeners = JoinSet::new();
    let (verdict, probes) = (health.watch(), room.probes);
    let ops = grpc::serve_ops(ops, probes, health_service.clone(), verdict, ops_stopped);
    let edge = ListenerLimits { max_connections: room.connections, ..config.edge };
    let calls = config.calls;
    listeners.spawn(async move {
        grpc::serve(grpc, service, health_service, edge, &calls, grpc_stopped).await
    });
    listeners.spawn(async move {
        ops.await;
        Ok(())
    });
    announce(bound, config.ports_file.as_deref())?;

    tokio::select! {
        ended = listeners.join_next() => return Err(why_ended(ended)),
        never = follow(&lessor, &peers, &health, readiness, || ready(bound)) => match never {},
        () = signals.next() => {}
    }
    let told_at = clock::now();
    let (lessor, delay) = (&lessor, config.drain_delay);
    let drain = Drain { lessor, peers: &peers, health: &health, stop_grpc, delay };
    let ending = async {
        drain.run(told_at + config.drain_delay + config.drain_timeout, &mut listeners).await;
        if timeout(FINAL_STEP_TIMEOUT, background.end(&peers)).await.is_err() {
            tracing::warn!("drain timeout: questions of other replicas were still open");
        }
        lessor.broker().close(clock::now() + FINAL_STEP_TIMEOUT).await;
        nats_tasks.close();
        if timeout(FINAL_STEP_TIMEOUT, nats_tasks.wait()).await.is_err() {
            tracing::warn!("drain timeout: connections to NATS were still open");
        }
        // Health is told to the very end.
        let _ = stop_ops.send(clock::now() + FINAL_STEP_TIMEOUT);
        listeners.join_next().await;
    };
    tokio::select! {
        () = ending => tracing::info!("drained"),
        // The last steps take seconds as well.
        () = signals.next_after(told_at + DOUBLE_SIGNAL_WINDOW) => {
            tracing::warn!("second signal: ending at once");
        }
    }
    Ok(())
}

/// Tells a listener by when to be gone. One that is not told is never to go.
fn stop() -> (oneshot::Sender<Instant>, impl Future<Output = Instant>) {
    let (tell, told) = oneshot::channel();
    let told = async move {
        match told.await {
            Ok(by) => by,
            Err(_) => std::future::pending().await,
        }
    };
    (tell, told)
}

/// Tells health what the link and the passing of time make of readiness.
async fn follow<B: Broker + Bus>(
    lessor: &Lessor<B>,
    peers: &Peers<B>,
    health: &Health,
    mut readiness: Readiness,
    ready: impl FnOnce(),
) -> std::convert::Infallible {
    let (mut told, mut met, mut ready) = (None, false, Some(ready));
    let mut link = lessor.broker().link();
    loop {
        if !met && matches!(link, Link::Up(_)) {
            // Of two that do not fit together neither may serve before it knows of the other.
            peers.meet().await;
            met = true;
        }
        readiness.link(link.clone(), clock::now());
        readiness.jetstream(&lessor.broker().jetstream(), clock::now());
        readiness.misfit(peers.misfit());
        let (verdict, changes_at) = readiness.verdict(clock::now());
        // Where NATS is away nobody is heard, and nothing is learnt of others.
        peers.serves(verdict == Verdict::Serving && matches!(link, Link::Up(_)));
        if told.as_ref() != Some(&verdict) {
            match &verdict {
                Verdict::Serving => tracing::info!("ready"),
                Verdict::NotServing(why) => tracing::warn!(why, "not ready"),
            }
            health.tell(verdict.clone());
            if let Some(ready) = ready.take_if(|_| verdict == Verdict::Serving) {
                ready();
            }
            told = Some(verdict);
        }
        tokio::select! {
            next = lessor.broker().link_change(&link) => link = next,
            () = clock::sleep_until(changes_at) => {}
            () = tokio::time::sleep(READINESS_INTERVAL) => {}
        }
    }
}

/// What runs beside the listeners: the talk with other replicas, and the look at the key file.
struct Background {
    tasks: TaskTracker,
    stop: CancellationToken,
}

impl Background {
    fn start<B: Broker + Bus>(
        peers: Arc<Peers<B>>,
        router: Arc<Router<B>>,
        keys: Arc<Keys>,
    ) -> Self {
        let (tasks, stop) = (TaskTracker::new(), CancellationToken::new());
        tasks.spawn(peers.run(move |asked, question| router.clone().answer(asked, question)));
        let stopped = stop.clone();
        tasks.spawn(async move { keys.follow(stopped).await });
        Self { tasks, stop }
    }

    async fn end<B: Broker + Bus>(self, peers: &Peers<B>) {
        self.stop.cancel();
        peers.close().await;
        self.tasks.close();
        self.tasks.wait().await;
    }
}

struct Drain<'a, B: Broker + Bus> {
    lessor: &'a Lessor<B>,
    peers: &'a Peers<B>,
    health: &'a Health,
    stop_grpc: oneshot::Sender<Instant>,
    delay: Duration,
}

impl<B: Broker + Bus> Drain<'_, B> {
    async fn run(self, until: Instant, listeners: &mut Listeners) {
        tracing::info!(delay = ?self.delay, "draining");
        self.health.tell(Verdict::NotServing("draining".to_owned()));
        tokio::time::sleep(self.delay).await;
        self.lessor.drain();
        if timeout_at(until.into(), self.lessor.drained()).await.is_err() {
            tracing::warn!("drain timeout: Fetch calls were still open");
        }
        // To whoever stays; where nobody does, the leases are waited for here.
        let handed_over = self.peers.hand_over(until.min(clock::now() + HANDOVER_TIMEOUT)).await;
        tracing::debug!(handed_over, "nothing is granted any more");
        if timeout_at(until.into(), self.lessor.settled()).await.is_err() {
            let leases = self.lessor.held();
            tracing::warn!(
                leases,
                "drain timeout: leases were still held; their messages come back after their ack wait"
            );
        }
        // A listener that is not there any more has stopped.
        let _ = self.stop_grpc.send(until);
        // The first to end is the listener for clients: the other is not told to.
        listeners.join_next().await;
        if timeout_at((until + FINAL_STEP_TIMEOUT).into(), self.lessor.close()).await.is_err() {
            tracing::warn!("drain timeout: settlements were still under way");
        }
    }
}

type Listeners = JoinSet<Result<(), ContractError>>;

/// The start line: who this is, and what is set. No secret is in it.
fn introduce(config: &Serve, owner: InstanceId) {
    let Serve { nats, limits, edge, cluster, replica_name, drain_delay, drain_timeout, .. } =
        config;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        id = %owner,
        name = replica_name,
        process = std::process::id(),
        cluster,
        nats = nats.told(),
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

/// Says where the service listens: in the log, and in a file for whoever started it.
fn announce(bound: BoundAddresses, file: Option<&Path>) -> Result<(), AppError> {
    let BoundAddresses { grpc, ops } = bound;
    tracing::info!(%grpc, %ops, "listening");
    if !grpc.ip().is_loopback() {
        tracing::warn!(
            %grpc,
            "listening beyond loopback without TLS: whoever reaches this port can take and settle \
             whatever the proxy's NATS rights allow"
        );
    }
    let Some(file) = file else { return Ok(()) };
    let ports = serde_json::json!({ "grpc": grpc.to_string(), "ops": ops.to_string() });
    // Written beside and renamed, so that nobody reads half of it.
    let part = file.with_extension("part");
    let written = fs::write(&part, format!("{ports}\n")).and_then(|()| fs::rename(&part, file));
    if written.is_err() {
        // Half of it, on a disk that is full.
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

/// SIGTERM, SIGINT and SIGHUP alike.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Not where whoever started us has switched it off, as `nohup` does.
    hang_up: Option<Signal>,
}

impl Signals {
    fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: match ignores_hang_up() {
                true => None,
                false => Some(signal(SignalKind::hangup())?),
            },
        })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = received(&mut self.hang_up) => {}
        }
    }

    /// The first that does not come before `when`.
    async fn next_after(&mut self, when: Instant) {
        self.next().await;
        while clock::now() < when {
            self.next().await;
        }
    }
}

async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// Whether this process was started with SIGHUP switched off. Where there is no /proc, it was not.
fn ignores_hang_up() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // The lowest bit is signal 1.
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 == 1)
}
