//! The table's times, and the two rules by which JetStream's ack wait becomes the time of a lease. A time
//! is kept as nanoseconds since the origin: 8 bytes, and an `Instant` takes 16.

use std::time::{Duration, Instant};

/// Nanoseconds since the origin. 2^63 of them are 292 years. Signed, because JetStream's clock of a lease
/// may have started before the origin.
pub(super) type Nanos = i64;

/// Before every time.
pub(super) const PAST: Nanos = Nanos::MIN;
/// After every time.
pub(super) const NEVER: Nanos = Nanos::MAX;

/// The smallest margin. The margin is a tenth of the ack wait, within [`MIN_MARGIN`] and [`MAX_MARGIN`]. It
/// covers two transit times: JetStream's clock starts before a delivery arrives, and a settlement that
/// begins in time must arrive in time.
const MIN_MARGIN: Nanos = 50_000_000;
/// The largest margin between the end of a lease here and the end of JetStream's ack wait.
pub const MAX_MARGIN: Duration = Duration::from_secs(2);

/// The longest time, 73 years. Longer times count as this, so that a few of them can be added.
const MAX_NANOS: Nanos = Nanos::MAX / 4;

/// The origin of the table's time, and its relation to the callers' clock. The callers' clock stands still
/// while the machine is suspended. The table's time does not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin {
    at: Instant,
    /// How long the callers' clock has stood still.
    slept: Nanos,
    /// When that was last noticed, and the value of `slept` before.
    noticed: Option<(Instant, Nanos)>,
}

impl Origin {
    pub(super) fn new(at: Instant) -> Self {
        Self { at, slept: 0, noticed: None }
    }

    /// The callers' clock has stood still for `gap`, some time before `noticed`.
    pub(super) fn slept(&mut self, gap: Duration, noticed: Instant) {
        self.noticed = Some((noticed, self.slept));
        self.slept = self.slept.saturating_add(nanos(gap)).min(MAX_NANOS);
    }

    /// The table's time at `when`, and zero for an earlier time than the origin. A time from before a gap was
    /// noticed counts as from before the gap, which is the earliest possibility.
    pub(super) fn since(self, when: Instant) -> Nanos {
        let slept = self.noticed.filter(|(noticed, _)| when < *noticed);
        nanos(when.saturating_duration_since(self.at))
            + slept.map_or(self.slept, |(_, before)| before)
    }

    /// The callers' time: the origin for an earlier time, and 73 years after it for [`NEVER`].
    pub(super) fn at(self, time: Nanos) -> Instant {
        let time = time.saturating_sub(self.slept).clamp(0, MAX_NANOS);
        self.at + Duration::from_nanos(time.unsigned_abs())
    }
}

pub(super) fn nanos(duration: Duration) -> Nanos {
    Nanos::try_from(duration.as_nanos()).unwrap_or(MAX_NANOS).min(MAX_NANOS)
}

pub(super) fn margin_of(ack_wait: Nanos) -> Nanos {
    (ack_wait / 10).clamp(MIN_MARGIN, nanos(MAX_MARGIN)).min(ack_wait)
}

/// The time between the end of a lease here and the end of JetStream's ack wait. It is a tenth of the ack
/// wait, at least 50 ms and at most 2 s, and never more than the ack wait itself.
pub fn margin(ack_wait: Duration) -> Duration {
    Duration::from_nanos(margin_of(nanos(ack_wait)).unsigned_abs())
}

/// JetStream's ack wait for the delivery of this count, which begins at 1. It is the entry of the consumer's
/// backoff at that position, or the last entry. Without a backoff it is the consumer's ack wait.
pub fn ack_wait_of(ack_wait: Duration, backoff: &[Duration], delivery_count: u64) -> Duration {
    let index = usize::try_from(delivery_count.saturating_sub(1)).unwrap_or(usize::MAX);
    backoff.get(index).or_else(|| backoff.last()).copied().unwrap_or(ack_wait)
}
