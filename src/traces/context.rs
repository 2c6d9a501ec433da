//! The contexts of spans that come from elsewhere: in the metadata of a call, in the headers of a message, and
//! as 25 bytes in a token or between replicas. A malformed context is ignored.

use http::HeaderMap;
use opentelemetry::{
    Context,
    propagation::{Extractor, TextMapPropagator as _},
    trace::{SpanContext, SpanId, TraceContextExt as _, TraceFlags, TraceId, TraceState},
};
use opentelemetry_sdk::propagation::TraceContextPropagator;

/// Longest `tracestate` that is read, in bytes: the least that everybody must pass on.
const MAX_TRACE_STATE_BYTES: usize = 512;
const STATE_HEADER: &str = "tracestate";
const PARENT_HEADER: &str = "traceparent";
/// Bytes of a `traceparent` of version 0. Later versions may be longer.
const LEAST_TRACE_PARENT_BYTES: usize = 55;

/// A span as 25 bytes: the id of its trace, 16; its own id, 8; its flags, 1.
pub type SpanBytes = [u8; 25];

/// The context that the metadata of a call name.
pub(super) fn of_metadata(metadata: &HeaderMap) -> Context {
    TraceContextPropagator::new().extract_with_context(&Context::new(), &Metadata(metadata))
}

/// The context that the headers of a message name. The names of headers may have any case: some libraries for
/// NATS change it.
pub(super) fn of_message(headers: &[(String, Vec<String>)]) -> Option<SpanContext> {
    let context = TraceContextPropagator::new()
        .extract_with_context(&Context::new(), &MessageHeaders(headers));
    let span = context.span().span_context().clone();
    span.is_valid().then_some(span)
}

pub(super) fn to_bytes(span: &SpanContext) -> SpanBytes {
    let mut bytes = [0; 25];
    bytes[..16].copy_from_slice(&span.trace_id().to_bytes());
    bytes[16..24].copy_from_slice(&span.span_id().to_bytes());
    bytes[24] = span.trace_flags().to_u8();
    bytes
}

pub(super) fn from_bytes(bytes: &[u8]) -> Option<SpanContext> {
    let (trace, rest) = bytes.split_first_chunk()?;
    let (span, rest) = rest.split_first_chunk()?;
    let [flags] = *rest else { return None };
    let (trace, span) = (TraceId::from_bytes(*trace), SpanId::from_bytes(*span));
    let flags = TraceFlags::new(flags) & TraceFlags::SAMPLED;
    let span = SpanContext::new(trace, span, flags, true, TraceState::default());
    span.is_valid().then_some(span)
}

struct Metadata<'m>(&'m HeaderMap);

impl Extractor for Metadata<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok().filter(|value| may_read(key, value))
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

struct MessageHeaders<'m>(&'m [(String, Vec<String>)]);

impl Extractor for MessageHeaders<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        let (_, values) = self.0.iter().find(|(name, _)| name.eq_ignore_ascii_case(key))?;
        values.first().map(String::as_str).filter(|value| may_read(key, value))
    }

    fn keys(&self) -> Vec<&str> {
        self.0.iter().map(|(name, _)| &**name).collect()
    }
}

/// Whether the library gets this value. It would read ids that are too short.
fn may_read(key: &str, value: &str) -> bool {
    match key {
        PARENT_HEADER => value.len() >= LEAST_TRACE_PARENT_BYTES,
        STATE_HEADER => value.len() <= MAX_TRACE_STATE_BYTES,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

    fn headers(parent: &str, state: &str) -> Vec<(String, Vec<String>)> {
        let header = |name: &str, value: &str| (name.to_owned(), vec![value.to_owned()]);
        vec![header("Traceparent", parent), header("tracestate", state)]
    }

    #[test]
    fn header_of_a_message_names_its_span_in_any_case() {
        let read = |parent: &str| of_message(&headers(parent, "vendor=1"));
        let span = read(&format!("00-{TRACE}-00f067aa0ba902b7-01")).unwrap();
        assert_eq!(span.trace_id().to_string(), TRACE);
        assert!(span.is_remote() && span.is_sampled());
        assert_eq!(span.trace_state().header(), "vendor=1");
        for malformed in ["", "00-1-2-01", &format!("00-{TRACE}-0000000000000000-01"), "secret"] {
            assert_eq!(read(malformed), None, "{malformed}");
        }
        assert_eq!(of_message(&[]), None);
    }

    #[test]
    fn state_of_a_trace_that_is_too_long_is_left_out() {
        let parent = format!("00-{TRACE}-00f067aa0ba902b7-01");
        for (length, kept) in [(251, true), (252, false)] {
            let state = format!("v={},w={}", "x".repeat(256), "y".repeat(length));
            assert_eq!(state.len() <= MAX_TRACE_STATE_BYTES, kept);
            let span = of_message(&headers(&parent, &state)).unwrap();
            assert_eq!(!span.trace_state().header().is_empty(), kept, "{} bytes", state.len());
        }
    }

    #[test]
    fn span_reads_back_from_its_bytes_and_other_bytes_are_ignored() {
        let span = of_message(&headers(&format!("00-{TRACE}-00f067aa0ba902b7-01"), "")).unwrap();
        let bytes = to_bytes(&span);
        assert_eq!(from_bytes(&bytes), Some(span));
        assert_eq!(from_bytes(&bytes[..24]), None);
        assert_eq!(from_bytes(&[&bytes[..], &[0]].concat()), None);
        assert_eq!(from_bytes(&[0; 25]), None, "no id is zero");
    }
}
