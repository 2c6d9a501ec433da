//! Whether NATS allows the proxy to ack a consumer's messages, as far as is known. All leases of one
//! consumer share it, as long as its task lives. Every confirmed or refused publish to an ack subject updates it.
//!
//! A lease longer than the ack wait needs such publishes. Without the right, nothing can keep a long lease.
//! Settlements are published although the right was refused. So a right that was granted since is noticed.

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
    /// Whether the subject is set. Every settlement reads this, and needs no lock.
    refused: AtomicBool,
    subject: Mutex<Option<String>>,
}

impl AckRight {
    /// Takes in the outcome of a publish to an ack subject that the broker was asked to confirm.
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

/// Two specs with different rights are equal: the right is not part of a consumer's configuration.
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
    fn a_refusal_is_known_until_a_publish_is_confirmed() {
        let right = AckRight::default();
        assert_eq!(right.refused(), None);
        let subject = "$JS.ACK.S.c.1".to_owned();
        let denied = Err(BrokerError::Denied(Denial::Permission(subject.clone())));
        right.clone().learn(&denied);
        assert_eq!(right.refused(), Some(subject.clone()));
        right.learn(&Err(BrokerError::Unconfirmed));
        right.learn(&Err(BrokerError::Denied(Denial::Gone)));
        assert_eq!(right.refused(), Some(subject), "neither error concerns rights");
        right.learn(&Ok(()));
        assert_eq!(right.refused(), None);
    }
}
