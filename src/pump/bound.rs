//! How many bytes may be on their way on one connection, and how cuts of that connection change it.
//!
//! ```text
//!              cut with many bytes out, few had come before it
//!   as told ──────────────────────────────────────────────────▶ a quarter ──▶ … ──▶ MIN_BOUND
//!      ▲                                                          │
//!      └──────── twice as many, after a time without such a cut ──┘
//! ```
//! A server cuts a client for which too much waits (`max_pending`), or that does not read for too long
//! (`write_deadline`). It tells neither limit, and not that it was why.
//!
//! 1. The bound is never above what was told, and never below the lower one of that and `MIN_BOUND`.
//! 2. A cut after which most of what was asked for had come all the same does not change it: that was a
//!    cause of another kind.
//!
//! Pure: `now` is an argument.

use std::time::{Duration, Instant};

/// Bytes: small enough for any server that takes messages at all.
const MIN_BOUND: u64 = 16 * 1024;
/// A cut with less than this out is not one of a server for which too much waited, in bytes.
const MIN_OUTSTANDING_AT_CUT: u64 = 32 * 1024;
/// With so much out, a cut is one of those beyond doubt, in bytes.
const SURELY: u64 = 4 << 20;
/// A connection that has brought so many times what was out when it was cut was not cut for that.
const TIMES: u64 = 4;
/// A bound that was lowered doubles after this time, then after twice as long for each further cut,
/// up to the longest: a server's limit does not change, and each try costs what is on its way.
const FIRST_RAISE_AFTER: Duration = Duration::from_secs(30);
const MAX_RAISE_AFTER: Duration = Duration::from_secs(1800);

/// How many bytes may be on their way on one connection. A cut that the bytes explain lowers the bound.
#[derive(Debug, Clone)]
pub struct PullBound {
    most: u64,
    now: u64,
    /// Bytes that have come since the last cut.
    come: u64,
    pause: Duration,
    /// When it may double. `None`: it is as told.
    grow_at: Option<Instant>,
}

/// What the bytes of a connection tell of its cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cause {
    /// Bytes that pulls could still bring.
    pub out: u64,
    /// They were many: the server may have cut a slow consumer.
    pub slow: bool,
    /// So it has, beyond doubt.
    pub surely: bool,
    /// Something had come since the cut before.
    pub worked: bool,
}

impl PullBound {
    /// A bound of so many bytes.
    pub fn new(most: u64) -> Self {
        Self { most, now: most, come: 0, pause: FIRST_RAISE_AFTER, grow_at: None }
    }

    /// What it is when nothing was cut, in bytes.
    pub fn most(&self) -> u64 {
        self.most
    }

    /// So many bytes have come.
    pub fn came(&mut self, bytes: u64) {
        self.come = self.come.saturating_add(bytes);
    }

    /// The connection was cut while so many bytes were out, and nothing that was found explains it.
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

    /// What it is now, in bytes.
    pub fn at(&mut self, now: Instant) -> u64 {
        if self.grow_at.is_some_and(|at| now >= at) {
            self.now = self.now.saturating_mul(2).min(self.most);
            self.grow_at = (self.now < self.most).then_some(now + self.pause);
        }
        self.now
    }
}
