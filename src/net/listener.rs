//! Accepts connections, bounds their number, their age and their silence, and closes them. Owns every
//! connection and the tasks on it. Knows nothing about the calls.
//!
//! ```text
//!  accept ─▶ TLS and preface within 5 s ─▶ calls ── age, or the stop ──▶ GOAWAY ─▶ open calls end ─▶ closed
//!              └ silent: closed               └ no answer to a ping: closed  └ by a deadline: cut
//! ```
//! A connection with a client certificate also receives GOAWAY when the certificate ends, and within 10 s
//! after an authority of client certificates was removed.
//!
//! tonic's own server is not used: it waits for an idle connection without end, and its own
//! deadline for calls answers CANCELLED in place of a reason.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    pin::pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
    time::{sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service;

use super::{
    connection::ClientConnection,
    connections::OpenConnections,
    corked::corked,
    opening::{FAREWELL, OpenConnection, Opener, PREFACE},
    peer::{Peer, WithPeer},
    unwritten::until_ended,
};
use crate::{
    clock,
    limits::{ListenerLimits, turned_away},
    log_throttle::LogThrottle,
    metrics::{
        ConnectionClose, ConnectionEnd, ConnectionMeter, ConnectionRefusal, MeteredConnection,
    },
    tls::ServerTls,
};

/// Bytes that a peer may send before they are read: on one stream, and on a whole connection. Requests are
/// read at once, so small windows are enough. Each connection may hold that much memory.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// Most bytes of the headers of one request.
const LARGEST_HEADERS: u32 = 16 * 1024;
/// The time from one ping to the next. A peer that does not answer within the timeout is gone, together
/// with its calls.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time of open calls after GOAWAY: a little more than the longest Fetch.
const CLOSE_GRACE: Duration = Duration::from_secs(330);
/// Age at which a connection beyond the limit receives GOAWAY: enough for a refusal and for a health
/// check. Its open calls end after [`FAREWELL`].
const TURNED_AWAY: Duration = Duration::from_secs(4);
/// The time over which connections with client certificates end after an authority was removed. It spreads
/// the clients that connect again.
const REMOVAL_SPREAD: Duration = Duration::from_secs(10);
/// The pause after a failed accept. The cause is a lack of descriptors or memory.
pub(super) const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// A service for all calls of one connection. Every tower service of this shape is such a service.
pub(crate) trait HttpService:
    Service<
        Request<Incoming>,
        Response = Response<Self::ResponseBody>,
        Error = Infallible,
        Future: Send + 'static,
    > + Clone
    + Send
    + 'static
{
    /// The body of its answers.
    type ResponseBody: http_body::Body<Data: Send, Error: Into<BoxError>> + Send + 'static;
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;

impl<S, B> HttpService for S
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
    B: http_body::Body<Data: Send, Error: Into<BoxError>> + Send + 'static,
{
    type ResponseBody = B;
}

/// The services behind a listener.
pub(crate) struct Services<M> {
    /// The name of the listener in the log.
    pub(crate) listener: &'static str,
    /// Counts its connections.
    pub(crate) meter: ConnectionMeter,
    /// The TLS of the listener. `None`: it speaks without TLS.
    pub(crate) tls: Option<Arc<ServerTls>>,
    /// Makes the service of one connection. The flag says whether the connection is beyond the limit.
    pub(crate) service: M,
    /// Whether a few connections beyond the limit are accepted for a refusal. If not, a new connection
    /// replaces the one that was idle longest.
    pub(crate) beyond: bool,
    /// Where its open connections are listed.
    pub(crate) connections: Arc<OpenConnections>,
}

/// Serves until `stop` gives the time by which to have ended. Then it accepts no more connections, sends
/// GOAWAY on all, and returns when all are closed. It closes them itself [`FAREWELL`] after `idle`, or at
/// that time.
pub(crate) async fn serve<M, S>(
    listener: TcpListener,
    limits: ListenerLimits,
    behind: Services<M>,
    stop: impl Future<Output = Instant>,
    idle: impl Future<Output = ()>,
) where
    M: Fn(&Arc<ClientConnection>, bool) -> S,
    S: HttpService,
{
    let mut open = Listener::new(&limits, behind);
    let mut stop = pin!(stop);
    let by = loop {
        tokio::select! {
            by = stop.as_mut() => break by,
            accepted = listener.accept() => match accepted {
                Ok((stream, address)) => open.admit(stream, address),
                Err(error) => open.pause(&error).await,
            },
            Some(_) = open.connections.join_next() => {}
        }
    };
    drop(listener);
    open.close(idle, by).await;
}

/// The times after which a connection receives GOAWAY, and the grace of its open calls after that.
struct ConnectionLifetime {
    age: Option<Duration>,
    idle: Option<Duration>,
    grace: Duration,
}

struct Listener<M> {
    behind: Services<M>,
    builder: Arc<auto::Builder<Spawn>>,
    connections: JoinSet<()>,
    /// Connections that a new connection may replace; only without `beyond`.
    open: Vec<Weak<ClientConnection>>,
    calls: TaskTracker,
    permits: Arc<Semaphore>,
    permits_beyond: Arc<Semaphore>,
    max_age: Option<Duration>,
    max_idle: Option<Duration>,
    going: CancellationToken,
    /// Bounds the log lines about connections that are not accepted.
    trouble: LogThrottle,
    opener: Arc<Opener>,
}

impl<M> Listener<M> {
    fn new(limits: &ListenerLimits, behind: Services<M>) -> Self {
        let calls = TaskTracker::new();
        let mut builder = auto::Builder::new(Spawn(calls.clone()));
        builder.http1().timer(TokioTimer::new()).header_read_timeout(PREFACE);
        builder
            .http2()
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT)
            .max_header_list_size(LARGEST_HEADERS)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_concurrent_streams(limits.max_streams);
        let builder = if limits.http1 { builder } else { builder.http2_only() };
        let most = limits.max_connections.min(Semaphore::MAX_PERMITS);
        let opener = Opener::new(behind.listener, behind.tls.clone(), limits.http1);
        Self {
            behind,
            builder: Arc::new(builder),
            connections: JoinSet::new(),
            open: Vec::new(),
            calls,
            permits: Arc::new(Semaphore::new(most)),
            permits_beyond: Arc::new(Semaphore::new(turned_away(most))),
            max_age: limits.max_age,
            max_idle: limits.max_idle,
            going: CancellationToken::new(),
            trouble: LogThrottle::default(),
            opener: Arc::new(opener),
        }
    }

    fn admit<S>(&mut self, stream: TcpStream, address: SocketAddr)
    where
        M: Fn(&Arc<ClientConnection>, bool) -> S,
        S: HttpService,
    {
        let mut metered = self.behind.meter.accepted();
        let free = self.permits.clone().try_acquire_owned().ok();
        let full = free.is_none();
        if full && self.trouble.allow(clock::now()) {
            let listener = self.behind.listener;
            tracing::warn!(listener, "all connections are taken: new connections are refused");
        }
        let (permit, life) = if self.behind.beyond && full {
            metered.ends(ConnectionEnd::Refused(ConnectionRefusal::Limit));
            let life = ConnectionLifetime { age: Some(TURNED_AWAY), idle: None, grace: FAREWELL };
            (self.permits_beyond.clone().try_acquire_owned().ok(), life)
        } else {
            let age = self.max_age.map(jittered);
            let life = ConnectionLifetime { age, idle: self.max_idle, grace: CLOSE_GRACE };
            (free.or_else(|| self.make_room()), life)
        };
        let Some(permit) = permit else {
            return metered.ends(ConnectionEnd::Refused(ConnectionRefusal::Limit));
        };
        let connection = Arc::new(ClientConnection::new(permit));
        if !self.behind.beyond {
            self.open.retain(|open| open.strong_count() > 0);
            self.open.push(Arc::downgrade(&connection));
        }
        let service = (self.behind.service)(&connection, self.behind.beyond && full);
        self.spawn((stream, address), service, (connection, metered), life);
    }

    /// Cuts the connection that was idle longest, or else the oldest connection, and returns its permit.
    fn make_room(&mut self) -> Option<OwnedSemaphorePermit> {
        let open: Vec<_> = self.open.iter().filter_map(Weak::upgrade).collect();
        let idle = open.iter().filter_map(|one| Some((one.idle_since()?, one)));
        let idlest = idle.min_by_key(|(since, _)| *since).map(|(_, one)| one);
        let ended = idlest.or(open.first())?;
        self.open.retain(|one| !std::ptr::eq(one.as_ptr(), Arc::as_ptr(ended)));
        ended.cut()
    }

    fn spawn<S: HttpService>(
        &mut self,
        (stream, address): (TcpStream, SocketAddr),
        service: S,
        (connection, mut metered): (Arc<ClientConnection>, MeteredConnection),
        ConnectionLifetime { age, idle, grace }: ConnectionLifetime,
    ) {
        let (builder, going) = (self.builder.clone(), self.going.clone());
        let (opener, all) = (self.opener.clone(), self.behind.connections.clone());
        self.connections.spawn(async move {
            let opened = tokio::select! {
                opened = opener.open(stream, address) => opened,
                () = connection.is_cut() => Err(ConnectionEnd::Closed(ConnectionClose::Cut)),
                () = going.cancelled() => Err(ConnectionEnd::Closed(ConnectionClose::Drain)),
            };
            let OpenConnection { opened, peer, removals, version } = match opened {
                Ok(open) => open,
                Err(end) => return metered.ends(end),
            };
            let _listed = all.list(&connection, (&peer, version), clock::now());
            let old = age.map(|age| (clock::now() + age, ConnectionClose::Age));
            let expired =
                certificate_end(&peer).map(|at| (at, ConnectionClose::CertificateExpired));
            let old = [old, expired].into_iter().flatten().min_by_key(|(at, _)| *at).unzip();
            let (old, why_old) = (clock::sleep_until(old.0), old.1.unwrap_or(ConnectionClose::Age));
            let service = TowerToHyperService::new(WithPeer { inner: service, peer });
            let (opened, cork) = corked(opened);
            let io = TokioIo::new(opened);
            let mut served = pin!(builder.serve_connection(io, service));
            let unused = async {
                match idle {
                    Some(idle) => connection.idle_for(idle).await,
                    None => std::future::pending().await,
                }
            };
            let mut stuck = pin!(async {
                tokio::select! {
                    () = connection.is_cut() => ConnectionClose::Cut,
                    () = connection.unwritten.stuck() => ConnectionClose::Unread,
                }
            });
            // The result is of no use here: the peer sees itself how the connection ended.
            let (how, closing) = tokio::select! {
                () = cork.drive(served.as_mut()) => (ConnectionClose::Peer, false),
                how = stuck.as_mut() => (how, false),
                () = old => (why_old, true),
                () = connection.is_ending() => (ConnectionClose::Refusals, true),
                () = unused => (ConnectionClose::Idle, true),
                () = authority_removed(removals) => (ConnectionClose::AuthorityRemoved, true),
                () = going.cancelled() => (ConnectionClose::Drain, true),
            };
            metered.ends(ConnectionEnd::Closed(how));
            if closing {
                connection.goes();
                served.as_mut().graceful_shutdown();
                tokio::select! {
                    () = cork.drive(served) => {}
                    _ = stuck => {}
                    () = sleep_until((clock::now() + grace).into()) => {}
                }
            }
            // The permit is free again even if calls on the connection still run.
            drop(connection.cut());
        });
    }

    async fn pause(&mut self, error: &io::Error) {
        if self.trouble.allow(clock::now()) {
            tracing::warn!(%error, "connections cannot be accepted");
        }
        sleep(ACCEPT_RETRY).await;
    }

    async fn close(mut self, idle: impl Future<Output = ()>, by: Instant) {
        self.going.cancel();
        let calls_over = AtomicBool::new(false);
        let said_farewell = async {
            idle.await;
            calls_over.store(true, Ordering::Relaxed);
            sleep(FAREWELL).await;
        };
        // The drain may have used up its time already. The farewell has its own time.
        let by = by.max(clock::now() + FAREWELL);
        tokio::select! {
            biased;
            () = async { while self.connections.join_next().await.is_some() {} } => {}
            () = said_farewell => {}
            () = sleep_until(by.into()) => {
                if !calls_over.load(Ordering::Relaxed) {
                    tracing::warn!("calls were still open at the end of the drain: they are cut off");
                }
            }
        }
        // The cut of a connection drops its calls, and they give back their messages.
        self.connections.shutdown().await;
        self.calls.close();
        self.calls.wait().await;
    }
}

/// An age within a tenth of `age`, so that connections made together do not end together.
fn jittered(age: Duration) -> Duration {
    let mut byte = [128; 1];
    // Without randomness every connection has the middle age.
    let _ = getrandom::fill(&mut byte);
    age.mul_f64(0.9 + 0.2 * f64::from(byte[0]) / 255.0)
}

/// The end of the client's certificate. `None`: the client showed none, or it ends too far away to matter.
fn certificate_end(peer: &Peer) -> Option<Instant> {
    let left = peer.certificate.as_ref()?.not_after.saturating_sub(clock::unix_time());
    clock::now().checked_add(left)
}

/// Waits until an authority of client certificates was removed, and for a part of [`REMOVAL_SPREAD`].
async fn authority_removed(removals: Option<watch::Receiver<u64>>) {
    if let Some(mut removals) = removals
        && removals.changed().await.is_ok()
    {
        let mut byte = [128; 1];
        // Without randomness all connections end after half of the time.
        let _ = getrandom::fill(&mut byte);
        return sleep(REMOVAL_SPREAD.mul_f64(f64::from(byte[0]) / 255.0)).await;
    }
    std::future::pending().await
}

/// Spawns each call of a connection on a tracker, which can be waited for.
#[derive(Clone)]
pub(super) struct Spawn(pub(super) TaskTracker);

impl<F> hyper::rt::Executor<F> for Spawn
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, call: F) {
        self.0.spawn(until_ended(call));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_differ_by_a_tenth_at_most() {
        let age = Duration::from_secs(600);
        let ages: Vec<Duration> = (0..100).map(|_| jittered(age)).collect();
        assert!(ages.iter().all(|age| (540..=660).contains(&age.as_secs())), "{ages:?}");
        assert!(ages.iter().any(|age| *age != ages[0]), "no jitter");
    }
}
