//! A delivery on its way to a caller: leased to us, and then to the caller. No logic.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::sync::SetOnce;

use super::{accounts::LeaseAccount, spec::ConsumerSpec};
use crate::{
    broker::{Delivery, Leader},
    lease::LeaseId,
};

/// A delivery on its way to a caller, with what is needed to give it back.
#[derive(Debug)]
pub(super) struct GrantedDelivery {
    pub(super) id: LeaseId,
    pub(super) delivery: Box<Delivery>,
    pub(super) spec: Arc<ConsumerSpec>,
    pub(super) arrived_at: Instant,
}

impl GrantedDelivery {
    pub(super) fn last_attempt(&self) -> bool {
        self.spec.last_attempt(self.delivery.delivery_count)
    }
}

/// The end of an answer to a Fetch: whether it was written. It is not set until then.
pub(super) type AnswerEnd = Arc<SetOnce<bool>>;

/// A caller's wish for its leases.
#[derive(Debug, Clone)]
pub(super) struct LeaseRequest {
    /// The length of each lease. `None`: as long as JetStream waits by itself.
    pub(super) length: Option<Duration>,
    /// The name of the caller's worker.
    pub(super) worker: Arc<str>,
    /// The account that the leases belong to.
    pub(super) account: Arc<LeaseAccount>,
}

/// A delivery and its lease.
#[derive(Debug)]
pub struct LeasedDelivery {
    /// The lease.
    pub id: LeaseId,
    /// The end of the lease.
    pub deadline: Instant,
    /// The earlier of the end of the lease and JetStream's present end. Until then another replica could
    /// settle the message without harm.
    pub settle_by: Instant,
    /// The consumer's leader. While it leads, nobody else has the message before `settle_by`.
    pub leader: Leader,
    pub(super) granted: GrantedDelivery,
}

impl LeasedDelivery {
    /// The delivery.
    pub fn delivery(&self) -> &Delivery {
        &self.granted.delivery
    }

    /// The number of delivery attempts. `None`: no limit.
    pub fn max_deliver(&self) -> Option<u64> {
        self.granted.spec.max_deliver
    }

    /// The creation time of the consumer.
    pub fn consumer_created(&self) -> &Arc<str> {
        &self.granted.spec.created
    }
}

/// A message that could not be given as asked.
#[derive(Debug)]
pub struct Rejected {
    /// The delivery and its lease.
    pub leased: LeasedDelivery,
    /// The reason.
    pub cause: RejectedCause,
    /// Whether the caller still holds the lease.
    pub held: bool,
}

/// The reason why a message is not among the messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RejectedCause {
    /// It fails the codec, in the words of the codec.
    Codec(String),
    /// It does not fit into any answer of the caller's size.
    TooLarge,
}
