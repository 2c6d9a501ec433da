//! How much one consumer asks for on one connection, by the results of its pulls so far.
//!
//! ```text
//!            a pull reached its limit                     brought every available message
//!   any ───────────────────────────▶ HUNGRY ─────────────────────────────────▶ twice that,
//!            messages are available                                             at least IDLE
//! ```
//! An idle consumer asks for little, because its pull can last long and hold a share that others need. The
//! first messages of such a pull are few, or show by their size that more is needed.
//!
//! Pure: no clock, no log.

use super::{Demand, PullOutcome, budget::ByteRequest};

/// Most messages and bytes of a pull if no message is known to be available.
const IDLE_MESSAGES: u32 = 64;
const IDLE_BYTES: u64 = 64 * 1024;
/// The smallest request, in bytes: a subject and a small message.
const LEAST_BYTES: u64 = 1024;

/// How much one consumer asks for: hungry or idle, by the results of its pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appetite {
    messages: u32,
    bytes: u64,
    /// The largest message of the last pull, in bytes.
    largest: u64,
    /// Whether the next message was larger than the last share.
    whole: bool,
}

/// The messages that a pull has brought so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Course {
    /// The number of messages.
    pub messages: u32,
    /// The bytes of all messages.
    pub bytes: u64,
    /// The bytes of the largest message.
    pub largest: u64,
}

impl Course {
    /// Counts one more message.
    pub fn count(&mut self, bytes: u64) {
        self.messages += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        self.largest = self.largest.max(bytes);
    }
}

impl Appetite {
    /// No message is known to be available.
    pub fn idle() -> Self {
        Self { messages: IDLE_MESSAGES, bytes: IDLE_BYTES, largest: 0, whole: false }
    }

    /// Messages are available.
    pub fn hungry() -> Self {
        Self { messages: u32::MAX, bytes: u64::MAX, ..Self::idle() }
    }

    /// A pull has ended. `None`: its batch was full, or its end never came.
    pub fn after(&mut self, course: &Course, end: Option<PullOutcome>) {
        let largest = if course.messages > 0 { course.largest } else { self.largest };
        match end {
            Some(PullOutcome::Done) => {
                let messages = course.messages.saturating_mul(2).max(IDLE_MESSAGES);
                let bytes = course.bytes.saturating_mul(2).max(IDLE_BYTES);
                *self = Self { messages, bytes, largest: course.largest, whole: false };
            }
            Some(PullOutcome::TooLarge) if course.messages == 0 => {
                *self = Self { whole: true, largest, ..Self::hungry() };
            }
            None if course.messages == 0 => *self = Self::idle(),
            None | Some(PullOutcome::TooLarge | PullOutcome::Spent) => {
                *self = Self { largest, ..Self::hungry() };
            }
            Some(PullOutcome::RequestsPending | PullOutcome::Refused) => {}
        }
    }

    /// The number of messages to ask for.
    pub fn messages(&self, demand: &Demand) -> ByteRequest {
        let most = demand.messages.min(self.messages);
        ByteRequest {
            most: most.into(),
            least: 1,
            idle: most <= IDLE_MESSAGES && !self.is_hungry(),
        }
    }

    /// The bytes to ask for with `messages` messages, of which none is larger than `largest`.
    pub fn bytes(&self, demand: &Demand, messages: u64, largest: u64) -> ByteRequest {
        let Some(bytes) = demand.bytes else {
            return ByteRequest { most: largest, least: largest, idle: false };
        };
        let full = bytes.min(messages.saturating_mul(largest)).max(1);
        let most = full.min(self.bytes);
        if self.whole {
            return ByteRequest { most, least: most.min(largest), idle: false };
        }
        let idle = most <= IDLE_BYTES && !self.is_hungry();
        let least = if idle { LEAST_BYTES } else { self.largest.max(LEAST_BYTES) };
        ByteRequest { most, least: least.min(most), idle }
    }

    fn is_hungry(&self) -> bool {
        self.bytes == u64::MAX
    }
}
