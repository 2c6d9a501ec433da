//! Settles tokens whose owner does not answer. The owner may be dead, or may live and be cut off. So
//! nothing here may shorten a lease that the owner still keeps:
//!
//! ```text
//!                until settle_by                                       after it
//!  Ack, Term     straight to JetStream, confirmed; not applied if      LEASE_EXPIRED
//!                another server leads the consumer now, or if that
//!                cannot be seen
//!  Nak           not sent: JetStream redelivers by itself              LEASE_EXPIRED
//!  Extend        not applied                                           LEASE_EXPIRED
//! ```
//! `settle_by` is the earlier of the first end of the lease and the end of the ack wait. A lease that lives as long as a
//! stream can end after its grace. Before that time nobody else can have the message, unless another server led the consumer. It is a time of day
//! by the clock of the owner. If that clock is known to differ from the clock here, nothing is applied.
//! Decides by the token and by the consumer as it is now; knows no lease.

use std::{collections::HashMap, time::Instant};

use super::{
    peers::{Peers, TimeLeft},
    wire::OpenedToken,
};
use crate::{
    broker::{
        AckKind, AckPublish, AckSubject, Broker, Confirmation, ConsumerInfo, ConsumerName,
        InfoError,
    },
    clock,
    lease::MAX_MARGIN,
    lessor::{Action, Error, Group, Lessor, Results, Settled},
    token::Claims,
};

/// The result for one token. `None`: not without the lease.
type Answer = Option<Result<Settled, Error>>;

/// The consumer as it is now.
type CurrentInfo = Result<ConsumerInfo, Error>;

enum Decision {
    /// `None`: not without the owner.
    Answer(Answer),
    Publish(AckPublish),
}

/// Settles each token for which that is safe without the owner: one result each, in order. `None`: only
/// the owner can settle it, and it was not applied.
pub(super) async fn settle<B: Broker>(
    lessor: &Lessor<B>,
    peers: &Peers,
    tokens: Vec<OpenedToken>,
    until: Instant,
) -> Vec<Answer> {
    let mut consumers: HashMap<ConsumerName, CurrentInfo> = HashMap::new();
    let (mut results, mut publishes) = (Results::new(tokens.len()), Group::default());
    for (index, token) in tokens.into_iter().enumerate() {
        match decide(lessor, peers, token, until, &mut consumers).await {
            Decision::Answer(answer) => results.set(index, answer),
            Decision::Publish(publish) => publishes.push(index, publish),
        }
    }
    publish(lessor, publishes, until, &mut results).await;
    results.into_vec()
}

/// Publishes straight to JetStream, and puts each outcome into its place in `results`.
pub(super) async fn publish<B: Broker>(
    lessor: &Lessor<B>,
    publishes: Group<AckPublish>,
    until: Instant,
    results: &mut Results<Answer>,
) {
    if publishes.is_empty() {
        return;
    }
    let (indices, publishes) = publishes.into_parts();
    let outcomes = lessor.publish(publishes, until).await;
    let confirmed = Settled::Done { confirmation: Confirmation::Confirmed, redelivered_in: None };
    let answers =
        outcomes.into_iter().map(|outcome| Some(outcome.map(|()| confirmed).map_err(Error::from)));
    results.set_all(indices, answers);
}

async fn decide<B: Broker>(
    lessor: &Lessor<B>,
    peers: &Peers,
    OpenedToken { claims, action, .. }: OpenedToken,
    until: Instant,
    consumers: &mut HashMap<ConsumerName, CurrentInfo>,
) -> Decision {
    let expired = Some(Err(Error::LeaseExpired { forgotten: false }));
    let (left, margin) = match peers.time_left(claims.owner, claims.settle_by) {
        TimeLeft::Within { left, margin } if left > margin => (left, margin),
        TimeLeft::Within { .. } | TimeLeft::Over => return Decision::Answer(expired),
        TimeLeft::Unknown => return Decision::Answer(None),
    };
    let kind = match action {
        Action::Ack => Some(AckKind::Ack),
        Action::Term(reason) => Some(AckKind::Term(reason)),
        // A Nak from here could end a lease that the owner still keeps.
        Action::Nak(_) => None,
        Action::Extend(_) => return Decision::Answer(None),
    };
    let ack = AckSubject((*claims.ack_subject).into());
    let Some((name, attempt)) = B::delivery_of(&ack) else { return Decision::Answer(expired) };
    let by = clock::now() + left.saturating_sub(margin);
    if !consumers.contains_key(&name) {
        let info = current_info(lessor, &name, until).await;
        consumers.insert(name.clone(), info);
    }
    let info = match &consumers[&name] {
        Err(error) => return Decision::Answer(Some(Err(error.clone()))),
        Ok(info) if *info.created != *claims.created => return Decision::Answer(expired),
        Ok(info) => info,
    };
    match kind {
        Some(_) if !is_led_as_claimed(info, &claims) => Decision::Answer(None),
        Some(kind) => {
            Decision::Publish(AckPublish { ack, kind, confirm_group: None, by: Some(by) })
        }
        None => {
            let again = info.max_deliver.is_none_or(|most| attempt < most);
            Decision::Answer(Some(Ok(Settled::Done {
                confirmation: Confirmation::Sent,
                redelivered_in: again.then_some(left + MAX_MARGIN),
            })))
        }
    }
}

/// Whether the server that the token names leads the consumer, without a break. The leader of a
/// consumer that is not replicated has the same name after a restart.
fn is_led_as_claimed(info: &ConsumerInfo, claims: &Claims<'_>) -> bool {
    let restart_shows = info.replicas > 1 || info.leader_shows;
    restart_shows && info.leader.0 == claims.leader
}

async fn current_info<B: Broker>(
    lessor: &Lessor<B>,
    name: &ConsumerName,
    until: Instant,
) -> CurrentInfo {
    lessor.info(name, until).await.map_err(|error| match error {
        // A lease ends with its consumer.
        InfoError::NoStream | InfoError::NoConsumer => Error::LeaseExpired { forgotten: false },
        InfoError::Permission(_) | InfoError::Unavailable(_) => Error::of_info(error, name),
    })
}
