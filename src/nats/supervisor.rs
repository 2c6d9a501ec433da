//! Keeps two connections to NATS alive, one for deliveries and one for settling, by building a
//! fresh one whenever one is lost. Owns the link's state.
//!
//! ```text
//!        make ok, server fit             lost
//!  Down ────────────────────▶ Up ──────────────────▶ Down ─▶ make again
//!    └── server too old ─▶ Unsupported ── 5 s ─▶ make again
//! ```
//! The link is up when both connections are; it is unfit when either server is. A connection whose
//! server is leaving serves on until there is another in its place.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
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
    OLDEST_SERVER, Settings,
    bus::Subscriptions,
    connection::{self, NatsConnection},
    presence::Presence,
    request_mux::RequestMux,
};
use crate::{
    broker::{ConsumerName, Link, Server},
    clock,
};

/// How the two connections are called in the server's lists, and in the log.
const DELIVERIES: &str = "deliveries";
const SETTLING: &str = "settling";
/// Wait between two attempts, growing from the first to the last.
const RETRY: [Duration; 4] = [
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_millis(500),
    Duration::from_secs(1),
];
/// A connection that is lost sooner than this was no success: the wait before the next one grows.
const LASTING: Duration = Duration::from_secs(5);
/// An unfit server is asked again after this: it may be upgraded behind the same name.
const UNSUPPORTED_RETRY: Duration = Duration::from_secs(5);
/// A connection that was replaced while it served is kept for its answers this long.
const RETIRE: Duration = Duration::from_secs(10);
/// Bounds the making of a connection that one consumer waits for.
const DEDICATED_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

pub(super) struct Supervisor {
    settings: Settings,
    tasks: TaskTracker,
    parts: Mutex<Parts>,
    link: watch::Sender<Link>,
    epochs: AtomicU64,
    ears: Subscriptions,
    presence: Presence,
    stop: CancellationToken,
}

#[derive(Default)]
struct Parts {
    deliveries: Part<Arc<NatsConnection>>,
    settling: Part<Arc<RequestMux>>,
    epoch: u64,
    heard: u64,
}

enum Part<T> {
    Up(T),
    Down(String),
    Unsupported(String),
}

impl<T> Default for Part<T> {
    fn default() -> Self {
        Self::Down("not connected yet".to_owned())
    }
}

impl<T: Clone> Part<T> {
    fn get(&self) -> Result<T, String> {
        match self {
            Self::Up(part) => Ok(part.clone()),
            Self::Down(why) | Self::Unsupported(why) => Err(why.clone()),
        }
    }
}

