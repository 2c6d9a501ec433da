//! The edge of the server: accepts connections, bounds them in number, age and patience, and takes
//! them down. Owns every connection and the tasks on it; knows nothing of what is called.
//!
//! ```text
//!  accept ─▶ preface within 5 s ─▶ calls ──── age, or the stop ───▶ GOAWAY ─▶ open calls end ─▶ closed
//!              └ silent: closed         └ no answer to a ping: closed   └ by a deadline: cut
//! ```
//! tonic's own server is not used: it waits without end for an idle connection, and its own
//! deadline for calls answers CANCELLED in place of a reason.

use std::{
    convert::Infallible,
    future::Future,
    io,
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
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, sleep_until, timeout},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tower::Service;

use super::{
    connection::ClientConnection,
    preface::{self, Foreign},
    unwritten::until_ended,
};
use crate::{clock, log_throttle::LogThrottle};

/// A peer has this long to send its HTTP/2 preface, or the first line of an HTTP/1 request.
const PREFACE: Duration = Duration::from_secs(5);
/// What a peer may send on one stream, and on all of a connection, before it is read, in bytes. Requests
/// are read at once, so little is enough; each connection may hold that much.
const STREAM_WINDOW: u32 = 64 * 1024;
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// Headers of one request, in bytes.
const LARGEST_HEADERS: u32 = 16 * 1024;
/// A peer that does not answer a ping within the timeout is gone, and its waiters with it.
const KEEPALIVE: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// Calls that are open when a connection is told to go may go on for this long: a little more than
/// the longest Fetch.
const CLOSE_GRACE: Duration = Duration::from_secs(330);
/// A connection beyond the cap lives this long: enough to be told so and to ask for health. Whatever
/// is open on it then ends with its farewell.
const TURNED_AWAY: Duration = Duration::from_secs(4);
/// Connections that have nothing more to do have this long to take their leave.
const FAREWELL: Duration = Duration::from_secs(1);
/// After a failed accept, which is for want of descriptors or memory.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// How much one listener takes on.
#[derive(Debug, Clone)]
pub struct ListenerLimits {
    /// Connections open at once.
    pub max_connections: usize,
    /// A connection is told to go at this age, give or take a tenth, so that clients spread anew
    /// over the replicas. `None`: never.
    pub max_age: Option<Duration>,
    /// A connection without a call for so long is told to go. `None`: never.
    pub max_idle: Option<Duration>,
    /// Calls that one connection may have open.
    pub max_streams: u32,
    /// HTTP/1.1 is spoken as well.
    pub http1: bool,
}

/// What is behind a listener.
pub(super) struct Services<M> {
    /// What the listener is called in the log.
    pub(super) listener: &'static str,
    /// Makes the service of one connection. Told whether the connection is beyond the cap.
    pub(super) service: M,
    /// Those beyond the cap are answered, as long as they are few. Else the connection that was idle
    /// longest makes room for a new one.
    pub(super) beyond: bool,
}

/// Serves until `stop` says by when to be gone; then accepts no more, tells every connection to go,
/// and returns when all are closed: after `idle` and a moment more, or at that time, at the latest.
pub(super) async fn serve<M, S, B>(
    listener: TcpListener,
    limits: ListenerLimits,
    behind: Services<M>,
    stop: impl Future<Output = Instant>,
    idle: impl Future<Output = ()>,
) where
    M: Fn(&Arc<ClientConnection>, bool) -> S,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    S: Clone + Send + 'static,
    S::Future: Send + 'static,
    B: http_body::Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut edge = Listener::new(&limits, behind);
    let mut stop = pin!(stop);
    let by = loop {
        tokio::select! {
            by = stop.as_mut() => break by,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => edge.admit(stream),
                Err(error) => edge.pause(&error).await,
            },
            Some(_) = edge.connections.join_next() => {}
        }
    };
    drop(listener);
    edge.close(idle, by).await;
}

/// When a connection is told to go, and how long its open calls may go on then.
struct ConnectionLifetime {
    age: Option<Duration>,
    idle: Option<Duration>,
    grace: Duration,
}

