//! Settles each token where its lease is: in our own table, at the replica that owns it, or, where
//! that one does not answer, without it. Owns the way there and back; decides nothing about leases.
//!
//! ```text
//!  token ─▶ owner is us ──────────────▶ our table
//!        └▶ owner is another ─ asked ─▶ its table, the same answer
//!                └ nobody there, or silent ─▶ straight to JetStream, while that is safe
//! ```

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::future::{join, join_all};
use prost::Message as _;

use super::{
    decode,
    encode::{self, Clocks, Done},
    status::Refused,
};
use crate::{
    broker::{Broker, Confirmation},
    bus::Bus,
    clock,
    keys::Keys,
    lease::LeaseId,
    lessor::{Action, Ask, Error, Lessor, Settled},
    pb::{self, peer::v1 as wire},
    peer::{Orphan, Peers, Unanswered},
    token::{Claims, InstanceId, OpenError},
};

/// Most bytes of settlements in one question: well below the smallest payload limit in use.
const LARGEST_QUESTION: usize = 48 * 1024;

/// One token, and what to do with it.
pub(super) type Wanted = (String, Action);

/// What came of it.
pub(super) type Settlement = Result<Done, Refused>;

/// The way to every lease.
pub struct Router<B: Broker + Bus> {
    lessor: Lessor<B>,
    peers: Arc<Peers<B>>,
    keys: Arc<Keys>,
    max_lease: Duration,
}

/// A token of another replica.
struct Away {
    place: usize,
    token: String,
    claims: Claims<'static>,
    action: Action,
}

impl<B: Broker + Bus> Router<B> {
    /// A router beside these peers; leases may be extended by `max_lease` at most.
    pub fn new(
        lessor: Lessor<B>,
        peers: Arc<Peers<B>>,
        keys: Arc<Keys>,
        max_lease: Duration,
    ) -> Self {
        Self { lessor, peers, keys, max_lease }
    }

    /// Settles all, wherever their leases are: one result each, in order.
    pub(super) async fn settle(
        &self,
        wanted: Vec<Wanted>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<Settlement> {
        let until = until.min(clock::now() + self.lessor.settle_timeout());
        let mut results = Vec::with_capacity(wanted.len());
        let mut here = (Vec::new(), Vec::new());
        let mut away: BTreeMap<InstanceId, Vec<Away>> = BTreeMap::new();
        for (place, (token, action)) in wanted.into_iter().enumerate() {
            results.push(Err(Refused::TokenInvalid));
            match self.open(&token) {
                Err(refused) => results[place] = Err(refused),
                Ok(claims) if self.peers.is_ours(claims.owner) => {
                    if let Some(lease) = LeaseId::new(claims.lease) {
                        here.0.push(place);
                        here.1.push(Ask { lease, action });
                    }
                }
                Ok(claims) => away.entry(claims.owner).or_default().push(Away {
                    place,
                    token,
                    claims,
                    action,
                }),
            }
        }
        let (places, asks) = here;
        let local = self.lessor.settle(asks, confirmation, until);
        let elsewhere = away
            .into_iter()
            .map(|(owner, tokens)| self.settle_away(owner, tokens, confirmation, until));
        let (local, elsewhere) = join(local, join_all(elsewhere)).await;
        let clocks = Clocks::read();
        for (place, result) in places.into_iter().zip(local) {
            results[place] = done(result, clocks);
        }
        for (place, result) in elsewhere.into_iter().flatten() {
            results[place] = result;
        }
        results
    }

    /// Answers what another replica asks of us.
    pub async fn answer(self: Arc<Self>, question: Vec<u8>) -> Option<Vec<u8>> {
        let question = wire::SettleRequest::decode(&*question).ok()?;
        let confirmation = decode::confirmation(question.confirmation).ok()?;
        // So that the answer is back before nobody waits for it.
        let until = clock::now() + Duration::from_millis(question.budget) * 9 / 10;
        let wanted = question.settlements.into_iter().enumerate();
        let (mut places, mut asks, mut results) = (Vec::new(), Vec::new(), Vec::new());
        for (place, one) in wanted {
            let ours =
                decode::settlement(place, one, self.max_lease).and_then(|(token, action)| {
                    let claims = self.open(&token)?;
                    // It may have been ours until a moment ago.
                    let ours = self.peers.is_ours(claims.owner);
                    let lease = LeaseId::new(claims.lease).filter(|_| ours);
                    Ok(Ask {
                        lease: lease.ok_or(Refused::OwnerUnreachable { maybe: false })?,
                        action,
                    })
                });
            results.push(ours.map(|ask| {
                places.push(place);
                asks.push(ask);
                Done::default()
            }));
        }
        let settled = self.lessor.settle(asks, confirmation, until).await;
        let clocks = Clocks::read();
        for (place, result) in places.into_iter().zip(settled) {
            results[place] = done(result, clocks);
        }
        let results = results.into_iter().map(encode::settle_result).collect();
        Some(wire::SettleResponse { results }.encode_to_vec())
    }

    /// What a token says, if it is one of this cluster.
    fn open(&self, token: &str) -> Result<Claims<'static>, Refused> {
        if token.is_empty() {
            return Err(Refused::Field { field: "token".into(), why: "must be set".into() });
        }
        self.keys.sealer().open(token).map_err(|error| match error {
            OpenError::Invalid => Refused::TokenInvalid,
            OpenError::KeyUnknown => Refused::KeyUnknown,
        })
    }

