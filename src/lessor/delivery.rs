//! A delivery on its way to a caller: leased to us, and then to the caller. No logic.

use std::{
    net::SocketAddr,
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

/// Most bytes of a worker's name that are kept while the worker has leases. A longer name is cut.
const NAMED_WORKER: usize = 64;
/// The same for its identity.
const NAMED_IDENTITY: usize = 256;

/// The caller of a Fetch, for operators.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct FetchCaller {
    /// The name that the worker gives itself; may be empty.
    pub worker: Arc<str>,
    /// The identity that its credential gave.
    pub identity: Arc<str>,
    /// The address that its connection came from, if that is known.
    pub peer: Option<SocketAddr>,
}

impl FetchCaller {
    /// A caller. Long names are cut.
    pub fn new(worker: &str, identity: &str, peer: Option<SocketAddr>) -> Self {
        let cut = |text: &str, most| Arc::from(&text[..text.floor_char_boundary(most)]);
        Self { worker: cut(worker, NAMED_WORKER), identity: cut(identity, NAMED_IDENTITY), peer }
    }
}

/// A caller has taken a lease.
#[derive(Debug, Clone)]
pub(super) struct TakenLease {
    /// The caller. `None`: the lease was adopted from a replica that does not tell.
    pub(super) by: Option<Arc<FetchCaller>>,
    /// When the caller got it. If a replica does not tell, when it was adopted.
    pub(super) at: Instant,
    /// The caller has settled it, and nobody knows whether the settlement arrived.
    pub(super) is_settled: bool,
}

/// How long a caller wants its leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holding {
    /// This long. `None`: as long as JetStream waits by itself.
    For(Option<Duration>),
    /// As long as the stream of the caller lives.
    Kept {
        /// The longest, from the assignment.
        at_most: Duration,
        /// How much longer than the stream.
        grace: Duration,
    },
}

/// A caller's wish for its leases.
#[derive(Debug, Clone)]
pub(super) struct LeaseRequest {
    /// The length of each lease.
    pub(super) holding: Holding,
    /// The caller.
    pub(super) caller: Arc<FetchCaller>,
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
    /// Its number in its flow, from 1. 0: it came by a Fetch.
    pub number: u64,
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
