//! The failures of requests to the broker, and what each says about its effect. Pure.

/// The failure of a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BrokerError {
    /// It never left us: it has had no effect and never will.
    #[error("not sent: {0}")]
    Unsent(String),
    /// Nobody received it, because the consumer has no leader: it has had no effect and never will.
    #[error("not received: {0}")]
    Leaderless(String),
    /// The broker refused it: it has had no effect and never will.
    #[error(transparent)]
    Denied(#[from] Denial),
    /// A leader answered after its deadline: it may have had its effect on somebody else's delivery.
    #[error("answered too late")]
    Late,
    /// It left us and nobody answered: it may have had its effect, or may still have it.
    #[error("sent, and never confirmed")]
    Unconfirmed,
}

/// The reason for a refusal by the broker.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Denial {
    /// The consumer or its stream is gone.
    #[error("the consumer or its stream is gone")]
    Gone,
    /// We have no right to the subject.
    #[error("no permission for {0}")]
    Permission(String),
}

/// The reason why CONSUMER.INFO or a stored message cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InfoError {
    /// The stream does not exist.
    #[error("no such stream")]
    NoStream,
    /// The stream exists, but the consumer does not.
    #[error("no such consumer")]
    NoConsumer,
    /// We have no right to the subject.
    #[error("no permission for {0}")]
    Permission(String),
    /// There is no answer, or the answer says that it is not available now.
    #[error("NATS is not available: {0}")]
    Unavailable(String),
}
