//! A Fetch that the rights allow: from its request to its answer. It fetches, or repeats an earlier call of its
//! attempt, and seals the tokens.

use std::sync::Arc;

use prost::Message as _;
use tonic::Response;

use super::{
    answer_memory::{AnswerBudget, fetch_memory},
    backend::nonces,
    call::Call,
    encode::Seal,
    received::{answered_work, received},
};
use crate::{
    access::{KnownCaller, OverLimit, Rights, Verb},
    api_error::ApiError,
    broker::Broker,
    bus::Bus,
    clock::{self, ClockPair},
    cluster::{AttemptElsewhere, Cluster, NamedAttempt},
    credentials::Gatekeeper,
    keys::Keys,
    lessor::{AttemptBegun, FetchParams, Fetched, Lessor},
    pb,
    request_log::CallWork,
    token::InstanceId,
    traces::TracedSpan,
};

/// See the [module](self).
pub(super) struct AllowedFetch<'c, B: Broker + Bus> {
    pub(super) lessor: &'c Lessor<B>,
    pub(super) cluster: &'c Cluster<B>,
    pub(super) keys: &'c Keys,
    pub(super) gatekeeper: &'c Gatekeeper,
    pub(super) owner: InstanceId,
    pub(super) request: &'c pb::FetchRequest,
    /// The call is a repeat.
    pub(super) again: bool,
    pub(super) caller: &'c KnownCaller,
    pub(super) principal: &'c Arc<str>,
    pub(super) rights: &'c Rights,
    pub(super) budget: Option<&'c AnswerBudget>,
    pub(super) span: Option<&'c TracedSpan>,
    pub(super) record: Option<&'c Arc<Call>>,
}

impl<B: Broker + Bus> AllowedFetch<'_, B> {
    /// Fetches, and answers with the messages. The answer will have the results of `settled`, too.
    pub(super) async fn take(
        &self,
        ask: FetchParams,
        settled: &pb::FetchResponse,
    ) -> Result<Response<pb::FetchResponse>, ApiError> {
        let Self { request, caller, principal, budget, record, .. } = *self;
        let span = self.span.map(|span| (span, clock::unix_time()));
        let (fetched, owner) = self.fetched(ask).await?;
        // The policy may have changed while the call waited. Then the messages go back.
        let (rights, consumer) = (self.gatekeeper.rights(), (&*request.stream, &*request.consumer));
        rights.still_may(caller, Verb::Fetch, consumer, clock::unix_time)?;
        let memory = fetch_memory(budget, &fetched, settled.encoded_len()).await?;
        let (messages, rejected) = (fetched.messages().len(), fetched.rejected().len());
        let nonces = nonces()?;
        tracing::debug!(
            stream = request.stream,
            consumer = request.consumer,
            worker = request.worker,
            messages,
            rejected,
            "fetched"
        );
        let work = || CallWork {
            messages: Some(messages),
            rejected: Some(rejected),
            ..answered_work(request, settled)
        };
        record.inspect(|record| record.did(work));
        let receive = span.and_then(|(call, since)| received(call, request, since, &fetched));
        let sealer = self.keys.sealer();
        let clocks = ClockPair::read();
        let span = receive.as_ref().map(TracedSpan::to_bytes);
        let seal = Seal { sealer: &sealer, owner, clocks, principal, span };
        let mut response = Response::new(seal.fetch(&fetched, nonces));
        response.extensions_mut().insert(Arc::new(fetched.into_deliveries()));
        memory.map(|memory| response.extensions_mut().insert(memory));
        Ok(response)
    }

    /// The messages of this call, or of an earlier call of its attempt, and the owner of their leases.
    async fn fetched(&self, mut ask: FetchParams) -> Result<(Fetched, InstanceId), ApiError> {
        let (lessor, attempt) = (self.lessor, &*self.request.attempt_id);
        if attempt.is_empty() {
            self.limit(&mut ask)?;
            return Ok((lessor.fetch(ask).await?, self.owner));
        }
        let attempt = NamedAttempt {
            principal: self.principal.clone(),
            name: ask.name.clone(),
            attempt: attempt.into(),
        };
        let fetched = match lessor.begin_attempt(attempt.key(), self.again) {
            AttemptBegun::Over => lessor.attempt_over(&ask),
            AttemptBegun::Again(lent) => {
                let lent = lessor.lend_again(&lent, ask.lease, &ask.caller)?;
                lessor.read_lent(lent, &ask).await?
            }
            AttemptBegun::Waits(call) => {
                if self.again {
                    let until = ask.patience.map(|patience| patience.until);
                    let (lease, caller) = (ask.lease, &ask.caller);
                    let found = self.cluster.find_attempt(&attempt, lease, caller, until).await;
                    match found {
                        Some(AttemptElsewhere::Lent(owner, lent)) => {
                            return Ok((lessor.read_lent(lent, &ask).await?, owner));
                        }
                        Some(AttemptElsewhere::Over) => {
                            return Ok((lessor.attempt_over(&ask), self.owner));
                        }
                        Some(AttemptElsewhere::Waited) | None => {}
                    }
                }
                self.limit(&mut ask)?;
                lessor.fetch_for(ask, call).await?
            }
        };
        Ok((fetched, self.owner))
    }

    /// Asks for no more messages than the principal may still lease.
    fn limit(&self, ask: &mut FetchParams) -> Result<(), ApiError> {
        let (lessor, principal) = (self.lessor, self.principal);
        let left = self.rights.limits_of(principal).leases_left(|| lessor.held_for(principal));
        let left = left.map_err(|limit| OverLimit { principal: principal.clone(), limit })?;
        ask.n = ask.n.min(u32::try_from(left).unwrap_or(u32::MAX));
        Ok(())
    }
}
