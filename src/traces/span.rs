//! One span that is sampled, and how each kind of span begins. Owns the names and the attributes of all kinds.

use std::{
    collections::BTreeSet,
    fmt,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, UNIX_EPOCH},
};

use http::HeaderMap;
use opentelemetry::{
    Context, KeyValue, Value,
    trace::{
        Link, Span as _, SpanBuilder, SpanContext, SpanKind, Status, TraceContextExt as _,
        Tracer as _,
    },
};

use super::{
    Tracing, attributes as name,
    context::{self, SpanBytes},
};

/// A span that is sampled. A clone is the same span. It ends with its last clone, unless it has ended before.
#[derive(Clone)]
pub struct TracedSpan {
    tracing: Arc<Tracing>,
    context: Context,
}

/// A batch of messages of one consumer.
#[derive(Debug, Clone, Copy)]
pub struct TracedBatch<'b> {
    /// The stream.
    pub stream: &'b str,
    /// The consumer.
    pub consumer: &'b str,
    /// How many messages.
    pub messages: usize,
}

/// A message that was fetched: it names the span that published it.
#[derive(Debug, Clone, Copy)]
pub struct TracedMessage<'m> {
    /// Its headers.
    pub headers: &'m [(String, Vec<String>)],
    /// Its sequence in the stream.
    pub stream_sequence: u64,
    /// The number of the attempt.
    pub delivery_count: u64,
}

impl fmt::Debug for TracedSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TracedSpan").field(self.context.span().span_context()).finish()
    }
}

impl TracedSpan {
    /// The span of a call of `method`, which is `package.Service/Method`. `None`: no method that is served.
    pub(super) fn call(
        tracing: &Arc<Tracing>,
        method: Option<&str>,
        metadata: &HeaderMap,
    ) -> Option<Self> {
        let parent = if tracing.joins { context::of_metadata(metadata) } else { Context::new() };
        // Few calls are sampled, so the name and the attributes come later.
        let span = Self::start(
            tracing,
            SpanBuilder::from_name(name::RPC_SYSTEM_GRPC).with_kind(SpanKind::Server),
            &parent,
        )?;
        if let Some(method) = method {
            span.context.span().update_name(method.to_owned());
        }
        span.set(name::RPC_SYSTEM_NAME, name::RPC_SYSTEM_GRPC);
        span.set(name::RPC_METHOD, method.unwrap_or(name::RPC_METHOD_OTHER).to_owned());
        Some(span)
    }

    /// The span of a request of another replica, whose span has these bytes.
    pub(super) fn forwarded(
        tracing: &Arc<Tracing>,
        parent: &[u8],
        messages: usize,
    ) -> Option<Self> {
        let parent = context::from_bytes(parent)?;
        let parent = Context::new().with_remote_span_context(parent);
        let builder = SpanBuilder::from_name("settle forwarded").with_kind(SpanKind::Server);
        let span = Self::start(tracing, builder, &parent)?;
        span.set(name::MESSAGING_BATCH_MESSAGE_COUNT, count(messages));
        Some(span)
    }

    /// The span of a hand-over of all leases.
    pub(super) fn hand_over(tracing: &Arc<Tracing>) -> Option<Self> {
        let builder = SpanBuilder::from_name("hand over").with_kind(SpanKind::Internal);
        Self::start(tracing, builder, &Context::new())
    }

    fn start(tracing: &Arc<Tracing>, builder: SpanBuilder, parent: &Context) -> Option<Self> {
        let span = tracing.tracer.build_with_context(builder, parent);
        span.is_recording()
            .then(|| Self { tracing: tracing.clone(), context: Context::new().with_span(span) })
    }

    fn child(&self, builder: SpanBuilder) -> Option<Self> {
        Self::start(&self.tracing, builder, &self.context)
    }

