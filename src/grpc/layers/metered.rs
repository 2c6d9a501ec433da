//! Counts each call, from its headers to the end of its answer. It sees refused calls too.

use std::{
    future::Future,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Instant,
};

use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame, SizeHint};
use prost_reflect::DescriptorPool;
use tower::Service;

use crate::{
    clock,
    metrics::{Metrics, RpcMeter, RpcMeters, RpcMethod},
    net::{Middleware, Next},
    pb,
    reason::REASON_TRAILER,
};

/// The trailer with the code of a call, in digits.
const STATUS_TRAILER: &str = "grpc-status";
/// The code of a call whose client has left.
const CLIENT_LEFT: usize = 1;
/// The code of an answer that ends without a code.
const WITHOUT_CODE: usize = 2;
/// Reflection is served in two versions. Their descriptors are not in this program.
const REFLECTION: [&str; 2] =
    ["grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"];

/// The layer that counts calls.
#[derive(Debug, Clone)]
pub(in crate::grpc) struct MeterCalls(RpcMeters);

impl MeterCalls {
    /// The layer. All methods that are served have their series from now on.
    pub(in crate::grpc) fn new(metrics: &Metrics) -> Self {
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
        Self(metrics.rpcs(&served.chain(reflection).collect::<Vec<_>>()))
    }
}

impl<S, R, B> Middleware<Request<R>, S> for MeterCalls
where
    S: Service<Request<R>, Response = Response<B>, Future: Send> + Clone + Send + 'static,
    R: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<MeteredBody<B>>;
    type Error = S::Error;

    fn handle(
        &self,
        request: Request<R>,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<Self::Response, S::Error>> + Send + 'static {
        let mut call = MeteredCall::begin(self.0.of(request.uri().path()).clone());
        let answer = next.run(request);
        async move {
            let answer = answer.await?;
            // An answer without a body has its code here.
            call.see(answer.headers());
            Ok(answer.map(|inner| MeteredBody { inner, call: Some(call) }))
        }
    }
}

/// A call, until this is dropped. Without a code, its client has left.
#[derive(Debug)]
struct MeteredCall {
    meter: RpcMeter,
    begun_at: Instant,
    code: Option<usize>,
}

impl MeteredCall {
    fn begin(meter: RpcMeter) -> Self {
        meter.started();
        Self { meter, begun_at: clock::now(), code: None }
    }

    fn see(&mut self, headers: &HeaderMap) {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        if let Some(code) = text(STATUS_TRAILER) {
            self.code = Some(code.parse().unwrap_or(WITHOUT_CODE));
            text(REASON_TRAILER).iter().for_each(|reason| self.meter.refused(reason));
        }
    }
}

impl Drop for MeteredCall {
    fn drop(&mut self) {
        let took = clock::now().saturating_duration_since(self.begun_at);
        self.meter.handled(self.code.unwrap_or(CLIENT_LEFT), took);
    }
}

/// The body of an answer, which has the code of the call at its end.
pub(in crate::grpc) struct MeteredBody<B> {
    inner: B,
    call: Option<MeteredCall>,
}

impl<B: From<&'static str>> From<&'static str> for MeteredBody<B> {
    fn from(text: &'static str) -> Self {
        Self { inner: text.into(), call: None }
    }
}

impl<B: Body + Unpin> Body for MeteredBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        match &frame {
            Some(Ok(part)) => {
                if let (Some(trailers), Some(call)) = (part.trailers_ref(), &mut self.call) {
                    call.see(trailers);
                }
            }
            Some(Err(_)) | None => {
                if let Some(call) = &mut self.call {
                    call.code.get_or_insert(WITHOUT_CODE);
                }
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
