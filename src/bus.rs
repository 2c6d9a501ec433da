//! The port to the other replicas: requests with answers, and messages to all.
//!
//! Owns the trait and its types. It must never name an implementation, a runtime or a wire format. A
//! message is bytes. The sender must make sure that only the right replicas can read them.

use std::{future::Future, time::Instant};

use bytes::Bytes;

/// The first part of all subjects between replicas.
pub const SUBJECT_PREFIX: &str = "_fetchproxy.";

/// Carries messages between replicas.
pub trait Bus: Send + Sync + 'static {
    /// Sends a request to the replica that listens on `subject`, and waits for its answer until `until`.
    fn request(
        &self,
        subject: &str,
        question: Bytes,
        until: Instant,
    ) -> impl Future<Output = Result<Bytes, RequestError>> + Send;

    /// Sends a message to all that listen on `subject`. Does not check that it arrives.
    fn publish(
        &self,
        subject: &str,
        message: Bytes,
        until: Instant,
    ) -> impl Future<Output = ()> + Send;

    /// Listens on exactly these subjects from now on, also after the loss of a connection.
    fn subscribe(&self, subjects: Vec<String>);

    /// Waits for the next message on the subscribed subjects. A message may arrive twice if one connection
    /// follows another. Cancel-safe.
    fn next(&self) -> impl Future<Output = Incoming> + Send;
}

/// A message that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// The subject of the message.
    pub subject: String,
    /// The content of the message.
    pub message: Bytes,
    /// The subject for the answer, if the sender waits for an answer.
    pub reply: Option<String>,
}

/// The reason why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Nobody listens there: no replica has received the request, and none ever will.
    #[error("nobody listens there")]
    Nobody,
    /// The request never left this process.
    #[error("not sent: {0}")]
    Unsent(String),
    /// The request was sent and not answered in time. A replica may have received it.
    #[error("no answer")]
    Silent,
}
