//! One single-use NATS connection of the client library, for deliveries. Owns how the connection is made,
//! how its loss is noticed, and the likely cause of the loss.
//!
//! A connection is used once, because the client library keeps its queue over a reconnect. A pull of the
//! lost connection would be sent to an inbox that nobody reads. The library has no switch against
//! reconnecting. But when it asks for credentials a second time, it gets an error. Then it ends,
//! and its queue ends with it.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::{AuthError, Client, ConnectError, ConnectOptions, Event, ServerError};
use tokio::time::timeout_at;
use tokio_util::sync::CancellationToken;

use super::{denials::Denials, settings::Settings};
use crate::metrics::NatsMeter;

/// Three unanswered pings in a row end a connection, so a half-open connection is noticed within 12 s.
const PING_INTERVAL: Duration = Duration::from_secs(3);
/// Bounds one attempt to connect to one address.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Most deliveries that wait here for their reader: more than any pull may ask for.
const INBOX_CAPACITY: usize = 65_536;

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
    /// The log has the line that acks on this connection name no JetStream domain.
    pub(super) domain_logged: AtomicBool,
    cause: Arc<CloseCause>,
}

impl NatsConnection {
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
            domain_logged: AtomicBool::new(false),
            cause,
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
    let auth = settings.auth_of_any();
    ConnectOptions::with_auth_callback(move |nonce| {
        let first = !cause.asked.swap(true, Ordering::Relaxed);
        if !first {
            cause.asked_again.store(true, Ordering::Relaxed);
            cause.known.cancel();
        }
        let auth = auth.clone();
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
pub(super) fn explain(mut why: String, settings: &Settings) -> String {
    // The library's words for a server that closed the connection and sent nothing. A server that waits
    // for a TLS handshake does so after its TLS timeout, 2 s by default.
    if !settings.tls_first && why.contains("expected INFO, got nothing") {
        why.push_str("; a server with handshake_first: true needs --nats-tls-first");
    }
    why
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
            Event::ServerError(ServerError::Other(text)) if self.denials.take(&text) => {}
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
