//! The bound of the bytes that may be on their way on one connection, and its changes after cuts of that
//! connection.
//!
//! ```text
//!              cut with many bytes out, few had come before it
//!   maximum ──────────────────────────────────────────────────▶ a quarter ──▶ … ──▶ MIN_BOUND
//!      ▲                                                          │
//!      └──────── twice as many, after a time without such a cut ──┘
//! ```
//! A server cuts a client if too many bytes wait for it (`max_pending`), or if it does not read for too long
//! (`write_deadline`). The server tells neither limit, nor the cause of the cut.
//!
//! 1. The bound is never above the maximum, and never below the lower of the maximum and `MIN_BOUND`.
//! 2. If most of the bytes had arrived before a cut, the cut does not change the bound: it had another cause.
//!
//! Pure: `now` is an argument.

use std::time::{Duration, Instant};

/// The smallest bound, in bytes: small enough for any server.
const MIN_BOUND: u64 = 16 * 1024;
/// A cut with fewer bytes out than this had another cause than waiting bytes.
const MIN_OUTSTANDING_AT_CUT: u64 = 32 * 1024;
/// With this many bytes out, waiting bytes are certainly the cause of a cut.
const SURELY: u64 = 4 << 20;
/// If a connection has brought this many times the bytes that were out at its cut, the cut had another
/// cause.
const TIMES: u64 = 4;
/// The time until a lowered bound doubles. It doubles with each further cut, up to [`MAX_RAISE_AFTER`]. A
/// server's limit does not change, and each attempt costs the bytes that are on their way.
const FIRST_RAISE_AFTER: Duration = Duration::from_secs(30);
const MAX_RAISE_AFTER: Duration = Duration::from_secs(1800);

/// The bound of the bytes that may be on their way on one connection. A cut that the bytes explain lowers
/// it.
#[derive(Debug, Clone)]
pub struct PullBound {
    most: u64,
    now: u64,
    /// The bytes that have come since the last cut.
    come: u64,
    pause: Duration,
    /// The time at which the bound may double. `None`: it is at its maximum.
    grow_at: Option<Instant>,
}

/// The cause of a cut, as far as the bytes show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cause {
    /// The bytes that pulls could still bring.
    pub out: u64,
    /// Many bytes were out: the server may have cut a slow consumer.
    pub slow: bool,
    /// The server has certainly cut a slow consumer.
    pub surely: bool,
    /// Bytes had come since the cut before.
    pub worked: bool,
}

impl PullBound {
    /// A bound with this maximum, in bytes.
    pub fn new(most: u64) -> Self {
        Self { most, now: most, come: 0, pause: FIRST_RAISE_AFTER, grow_at: None }
    }

    /// The maximum, in bytes.
    pub fn most(&self) -> u64 {
        self.most
    }

    /// Notes that `bytes` have come.
    pub fn came(&mut self, bytes: u64) {
        self.come = self.come.saturating_add(bytes);
    }

    /// The connection was cut while `out` bytes were out, and nothing else explains the cut.
    pub fn cut(&mut self, out: u64, now: Instant) -> Cause {
        let come = std::mem::take(&mut self.come);
        let (many, few_came) = (out >= MIN_OUTSTANDING_AT_CUT, come < out.saturating_mul(TIMES));
        if many && few_came {
            self.now = (self.now.min(out) / 4).max(MIN_BOUND.min(self.most));
            self.grow_at = Some(now + self.pause);
            self.pause = (self.pause * 2).min(MAX_RAISE_AFTER);
        }
        Cause { out, slow: many, surely: out >= SURELY && few_came, worked: come > 0 }
    }

    /// The bound at `now`, in bytes.
    pub fn at(&mut self, now: Instant) -> u64 {
        if self.grow_at.is_some_and(|at| now >= at) {
            self.now = self.now.saturating_mul(2).min(self.most);
            self.grow_at = (self.now < self.most).then_some(now + self.pause);
        }
        self.now
    }
}
