//! Spans of OpenTelemetry around handlers. The only file that needs the crate `opentelemetry`.

use std::sync::Arc;

use opentelemetry::{
    Context, KeyValue, global,
    propagation::Extractor,
    trace::{FutureExt as _, SpanKind, Status, TraceContextExt as _},
};

use crate::{Envelope, Failure, Handling, Headers, Nak, Source, Term, Tracer};

/// Makes a span `process STREAM` around each handler, which is active in the handler. Its parent comes from the headers of
/// the message, by the propagator that is registered with `opentelemetry::global`.
pub struct OpenTelemetry<T>(Arc<T>);

impl<T> OpenTelemetry<T> {
    /// With the tracer that makes the spans.
    pub fn new(tracer: T) -> Self {
        Self(Arc::new(tracer))
    }
}

impl<T> Tracer for OpenTelemetry<T>
where
    T: opentelemetry::trace::Tracer + Send + Sync + 'static,
    T::Span: Send + Sync + 'static,
{
    fn trace(&self, message: &Envelope, source: &Source, handling: Handling) -> Handling {
        let names = Names(&message.headers);
        let parent = global::get_text_map_propagator(|propagator| propagator.extract(&names));
        let attributes = [
            KeyValue::new("messaging.system", "fetchproxy"),
            KeyValue::new("messaging.operation.type", "process"),
            KeyValue::new("messaging.destination.name", source.stream.clone()),
            KeyValue::new("messaging.consumer.group.name", source.consumer.clone()),
            KeyValue::new("messaging.message.id", message.stream_sequence.to_string()),
        ];
        let span = self.0.span_builder(format!("process {}", source.stream));
        let span = span.with_kind(SpanKind::Consumer).with_attributes(attributes);
        let span = self.0.build_with_context(span, &parent);
        let context = parent.with_span(span);
        Box::pin(async move {
            let result = handling.with_context(context.clone()).await;
            if let Err(failure) = &result {
                fail(&context, failure);
            }
            context.span().end();
            result
        })
    }
}

/// A Nak or a Term is no exception.
fn fail(context: &Context, failure: &Failure) {
    let span = context.span();
    let kind = if failure.meant::<Nak>().is_some() {
        "Nak"
    } else if failure.meant::<Term>().is_some() {
        "Term"
    } else {
        span.record_error(failure.error());
        "Error"
    };
    span.set_attribute(KeyValue::new("error.type", kind));
    span.set_status(Status::error(failure.to_string()));
}

/// The first value of each header, by a name in any case.
struct Names<'a>(&'a Headers);

impl Extractor for Names<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let found = self.0.iter().find(|(name, _)| name.eq_ignore_ascii_case(key));
        found.and_then(|(_, values)| values.first()).map(String::as_str)
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(String::as_str).collect()
    }
}
