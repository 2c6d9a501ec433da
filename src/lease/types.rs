//! The public types of the lease table: its arguments and results. No logic.

use std::{
    num::NonZeroU64,
    time::{Duration, Instant},
};

/// The id of one lease: sequential from 1, and never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub(super) NonZeroU64);

impl LeaseId {
    /// The id with this number. `None` for 0.
    pub fn new(number: u64) -> Option<Self> {
        NonZeroU64::new(number).map(Self)
    }

    /// Its number.
    pub fn get(self) -> u64 {
        self.0.get()
    }
}

/// One incarnation of one consumer. A consumer that is deleted and created again gets a new id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConsumerId(pub u32);

/// The way in which a message is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SettleKind {
    /// The message is done.
    Ack,
    /// JetStream delivers the message again.
    Nak,
    /// JetStream never delivers the message again.
    Term,
}

/// The facts of a delivery when it arrives.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The consumer of the delivery.
    pub consumer: ConsumerId,
    /// The message's sequence in its stream.
    pub sequence: u64,
    /// The delivery's sequence in its consumer.
    pub consumer_sequence: u64,
    /// It is the last attempt: a Nak would destroy the message.
    pub last_attempt: bool,
    /// The time of its arrival here.
    pub received: Instant,
    /// JetStream did not send it before this time: its pull was sent then. `None`: no pull is known.
    pub sent_after: Option<Instant>,
    /// The time from the publishing of the message to the arrival. A server that takes over counts its ack
    /// wait from the publishing.
    pub age: Duration,
    /// The ack wait of this delivery, see [`ack_wait_of`](super::ack_wait_of).
    pub ack_wait: Duration,
    /// The number of the attempt, from 1. It is needed when the consumer's ack wait changes.
    pub delivery_count: u64,
}

/// A lease that is assigned to a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Assigned {
    /// The end of the lease, unless it is extended.
    pub deadline: Instant,
    /// The earlier of the first possible end of the lease and of JetStream's present end. Until then even a replica that
    /// cannot ask this table can settle the message without harm. A kept lease can end after its grace.
    pub settle_by: Instant,
}

/// The next step of a settlement that has begun.
#[derive(Debug, PartialEq, Eq)]
pub enum BeginResult<'t, T> {
    /// Publish the settlement with this payload, and report the outcome.
    Publish(&'t T),
    /// The lease was settled in the same way before: nothing is left to do.
    Duplicate,
    /// A Nak was published before and not confirmed. It is not published again.
    NakUnconfirmed {
        /// The ack wait of this delivery. If the Nak was not applied, JetStream redelivers the message by
        /// itself within this time: its clock has started before.
        ack_wait: Duration,
    },
}

/// The outcome of a settlement at the broker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PublishOutcome {
    /// The settlement has had its effect.
    Confirmed,
    /// The settlement never left us.
    Unsent,
    /// The consumer is gone.
    Denied,
    /// The settlement may have had its effect, or may still have it.
    Unconfirmed,
}

/// The state of a lease after a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseStatus {
    /// Held as before. Nothing was applied.
    Held,
    /// A settlement may have been applied, now or by an earlier attempt. An Ack or a Term can be repeated.
    Uncertain,
    /// The lease is over.
    Gone,
}

/// The reason for a refusal by the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseError {
    /// The lease lapsed or was lost.
    Expired {
        /// Its end is no longer remembered, or there never was such a lease.
        forgotten: bool,
    },
    /// The lease was settled in another way, or may have been.
    Settled {
        /// The way in which it was settled.
        by: SettleKind,
    },
    /// The lease is being settled at this moment.
    Busy,
}

/// How a consumer has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsumerEnd {
    /// It was deleted, and another consumer may have its name.
    Gone,
    /// It was reset, and delivers its messages again.
    Reset,
}

/// How a lease has left the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseOutcome {
    /// It was settled, or its message arrived again while such a settlement was running.
    Settled {
        /// The way in which it was settled.
        by: SettleKind,
    },
    /// It lapsed or was lost.
    Expired,
    /// Its consumer is gone.
    ConsumerGone,
}

/// A lease that is due.
#[derive(Debug, PartialEq, Eq)]
pub enum Due<T> {
    /// Send progress, and report the outcome to [`progressed`](super::LeaseTable::progressed).
    Progress {
        /// The lease.
        id: LeaseId,
    },
    /// The deadline of its holder has passed, or `ack_by` if the holder asked for no length.
    Lapsed {
        /// The lease.
        id: LeaseId,
        /// Its payload.
        payload: T,
        /// A Nak is harmless if it arrives by then: nobody else can have the message before. `None`: no Nak
        /// may be sent, because the time is too short or it was the last attempt.
        release: Option<Instant>,
    },
    /// JetStream may have given the message away before the deadline of its holder. Nothing may be sent for it.
    Lost {
        /// The lease.
        id: LeaseId,
        /// Its payload.
        payload: T,
    },
}

/// A delivery that goes back and was never assigned.
#[derive(Debug, PartialEq, Eq)]
pub struct GivenBack<T> {
    /// Its payload.
    pub payload: T,
    /// The time by which a Nak must arrive, as in [`Due::Lapsed`].
    pub release: Option<Instant>,
}

/// A lease on its way to another table. Its clocks are given as the time that is left at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseSnapshot {
    /// The message's sequence in its stream.
    pub sequence: u64,
    /// The delivery's sequence in its consumer.
    pub consumer_sequence: u64,
    /// The number of the attempt, from 1.
    pub delivery_count: u64,
    /// It is the last attempt: a Nak would destroy the message.
    pub last_attempt: bool,
    /// The ack wait of this delivery.
    pub ack_wait: Duration,
    /// The time until JetStream may give the message away, minus the margin.
    pub ack_by: Duration,
    /// How much less `ack_by` is at a server that takes over.
    pub doubt: Duration,
    /// The same at a server that has taken over since the leader was last seen.
    pub doubt_unseen: Duration,
    /// The end of the holder's time.
    pub until: SnapshotExpiry,
    /// The length of the assignment. `None`: as long as JetStream waits by itself.
    pub granted: Option<Duration>,
    /// It was settled in this way, and nobody knows whether the settlement arrived. `None`: it is held.
    pub uncertain: Option<SettleKind>,
}

/// The end of the holder's time in a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotExpiry {
    /// JetStream's own end.
    JetStreamEnds,
    /// This much time from now.
    At(Duration),
}
