//! The words in which the model speaks to the network and to an observer.

use std::time::Duration;

use fetch_proxy::broker::{AckKind, Delivery, PullEnd};
/// The time of day at the beginning of the world, by the clock of the servers.
pub use fetch_proxy::simulated::EPOCH;

/// The time since the beginning of the world.
pub type Time = Duration;

/// A connection of a client to the servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connection(pub u64);

/// The inbox that receives the answers to a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InboxId {
    pub connection: Connection,
    pub inbox: u64,
}

/// Something that the servers send to a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sent {
    Message {
        to: InboxId,
        delivery: Delivery,
        /// It breaks the connection.
        poison: bool,
    },
    /// The pull with the number `no` has ended.
    End { to: InboxId, no: u64, end: PullEnd },
    /// The answer to the ack with the number `no`.
    Answer { to: Connection, no: u64, answered: Answered },
}

impl Sent {
    /// The connection that it is sent on.
    pub fn connection(&self) -> Connection {
        match self {
            Self::Message { to, .. } | Self::End { to, .. } => to.connection,
            Self::Answer { to, .. } => *to,
        }
    }

    /// The inbox that it is sent to. `None`: an answer to an ack.
    pub fn inbox(&self) -> Option<InboxId> {
        match self {
            Self::Message { to, .. } | Self::End { to, .. } => Some(*to),
            Self::Answer { .. } => None,
        }
    }
}

/// The answer to a publish to an ack subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// It was handled. The effect may be none.
    Ok,
    /// Nobody listens there.
    NoResponders,
}

/// The effect of an ack, for an observer from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    pub stream_sequence: u64,
    pub kind: AckKind,
    /// The delivery that the ack subject belongs to.
    pub of: DeliveryId,
    /// The delivery that the ack had an effect on. `None`: no delivery was pending.
    pub settled: Option<DeliveryId>,
}

/// One delivery in the history of the world. It stands in the last digits of a delivery's time of
/// publication, so everybody who sees the delivery can tell which one it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeliveryId(pub u64);

/// Ack clocks count from a day before the world: a Nak with a delay can set one to a time before the world.
pub const BEFORE: Duration = Duration::from_secs(86_400);

/// Messages are published at whole milliseconds, so these digits of the nanoseconds are free.
const DELIVERY_IDS: u64 = 1_000_000;

impl DeliveryId {
    /// The delivery with this place in the history.
    pub fn at(place: u64) -> Self {
        Self(place % DELIVERY_IDS)
    }

    /// The delivery with this time of publication, in nanoseconds.
    pub fn of(published: u64) -> Self {
        Self(published % DELIVERY_IDS)
    }
}
