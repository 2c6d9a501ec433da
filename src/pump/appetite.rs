//! How much to ask for, by what the pulls before have brought. One consumer's, on one connection.
//!
//! ```text
//!            a pull came to its limit                     brought all there was
//!   any ───────────────────────────▶ HUNGRY ─────────────────────────────────▶ twice that,
//!            something is there                                                 IDLE at least
//! ```
//! Somebody idle asks for little, because his pull can last long and hold what others need. The first
//! messages that come then are few, or say by their size that more is needed.
//!
//! Pure: no clock, no log.

use super::{Demand, PullOutcome, budget::ByteRequest};

/// Most messages and bytes of a pull where nothing is known to be there.
const IDLE_MESSAGES: u32 = 64;
const IDLE_BYTES: u64 = 64 * 1024;
/// Less than this is not asked for, in bytes: some subject and a small message.
const LEAST_BYTES: u64 = 1024;

/// How much one consumer asks for, by what its pulls have brought: hungry or idle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appetite {
    messages: u32,
    bytes: u64,
    /// The largest message that the last pull has brought, in bytes.
    largest: u64,
    /// The next message was larger than the last share.
    whole: bool,
}

/// What a pull has brought until now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Course {
    /// Messages.
    pub messages: u32,
    /// Bytes of all of them.
    pub bytes: u64,
    /// Bytes of the largest.
    pub largest: u64,
}

impl Course {
    /// One more has come.
    pub fn count(&mut self, bytes: u64) {
        self.messages += 1;
        self.bytes = self.bytes.saturating_add(bytes);
        self.largest = self.largest.max(bytes);
    }
}

impl Appetite {
    /// Nothing is there, as far as is known.
    pub fn idle() -> Self {
        Self { messages: IDLE_MESSAGES, bytes: IDLE_BYTES, largest: 0, whole: false }
    }

    /// Something is there.
    pub fn hungry() -> Self {
        Self { messages: u32::MAX, bytes: u64::MAX, ..Self::idle() }
    }

    /// A pull has ended. `None`: its batch was full, or nothing was heard of it.
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

    /// Most messages to ask for.
    pub fn messages(&self, demand: &Demand) -> ByteRequest {
        let most = demand.messages.min(self.messages);
        ByteRequest {
            most: most.into(),
            least: 1,
            idle: most <= IDLE_MESSAGES && !self.is_hungry(),
        }
    }

    /// Bytes to ask for with so many messages, of which none is larger than `largest`.
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
