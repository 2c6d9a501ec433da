//! Ends a connection on which nobody is accepted: a caller that guesses, or a client without a good credential
//! that repeats its call, begins again with a new connection.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use http::{Request, Response};
use tower::Service;

use crate::{
    grpc::method::CallKind,
    net::{ClientConnection, Middleware, Next},
    reason::{REASON_TRAILER, Reason},
};

/// Refused credentials in a row, until the connection is asked to end.
const REFUSED_IN_A_ROW: u32 = 20;

/// A layer that counts the refused credentials of one connection; see the [module](self).
#[derive(Debug, Clone)]
pub(in crate::grpc) struct StrangerLimit {
    connection: Arc<ClientConnection>,
    refused: Arc<AtomicU32>,
}

impl StrangerLimit {
    pub(in crate::grpc) fn new(connection: &Arc<ClientConnection>) -> Self {
        Self { connection: connection.clone(), refused: Arc::default() }
    }

    fn count<B>(&self, answer: &Response<B>) {
        let reason = answer.headers().get(REASON_TRAILER);
        if reason.is_none_or(|reason| reason != Reason::Unauthenticated.name()) {
            self.refused.store(0, Ordering::Relaxed);
        } else if self.refused.fetch_add(1, Ordering::Relaxed) + 1 >= REFUSED_IN_A_ROW {
            self.connection.end();
        }
    }
}

impl<S, R, B> Middleware<Request<R>, S> for StrangerLimit
where
    S: Service<Request<R>, Response = Response<B>, Future: Send> + Send + 'static,
    S::Error: Send,
    R: Send + 'static,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;

    async fn handle(self, request: Request<R>, next: Next<S>) -> Result<S::Response, S::Error> {
        let kind = CallKind::of(request.uri().path());
        let answer = next.run(request).await?;
        if kind.is_ours() {
            self.count(&answer);
        }
        Ok(answer)
    }
}
