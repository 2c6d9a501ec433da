//! The time by which everything that was sent must have arrived at NATS.

use std::time::{Duration, Instant};

use tokio::sync::watch;

/// A probe waits at least this long, so that it stands for more than one message.
const MIN_GATHER_TIME: Duration = Duration::from_millis(10);

/// The earliest deadline of all messages that were sent after the last probe.
#[derive(Default)]
pub(super) struct ArrivalDeadline(watch::Sender<Option<NextProbe>>);

/// The next probe that the deadline demands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NextProbe {
    /// When to send the probe: half of the time that was left.
    pub(super) send_at: Instant,
    /// When the messages must have arrived.
    pub(super) by: Instant,
}

impl ArrivalDeadline {
    /// Notes that a message was sent at `now` that must arrive by `by`.
    pub(super) fn must_arrive(&self, by: Instant, now: Instant) {
        let half = by.saturating_duration_since(now) / 2;
        let new = NextProbe { send_at: now + half.max(MIN_GATHER_TIME), by };
        self.0.send_if_modified(|next| match next {
            Some(old) if old.by <= by => false,
            Some(old) => {
                *old = NextProbe { send_at: old.send_at.min(new.send_at), by };
                true
            }
            none @ None => {
                *none = Some(new);
                true
            }
        });
    }

    /// Follows the deadline.
    pub(super) fn watch(&self) -> watch::Receiver<Option<NextProbe>> {
        self.0.subscribe()
    }

    /// Clears the deadline and returns it. A probe that is sent now stands for it.
    pub(super) fn take(&self) -> Option<NextProbe> {
        self.0.send_replace(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn the_earliest_deadline_decides_when_to_probe() {
        let deadline = ArrivalDeadline::default();
        let start = clock::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let next = || deadline.0.borrow().unwrap();
        deadline.must_arrive(after(10), start);
        assert_eq!(next(), NextProbe { send_at: after(5), by: after(10) });
        deadline.must_arrive(after(20), after(1));
        assert_eq!(next(), NextProbe { send_at: after(5), by: after(10) });
        deadline.must_arrive(after(4), after(2));
        assert_eq!(next(), NextProbe { send_at: after(3), by: after(4) });
        deadline.must_arrive(after(1), after(2));
        assert_eq!(next(), NextProbe { send_at: after(2) + MIN_GATHER_TIME, by: after(1) });
    }
}
