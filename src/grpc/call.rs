//! The record of one call: all that its layers and its handler learn of it, in one place. At its end, the metrics, its
//! span and the request log read it. Decides nothing.

use std::{
    sync::{Arc, Mutex, OnceLock},
    time::Instant,
};

use http::{Extensions, HeaderMap, HeaderName, Request};
use tonic::{Code, Status};

use super::{answer_memory::AnswerBudget, method::CallKind};
use crate::{
    access::{KnownCaller, Rights},
    api_error::ApiError,
    audit::{Audit, AuditedCall, request_id, trace_id},
    clock,
    lock::lock,
    metrics::{RpcMeter, RpcMeters},
    net::Peer,
    reason::REASON_TRAILER,
    request_log::{CallWork, EndedCall, RequestLog, RequestLogScope},
    traces::{TracedSpan, Traces},
};

/// The trailer with the reason of a refusal.
const REASON: HeaderName = HeaderName::from_static(REASON_TRAILER);

/// What is known of a call. It is among the extensions of the request, as an `Arc<Call>`.
#[derive(Debug)]
pub(super) struct Call {
    /// The kind of the call.
    pub(super) kind: CallKind,
    /// The name of the method.
    pub(super) method: &'static str,
    /// The span of the call, if it is sampled.
    pub(super) span: Option<TracedSpan>,
    peer: Option<Arc<Peer>>,
    caller: OnceLock<(KnownCaller, Arc<Rights>)>,
    budget: OnceLock<AnswerBudget>,
    scope: RequestLogScope,
    /// For the request log alone.
    work: Mutex<CallWork>,
    request_id: Option<Box<str>>,
    trace_id: Option<Box<str>>,
}

impl Call {
    /// The record of a call of this kind.
    pub(super) fn new<R>(
        kind: CallKind,
        request: &Request<R>,
        span: Option<TracedSpan>,
        scope: RequestLogScope,
    ) -> Self {
        let peer = request.extensions().get::<Arc<Peer>>().cloned();
        let headers = Some(request.headers()).filter(|_| scope > RequestLogScope::Off);
        let id = |read: fn(&HeaderMap) -> Option<&str>| headers.and_then(read).map(Box::from);
        Self {
            kind,
            method: CallKind::method(request.uri().path()),
            span,
            peer,
            caller: OnceLock::new(),
            budget: OnceLock::new(),
            scope,
            work: Mutex::default(),
            request_id: id(request_id),
            trace_id: id(trace_id),
        }
    }

    /// The record of the call with these extensions. `None`: it came by no listener for clients.
    pub(super) fn of(extensions: &Extensions) -> Option<&Arc<Self>> {
        extensions.get()
    }

    /// The kind of this call, from its record, or from its path if it has none.
    pub(super) fn kind_of<R>(request: &Request<R>) -> CallKind {
        let known = Self::of(request.extensions()).map(|call| call.kind);
        known.unwrap_or_else(|| CallKind::of(request.uri().path()))
    }

    /// The caller is known from now on, by these rights.
    pub(super) fn is_from(&self, caller: KnownCaller, rights: Arc<Rights>) {
        // A call has one caller.
        let _ = self.caller.set((caller, rights));
    }

    /// The caller. `None`: it is not known, or not yet.
    pub(super) fn caller(&self) -> Option<&KnownCaller> {
        Some(&self.caller.get()?.0)
    }

    /// The rights by which the caller was accepted.
    pub(super) fn rights(&self) -> Option<&Rights> {
        Some(&self.caller.get()?.1)
    }

    /// The answer may take memory of this budget.
    pub(super) fn may_take(&self, budget: AnswerBudget) {
        // A call passes the limits once.
        let _ = self.budget.set(budget);
    }

    /// The memory that its answer may take. `None`: there is no limit, or the call has not passed the limits.
    pub(super) fn budget(&self) -> Option<&AnswerBudget> {
        self.budget.get()
    }

    /// The handler has done this work. It is asked for the work if each call has a line.
    pub(super) fn did(&self, work: impl FnOnce() -> CallWork) {
        if self.scope == RequestLogScope::All {
            *lock(&self.work) = work();
        }
    }

    /// The handler has refused the call, which was about this work.
    pub(super) fn refused(&self, work: impl FnOnce() -> CallWork) {
        if self.scope > RequestLogScope::Off {
            *lock(&self.work) = work();
        }
    }
}

