//! One single-use NATS connection. Owns how it is made, how its loss is noticed, what may have been
//! the cause, and which subjects the server refused on it.
//!
//! Single-use, because the client library keeps what is queued over a reconnect: a Nak that was
//! given up on would be sent a minute later, into another worker's delivery. The library cannot be
//! told not to reconnect; but the second time it asks who we are it gets no answer, and then it
//! ends for good, its queue with it.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::{
    AuthError, Client, ConnectError, ConnectErrorKind, ConnectOptions, Event, ServerAddr,
    ServerError,
};
use percent_encoding::percent_decode_str;
use tokio::{
    runtime::{self, Runtime},
    sync::watch,
    time::timeout_at,
};
use tokio_util::sync::CancellationToken;

use super::{Auth, Settings};
use crate::{clock, log_throttle::KeyedLogThrottle};

/// Three unanswered pings in a row end a connection, so a half-open one is noticed within 12 s.
const PING_INTERVAL: Duration = Duration::from_secs(3);
/// Bounds one attempt to connect to one address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Deliveries that wait here for their reader; more than any pull may ask for.
const INBOX_CAPACITY: usize = 65_536;
/// Refused subjects that are remembered: those of a whole Settle, at least.
const DENIALS: usize = 1024;

/// Between two lines of the log on subjects that differ by their numbers alone, at least.
const DENIAL_LOG_INTERVAL: Duration = Duration::from_secs(600);
/// Lines of the log on refused subjects in ten seconds: whoever asks for streams that the proxy has no
/// right to can have as many refused as they like.
const DENIAL_LINES_PER_TEN_SECONDS: u32 = 20;

/// A connection that works until it is lost, and then never again.
pub(super) struct NatsConnection {
    pub(super) client: Client,
    pub(super) server_id: String,
    pub(super) version: String,
    /// The largest message that the server takes, in bytes.
    pub(super) max_payload: u64,
    /// Cancelled when the connection is gone, or given up.
    pub(super) lost: CancellationToken,
    /// Cancelled when the server has said that it will go (its lame duck mode). It serves on for a
    /// while.
    pub(super) leaving: CancellationToken,
    pub(super) denials: Arc<Denials>,
    /// It was said that acks on it name no JetStream domain.
    pub(super) domain_told: AtomicBool,
    end: Arc<CloseCause>,
    room: DedicatedRuntime,
}

/// Where the library's task of a connection runs that must be able to end at once. The library
/// has no way to end it: it goes on to write what is queued, also when nobody holds the client any
/// more, for as long as it takes to find the server silent. With its runtime it is gone, and its
/// socket and its queue with it.
#[derive(Default)]
struct DedicatedRuntime(Mutex<Option<Runtime>>);

