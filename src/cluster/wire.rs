//! Requests to settle at another replica, and their answers, as they are on the wire. The results of the
//! contract's own Settle are written here too, because replicas answer with the messages of the contract.
//! Decides nothing.
//!
//! The replica that the client called has checked all fields. So the limits of the contract are not
//! checked again here, only whether a message can be understood.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use prost::Message as _;
use prost_types::{Duration as PbDuration, Timestamp};

use super::channel::Unanswered;
use crate::{
    api_error::ApiError,
    broker::Confirmation,
    clock::ClockPair,
    lessor::{Action, Settled},
    pb::{
        self,
        peer::v1::{SettleRequest, SettleResponse},
        time::{duration, timestamp, to_duration},
    },
    reason::Reason,
    token::{Claims, InstanceId, Nonce},
    traces::SpanBytes,
};

/// Most bytes of settlements in one request: well below the smallest payload limit of NATS in use.
const MAX_SETTLE_REQUEST_BYTES: usize = 48 * 1024;
/// Bytes of one settlement besides the reason of a Term: a number, tags, lengths and a duration. The
/// error in its answer is longer, and counts here.
const SETTLEMENT_BYTES: usize = 256;
/// How long an older replica extends a lease if the caller gives no length. An older replica knows only
/// extensions with a length, and not the length that was granted. This is the default ack wait of
/// JetStream.
const EXTENSION_FOR_OLDER: Duration = Duration::from_secs(30);

/// A token that was opened, and the action on its lease.
#[derive(Debug)]
pub struct OpenedToken {
    /// The content of the token.
    pub claims: Claims<'static>,
    /// The action that its holder asks for.
    pub action: Action,
    /// The principal that the lease must belong to. `None`: any.
    pub by: Option<Arc<str>>,
}

/// The result of one settlement.
pub type SettleResult = Result<SettleOutcome, ApiError>;

/// The outcome of a settlement that succeeded, in the types of the contract.
#[derive(Debug, Clone, PartialEq)]
pub struct SettleOutcome {
    /// The effect of the settlement.
    pub outcome: pb::Outcome,
    /// When a message is delivered again, by the wall clock, after a Nak.
    pub redeliver_time: Option<Timestamp>,
    /// When a lease ends, by the wall clock, after an Extend.
    pub lease_expire_time: Option<Timestamp>,
    /// How long a lease lasts still, after an Extend.
    pub lease: Option<PbDuration>,
}

impl SettleOutcome {
    /// The lease was settled before, in the same way.
    pub(super) fn duplicate() -> Self {
        let (redeliver_time, lease_expire_time, lease) = (None, None, None);
        Self { outcome: pb::Outcome::Duplicate, redeliver_time, lease_expire_time, lease }
    }

    pub(super) fn new(settled: Settled, clocks: ClockPair) -> Self {
        match settled {
            Settled::Duplicate => Self::duplicate(),
            Settled::Extended(deadline) => Self {
                outcome: pb::Outcome::Extended,
                lease_expire_time: Some(timestamp(clocks.unix_at(deadline))),
                lease: Some(duration(deadline.saturating_duration_since(clocks.now))),
                ..Self::duplicate()
            },
            Settled::Done { confirmation, redelivered_in } => Self {
                outcome: match confirmation {
                    Confirmation::Confirmed => pb::Outcome::Confirmed,
                    Confirmation::Sent => pb::Outcome::Sent,
                },
                redeliver_time: redelivered_in.map(|delay| timestamp(clocks.unix + delay)),
                ..Self::duplicate()
            },
        }
    }
}

/// One entry of the answer to a Settle.
pub fn settle_result(result: SettleResult) -> pb::SettleResult {
    match result {
        Ok(done) => pb::SettleResult {
            outcome: done.outcome.into(),
            error: None,
            redeliver_time: done.redeliver_time,
            lease_expire_time: done.lease_expire_time,
            lease: done.lease,
        },
        Err(refused) => {
            pb::SettleResult { error: Some(settle_error(&refused)), ..pb::SettleResult::default() }
        }
    }
}

fn settle_error(error: &ApiError) -> pb::SettleError {
    let reason = error.reason();
    pb::SettleError {
        reason: reason.name().to_owned(),
        message: error.message(),
        metadata: error.metadata(),
        retry_delay: reason.retry_after().map(duration),
    }
}

