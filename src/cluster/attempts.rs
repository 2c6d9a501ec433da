//! Attempts that another replica knows. A repeated Fetch, or a give-back, often reaches another replica than the first
//! call, because a connection broke. The replica that was called asks all others at once, and only a replica that
//! knows the attempt answers. Decides nothing about leases.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use prost::Message as _;

use super::{
    channel::Unanswered,
    handover::{read_caller, sent_caller},
    heartbeat::{instance, instance_bytes},
    replica::Replica,
};
use crate::{
    broker::{AckSubject, Broker, ConsumerName, Leader},
    bus::Bus,
    clock,
    lease::LeaseId,
    lessor::{AttemptFound, AttemptKey, Error, FetchCaller, LentLease},
    pb::peer::v1::{self as pb, attempt_request::Action},
    token::InstanceId,
};

/// The wait for the answers of other replicas.
const ATTEMPT_PATIENCE: Duration = Duration::from_millis(200);

/// The attempt of a call, as its caller names it.
#[derive(Debug, Clone)]
pub struct NamedAttempt {
    /// The principal of the caller.
    pub principal: Arc<str>,
    /// The consumer.
    pub name: ConsumerName,
    /// The name that the caller has given.
    pub attempt: Box<str>,
}

impl NamedAttempt {
    /// Its key.
    pub fn key(&self) -> AttemptKey {
        AttemptKey::new(&self.principal, &self.name, &self.attempt)
    }

    fn request(&self, us: InstanceId, action: Action) -> Vec<u8> {
        pb::AttemptRequest {
            sender: instance_bytes(&us),
            principal: self.principal.to_string(),
            stream: self.name.stream.to_string(),
            consumer: self.name.consumer.to_string(),
            attempt: self.attempt.to_string(),
            action: Some(action),
        }
        .encode_to_vec()
    }
}

/// An attempt as another replica knows it.
#[derive(Debug)]
pub enum AttemptElsewhere {
    /// These leases of this owner were lent anew.
    Lent(InstanceId, Vec<LentLease>),
    /// It is over.
    Over,
    /// It had a call that waited, and that call has ended. Nothing is leased.
    Waited,
}

/// Asks the other replicas to lend the leases of an attempt anew. `None`: no replica has answered, by `until` at the
/// latest.
pub(super) async fn find<B: Broker + Bus>(
    replica: &Replica<B>,
    attempt: &NamedAttempt,
    lease: Option<Duration>,
    caller: &FetchCaller,
    until: Option<Instant>,
) -> Option<AttemptElsewhere> {
    let lease = lease.map(micros);
    let lend = pb::LendAgain { lease, caller: Some(sent_caller(caller)) };
    let (asked_at, answer) = ask(replica, attempt, Action::Lend(lend), until).await?;
    let owner = instance(&answer.owner)?;
    if answer.over {
        return Some(AttemptElsewhere::Over);
    }
    // The times were counted after that, so each lease ends a little later than this.
    let end = |left: u64| asked_at + Duration::from_micros(left);
    let lent = |lease: pb::LentLease| {
        Some(LentLease::elsewhere(
            (LeaseId::new(lease.lease)?, AckSubject(lease.ack_subject.into()), lease.headers_only),
            (end(lease.deadline), end(lease.settle_by)),
            (Leader(lease.leader), lease.created.into()),
        ))
    };
    let lent: Vec<LentLease> = answer.leases.into_iter().filter_map(lent).collect();
    let waited = lent.is_empty();
    Some(if waited { AttemptElsewhere::Waited } else { AttemptElsewhere::Lent(owner, lent) })
}

/// Gives the attempt back at all other replicas. Returns how many messages a replica has given back.
///
/// # Errors
/// The replica that has the messages cannot give them back now.
pub(super) async fn give_back<B: Broker + Bus>(
    replica: &Replica<B>,
    attempt: &NamedAttempt,
) -> Result<usize, Error> {
    let answer = ask(replica, attempt, Action::GiveBack(pb::GiveBack {}), None).await;
    let Some((_, pb::AttemptAnswer { given_back, failed, .. })) = answer else { return Ok(0) };
    if failed.is_empty() {
        Ok(usize::try_from(given_back).unwrap_or(usize::MAX))
    } else {
        Err(Error::Unavailable(failed))
    }
}

/// The first answer, and when the question was asked.
async fn ask<B: Broker + Bus>(
    replica: &Replica<B>,
    attempt: &NamedAttempt,
    action: Action,
    until: Option<Instant>,
) -> Option<(Instant, pb::AttemptAnswer)> {
    let asked_at = clock::now();
    let patience = asked_at + ATTEMPT_PATIENCE;
    let until = until.map_or(patience, |until| until.min(patience));
    if replica.others(until).await.is_empty() {
        return None;
    }
    let request = attempt.request(replica.us, action);
    let answer: Result<Vec<u8>, Unanswered> = replica.channel.ask_all(&request, until).await;
    Some((asked_at, pb::AttemptAnswer::decode(&*answer.ok()?).ok()?))
}

/// Answers another replica. `None`: nothing is known here.
pub(super) async fn answer<B: Broker + Bus>(
    replica: &Replica<B>,
    request: &[u8],
) -> Option<Vec<u8>> {
    let request = pb::AttemptRequest::decode(request).ok()?;
    // This replica listens to its own questions, too.
    if instance(&request.sender)? == replica.us {
        return None;
    }
    let (stream, consumer) = (request.stream.into(), request.consumer.into());
    let name = ConsumerName { stream, consumer };
    let key = AttemptKey::new(&request.principal, &name, &request.attempt);
    let owner = instance_bytes(&replica.us);
    let mut answer = pb::AttemptAnswer { owner, ..pb::AttemptAnswer::default() };
    match request.action? {
        Action::Lend(pb::LendAgain { lease, caller }) => {
            match replica.lessor.find_attempt(key)? {
                AttemptFound::Waited => {}
                AttemptFound::Over => answer.over = true,
                AttemptFound::Again(attempt) => {
                    let lease = lease.map(Duration::from_micros);
                    let caller = Arc::new(read_caller(&caller.unwrap_or_default()));
                    // Leases that are being handed over are not lent.
                    let lent = replica.lessor.lend_again(&attempt, lease, &caller).ok()?;
                    answer.over = lent.is_empty();
                    answer.leases = lent.into_iter().map(sent).collect();
                }
            }
        }
        Action::GiveBack(pb::GiveBack {}) => {
            let until = clock::now() + replica.lessor.settle_timeout();
            match replica.lessor.give_back_attempt(&name, key, until).await {
                Ok(count) => answer.given_back = count? as u64,
                Err(error) => answer.failed = error.to_string(),
            }
        }
    }
    Some(answer.encode_to_vec())
}

fn sent(lease: LentLease) -> pb::LentLease {
    let now = clock::now();
    let left = |end: Instant| micros(end.saturating_duration_since(now));
    pb::LentLease {
        lease: lease.id.get(),
        ack_subject: lease.ack.0.into(),
        headers_only: lease.headers_only,
        deadline: left(lease.deadline),
        settle_by: left(lease.settle_by),
        created: lease.created.to_string(),
        leader: lease.leader.0,
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
