//! The request log: one line for a call, written when the call has ended. Owns the fields of the line, and which calls
//! have a line. A line never has a token, a credential or a payload.

use std::{
    hash::{BuildHasher as _, RandomState},
    net::SocketAddr,
    sync::Mutex,
    time::Instant,
};

use crate::{lock::lock, log_throttle::CountingThrottle, reason::Reason};

/// The calls that have a line.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum RequestLogScope {
    /// None.
    Off,
    /// Calls that fail, unless the reason is an everyday reason.
    #[default]
    Errors,
    /// Every call.
    All,
}

/// The work of a call, as far as its handler has told it. A field without a value is left out of the line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CallWork {
    /// The stream.
    pub stream: Option<String>,
    /// The consumer.
    pub consumer: Option<String>,
    /// The name that the worker gave.
    pub worker: Option<String>,
    /// Messages that a Fetch asked for.
    pub asked: Option<u32>,
    /// Messages in the answer.
    pub messages: Option<usize>,
    /// Messages that were rejected.
    pub rejected: Option<usize>,
    /// Tokens of the call.
    pub tokens: Option<usize>,
    /// Tokens that were refused.
    pub failed: Option<u32>,
}

/// A call that has ended.
#[derive(Debug, Clone, Copy)]
pub struct EndedCall<'c> {
    /// The name of the method.
    pub rpc: &'c str,
    /// The name of the status code.
    pub code: &'c str,
    /// The reason of a refusal, as on the wire.
    pub reason: Option<&'c str>,
    /// The message of a refusal.
    pub why: Option<&'c str>,
    /// The work of the call.
    pub work: &'c CallWork,
    /// The bytes of the answer.
    pub bytes: u64,
    /// From the headers of the request to the end of the answer.
    pub seconds: f64,
    /// The principal of the caller.
    pub principal: Option<&'c str>,
    /// The identity of the caller.
    pub identity: Option<&'c str>,
    /// The address that the call came from.
    pub peer: Option<SocketAddr>,
    /// The id that the client gave the call.
    pub request_id: Option<&'c str>,
    /// The trace of the call.
    pub trace_id: Option<&'c str>,
}

/// The writer of the lines.
#[derive(Debug)]
pub struct RequestLog {
    scope: RequestLogScope,
    digests: RandomState,
    throttle: Mutex<CountingThrottle>,
}

impl RequestLogScope {
    /// Whether a call that was refused for this reason has a line.
    pub fn has(self, reason: Option<&str>) -> bool {
        match self {
            Self::Off => false,
            Self::Errors => !reason.is_some_and(is_everyday),
            Self::All => true,
        }
    }
}

impl RequestLog {
    /// Writes the lines of this scope.
    pub fn new(scope: RequestLogScope) -> Self {
        Self { scope, digests: RandomState::new(), throttle: Mutex::default() }
    }

    /// The calls that have a line.
    pub fn scope(&self) -> RequestLogScope {
        self.scope
    }

    /// Writes the line of a call. Calls that fail have at most one line a second for each method, reason and principal,
    /// unless all calls have a line.
    pub fn write(&self, call: &EndedCall<'_>, now: Instant) {
        let repeated = if self.scope == RequestLogScope::All {
            Some(0)
        } else {
            let key = (call.rpc, call.code, call.reason, call.principal);
            lock(&self.throttle).line(self.digests.hash_one(key), now)
        };
        let Some(repeated) = repeated.map(|repeated| Some(repeated).filter(|count| *count > 0))
        else {
            return;
        };
        let work = call.work;
        tracing::info!(
            target: "request",
            target = "request",
            rpc = call.rpc,
            code = call.code,
            reason = call.reason,
            why = call.why,
            stream = work.stream,
            consumer = work.consumer,
            asked = work.asked,
            messages = work.messages,
            rejected = work.rejected,
            tokens = work.tokens,
            failed = work.failed,
            bytes = call.bytes,
            seconds = call.seconds,
            principal = call.principal,
            identity = call.identity,
            peer = call.peer.map(tracing::field::display),
            worker = work.worker,
            request_id = call.request_id,
            trace_id = call.trace_id,
            repeated,
            "request"
        );
    }
}

/// Whether working clients meet this reason every day. The metrics count it.
fn is_everyday(reason: &str) -> bool {
    let everyday = [
        Reason::LeaseExpired,
        Reason::LeaseBusy,
        Reason::RateLimit,
        Reason::LeaseLimit,
        Reason::WaiterLimit,
        Reason::CallLimit,
        Reason::ByteLimit,
        Reason::ConnectionLimit,
        Reason::Draining,
    ];
    everyday.iter().any(|known| known.name() == reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn call_has_a_line_by_its_reason_and_the_scope() {
        for (reason, has) in [
            (None, [false, true, true]),
            (Some("NOT_ALLOWED"), [false, true, true]),
            (Some("LEASE_EXPIRED"), [false, false, true]),
            (Some("DRAINING"), [false, false, true]),
        ] {
            let scopes = [RequestLogScope::Off, RequestLogScope::Errors, RequestLogScope::All];
            assert_eq!(scopes.map(|scope| scope.has(reason)), has, "{reason:?}");
        }
    }
}
