//! Keeps two connections to NATS, one for deliveries and one for settling. Makes a new connection
//! whenever one is lost. Owns the state of the link.
//!
//! ```text
//!        connected, server supported     lost
//!  Down ────────────────────────────▶ Up ────▶ Down ─▶ connect again
//!    └── server too old ─▶ Unsupported ── 5 s ─▶ connect again
//! ```
//! The link is up if both connections are up. The link is unsupported if either server is. If a server is
//! leaving, its connection continues serving until another one replaces it.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    time::{sleep, timeout, timeout_at},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    api::JetStreamApi,
    arrival_probe,
    connection::{self, NatsConnection},
    presence::Presence,
    request_mux::RequestMux,
    settings::Settings,
    settling_connection::SettlingConnection,
    subscriptions::Subscriptions,
    supported::{is_supported, unsupported},
};
use crate::{
    broker::{ConsumerName, Link, Server},
    clock,
    lock::lock,
    metrics::{NatsMeter, NatsRole},
};

/// The names of the two connections in the server's lists and in the log.
const DELIVERIES: &str = "deliveries";
const SETTLING: &str = "settling";
/// The time between two attempts to connect. It grows from the first value to the last.
const RETRY: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
];
/// If a connection is lost sooner than this, the wait before the next attempt grows.
const MIN_LIFETIME: Duration = Duration::from_secs(5);
/// The time until an unsupported server is tried again. It may be upgraded behind the same name.
const UNSUPPORTED_RETRY: Duration = Duration::from_secs(5);
/// The time for which a connection that was replaced still waits for its answers.
const RETIRE_AFTER: Duration = Duration::from_secs(10);
/// The longest time to connect for one consumer.
const DEDICATED_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) struct Supervisor {
    settings: Settings,
    meter: NatsMeter,
    tasks: TaskTracker,
    connections: Mutex<Connections>,
    link: watch::Sender<Link>,
    epochs: AtomicU64,
    subscriptions: Subscriptions,
    presence: Presence,
    stop: CancellationToken,
}

#[derive(Default)]
struct Connections {
    deliveries: State<Arc<NatsConnection>>,
    settling: State<Arc<RequestMux>>,
    /// Counts the connections for deliveries.
    epoch: u64,
    /// Counts the gaps between two settling connections, as [`Server::bus_epoch`].
    bus_epoch: u64,
}

enum State<T> {
    Up(T),
    Down(String),
    Unsupported(String),
}

impl<T> Default for State<T> {
    fn default() -> Self {
        Self::Down("not connected yet".to_owned())
    }
}

impl<T: Clone> State<T> {
    fn get(&self) -> Result<T, String> {
        match self {
            Self::Up(connection) => Ok(connection.clone()),
            Self::Down(why) | Self::Unsupported(why) => Err(why.clone()),
        }
    }
}

impl Supervisor {
    pub(super) fn start(settings: Settings, tasks: &TaskTracker, meter: NatsMeter) -> Arc<Self> {
        let supervisor = Arc::new(Self {
            settings,
            meter,
            tasks: tasks.clone(),
            connections: Mutex::default(),
            link: watch::channel(Link::Down("not connected yet".into())).0,
            epochs: AtomicU64::new(0),
            subscriptions: Subscriptions::new(),
            presence: Presence::new(),
            stop: CancellationToken::new(),
        });
        tasks.spawn(supervisor.clone().keep_deliveries());
        tasks.spawn(supervisor.clone().keep_settling());
        supervisor
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    pub(super) fn subscriptions(&self) -> &Subscriptions {
        &self.subscriptions
    }

    pub(super) fn presence(&self) -> &Presence {
        &self.presence
    }

    pub(super) fn link(&self) -> Link {
        self.link.borrow().clone()
    }

    pub(super) async fn link_change(&self, seen: &Link) -> Link {
        let mut link = self.link.subscribe();
        // The sender lives as long as the supervisor.
        link.wait_for(|link| link != seen).await.map_or_else(|_| seen.clone(), |link| link.clone())
    }

    pub(super) fn deliveries(&self) -> Result<Arc<NatsConnection>, String> {
        self.connections().deliveries.get()
    }

    /// A connection for the deliveries of one consumer alone. The caller owns it. There is none while the
    /// shared connection is down: the server is away, or the shared connection comes first.
    pub(super) async fn dedicated(
        &self,
        name: &ConsumerName,
    ) -> Result<Arc<NatsConnection>, String> {
        self.deliveries()?;
        let role = format!("deliveries of {name}");
        let made = NatsConnection::make(&self.settings, &role, &self.meter);
        match timeout(DEDICATED_CONNECT_TIMEOUT, made).await {
            Ok(Ok(connection)) if !is_supported(&connection.version) => {
                Err(unsupported(&connection.version))
            }
            Ok(Ok(connection)) => {
                tracing::info!(consumer = %name, "the consumer has a dedicated connection to NATS");
                Ok(Arc::new(connection))
            }
            Ok(Err(error)) => Err(connection::explain(error.to_string(), &self.settings)),
            Err(_) => Err("NATS does not answer".to_owned()),
        }
    }

    pub(super) fn settling(&self) -> Result<Arc<RequestMux>, String> {
        self.connections().settling.get()
    }

    /// The JetStream API over the settling connection.
    pub(super) fn api(&self) -> Result<JetStreamApi<'_>, String> {
        Ok(JetStreamApi { requests: self.settling()?, settings: &self.settings })
    }

