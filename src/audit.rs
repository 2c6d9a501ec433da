//! The audit lines: who was refused, who used a right over the tokens of others, and which policy counts. Owns
//! their fields, and which lines are written. A line never has a token, a credential or a payload, and of the
//! headers of a call it has the id of the request alone.

use std::{
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    sync::Mutex,
};

use http::{HeaderMap, HeaderName};

use crate::{
    access::{Denied, KnownCaller, Unauthenticated, Verb},
    clock,
    lock::lock,
    log_throttle::CountingThrottle,
};

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id of a request in a line, in bytes. A longer id is left out.
const MAX_REQUEST_ID_BYTES: usize = 64;
const TRACE_PARENT: HeaderName = HeaderName::from_static("traceparent");

/// The lines that are written. Each scope includes those before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AuditScope {
    /// None.
    Off,
    /// Changes by operators.
    Admin,
    /// Refusals of callers, and settlements of tokens of others.
    Denied,
    /// Every call that is allowed.
    All,
}

/// The writer of audit lines.
#[derive(Debug)]
pub struct Audit {
    scope: AuditScope,
    digests: RandomState,
    throttle: Mutex<CountingThrottle>,
}

/// A call, as audit lines show it.
#[derive(Debug, Clone, Copy)]
pub struct AuditedCall<'c> {
    /// The writer of the lines.
    pub audit: &'c Audit,
    /// The name of the method.
    pub method: &'static str,
    /// The address that the call came from.
    pub peer: Option<SocketAddr>,
    /// The digest of the client's certificate.
    pub certificate: Option<&'c str>,
    /// The headers of the call. A line may have two ids of them, and nothing else.
    pub headers: &'c HeaderMap,
}

/// A stream and a consumer.
type ConsumerNames<'n> = (&'n str, &'n str);

/// The fields of one line. A field without a value is left out.
#[derive(Default)]
struct AuditLine<'l> {
    event: &'static str,
    identity: Option<&'l str>,
    principal: Option<&'l str>,
    verb: Option<Verb>,
    consumer: Option<ConsumerNames<'l>>,
    why: Option<&'l str>,
    detail: Option<&'l str>,
    rule: Option<usize>,
    policy: Option<&'l str>,
    count: Option<u64>,
    repeated: Option<u64>,
}

impl<'l> AuditLine<'l> {
    fn of(event: &'static str, caller: &'l KnownCaller) -> Self {
        let identity = Some(caller.identity.as_str());
        Self { event, identity, principal: caller.principal.as_deref(), ..Self::default() }
    }

    fn write(&self, call: Option<&AuditedCall<'_>>) {
        tracing::info!(
            target: "audit",
            target = "audit",
            event = self.event,
            identity = self.identity,
            principal = self.principal,
            verb = self.verb.map(Verb::name),
            stream = self.consumer.map(|(stream, _)| stream),
            consumer = self.consumer.map(|(_, consumer)| consumer),
            why = self.why,
            detail = self.detail,
            rule = self.rule,
            policy = self.policy,
            peer = call.and_then(|call| call.peer).map(tracing::field::display),
            certificate = call.and_then(|call| call.certificate),
            method = call.map(|call| call.method),
            request_id = call.and_then(|call| request_id(call.headers)),
            trace_id = call.and_then(|call| trace_id(call.headers)),
            count = self.count,
            repeated = self.repeated,
            "audit"
        );
    }
}

impl Audit {
    /// Writes the lines of this scope.
    pub fn new(scope: AuditScope) -> Self {
        Self { scope, digests: RandomState::new(), throttle: Mutex::default() }
    }

    /// Whether every call that is allowed has a line.
    pub fn has_all(&self) -> bool {
        self.scope >= AuditScope::All
    }

    /// A policy counts from now on.
    pub fn policy_loaded(&self, digest: &str) {
        if self.scope >= AuditScope::Admin {
            let policy = Some(digest);
            AuditLine { event: "policy_loaded", policy, ..AuditLine::default() }.write(None);
        }
    }
}

