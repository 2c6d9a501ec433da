//! The errors of the lessor. Each variant is a promise about what has and has not happened. The table in
//! `reason` gives the reason that the caller receives.

use crate::{
    broker::{BrokerError, ConsumerName, Denial, InfoError},
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
    /// Nothing happened: this kind of consumer cannot be leased from.
    #[error("consumer `{name}` cannot be used here: {property}")]
    ConsumerUnsuitable {
        /// The consumer.
        name: ConsumerName,
        /// The property that prevents it.
        property: Unsuitable,
    },
    /// Nothing happened: a connection broke while it may have been bringing messages of this consumer.
    /// The cause is not known, and may be one of the messages.
    #[error(
        "a connection to NATS broke while it was bringing messages of consumer `{name}`, and none \
         arrived{}", needs.as_ref().map_or(String::new(), |subject| format!(
            "; to search for a message with unreadable headers, the proxy's NATS user needs the right \
             to publish to `{subject}`"))
    )]
    ConsumerSuspected {
        /// The consumer.
        name: ConsumerName,
        /// The subject that the proxy needs the right to publish to, to search for the message.
        needs: Option<String>,
    },
    /// Nothing happened: JetStream accepts no more pulls for this consumer at the moment.
    #[error("the consumer accepts no more pulls now: {0}")]
    ConsumerBusy(String),
    /// Nothing happened: this replica has this many leases, which is its limit.
    #[error("this replica has {0} leases, which is its limit")]
    LeaseLimit(usize),
    /// Nothing happened: this consumer has this many leases, which is its limit.
    #[error("the consumer has {0} leases, which is the limit of one consumer")]
    ConsumerLeaseLimit(usize),
    /// Nothing happened: this many Fetch calls are open, which is the limit.
    #[error("{0} Fetch calls are waiting, which is the limit")]
    WaiterLimit(usize),
    /// Nothing happened: this replica grants no more leases.
    #[error("this replica is draining: any other replica serves this call")]
    Draining,
    /// Not applied. A lease that was held is still held.
    #[error("NATS is not available: {0}")]
    Unavailable(String),
    /// Nothing happened, and nothing will until an operator acts.
    #[error("the proxy has no NATS permission for `{0}`")]
    Permission(String),
    /// The lease is over. The message was delivered again, or will be.
    #[error("{}", if *forgotten { "the lease ended so long ago that it is forgotten" }
        else { "the lease has expired" })]
    LeaseExpired {
        /// The end of the lease is no longer remembered.
        forgotten: bool,
    },
    /// The lease is over, and it was the last attempt. The message is not delivered again.
    #[error(
        "the lease has expired, and the message is not delivered again: it was its last attempt"
    )]
    LastAttempt,
    /// The message was settled before, in another way.
    #[error("settled before, as {0:?}")]
    LeaseSettled(SettleKind),
    /// Nothing happened: the lease belongs to another principal.
    #[error("the lease belongs to another principal")]
    NotHolder,
    /// Another call is settling the lease at this moment, or it is being handed over.
    #[error("another call is settling it, or its lease is being handed over")]
    LeaseBusy,
    /// It may have been applied, or may still be applied.
    #[error("sent, and not confirmed in time: it may have been applied, so repeat it")]
    Unconfirmed,
    /// Not applied: the consumer or its stream is gone.
    #[error("the consumer or its stream is gone")]
    ConsumerGone,
}

impl Error {
    /// The error of a call whose consumer cannot be read.
    pub fn of_info(error: InfoError, name: &ConsumerName) -> Self {
        match error {
            InfoError::NoStream => Self::StreamNotFound(name.clone()),
            InfoError::NoConsumer => Self::ConsumerNotFound(name.clone()),
            InfoError::Permission(subject) => Self::Permission(subject),
            InfoError::Unavailable(why) => Self::Unavailable(why),
        }
    }
}

/// The error of a settlement that was published for no lease of the table.
impl From<BrokerError> for Error {
    fn from(error: BrokerError) -> Self {
        match error {
            BrokerError::Unsent(why) | BrokerError::Leaderless(why) => Self::Unavailable(why),
            BrokerError::Denied(Denial::Gone) => Self::ConsumerGone,
            BrokerError::Denied(Denial::Permission(subject)) => Self::Permission(subject),
            BrokerError::Late | BrokerError::Unconfirmed => Self::Unconfirmed,
        }
    }
}

/// The properties of a consumer that make leases impossible.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unsuitable {
    /// It is a push consumer.
    Push,
    /// Its ack policy is this one and not `explicit`.
    AckPolicy(String),
    /// Its pulls must name a priority group.
    PriorityGroups,
    /// One of its messages breaks every connection. It was found and could not be terminated.
    Unreadable {
        /// The ack subject that the proxy needs the right to publish to, if that is the cause.
        needs: Option<String>,
    },
    /// The ack wait of the consumer, or an entry of its backoff, is under
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
                "one of its messages has unreadable headers; to terminate the message, the proxy's \
                 NATS user needs the right to publish to `{subject}`"
            ),
            Self::Unreadable { needs: None } => f.write_str(
                "one of its messages has unreadable headers, and comes back although it was \
                 terminated; delete it from the stream: the log names its sequence",
            ),
            Self::AckWait => {
                f.write_str("its ack wait, or an entry of its backoff, is under 500 ms")
            }
        }
    }
}