    pub(super) async fn close(&self, until: Instant) {
        // The flush of a dying connection may fail. Nobody waits for it any more.
        if let Ok(requests) = self.settling()
            && timeout_at(until.into(), requests.connection.written()).await.is_err()
        {
            tracing::warn!("drain timeout: settlements were not written to NATS");
        }
        if let Ok(connection) = self.deliveries() {
            let _ = timeout_at(until.into(), connection.client.flush()).await;
        }
        self.stop.cancel();
    }

    async fn keep_deliveries(self: Arc<Self>) {
        let (mut last, mut backoff) = (None::<Arc<NatsConnection>>, Backoff::default());
        loop {
            let lost = last.as_ref().map(|last| last.lost.clone());
            let set = |state| self.report(lost.as_ref(), |all| all.deliveries = state);
            let make = || async {
                let made = NatsConnection::make(&self.settings, DELIVERIES, &self.meter).await;
                let connection = made.map_err(|error| error.to_string())?;
                let server = (connection.server_id.clone(), connection.version.clone());
                Ok((connection, server))
            };
            let connecting = self.connect(DELIVERIES, &mut backoff, make, set);
            let Some(connection) = connecting.await else { return };
            let connection = Arc::new(connection);
            self.meter.connected(NatsRole::Deliveries);
            self.update(|all| {
                all.epoch = self.epochs.fetch_add(1, Ordering::Relaxed) + 1;
                all.deliveries = State::Up(connection.clone());
            });
            // Inboxes keep a leaving connection until their pulls have ended.
            let NatsConnection { server_id, lost, leaving, .. } = &*connection;
            if self.until_gone(server_id, (lost, leaving), NatsRole::Deliveries).await {
                let lost = "the connection for deliveries was lost".to_owned();
                self.update(|all| all.deliveries = State::Down(lost));
            }
            last = Some(connection);
        }
    }

    async fn keep_settling(self: Arc<Self>) {
        let (mut last, mut backoff) = (None::<Arc<RequestMux>>, Backoff::default());
        loop {
            let lost = last.as_ref().map(|last| last.connection.lost.clone());
            let set = |state| self.report(lost.as_ref(), |all| all.settling = state);
            let make = || async {
                let made = SettlingConnection::make(&self.settings, SETTLING, &self.meter).await;
                let (connection, line) = made.map_err(|error| error.to_string())?;
                let server = (connection.server_id.clone(), connection.version.clone());
                Ok(((connection, line), server))
            };
            let connecting = self.connect(SETTLING, &mut backoff, make, set);
            let Some((connection, line)) = connecting.await else { return };
            let connection = Arc::new(connection);
            let requests = RequestMux::open(connection.clone());
            self.meter.connected(NatsRole::Settling);
            self.tasks.spawn(line.run(connection));
            self.tasks.spawn(self.clone().attend(requests.clone()));
            let overlaps = last.as_ref().is_some_and(|last| !last.connection.lost.is_cancelled());
            self.update(|all| {
                all.bus_epoch += u64::from(!overlaps);
                all.settling = State::Up(requests.clone());
            });
            if let Some(last) = last.take() {
                self.tasks.spawn(self.clone().retire(last));
            }
            let SettlingConnection { server_id, lost, leaving, .. } = &*requests.connection;
            if self.until_gone(server_id, (lost, leaving), NatsRole::Settling).await {
                let lost = "the connection for settling was lost".to_owned();
                self.update(|all| all.settling = State::Down(lost));
            }
            last = Some(requests);
        }
    }

    /// Waits until a connection is lost (`true`), or must be replaced while it still serves (`false`).
    async fn until_gone(
        &self,
        server: &str,
        (lost, leaving): (&CancellationToken, &CancellationToken),
        role: NatsRole,
    ) -> bool {
        let stopped = tokio::select! {
            biased;
            () = lost.cancelled() => {
                self.meter.lost(role);
                return true;
            }
            () = self.stop.cancelled() => true,
            () = leaving.cancelled() => false,
        };
        if stopped {
            lost.cancel();
        } else {
            tracing::info!(server, "the NATS server is leaving");
        }
        stopped
    }

