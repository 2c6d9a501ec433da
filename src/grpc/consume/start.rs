//! The first frame of a Consume: reads it, asks for the right, and opens the flow. Also reads later credit.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::HeaderMap;

use crate::{
    access::{KnownCaller, RightLost, Rights, Verb},
    api_error::ApiError,
    audit::{Audit, AuditedCall},
    broker::{Broker, ConsumerName},
    bus::Bus,
    clock,
    grpc::{
        answer_memory::AnswerBudget,
        backend::Backend,
        call::{Call, audit_refusal, audited},
        decode,
    },
    lessor::{Credit, Flow, FlowParams, Holding},
    pb::{self, time::duration},
    refusal_log::RefusedCaller,
    request_log::CallWork,
    traces::TracedSpan,
};

/// The longest time between `draining` and the end of a stream by its deadline.
const DEADLINE_NOTICE: Duration = Duration::from_secs(5);
/// The credit of a stream that sets none.
const DEFAULT_CREDIT: Credit = Credit { messages: 1, bytes: 16 * 1024 * 1024 };
/// The most credit. More is lowered to this.
const MAX_CREDIT: Credit = Credit { messages: 10_000, bytes: 64 * 1024 * 1024 };
/// The heartbeat of a stream that sets none, and its bounds.
const DEFAULT_HEARTBEAT: Duration = Duration::from_secs(10);
const MIN_HEARTBEAT: Duration = Duration::from_secs(1);
const MAX_HEARTBEAT: Duration = Duration::from_secs(60);
/// How long kept leases outlive a stream that does not say. A client needs about a second to open another stream.
const DEFAULT_GRACE: Duration = Duration::from_secs(10);

/// What is known of the call before its first frame.
#[derive(Clone)]
pub(in crate::grpc) struct ConsumeCall {
    /// The headers of the call.
    pub(in crate::grpc) headers: Arc<HeaderMap>,
    /// The extensions of its request.
    pub(in crate::grpc) extensions: tonic::Extensions,
    /// Its record.
    pub(super) record: Option<Arc<Call>>,
    /// The time left until its deadline, and when that was so.
    pub(in crate::grpc) left: Option<Duration>,
    pub(in crate::grpc) came_at: Instant,
}

/// A stream that has begun.
#[derive(Clone)]
pub(in crate::grpc) struct StartedConsume {
    pub(super) call: ConsumeCall,
    pub(super) caller: KnownCaller,
    pub(super) principal: Arc<str>,
    pub(super) stream: String,
    pub(super) consumer: String,
    pub(super) worker: String,
    pub(super) heartbeat: Duration,
    /// Its leases live as long as it does.
    pub(super) keeps: bool,
    pub(super) credit_id: u64,
    /// When its end is announced, because of the deadline of the call or the end of the credential.
    pub(super) notice_at: Option<Instant>,
    pub(super) ends_at: Option<Instant>,
}

impl StartedConsume {
    /// Whether its caller is still accepted, and may still fetch.
    ///
    /// # Errors
    /// What was lost.
    pub(super) fn still_may_fetch(&self, rights: &Rights) -> Result<(), RightLost> {
        let consumer = (&*self.stream, &*self.consumer);
        rights.still_may(&self.caller, Verb::Fetch, consumer, clock::unix_time)
    }
}

impl ConsumeCall {
    /// The call with these headers and extensions.
    pub(in crate::grpc) fn new(
        headers: HeaderMap,
        extensions: tonic::Extensions,
        left: Option<Duration>,
    ) -> Self {
        let record = Call::of(&extensions).cloned();
        Self { headers: Arc::new(headers), extensions, record, left, came_at: clock::now() }
    }

    pub(super) fn audited<'c>(&'c self, audit: &'c Audit) -> AuditedCall<'c> {
        audited(audit, "Consume", &self.headers, &self.extensions)
    }

    pub(super) fn budget(&self) -> Option<&AnswerBudget> {
        self.record.as_ref()?.budget()
    }

    pub(super) fn span(&self) -> Option<&TracedSpan> {
        self.record.as_ref()?.span.as_ref()
    }
}

/// A field has a wrong value.
pub(super) fn wrong(field: &str, why: &str) -> ApiError {
    ApiError::Field { field: field.to_owned(), why: why.to_owned() }
}

/// There is no first frame.
pub(super) fn missing(why: &str) -> ApiError {
    wrong("start", why)
}

/// Reads a credit. What is unset stays as it was.
pub(super) fn credit(
    field: &str,
    credit: Option<&pb::ConsumeCredit>,
    before: Credit,
) -> Result<Credit, ApiError> {
    let Some(credit) = credit else { return Ok(before) };
    if credit.max_bytes == Some(0) {
        return Err(wrong(&format!("{field}.max_bytes"), "must not be 0"));
    }
    Ok(Credit {
        messages: credit.max_leases.map_or(before.messages, u64::from).min(MAX_CREDIT.messages),
        bytes: credit.max_bytes.unwrap_or(before.bytes).min(MAX_CREDIT.bytes),
    })
}

/// Reads how leases live with their stream. Times are lowered to the longest lease.
fn kept(keep: &pb::ConsumeKeep, max_lease: Duration) -> Result<Holding, ApiError> {
    let grace = decode::optional("start.keep.grace", keep.grace.as_ref())?;
    let at_most = decode::lease("start.keep.at_most", keep.at_most.as_ref())?;
    Ok(Holding::Kept {
        at_most: at_most.unwrap_or(max_lease).min(max_lease),
        grace: grace.unwrap_or(DEFAULT_GRACE).min(max_lease),
    })
}

