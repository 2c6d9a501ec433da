//! One single-use NATS connection. Owns how the connection is made, how its loss is noticed, the likely
//! cause of the loss, and the subjects that the server refused.
//!
//! A connection is used once, because the client library keeps its queue over a reconnect. A Nak that was
//! given up would be sent a minute later, into another worker's delivery. The library has no switch
//! against reconnecting. But when it asks for credentials a second time, it gets an error. Then it ends,
//! and its queue ends with it.

use std::{
    collections::{HashSet, VecDeque},
    sync::{
        Arc, Mutex,
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

use super::{auth::Auth, settings::Settings};
use crate::{
    clock,
    lock::lock,
    log_throttle::KeyedLogThrottle,
    metrics::{NatsMeter, NatsRight},
};

/// Three unanswered pings in a row end a connection, so a half-open connection is noticed within 12 s.
const PING_INTERVAL: Duration = Duration::from_secs(3);
/// Bounds one attempt to connect to one address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Most deliveries that wait here for their reader: more than any pull may ask for.
const INBOX_CAPACITY: usize = 65_536;
/// Refused subjects that are remembered: at least those of a whole Settle.
const DENIALS: usize = 1024;

/// The shortest time between two log lines about subjects that differ only in numbers.
const DENIAL_LOG_INTERVAL: Duration = Duration::from_secs(600);
/// Most log lines about refused subjects in ten seconds. A caller that asks for streams without a right
/// to them can cause any number of refusals.
const DENIAL_LINES_PER_TEN_SECONDS: u32 = 20;

/// A connection that works until it is lost. It never reconnects.
pub(super) struct NatsConnection {
    pub(super) client: Client,
    pub(super) server_id: String,
    pub(super) server_name: String,
    pub(super) version: String,
    /// The largest message that the server accepts, in bytes.
    pub(super) max_payload: u64,
    /// Cancelled when the connection is gone, or given up.
    pub(super) lost: CancellationToken,
    /// Cancelled when the server has announced that it will stop (its lame duck mode). The server
    /// continues serving for a while.
    pub(super) leaving: CancellationToken,
    pub(super) denials: Arc<Denials>,
    pub(super) meter: NatsMeter,
    /// The log has the line that acks on this connection name no JetStream domain.
    pub(super) domain_logged: AtomicBool,
    cause: Arc<CloseCause>,
    runtime: DedicatedRuntime,
}

/// The runtime for the library's task of a connection that must be able to end at once. The library
/// cannot end that task. The task continues to write its queue when nobody holds the client any more,
/// until it finds the server silent. The task ends with its runtime, and so do its socket and its queue.
#[derive(Default)]
struct DedicatedRuntime(Mutex<Option<Runtime>>);

impl DedicatedRuntime {
    fn close(&self) {
        if let Some(runtime) = lock(&self.0).take() {
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
    /// As [`NatsConnection::make`], but [`NatsConnection::end`] ends the connection at once.
    pub(super) async fn connect_on_own_runtime(
        settings: &Settings,
        role: &'static str,
        meter: &NatsMeter,
    ) -> Result<Self, ConnectError> {
        let failed = |error| ConnectError::with_source(ConnectErrorKind::Io, error);
        let mut builder = runtime::Builder::new_multi_thread();
        let runtime = builder.worker_threads(1).thread_name("nats").enable_all().build();
        let runtime = runtime.map_err(failed)?;
        let (handle, settings) = (runtime.handle().clone(), settings.clone());
        let meter = meter.clone();
        // From here on the runtime ends by `DedicatedRuntime::close`. A plain drop would block.
        let runtime = DedicatedRuntime(Mutex::new(Some(runtime)));
        let made = handle.spawn(async move { Self::make(&settings, role, &meter).await });
        let made = made.await.map_err(|error| failed(error.into()))??;
        Ok(Self { runtime, ..made })
    }

    /// Gives the connection up. Its queue never leaves.
    pub(super) fn end(&self) {
        self.lost.cancel();
        self.runtime.close();
    }

    /// Connects to one of the servers. `role` names the connection in the server's own lists.
    pub(super) async fn make(
        settings: &Settings,
        role: &str,
        meter: &NatsMeter,
    ) -> Result<Self, ConnectError> {
        let (lost, leaving) = (CancellationToken::new(), CancellationToken::new());
        let denials = Arc::new(Denials::new(settings, meter));
        let cause = Arc::new(CloseCause::default());
        let observer = Observer {
            lost: lost.clone(),
            leaving: leaving.clone(),
            denials: denials.clone(),
            cause: cause.clone(),
        };
        let mut options = options(settings, cause.clone())
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
        let (server_id, server_name) = (server.server_id, server.server_name);
        let version = server.version;
        let max_payload = server.max_payload as u64;
        Ok(Self {
            client,
            server_id,
            server_name,
            version,
            max_payload,
            lost,
            leaving,
            denials,
            meter: meter.clone(),
            domain_logged: AtomicBool::new(false),
            cause,
            runtime: DedicatedRuntime::default(),
        })
    }

    /// Waits until the cause of the loss is known, or until `until`. `true`: a message that the
    /// connection brought seems to be the cause.
    pub(super) async fn closed_by_content(&self, until: Instant) -> bool {
        // Without a known cause by then, the server cannot be reached.
        let known = timeout_at(until.into(), self.cause.known.cancelled()).await;
        known.is_ok() && self.cause.is_content()
    }
}

/// Signs of the cause of a loss. The library does not report the cause.
#[derive(Default)]
struct CloseCause {
    /// The library has asked for credentials.
    asked: AtomicBool,
    /// The library has asked again, right after the loss: the server is there.
    asked_again: AtomicBool,
    /// The library has reported the loss. Without a report its task has panicked.
    seen: AtomicBool,
    /// The server has said why it would close the connection, or has announced that it will stop.
    explained: AtomicBool,
    /// Cancelled when no more signs can come.
    known: CancellationToken,
}

impl CloseCause {
    /// Whether a message ended the connection. If the library cannot read a message, it hangs up and
    /// finds the server unchanged, or it panics.
    fn is_content(&self) -> bool {
        let by_itself =
            self.asked_again.load(Ordering::Relaxed) || !self.seen.load(Ordering::Relaxed);
        by_itself && !self.explained.load(Ordering::Relaxed)
    }
}

fn options(settings: &Settings, cause: Arc<CloseCause>) -> ConnectOptions {
    let auth = settings.auth.clone();
    let named_in_url = settings.servers.iter().find_map(user_of);
    ConnectOptions::with_auth_callback(move |nonce| {
        let first = !cause.asked.swap(true, Ordering::Relaxed);
        if !first {
            cause.asked_again.store(true, Ordering::Relaxed);
            cause.known.cancel();
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
    // One attempt for each server. The library reads 0 as "no limit".
    .max_reconnects(settings.servers.len().max(1))
    .reconnect_delay_callback(|_| Duration::ZERO)
    .connection_timeout(CONNECT_TIMEOUT)
    .request_timeout(None)
    .ping_interval(PING_INTERVAL)
    .subscription_capacity(INBOX_CAPACITY)
    .custom_inbox_prefix(&settings.inbox_prefix)
    // Otherwise the server decides, and an impostor would decide against TLS and get the password.
    .require_tls(settings.ca.is_some() || settings.identity.is_some())
    // Every subject that we publish to comes from the server, or was checked when it came in.
    .skip_subject_validation(true)
}

/// The reason of a failure to connect, for people, with advice for a known fault.
pub(super) fn explain(error: &ConnectError, settings: &Settings) -> String {
    let mut why = error.to_string();
    // The library's words for a server that closed the connection and sent nothing. A server that waits
    // for a TLS handshake does so after its TLS timeout, 2 s by default.
    if !settings.tls_first && why.contains("expected INFO, got nothing") {
        why.push_str("; a server with handshake_first: true needs --nats-tls-first");
    }
    why
}

/// The user in a URL. A URL writes some characters as `%` and their number.
fn user_of(server: &ServerAddr) -> Option<Auth> {
    let read = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
    let user = read(server.username()?);
    Some(match server.password() {
        Some(password) => Auth::User(user, read(password)),
        None => Auth::Token(user),
    })
}

/// Receives the library's events of a connection. The library's task owns the observer, so the observer
/// is dropped when that task has ended, also by a panic.
struct Observer {
    lost: CancellationToken,
    leaving: CancellationToken,
    denials: Arc<Denials>,
    cause: Arc<CloseCause>,
}

impl Observer {
    fn see(&self, event: Event) {
        match event {
            Event::Disconnected | Event::Closed => {
                self.cause.seen.store(true, Ordering::Relaxed);
                self.lost.cancel();
            }
            Event::ServerError(ServerError::Other(text)) => match denied_subject(&text) {
                Some((right, subject)) => self.denials.record(subject, right, clock::now()),
                None => self.cause.explained.store(true, Ordering::Relaxed),
            },
            Event::ServerError(_) => self.cause.explained.store(true, Ordering::Relaxed),
            Event::LameDuckMode => {
                self.cause.explained.store(true, Ordering::Relaxed);
                self.leaving.cancel();
            }
            Event::Connected | Event::Draining | Event::SlowConsumer(_) | Event::ClientError(_) => {
            }
        }
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.cause.known.cancel();
        self.lost.cancel();
    }
}

/// The right and the subject in `Permissions Violation for Publish to "subject"`.
fn denied_subject(text: &str) -> Option<(NatsRight, &str)> {
    let rights = [("Publish", NatsRight::Publish), ("Subscription", NatsRight::Subscribe)];
    rights.into_iter().find_map(|(word, right)| {
        let (_, rest) = text.split_once(&format!("Permissions Violation for {word} to "))?;
        Some((right, rest.split('"').nth(1)?))
    })
}

/// The subjects that the server refused. The server sends a refusal to the connection, not to the request,
/// which would only time out.
#[derive(Debug)]
pub(super) struct Denials {
    recent: Mutex<VecDeque<(String, Instant)>>,
    count: watch::Sender<u64>,
    logged: KeyedLogThrottle,
    meter: NatsMeter,
    /// The prefix of our API calls.
    api: String,
}

impl Denials {
    fn new(settings: &Settings, meter: &NatsMeter) -> Self {
        let (count, logged) = (
            watch::channel(0).0,
            KeyedLogThrottle::new(DENIAL_LOG_INTERVAL, DENIAL_LINES_PER_TEN_SECONDS),
        );
        let (recent, meter) = (Mutex::default(), meter.clone());
        Self { recent, count, logged, meter, api: settings.api("") }
    }

    fn record(&self, subject: &str, right: NatsRight, now: Instant) {
        self.meter.denied(right);
        // A server of our domain names the API without the domain.
        let call = subject.strip_prefix("$JS.API.");
        let ours = call.map_or_else(|| subject.to_owned(), |call| format!("{}{call}", self.api));
        // Ack subjects of different deliveries differ only in numbers, and need the same right.
        let without_numbers: Vec<&str> =
            subject.split('.').filter(|part| part.parse::<u64>().is_err()).collect();
        // The right to INFO is optional: see `presence`.
        let needed = ours.strip_prefix(&*self.api) != Some("INFO");
        if needed && self.logged.allow(&without_numbers, now) {
            tracing::warn!(subject, "NATS refuses this subject to the proxy's user");
        }
        let subject = ours;
        let mut recent = lock(&self.recent);
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
        let recent = lock(&self.recent);
        let since = recent.iter().rev().take_while(|(_, when)| *when >= since);
        since.map(|(subject, _)| subject.clone()).collect()
    }

    /// The first subject refused since `since` that `matches`.
    pub(super) fn find(&self, since: Instant, matches: impl Fn(&str) -> bool) -> Option<String> {
        let recent = lock(&self.recent);
        let mut since = recent.iter().filter(|(_, when)| *when >= since);
        since.find(|(subject, _)| matches(subject)).map(|(subject, _)| subject.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_subject_is_read_from_the_server_s_words() {
        let publish = r#"Permissions Violation for Publish to "$JS.ACK.S.c.1""#;
        let subscribe = r#"Permissions Violation for Subscription to "_INBOX.x.*" using queue "q""#;
        assert_eq!(denied_subject(publish), Some((NatsRight::Publish, "$JS.ACK.S.c.1")));
        assert_eq!(denied_subject(subscribe), Some((NatsRight::Subscribe, "_INBOX.x.*")));
        assert_eq!(denied_subject("Maximum Payload Violation"), None);
    }
}
