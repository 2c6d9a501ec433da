//! The common part of all layers around a service: a middleware handles a request and may pass it on. Owns
//! the boilerplate of tower, and nothing else.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use futures_util::future::Either;
use tower::{Layer, Service, ServiceExt as _};

/// One layer of a service.
pub(crate) trait Middleware<R, S>: Clone + Send + 'static {
    /// The answer.
    type Response;
    /// An error of the service behind the layer.
    type Error: Send;

    /// Handles a request, in most cases by the service behind the layer.
    ///
    /// A call waits in each layer, so a layer passes its request on before it begins to wait, if it can. It borrows
    /// itself and the service behind it until then: copies of all layers for each call would cost more than their
    /// work.
    fn handle(
        &self,
        request: R,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<Self::Response, Self::Error>> + Send + 'static;
}

/// A service behind a layer: another layer, or the [`LastService`]. It is always ready, and its future has a place
/// inside the future of the layer, so that a call has one allocation for all its layers.
pub(crate) trait InnerService<R>: Clone + Send + 'static {
    /// The answer.
    type Response;
    /// An error of the last service.
    type Error: Send;

    /// Answers a request.
    fn serve(
        &mut self,
        request: R,
    ) -> impl Future<Output = Result<Self::Response, Self::Error>> + Send + 'static;
}

/// The service behind a layer, for one request.
pub(crate) struct Next<'s, S>(&'s mut S);

impl<S> Next<'_, S> {
    /// Passes a request on.
    ///
    /// # Errors
    /// Errors of the service.
    pub(crate) fn run<R>(
        self,
        request: R,
    ) -> impl Future<Output = Result<S::Response, S::Error>> + Send + 'static
    where
        S: InnerService<R>,
    {
        self.0.serve(request)
    }

    /// The service, for a layer that waits before it passes its request on.
    pub(crate) fn later(self) -> S
    where
        S: Clone,
    {
        self.0.clone()
    }
}

/// A middleware as a layer of tower.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MiddlewareLayer<M>(pub(crate) M);

impl<M: Clone, S> Layer<S> for MiddlewareLayer<M> {
    type Service = MiddlewareService<M, S>;

    fn layer(&self, inner: S) -> Self::Service {
        MiddlewareService { middleware: self.0.clone(), inner }
    }
}

/// A service behind a middleware.
#[derive(Debug, Clone)]
pub(crate) struct MiddlewareService<M, S> {
    middleware: M,
    inner: S,
}

impl<M, S, R> InnerService<R> for MiddlewareService<M, S>
where
    M: Middleware<R, S>,
    S: Clone + Send + 'static,
{
    type Response = M::Response;
    type Error = M::Error;

    fn serve(
        &mut self,
        request: R,
    ) -> impl Future<Output = Result<M::Response, M::Error>> + Send + 'static {
        self.middleware.handle(request, Next(&mut self.inner))
    }
}

impl<M, S, R> Service<R> for MiddlewareService<M, S>
where
    M: Middleware<R, S>,
    S: Clone + Send + 'static,
{
    type Response = M::Response;
    type Error = M::Error;
    type Future = Pin<Box<dyn Future<Output = Result<M::Response, M::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: R) -> Self::Future {
        Box::pin(self.serve(request))
    }
}

/// A service of tower behind all layers.
#[derive(Debug, Clone)]
pub(crate) struct LastService<S>(pub(crate) S);

impl<S, R> InnerService<R> for LastService<S>
where
    S: Service<R, Error: Send, Future: Send + 'static> + Clone + Send + 'static,
    R: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;

    fn serve(
        &mut self,
        request: R,
    ) -> impl Future<Output = Result<S::Response, S::Error>> + Send + 'static {
        match self.0.poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => Either::Left(self.0.call(request)),
            Poll::Ready(Err(_)) | Poll::Pending => {
                Either::Right(Box::pin(self.0.clone().oneshot(request)))
            }
        }
    }
}
