//! Traces: spans of calls, sent by OTLP over gRPC. Off unless a standard variable of OpenTelemetry names a
//! receiver. Then each call costs one branch.
//!
//! ```text
//!  grpc, cluster ─▶ span ─ ends ─▶ queue ─ thread of its own ─▶ exporter ─▶ the receiver
//! ```
//! Owns the libraries of OpenTelemetry: no other room names them. A span that is not sampled does not exist for
//! other rooms. A receiver that is slow or dead costs spans, and never a call: the queue is bounded, and a span
//! that finds no place is counted. The ids of spans come from the library, and never from a simulated machine.

mod attributes;
mod context;
mod exporter;
mod losses;
mod queue;
mod settings;
mod span;

use std::{fmt, sync::Arc, time::Duration};

use http::HeaderMap;
use opentelemetry::{InstrumentationScope, Key, KeyValue, trace::TracerProvider as _};
use opentelemetry_sdk::{
    Resource,
    trace::{SdkTracer, SdkTracerProvider},
};

pub use self::{
    context::SpanBytes,
    settings::{TraceSettings, TraceSettingsError},
    span::{TracedBatch, TracedMessage, TracedSpan},
};
use self::{losses::Losses, queue::BoundedQueue};

/// Most links of a span. Further links are counted by the library.
const MAX_LINKS: u32 = 64;

/// The tracer of this process. A clone is the same tracer. The default is off.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Tracing>>);

/// A tracer that is on.
struct Tracing {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
    losses: Arc<Losses>,
    /// Whether spans join the traces of callers and of messages.
    joins: bool,
}

impl fmt::Debug for Traces {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Traces").field(&self.is_on()).finish()
    }
}

impl Traces {
    /// Starts the thread of the exporter. `instance` names this process among its replicas.
    pub fn start(settings: TraceSettings, instance: &str) -> Self {
        let TraceSettings { exporter, joins, batches, queue, links } = settings;
        let losses = exporter.losses();
        let processor = BoundedQueue::new(exporter, batches, queue);
        let provider = SdkTracerProvider::builder()
            .with_span_processor(processor)
            .with_max_links_per_span(links.min(MAX_LINKS))
            .with_resource(resource(instance))
            .build();
        // The last one would wait for the receiver when it is dropped, also after a second signal.
        std::mem::forget(provider.clone());
        let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        let tracer = provider.tracer_with_scope(scope);
        Self(Some(Arc::new(Tracing { provider, tracer, losses, joins })))
    }

    /// Whether there may be spans.
    pub fn is_on(&self) -> bool {
        self.0.is_some()
    }

    /// The span of a call of `method`, which is `package.Service/Method`. `None`: no method that is served. Its
    /// parent is in the metadata.
    pub fn call(&self, method: Option<&str>, metadata: &HeaderMap) -> Option<TracedSpan> {
        TracedSpan::call(self.0.as_ref()?, method, metadata)
    }

    /// The span of a request to settle this many messages. The span of the replica that asks has these bytes.
    pub fn forwarded(&self, parent: &[u8], messages: usize) -> Option<TracedSpan> {
        TracedSpan::forwarded(self.0.as_ref()?, parent, messages)
    }

    /// The span of a hand-over of all leases.
    pub fn hand_over(&self) -> Option<TracedSpan> {
        TracedSpan::hand_over(self.0.as_ref()?)
    }

    /// How many spans were dropped since the start: the queue was full, or the receiver did not take them.
    pub fn dropped(&self) -> u64 {
        self.0.as_ref().map_or(0, |tracing| tracing.losses.dropped())
    }

    /// Sends the spans that are queued, for at most this time, and ends the exporter.
    pub async fn end(&self, within: Duration) {
        let Some(tracing) = self.0.clone() else { return };
        // It blocks, and the exporter must not be ended from a runtime.
        let provider = tracing.provider.clone();
        let ended = tokio::task::spawn_blocking(move || provider.shutdown_with_timeout(within));
        if !matches!(ended.await, Ok(Ok(()))) {
            let spans = tracing.losses.queued();
            tracing::warn!(spans, "drain timeout: spans were not sent");
        }
    }
}

/// The source of all spans. The variables of OpenTelemetry decide before us.
fn resource(instance: &str) -> Resource {
    let given = Resource::builder().build();
    let unset = |key: &'static str| given.get_ref(&Key::from_static_str(key)).is_none();
    let ours = [
        (attributes::SERVICE_VERSION, env!("CARGO_PKG_VERSION")),
        (attributes::SERVICE_INSTANCE_ID, instance),
    ];
    let ours = ours.into_iter().filter(|(key, _)| unset(key));
    let ours = ours.map(|(key, value)| KeyValue::new(key, value.to_owned()));
    let resource = Resource::builder().with_attributes(ours);
    // The library makes up a name if no variable has one.
    let name = given.get(&Key::from_static_str(attributes::SERVICE_NAME));
    let named = name.is_some_and(|name| !name.as_str().starts_with("unknown_service"));
    if named { resource } else { resource.with_service_name(env!("CARGO_PKG_NAME")) }.build()
}
