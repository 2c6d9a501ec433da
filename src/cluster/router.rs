//! Settles each token at the place of its lease: in the lease table of this replica, or at the replica
//! that owns the lease. If that replica does not answer, the token is settled without it. Owns the way
//! there and back. Decides nothing about leases.
//!
//! ```text
//!  token ─▶ this replica owns it ────▶ its lease table
//!        └▶ another owns it ─ asked ─▶ the lease table there, the same answer
//!                └ no replica answers ─▶ straight to JetStream, if that is safe
//! ```

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::{join, join_all};
use prost::Message as _;
use tokio::time::timeout_at;

use super::{
    audited_tokens::AuditedTokens,
    channel::Unanswered,
    late,
    metered::{self, MeteredToken},
    ownerless,
    ownership::{self, LeaseLocation, OwnershipGuard},
    replica::Replica,
    settle_spans::{SettleSpans, SettleWay},
    wire::{self, OpenedToken, SettleOutcome, SettleResult},
};
use crate::{
    access::Settler,
    api_error::ApiError,
    audit::AuditedCall,
    broker::{AckSubject, Broker, Confirmation},
    bus::Bus,
    clock::{self, ClockPair},
    lease::LeaseId,
    lessor::{Action, Error, Group, Results, SettleItem, Settled},
    metrics::SettlementRoute,
    pb::peer::v1 as pb,
    reason::Reason,
    refusal_log::{RefusalLog, RefusedCaller},
    token::{Claims, InstanceId, Nonce, OpenError, Subkey},
    traces::{TracedSpan, Traces},
};

/// One token, and the action on its lease.
pub type TokenAction = (String, Action);

/// Settles tokens of every replica.
pub(super) struct Router<B: Broker + Bus> {
    replica: Arc<Replica<B>>,
    refusals: Arc<RefusalLog>,
    traces: Traces,
}

/// The tokens of one call, by the place of their leases.
struct Sorted {
    /// The results that are known at once.
    results: Results<SettleResult>,
    local: Group<SettleItem>,
    /// The ack subject of each local token, for the log.
    subjects: Vec<Cow<'static, str>>,
    /// By the owner, by the name that answers for it now, and by whether the principal does not matter.
    remote: BTreeMap<(InstanceId, InstanceId, bool), Group<OpenedToken>>,
    audited: AuditedTokens,
    /// `None`: the call is not traced.
    spans: Option<SettleSpans>,
}

impl Sorted {
    fn new(count: usize, traced: bool) -> Self {
        Self {
            results: Results::new(count),
            local: Group::default(),
            subjects: Vec::new(),
            remote: BTreeMap::new(),
            audited: AuditedTokens::default(),
            spans: traced.then(SettleSpans::default),
        }
    }
}

impl<B: Broker + Bus> Router<B> {
    pub(super) fn new(replica: Arc<Replica<B>>, refusals: Arc<RefusalLog>, traces: Traces) -> Self {
        Self { replica, refusals, traces }
    }

