//! Spans around handlers.

mod support;

use std::sync::{Arc, Mutex};

use fetchproxy::{Headers, Nak, otel::OpenTelemetry};
use opentelemetry::{
    global,
    trace::{SpanKind, Status, TraceContextExt as _, TracerProvider as _},
};
use opentelemetry_sdk::{
    error::OTelSdkResult,
    propagation::TraceContextPropagator,
    trace::{SdkTracerProvider, SpanData, SpanExporter},
};
use support::{Events, MODES, SECOND, fake, worker};

#[derive(Clone, Debug, Default)]
struct Kept(Arc<Mutex<Vec<SpanData>>>);

impl SpanExporter for Kept {
    async fn export(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        self.0.lock().unwrap().extend(batch);
        Ok(())
    }
}

#[tokio::test]
async fn span_of_a_handler_has_the_parent_of_its_message() {
    global::set_text_map_propagator(TraceContextPropagator::new());
    for mode in MODES {
        let (fake, events, kept) = (fake(), Events::new(), Kept::default());
        let provider = SdkTracerProvider::builder().with_simple_exporter(kept.clone()).build();
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let headers = Headers::from([("Traceparent".to_owned(), vec![parent.to_owned()])]);
        fake.publish_bytes("{}", "tasks", headers);
        let one = worker(fake.client(), mode, &events, |message| async move {
            let context = opentelemetry::Context::current();
            assert!(context.span().span_context().is_valid(), "the span is active in the handler");
            if message.delivery_count == 1 { Err(Nak { delay: SECOND })? } else { Ok(()) }
        });
        fake.run(one.tracer(OpenTelemetry::new(provider.tracer("test")))).await.unwrap();
        let spans = kept.0.lock().unwrap();
        assert_eq!(spans.len(), 2);
        for span in &*spans {
            assert_eq!(
                (span.name.as_ref(), &span.span_kind),
                ("process TASKS", &SpanKind::Consumer)
            );
            assert_eq!(span.parent_span_id.to_string(), "b7ad6b7169203331");
            assert_eq!(
                span.span_context.trace_id().to_string(),
                "0af7651916cd43dd8448eb211c80319c"
            );
            let attribute = |name: &str| {
                let found = span.attributes.iter().find(|pair| pair.key.as_str() == name);
                found.map(|pair| pair.value.to_string()).unwrap_or_default()
            };
            assert_eq!(attribute("messaging.system"), "fetchproxy");
            assert_eq!(attribute("messaging.operation.type"), "process");
            assert_eq!(attribute("messaging.destination.name"), "TASKS");
            assert_eq!(attribute("messaging.consumer.group.name"), "workers");
            assert_eq!(attribute("messaging.message.id"), "1");
        }
        assert!(matches!(spans[0].status, Status::Error { .. }), "{:?}", spans[0].status);
        assert!(spans[0].events.events.is_empty(), "a Nak is no exception");
        assert_eq!(spans[1].status, Status::Unset);
    }
}