/// One entry of another replica's answer. An outcome or a reason that only a newer replica knows is
/// never treated as a success.
fn read_settle_result(result: pb::SettleResult) -> SettleResult {
    let unknown = ApiError::OwnerUnreachable { maybe_applied: true };
    if let Some(pb::SettleError { reason, message, metadata, .. }) = result.error {
        let known = Reason::ALL.iter().find(|known| known.name() == reason);
        return Err(known.map_or(unknown, |reason| ApiError::Relayed {
            reason: *reason,
            message,
            metadata,
        }));
    }
    let outcome = result.outcome();
    if outcome == pb::Outcome::Unspecified {
        return Err(unknown);
    }
    Ok(SettleOutcome {
        outcome,
        redeliver_time: result.redeliver_time,
        lease_expire_time: result.lease_expire_time,
        lease: result.lease,
    })
}

/// Cuts tokens into the pieces that a NATS message can carry.
pub(super) fn chunks(tokens: Vec<OpenedToken>) -> Vec<Vec<OpenedToken>> {
    let (mut chunks, mut chunk, mut size) = (Vec::new(), Vec::new(), 0);
    for token in tokens {
        let reason = match &token.action {
            Action::Term(reason) => reason.len(),
            Action::Ack | Action::Nak(_) | Action::Extend(_) => 0,
        };
        let length = reason + SETTLEMENT_BYTES;
        if size + length > MAX_SETTLE_REQUEST_BYTES && !chunk.is_empty() {
            chunks.push(std::mem::take(&mut chunk));
            size = 0;
        }
        size += length;
        chunk.push(token);
    }
    chunks.push(chunk);
    chunks
}

/// The request to settle these tokens of one owner. The sender waits for `patience`. An older replica
/// extends a lease without a length by at most `max_lease`. `span` is that of the request.
pub(super) fn settle_request(
    owner: InstanceId,
    tokens: &[OpenedToken],
    confirmation: Confirmation,
    patience: Duration,
    max_lease: Duration,
    span: Option<SpanBytes>,
) -> Vec<u8> {
    let principal = tokens.first().and_then(|token| token.by.as_deref());
    let unset = EXTENSION_FOR_OLDER.min(max_lease);
    let request = SettleRequest {
        owner: Bytes::copy_from_slice(&owner.0),
        leases: tokens.iter().map(|token| token.claims.lease).collect(),
        settlements: tokens.iter().map(|token| settlement(&token.action, unset)).collect(),
        as_granted: as_granted(tokens),
        confirmation: match confirmation {
            Confirmation::Confirmed => pb::Confirmation::Confirmed,
            Confirmation::Sent => pb::Confirmation::Sent,
        }
        .into(),
        budget: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
        passed_on: Bytes::new(),
        // All tokens of a request have the same caller. If one may belong to anybody, all of them may.
        principal: principal.unwrap_or_default().to_owned(),
        any: principal.is_none(),
        span: span.map(|span| Bytes::copy_from_slice(&span)).unwrap_or_default(),
    };
    request.encode_to_vec()
}

/// The principal that the leases of a request must belong to. `None`: any, or [`names_no_principal`].
pub(super) fn read_principal(request: &SettleRequest) -> Option<Arc<str>> {
    let given = !request.any && !request.principal.is_empty();
    given.then(|| Arc::from(&*request.principal))
}

/// Whether a request does not say whose leases it may settle: the version of its sender has no principals, and
/// lets everybody settle.
pub(super) fn names_no_principal(request: &SettleRequest) -> bool {
    !request.any && request.principal.is_empty()
}

/// The refusal of such a request by a replica with a policy.
pub(super) fn unnamed_principal() -> ApiError {
    ApiError::Relayed {
        reason: Reason::NotAllowed,
        message: "the replica that was called has no policy, and the replica of the lease has one"
            .to_owned(),
        metadata: [("detail".to_owned(), "unknown_principal".to_owned())].into(),
    }
}

/// The same request for another replica; `first` identifies the request of the first sender.
pub(super) fn pass_on(request: SettleRequest, first: Nonce) -> Vec<u8> {
    SettleRequest { passed_on: Bytes::copy_from_slice(&first), ..request }.encode_to_vec()
}

