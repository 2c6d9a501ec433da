//! The words that the lease table and its callers speak: what goes in, what comes out. No logic.

use std::{
    num::NonZeroU64,
    time::{Duration, Instant},
};

/// Names one lease: sequential from 1, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub(super) NonZeroU64);

impl LeaseId {
    /// The id of this number; there is no lease 0.
    pub fn new(number: u64) -> Option<Self> {
        NonZeroU64::new(number).map(Self)
    }

    /// Its number.
    pub fn get(self) -> u64 {
        self.0.get()
    }
}

/// One incarnation of one consumer; a consumer that is made anew gets a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConsumerId(pub u32);

/// How a message is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SettleKind {
    /// Done.
    Ack,
    /// Again.
    Nak,
    /// Never again.
    Term,
}

/// What is known of a delivery when it arrives.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Whose delivery it is.
    pub consumer: ConsumerId,
    /// The message's sequence in its stream.
    pub sequence: u64,
    /// The delivery's sequence in its consumer.
    pub consumer_sequence: u64,
    /// A Nak would destroy the message.
    pub last_attempt: bool,
    /// When it arrived here.
    pub received: Instant,
    /// How long before that the message was published: a server that takes over counts from there.
    pub age: Duration,
    /// JetStream's patience with this very delivery, see [`ack_wait_of`](super::ack_wait_of).
    pub ack_wait: Duration,
    /// Which attempt it is, for when the consumer's ack wait changes.
    pub delivery_count: u64,
}

/// A lease in a caller's hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assigned {
    /// When it ends, unless it is extended.
    pub deadline: Instant,
    /// The earlier of that and JetStream's own end as it is now: until then even somebody who
    /// cannot ask this table may settle it without harm.
    pub settle_by: Instant,
}

/// What to do about a settlement that was let through.
#[derive(Debug, PartialEq, Eq)]
pub enum BeginResult<'t, T> {
    /// Ask the broker, by what is kept here, and come back with the outcome.
    Publish(&'t T),
    /// It was settled in this way before: nothing is left to do.
    Duplicate,
}

/// What the broker made of a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishOutcome {
    /// It has had its effect.
    Confirmed,
    /// It never left us.
    Unsent,
    /// The consumer is gone.
    Denied,
    /// Nobody knows.
    Unconfirmed,
}

/// Where a lease stands after its settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseStatus {
    /// Held as before: nothing was applied.
    Held,
    /// It may have been applied, now or by an earlier try, and may be tried again in the same way.
    Uncertain,
    /// Over.
    Gone,
}

/// The table said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseError {
    /// It lapsed or was lost.
    Expired {
        /// It ended so long ago that how is not remembered, or there never was such a lease.
        forgotten: bool,
    },
    /// It was, or may have been, settled in another way.
    Settled {
        /// In this.
        by: SettleKind,
    },
    /// It is being settled at this moment.
    Busy,
}

/// Something that time has made due.
#[derive(Debug, PartialEq, Eq)]
pub enum Due<T> {
    /// Tell the broker that it is still worked on, and
    /// [`progressed`](super::LeaseTable::progressed) what came of it.
    Progress {
        /// Which.
        id: LeaseId,
    },
    /// Its holder let it lapse.
    Lapsed {
        /// Which.
        id: LeaseId,
        /// What was kept with it.
        payload: T,
        /// It may be given back, if that arrives by then: before, nobody else can have it, and it is
        /// not the last attempt.
        release: Option<Instant>,
    },
    /// JetStream may have given it away: nothing may be sent for it.
    Lost {
        /// Which.
        id: LeaseId,
        /// What was kept with it.
        payload: T,
    },
}

/// A delivery that goes back unhanded.
#[derive(Debug, PartialEq, Eq)]
pub struct GivenBack<T> {
    /// What was kept with it.
    pub payload: T,
    /// A Nak may be sent for it, as in [`Due::Lapsed`].
    pub release: Option<Instant>,
}

/// A lease on its way to another table: its clocks are what is left of them at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseSnapshot {
    /// The message's sequence in its stream.
    pub sequence: u64,
    /// The delivery's sequence in its consumer.
    pub consumer_sequence: u64,
    /// Which attempt it is.
    pub delivery_count: u64,
    /// A Nak would destroy the message.
    pub last_attempt: bool,
    /// JetStream's patience with this delivery.
    pub ack_wait: Duration,
    /// What is left until JetStream may give it away, less the margin.
    pub ack_by: Duration,
    /// How much less that is to a server that takes over.
    pub doubt: Duration,
    /// How long its holder may keep it.
    pub until: SnapshotExpiry,
    /// The length that its caller was granted; `None` is as long as JetStream waits by itself.
    pub granted: Option<Duration>,
    /// It was settled in this way, and nobody knows whether that arrived; `None`: it is held.
    pub uncertain: Option<SettleKind>,
}

/// How long the holder of a lease on its way may keep it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotExpiry {
    /// As long as JetStream waits by itself.
    JetStreamEnds,
    /// This much longer.
    At(Duration),
}
