//! The outcomes of a handler, and the settlements that they become. Sends nothing.

use std::{error, fmt, iter, sync::Arc, time::Duration};

use crate::{
    Envelope, Event, Rejected, RejectedCause,
    error::to_duration,
    pb::{AckAction, ExtendAction, NakAction, TermAction, settlement::Action},
};

/// The proxy accepts no longer delay.
const LONGEST_DELAY: Duration = Duration::from_secs(24 * 3600);
/// The proxy cuts a longer reason, in bytes.
const LONGEST_REASON: usize = 1024;
/// The delay after the first failure of a handler, and the longest delay.
const FIRST_DELAY: Duration = Duration::from_secs(5);
const LAST_DELAY: Duration = Duration::from_secs(300);
/// The delay of a message that is too large for this worker.
const TOO_LARGE_DELAY: Duration = Duration::from_secs(60);

/// The error of a handler if the message may succeed later.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Nak {
    /// The message comes back after this time: at most 24 h, and a longer delay is lowered.
    pub delay: Duration,
}

/// The error of a handler if the message can never succeed. The message does not come back.
#[derive(Clone, Debug, PartialEq)]
pub struct Term {
    /// JetStream publishes the reason in an advisory. It is cut to 1 KiB.
    pub reason: String,
}

impl Term {
    /// With this reason.
    pub fn new(reason: impl fmt::Display) -> Self {
        Self { reason: reason.to_string() }
    }
}

impl fmt::Display for Nak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "not now, again in {:?}", self.delay)
    }
}

impl fmt::Display for Term {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl error::Error for Nak {}
impl error::Error for Term {}

/// Why a handler failed: a [`Nak`], a [`Term`], or any other error. The operator `?` makes it. A [`Nak`] or a [`Term`]
/// may also be the source of another error.
pub struct Failure(pub(crate) Arc<dyn error::Error + Send + Sync>);

impl Failure {
    /// From an error in a box, or from an error of `anyhow`: `.map_err(Failure::new)`.
    pub fn new(error: impl Into<Box<dyn error::Error + Send + Sync>>) -> Self {
        Self(error.into().into())
    }

    /// The error.
    pub fn error(&self) -> &(dyn error::Error + Send + Sync + 'static) {
        &*self.0
    }

    pub(crate) fn meant<E: error::Error + 'static>(&self) -> Option<&E> {
        let first: &(dyn error::Error + 'static) = &*self.0;
        iter::successors(Some(first), |error| error.source())
            .find_map(<dyn error::Error>::downcast_ref)
    }
}

impl<E: error::Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(Arc::new(error))
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How a message is settled.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    Ack,
    Nak(Duration),
    Term(String),
    /// Given back at a stop.
    Return,
}

impl Outcome {
    pub fn nak(delay: Duration) -> Self {
        Self::Nak(delay.min(LONGEST_DELAY))
    }

    pub fn term(reason: &str) -> Self {
        Self::Term(cut(reason))
    }

    /// After an error that a handler did not mean: longer with each attempt.
    pub fn failed(message: &Envelope) -> Self {
        let doubled = 1 << message.delivery_count.saturating_sub(1).min(10);
        Self::Nak((FIRST_DELAY * doubled).min(LAST_DELAY))
    }

    /// For a rejected message that is still leased.
    pub fn of_rejected(rejected: &Rejected) -> Self {
        match rejected.cause {
            // Another worker may accept larger messages.
            RejectedCause::TooLarge => Self::Nak(TOO_LARGE_DELAY),
            _ => Self::term(&rejected.detail),
        }
    }

    pub fn action(&self) -> Action {
        match self {
            Self::Ack => Action::Ack(AckAction {}),
            Self::Nak(delay) => nak_action(*delay),
            Self::Term(reason) => term_action(reason),
            Self::Return => nak_action(Duration::ZERO),
        }
    }

    /// Tells that the settlement is confirmed.
    pub fn event(self, message: Arc<Envelope>) -> Event {
        match self {
            Self::Ack => Event::Acked { message },
            Self::Nak(delay) => Event::Nacked { message, delay },
            Self::Term(reason) => Event::Termed { message, reason },
            Self::Return => Event::Returned { message },
        }
    }
}

pub(crate) fn nak_action(delay: Duration) -> Action {
    Action::Nak(NakAction { delay: Some(to_duration(delay.min(LONGEST_DELAY))) })
}

pub(crate) fn term_action(reason: &str) -> Action {
    Action::Term(TermAction { reason: cut(reason) })
}

pub(crate) fn extend_action(lease: Option<Duration>) -> Action {
    Action::Extend(ExtendAction { lease: lease.map(to_duration) })
}

/// Cut between two characters, as the proxy accepts it.
pub(crate) fn cut(reason: &str) -> String {
    let mut end = reason.len().min(LONGEST_REASON);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    reason[..end].to_owned()
}

pub(crate) fn delay(delay: Duration) -> prost_types::Duration {
    to_duration(delay.min(LONGEST_DELAY))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reason_is_cut_between_two_characters() {
        let reason = format!("{}ää", "a".repeat(1021));
        assert_eq!(cut(&reason).len(), 1023);
        assert_eq!(cut("short"), "short");
    }

    #[test]
    fn delay_that_the_proxy_would_refuse_is_lowered() {
        assert_eq!(Outcome::nak(Duration::MAX), Outcome::Nak(LONGEST_DELAY));
    }

    #[test]
    fn nak_that_is_the_source_of_another_error_counts() {
        #[derive(Debug)]
        struct Busy(Nak);
        impl fmt::Display for Busy {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("busy")
            }
        }
        impl error::Error for Busy {
            fn source(&self) -> Option<&(dyn error::Error + 'static)> {
                Some(&self.0)
            }
        }
        let nak = Nak { delay: Duration::from_secs(3) };
        assert_eq!(Failure::from(Busy(nak)).meant::<Nak>(), Some(&nak));
        assert_eq!(Failure::new("busy").meant::<Nak>(), None);
    }
}
