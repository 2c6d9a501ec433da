//! Whether NATS lets the proxy ack a consumer's messages, as far as is known: shared by everything that
//! is known of one incarnation. Written by every confirmed or refused publish to an ack subject.
//!
//! A lease longer than the ack wait needs such publishes. Without the right, a long lease would be a
//! promise that nothing keeps.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, Ordering},
};

use crate::{
    broker::{BrokerError, Denial},
    lock::lock,
};

/// The right to ack one consumer's messages.
#[derive(Debug, Clone, Default)]
pub(super) struct AckRight(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// The subject is set. Read for each settlement, so that these need no lock.
    refused: AtomicBool,
    subject: Mutex<Option<String>>,
}

impl AckRight {
    /// What a publish to an ack subject came to, if the broker was asked to confirm it.
    pub(super) fn learn(&self, outcome: &Result<(), BrokerError>) {
        let subject = match outcome {
            Err(BrokerError::Denied(Denial::Permission(subject))) => Some(subject.clone()),
            Ok(()) if self.0.refused.load(Ordering::Relaxed) => None,
            Ok(()) | Err(_) => return,
        };
        self.0.refused.store(subject.is_some(), Ordering::Relaxed);
        *lock(&self.0.subject) = subject;
    }

    /// The subject that NATS refused last, if nothing was confirmed since.
    pub(super) fn refused(&self) -> Option<String> {
        if !self.0.refused.load(Ordering::Relaxed) {
            return None;
        }
        lock(&self.0.subject).clone()
    }
}

/// The right is no part of what a consumer is.
impl PartialEq for AckRight {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for AckRight {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_known_until_something_is_confirmed() {
        let right = AckRight::default();
        assert_eq!(right.refused(), None);
        let subject = "$JS.ACK.S.c.1".to_owned();
        let denied = Err(BrokerError::Denied(Denial::Permission(subject.clone())));
        right.clone().learn(&denied);
        assert_eq!(right.refused(), Some(subject.clone()));
        right.learn(&Err(BrokerError::Unconfirmed));
        right.learn(&Err(BrokerError::Denied(Denial::Gone)));
        assert_eq!(right.refused(), Some(subject), "these say nothing of rights");
        right.learn(&Ok(()));
        assert_eq!(right.refused(), None);
    }
}