impl DedicatedRuntime {
    fn close(&self) {
        if let Some(runtime) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for DedicatedRuntime {
    fn drop(&mut self) {
        self.close();
    }
}

impl NatsConnection {
    /// The same as [`NatsConnection::make`], and [`NatsConnection::end`] ends it at once.
    pub(super) async fn connect_on_own_runtime(
        settings: &Settings,
        role: &'static str,
    ) -> Result<Self, ConnectError> {
        let failed = |error| ConnectError::with_source(ConnectErrorKind::Io, error);
        let mut builder = runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("nats").enable_all().build();
        let runtime = runtime.map_err(failed)?;
        let (handle, settings) = (runtime.handle().clone(), settings.clone());
        // From here on it ends with the room, never by itself: that would block.
        let room = DedicatedRuntime(Mutex::new(Some(runtime)));
        let made = handle.spawn(async move { Self::make(&settings, role).await });
        let made = made.await.map_err(|error| failed(error.into()))??;
        Ok(Self { room, ..made })
    }

    /// Gives it up: what is queued on it never leaves.
    pub(super) fn end(&self) {
        self.lost.cancel();
        self.room.close();
    }

    /// Connects to one of the servers, or says why not. `role` names the connection in the
    /// server's own lists.
    pub(super) async fn make(settings: &Settings, role: &str) -> Result<Self, ConnectError> {
        let (lost, leaving) = (CancellationToken::new(), CancellationToken::new());
        let (denials, end) = (Arc::new(Denials::new(settings)), Arc::new(CloseCause::default()));
        let observer = Observer {
            lost: lost.clone(),
            leaving: leaving.clone(),
            denials: denials.clone(),
            end: end.clone(),
        };
        let mut options = options(settings, end.clone())
            .name(format!("fetch-proxy {role}"))
            .event_callback(move |event| {
                observer.see(event);
                std::future::ready(())
            });
        if let Some(ca) = &settings.ca {
            options = options.add_root_certificates(ca.clone());
        }
        if let Some((cert, key)) = &settings.identity {
            options = options.add_client_certificate(cert.clone(), key.clone());
        }
        if settings.tls_first {
            options = options.tls_first();
        }
        let client = options.connect(&settings.servers[..]).await?;
        let server = client.server_info();
        let (server_id, version) = (server.server_id, server.version);
        let max_payload = server.max_payload as u64;
        Ok(Self {
            client,
            server_id,
            version,
            max_payload,
            lost,
            leaving,
            denials,
            domain_told: AtomicBool::new(false),
            end,
            room: DedicatedRuntime::default(),
        })
    }

    /// Waits until it is known how a lost connection ended, or until `until`. `true`: it looks as if
    /// it ended by what it brought.
    pub(super) async fn broke(&self, until: Instant) -> bool {
        // Too late, it is a server that cannot be reached.
        let known = timeout_at(until.into(), self.end.known.cancelled()).await;
        known.is_ok() && self.end.broke()
    }
}

/// How a connection has ended, as far as it shows: the library does not tell.
#[derive(Default)]
struct CloseCause {
    /// The library has asked who we are.
    asked: AtomicBool,
    /// It has asked again, right after the loss: the server is there.
    asked_again: AtomicBool,
    /// The library has seen the loss. Without this, its task has panicked.
    seen: AtomicBool,
    /// The server has said before why it would close the connection, or that it is going.
    explained: AtomicBool,
    /// There is no more to come.
    known: CancellationToken,
}

impl CloseCause {
    /// A connection ends by what it brought when the library cannot read it: then it hangs up, and
    /// finds the server as it was; or it panics.
    fn broke(&self) -> bool {
        let by_itself =
            self.asked_again.load(Ordering::Relaxed) || !self.seen.load(Ordering::Relaxed);
        by_itself && !self.explained.load(Ordering::Relaxed)
    }
}

fn options(settings: &Settings, end: Arc<CloseCause>) -> ConnectOptions {
    let auth = settings.auth.clone();
    let named_in_url = settings.servers.iter().find_map(user_of);
    ConnectOptions::with_auth_callback(move |nonce| {
        let first = !end.asked.swap(true, Ordering::Relaxed);
        if !first {
            end.asked_again.store(true, Ordering::Relaxed);
            end.known.cancel();
        }
        let auth = match (&auth, &named_in_url) {
            (Auth::None, Some(user)) => user.clone(),
            (auth, _) => auth.clone(),
        };
        async move {
            if first {
                auth.answer(&nonce).await
            } else {
                Err(AuthError::new("single-use connection"))
            }
        }
    })
    // One attempt for each server; 0 would be read as "without end".
    .max_reconnects(settings.servers.len().max(1))
    .reconnect_delay_callback(|_| Duration::ZERO)
    .connection_timeout(CONNECT_TIMEOUT)
    .request_timeout(None)
    .ping_interval(PING_INTERVAL)
    .subscription_capacity(INBOX_CAPACITY)
    .custom_inbox_prefix(&settings.inbox_prefix)
    // Else it is the server's to say, and whoever is in its place says no and gets the password.
    .require_tls(settings.ca.is_some() || settings.identity.is_some())
    // Every subject that we publish to is the server's own or checked where it came in.
    .skip_subject_validation(true)
}

/// Why there is no connection, for people, with advice where the fault is known.
pub(super) fn why(error: &ConnectError, settings: &Settings) -> String {
    let mut why = error.to_string();
    // The words of the library for a server that closed the connection without a word: one that waits
    // for a TLS handshake does so after its TLS timeout, 2 s by default.
    if !settings.tls_first && why.contains("expected INFO, got nothing") {
        why.push_str("; a server with handshake_first: true needs --nats-tls-first");
    }
    why
}

/// Who a URL names, which has to write some characters as `%` and their number.
fn user_of(server: &ServerAddr) -> Option<Auth> {
    let read = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
    let user = read(server.username()?);
    Some(match server.password() {
        Some(password) => Auth::User(user, read(password)),
        None => Auth::Token(user),
    })
}

/// Sees what the library tells of its connection. The library's task owns the only sender of these
/// events, so this is dropped when that task has ended, however it did.
struct Observer {
    lost: CancellationToken,
    leaving: CancellationToken,
    denials: Arc<Denials>,
    end: Arc<CloseCause>,
}

impl Observer {
    fn see(&self, event: Event) {
        match event {
            Event::Disconnected | Event::Closed => {
                self.end.seen.store(true, Ordering::Relaxed);
                self.lost.cancel();
            }
            Event::ServerError(ServerError::Other(text)) => match denied_subject(&text) {
                Some(subject) => self.denials.record(subject, clock::now()),
                None => self.end.explained.store(true, Ordering::Relaxed),
            },
            Event::ServerError(_) => self.end.explained.store(true, Ordering::Relaxed),
            Event::LameDuckMode => {
                self.end.explained.store(true, Ordering::Relaxed);
                self.leaving.cancel();
            }
            Event::Connected | Event::Draining | Event::SlowConsumer(_) | Event::ClientError(_) => {
            }
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.end.known.cancel();
        self.lost.cancel();
    }
}

/// The subject in `Permissions Violation for Publish to "subject"`.
fn denied_subject(text: &str) -> Option<&str> {
    let (_, rest) = text
        .split_once("Permissions Violation for Publish to ")
        .or_else(|| text.split_once("Permissions Violation for Subscription to "))?;
    rest.split('"').nth(1)
}

/// Subjects that the server refused. It says so on the connection, not to the request, which would
/// only time out.
#[derive(Debug)]
pub(super) struct Denials {
    recent: Mutex<VecDeque<(String, Instant)>>,
    count: watch::Sender<u64>,
    /// Which of them the log has.
    told: KeyedLogThrottle,
    /// What our API calls begin with.
    api: String,
}

impl Denials {
    fn new(settings: &Settings) -> Self {
        let (count, told) = (
            watch::channel(0).0,
            KeyedLogThrottle::new(DENIAL_LOG_INTERVAL, DENIAL_LINES_PER_TEN_SECONDS),
        );
        Self { recent: Mutex::default(), count, told, api: settings.api("") }
    }

    fn record(&self, subject: &str, now: Instant) {
        // A server of our domain calls the API by its own name.
        let call = subject.strip_prefix("$JS.API.");
        let ours = call.map_or_else(|| subject.to_owned(), |call| format!("{}{call}", self.api));
        // Each delivery is settled by a subject of its own, which has the same right as all others.
        let alike: Vec<&str> =
            subject.split('.').filter(|part| part.parse::<u64>().is_err()).collect();
        // A right that nothing needs: see `presence`.
        let needed = ours.strip_prefix(&*self.api) != Some("INFO");
        if needed && self.told.allow(&alike, now) {
            tracing::warn!(subject, "NATS refuses this subject to the proxy's user");
        }
        let subject = ours;
        let mut recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        if recent.len() == DENIALS {
            recent.pop_front();
        }
        recent.push_back((subject, now));
        drop(recent);
        self.count.send_modify(|count| *count += 1);
    }

    /// Changes with every refusal.
    pub(super) fn watch(&self) -> watch::Receiver<u64> {
        self.count.subscribe()
    }

    /// The subjects refused since `since`.
    pub(super) fn since(&self, since: Instant) -> HashSet<String> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let since = recent.iter().rev().take_while(|(_, when)| *when >= since);
        since.map(|(subject, _)| subject.clone()).collect()
    }

    /// The first subject refused since `since` that `matches`.
    pub(super) fn find(&self, since: Instant, matches: impl Fn(&str) -> bool) -> Option<String> {
        let recent = self.recent.lock().unwrap_or_else(PoisonError::into_inner);
        let mut since = recent.iter().filter(|(_, when)| *when >= since);
        since.find(|(subject, _)| matches(subject)).map(|(subject, _)| subject.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_refused_subject_is_read_from_the_server_s_words() {
        let publish = r#"Permissions Violation for Publish to "$JS.ACK.S.c.1""#;
        let subscribe = r#"Permissions Violation for Subscription to "_INBOX.x.*" using queue "q""#;
        assert_eq!(denied_subject(publish), Some("$JS.ACK.S.c.1"));
        assert_eq!(denied_subject(subscribe), Some("_INBOX.x.*"));
        assert_eq!(denied_subject("Maximum Payload Violation"), None);
    }
}