impl AuditedCall<'_> {
    /// A call, or one token of a call, was refused. `consumer` is the consumer that it is about, also if the
    /// caller is not told.
    pub fn denied(&self, denied: &Denied, consumer: Option<ConsumerNames<'_>>) {
        let line = AuditLine {
            event: "denied",
            identity: Some(denied.identity.as_str()),
            principal: denied.principal.as_deref(),
            verb: Some(denied.verb),
            consumer,
            detail: denied.detail(),
            ..AuditLine::default()
        };
        self.write_seldom(line);
    }

    /// A replica refused the caller by what it knows of the lease: it belongs to another principal.
    pub fn foreign_lease(&self, caller: &KnownCaller, verb: Verb) {
        let (verb, detail) = (Some(verb), Some("foreign_token"));
        self.write_seldom(AuditLine { verb, detail, ..AuditLine::of("denied", caller) });
    }

    /// The credential of the call was refused.
    pub fn unauthenticated(&self, why: &Unauthenticated) {
        let why = Some(why.name());
        self.write_seldom(AuditLine { event: "unauthenticated", why, ..AuditLine::default() });
    }

    /// The credential of the call could not be checked: the keys of this issuer are not here.
    pub fn unchecked(&self, issuer: &str) {
        let (why, detail) = (Some("keys_away"), Some(issuer));
        self.write_seldom(AuditLine {
            event: "unauthenticated",
            why,
            detail,
            ..AuditLine::default()
        });
    }

    /// A token of the principal `owner` was settled by a caller of another principal.
    pub fn foreign_settle(
        &self,
        caller: &KnownCaller,
        verb: Verb,
        consumer: Option<ConsumerNames<'_>>,
        owner: &str,
    ) {
        let (verb, detail) = (Some(verb), Some(owner));
        let line = AuditLine::of("foreign_settle", caller);
        self.write_seldom(AuditLine { verb, consumer, detail, ..line });
    }

    /// An operator took `count` leases away. `filter` says which leases were meant.
    pub fn leases_released(&self, caller: &KnownCaller, filter: &str, count: u64) {
        if self.audit.scope >= AuditScope::Admin {
            let (verb, detail, count) = (Some(Verb::Admin), Some(filter), Some(count));
            let line = AuditLine::of("leases_released", caller);
            AuditLine { verb, detail, count, ..line }.write(Some(self));
        }
    }

    /// The rule in the line `rule` of the policy file allowed the call. Without a policy there is no rule.
    pub fn allowed(
        &self,
        caller: &KnownCaller,
        verb: Verb,
        consumer: Option<ConsumerNames<'_>>,
        rule: Option<usize>,
    ) {
        if self.audit.has_all() {
            let line = AuditLine::of("allowed", caller);
            AuditLine { verb: Some(verb), consumer, rule, ..line }.write(Some(self));
        }
    }

    /// Writes a line that strangers can cause as often as they like.
    fn write_seldom(&self, line: AuditLine<'_>) {
        if self.audit.scope < AuditScope::Denied {
            return;
        }
        // A client has another port on each connection.
        let host = self.peer.map(|peer| peer.ip()).filter(|_| line.principal.is_none());
        let key = (line.event, line.why, line.detail, line.principal, host);
        let key = self.audit.digests.hash_one(key);
        let repeated = lock(&self.audit.throttle).line(key, clock::now());
        if let Some(repeated) = repeated {
            let repeated = Some(repeated).filter(|repeated| *repeated > 0);
            AuditLine { repeated, ..line }.write(Some(self));
        }
    }
}

/// The id that a client gave its call, if a line may have it.
pub fn request_id(headers: &HeaderMap) -> Option<&str> {
    headers.get(REQUEST_ID)?.to_str().ok().filter(|id| is_request_id(id))
}

/// The trace that a call is a part of: the second of four parts of its `traceparent`, in hexadecimal digits (W3C Trace
/// Context, section 3.2.2).
pub fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let mut parts = headers.get(TRACE_PARENT)?.to_str().ok()?.split('-');
    let (version, trace) = (parts.next()?, parts.next()?);
    let is_hex = |part: &str| part.bytes().all(|byte| byte.is_ascii_hexdigit());
    (version.len() == 2 && trace.len() == 32 && is_hex(version) && is_hex(trace)).then_some(trace)
}

fn is_request_id(text: &str) -> bool {
    (1..=MAX_REQUEST_ID_BYTES).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_has_the_ids_of_a_call_and_no_other_header() {
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
            assert_eq!((request_id(&headers), trace_id(&headers)), shown, "{id} {parent}");
        }
    }
}
