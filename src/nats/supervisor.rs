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

use async_nats::Subscriber;
use semver::Version;
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
    subscriptions::Subscriptions,
};
use crate::{
    broker::{ConsumerName, Link, Server},
    clock,
    lock::lock,
    metrics::{NatsMeter, NatsRole},
};

/// The oldest supported nats-server. A server before 2.10.16 can ignore a `+TERM` with a reason, and
/// answer as if it had not.
pub const OLDEST_SERVER: Version = Version::new(2, 10, 16);

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
            Ok(Err(error)) => Err(connection::explain(&error, &self.settings)),
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
        let clients = [
            self.settling().map(|requests| requests.connection.client.clone()),
            self.deliveries().map(|connection| connection.client.clone()),
        ];
        for client in clients.into_iter().flatten() {
            // The flush of a dying connection may fail. Nobody waits for it any more.
            let _ = timeout_at(until.into(), client.flush()).await;
        }
        self.stop.cancel();
    }

    async fn keep_deliveries(self: Arc<Self>) {
        let (mut last, mut backoff) = (None::<Arc<NatsConnection>>, Backoff::default());
        loop {
            let set = |state| self.report(last.as_deref(), |all| all.deliveries = state);
            let Some(connection) = self.connect(DELIVERIES, &mut backoff, set).await else {
                return;
            };
            let connection = Arc::new(connection);
            self.meter.connected(NatsRole::Deliveries);
            self.update(|all| {
                all.epoch = self.epochs.fetch_add(1, Ordering::Relaxed) + 1;
                all.deliveries = State::Up(connection.clone());
            });
            // Inboxes keep a leaving connection until their pulls have ended.
            if self.until_gone(&connection, NatsRole::Deliveries).await {
                let lost = "the connection for deliveries was lost".to_owned();
                self.update(|all| all.deliveries = State::Down(lost));
            }
            last = Some(connection);
        }
    }

    async fn keep_settling(self: Arc<Self>) {
        let (mut last, mut backoff) = (None::<Arc<RequestMux>>, Backoff::default());
        loop {
            let leaving = last.as_ref().map(|requests| &*requests.connection);
            let set = |state| self.report(leaving, |all| all.settling = state);
            let Some(connection) = self.connect(SETTLING, &mut backoff, set).await else { return };
            let Some((requests, subscriber)) = RequestMux::open(Arc::new(connection)).await else {
                continue;
            };
            self.meter.connected(NatsRole::Settling);
            self.tasks.spawn(self.clone().read(requests.clone(), subscriber));
            let overlaps = last.as_ref().is_some_and(|last| !last.connection.lost.is_cancelled());
            self.update(|all| {
                all.bus_epoch += u64::from(!overlaps);
                all.settling = State::Up(requests.clone());
            });
            if let Some(last) = last.take() {
                self.tasks.spawn(self.clone().retire(last));
            }
            if self.until_gone(&requests.connection, NatsRole::Settling).await {
                let lost = "the connection for settling was lost".to_owned();
                self.update(|all| all.settling = State::Down(lost));
            }
            last = Some(requests);
        }
    }

    /// Waits until a connection is lost (`true`), or must be replaced while it still serves (`false`).
    async fn until_gone(&self, connection: &NatsConnection, role: NatsRole) -> bool {
        let stopped = tokio::select! {
            biased;
            () = connection.lost.cancelled() => {
                self.meter.lost(role);
                return true;
            }
            () = self.stop.cancelled() => true,
            () = connection.leaving.cancelled() => false,
        };
        if stopped {
            connection.lost.cancel();
        } else {
            tracing::info!(server = connection.server_id, "the NATS server is leaving");
        }
        stopped
    }

    async fn read(self: Arc<Self>, requests: Arc<RequestMux>, subscriber: Subscriber) {
        let api = JetStreamApi { requests: requests.clone(), settings: &self.settings };
        let answers = requests.read(subscriber);
        let probe = arrival_probe::run(&requests);
        let listen = self.subscriptions.listen(&requests.connection);
        let presence = self.presence.watch(&api);
        let all = async { tokio::join!(answers, probe, listen, presence) };
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
    fn report(&self, last: Option<&NatsConnection>, change: impl FnOnce(&mut Connections)) {
        if last.is_none_or(|last| last.lost.is_cancelled()) {
            self.update(change);
        }
    }

    /// Connects to a supported server, however long that takes. `None`: the supervisor has stopped.
    async fn connect<T>(
        &self,
        role: &'static str,
        backoff: &mut Backoff,
        set: impl Fn(State<T>),
    ) -> Option<NatsConnection> {
        let mut logged = false;
        self.stop.run_until_cancelled(sleep(backoff.before_next(clock::now()))).await?;
        loop {
            let made = async {
                match role {
                    SETTLING => {
                        let (settings, meter) = (&self.settings, &self.meter);
                        NatsConnection::connect_on_own_runtime(settings, role, meter).await
                    }
                    _ => NatsConnection::make(&self.settings, role, &self.meter).await,
                }
            };
            let wait = match self.stop.run_until_cancelled(made).await? {
                Ok(connection) if is_supported(&connection.version) => {
                    let (version, server) = (&connection.version, &connection.server_id);
                    tracing::info!(role, version, server, "connected to NATS");
                    backoff.connected_at = Some(clock::now());
                    return Some(connection);
                }
                Ok(connection) => {
                    let why = unsupported(&connection.version);
                    if !std::mem::replace(&mut logged, true) {
                        tracing::error!(role, why, "this NATS server cannot be used; trying again");
                    }
                    set(State::Unsupported(why));
                    UNSUPPORTED_RETRY
                }
                Err(error) => {
                    let error = connection::explain(&error, &self.settings);
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

/// Whether a server of this version can be used. A version that cannot be parsed is accepted: it may be a
/// private build.
fn is_supported(version: &str) -> bool {
    Version::parse(version.trim_start_matches('v')).map_or(true, |version| {
        // A pre-release like 2.10.16-beta counts as its release.
        (version.major, version.minor, version.patch)
            >= (OLDEST_SERVER.major, OLDEST_SERVER.minor, OLDEST_SERVER.patch)
    })
}

fn unsupported(version: &str) -> String {
    format!(
        "nats-server {version} is too old: {OLDEST_SERVER} or newer is needed, because older ones \
         can ignore a Term with a reason and answer as if they had not"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_from_2_10_16_on_are_supported() {
        for version in ["2.10.16", "2.10.16-beta.1", "2.11.0-dev", "2.15.1", "3.0.0", "v2.12.0"] {
            assert!(is_supported(version), "{version}");
        }
        for version in ["2.9.10", "2.10.15", "1.4.0"] {
            assert!(!is_supported(version), "{version}");
        }
    }
}
