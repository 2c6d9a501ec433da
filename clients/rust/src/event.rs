//! The events of a worker, their default log, and a function of the user that may fail.

use std::{
    error,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::Duration,
};

use crate::{Envelope, Error, Rejected};

/// What a worker tells. Events about a message have its envelope.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// The worker begins.
    Ready,
    /// The proxy has confirmed the Ack.
    Acked {
        /// The message.
        message: Arc<Envelope>,
    },
    /// The proxy has confirmed the Nak.
    Nacked {
        /// The message.
        message: Arc<Envelope>,
        /// The message comes back after this time.
        delay: Duration,
    },
    /// The proxy has confirmed the Term.
    Termed {
        /// The message.
        message: Arc<Envelope>,
        /// Why it was terminated.
        reason: String,
    },
    /// The message was given back at a stop.
    Returned {
        /// The message.
        message: Arc<Envelope>,
    },
    /// The message cannot be delivered to this worker.
    Rejected {
        /// The message, and why.
        rejected: Rejected,
    },
    /// The lease is lost, and the handler is cancelled.
    Lost {
        /// The message.
        message: Arc<Envelope>,
        /// Why it is lost.
        error: Error,
    },
    /// A call, or a part of a call, failed. It is repeated.
    Retry {
        /// Why it failed.
        error: Error,
        /// The time until the repeat.
        wait: Duration,
    },
    /// A handler failed with an error of its own, or panicked.
    HandlerError {
        /// The message.
        message: Arc<Envelope>,
        /// The error of the handler.
        error: Arc<dyn error::Error + Send + Sync>,
    },
    /// `run` ends without an error.
    Stopped,
}

impl Event {
    /// The name, as in all languages: `acked`, for example.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Acked { .. } => "acked",
            Self::Nacked { .. } => "nacked",
            Self::Termed { .. } => "termed",
            Self::Returned { .. } => "returned",
            Self::Rejected { .. } => "rejected",
            Self::Lost { .. } => "lost",
            Self::Retry { .. } => "retry",
            Self::HandlerError { .. } => "handler_error",
            Self::Stopped => "stopped",
        }
    }

    /// The message, if the event is about a message that was delivered.
    pub fn message(&self) -> Option<&Arc<Envelope>> {
        match self {
            Self::Acked { message }
            | Self::Nacked { message, .. }
            | Self::Termed { message, .. }
            | Self::Returned { message }
            | Self::Lost { message, .. }
            | Self::HandlerError { message, .. } => Some(message),
            _ => None,
        }
    }
}

/// The default: a warning of `tracing` for each event that a person may have to look at.
pub fn log_event(event: &Event) {
    match event {
        Event::Rejected { rejected } => {
            tracing::warn!("message {} is rejected: {}", rejected.stream_sequence, rejected.detail);
        }
        Event::Termed { message, reason } => {
            tracing::warn!("message {} is terminated: {reason}", message.stream_sequence);
        }
        Event::Lost { message, error } => {
            tracing::warn!("message {} is lost: {error}", message.stream_sequence);
        }
        Event::Retry { error, wait } => tracing::warn!("again in {wait:?}: {error}"),
        Event::HandlerError { message, error } => {
            tracing::warn!("message {}: the handler failed: {error}", message.stream_sequence);
        }
        _ => {}
    }
}

/// The user's function. Its panic must not break a worker.
#[derive(Clone)]
pub(crate) struct Hook(Arc<dyn Fn(&Event) + Send + Sync>);

impl Hook {
    pub fn new(on_event: impl Fn(&Event) + Send + Sync + 'static) -> Self {
        Self(Arc::new(on_event))
    }

    pub fn tell(&self, event: Event) {
        if catch_unwind(AssertUnwindSafe(|| (self.0)(&event))).is_err() {
            tracing::warn!("on_event failed at {}", event.name());
        }
    }
}
