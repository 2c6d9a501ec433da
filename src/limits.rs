//! Limits that more than one module names: the limits of the contract and of a listener. They are only
//! numbers; other modules enforce them.

use std::time::Duration;

/// Most messages of one Fetch. A higher number is lowered to this.
pub const MOST_MESSAGES: u32 = 1000;
/// Most settlements of one Settle. A Settle with more is refused.
pub const MOST_SETTLEMENTS: usize = 1000;
/// Longest wait for a first message. A longer wait is lowered to this.
pub const LONGEST_WAIT: Duration = Duration::from_secs(300);
/// The wait of a Fetch that sets none.
pub const DEFAULT_WAIT: Duration = Duration::from_secs(30);
/// Longest linger: the time that a Fetch collects messages after its first. A longer time is lowered to
/// this.
pub const LONGEST_LINGER: Duration = Duration::from_secs(5);
/// Shortest lease. A shorter lease is refused.
pub const SHORTEST_LEASE: Duration = Duration::from_secs(1);
/// Longest delay of a Nak. A longer delay is refused.
pub const LONGEST_DELAY: Duration = Duration::from_secs(24 * 3600);
/// Longest reason of a Term, in bytes. A longer reason is cut.
pub const LONGEST_REASON: usize = 1024;
/// Longest name of a stream or consumer, in bytes.
pub const LONGEST_NAME: usize = 255;
/// Longest name of an attempt, in bytes.
pub const LONGEST_ATTEMPT: usize = 128;
/// Longest name of a worker, in bytes. A longer name is cut.
pub const LONGEST_WORKER: usize = 1024;
/// Most bytes of an answer. A higher number is lowered to this.
pub const MOST_MAX_BYTES: u32 = 16 * 1024 * 1024;
/// Most bytes of an answer to a Fetch that sets none: the 4 MiB that gRPC clients accept by default, less
/// the answer's own frame and numbers.
pub const DEFAULT_MAX_BYTES: u64 = 4 * 1024 * 1024 - 1024;
/// Fewest bytes of an answer: one rejected entry with its token must fit. A lower number is refused.
pub const LEAST_MAX_BYTES: u32 = 1024;

/// The limits of one listener.
#[derive(Debug, Clone)]
pub struct ListenerLimits {
    /// Connections open at once.
    pub max_connections: usize,
    /// At this age a connection receives GOAWAY, so that clients spread over the replicas again. The age
    /// varies by a tenth. `None` is no limit.
    pub max_age: Option<Duration>,
    /// After this time without a call a connection receives GOAWAY. `None` is no limit.
    pub max_idle: Option<Duration>,
    /// Calls open at once on one connection.
    pub max_streams: u32,
    /// Whether HTTP/1.1 is accepted next to HTTP/2.
    pub http1: bool,
}

/// The limits of all calls together.
#[derive(Debug, Clone)]
pub struct CallLimits {
    /// Calls of the service that run at once, at least 1.
    pub max_calls: usize,
    /// Fetch calls among them, at least 1.
    pub max_waiters: usize,
    /// Bytes of requests that are being read or handled.
    pub max_request_bytes: usize,
    /// Bytes of memory for answers that their clients have not read.
    pub max_answer_bytes: usize,
}

/// The number of connections beyond `most` that are open at once. Their calls are refused with a reason.
pub fn turned_away(most: usize) -> usize {
    most / 8 + 8
}
