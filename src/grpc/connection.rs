//! One connection of a client, as the edge and the layers behind it share it: when it was last used,
//! which answers of it are unwritten, and how it is ended. Decides nothing.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio::sync::OwnedSemaphorePermit;
use tokio_util::sync::CancellationToken;
use tower::Service;

use super::unwritten::Unwritten;
use crate::clock;

/// A connection that is open.
#[derive(Debug)]
pub(super) struct ClientConnection {
    /// Its answers.
    pub(super) unwritten: Arc<Unwritten>,
    open_calls: AtomicUsize,
    used_at: Mutex<Instant>,
    /// Its place among all connections; whoever takes its place takes this.
    place: Mutex<Option<OwnedSemaphorePermit>>,
    cut: CancellationToken,
}

/// A call that is open until this is dropped.
#[derive(Debug)]
pub(super) struct OpenCall(Arc<ClientConnection>);

impl ClientConnection {
    pub(super) fn new(place: OwnedSemaphorePermit) -> Self {
        Self {
            unwritten: Arc::default(),
            open_calls: AtomicUsize::new(0),
            used_at: Mutex::new(clock::now()),
            place: Mutex::new(Some(place)),
            cut: CancellationToken::new(),
        }
    }

    /// One more call on it.
    pub(super) fn open_call(self: &Arc<Self>) -> OpenCall {
        self.open_calls.fetch_add(1, Ordering::Relaxed);
        OpenCall(self.clone())
    }

    /// Since when it is without a call; `None` where it has one.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let used_at = *self.used_at.lock().unwrap_or_else(PoisonError::into_inner);
        (self.open_calls.load(Ordering::Relaxed) == 0).then_some(used_at)
    }

    /// Waits until it was without a call for this long.
    pub(super) async fn idle_for(&self, most: Duration) {
        loop {
            let now = clock::now();
            match self.idle_since() {
                Some(since) if since + most <= now => return,
                Some(since) => clock::sleep_until(Some(since + most)).await,
                None => tokio::time::sleep(most).await,
            }
        }
    }

    /// Ends it at once. Its place is for whoever comes next; `None` where it has ended already.
    pub(super) fn cut(&self) -> Option<OwnedSemaphorePermit> {
        self.cut.cancel();
        self.place.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Waits until it is to end at once.
    pub(super) async fn is_cut(&self) {
        self.cut.cancelled().await;
    }
}

/// A service whose calls count as use of its connection, until they are answered.
#[derive(Debug, Clone)]
pub(super) struct Used<S> {
    connection: Arc<ClientConnection>,
    inner: S,
}

impl<S> Used<S> {
    pub(super) fn new(connection: &Arc<ClientConnection>, inner: S) -> Self {
        Self { connection: connection.clone(), inner }
    }
}

impl<S, R> Service<R> for Used<S>
where
    S: Service<R>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Self::Future {
        let open = self.connection.open_call();
        let answer = self.inner.call(request);
        Box::pin(async move {
            let answer = answer.await;
            drop(open);
            answer
        })
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        *self.0.used_at.lock().unwrap_or_else(PoisonError::into_inner) = clock::now();
        self.0.open_calls.fetch_sub(1, Ordering::Relaxed);
    }
}
