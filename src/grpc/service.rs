//! The methods of FetchService: they decode, call the lessor, and encode. Decides nothing itself.

use std::{sync::Arc, time::Duration, time::Instant};

use prost::Message as _;
use tonic::{Extensions, Request, Response, Status, Streaming, metadata::MetadataMap};

use super::{
    allowed_fetch::AllowedFetch,
    answer_memory::{AnswerBudget, RequestMemory},
    backend::Backend,
    call::{Call, audit_refusal, audited},
    consume::{self, ConsumeCall, ConsumeFrames, outlet},
    decode, encode,
    layers::{AcceptCallers, PrincipalQuotas},
    received::{answered_work, consumer_work, empty_by, failed_by, fetch_work},
    settlements::{CallResults, CallSettlements, answered},
    to_status::to_status,
};
use crate::{
    access::{Settler, Verb},
    api_error::ApiError,
    audit::AuditedCall,
    broker::{Broker, Confirmation, ConsumerName},
    bus::Bus,
    clock,
    cluster::{Cluster, NamedAttempt, SettleOutcome},
    credentials::Gatekeeper,
    keys::Keys,
    lessor::{Action, Error, Lessor},
    limits::LEAST_MAX_BYTES,
    net::ClientConnection,
    pb::{self, fetch_service_server::FetchService},
    refusal_log::{RefusalLog, RefusedCaller},
    request_log::CallWork,
    token::InstanceId,
    traces::TracedSpan,
};

/// Longest wait for INFO of a consumer.
const CONSUMER_PATIENCE: Duration = Duration::from_secs(2);

/// The service over one lessor, and over the cluster that it is a part of.
pub struct Service<B: Broker + Bus>(Backend<B>);

impl<B: Broker + Bus> std::ops::Deref for Service<B> {
    type Target = Backend<B>;

    fn deref(&self) -> &Backend<B> {
        &self.0
    }
}

impl<B: Broker + Bus> Service<B> {
    /// `owner` names this process in the tokens that it seals; it must be new with every start.
    pub fn new(
        lessor: Lessor<B>,
        cluster: Arc<Cluster<B>>,
        keys: Arc<Keys>,
        gatekeeper: Arc<Gatekeeper>,
        refusals: Arc<RefusalLog>,
        owner: InstanceId,
    ) -> Self {
        Self(Backend { lessor, cluster, keys, gatekeeper, refusals, owner })
    }

    /// The layer that finds out who calls, for each connection.
    pub(super) fn callers(&self) -> impl Fn(&Arc<ClientConnection>) -> AcceptCallers + use<B> {
        let (gatekeeper, refusals) = (self.gatekeeper.clone(), self.refusals.clone());
        move |connection| AcceptCallers::new(gatekeeper.clone(), refusals.clone(), connection)
    }

    /// The layer that obeys the limits of principals.
    pub(super) fn quotas(&self) -> PrincipalQuotas {
        PrincipalQuotas::new(self.refusals.clone())
    }

    fn audited<'c>(
        &'c self,
        method: &'static str,
        metadata: &'c MetadataMap,
        extensions: &'c Extensions,
    ) -> AuditedCall<'c> {
        audited(self.gatekeeper.audit(), method, metadata.as_ref(), extensions)
    }

    /// A call about this consumer begins. Returns how it is refused.
    fn refusal_of<'c>(
        &'c self,
        call: &'c AuditedCall<'_>,
        record: Option<&'c Arc<Call>>,
        (stream, consumer): (&'c str, &'c str),
    ) -> impl Fn(ApiError) -> Status + 'c {
        let work = move || consumer_work(stream, consumer);
        record.inspect(|record| record.did(work));
        move |refused| {
            record.inspect(|record| record.refused(work));
            self.refusals.refused(call.method, &RefusedCaller::default(), &refused);
            audit_refusal(call, &refused);
            to_status(&refused)
        }
    }

    fn settler(&self, extensions: &Extensions) -> Result<Settler, Status> {
        Ok(Settler::new(self.gatekeeper.rights(), checked(self.caller(extensions))?))
    }

    /// Settles one token, for the unary calls.
    async fn settle(
        &self,
        (metadata, extensions): (&MetadataMap, &Extensions),
        token: String,
        action: Action,
        confirmation: Confirmation,
    ) -> Result<SettleOutcome, Status> {
        let call = match action {
            Action::Ack => "Ack",
            Action::Nak(_) => "Nak",
            Action::Term(_) => "Term",
            Action::Extend(_) => "Extend",
        };
        let (wanted, until) = (vec![(token, action)], settle_until(metadata));
        let settler = self.settler(extensions)?;
        let call = self.audited(call, metadata, extensions);
        let span = span_of(extensions);
        let done =
            self.cluster.settle(&call, span, &settler, wanted, confirmation, until).await.pop();
        // There was one token, so there is one result.
        done.unwrap_or(Err(Error::Unconfirmed.into())).map_err(|refused| to_status(&refused))
    }
}

