//! A delivery on its way to a caller: leased to us, and then to the caller. No logic.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::spec::ConsumerSpec;
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
}

impl GrantedDelivery {
    pub(super) fn last_attempt(&self) -> bool {
        self.spec.last_attempt(self.delivery.delivery_count)
    }
}

/// How a caller has its leases.
#[derive(Debug, Clone)]
pub(super) struct LeaseRequest {
    /// For how long; `None` is as long as JetStream would wait.
    pub(super) length: Option<Duration>,
    /// Who it is.
    pub(super) worker: Arc<str>,
}

/// A delivery and its lease.
#[derive(Debug)]
pub struct LeasedDelivery {
    /// The lease.
    pub id: LeaseId,
    /// When it ends.
    pub deadline: Instant,
    /// Until when anybody else could settle it without harm: the earlier of the lease's end and
    /// JetStream's, as they stand now.
    pub settle_by: Instant,
    /// Who leads the consumer: while it does, nobody else has the message before `settle_by`.
    pub leader: Leader,
    pub(super) granted: GrantedDelivery,
}

impl LeasedDelivery {
    /// What was delivered.
    pub fn delivery(&self) -> &Delivery {
        &self.granted.delivery
    }

    /// Attempts after which the message is given up; `None` is without limit.
    pub fn max_deliver(&self) -> Option<u64> {
        self.granted.spec.max_deliver
    }

    /// When the consumer was made.
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
