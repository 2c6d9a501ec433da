//! How fast work may begin while the place of the work cannot be reached. Pure.
//!
//! The first failure closes the gate for a time, which doubles with each failure. After that time the gate lets one
//! message through. If its place was reached, the gate is open again.

use std::time::{Duration, Instant};

/// How long the first failure closes the gate.
const FIRST_CLOSURE: Duration = Duration::from_millis(500);
/// The longest closure.
const LONGEST_CLOSURE: Duration = Duration::from_secs(30);

/// The gate in front of the work.
#[derive(Debug, Default)]
pub(super) struct Gate {
    failures: u32,
    closed_until: Option<Instant>,
}

impl Gate {
    /// How much may be at work, of `jobs`.
    pub(super) fn width(&self, now: Instant, jobs: usize) -> usize {
        match self.closed_until {
            None => jobs,
            Some(until) if now < until => 0,
            Some(_) => 1,
        }
    }

    /// The time at which the gate lets one through.
    pub(super) fn opens_at(&self, now: Instant) -> Option<Instant> {
        self.closed_until.filter(|until| *until > now)
    }

    /// Learns whether the place was reached. Returns how long the gate is closed from now, if it was open.
    pub(super) fn learn(&mut self, now: Instant, is_reached: bool) -> Option<Duration> {
        if is_reached {
            *self = Self::default();
            return None;
        }
        // Work that began at the same time fails together, and that counts once.
        if self.opens_at(now).is_some() {
            return None;
        }
        let closure = (FIRST_CLOSURE * 2_u32.pow(self.failures.min(10))).min(LONGEST_CLOSURE);
        self.failures += 1;
        self.closed_until = Some(now + closure);
        Some(closure)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gate_lets_one_through_after_longer_and_longer_times() {
        let mut now = crate::clock::now();
        let mut gate = Gate::default();
        assert_eq!(gate.width(now, 10), 10);
        let mut closures = Vec::new();
        for _ in 0..8 {
            let closure = gate.learn(now, false).unwrap();
            for _ in 1..10 {
                assert_eq!(gate.learn(now, false), None, "the others of the same moment");
            }
            assert_eq!(gate.width(now, 10), 0);
            assert_eq!(gate.opens_at(now), Some(now + closure));
            now += closure;
            assert_eq!((gate.width(now, 10), gate.opens_at(now)), (1, None));
            closures.push(closure.as_millis());
        }
        assert_eq!(closures, [500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
        assert_eq!(gate.learn(now, true), None);
        assert_eq!(gate.width(now, 10), 10);
    }
}
