//! The table's times: nanoseconds since its origin, 8 bytes where an `Instant` takes 16.

use std::time::{Duration, Instant};

/// Nanoseconds since the origin; 2^64 of them are 584 years.
pub(super) type Nanos = u64;

/// The margin is a tenth of the ack wait, within these bounds: it has to cover the way of a
/// delivery to us and of a settlement back, and JetStream's clock starts before ours.
const LEAST_MARGIN: Nanos = 50_000_000;
const MOST_MARGIN: Nanos = 2_000_000_000;

/// Where the table's time begins.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin(pub(super) Instant);

impl Origin {
    /// Zero for what was before the origin.
    pub(super) fn since(self, when: Instant) -> Nanos {
        nanos(when.saturating_duration_since(self.0))
    }

    pub(super) fn at(self, time: Nanos) -> Instant {
        // A lease without end is due in a century.
        const CENTURY: Nanos = 100 * 365 * 86_400 * 1_000_000_000;
        self.0 + Duration::from_nanos(time.min(CENTURY))
    }
}

pub(super) fn nanos(duration: Duration) -> Nanos {
    // A century is plenty, and leaves room for sums.
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).min(u64::MAX / 4)
}

pub(super) fn margin_of(ack_wait: Nanos) -> Nanos {
    (ack_wait / 10).clamp(LEAST_MARGIN, MOST_MARGIN).min(ack_wait)
}

/// How long before JetStream's own end a lease ends here.
pub fn margin(ack_wait: Duration) -> Duration {
    Duration::from_nanos(margin_of(nanos(ack_wait)))
}

/// JetStream's patience with the delivery of this count: the consumer's backoff of that place, its
/// last one for all after, or its ack wait where it has no backoff.
pub fn ack_wait_of(ack_wait: Duration, backoff: &[Duration], delivery_count: u64) -> Duration {
    let place = usize::try_from(delivery_count.saturating_sub(1)).unwrap_or(usize::MAX);
    backoff.get(place).or(backoff.last()).copied().unwrap_or(ack_wait)
}