/// One settlement for another replica. An Extend without a length gets the length `unset`.
pub(super) fn settlement(action: &Action, unset: Duration) -> pb::Settlement {
    use pb::settlement::Action as Wire;
    let action = match action {
        Action::Ack => Wire::Ack(pb::AckAction {}),
        Action::Nak(delay) => Wire::Nak(pb::NakAction { delay: Some(duration(*delay)) }),
        Action::Term(reason) => Wire::Term(pb::TermAction { reason: reason.clone() }),
        Action::Extend(lease) => {
            Wire::Extend(pb::ExtendAction { lease: Some(duration(lease.unwrap_or(unset))) })
        }
    };
    pb::Settlement { token: String::new(), action: Some(action), number: 0 }
}

/// The indices of each Extend without a length, ascending.
fn as_granted(tokens: &[OpenedToken]) -> Vec<u32> {
    let unset = (0..).zip(tokens).filter(|(_, token)| token.action == Action::Extend(None));
    unset.map(|(index, _)| index).collect()
}

/// The confirmation that another replica asks for. `None`: only a newer replica knows it.
pub(super) fn read_confirmation(value: i32) -> Option<Confirmation> {
    match pb::Confirmation::try_from(value).ok()? {
        pb::Confirmation::Unspecified | pb::Confirmation::Confirmed => {
            Some(Confirmation::Confirmed)
        }
        pb::Confirmation::Sent => Some(Confirmation::Sent),
    }
}

/// The action at this index of a request.
///
/// # Errors
/// The field that cannot be understood.
pub(super) fn read_action(index: usize, request: &SettleRequest) -> Result<Action, ApiError> {
    use pb::settlement::Action as Wire;
    let refuse = |field: &str, why: &str| ApiError::Field {
        field: format!("settlements[{index}].{field}"),
        why: why.to_owned(),
    };
    let length = |field: &str, value: Option<PbDuration>| {
        let length = value.map(|value| to_duration(&value));
        let bad = || refuse(field, "must be a duration, and not negative");
        length.map(|length| length.ok_or_else(bad)).transpose()
    };
    let action = request.settlements.get(index).and_then(|settlement| settlement.action.clone());
    match action {
        None => Err(refuse("action", "must be one of ack, nak, term and extend")),
        Some(Wire::Ack(pb::AckAction {})) => Ok(Action::Ack),
        Some(Wire::Nak(nak)) => {
            Ok(Action::Nak(length("nak.delay", nak.delay)?.unwrap_or_default()))
        }
        Some(Wire::Term(term)) => Ok(Action::Term(term.reason)),
        // The length is for older replicas only.
        Some(Wire::Extend(_)) if is_as_granted(index, request) => Ok(Action::Extend(None)),
        Some(Wire::Extend(extend)) => Ok(Action::Extend(length("extend.lease", extend.lease)?)),
    }
}

/// The list is ascending. If a replica sends another order, the length counts.
fn is_as_granted(index: usize, request: &SettleRequest) -> bool {
    u32::try_from(index).is_ok_and(|index| request.as_granted.binary_search(&index).is_ok())
}

/// The answer to a request.
pub(super) fn response(results: Vec<SettleResult>) -> Vec<u8> {
    let results = results.into_iter().map(settle_result).collect();
    SettleResponse { results }.encode_to_vec()
}

