//! Makes the record of each call, and ends it with the answer. It sees refused calls too.
//!
//! Calls of our services have a span if there are traces. Health and reflection have none: probes would be most of the
//! spans.

use std::{
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Buf;
use futures_util::TryFutureExt as _;
use http::{Request, Response};
use http_body::{Body, Frame, SizeHint};
use prost_reflect::DescriptorPool;

use crate::{
    grpc::{
        call::{Call, CallEnd, CallRecorder},
        method::CallKind,
    },
    metrics::{Metrics, RpcMethod},
    net::{InnerService, Middleware, Next, Peer},
    pb,
    request_log::RequestLog,
    traces::{TracedSpan, Traces},
};

/// Longest name of a host in DNS, in bytes. Anybody can send a longer one.
const MAX_HOST_BYTES: usize = 253;
/// Reflection is served in two versions. Their descriptors are not in this program.
const REFLECTION: [&str; 2] =
    ["grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"];

/// The layer that records calls; see the [module](self).
#[derive(Debug, Clone)]
pub(in crate::grpc) struct RecordCalls(Arc<CallRecorder>);

impl RecordCalls {
    /// The layer. All methods that are served have their series from now on.
    pub(in crate::grpc) fn new(metrics: &Metrics, traces: Traces, log: RequestLog) -> Self {
        let sets = [pb::FILE_DESCRIPTOR_SET, tonic_health::pb::FILE_DESCRIPTOR_SET];
        // Both were made by the build of this program, and a test looks for their methods.
        let pools = sets.into_iter().filter_map(|set| DescriptorPool::decode(set).ok());
        let services: Vec<_> = pools.flat_map(|pool| pool.services().collect::<Vec<_>>()).collect();
        let methods: Vec<_> = services.iter().flat_map(|service| service.methods()).collect();
        let served = methods.iter().map(|method| RpcMethod {
            service: method.parent_service().full_name(),
            method: method.name(),
            streams: (method.is_client_streaming(), method.is_server_streaming()),
        });
        let method = "ServerReflectionInfo";
        let reflection =
            REFLECTION.map(|service| RpcMethod { service, method, streams: (true, true) });
        let meters = metrics.rpcs(&served.chain(reflection).collect::<Vec<_>>());
        Self(Arc::new(CallRecorder { meters, traces, log }))
    }

    fn begin<R>(&self, request: &Request<R>) -> CallEnd {
        let path = request.uri().path();
        let kind = CallKind::of(path);
        let span = self.span(kind, request);
        let call = Call::new(kind, request, span, self.0.log.scope());
        CallEnd::of(Arc::new(call), path, self.0.clone())
    }

    fn span<R>(&self, kind: CallKind, request: &Request<R>) -> Option<TracedSpan> {
        if !self.0.traces.is_on() || !kind.is_ours() {
            return None;
        }
        let path = request.uri().path();
        let method = CallKind::is_known(path).then(|| path.trim_start_matches('/'));
        let span = self.0.traces.call(method, request.headers())?;
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

impl<S, R, B> Middleware<Request<R>, S> for RecordCalls
where
    S: InnerService<Request<R>, Response = Response<B>>,
    R: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<RecordedBody<B>>;
    type Error = S::Error;

    fn handle(
        &self,
        mut request: Request<R>,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<Self::Response, S::Error>> + Send + 'static {
        let mut end = self.begin(&request);
        request.extensions_mut().insert(end.call().clone());
        next.run(request).map_ok(move |answer| {
            // An answer without a body has its code here.
            end.see(answer.headers());
            answer.map(|inner| RecordedBody { inner, end: Some(end) })
        })
    }
}

/// The body of an answer, which has the code of the call at its end.
pub(in crate::grpc) struct RecordedBody<B> {
    inner: B,
    end: Option<CallEnd>,
}

impl<B: From<&'static str>> From<&'static str> for RecordedBody<B> {
    fn from(text: &'static str) -> Self {
        Self { inner: text.into(), end: None }
    }
}

impl<B: Body + Unpin> Body for RecordedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        if let Some(end) = &mut self.end {
            match &frame {
                Some(Ok(part)) => {
                    part.data_ref().into_iter().for_each(|data| end.answered(data.remaining()));
                    part.trailers_ref().into_iter().for_each(|trailers| end.see(trailers));
                }
                Some(Err(_)) | None => end.answered_all(),
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}