    /// The span of an answer with messages. It began with the wait for them, at `since` after the Unix epoch, and
    /// links to the spans that published them.
    pub fn receive<'m>(
        &self,
        batch: TracedBatch<'_>,
        since: Duration,
        messages: impl Iterator<Item = TracedMessage<'m>>,
    ) -> Option<Self> {
        let joins = self.tracing.joins;
        let links = messages.filter(|_| joins).filter_map(|message| {
            let published = context::of_message(message.headers)?;
            let attributes = vec![
                KeyValue::new(name::MESSAGING_MESSAGE_ID, message.stream_sequence.to_string()),
                KeyValue::new(name::MESSAGING_NATS_DELIVERY_COUNT, signed(message.delivery_count)),
            ];
            Some(Link::new(published, attributes, 0))
        });
        let span = self.child(
            SpanBuilder::from_name(format!("{} {}", name::MESSAGING_FETCH, batch.stream))
                .with_kind(SpanKind::Client)
                .with_start_time(UNIX_EPOCH + since)
                .with_links(links.collect()),
        )?;
        span.set_batch(batch, name::MESSAGING_RECEIVE, name::MESSAGING_FETCH);
        Some(span)
    }

    /// The span of settling these messages by `action`, such as `ack`. It links to the spans that fetched them.
    pub fn settle(
        &self,
        batch: TracedBatch<'_>,
        action: &'static str,
        fetched: &BTreeSet<SpanBytes>,
    ) -> Option<Self> {
        let links = fetched.iter().filter_map(|bytes| context::from_bytes(bytes));
        let span = self.child(
            SpanBuilder::from_name(format!("{action} {}", batch.stream))
                .with_kind(SpanKind::Client)
                .with_links(links.map(|fetched| Link::new(fetched, Vec::new(), 0)).collect()),
        )?;
        span.set_batch(batch, name::MESSAGING_SETTLE, action);
        Some(span)
    }

    /// The span of asking `replica` to settle.
    pub fn forward(&self, replica: &str, messages: usize) -> Option<Self> {
        let builder = SpanBuilder::from_name("settle forwarded").with_kind(SpanKind::Client);
        let span = self.child(builder)?;
        span.set(name::MESSAGING_BATCH_MESSAGE_COUNT, count(messages));
        span.set(name::REPLICA, replica.to_owned());
        Some(span)
    }

    /// This span for a token, or for another replica.
    pub fn to_bytes(&self) -> SpanBytes {
        context::to_bytes(&self.span_context())
    }

    /// The id of its trace, in hexadecimal digits.
    pub fn trace_id(&self) -> String {
        self.span_context().trace_id().to_string()
    }

    /// The address that the call came from.
    pub fn came_from(&self, peer: SocketAddr) {
        self.set(name::NETWORK_PEER_ADDRESS, peer.ip().to_string());
        self.set(name::NETWORK_PEER_PORT, i64::from(peer.port()));
    }

    /// The address that the client called.
    pub fn called_at(&self, host: &str, port: Option<u16>) {
        self.set(name::SERVER_ADDRESS, host.to_owned());
        if let Some(port) = port {
            self.set(name::SERVER_PORT, i64::from(port));
        }
    }

    /// The principal of the caller.
    pub fn by(&self, principal: &str) {
        if !principal.is_empty() {
            self.set(name::PRINCIPAL, principal.to_owned());
        }
    }

    /// The name of the caller's worker.
    pub fn for_worker(&self, worker: &str) {
        if !worker.is_empty() {
            self.set(name::MESSAGING_CLIENT_ID, worker.to_owned());
        }
    }

    /// The way that the settlements went.
    pub fn went(&self, route: &'static str) {
        self.set(name::ROUTE, route);
    }

    /// The reason why a Fetch has no messages.
    pub fn is_empty_by(&self, reason: &'static str) {
        self.set(name::EMPTY_FETCH_REASON, reason);
    }

    /// The status of the call, with its reason if it has one.
    pub fn answered(&self, code: i32, reason: Option<&str>) {
        let code_name = name::code_name(code);
        self.set(name::RPC_STATUS_CODE, code_name);
        if code != 0 {
            self.set(name::ERROR_TYPE, reason.unwrap_or(code_name).to_owned());
        }
        if name::is_server_error(code) {
            self.context.span().set_status(Status::error(""));
        }
    }

    /// A part of the call was refused, by this reason. The call itself was answered.
    pub fn refused_by(&self, reason: &'static str) {
        self.set(name::ERROR_TYPE, reason);
    }

    /// The work of the span has failed, by this reason.
    pub fn failed(&self, reason: &'static str) {
        self.set(name::ERROR_TYPE, reason);
        self.context.span().set_status(Status::error(""));
    }

    /// Ends the span now.
    pub fn end(&self) {
        self.context.span().end();
    }

    fn span_context(&self) -> SpanContext {
        self.context.span().span_context().clone()
    }

    fn set_batch(&self, batch: TracedBatch<'_>, kind: &'static str, operation: &'static str) {
        self.set(name::MESSAGING_SYSTEM, name::MESSAGING_SYSTEM_NATS);
        self.set(name::MESSAGING_OPERATION_TYPE, kind);
        self.set(name::MESSAGING_OPERATION_NAME, operation);
        self.set(name::MESSAGING_DESTINATION_NAME, batch.stream.to_owned());
        self.set(name::MESSAGING_CONSUMER_GROUP_NAME, batch.consumer.to_owned());
        self.set(name::MESSAGING_BATCH_MESSAGE_COUNT, count(batch.messages));
    }

    fn set(&self, name: &'static str, value: impl Into<Value>) {
        self.context.span().set_attribute(KeyValue::new(name, value));
    }
}

fn count(messages: usize) -> i64 {
    i64::try_from(messages).unwrap_or(i64::MAX)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
