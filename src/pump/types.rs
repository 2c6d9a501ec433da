//! The public types of the pump: its inputs, its bounds and its steps. No logic.

use std::time::{Duration, Instant};

/// The wish of a waiter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Most messages, at least 1.
    pub n: u32,
    /// Most bytes of all messages, as encoded in the answer.
    pub max_bytes: u64,
    /// The end of the wait. Unused with `no_wait`.
    pub until: Instant,
    /// How long to wait for more after the first message. Unused with `no_wait`.
    pub linger: Duration,
    /// Only the messages that are available now.
    pub no_wait: bool,
}

/// Messages and bytes: what a flow may hold at the same time, or what it holds of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Credit {
    /// Messages.
    pub messages: u64,
    /// Bytes of all messages, as encoded in an answer. The last message may pass them: a flow is handed a message
    /// while it holds less.
    pub bytes: u64,
}

/// The bounds of the consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullLimits {
    /// Most messages of one pull, at least 1.
    pub max_batch: u32,
    /// Most unsettled deliveries, at least 1. It bounds a pull that ends when no more messages are available. A
    /// pull for flows alone stays open for messages that others have to settle first.
    pub max_unsettled: u32,
    /// Longest wait of one pull.
    pub max_expires: Duration,
    /// Most bytes that one pull may ask for.
    pub max_request_bytes: Option<u64>,
    /// How long surplus is parked for the next waiter.
    pub park: Duration,
    /// Longest linger of a waiter that has messages: their leases run meanwhile.
    pub linger: Duration,
}

/// The wish of a pull before the allowance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Messages, at least 1.
    pub messages: u32,
    /// Bytes as JetStream counts them, at least 1. `None`: one message of any size.
    pub bytes: Option<u64>,
}

/// The most that a pull may ask for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// Most messages. With 0 no pull is issued.
    pub messages: u32,
    /// Most bytes as JetStream counts them. With 0 no pull is issued. Does not bound a pull for one message
    /// of any size.
    pub bytes: u64,
    /// Longest wait.
    pub wait: Duration,
}

impl Allowance {
    /// No pull is issued.
    pub const NONE: Self = Self { messages: 0, bytes: 0, wait: Duration::ZERO };
}

/// The reason for the end of a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullOutcome {
    /// It brought every available message, or its time is over.
    Done,
    /// Other pulls already wait for the pending messages.
    RequestsPending,
    /// The next message is larger than the bytes that the pull has left.
    TooLarge,
    /// The pull's bytes are used up exactly.
    Spent,
    /// Any other reason. The caller handles the cause, and the next pull waits a little.
    Refused,
}

/// A step for the caller to perform.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<M> {
    /// Issue a pull.
    Pull {
        /// The number of the pull in [`Pump::ended`](super::Pump::ended). It starts at 1 and is never used
        /// again.
        no: u64,
        /// Most messages, at least 1.
        batch: u32,
        /// Longest wait.
        expires: Duration,
        /// End with the messages that are available at the first message. Otherwise wait for the whole batch.
        no_wait: bool,
        /// Most bytes as JetStream counts them, at least 1.
        max_bytes: Option<u64>,
    },
    /// Answer a waiter. It has left the pump.
    Answer {
        /// The waiter.
        waiter: WaiterId,
        /// Its messages.
        messages: Vec<M>,
        /// A message that would not fit into this waiter's answer even alone.
        too_large: Option<M>,
        /// The reason for the answer.
        why: Why,
    },
    /// Deliver messages to a flow. They use its credit until they are [freed](super::Pump::freed).
    Deliver {
        /// The flow.
        flow: FlowId,
        /// The messages, at least one, each with its size.
        messages: Vec<(M, u64)>,
    },
    /// The replica is draining, and the flow gets nothing more. It has left the pump.
    Over {
        /// The flow.
        flow: FlowId,
    },
    /// Give back a message that was parked for too long. Never a last attempt.
    Overdue {
        /// The message.
        message: M,
    },
}

/// The reason for an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It has all that it wants, or every available message. Every answer with messages has this reason.
    Filled,
    /// Its time is over, or no message is available and it does not wait.
    Waited,
    /// Its time is over, and there is no connection: nobody knows which messages are available.
    Down,
    /// The replica is draining.
    Draining,
}

/// The id of one flow of one pump. Ids are never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowId(pub(super) u64);

/// The id of one waiter of one pump. Ids are in the order of joining and never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WaiterId(pub(super) u64);