#[tonic::async_trait]
impl<B: Broker + Bus> FetchService for Service<B> {
    async fn fetch(
        &self,
        request: Request<pb::FetchRequest>,
    ) -> Result<Response<pb::FetchResponse>, Status> {
        let (came_at, (metadata, mut extensions, request)) = (clock::now(), request.into_parts());
        let bytes = extensions.remove::<RequestMemory>();
        let left = decode::time_left(&metadata);
        let (record, caller) = (Call::of(&extensions), self.caller(&extensions));
        let call = self.audited("Fetch", &metadata, &extensions);
        let mut request = decode::shortened(request);
        let settlements = std::mem::take(&mut request.settlements);
        let log = |refused: &ApiError| {
            let (stream, consumer) = (&*request.stream, &*request.consumer);
            // A name that is refused for its length is also too long for the log.
            let consumer = (stream.len().max(consumer.len()) <= 255)
                .then(|| ConsumerName { stream: stream.into(), consumer: consumer.into() });
            let principal = record.and_then(|call| call.caller()?.principal.as_deref());
            let caller = RefusedCaller { consumer, principal, worker: &request.worker };
            self.refusals.refused(call.method, &caller, refused);
            audit_refusal(&call, refused);
        };
        let refused = |refused: ApiError| {
            log(&refused);
            record.inspect(|record| record.refused(|| fetch_work(&request)));
            to_status(&refused)
        };
        let caller = caller.map_err(refused)?;
        // No Fetch waits for longer than its credential is good.
        let good_for = caller.until.map(|until| until.saturating_sub(clock::unix_time()));
        let left = [left, good_for].into_iter().flatten().min();
        let principal = caller.principal.clone().unwrap_or_default();
        let span = span_of(&extensions).inspect(|call| call.by(&principal));
        let who = (caller.identity.as_str(), call.peer);
        let ask = decode::fetch(&request, principal.clone(), who, came_at, left);
        let mut ask = ask.map_err(refused)?;
        let settlements = CallSettlements::read(settlements, 0, request.confirmation);
        let settlements = settlements.map_err(refused)?;
        let consumer = (&*request.stream, &*request.consumer);
        let rights = self.gatekeeper.rights();
        let may = rights.may(&caller, Verb::Fetch, consumer);
        may.map_err(|denied| refused(denied.into()))?;
        if call.audit.has_all() {
            let rule = rights.rule_line(&caller, Verb::Fetch, consumer);
            call.allowed(&caller, Verb::Fetch, Some(consumer), rule);
        }
        let budget = budget_of(&extensions);
        let fetch = AllowedFetch {
            lessor: &self.lessor,
            cluster: &self.cluster,
            keys: &self.keys,
            gatekeeper: &self.gatekeeper,
            owner: self.owner,
            request: &request,
            again: request.attempt_again || decode::was_repeated(&metadata),
            caller: &caller,
            principal: &principal,
            rights: &rights,
            budget,
            span,
            record,
        };
        if settlements.is_empty() {
            return fetch.take(ask, &pb::FetchResponse::default()).await.map_err(refused);
        }
        // The settlements come first, and what they free is there for the Fetch.
        let settler = Settler::new(rights.clone(), caller.clone());
        let until = settle_until(&metadata);
        let settled = self.settle_all(settlements, (&call, span), &settler, budget, until).await;
        let CallResults { results, failed, taken } = settled.map_err(refused)?;
        drop(bytes);
        let mut answer = pb::FetchResponse { results, failed, ..pb::FetchResponse::default() };
        record.inspect(|record| record.did(|| answered_work(&request, &answer)));
        if failed > 0 {
            self.lessor.refuse_fetch(&ask.name);
            answer.empty_reason = pb::EmptyReason::Settle.into();
            span.inspect(|call| empty_by(call, pb::EmptyReason::Settle));
            return Ok(answered(answer, taken));
        }
        // A call that waits holds no memory of answers, like any other.
        drop(taken);
        let size = answer.encoded_len() as u64;
        ask.max_bytes = ask.max_bytes.saturating_sub(size).max(LEAST_MAX_BYTES.into());
        ask.max_wait = ask.max_wait.saturating_sub(clock::now().saturating_duration_since(came_at));
        let mut response = fetch.take(ask, &answer).await.unwrap_or_else(|error| {
            // A status would hide the results.
            log(&error);
            self.metrics().refused(error.reason().name(), call.method);
            span.inspect(|call| failed_by(call, &error));
            Response::new(encode::fetch_failed(&error))
        });
        response.get_mut().results = answer.results;
        Ok(response)
    }