/// A call as audit lines show it.
pub(super) fn audited<'c>(
    audit: &'c Audit,
    method: &'static str,
    headers: &'c HeaderMap,
    extensions: &'c Extensions,
) -> AuditedCall<'c> {
    let peer = Call::of(extensions).and_then(|call| call.peer.as_ref());
    AuditedCall {
        audit,
        method,
        peer: peer.map(|peer| peer.address),
        certificate: peer.and_then(|peer| Some(&*peer.certificate.as_ref()?.digest)),
        headers,
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

/// The observers of calls: the metrics, the traces and the request log.
#[derive(Debug)]
pub(super) struct CallRecorder {
    pub(super) meters: RpcMeters,
    pub(super) traces: Traces,
    pub(super) log: RequestLog,
}

/// The end of a call: when this is dropped, the call has ended. Without a code, its client has left.
#[derive(Debug)]
pub(super) struct CallEnd {
    call: Arc<Call>,
    recorder: Arc<CallRecorder>,
    /// The number of the method's meter.
    meter_number: usize,
    begun_at: Instant,
    code: Option<Code>,
    refusal: Option<Refusal>,
    bytes: u64,
}

/// The reason of a refusal, and its message if the call has a line.
#[derive(Debug)]
struct Refusal {
    reason: Box<str>,
    why: Option<String>,
}

impl CallEnd {
    /// The call to this path begins now.
    pub(super) fn of(call: Arc<Call>, path: &str, recorder: Arc<CallRecorder>) -> Self {
        let meter_number = recorder.meters.number_of(path);
        recorder.meters.at(meter_number).started();
        let begun_at = clock::now();
        Self { call, recorder, meter_number, begun_at, code: None, refusal: None, bytes: 0 }
    }

    fn meter(&self) -> &RpcMeter {
        self.recorder.meters.at(self.meter_number)
    }

    /// The record of the call.
    pub(super) fn call(&self) -> &Arc<Call> {
        &self.call
    }

    /// Looks for the code of the call in headers or trailers of its answer.
    pub(super) fn see(&mut self, headers: &HeaderMap) {
        let Some(code) =
            headers.get(Status::GRPC_STATUS).map(|code| Code::from_bytes(code.as_bytes()))
        else {
            return;
        };
        self.code = Some(code);
        let reason = headers.get(REASON).filter(|_| code != Code::Ok);
        if let Some(reason) = reason.and_then(|reason| reason.to_str().ok()) {
            self.meter().refused(reason);
            let logged = self.recorder.log.scope().has(Some(reason));
            let status = logged.then(|| Status::from_header_map(headers)).flatten();
            let why = status.map(|status| status.message().to_owned());
            self.refusal = Some(Refusal { reason: reason.into(), why });
        }
    }

    /// A part of the answer of this size.
    pub(super) fn answered(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// The answer has ended. An answer without a code is an error that is not known.
    pub(super) fn answered_all(&mut self) {
        self.code.get_or_insert(Code::Unknown);
    }

    fn has_line(&self, code: Code) -> bool {
        let reason = self.refusal.as_ref().map(|refusal| &*refusal.reason);
        // Clients leave every day.
        let failed = !matches!(code, Code::Ok | Code::Cancelled);
        let scope = self.recorder.log.scope();
        let ours = self.call.kind.is_ours() || self.call.kind == CallKind::Other;
        ours && (scope == RequestLogScope::All || failed && scope.has(reason))
    }
}

impl Drop for CallEnd {
    fn drop(&mut self) {
        let now = clock::now();
        let took = now.saturating_duration_since(self.begun_at);
        let code = self.code.unwrap_or(Code::Cancelled);
        let trace_id = self.call.span.as_ref().map(TracedSpan::trace_id);
        let code_name = self.meter().handled(code as usize, took, trace_id.clone());
        let refusal = self.refusal.as_ref();
        let reason = refusal.map(|refusal| &*refusal.reason);
        let call = &*self.call;
        if let Some(span) = &call.span {
            span.answered(code as i32, reason);
            span.end();
        }
        if !self.has_line(code) {
            return;
        }
        let line = EndedCall {
            rpc: call.method,
            code: code_name,
            reason,
            why: refusal.and_then(|refusal| refusal.why.as_deref()),
            work: &lock(&call.work),
            bytes: self.bytes,
            seconds: took.as_secs_f64(),
            principal: call.caller().and_then(|caller| caller.principal.as_deref()),
            identity: call.caller().map(|caller| caller.identity.as_str()),
            peer: call.peer.as_ref().map(|peer| peer.address),
            request_id: call.request_id.as_deref(),
            trace_id: trace_id.as_deref().or(call.trace_id.as_deref()),
        };
        self.recorder.log.write(&line, now);
    }
}
