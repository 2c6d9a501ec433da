//! Counts the calls of our service that are under way, and refuses those beyond the cap before
//! their request is read. Health and reflection are never counted, and never refused.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use http::{Request, Response};
use tokio::sync::Semaphore;
use tower::Service;

use super::{
    SERVICE,
    answer::{Body, Freight},
    status::Refused,
};
use crate::lessor::Error;

/// How many calls may be under way, and how many are.
#[derive(Debug, Clone)]
pub(super) struct Calls {
    places: Arc<Semaphore>,
    most: u32,
    /// Somebody waits for the last call.
    closing: Arc<AtomicBool>,
    /// What a call beyond the cap is told.
    refusal: Refused,
}

impl Calls {
    pub(super) fn new(most: usize) -> Self {
        let most = u32::try_from(most.min(Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        let refusal = Refused::CallLimit(most);
        let places = Arc::new(Semaphore::new(most as usize));
        Self { places, most, closing: Arc::default(), refusal }
    }

    /// Takes none, for connections beyond their cap.
    pub(super) fn none(max_connections: usize) -> Self {
        let refusal = Refused::ConnectionLimit(max_connections);
        Self { places: Arc::new(Semaphore::new(0)), most: 0, closing: Arc::default(), refusal }
    }

    /// Waits until no call is under way. Only comes true for good when no new ones are let in.
    pub(super) async fn idle(&self) {
        self.closing.store(true, Ordering::Relaxed);
        // Never closed: an error cannot happen, and would mean that nobody is there.
        drop(self.places.acquire_many(self.most).await);
    }

    /// Places are kept for whoever waits for the last call, so that this is no matter of the cap.
    fn refusal(&self) -> Refused {
        match self.closing.load(Ordering::Relaxed) {
            true => Error::Draining.into(),
            false => self.refusal.clone(),
        }
    }

    /// `inner` behind this cap.
    pub(super) fn before<S>(&self, inner: S) -> Counted<S> {
        Counted { calls: self.clone(), inner }
    }
}

/// A service behind a cap; see the module.
#[derive(Clone)]
pub(super) struct Counted<S> {
    calls: Calls,
    inner: S,
}

impl<S, B> Service<Request<B>> for Counted<S>
where
    S: Service<Request<B>, Response = Response<tonic::body::Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        if !is_ours(request.uri().path()) {
            let answer = self.inner.call(request);
            return Box::pin(
                async move { Ok(answer.await?.map(|body| Body::new(body, None, None))) },
            );
        }
        let Ok(place) = self.calls.places.clone().try_acquire_owned() else {
            let refusal = self.calls.refusal().status().into_http();
            return Box::pin(async move { Ok(refusal.map(|body| Body::new(body, None, None))) });
        };
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut answer = answer.await?;
            let freight = answer.extensions_mut().remove::<Freight>();
            Ok(answer.map(|body| Body::new(body, freight, Some(place))))
        })
    }
}

/// Whether a path is one of our service: `/fetchproxy.v1.FetchService/…`.
pub(super) fn is_ours(path: &str) -> bool {
    path.strip_prefix('/').is_some_and(|path| path.starts_with(SERVICE))
}
