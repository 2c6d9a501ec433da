//! The table's times: nanoseconds since its origin, 8 bytes where an `Instant` takes 16, and the
//! two rules by which JetStream's patience becomes ours.

use std::time::{Duration, Instant};

/// Nanoseconds since the origin; 2^63 of them are 292 years. Signed, because JetStream's clock for
/// a lease may have started before the table did.
pub(super) type Nanos = i64;

/// Before every time there is.
pub(super) const PAST: Nanos = Nanos::MIN;
/// After every time there is.
pub(super) const NEVER: Nanos = Nanos::MAX;

/// The margin is a tenth of the ack wait within these bounds: it covers the way of a delivery to us
/// and of a settlement back, for JetStream's clock starts before ours and a settlement begun in
/// time has to arrive in time.
const MIN_MARGIN: Nanos = 50_000_000;
/// The largest margin between the end of a lease here and the end of JetStream's ack wait.
pub const MAX_MARGIN: Duration = Duration::from_secs(2);

/// The longest time that is told apart from a longer one, 73 years: a few of them can be summed.
const MAX_NANOS: Nanos = Nanos::MAX / 4;

/// Where the table's time begins, and how it follows from that of its callers: theirs stands still
/// while the machine is suspended, the table's does not.
#[derive(Debug, Clone, Copy)]
pub(super) struct Origin {
    at: Instant,
    /// How long callers' time has stood still.
    slept: Nanos,
    /// When that was noticed last, and how long it had been before.
    noticed: Option<(Instant, Nanos)>,
}

impl Origin {
    pub(super) fn new(at: Instant) -> Self {
        Self { at, slept: 0, noticed: None }
    }

    /// Callers' time has stood still for so long, some time before `noticed`.
    pub(super) fn slept(&mut self, gap: Duration, noticed: Instant) {
        self.noticed = Some((noticed, self.slept));
        self.slept = self.slept.saturating_add(nanos(gap)).min(MAX_NANOS);
    }

    /// Zero for what was before the origin. What a caller has noted before a gap was noticed counts as
    /// from before the gap: as early as it can have been.
    pub(super) fn since(self, when: Instant) -> Nanos {
        let slept = self.noticed.filter(|(noticed, _)| when < *noticed);
        nanos(when.saturating_duration_since(self.at))
            + slept.map_or(self.slept, |(_, before)| before)
    }

    /// The origin for what was before it; 73 years for what never comes.
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

/// How long before JetStream's own end a lease ends here: a tenth of the ack wait, at least 50 ms,
/// at most 2 s, and never more than the ack wait itself.
pub fn margin(ack_wait: Duration) -> Duration {
    Duration::from_nanos(margin_of(nanos(ack_wait)).unsigned_abs())
}

/// JetStream's patience with the delivery of this count, which begins at 1: the consumer's backoff
/// of that place, its last one for all after, or its ack wait where it has no backoff.
pub fn ack_wait_of(ack_wait: Duration, backoff: &[Duration], delivery_count: u64) -> Duration {
    let place = usize::try_from(delivery_count.saturating_sub(1)).unwrap_or(usize::MAX);
    backoff.get(place).or_else(|| backoff.last()).copied().unwrap_or(ack_wait)
}
