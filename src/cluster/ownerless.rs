//! Tokens whose owner does not answer. The owner may be dead, or live and be cut off, so nothing
//! here may shorten a lease that it still keeps:
//!
//! ```text
//!                until settle_by                                       after it
//!  Ack, Term     straight to JetStream, confirmed; not applied,        LEASE_EXPIRED
//!                where another server leads the consumer now,
//!                or that cannot be seen
//!  Nak           not sent: JetStream redelivers by itself              LEASE_EXPIRED
//!  Extend        not applied                                           LEASE_EXPIRED
//! ```
//! `settle_by` is the earlier of the lease's first end and JetStream's: before it nobody else can
//! have the message, unless by another leader. It is a time of day by the owner's clock: where that
//! is known to be off from ours, nothing is applied. Decides by the token and by what the consumer
//! is now; knows no lease.

use std::{collections::HashMap, time::Instant};

use super::{Peers, skew::TimeLeft};
use crate::{
    broker::{
        AckKind, AckPublish, AckSubject, Broker, BrokerError, Confirmation, ConsumerInfo,
        ConsumerName, Denial, InfoError,
    },
    bus::Bus,
    clock,
    lease::MAX_MARGIN,
    lessor::{Action, Error, Settled},
    token::Claims,
};

/// A token that its owner cannot be asked about, and what to do with it.
#[derive(Debug)]
pub struct OwnerlessToken {
    /// What it says.
    pub claims: Claims<'static>,
    /// What is asked.
    pub action: Action,
}

/// The consumer as it is now.
type CurrentInfo = Result<ConsumerInfo, Error>;

impl<B: Broker + Bus> Peers<B> {
    /// Settles what can be settled without the owner: one result each, in order. `None`: it needs
    /// the owner, and was not applied.
    pub async fn settle_ownerless(
        &self,
        tokens: Vec<OwnerlessToken>,
        until: Instant,
    ) -> Vec<Option<Result<Settled, Error>>> {
        let mut consumers: HashMap<ConsumerName, CurrentInfo> = HashMap::new();
        let mut results = Vec::with_capacity(tokens.len());
        let (mut places, mut orders) = (Vec::new(), Vec::new());
        for (place, OwnerlessToken { claims, action }) in tokens.into_iter().enumerate() {
            let kind = self.judge(&claims, action, until, &mut consumers).await;
            results.push(match kind {
                Decision::Answer(answer) => answer,
                Decision::Publish(order) => {
                    places.push(place);
                    orders.push(order);
                    Some(Err(Error::Unconfirmed))
                }
            });
        }
        if orders.is_empty() {
            return results;
        }
        let broker = self.lessor.broker();
        let outcomes = broker.settle(orders, Confirmation::Confirmed, until).await;
        for (place, outcome) in places.into_iter().zip(outcomes) {
            results[place] = Some(outcome.map(|()| CONFIRMED).map_err(failure));
        }
        results
    }

    async fn judge(
        &self,
        claims: &Claims<'_>,
        action: Action,
        until: Instant,
        consumers: &mut HashMap<ConsumerName, CurrentInfo>,
    ) -> Decision {
        let expired = Some(Err(Error::LeaseExpired { forgotten: false }));
        let (left, margin) = match self.left(claims.owner, claims.settle_by) {
            TimeLeft::Within { left, margin } if left > margin => (left, margin),
            TimeLeft::Within { .. } | TimeLeft::Over => return Decision::Answer(expired),
            TimeLeft::Unknown => return Decision::Answer(None),
        };
        let kind = match action {
            Action::Ack => Some(AckKind::Ack),
            Action::Term(reason) => Some(AckKind::Term(reason)),
            // Sent here, it could end a lease that the owner still keeps.
            Action::Nak(_) => None,
            Action::Extend(_) => return Decision::Answer(None),
        };
        let ack = AckSubject((*claims.ack_subject).into());
        let Some((name, attempt)) = B::delivery_of(&ack) else { return Decision::Answer(expired) };
        let by = clock::now() + left.saturating_sub(margin);
        if !consumers.contains_key(&name) {
            let now = self.look_at(&name, until).await;
            consumers.insert(name.clone(), now);
        }
        let info = match &consumers[&name] {
            Err(error) => return Decision::Answer(Some(Err(error.clone()))),
            Ok(info) if *info.created != *claims.created => return Decision::Answer(expired),
            Ok(info) => info,
        };
        // An unreplicated consumer's leader is the same by name after a restart.
        let unseen = info.replicas <= 1 && !info.leader_shows;
        match kind {
            Some(_) if unseen || info.leader.0 != claims.leader => Decision::Answer(None),
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

    async fn look_at(&self, name: &ConsumerName, until: Instant) -> CurrentInfo {
        match self.lessor.broker().info(name, until).await {
            Ok(info) => Ok(info),
            Err(InfoError::NoStream | InfoError::NoConsumer) => {
                Err(Error::LeaseExpired { forgotten: false })
            }
            Err(InfoError::Permission(subject)) => Err(Error::Permission(subject)),
            Err(InfoError::Unavailable(why)) => Err(Error::Unavailable(why)),
        }
    }
}

pub(super) const CONFIRMED: Settled =
    Settled::Done { confirmation: Confirmation::Confirmed, redelivered_in: None };

enum Decision {
    /// `None`: not without the owner.
    Answer(Option<Result<Settled, Error>>),
    Publish(AckPublish),
}

pub(super) fn failure(error: BrokerError) -> Error {
    match error {
        BrokerError::Unsent(why) => Error::Unavailable(why),
        BrokerError::Denied(Denial::Gone) => Error::ConsumerGone,
        BrokerError::Denied(Denial::Permission(subject)) => Error::Permission(subject),
        BrokerError::Unconfirmed => Error::Unconfirmed,
    }
}
