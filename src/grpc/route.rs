//! Settles each token where its lease is: in our own table, at the replica that owns it, or, where
//! that one does not answer, without it. Owns the way there and back; decides nothing about leases.
//!
//! ```text
//!  token ─▶ owner is us ──────────────▶ our table
//!        └▶ owner is another ─ asked ─▶ its table, the same answer
//!                └ nobody there, or silent ─▶ straight to JetStream, while that is safe
//! ```

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures_util::future::{join, join_all};
use prost::Message as _;
use tokio::time::timeout_at;

use super::{
    decode,
    encode::{self, ClockPair, SettleOutcome},
    refusals::{Refusals, Who},
};
use crate::{
    api_error::ApiError,
    broker::{AckSubject, Broker, Confirmation},
    bus::Bus,
    clock,
    cluster::{LeaseLocation, Nonce, OwnerlessToken, Peers, Unanswered},
    keys::Keys,
    lease::{LeaseError, LeaseId, SettleKind},
    lessor::{Action, Error, Lessor, SettleItem, Settled},
    pb::{self, peer::v1 as wire},
    reason::Reason,
    token::{Claims, InstanceId, OpenError},
};

/// Most bytes of settlements in one question: well below the smallest payload limit in use.
const LARGEST_QUESTION: usize = 48 * 1024;

/// How long an older replica extends a lease, where the caller names no length: it knows only of
/// lengths, and not how long it has granted. As long as JetStream waits unless it is told otherwise.
const FOR_OLDER: Duration = Duration::from_secs(30);

/// One token, and what to do with it.
pub(super) type TokenAction = (String, Action);

/// What came of it.
pub(super) type SettleResult = Result<SettleOutcome, ApiError>;

/// The way to every lease.
pub struct Router<B: Broker + Bus> {
    lessor: Lessor<B>,
    peers: Arc<Peers<B>>,
    keys: Arc<Keys>,
    refusals: Refusals,
}

/// A token of another replica.
struct RemoteToken {
    place: usize,
    claims: Claims<'static>,
    action: Action,
}

impl<B: Broker + Bus> Router<B> {
    /// A router beside these peers.
    pub fn new(lessor: Lessor<B>, peers: Arc<Peers<B>>, keys: Arc<Keys>) -> Self {
        Self { lessor, peers, keys, refusals: Refusals::new() }
    }

    /// What the log has of refusals.
    pub(super) fn refusals(&self) -> &Refusals {
        &self.refusals
    }

