//! A call as audit lines show it. Reads the few headers that a line may have, and no other.

use std::sync::Arc;

use http::{Extensions, HeaderMap};

use crate::{
    api_error::ApiError,
    audit::{Audit, AuditedCall},
    net::Peer,
};

const REQUEST_ID: &str = "x-request-id";
/// Longest id of a request in a line, in bytes. A longer id is left out.
const MAX_REQUEST_ID_BYTES: usize = 64;
const TRACE_PARENT: &str = "traceparent";

/// The call of `method` with these headers and extensions.
pub(super) fn audited<'c>(
    audit: &'c Audit,
    method: &'static str,
    headers: &'c HeaderMap,
    extensions: &'c Extensions,
) -> AuditedCall<'c> {
    let peer = extensions.get::<Arc<Peer>>();
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
    AuditedCall {
        audit,
        method,
        peer: peer.map(|peer| peer.address),
        certificate: peer.and_then(|peer| Some(&*peer.certificate.as_ref()?.digest)),
        request_id: text(REQUEST_ID).filter(|id| is_request_id(id)),
        trace_id: text(TRACE_PARENT).and_then(trace_id),
    }
}

/// Writes the audit line of a call that was refused, if it has one.
pub(super) fn audit_refusal(call: &AuditedCall<'_>, refused: &ApiError) {
    if let ApiError::NotAllowed(denied) = refused {
        let consumer = denied.consumer.as_ref();
        call.denied(denied, consumer.map(|(stream, consumer)| (&**stream, &**consumer)));
    } else if let ApiError::Unauthenticated(why) = refused {
        call.unauthenticated(why);
    } else if let ApiError::AuthUnavailable(issuer) = refused {
        call.unchecked(issuer);
    }
}

fn is_request_id(text: &str) -> bool {
    (1..=MAX_REQUEST_ID_BYTES).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// The trace in a `traceparent` (W3C Trace Context, section 3.2.2): the second of four parts in hexadecimal
/// digits.
fn trace_id(parent: &str) -> Option<&str> {
    let mut parts = parent.split('-');
    let (version, trace) = (parts.next()?, parts.next()?);
    let is_hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
    (version.len() == 2 && trace.len() == 32 && is_hex(version) && is_hex(trace)).then_some(trace)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::AuditScope;

    #[test]
    fn line_has_the_ids_of_a_call_and_no_other_header() {
        let audit = Audit::new(AuditScope::Off);
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        let long = "x".repeat(65);
        for (id, parent, shown) in [
            ("a-1", &*format!("00-{trace}-00f067aa0ba902b7-01"), (Some("a-1"), Some(trace))),
            ("a b", "00-secret-00f067aa0ba902b7-01", (None, None)),
            (&long, "secret", (None, None)),
            ("", "", (None, None)),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(REQUEST_ID, id.parse().unwrap());
            headers.insert(TRACE_PARENT, parent.parse().unwrap());
            headers.insert("authorization", "Bearer secret".parse().unwrap());
            let extensions = Extensions::new();
            let call = audited(&audit, "Fetch", &headers, &extensions);
            assert_eq!((call.request_id, call.trace_id), shown, "{id} {parent}");
        }
    }
}