    /// Settles each token that `settler` may settle, at any replica: one result each, in order. `call` is
    /// for the log, and `span` is that of the call.
    pub(super) async fn settle(
        &self,
        call: &AuditedCall<'_>,
        span: Option<&TracedSpan>,
        settler: &Settler,
        wanted: Vec<TokenAction>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<SettleResult> {
        let until = until.min(clock::now() + self.replica.lessor.settle_timeout());
        let Ok(guard) = timeout_at(until.into(), self.replica.ownership.guard()).await else {
            return wanted.iter().map(|_| Err(Error::LeaseBusy.into())).collect();
        };
        let Sorted { mut results, local, subjects, remote, audited, mut spans } =
            self.sort(call, span.is_some(), settler, &wanted, &guard);
        spans.iter_mut().zip(span).for_each(|(spans, call)| spans.start(call));
        let (local, items) = local.into_parts();
        let routes = self.replica.lessor.metrics().routes();
        routes.routed(SettlementRoute::Here, items.len());
        let settled_here = async {
            let settled = self.replica.lessor.settle(items, confirmation, until).await;
            drop(guard);
            settled
        };
        let settled_there = remote.into_iter().map(|((owner, at, _), tokens)| async move {
            let (indices, tokens) = tokens.into_parts();
            (indices, self.settle_remote((owner, at), span, tokens, confirmation, until).await)
        });
        let (settled_here, settled_there) = join(settled_here, join_all(settled_there)).await;
        let clocks = ClockPair::read();
        let settled_here: Vec<_> =
            settled_here.into_iter().map(|result| outcome(result, clocks)).collect();
        for (result, subject) in settled_here.iter().zip(subjects) {
            if let Err(refused) = result {
                self.log_refusal(call, settler, Some(subject), refused);
            }
        }
        results.set_all(local, settled_here);
        for (indices, (settled, way)) in settled_there {
            spans.iter_mut().for_each(|spans| spans.went(&indices, way));
            for refused in settled.iter().filter_map(|result| result.as_ref().err()) {
                self.log_refusal(call, settler, None, refused);
            }
            results.set_all(indices, settled);
        }
        self.try_last_attempts(&wanted, &mut results, until).await;
        self.count_refusals(&wanted, &results);
        let results = results.into_vec();
        audited.write(call, settler.caller(), &wanted, &results);
        spans.into_iter().for_each(|spans| spans.end(&results));
        results
    }

    /// Opens the tokens, and sorts them by the place of their leases.
    fn sort(
        &self,
        call: &AuditedCall<'_>,
        traced: bool,
        settler: &Settler,
        wanted: &[TokenAction],
        guard: &OwnershipGuard<'_>,
    ) -> Sorted {
        let (mut sorted, mut subkey) = (Sorted::new(wanted.len(), traced), Subkey::default());
        for (index, (token, action)) in wanted.iter().enumerate() {
            let opened = self.open(token, &mut subkey).and_then(|(claims, lease)| {
                let by = sorted.audited.authorize::<B>(index, call, settler, &claims, action)?;
                Ok((claims, lease, by))
            });
            let (claims, lease, by) = match opened {
                Ok(opened) => opened,
                Err(refused) => {
                    self.log_refusal(call, settler, None, &refused);
                    sorted.results.set(index, Err(refused));
                    continue;
                }
            };
            let location = guard.locate(claims.owner, lease);
            if let Some(spans) = &mut sorted.spans {
                spans.add::<B>(index, &claims, action, SettleWay::to(&location));
            }
            match location {
                LeaseLocation::Local(lease) => {
                    sorted.subjects.push(claims.ack_subject);
                    sorted.local.push(index, SettleItem { lease, action: action.clone(), by });
                }
                LeaseLocation::Remote(at) => {
                    let place = (claims.owner, at, by.is_none());
                    let group = sorted.remote.entry(place).or_default();
                    group.push(index, OpenedToken { claims, action: action.clone(), by });
                }
                LeaseLocation::Ended(refusal) => {
                    let ended = ownership::ended(action, refusal);
                    if let Err(refused) = &ended {
                        self.log_refusal(call, settler, Some(claims.ack_subject), refused);
                    }
                    sorted.results.set(index, ended);
                }
            }
        }
        sorted
    }

    /// Tries again the settlements that were refused because their lease is over. If the delivery was
    /// the last attempt of its message, and nobody can have the message, it is still settled.
    /// Otherwise the answer says that it was the last attempt.
    async fn try_last_attempts(
        &self,
        wanted: &[TokenAction],
        results: &mut Results<SettleResult>,
        until: Instant,
    ) {
        let mut expired = Group::default();
        for (index, result) in results.iter() {
            let (token, action) = &wanted[index];
            if let Err(refused) = result
                && refused.reason() == Reason::LeaseExpired
                && let Ok((claims, _)) = self.open(token, &mut Subkey::default())
            {
                let action = action.clone();
                expired.push(index, OpenedToken { claims, action, by: None });
            }
        }
        if expired.is_empty() {
            return;
        }
        let (indices, tokens) = expired.into_parts();
        let consumers: Vec<_> = tokens.iter().map(MeteredToken::of::<B>).collect();
        let settled = late::settle(&self.replica.lessor, tokens, until).await;
        let clocks = ClockPair::read();
        for ((index, result), consumer) in indices.into_iter().zip(settled).zip(consumers) {
            if let Some(result) = result {
                consumer.count(&self.replica.lessor, &result);
                results.replace(index, outcome(result, clocks));
            }
        }
    }

    /// Counts what a table has refused. It may not know the consumer any more, and the token does.
    fn count_refusals(&self, wanted: &[TokenAction], results: &Results<SettleResult>) {
        for (index, result) in results.iter() {
            let Some(refusal) = metered::refusal(result) else { continue };
            let (token, action) = &wanted[index];
            if let Ok((claims, _)) = self.open(token, &mut Subkey::default()) {
                let (action, by) = (action.clone(), None);
                let token = OpenedToken { claims, action, by };
                MeteredToken::of::<B>(&token).count_as(&self.replica.lessor, refusal);
            }
        }
    }

    /// Logs a refusal, by the ack subject of the delivery if that is known.
    fn log_refusal(
        &self,
        call: &AuditedCall<'_>,
        settler: &Settler,
        subject: Option<Cow<'_, str>>,
        refused: &ApiError,
    ) {
        let ack = subject.map(|subject| AckSubject(subject.into_owned().into()));
        let consumer = ack.and_then(|ack| B::delivery_of(&ack)).map(|(name, _)| name);
        let principal = settler.caller().principal.as_deref();
        let caller = RefusedCaller { consumer, principal, worker: "" };
        self.refusals.token_refused(call.method, &caller, refused);
    }

    /// Answers a request of another replica. `None`: the request is not answered.
    pub(super) async fn answer(&self, asked: Nonce, request: &[u8]) -> Option<Vec<u8>> {
        let request = pb::SettleRequest::decode(request).ok()?;
        let passed_on: Option<Nonce> = request.passed_on.as_ref().try_into().ok();
        if passed_on.is_some_and(|first| !self.replica.channel.is_new(first)) {
            return None;
        }
        let _span = self.traces.forwarded(&request.span, request.leases.len());
        let confirmation = wire::read_confirmation(request.confirmation)?;
        // A tenth is left for the way back, so that the sender still waits for the answer.
        let until = clock::now() + Duration::from_millis(request.budget) * 9 / 10;
        let guard = timeout_at(until.into(), self.replica.ownership.guard()).await.ok()?;
        let owner = InstanceId(request.owner.as_ref().try_into().ok()?);
        let by = wire::read_principal(&request);
        let refused =
            wire::names_no_principal(&request) && !self.replica.peers.everybody_may_settle();
        let count = request.leases.len().min(request.settlements.len());
        let (mut results, mut local) = (Results::new(count), Group::default());
        for (index, lease) in request.leases.iter().take(count).enumerate() {
            let location = guard.locate(owner, LeaseId::new(*lease)?);
            if let LeaseLocation::Remote(receiver) = location
                && receiver != owner
            {
                drop(guard);
                let request = wire::pass_on(request, passed_on.unwrap_or(asked));
                return self.replica.ask_to_settle(receiver, &request, until).await.ok();
            }
            let action = match wire::read_action(index, &request) {
                Ok(action) => action,
                Err(refused) => {
                    results.set(index, Err(refused));
                    continue;
                }
            };
            match location {
                LeaseLocation::Local(_) if refused => {
                    results.set(index, Err(wire::unnamed_principal()));
                }
                LeaseLocation::Local(lease) => {
                    local.push(index, SettleItem { lease, action, by: by.clone() });
                }
                LeaseLocation::Ended(refusal) => {
                    results.set(index, ownership::ended(&action, refusal))
                }
                // Until a moment ago it may have been in the lease table of this replica.
                LeaseLocation::Remote(_) => {
                    results.set(index, Err(ApiError::OwnerUnreachable { maybe_applied: false }));
                }
            }
        }
        let (indices, items) = local.into_parts();
        let settled = self.replica.lessor.settle(items, confirmation, until).await;
        drop(guard);
        let clocks = ClockPair::read();
        results.set_all(indices, settled.into_iter().map(|result| outcome(result, clocks)));
        Some(wire::response(results.into_vec()))
    }

    /// The claims of a token of this cluster, and the number of its lease.
    fn open(
        &self,
        token: &str,
        subkey: &mut Subkey,
    ) -> Result<(Claims<'static>, LeaseId), ApiError> {
        if token.is_empty() {
            return Err(ApiError::Field { field: "token".into(), why: "must be set".into() });
        }
        let claims =
            self.replica.keys.sealer().open(token, subkey).map_err(|error| match error {
                OpenError::Invalid => ApiError::TokenInvalid,
                OpenError::KeyUnknown => ApiError::KeyUnknown,
            })?;
        let lease = LeaseId::new(claims.lease).ok_or(ApiError::TokenInvalid)?;
        Ok((claims, lease))
    }

    /// Settles tokens of one other owner, in order, by asking the replica that answers for `at`. Returns the way
    /// that they went, too.
    async fn settle_remote(
        &self,
        (owner, at): (InstanceId, InstanceId),
        call: Option<&TracedSpan>,
        tokens: Vec<OpenedToken>,
        confirmation: Confirmation,
        until: Instant,
    ) -> (Vec<SettleResult>, SettleWay) {
        let (mut results, mut way) = (Vec::with_capacity(tokens.len()), SettleWay::Forwarded);
        let max_lease = self.replica.lessor.max_lease();
        let routes = self.replica.lessor.metrics().routes();
        for tokens in wire::chunks(tokens) {
            let left = until.saturating_duration_since(clock::now());
            // The rest is for settling without the owner.
            let patience = left * 3 / 5;
            let span = call.and_then(|call| call.forward(&at.to_string(), tokens.len()));
            let parent = span.as_ref().map(TracedSpan::to_bytes);
            let request =
                wire::settle_request(owner, &tokens, confirmation, patience, max_lease, parent);
            let asked_at = clock::now();
            let answer = self.replica.ask_to_settle(at, &request, asked_at + patience).await;
            metered::forwarded(routes, &answer, tokens.len(), asked_at);
            match answer.and_then(|answer| wire::read_response(&answer, tokens.len())) {
                Ok(answers) => results.extend(answers),
                Err(why) => {
                    span.iter().for_each(|span| span.failed(why.name()));
                    drop(span);
                    way = SettleWay::Ownerless;
                    results.extend(self.settle_without_owner(why, tokens, until).await);
                }
            }
        }
        (results, way)
    }

    /// Settles each of these tokens for which that is safe without the owner.
    async fn settle_without_owner(
        &self,
        why: Unanswered,
        tokens: Vec<OpenedToken>,
        until: Instant,
    ) -> Vec<SettleResult> {
        let (mut results, mut ownerless) = (Results::new(tokens.len()), Group::default());
        for (index, OpenedToken { claims, action, by }) in tokens.into_iter().enumerate() {
            let left = Duration::from_millis(claims.settle_by).saturating_sub(clock::unix_time());
            let is_final = matches!(action, Action::Ack | Action::Term(_));
            match why {
                Unanswered::Unsent => {
                    let error = Error::Unavailable("there is no connection".to_owned());
                    results.set(index, Err(error.into()));
                }
                // The owner may still have a lease that was extended, or may have done the action.
                Unanswered::Silent if !is_final || left.is_zero() => {
                    results.set(index, Err(ApiError::OwnerUnreachable { maybe_applied: true }));
                }
                Unanswered::Silent | Unanswered::Nobody => {
                    ownerless.push(index, OpenedToken { claims, action, by });
                }
            }
        }
        let (indices, ownerless) = ownerless.into_parts();
        let consumers: Vec<_> = ownerless.iter().map(MeteredToken::of::<B>).collect();
        let Replica { lessor, peers, .. } = &*self.replica;
        lessor.metrics().routes().routed(SettlementRoute::Orphan, ownerless.len());
        let settled = ownerless::settle(lessor, peers, ownerless, until).await;
        for (consumer, result) in consumers.iter().zip(&settled) {
            result.iter().for_each(|result| consumer.count(lessor, result));
        }
        let clocks = ClockPair::read();
        let settled = settled.into_iter().map(|result| match (why, result) {
            (_, Some(result @ (Ok(_) | Err(Error::Unconfirmed)))) => outcome(result, clocks),
            // The owner may have done what could not be done here.
            (Unanswered::Silent, _) => Err(ApiError::OwnerUnreachable { maybe_applied: true }),
            (_, Some(result)) => outcome(result, clocks),
            (_, None) => Err(ApiError::OwnerUnreachable { maybe_applied: false }),
        });
        results.set_all(indices, settled);
        results.into_vec()
    }
}

fn outcome(result: Result<Settled, Error>, clocks: ClockPair) -> SettleResult {
    result.map(|settled| SettleOutcome::new(settled, clocks)).map_err(ApiError::from)
}
