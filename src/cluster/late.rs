//! Settles tokens whose lease is over, if their delivery was the last attempt of its message. JetStream
//! no longer delivers such a message, and keeps it in the stream until somebody settles it:
//!
//! ```text
//!                no delivery of the consumer is pending     one is, or that cannot be seen
//!  Ack, Term     straight to JetStream, confirmed           the answer says that it was the last
//!  Nak, Extend   the answer says that it was the last attempt
//! ```
//! A settlement reaches the worker that has the message at that moment. If the consumer has no pending
//! delivery at all, no worker has the message. That holds whatever happened since to the lease, to
//! `max_deliver` or to the sequences of the consumer. Decides by the token and by the consumer as it is
//! now; knows no lease.
//!
//! Measured on nats-server 2.15.1, for `max_deliver` 1 and 2, before and after the server has noticed
//! that the last attempt is over. In a stream with interest or work-queue retention, a late +ACK or
//! +TERM removes the message, and changes nothing else. A late -NAK or +WPI does nothing. The message
//! comes again after CONSUMER.RESET. It also comes again if `max_deliver` was raised before the server
//! has noticed. Then an old +ACK settles the delivery of the new holder.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use super::{ownerless::publish, wire::OpenedToken};
use crate::{
    broker::{AckKind, AckPublish, AckSubject, Broker, ConsumerInfo, ConsumerName, Link},
    clock,
    lessor::{Action, Error, Group, Lessor, Results, Settled},
};

/// A refusal waits no longer than this for the state of the consumer.
const INFO_PATIENCE: Duration = Duration::from_secs(1);
/// A late settlement leaves within this time after the state of the consumer was seen, or never. After
/// that the consumer may be in another state.
const INFO_VALIDITY: Duration = Duration::from_secs(1);

/// Settles each token whose message nobody else can have: one result each, in order. `None`: it was
/// not the last attempt, or that cannot be seen.
pub(super) async fn settle<B: Broker>(
    lessor: &Lessor<B>,
    tokens: Vec<OpenedToken>,
    until: Instant,
) -> Vec<Option<Result<Settled, Error>>> {
    let mut consumers: HashMap<ConsumerName, Option<ConsumerInfo>> = HashMap::new();
    let (mut results, mut publishes) = (Results::new(tokens.len()), Group::default());
    for (index, OpenedToken { claims, action, .. }) in tokens.into_iter().enumerate() {
        let ack = AckSubject((*claims.ack_subject).into());
        let Some((name, attempt)) = B::delivery_of(&ack) else {
            results.set(index, None);
            continue;
        };
        if !consumers.contains_key(&name) {
            let info = current_info(lessor, &name, attempt, until).await;
            consumers.insert(name.clone(), info);
        }
        let info = consumers[&name].as_ref();
        let Some(info) = info
            .filter(|info| *info.created == *claims.created && is_last(info.max_deliver, attempt))
        else {
            results.set(index, None);
            continue;
        };
        let kind = match action {
            Action::Ack => Some(AckKind::Ack),
            Action::Term(reason) => Some(AckKind::Term(reason)),
            Action::Nak(_) | Action::Extend(_) => None,
        };
        match kind.filter(|_| info.ack_pending == 0) {
            None => results.set(index, Some(Err(Error::LastAttempt))),
            Some(kind) => {
                let by = Some(clock::now() + INFO_VALIDITY);
                publishes.push(index, AckPublish { ack, kind, confirm_group: None, by });
            }
        }
    }
    publish(lessor, publishes, until, &mut results).await;
    results.into_vec()
}

/// The consumer as it is now. `None`: more attempts follow this one, by what this replica knows already,
/// or the consumer cannot be seen.
async fn current_info<B: Broker>(
    lessor: &Lessor<B>,
    name: &ConsumerName,
    attempt: u64,
    until: Instant,
) -> Option<ConsumerInfo> {
    if !matches!(lessor.broker().link(), Link::Up(_)) {
        return None;
    }
    let until = until.min(clock::now() + INFO_PATIENCE);
    let known = lessor.know(name, None, until).await.ok()?;
    if !is_last(known.max_deliver, attempt) {
        return None;
    }
    lessor.info(name, until).await.ok()
}

fn is_last(max_deliver: Option<u64>, attempt: u64) -> bool {
    max_deliver.is_some_and(|most| attempt >= most)
}