/// The results in an answer for `count` settlements.
///
/// # Errors
/// An answer that cannot be understood is no answer.
pub(super) fn read_response(answer: &[u8], count: usize) -> Result<Vec<SettleResult>, Unanswered> {
    let answer = SettleResponse::decode(answer).map_err(|_| Unanswered::Silent)?;
    if answer.results.len() != count {
        return Err(Unanswered::Silent);
    }
    Ok(answer.results.into_iter().map(read_settle_result).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token(action: Action) -> OpenedToken {
        let claims = Claims {
            owner: InstanceId([1; 8]),
            lease: 1,
            settle_by: 0,
            leader: 0,
            created: "".into(),
            ack_subject: "".into(),
            principal: "".into(),
            span: None,
        };
        OpenedToken { claims, action, by: None }
    }

    fn sent(actions: &[Action], max_lease: Duration) -> SettleRequest {
        let tokens: Vec<_> = actions.iter().cloned().map(token).collect();
        let (confirmation, patience) = (Confirmation::Confirmed, Duration::from_secs(1));
        let request =
            settle_request(InstanceId([1; 8]), &tokens, confirmation, patience, max_lease, None);
        SettleRequest::decode(&*request).unwrap()
    }

    #[test]
    fn an_extend_without_a_length_has_a_length_for_older_replicas_only() {
        let minute = Duration::from_secs(60);
        let actions = [Action::Ack, Action::Extend(None), Action::Extend(Some(minute))];
        let newer = sent(&actions, minute);
        let older = SettleRequest { as_granted: Vec::new(), ..newer.clone() };
        for (index, action) in actions.iter().enumerate() {
            assert_eq!(read_action(index, &newer).as_ref(), Ok(action));
            let unset = *action == Action::Extend(None);
            let length =
                if unset { Action::Extend(Some(EXTENSION_FOR_OLDER)) } else { action.clone() };
            assert_eq!(read_action(index, &older), Ok(length));
        }
        let short = sent(&[Action::Extend(None)], minute / 12);
        let short = SettleRequest { as_granted: Vec::new(), ..short };
        assert_eq!(read_action(0, &short), Ok(Action::Extend(Some(minute / 12))));
    }

    #[test]
    fn a_request_carries_each_action_and_its_confirmation() {
        let actions = [
            Action::Ack,
            Action::Nak(Duration::from_millis(1500)),
            Action::Term("why".to_owned()),
            Action::Extend(Some(Duration::from_secs(9))),
        ];
        let request = sent(&actions, Duration::from_secs(60));
        let read = (0..actions.len()).map(|index| read_action(index, &request).unwrap());
        assert_eq!(read.collect::<Vec<_>>(), actions);
        assert_eq!(read_confirmation(request.confirmation), Some(Confirmation::Confirmed));
        assert_eq!(read_confirmation(7), None);
        assert!(matches!(read_action(4, &request), Err(ApiError::Field { .. })));
    }

    #[test]
    fn request_names_the_principal_or_says_that_any_will_do() {
        for (by, principal, any) in [(Some("orders"), "orders", false), (None, "", true)] {
            let tokens = [OpenedToken { by: by.map(Arc::from), ..token(Action::Ack) }];
            let (owner, time) = (InstanceId([1; 8]), Duration::from_secs(1));
            let request = settle_request(owner, &tokens, Confirmation::Confirmed, time, time, None);
            let request = SettleRequest::decode(&*request).unwrap();
            assert_eq!((&*request.principal, request.any), (principal, any));
            assert_eq!(read_principal(&request).as_deref(), by);
        }
        let older = SettleRequest::default();
        assert!(names_no_principal(&older) && read_principal(&older).is_none());
    }

    #[test]
    fn a_malformed_duration_is_refused_by_its_field() {
        let delay = Some(PbDuration { seconds: -1, nanos: 0 });
        let nak = pb::settlement::Action::Nak(pb::NakAction { delay });
        let settlements =
            vec![pb::Settlement { number: 0, token: String::new(), action: Some(nak) }];
        let refused = read_action(0, &SettleRequest { settlements, ..SettleRequest::default() });
        let Err(ApiError::Field { field, .. }) = refused else { panic!("{refused:?}") };
        assert_eq!(field, "settlements[0].nak.delay");
    }

    #[test]
    fn a_result_that_only_a_newer_replica_knows_is_no_success() {
        let unknown = Err(ApiError::OwnerUnreachable { maybe_applied: true });
        for outcome in [0, 99] {
            let newer = pb::SettleResult { outcome, ..pb::SettleResult::default() };
            assert_eq!(read_settle_result(newer), unknown);
        }
        let error = pb::SettleError { reason: "NEWER".to_owned(), ..pb::SettleError::default() };
        let newer = pb::SettleResult { error: Some(error), ..pb::SettleResult::default() };
        assert_eq!(read_settle_result(newer), unknown);
    }

    #[test]
    fn a_result_reads_back_as_it_was_written() {
        let relayed = ApiError::Relayed {
            reason: Reason::LeaseSettled,
            message: "settled before".to_owned(),
            metadata: [("settled_as".to_owned(), "ACK".to_owned())].into(),
        };
        for result in [Ok(SettleOutcome::duplicate()), Err(relayed)] {
            let answer = response(vec![result.clone()]);
            assert_eq!(read_response(&answer, 1), Ok(vec![result]));
            assert_eq!(read_response(&answer, 2), Err(Unanswered::Silent));
        }
    }

    #[test]
    fn many_tokens_are_cut_into_several_requests() {
        let tokens = (0..1000).map(|_| token(Action::Term("x".repeat(1024)))).collect();
        let chunks = chunks(tokens);
        assert_eq!(chunks.iter().map(Vec::len).sum::<usize>(), 1000);
        assert!(
            chunks.iter().all(|chunk| chunk.len() * 1280 <= MAX_SETTLE_REQUEST_BYTES),
            "too large"
        );
    }
}
