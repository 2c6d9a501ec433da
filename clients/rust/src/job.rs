//! The work of a worker on one message: decode, handle, and a span around it. Knows no lease.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use crate::{Envelope, Failure, event::Hook, pb::Codec};

/// A handler at work.
pub type Handling = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

/// Makes a span around each handler. `fetchproxy::otel` has it for OpenTelemetry.
pub trait Tracer: Send + Sync {
    /// The handler with its span. Must not change the result.
    fn trace(&self, message: &Envelope, source: &Source, handling: Handling) -> Handling;
}

/// Where messages come from.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Source {
    /// The stream.
    pub stream: String,
    /// The consumer.
    pub consumer: String,
}

/// Decodes a message and calls the handler. An error is the reason of a Term.
pub(crate) type Work = Arc<dyn Fn(Arc<Envelope>) -> Result<Handling, String> + Send + Sync>;

/// The work of a worker, and its limits.
#[derive(Clone)]
pub(crate) struct Job {
    pub source: Source,
    pub work: Work,
    /// What the proxy checks before this worker decodes.
    pub codec: Codec,
    pub tracer: Option<Arc<dyn Tracer>>,
    pub hook: Hook,
    /// The most handlers at once.
    pub concurrency: usize,
    /// The longest time that a lease is kept for a handler.
    pub at_most: Duration,
}

impl Job {
    /// The result of the handler. An outer error is the reason of a Term: the payload cannot be decoded.
    pub async fn handle(self, message: Arc<Envelope>) -> Result<Result<(), Failure>, String> {
        let handling = (self.work)(message.clone())?;
        let handling = match &self.tracer {
            Some(tracer) => tracer.trace(&message, &self.source, handling),
            None => handling,
        };
        Ok(handling.await)
    }
}