    /// Does what a settling connection needs, until it is lost.
    async fn attend(self: Arc<Self>, requests: Arc<RequestMux>) {
        let api = JetStreamApi { requests: requests.clone(), settings: &self.settings };
        let probe = arrival_probe::run(&requests);
        let listen = self.subscriptions.listen(&requests.connection);
        let presence = self.presence.watch(&api);
        let all = async { tokio::join!(probe, listen, presence) };
        self.stop.run_until_cancelled(all).await;
        requests.connection.end();
    }

    /// Waits for the answers of a connection that was replaced, and ends it.
    async fn retire(self: Arc<Self>, requests: Arc<RequestMux>) {
        let answered = self.stop.run_until_cancelled(sleep(RETIRE_AFTER));
        requests.connection.lost.run_until_cancelled(answered).await;
        requests.connection.end();
    }

    /// Reports the state of an attempt to connect, unless the last connection still serves.
    fn report(&self, lost: Option<&CancellationToken>, change: impl FnOnce(&mut Connections)) {
        if lost.is_none_or(CancellationToken::is_cancelled) {
            self.update(change);
        }
    }

    /// Connects to a supported server, however long that takes. `None`: the supervisor has stopped.
    /// `make` returns a connection with the id and the version of its server.
    async fn connect<C, T, F: Future<Output = Result<(C, (String, String)), String>>>(
        &self,
        role: &'static str,
        backoff: &mut Backoff,
        make: impl Fn() -> F,
        set: impl Fn(State<T>),
    ) -> Option<C> {
        let mut logged = false;
        self.stop.run_until_cancelled(sleep(backoff.before_next(clock::now()))).await?;
        loop {
            let wait = match self.stop.run_until_cancelled(make()).await? {
                Ok((connection, (server, version))) if is_supported(&version) => {
                    tracing::info!(role, version, server, "connected to NATS");
                    backoff.connected_at = Some(clock::now());
                    return Some(connection);
                }
                Ok((_, (_, version))) => {
                    let why = unsupported(&version);
                    if !std::mem::replace(&mut logged, true) {
                        tracing::error!(role, why, "this NATS server cannot be used; trying again");
                    }
                    set(State::Unsupported(why));
                    UNSUPPORTED_RETRY
                }
                Err(error) => {
                    let error = connection::explain(error, &self.settings);
                    if !std::mem::replace(&mut logged, true) {
                        tracing::warn!(role, error, "NATS cannot be reached; trying again");
                    }
                    set(State::Down(format!("NATS cannot be reached: {error}")));
                    backoff.longer()
                }
            };
            self.stop.run_until_cancelled(sleep(wait)).await?;
        }
    }

    fn update(&self, change: impl FnOnce(&mut Connections)) {
        let mut connections = self.connections();
        change(&mut connections);
        let link = connections.link();
        // Under the lock, so that links are published in their order.
        self.link.send_if_modified(|old| std::mem::replace(old, link.clone()) != link);
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        lock(&self.connections)
    }
}

/// Spaces the attempts to connect.
#[derive(Default)]
struct Backoff {
    attempts: usize,
    /// When the last connection was made.
    connected_at: Option<Instant>,
}

impl Backoff {
    fn longer(&mut self) -> Duration {
        let wait = RETRY[self.attempts.min(RETRY.len() - 1)];
        self.attempts += 1;
        wait
    }

    /// The wait before the next attempt: none after a connection that lasted.
    fn before_next(&mut self, now: Instant) -> Duration {
        match self.connected_at.take() {
            Some(at) if now.saturating_duration_since(at) < MIN_LIFETIME => self.longer(),
            _ => {
                self.attempts = 0;
                Duration::ZERO
            }
        }
    }
}

impl Connections {
    fn link(&self) -> Link {
        match (&self.deliveries, &self.settling) {
            (State::Unsupported(why), _) | (_, State::Unsupported(why)) => {
                Link::Unsupported(why.as_str().into())
            }
            (State::Down(why), _) | (_, State::Down(why)) => Link::Down(why.as_str().into()),
            (State::Up(connection), State::Up(_)) => Link::Up(Arc::new(Server {
                epoch: self.epoch,
                bus_epoch: self.bus_epoch,
                id: connection.server_id.clone(),
                name: connection.server_name.clone(),
                version: connection.version.clone(),
                max_payload: connection.max_payload,
            })),
        }
    }
}
