//! The common part of all layers around a service: a middleware handles a request and may pass it on. Owns
//! the boilerplate of tower, and nothing else.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, Waker},
};

use futures_util::future::Either;
use tower::{Layer, Service, ServiceExt as _, util::Oneshot};

/// One layer of a service.
pub(crate) trait Middleware<R, S> {
    /// The answer.
    type Response;
    /// An error of the service behind the layer.
    type Error;

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

/// The service behind a layer.
pub(crate) struct Next<'s, S>(&'s mut S);

impl<'s, S: Clone> Next<'s, S> {
    /// The next service is this service.
    pub(crate) fn to(service: &'s mut S) -> Self {
        Self(service)
    }

    /// Passes a request on, as soon as the service is ready.
    ///
    /// # Errors
    /// Errors of the service.
    pub(crate) fn run<R>(self, request: R) -> Running<S, R>
    where
        S: Service<R>,
    {
        match self.0.poll_ready(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => Either::Left(self.0.call(request)),
            Poll::Ready(Err(_)) | Poll::Pending => {
                Either::Right(Box::pin(self.later().oneshot(request)))
            }
        }
    }

    /// The service, for a layer that waits before it passes its request on.
    pub(crate) fn later(self) -> S {
        self.0.clone()
    }
}

/// The call of a service that was ready, or a service that is waited for.
pub(crate) type Running<S, R> = Either<<S as Service<R>>::Future, Pin<Box<Oneshot<S, R>>>>;

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

impl<M, S, R> Service<R> for MiddlewareService<M, S>
where
    M: Middleware<R, S>,
    S: Clone,
{
    type Response = M::Response;
    type Error = M::Error;
    type Future = Pin<Box<dyn Future<Output = Result<M::Response, M::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), M::Error>> {
        // The middleware waits for the service behind it when it passes a request on.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: R) -> Self::Future {
        Box::pin(self.middleware.handle(request, Next::to(&mut self.inner)))
    }
}