/// Begins a stream with its first frame.
pub(super) fn begin<B: Broker + Bus>(
    service: &Backend<B>,
    call: ConsumeCall,
    first: pb::ConsumeRequest,
) -> Result<(StartedConsume, Flow<B>, pb::ConsumeOpened, Option<pb::ConsumeSettle>), ApiError> {
    let Some(start) = first.start else { return Err(missing("must be in the first frame")) };
    let audited = call.audited(service.gatekeeper().audit());
    let refused = |refused: ApiError| {
        let (stream, consumer) = (&*start.stream, &*start.consumer);
        let consumer = (stream.len().max(consumer.len()) <= 255)
            .then(|| ConsumerName { stream: stream.into(), consumer: consumer.into() });
        let principal = call.record.as_ref().and_then(|call| call.caller()?.principal.as_deref());
        let caller = RefusedCaller { consumer, principal, worker: &start.worker };
        service.refusals.refused("Consume", &caller, &refused);
        audit_refusal(&audited, &refused);
        call.record.iter().for_each(|record| {
            record.refused(|| CallWork {
                stream: Some(start.stream.clone()),
                consumer: Some(start.consumer.clone()),
                ..CallWork::default()
            });
        });
        refused
    };
    let caller = service.caller(&call.extensions).map_err(refused)?;
    let principal = caller.principal.clone().unwrap_or_default();
    call.span().into_iter().for_each(|span| span.by(&principal));
    // A Consume without a length is as a Fetch without it.
    let (lease, keep) = match start.holding {
        Some(pb::consume_start::Holding::Lease(lease)) => (Some(lease), None),
        Some(pb::consume_start::Holding::Keep(keep)) => (None, Some(keep)),
        None => (None, None),
    };
    let as_fetch = pb::FetchRequest {
        stream: start.stream.clone(),
        consumer: start.consumer.clone(),
        lease,
        codec: start.codec,
        max_bytes: start.max_frame_bytes,
        worker: start.worker.clone(),
        ..Default::default()
    };
    let as_fetch = decode::shortened(as_fetch);
    let who = (caller.identity.as_str(), audited.peer);
    let ask = decode::fetch(&as_fetch, principal.clone(), who, call.came_at, None);
    let in_start = |refused| {
        if let ApiError::Field { field, why } = refused {
            let name = if field == "max_bytes" { "max_frame_bytes" } else { &field };
            return wrong(&format!("start.{name}"), &why);
        }
        refused
    };
    let ask = ask.map_err(in_start).map_err(refused)?;
    let max_lease = service.lessor.max_lease();
    let keep = keep.map(|keep| kept(&keep, max_lease)).transpose().map_err(refused)?;
    let asked = credit("start.credit", start.credit.as_ref(), DEFAULT_CREDIT).map_err(refused)?;
    let later = credit("credit", first.credit.as_ref(), asked).map_err(refused)?;
    let heartbeat =
        decode::optional("start.heartbeat", start.heartbeat.as_ref()).map_err(refused)?;
    let heartbeat = heartbeat.unwrap_or(DEFAULT_HEARTBEAT);
    if !(MIN_HEARTBEAT..=MAX_HEARTBEAT).contains(&heartbeat) {
        return Err(refused(wrong("start.heartbeat", "must be 1 s to 60 s")));
    }
    let consumer = (&*start.stream, &*start.consumer);
    let rights = service.gatekeeper().rights();
    rights.may(&caller, Verb::Fetch, consumer).map_err(|denied| refused(denied.into()))?;
    if audited.audit.has_all() {
        let rule = rights.rule_line(&caller, Verb::Fetch, consumer);
        audited.allowed(&caller, Verb::Fetch, Some(consumer), rule);
    }
    service.leases_left(&rights, &principal).map_err(refused)?;
    let max_frame_bytes = ask.max_bytes;
    let flow = service.lessor.open_flow(FlowParams {
        name: ask.name,
        credit: later,
        holding: keep.unwrap_or(Holding::For(ask.lease)),
        max_frame_bytes,
        codec: ask.codec,
        caller: ask.caller,
        principal: principal.clone(),
    });
    let flow = flow.map_err(|error| refused(error.into()))?;
    // No stream lasts for longer than its credential is good.
    let good_for = caller.until.map(|until| until.saturating_sub(clock::unix_time()));
    let left = [call.left, good_for].into_iter().flatten().min();
    let ends_at = left.map(|left| call.came_at + left.saturating_sub(decode::slack(left)));
    let notice = left.map(|left| (left / 5).min(DEADLINE_NOTICE));
    let notice_at = ends_at.zip(notice).map(|(end, notice)| end - notice);
    let opened = pb::ConsumeOpened {
        heartbeat: Some(duration(heartbeat)),
        max_leases: u32::try_from(later.messages).unwrap_or(u32::MAX),
        max_bytes: later.bytes,
        max_frame_bytes: u32::try_from(max_frame_bytes).unwrap_or(u32::MAX),
        grace: keep.and_then(|keep| match keep {
            Holding::Kept { grace, .. } => Some(duration(grace)),
            Holding::For(_) => None,
        }),
    };
    let id = |credit: &Option<pb::ConsumeCredit>| credit.as_ref().map_or(0, |credit| credit.id);
    let credit_id = match id(&first.credit) {
        0 => id(&start.credit),
        later => later,
    };
    let pb::FetchRequest { stream, consumer, worker, .. } = as_fetch;
    let started = StartedConsume {
        call: call.clone(),
        caller,
        principal,
        stream,
        consumer,
        worker,
        heartbeat,
        keeps: keep.is_some(),
        credit_id,
        notice_at,
        ends_at,
    };
    Ok((started, flow, opened, first.settle))
}