    /// Settles tokens of one other replica, in their order.
    async fn settle_away(
        &self,
        owner: InstanceId,
        tokens: Vec<Away>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<(usize, Settlement)> {
        let mut results = Vec::with_capacity(tokens.len());
        for question in questions(tokens) {
            let left = until.saturating_duration_since(clock::now());
            // What is left is for doing without the owner.
            let patience = left * 3 / 5;
            let asked = wire::SettleRequest {
                settlements: question.iter().map(encode_away).collect(),
                confirmation: encode::confirmation(confirmation).into(),
                budget: u64::try_from(patience.as_millis()).unwrap_or(u64::MAX),
            };
            let until_then = clock::now() + patience;
            let answer = self.peers.ask(owner, &asked.encode_to_vec(), until_then).await;
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
        tokens: Vec<Away>,
        until: Instant,
    ) -> Vec<(usize, Settlement)> {
        let (mut results, mut places, mut orphans) = (Vec::new(), Vec::new(), Vec::new());
        for Away { place, claims, action, .. } in tokens {
            let left = Duration::from_millis(claims.settle_by).saturating_sub(clock::unix_time());
            let final_word = matches!(action, Action::Ack | Action::Term(_));
            match why {
                Unanswered::Unsent => {
                    let error = Error::Unavailable("the connection to NATS is lost".to_owned());
                    results.push((place, Err(error.into())));
                }
                // It may have a lease still that was extended, or have done what was asked.
                Unanswered::Silent if !final_word || left.is_zero() => {
                    results.push((place, Err(Refused::OwnerUnreachable { maybe: true })));
                }
                Unanswered::Silent | Unanswered::Nobody => {
                    places.push(place);
                    orphans.push(Orphan { claims, action });
                }
            }
        }
        let settled = self.peers.settle_orphans(orphans, until).await;
        let clocks = Clocks::read();
        let settled = settled.into_iter().map(|result| match result {
            Some(result) => done(result, clocks),
            None => Err(Refused::OwnerUnreachable { maybe: false }),
        });
        results.extend(places.into_iter().zip(settled));
        results
    }
}

/// In pieces that a NATS message can carry.
fn questions(tokens: Vec<Away>) -> Vec<Vec<Away>> {
    let (mut questions, mut question, mut size) = (Vec::new(), Vec::new(), 0);
    for token in tokens {
        let reason = match &token.action {
            Action::Term(reason) => reason.len(),
            Action::Ack | Action::Nak(_) | Action::Extend(_) => 0,
        };
        // The rest is tags, lengths and a duration.
        let length = token.token.len() + reason + 64;
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

fn encode_away(away: &Away) -> pb::Settlement {
    encode::settlement(away.token.clone(), &away.action)
}

/// Another replica's answer, as if it were ours.
fn relayed(answer: &[u8], count: usize) -> Result<Vec<Settlement>, Unanswered> {
    let answer = wire::SettleResponse::decode(answer).map_err(|_| Unanswered::Silent)?;
    if answer.results.len() != count {
        return Err(Unanswered::Silent);
    }
    Ok(answer.results.into_iter().map(encode::relayed).collect())
}

fn done(result: Result<Settled, Error>, clocks: Clocks) -> Settlement {
    result.map(|settled| Done::new(settled, clocks)).map_err(Refused::from)
}
