//! Why the lessor did not do what it was asked. Each variant is a promise about what has and has
//! not happened; the table in `reason` says which reason its caller receives.

use crate::{
    broker::{ConsumerName, InfoError},
    lease::SettleKind,
};

/// A refusal or failure of a Fetch, a settlement or an Extend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Nothing happened.
    #[error("stream `{}` does not exist", .0.stream)]
    StreamNotFound(ConsumerName),
    /// Nothing happened.
    #[error("stream `{}` has no consumer `{}`", .0.stream, .0.consumer)]
    ConsumerNotFound(ConsumerName),
    /// Nothing happened: a lease cannot be kept on a consumer like this.
    #[error("consumer `{name}` cannot be used here: {property}")]
    ConsumerUnsuitable {
        /// Which consumer.
        name: ConsumerName,
        /// What is in the way.
        property: Unsuitable,
    },
    /// Nothing happened: a connection broke while it may have been bringing messages of this consumer,
    /// and it is not known whether one of them was the cause.
    #[error(
        "a connection to NATS broke while it brought messages of consumer `{name}`, and before any \
         arrived{}", needs.as_ref().map_or(String::new(), |subject| format!(
            "; whether one of them has headers that cannot be read would be found out if the proxy's \
             NATS user had the right to publish to `{subject}`"))
    )]
    ConsumerSuspected {
        /// Which consumer.
        name: ConsumerName,
        /// The subject that the proxy would need the right to publish to, to find out.
        needs: Option<String>,
    },
    /// Nothing happened: JetStream takes no more pulls for this consumer just now.
    #[error("the consumer takes no more pulls now: {0}")]
    ConsumerBusy(String),
    /// Nothing happened: this many leases are held already.
    #[error("all {0} leases are taken")]
    LeaseLimit(usize),
    /// Nothing happened: this consumer has this many leases already.
    #[error("the consumer has {0} leases, as many as one may have")]
    ConsumerLeaseLimit(usize),
    /// Nothing happened: this many Fetch calls are open already.
    #[error("all {0} places for waiting Fetch calls are taken")]
    WaiterLimit(usize),
    /// Nothing happened: this replica grants no more leases.
    #[error("this replica is draining")]
    Draining,
    /// Not applied; a lease that was held is still held.
    #[error("NATS is not available: {0}")]
    Unavailable(String),
    /// Nothing happened, and nothing will until an operator acts.
    #[error("the proxy has no NATS permission for `{0}`")]
    Permission(String),
    /// The lease is over; the message is, or will be, delivered again.
    #[error("{}", if *forgotten { "the lease ended so long ago that it is forgotten" }
        else { "the lease has expired" })]
    LeaseExpired {
        /// How it ended is not remembered any more.
        forgotten: bool,
    },
    /// The lease is over, and it was the last attempt: the message is not delivered again.
    #[error(
        "the lease has expired, and the message is not delivered again: it was its last attempt"
    )]
    LastAttempt,
    /// The message was settled before, in another way.
    #[error("settled before, as {0:?}")]
    LeaseSettled(SettleKind),
    /// Another call is settling it at this moment.
    #[error("another call is settling it")]
    LeaseBusy,
    /// It may have been applied, or may still be.
    #[error("sent, and not confirmed in time")]
    Unconfirmed,
    /// Not applied: the consumer or its stream is gone.
    #[error("the consumer or its stream is gone")]
    ConsumerGone,
}

impl Error {
    /// What an unreadable INFO means to a Fetch.
    pub(super) fn of_info(error: InfoError, name: &ConsumerName) -> Self {
        match error {
            InfoError::NoStream => Self::StreamNotFound(name.clone()),
            InfoError::NoConsumer => Self::ConsumerNotFound(name.clone()),
            InfoError::Permission(subject) => Self::Permission(subject),
            InfoError::Unavailable(why) => Self::Unavailable(why),
        }
    }
}

/// Properties of a consumer that a lease cannot live with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unsuitable {
    /// It delivers to a subject by itself.
    Push,
    /// Its ack policy is not `explicit` but this.
    AckPolicy(String),
    /// Its pulls must name a priority group.
    PriorityGroups,
    /// A message of it breaks every connection, was found, and could not be ended. The subject that
    /// the proxy would need the right to publish to, if that is why.
    Unreadable {
        /// The ack subject.
        needs: Option<String>,
    },
    /// An ack wait, the consumer's or one of its backoffs, is under
    /// [`super::spec::SHORTEST_ACK_WAIT`].
    AckWait,
}

impl Unsuitable {
    /// The name of the property, for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Push => "push",
            Self::AckPolicy(_) => "ack_policy",
            Self::PriorityGroups => "priority_groups",
            Self::AckWait => "ack_wait",
            Self::Unreadable { .. } => "unreadable_message",
        }
    }
}

impl std::fmt::Display for Unsuitable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Push => f.write_str("it is a push consumer; a pull consumer is needed"),
            Self::AckPolicy(policy) => {
                write!(f, "its ack policy is `{policy}`; `explicit` is needed")
            }
            Self::PriorityGroups => f.write_str("it has priority groups"),
            Self::Unreadable { needs: Some(subject) } => write!(
                f,
                "one of its messages has headers that cannot be read; it would be terminated if the \
                 proxy's NATS user had the right to publish to `{subject}`"
            ),
            Self::Unreadable { needs: None } => f.write_str(
                "one of its messages has headers that cannot be read, and comes back although it \
                 was terminated; delete it from the stream: the log names its sequence",
            ),
            Self::AckWait => f.write_str("its ack wait, or a backoff, is under 500 ms"),
        }
    }
}
