//! One open connection, shared by its listener and the layers behind it. Knows when the connection was last
//! used and which of its answers are unwritten, and can cut it. Decides nothing.

use std::{
    future::Future,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::FutureExt as _;
use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;

use super::{
    middleware::{InnerService, Middleware, Next},
    unwritten::Unwritten,
};
use crate::{clock, lock::lock};

/// An open connection.
#[derive(Debug)]
pub(crate) struct ClientConnection {
    /// Its answers that are not written yet.
    pub(crate) unwritten: Arc<Unwritten>,
    open_calls: AtomicUsize,
    /// The calls that were opened so far.
    calls: AtomicU64,
    /// The identity of the first call that was accepted, for operators.
    identity: OnceLock<Arc<str>>,
    used_at: Mutex<Instant>,
    /// Its permit to be open. A connection that replaces this one takes the permit.
    permit: Mutex<Option<OwnedSemaphorePermit>>,
    /// No more calls are wanted on it.
    ending: CancellationToken,
    cut: CancellationToken,
    /// It is old, or its time is over for another reason: its streams are to end.
    going: CancellationToken,
}

/// A call of a connection, open until this is dropped.
#[derive(Debug)]
pub(crate) struct OpenCall(Arc<ClientConnection>);

impl ClientConnection {
    pub(crate) fn new(permit: OwnedSemaphorePermit) -> Self {
        Self {
            unwritten: Arc::default(),
            open_calls: AtomicUsize::new(0),
            calls: AtomicU64::new(0),
            identity: OnceLock::new(),
            used_at: Mutex::new(clock::now()),
            permit: Mutex::new(Some(permit)),
            ending: CancellationToken::new(),
            cut: CancellationToken::new(),
            going: CancellationToken::new(),
        }
    }

    /// Opens one more call.
    pub(crate) fn open_call(self: &Arc<Self>) -> OpenCall {
        self.open_calls.fetch_add(1, Ordering::Relaxed);
        self.calls.fetch_add(1, Ordering::Relaxed);
        OpenCall(self.clone())
    }

    /// A call of this identity was accepted. The first identity is kept.
    pub(crate) fn identified(&self, identity: &str) {
        if self.identity.get().is_none() {
            let _ = self.identity.set(identity.into());
        }
    }

    /// The first identity, the calls that are open now, and the calls so far.
    pub(super) fn used(&self) -> (Option<Arc<str>>, usize, u64) {
        let open = self.open_calls.load(Ordering::Relaxed);
        (self.identity.get().cloned(), open, self.calls.load(Ordering::Relaxed))
    }

    /// The time since which it has no call; `None` while it has one.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let used_at = *lock(&self.used_at);
        (self.open_calls.load(Ordering::Relaxed) == 0).then_some(used_at)
    }

    /// Waits until it has had no call for `most`.
    pub(crate) async fn idle_for(&self, most: Duration) {
        loop {
            let now = clock::now();
            match self.idle_since() {
                Some(since) if since + most <= now => return,
                Some(since) => clock::sleep_until(Some(since + most)).await,
                None => tokio::time::sleep(most).await,
            }
        }
    }

    /// Asks the client to end it. Its open calls may end.
    pub(crate) fn end(&self) {
        self.ending.cancel();
    }

    /// Waits until the client is to be asked to end it.
    pub(crate) async fn is_ending(&self) {
        self.ending.cancelled().await;
    }

    /// Its client is told to end it. Streams that would last for ever are to end.
    pub(crate) fn goes(&self) {
        self.going.cancel();
    }

    /// Waits until its streams are to end.
    pub(crate) async fn is_going(&self) {
        self.going.cancelled().await;
    }

    /// Ends it at once. Returns its permit for the next connection; `None` if it has ended before.
    pub(crate) fn cut(&self) -> Option<OwnedSemaphorePermit> {
        self.cut.cancel();
        lock(&self.permit).take()
    }

    /// Waits until it is to end at once.
    pub(crate) async fn is_cut(&self) {
        self.cut.cancelled().await;
    }
}

/// A layer whose calls count as use of their connection until they are answered.
#[derive(Debug, Clone)]
pub(crate) struct CountOpenCalls(Arc<ClientConnection>);

impl CountOpenCalls {
    pub(crate) fn new(connection: &Arc<ClientConnection>) -> Self {
        Self(connection.clone())
    }
}

impl<S, R> Middleware<R, S> for CountOpenCalls
where
    S: InnerService<R>,
    R: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;

    fn handle(
        &self,
        request: R,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<S::Response, S::Error>> + Send + 'static {
        let open = self.0.open_call();
        next.run(request).inspect(move |_| drop(open))
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        *lock(&self.0.used_at) = clock::now();
        self.0.open_calls.fetch_sub(1, Ordering::Relaxed);
    }
}