    /// Settles all, wherever their leases are: one result each, in order. `call` is the call's name.
    pub(super) async fn settle(
        &self,
        call: &'static str,
        wanted: Vec<TokenAction>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<SettleResult> {
        let until = until.min(clock::now() + self.lessor.settle_timeout());
        let Ok(ownership) = timeout_at(until.into(), self.peers.lock_ownership()).await else {
            return wanted.iter().map(|_| Err(Error::LeaseBusy.into())).collect();
        };
        let mut results = Vec::with_capacity(wanted.len());
        let (mut places, mut asks, mut subjects) = (Vec::new(), Vec::new(), Vec::new());
        let mut away: BTreeMap<(InstanceId, InstanceId), Vec<RemoteToken>> = BTreeMap::new();
        for (place, (token, action)) in wanted.iter().enumerate() {
            let found = self
                .open(token)
                .map(|(claims, lease)| (ownership.whose(claims.owner, lease), claims));
            results.push(match found {
                Err(refused) => {
                    self.refused(call, None, &refused);
                    Err(refused)
                }
                Ok((LeaseLocation::Ended(refusal), claims)) => {
                    let ended = ended(action, refusal);
                    if let Err(refused) = &ended {
                        self.refused(call, Some(claims.ack_subject), refused);
                    }
                    ended
                }
                Ok((LeaseLocation::Ours(lease), claims)) => {
                    places.push(place);
                    subjects.push(claims.ack_subject);
                    asks.push(SettleItem { lease, action: action.clone() });
                    Ok(SettleOutcome::default())
                }
                Ok((LeaseLocation::Elsewhere(at), claims)) => {
                    let away = away.entry((claims.owner, at)).or_default();
                    away.push(RemoteToken { place, claims, action: action.clone() });
                    Ok(SettleOutcome::default())
                }
            });
        }
        let local = async {
            let settled = self.lessor.settle(asks, confirmation, until).await;
            drop(ownership);
            settled
        };
        let elsewhere = away
            .into_iter()
            .map(|((owner, at), tokens)| self.settle_away(owner, at, tokens, confirmation, until));
        let (local, elsewhere) = join(local, join_all(elsewhere)).await;
        let clocks = ClockPair::read();
        for ((place, result), subject) in places.into_iter().zip(local).zip(subjects) {
            results[place] = done(result, clocks);
            if let Err(refused) = &results[place] {
                self.refused(call, Some(subject), refused);
            }
        }
        for (place, result) in elsewhere.into_iter().flatten() {
            if let Err(refused) = &result {
                self.refused(call, None, refused);
            }
            results[place] = result;
        }
        self.look_for_last_attempts(&wanted, &mut results, until).await;
        results
    }

    /// Of what was refused because its lease is over, some may have been the last attempt: that is
    /// applied where nobody can have the message, or answered as what it is.
    async fn look_for_last_attempts(
        &self,
        wanted: &[TokenAction],
        results: &mut [SettleResult],
        until: Instant,
    ) {
        let (mut places, mut late) = (Vec::new(), Vec::new());
        for (place, (token, action)) in wanted.iter().enumerate() {
            let Err(refused) = &results[place] else { continue };
            if refused.reason() == Reason::LeaseExpired
                && let Ok((claims, _)) = self.open(token)
            {
                places.push(place);
                late.push(OwnerlessToken { claims, action: action.clone() });
            }
        }
        if late.is_empty() {
            return;
        }
        let settled = self.peers.settle_late(late, until).await;
        let clocks = ClockPair::read();
        for (place, result) in places.into_iter().zip(settled) {
            if let Some(result) = result {
                results[place] = done(result, clocks);
            }
        }
    }

    /// Tells the log, by the ack subject of the delivery where that is known.
    fn refused(&self, call: &'static str, subject: Option<Cow<'_, str>>, refused: &ApiError) {
        let ack = subject.map(|subject| AckSubject(subject.into_owned().into()));
        let consumer = ack.and_then(|ack| B::delivery_of(&ack)).map(|(name, _)| name);
        self.refusals.see(call, &Who { consumer, worker: "" }, refused);
    }

    /// Answers what another replica asks of us; `asked` is the question's name.
    pub async fn answer(self: Arc<Self>, asked: Nonce, question: Vec<u8>) -> Option<Vec<u8>> {
        let question = wire::SettleRequest::decode(&*question).ok()?;
        let passed_on: Option<Nonce> = question.passed_on.as_ref().try_into().ok();
        if passed_on.is_some_and(|question| !self.peers.is_new(question)) {
            return None;
        }
        let confirmation = decode::confirmation(question.confirmation).ok()?;
        // So that the answer is back before nobody waits for it.
        let until = clock::now() + Duration::from_millis(question.budget) * 9 / 10;
        let ownership = timeout_at(until.into(), self.peers.lock_ownership()).await.ok()?;
        let owner = InstanceId(question.owner.as_ref().try_into().ok()?);
        let (mut places, mut asks, mut results) = (Vec::new(), Vec::new(), Vec::new());
        let pairs = question.leases.iter().zip(&question.settlements);
        for (place, (lease, one)) in pairs.enumerate() {
            let whose = ownership.whose(owner, LeaseId::new(*lease)?);
            if let LeaseLocation::Elsewhere(heir) = whose
                && heir != owner
            {
                drop(ownership);
                let name = passed_on.unwrap_or(asked).to_vec().into();
                let question = wire::SettleRequest { passed_on: name, ..question };
                return self.peers.ask(heir, &question.encode_to_vec(), until).await.ok();
            }
            let wanted = decode::action(place, one.action.clone());
            let wanted = wanted.map(|action| as_asked(action, place, &question.as_granted));
            results.push(match wanted.map(|action| (whose, action)) {
                Err(refused) => Err(refused),
                Ok((LeaseLocation::Ended(refusal), action)) => ended(&action, refusal),
                Ok((LeaseLocation::Ours(lease), action)) => {
                    places.push(place);
                    asks.push(SettleItem { lease, action });
                    Ok(SettleOutcome::default())
                }
                // It may have been ours until a moment ago.
                Ok((LeaseLocation::Elsewhere(_), _)) => {
                    Err(ApiError::OwnerUnreachable { maybe_applied: false })
                }
            });
        }
        let settled = self.lessor.settle(asks, confirmation, until).await;
        drop(ownership);
        let clocks = ClockPair::read();
        for (place, result) in places.into_iter().zip(settled) {
            results[place] = done(result, clocks);
        }
        let results = results.into_iter().map(encode::settle_result).collect();
        Some(wire::SettleResponse { results }.encode_to_vec())
    }

    /// What a token says, if it is one of this cluster, and which lease it names.
    fn open(&self, token: &str) -> Result<(Claims<'static>, LeaseId), ApiError> {
        if token.is_empty() {
            return Err(ApiError::Field { field: "token".into(), why: "must be set".into() });
        }
        let claims = self.keys.sealer().open(token).map_err(|error| match error {
            OpenError::Invalid => ApiError::TokenInvalid,
            OpenError::KeyUnknown => ApiError::KeyUnknown,
        })?;
        let lease = LeaseId::new(claims.lease).ok_or(ApiError::TokenInvalid)?;
        Ok((claims, lease))
    }

    /// Settles tokens of one other replica, in their order, by asking the one that answers `at` this
    /// name.
    async fn settle_away(
        &self,
        owner: InstanceId,
        at: InstanceId,
        tokens: Vec<RemoteToken>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<(usize, SettleResult)> {
        let mut results = Vec::with_capacity(tokens.len());
        let longest = self.lessor.max_lease();
        for question in questions(tokens) {
            let left = until.saturating_duration_since(clock::now());
            // What is left is for doing without the owner.
            let patience = left * 3 / 5;
            let asked = wire::SettleRequest {
                owner: owner.0.to_vec().into(),
                leases: question.iter().map(|away| away.claims.lease).collect(),
                settlements: question.iter().map(|away| put(&away.action, longest)).collect(),
                as_granted: as_granted(&question),
                confirmation: encode::confirmation(confirmation).into(),
                budget: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
                passed_on: Bytes::new(),
            };
            let until_then = clock::now() + patience;
            let answer = self.peers.ask(at, &asked.encode_to_vec(), until_then).await;
            let answer = answer.and_then(|answer| relayed(&answer, question.len()));
            match answer {
                Ok(answers) => {
                    let places = question.into_iter().map(|token| token.place);
                    results.extend(places.zip(answers));
                }
                Err(why) => results.extend(self.settle_without(why, question, until).await),
            }
        }
        results
    }

    /// Settles what can be settled without asking the owner.
    async fn settle_without(
        &self,
        why: Unanswered,
        tokens: Vec<RemoteToken>,
        until: Instant,
    ) -> Vec<(usize, SettleResult)> {
        let (mut results, mut places, mut orphans) = (Vec::new(), Vec::new(), Vec::new());
        for RemoteToken { place, claims, action, .. } in tokens {
            let left = Duration::from_millis(claims.settle_by).saturating_sub(clock::unix_time());
            let final_word = matches!(action, Action::Ack | Action::Term(_));
            match why {
                Unanswered::Unsent => {
                    let error = Error::Unavailable("there is no connection".to_owned());
                    results.push((place, Err(error.into())));
                }
                // It may have a lease still that was extended, or have done what was asked.
                Unanswered::Silent if !final_word || left.is_zero() => {
                    results.push((place, Err(ApiError::OwnerUnreachable { maybe_applied: true })));
                }
                Unanswered::Silent | Unanswered::Nobody => {
                    places.push(place);
                    orphans.push(OwnerlessToken { claims, action });
                }
            }
        }
        let settled = self.peers.settle_ownerless(orphans, until).await;
        let clocks = ClockPair::read();
        let settled = settled.into_iter().map(|result| match (why, result) {
            (_, Some(result @ (Ok(_) | Err(Error::Unconfirmed)))) => done(result, clocks),
            // It may have done before what could not be done here.
            (Unanswered::Silent, _) => Err(ApiError::OwnerUnreachable { maybe_applied: true }),
            (_, Some(result)) => done(result, clocks),
            (_, None) => Err(ApiError::OwnerUnreachable { maybe_applied: false }),
        });
        results.extend(places.into_iter().zip(settled));
        results
    }
}

/// In pieces that a NATS message can carry.
fn questions(tokens: Vec<RemoteToken>) -> Vec<Vec<RemoteToken>> {
    let (mut questions, mut question, mut size) = (Vec::new(), Vec::new(), 0);
    for token in tokens {
        let reason = match &token.action {
            Action::Term(reason) => reason.len(),
            Action::Ack | Action::Nak(_) | Action::Extend(_) => 0,
        };
        // The rest is a number, tags, lengths and a duration; an answer's error is longer.
        let length = reason + 256;
        if size + length > LARGEST_QUESTION && !question.is_empty() {
            questions.push(std::mem::take(&mut question));
            size = 0;
        }
        size += length;
        question.push(token);
    }
    questions.push(question);
    questions
}

/// What to do with one lease, as another replica is asked for it.
fn put(action: &Action, longest: Duration) -> pb::Settlement {
    encode::settlement(action, FOR_OLDER.min(longest))
}

/// Which of these are an Extend without a length.
fn as_granted(question: &[RemoteToken]) -> Vec<u32> {
    let places = (0..).zip(question);
    let unset = places.filter(|(_, away)| away.action == Action::Extend(None));
    unset.map(|(place, _)| place).collect()
}

/// What was asked for at this place of a question: the length of an Extend may be for older replicas.
fn as_asked(action: Action, place: usize, as_granted: &[u32]) -> Action {
    // Ascending, as it is written; where somebody has written it otherwise, the length counts.
    let named = u32::try_from(place).is_ok_and(|place| as_granted.binary_search(&place).is_ok());
    if named && matches!(action, Action::Extend(_)) { Action::Extend(None) } else { action }
}

/// Another replica's answer, as if it were ours.
fn relayed(answer: &[u8], count: usize) -> Result<Vec<SettleResult>, Unanswered> {
    let answer = wire::SettleResponse::decode(answer).map_err(|_| Unanswered::Silent)?;
    if answer.results.len() != count {
        return Err(Unanswered::Silent);
    }
    Ok(answer.results.into_iter().map(encode::relayed).collect())
}

/// A lease that ended at a replica that we answer for, as that one would have said it.
fn ended(action: &Action, refusal: LeaseError) -> SettleResult {
    let kind = match action {
        Action::Ack => Some(SettleKind::Ack),
        Action::Nak(_) => Some(SettleKind::Nak),
        Action::Term(_) => Some(SettleKind::Term),
        Action::Extend(_) => None,
    };
    match refusal {
        LeaseError::Settled { by } if Some(by) == kind => {
            Ok(SettleOutcome { outcome: pb::Outcome::Duplicate, ..SettleOutcome::default() })
        }
        LeaseError::Settled { .. } | LeaseError::Expired { .. } | LeaseError::Busy => {
            Err(Error::from(refusal).into())
        }
    }
}

fn done(result: Result<Settled, Error>, clocks: ClockPair) -> SettleResult {
    result.map(|settled| SettleOutcome::new(settled, clocks)).map_err(ApiError::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn away(action: Action) -> RemoteToken {
        let claims = Claims {
            owner: InstanceId([1; 8]),
            lease: 1,
            settle_by: 0,
            leader: 0,
            created: "".into(),
            ack_subject: "".into(),
            principal: "".into(),
        };
        RemoteToken { place: 0, claims, action }
    }

    #[test]
    fn an_extend_without_a_length_has_one_for_replicas_that_demand_it_and_none_for_the_others() {
        let minute = Duration::from_secs(60);
        let actions = [Action::Ack, Action::Extend(None), Action::Extend(Some(minute))];
        let question: Vec<_> = actions.iter().cloned().map(away).collect();
        let places = as_granted(&question);
        let asked = question.iter().map(|away| put(&away.action, minute)).enumerate();
        for ((place, asked), action) in asked.zip(actions) {
            let older = decode::action(place, asked.action).unwrap();
            let lease = if action == Action::Extend(None) { FOR_OLDER } else { minute };
            assert!(!matches!(older, Action::Extend(length) if length != Some(lease)));
            assert_eq!(as_asked(older, place, &places), action);
        }
        let shorter = put(&Action::Extend(None), minute / 12).action.unwrap();
        assert_eq!(decode::action(0, Some(shorter)).unwrap(), Action::Extend(Some(minute / 12)));
    }
}