struct Listener<M> {
    behind: Services<M>,
    builder: Arc<auto::Builder<Spawn>>,
    connections: JoinSet<()>,
    /// Those within the cap, where they may have to make room.
    open: Vec<Weak<ClientConnection>>,
    calls: TaskTracker,
    places: Arc<Semaphore>,
    places_beyond: Arc<Semaphore>,
    max_age: Option<Duration>,
    max_idle: Option<Duration>,
    going: CancellationToken,
    /// A full house is worth a line in the log, but not for each who does not get in.
    trouble: LogThrottle,
    /// The same of those who speak something else.
    foreign: Arc<LogThrottle>,
    http1: bool,
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
        Self {
            behind,
            builder: Arc::new(builder),
            connections: JoinSet::new(),
            open: Vec::new(),
            calls,
            places: Arc::new(Semaphore::new(most)),
            places_beyond: Arc::new(Semaphore::new(turned_away(most))),
            max_age: limits.max_age,
            max_idle: limits.max_idle,
            going: CancellationToken::new(),
            trouble: LogThrottle::default(),
            foreign: Arc::default(),
            http1: limits.http1,
        }
    }

    fn admit<S, B>(&mut self, stream: TcpStream)
    where
        M: Fn(&Arc<ClientConnection>, bool) -> S,
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        S: Clone + Send + 'static,
        S::Future: Send + 'static,
        B: http_body::Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let free = self.places.clone().try_acquire_owned().ok();
        let full = free.is_none();
        if full && self.trouble.allow(clock::now()) {
            let listener = self.behind.listener;
            tracing::warn!(listener, "all connections are taken: new ones are turned away");
        }
        let (place, life) = if self.behind.beyond && full {
            let life = ConnectionLifetime { age: Some(TURNED_AWAY), idle: None, grace: FAREWELL };
            (self.places_beyond.clone().try_acquire_owned().ok(), life)
        } else {
            let age = self.max_age.map(jittered);
            let life = ConnectionLifetime { age, idle: self.max_idle, grace: CLOSE_GRACE };
            (free.or_else(|| self.make_room()), life)
        };
        let Some(place) = place else { return };
        let connection = Arc::new(ClientConnection::new(place));
        if !self.behind.beyond {
            self.open.retain(|open| open.strong_count() > 0);
            self.open.push(Arc::downgrade(&connection));
        }
        let service = (self.behind.service)(&connection, self.behind.beyond && full);
        self.spawn(stream, service, connection, life);
    }

    /// Ends the connection that was without a call longest, or else the one that is open longest, and
    /// takes its place.
    fn make_room(&mut self) -> Option<OwnedSemaphorePermit> {
        let open: Vec<_> = self.open.iter().filter_map(Weak::upgrade).collect();
        let idle = open.iter().filter_map(|one| Some((one.idle_since()?, one)));
        let idlest = idle.min_by_key(|(since, _)| *since).map(|(_, one)| one);
        let ended = idlest.or(open.first())?;
        self.open.retain(|one| !std::ptr::eq(one.as_ptr(), Arc::as_ptr(ended)));
        ended.cut()
    }

    fn spawn<S, B>(
        &mut self,
        stream: TcpStream,
        service: S,
        connection: Arc<ClientConnection>,
        ConnectionLifetime { age, idle, grace }: ConnectionLifetime,
    ) where
        S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        S: Clone + Send + 'static,
        S::Future: Send + 'static,
        B: http_body::Body + Send + 'static,
        B::Data: Send,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let (builder, going) = (self.builder.clone(), self.going.clone());
        let (listener, http1) = (self.behind.listener, self.http1);
        let trouble = self.foreign.clone();
        self.connections.spawn(async move {
            // A socket that cannot be told so is as good as any other, only slower.
            let _ = stream.set_nodelay(true);
            let opened = tokio::select! {
                opened = timeout(PREFACE, preface::read(stream)) => opened,
                () = connection.is_cut() => return,
                () = going.cancelled() => return,
            };
            let Ok(Ok(opened)) = opened else { return };
            let foreign = opened.foreign().filter(|foreign| !(http1 && *foreign == Foreign::Http1));
            if let Some(foreign) = foreign {
                if trouble.allow(clock::now()) {
                    tracing::info!(
                        listener,
                        spoken = foreign.name(),
                        "a client speaks another protocol"
                    );
                }
                let _ = timeout(FAREWELL, opened.turn_away(foreign)).await;
                return;
            }
            let io = TokioIo::new(opened);
            let mut served = pin!(builder.serve_connection(io, TowerToHyperService::new(service)));
            let old = clock::sleep_until(age.map(|age| clock::now() + age));
            let unused = async {
                match idle {
                    Some(idle) => connection.idle_for(idle).await,
                    None => std::future::pending().await,
                }
            };
            let mut stuck = pin!(async {
                tokio::select! {
                    () = connection.is_cut() => {}
                    () = connection.unwritten.stuck() => {}
                }
            });
            // How a connection ended is the peer's affair: it is told by what it sees.
            let told = tokio::select! {
                _ = served.as_mut() => false,
                () = stuck.as_mut() => false,
                () = old => true,
                () = unused => true,
                () = going.cancelled() => true,
            };
            if told {
                served.as_mut().graceful_shutdown();
                tokio::select! {
                    _ = served => {}
                    () = stuck => {}
                    () = sleep_until((clock::now() + grace).into()) => {}
                }
            }
            // Also where calls on it have not ended yet.
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
        // The drain may have used up its time before; a farewell is left in any case.
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
        // Connections that are cut end their calls, which give back what they had.
        self.connections.shutdown().await;
        self.calls.close();
        self.calls.wait().await;
    }
}

/// How many connections beyond `most` are open at once, to be told so.
pub fn turned_away(most: usize) -> usize {
    most / 8 + 8
}

/// Within a tenth of `age`, so that connections made together do not end together.
fn jittered(age: Duration) -> Duration {
    let mut byte = [128; 1];
    // Without randomness all get the middle.
    let _ = getrandom::fill(&mut byte);
    age.mul_f64(0.9 + 0.2 * f64::from(byte[0]) / 255.0)
}

/// Runs each call of a connection where it can be waited for.
#[derive(Clone)]
struct Spawn(TaskTracker);

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
