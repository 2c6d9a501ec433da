//! The port to the other replicas: questions and their answers, and what is said to all.
//!
//! Owns the trait and its words. It must never name an implementation, a runtime or a wire format.
//! What goes over it is bytes: who may read them is for those to see to who send them.

use std::{future::Future, time::Instant};

use bytes::Bytes;

/// What all subjects between replicas begin with.
pub const SUBJECT_PREFIX: &str = "_fetchproxy.";

/// Carries messages between replicas.
pub trait Bus: Send + Sync + 'static {
    /// Asks whoever listens on `subject`, and waits for the answer until `until`.
    fn request(
        &self,
        subject: &str,
        question: Bytes,
        until: Instant,
    ) -> impl Future<Output = Result<Bytes, RequestError>> + Send;

    /// Says something to all who listen on `subject`; nobody looks whether it arrives.
    fn publish(
        &self,
        subject: &str,
        message: Bytes,
        until: Instant,
    ) -> impl Future<Output = ()> + Send;

    /// Listens on exactly these subjects from now on, over the loss of connections.
    fn subscribe(&self, subjects: Vec<String>);

    /// Waits for the next thing that is said on a subject that is listened on. Where one connection
    /// follows another it may be heard twice. Cancel-safe.
    fn next(&self) -> impl Future<Output = Incoming> + Send;
}

/// Something that was said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Incoming {
    /// Where.
    pub subject: String,
    /// What.
    pub message: Bytes,
    /// Where an answer is waited for, if one is.
    pub reply: Option<String>,
}

/// Why a question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// Nobody listens there: the question was heard by nobody and never will be.
    #[error("nobody listens there")]
    Nobody,
    /// The question never left us.
    #[error("not sent: {0}")]
    Unsent(String),
    /// It was sent, and not answered in time: it may have been heard.
    #[error("no answer")]
    Silent,
}
