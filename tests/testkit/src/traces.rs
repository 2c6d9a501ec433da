//! Receivers of traces: one that keeps the spans, and one that never answers.

use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::{ResourceSpans, Span, span::Link},
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{Request, Response, Status, transport::server::TcpIncoming};

use crate::eventually;

/// A receiver of OTLP over gRPC that keeps all spans.
pub struct TraceReceiver {
    pub url: String,
    kept: Kept,
    task: JoinHandle<()>,
}

#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Vec<TracedBy>>>);

/// A span, and what its process says of itself.
#[derive(Debug, Clone)]
pub struct TracedBy {
    pub span: Span,
    resource: Vec<KeyValue>,
}

impl TraceReceiver {
    pub async fn start() -> Self {
        Self::start_on("127.0.0.1:0").await
    }

    /// The same at an address that the process knows already.
    pub async fn start_on(address: &str) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let kept = Kept::default();
        let service = TraceServiceServer::new(kept.clone());
        let serving = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpIncoming::from(listener));
        let task = tokio::spawn(async move { serving.await.unwrap() });
        Self { url, kept, task }
    }

    /// The spans so far.
    pub fn spans(&self) -> Vec<TracedBy> {
        self.kept.0.lock().unwrap().clone()
    }

    /// The spans of this name, as soon as there are `count`.
    pub async fn named(&self, name: &str, count: usize) -> Vec<TracedBy> {
        eventually(&format!("{count} spans {name}"), || async {
            let mut spans = self.spans();
            spans.retain(|traced| traced.span.name == name);
            (spans.len() >= count).then_some(spans)
        })
        .await
    }
}

impl Drop for TraceReceiver {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[tonic::async_trait]
impl TraceService for Kept {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for ResourceSpans { resource, scope_spans, .. } in request.into_inner().resource_spans {
            let resource = resource.unwrap_or_default().attributes;
            let spans = scope_spans.into_iter().flat_map(|scope| scope.spans);
            let spans = spans.map(|span| TracedBy { span, resource: resource.clone() });
            self.0.lock().unwrap().extend(spans);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl TracedBy {
    /// The value of an attribute, as text.
    pub fn attribute(&self, name: &str) -> Option<String> {
        value(&self.span.attributes, name)
    }

    /// The value of an attribute of the process.
    pub fn process(&self, name: &str) -> Option<String> {
        value(&self.resource, name)
    }

    /// The names of all attributes, in order.
    pub fn attributes(&self) -> Vec<&str> {
        let mut names: Vec<_> = self.span.attributes.iter().map(|one| &*one.key).collect();
        names.sort_unstable();
        names
    }

    /// Whether this span is the parent of the other.
    pub fn is_parent_of(&self, other: &Self) -> bool {
        other.span.trace_id == self.span.trace_id && other.span.parent_span_id == self.span.span_id
    }

    /// Whether this span links to the other.
    pub fn links_to(&self, other: &Self) -> bool {
        self.span
            .links
            .iter()
            .any(|link| link.trace_id == other.span.trace_id && link.span_id == other.span.span_id)
    }
}

/// The value of an attribute of a link, as text.
pub fn link_attribute(link: &Link, name: &str) -> Option<String> {
    value(&link.attributes, name)
}

fn value(attributes: &[KeyValue], name: &str) -> Option<String> {
    let attribute = attributes.iter().find(|attribute| attribute.key == name)?;
    match attribute.value.clone() {
        Some(AnyValue { value: Some(Value::StringValue(text)) }) => Some(text),
        Some(AnyValue { value: Some(Value::IntValue(number)) }) => Some(number.to_string()),
        other => panic!("{name} has another type: {other:?}"),
    }
}

/// An address that accepts connections and never answers, for as long as the listener lives.
pub fn silent_receiver() -> (std::net::TcpListener, String) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    (listener, url)
}
