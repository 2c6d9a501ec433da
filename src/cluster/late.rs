//! Tokens whose lease is over, of a delivery that was the last attempt of its message. JetStream
//! delivers the message no more, and keeps it in the stream, until somebody settles it:
//!
//! ```text
//!                 nothing of the consumer is out        something is, or that cannot be seen
//!  Ack, Term      straight to JetStream, confirmed      the answer says that it was the last
//!  Nak, Extend    the answer says that it was the last attempt
//! ```
//! A settlement hits whoever has the message at that moment. Nobody has it where the consumer has no
//! delivery out at all, whatever became of the lease, of `max_deliver` or of the consumer's counting
//! since. Decides by the token and by what the consumer is now; knows no lease.
//!
//! Measured on nats-server 2.15.1, for `max_deliver` 1 and 2, before and after the server has noticed
//! that the last attempt is over: a late +ACK or +TERM takes the message out of a stream with
//! interest or work-queue retention, and changes nothing else. A late -NAK or +WPI does nothing. The
//! message comes again after CONSUMER.RESET, and after `max_deliver` was raised before the server
//! has noticed; then an old +ACK settles the delivery of its new holder.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::{
    Peers,
    ownerless::{CONFIRMED, OwnerlessToken, failure},
};
use crate::{
    broker::{
        AckKind, AckPublish, AckSubject, Broker, Confirmation, ConsumerInfo, ConsumerName, Link,
    },
    bus::Bus,
    clock,
    lessor::{Action, Error, Settled},
};

/// A refusal waits no longer than this for what the consumer is.
const INFO_PATIENCE: Duration = Duration::from_secs(1);
/// A late settlement that has not left by then never does: the consumer may be another by then.
const SEEN: Duration = Duration::from_secs(1);

impl<B: Broker + Bus> Peers<B> {
    /// Settles what nobody else can have, of what was refused because its lease is over: one result
    /// each, in order. `None`: it was not the last attempt, or that cannot be seen.
    pub async fn settle_late(
        &self,
        tokens: Vec<OwnerlessToken>,
        until: Instant,
    ) -> Vec<Option<Result<Settled, Error>>> {
        let mut consumers: HashMap<ConsumerName, Option<ConsumerInfo>> = HashMap::new();
        let mut results = Vec::with_capacity(tokens.len());
        let (mut places, mut orders) = (Vec::new(), Vec::new());
        for (place, OwnerlessToken { claims, action }) in tokens.into_iter().enumerate() {
            results.push(None);
            let ack = AckSubject((*claims.ack_subject).into());
            let Some((name, attempt)) = B::delivery_of(&ack) else { continue };
            if !consumers.contains_key(&name) {
                let now = self.look_late(&name, attempt, until).await;
                consumers.insert(name.clone(), now);
            }
            let Some(info) = &consumers[&name] else { continue };
            if *info.created != *claims.created || !is_last(info.max_deliver, attempt) {
                continue;
            }
            results[place] = Some(Err(Error::LastAttempt));
            let kind = match action {
                Action::Ack => AckKind::Ack,
                Action::Term(reason) => AckKind::Term(reason),
                Action::Nak(_) | Action::Extend(_) => continue,
            };
            if info.ack_pending == 0 {
                places.push(place);
                let by = Some(clock::now() + SEEN);
                orders.push(AckPublish { ack, kind, confirm_group: None, by });
            }
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

    /// The consumer as it is now. It is not asked for where what is known of it here says that more
    /// attempts follow this one.
    async fn look_late(
        &self,
        name: &ConsumerName,
        attempt: u64,
        until: Instant,
    ) -> Option<ConsumerInfo> {
        if !matches!(self.lessor.broker().link(), Link::Up(_)) {
            return None;
        }
        let until = until.min(clock::now() + INFO_PATIENCE);
        let known = self.lessor.know(name, until).await.ok()?;
        if !is_last(known.max_deliver, attempt) {
            return None;
        }
        self.lessor.broker().info(name, until).await.ok()
    }
}

fn is_last(max_deliver: Option<u64>, attempt: u64) -> bool {
    max_deliver.is_some_and(|most| attempt >= most)
}
