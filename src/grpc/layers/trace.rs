//! Makes a span of each call of our services, and leaves it in the extensions of the request if it is sampled.
//! Health and reflection have none: probes would be most of the spans.

use std::{future::Future, sync::Arc};

use http::{HeaderMap, Request, Response};
use tonic::{Code, Status};
use tower::Service;

use crate::{
    grpc::method::CallKind,
    net::{Middleware, Next, Peer},
    reason::REASON_TRAILER,
    traces::{TracedSpan, Traces},
};

/// Longest name of a host in DNS, in bytes. Anybody can send a longer one.
const MAX_HOST_BYTES: usize = 253;

/// A layer that traces calls; see the [module](self). A listener without traces is better without it.
#[derive(Debug, Clone)]
pub(in crate::grpc) struct CallTrace(pub(in crate::grpc) Traces);

/// Ends the span of a call. A call that is dropped was cancelled by its client.
struct CallEnd(Option<TracedSpan>);

impl<S, R, B> Middleware<Request<R>, S> for CallTrace
where
    S: Service<Request<R>, Response = Response<B>, Future: Send> + Clone + Send + 'static,
    R: Send + 'static,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;

    fn handle(
        &self,
        mut request: Request<R>,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<S::Response, S::Error>> + Send + 'static {
        let span = self.begin(&request);
        if let Some(span) = &span {
            request.extensions_mut().insert(span.clone());
        }
        let end = CallEnd(span);
        let answer = next.run(request);
        async move {
            let answer = answer.await?;
            end.answered(answer.headers());
            Ok(answer)
        }
    }
}

impl CallTrace {
    fn begin<R>(&self, request: &Request<R>) -> Option<TracedSpan> {
        let path = request.uri().path();
        if !CallKind::of(path).is_ours() {
            return None;
        }
        let method = CallKind::is_known(path).then(|| path.trim_start_matches('/'));
        let span = self.0.call(method, request.headers())?;
        if let Some(peer) = request.extensions().get::<Arc<Peer>>() {
            span.came_from(peer.address);
        }
        let called = request.uri().authority();
        if let Some(called) = called.filter(|called| called.host().len() <= MAX_HOST_BYTES) {
            span.called_at(called.host(), called.port_u16());
        }
        Some(span)
    }
}

impl CallEnd {
    fn answered(mut self, headers: &HeaderMap) {
        let Some(span) = self.0.take() else { return };
        // A call that failed has its status in the headers. A call that went well has it in the trailers.
        let code = Status::from_header_map(headers).map_or(Code::Ok, |status| status.code());
        let reason = headers.get(REASON_TRAILER).and_then(|reason| reason.to_str().ok());
        span.answered(code as i32, reason);
        span.end();
    }
}

impl Drop for CallEnd {
    fn drop(&mut self) {
        if let Some(span) = self.0.take() {
            span.answered(Code::Cancelled as i32, None);
            span.end();
        }
    }
}
