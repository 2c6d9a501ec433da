//! The pump's own words: what it is asked, told and bounded by, and what it asks for. No rules.

use std::time::{Duration, Instant};

/// What a waiter wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    /// Most messages, at least 1.
    pub n: u32,
    /// Most bytes of them, encoded.
    pub max_bytes: u64,
    /// Wait until then. Says nothing for one that does not wait.
    pub until: Instant,
    /// After the first message, go on this long. Says nothing for one that does not wait.
    pub linger: Duration,
    /// Only what is there now.
    pub no_wait: bool,
}

/// Bounds of the consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PullLimits {
    /// Most messages of one pull, at least 1.
    pub max_batch: u32,
    /// Longest wait of one pull.
    pub max_expires: Duration,
    /// Most bytes that one pull may ask for.
    pub max_request_bytes: Option<u64>,
    /// How long surplus waits for the next waiter.
    pub park: Duration,
}

/// What a pull would ask for if nothing else bounded it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Demand {
    /// Messages, at least 1.
    pub messages: u32,
    /// Bytes, as JetStream counts them, at least 1. `None`: one message of any size.
    pub bytes: Option<u64>,
}

/// What a pull may ask for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowance {
    /// Most messages; with 0 none is issued.
    pub messages: u32,
    /// Most bytes, as JetStream counts them; with 0 none is issued. Does not bound a pull for one
    /// message of any size.
    pub bytes: u64,
    /// Longest wait.
    pub wait: Duration,
}

impl Allowance {
    /// No pull is issued.
    pub const NONE: Self = Self { messages: 0, bytes: 0, wait: Duration::ZERO };
}

/// Why a pull ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullOutcome {
    /// It brought what there was, or its time is over.
    Done,
    /// Other pulls already wait for what is pending.
    RequestsPending,
    /// The next message exceeds what is left of the pull's bytes.
    TooLarge,
    /// The pull's bytes are used up to the last.
    Spent,
    /// Anything else. The caller sees to the cause; the next pull only waits a little.
    Refused,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<M> {
    /// Ask for messages.
    Pull {
        /// Names the pull in [`Pump::ended`](super::Pump::ended): from 1, never used again.
        no: u64,
        /// Most messages, at least 1.
        batch: u32,
        /// Longest wait.
        expires: Duration,
        /// End with what is there at the first message; otherwise wait in line for one message.
        no_wait: bool,
        /// Most bytes, as JetStream counts them, at least 1.
        max_bytes: Option<u64>,
    },
    /// Answer a waiter, who is out of the pump with this.
    Answer {
        /// Whom.
        waiter: WaiterId,
        /// With what.
        messages: Vec<M>,
        /// A message that would not fit into an answer of this waiter's even alone.
        too_large: Option<M>,
        /// Why now.
        why: Why,
    },
    /// Nobody has wanted this message for too long: give it back. Never a last attempt.
    Overdue {
        /// Which.
        message: M,
    },
}

/// Why a waiter is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It has what it wants, or what there is. Any answer with a message in it says this.
    Filled,
    /// Its time is over, or there is nothing now and it does not wait.
    Waited,
    /// Its time is over, and there is no connection: nobody knows what there is.
    Down,
    /// The replica is going.
    Draining,
}

/// Names one waiter of one pump, in the order of joining; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct WaiterId(pub(super) u64);