impl Supervisor {
    pub(super) fn start(settings: Settings, tasks: &TaskTracker) -> Arc<Self> {
        let supervisor = Arc::new(Self {
            settings,
            tasks: tasks.clone(),
            parts: Mutex::default(),
            link: watch::channel(Link::Down("not connected yet".into())).0,
            epochs: AtomicU64::new(0),
            ears: Subscriptions::new(),
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

    pub(super) fn ears(&self) -> &Subscriptions {
        &self.ears
    }

    pub(super) fn presence(&self) -> &Presence {
        &self.presence
    }

    pub(super) fn link(&self) -> Link {
        self.link.borrow().clone()
    }

    pub(super) async fn link_change(&self, seen: &Link) -> Link {
        let mut link = self.link.subscribe();
        // The sender is ours and lives as long as we do.
        link.wait_for(|link| link != seen).await.map_or_else(|_| seen.clone(), |link| link.clone())
    }

    pub(super) fn deliveries(&self) -> Result<Arc<NatsConnection>, String> {
        self.parts().deliveries.get()
    }

    /// A connection for the deliveries of one consumer alone, kept by nobody but who asks. There is
    /// none while the shared one is down: then the server is away, or about to be known again.
    pub(super) async fn apart(&self, name: &ConsumerName) -> Result<Arc<NatsConnection>, String> {
        self.deliveries()?;
        let role = format!("deliveries of {name}");
        match timeout(DEDICATED_CONNECT_TIMEOUT, NatsConnection::make(&self.settings, &role)).await
        {
            Ok(Ok(connection)) if !fits(&connection.version) => Err(unfit(&connection.version)),
            Ok(Ok(connection)) => {
                tracing::info!(consumer = %name, "it has a connection to NATS of its own");
                Ok(Arc::new(connection))
            }
            Ok(Err(error)) => Err(connection::why(&error, &self.settings)),
            Err(_) => Err("NATS does not answer".to_owned()),
        }
    }

    pub(super) fn settling(&self) -> Result<Arc<RequestMux>, String> {
        self.parts().settling.get()
    }

    pub(super) async fn close(&self, until: Instant) {
        let clients = [
            self.settling().map(|requests| requests.connection.client.clone()),
            self.deliveries().map(|connection| connection.client.clone()),
        ];
        for client in clients.into_iter().flatten() {
            // Nobody is left to tell when the flush of a dying connection fails.
            let _ = timeout_at(until.into(), client.flush()).await;
        }
        self.stop.cancel();
    }

    async fn keep_deliveries(self: Arc<Self>) {
        let (mut last, mut waits) = (None::<Arc<NatsConnection>>, Backoff::default());
        loop {
            let set = |part| self.replace(last.as_deref(), |parts| parts.deliveries = part);
            let Some(connection) = self.connect(DELIVERIES, &mut waits, set).await else { return };
            let connection = Arc::new(connection);
            self.update(|parts| {
                parts.epoch = self.epochs.fetch_add(1, Ordering::Relaxed) + 1;
                parts.deliveries = Part::Up(connection.clone());
            });
            // Inboxes keep one that is leaving until their pulls have ended.
            if self.until_gone(&connection).await {
                let lost = "the connection for deliveries was lost".to_owned();
                self.update(|parts| parts.deliveries = Part::Down(lost));
            }
            last = Some(connection);
        }
    }

    async fn keep_settling(self: Arc<Self>) {
        let (mut last, mut waits) = (None::<Arc<RequestMux>>, Backoff::default());
        loop {
            let leaving = last.as_ref().map(|requests| &*requests.connection);
            let set = |part| self.replace(leaving, |parts| parts.settling = part);
            let Some(connection) = self.connect(SETTLING, &mut waits, set).await else { return };
            let Some((requests, subscriber)) = RequestMux::open(Arc::new(connection)).await else {
                continue;
            };
            self.tasks.spawn(self.clone().read(requests.clone(), subscriber));
            let overlaps = last.as_ref().is_some_and(|last| !last.connection.lost.is_cancelled());
            self.update(|parts| {
                parts.heard += u64::from(!overlaps);
                parts.settling = Part::Up(requests.clone());
            });
            if let Some(last) = last.take() {
                self.tasks.spawn(self.clone().retire(last));
            }
            if self.until_gone(&requests.connection).await {
                let lost = "the connection for settling was lost".to_owned();
                self.update(|parts| parts.settling = Part::Down(lost));
            }
            last = Some(requests);
        }
    }

    /// Waits until a connection is lost (`true`), or must be replaced while it still serves.
    async fn until_gone(&self, connection: &NatsConnection) -> bool {
        let stopped = tokio::select! {
            biased;
            () = connection.lost.cancelled() => return true,
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
        let listening = self.ears.listen(&requests.connection);
        let looking = self.presence.look(&requests, &self.settings);
        let all =
            async { tokio::join!(requests.read(subscriber), requests.pulse(), listening, looking) };
        self.stop.run_until_cancelled(all).await;
        requests.connection.end();
    }

    /// Lets a connection that was replaced answer what was asked on it.
    async fn retire(self: Arc<Self>, requests: Arc<RequestMux>) {
        let answered = self.stop.run_until_cancelled(sleep(RETIRE));
        requests.connection.lost.run_until_cancelled(answered).await;
        requests.connection.end();
    }

    /// Says what has become of the search for a connection, unless the last one serves on.
    fn replace(&self, last: Option<&NatsConnection>, change: impl FnOnce(&mut Parts)) {
        if last.is_none_or(|last| last.lost.is_cancelled()) {
            self.update(change);
        }
    }

    /// Connects to a server that is fit, however long it takes. `None` once stopped.
    async fn connect<T>(
        &self,
        role: &'static str,
        waits: &mut Backoff,
        set: impl Fn(Part<T>),
    ) -> Option<NatsConnection> {
        let mut told = false;
        self.stop.run_until_cancelled(sleep(waits.after_the_last(clock::now()))).await?;
        loop {
            let made = async {
                match role {
                    SETTLING => NatsConnection::connect_on_own_runtime(&self.settings, role).await,
                    _ => NatsConnection::make(&self.settings, role).await,
                }
            };
            let wait = match self.stop.run_until_cancelled(made).await? {
                Ok(connection) if fits(&connection.version) => {
                    let (version, server) = (&connection.version, &connection.server_id);
                    tracing::info!(role, version, server, "connected to NATS");
                    waits.made = Some(clock::now());
                    return Some(connection);
                }
                Ok(connection) => {
                    let why = unfit(&connection.version);
                    if !std::mem::replace(&mut told, true) {
                        tracing::error!(role, why, "this NATS server cannot be used; trying on");
                    }
                    set(Part::Unsupported(why));
                    UNSUPPORTED_RETRY
                }
                Err(error) => {
                    let error = connection::why(&error, &self.settings);
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(role, error, "NATS cannot be reached; trying on");
                    }
                    set(Part::Down(format!("NATS cannot be reached: {error}")));
                    waits.longer()
                }
            };
            self.stop.run_until_cancelled(sleep(wait)).await?;
        }
    }

    fn update(&self, change: impl FnOnce(&mut Parts)) {
        let mut parts = self.parts();
        change(&mut parts);
        let link = parts.link();
        // Under the lock, so that links are published in the order in which they came to be.
        self.link.send_if_modified(|old| std::mem::replace(old, link.clone()) != link);
    }

    fn parts(&self) -> MutexGuard<'_, Parts> {
        self.parts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Spaces the attempts to connect.
#[derive(Default)]
struct Backoff {
    tried: usize,
    /// The last that was a success at first.
    made: Option<Instant>,
}

impl Backoff {
    fn longer(&mut self) -> Duration {
        let wait = RETRY[self.tried.min(RETRY.len() - 1)];
        self.tried += 1;
        wait
    }

    /// After a connection that lasted, none.
    fn after_the_last(&mut self, now: Instant) -> Duration {
        match self.made.take() {
            Some(made) if now.saturating_duration_since(made) < LASTING => self.longer(),
            _ => {
                self.tried = 0;
                Duration::ZERO
            }
        }
    }
}

impl Parts {
    fn link(&self) -> Link {
        match (&self.deliveries, &self.settling) {
            (Part::Unsupported(why), _) | (_, Part::Unsupported(why)) => {
                Link::Unsupported(why.as_str().into())
            }
            (Part::Down(why), _) | (_, Part::Down(why)) => Link::Down(why.as_str().into()),
            (Part::Up(connection), Part::Up(_)) => Link::Up(Arc::new(Server {
                epoch: self.epoch,
                bus_epoch: self.heard,
                id: connection.server_id.clone(),
                version: connection.version.clone(),
                max_payload: connection.max_payload,
            })),
        }
    }
}

/// A version that cannot be read is taken for a build of somebody's own, who knows.
fn fits(version: &str) -> bool {
    Version::parse(version.trim_start_matches('v')).map_or(true, |version| {
        // A pre-release like 2.10.16-beta counts as its release.
        (version.major, version.minor, version.patch)
            >= (OLDEST_SERVER.major, OLDEST_SERVER.minor, OLDEST_SERVER.patch)
    })
}

fn unfit(version: &str) -> String {
    format!(
        "nats-server {version} is too old: {OLDEST_SERVER} or newer is needed, because older ones \
         can ignore a Term with a reason and answer as if they had not"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_from_2_10_16_on_fit() {
        for version in ["2.10.16", "2.10.16-beta.1", "2.11.0-dev", "2.15.1", "3.0.0", "v2.12.0"] {
            assert!(fits(version), "{version}");
        }
        for version in ["2.9.10", "2.10.15", "1.4.0"] {
            assert!(!fits(version), "{version}");
        }
    }
}