    async fn ack(
        &self,
        request: Request<pb::AckRequest>,
    ) -> Result<Response<pb::AckResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let confirmation = checked(decode::confirmation(request.confirmation))?;
        let done =
            self.settle((&metadata, &extensions), request.token, Action::Ack, confirmation).await?;
        Ok(Response::new(pb::AckResponse { outcome: done.outcome.into() }))
    }

    async fn nak(
        &self,
        request: Request<pb::NakRequest>,
    ) -> Result<Response<pb::NakResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let confirmation = checked(decode::confirmation(request.confirmation))?;
        let action = checked(decode::nak("", request.delay.as_ref()))?;
        let done =
            self.settle((&metadata, &extensions), request.token, action, confirmation).await?;
        let redeliver_time = done.redeliver_time;
        Ok(Response::new(pb::NakResponse { outcome: done.outcome.into(), redeliver_time }))
    }

    async fn term(
        &self,
        request: Request<pb::TermRequest>,
    ) -> Result<Response<pb::TermResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let confirmation = checked(decode::confirmation(request.confirmation))?;
        let action = decode::term(request.reason);
        let done =
            self.settle((&metadata, &extensions), request.token, action, confirmation).await?;
        Ok(Response::new(pb::TermResponse { outcome: done.outcome.into() }))
    }

    async fn extend(
        &self,
        request: Request<pb::ExtendRequest>,
    ) -> Result<Response<pb::ExtendResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let action = checked(decode::extend("", request.lease.as_ref()))?;
        let done = self
            .settle((&metadata, &extensions), request.token, action, Confirmation::Confirmed)
            .await?;
        let (lease_expire_time, lease) = (done.lease_expire_time, done.lease);
        Ok(Response::new(pb::ExtendResponse { lease_expire_time, lease }))
    }

    async fn get_consumer(
        &self,
        request: Request<pb::GetConsumerRequest>,
    ) -> Result<Response<pb::GetConsumerResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let call = self.audited("GetConsumer", &metadata, &extensions);
        let about = (&*request.stream, &*request.consumer);
        let refused = &self.refusal_of(&call, Call::of(&extensions), about);
        let caller = self.caller(&extensions).map_err(refused)?;
        let name = decode::consumer_name(&request).map_err(refused)?;
        let (rights, consumer) = (self.gatekeeper.rights(), (&*name.stream, &*name.consumer));
        let fetches = rights.may(&caller, Verb::Fetch, consumer);
        let may = fetches
            .or_else(|denied| rights.may(&caller, Verb::Inspect, consumer).map_err(|_| denied));
        may.map_err(|denied| refused(denied.into()))?;
        let until = settle_until(&metadata).min(clock::now() + CONSUMER_PATIENCE);
        let info = self.lessor.consumer_info(&name, until).await;
        let (info, unsuitable) = info.map_err(|error| refused(error.into()))?;
        let leases = (self.lessor.unset_lease(&info), self.lessor.max_lease());
        Ok(Response::new(encode::consumer(info, unsuitable.as_ref(), leases)))
    }

    async fn give_back(
        &self,
        request: Request<pb::GiveBackRequest>,
    ) -> Result<Response<pb::GiveBackResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let call = self.audited("GiveBack", &metadata, &extensions);
        let about = (&*request.stream, &*request.consumer);
        let refused = &self.refusal_of(&call, Call::of(&extensions), about);
        let caller = self.caller(&extensions).map_err(refused)?;
        let (name, attempt) = decode::give_back(&request).map_err(refused)?;
        let (rights, consumer) = (self.gatekeeper.rights(), (&*name.stream, &*name.consumer));
        let may = rights.may(&caller, Verb::Fetch, consumer);
        may.map_err(|denied| refused(denied.into()))?;
        let principal = caller.principal.clone().unwrap_or_default();
        let attempt = NamedAttempt { principal, name, attempt: attempt.into() };
        let given = self.cluster.give_back(attempt, settle_until(&metadata)).await;
        let given = given.map_err(|error| refused(error.into()))?;
        let messages = u32::try_from(given).unwrap_or(u32::MAX);
        Ok(Response::new(pb::GiveBackResponse { messages }))
    }

    async fn settle(
        &self,
        request: Request<pb::SettleRequest>,
    ) -> Result<Response<pb::SettleResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let settlements = CallSettlements::read(request.settlements, 1, request.confirmation);
        let settlements = checked(settlements)?;
        let until = settle_until(&metadata);
        let settler = self.settler(&extensions)?;
        let call = self.audited("Settle", &metadata, &extensions);
        let (span, budget) = (span_of(&extensions), budget_of(&extensions));
        let settled = self.settle_all(settlements, (&call, span), &settler, budget, until).await;
        let CallResults { results, failed, taken } = checked(settled)?;
        let tokens = Some(results.len());
        let work = || CallWork { tokens, failed: Some(failed), ..CallWork::default() };
        Call::of(&extensions).inspect(|record| record.did(work));
        Ok(answered(pb::SettleResponse { results, failed }, taken))
    }

    type ConsumeStream = ConsumeFrames;

    /// Answers at once: many clients write only after they have the headers. The first frame is read later.
    async fn consume(
        &self,
        request: Request<Streaming<pb::ConsumeRequest>>,
    ) -> Result<Response<ConsumeFrames>, Status> {
        if self.lessor.is_draining() {
            return Err(to_status(&Error::Draining.into()));
        }
        let (metadata, mut extensions, requests) = request.into_parts();
        let connection = extensions.remove::<Arc<ClientConnection>>();
        let left = decode::time_left(&metadata);
        let call = ConsumeCall::new(metadata.into_headers(), extensions, left);
        let (outlet, frames, holds) = outlet();
        self.lessor.run(consume::run(self.0.clone(), requests, call, connection, outlet));
        let mut response = Response::new(frames);
        response.extensions_mut().insert(holds);
        Ok(response)
    }
}

/// The memory for the answer of the call with these extensions.
fn budget_of(extensions: &Extensions) -> Option<&AnswerBudget> {
    Call::of(extensions)?.budget()
}

/// The span of the call with these extensions.
fn span_of(extensions: &Extensions) -> Option<&TracedSpan> {
    Call::of(extensions)?.span.as_ref()
}

fn checked<T>(decoded: Result<T, ApiError>) -> Result<T, Status> {
    decoded.map_err(|refused| to_status(&refused))
}

/// The time by which a settlement answers: before its caller's deadline. The lessor has a limit of its own.
fn settle_until(metadata: &MetadataMap) -> Instant {
    let left = decode::time_left(metadata).unwrap_or(Duration::from_secs(3600));
    clock::now() + left.saturating_sub(decode::slack(left))
}
