//! When the keys of one issuer are fetched, and for how long they are good. Pure.
//!
//! ```text
//!  due ─▶ running ─▶ worked: due in 5 min
//!   ▲        └─────▶ failed: due in 1 s, 2 s, … 30 s. The keys stay for 24 h after the last fetch that worked
//!   └── asked for, because a token names a key that is not here: at most once in 30 s
//! ```

use std::time::{Duration, Instant};

/// The time from one fetch to the next, within a tenth.
const REFRESH_INTERVAL: Duration = Duration::from_secs(300);
/// Longest time from a failed fetch to the next, within a tenth. The first is one second, and each next twice as long.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Shortest time between two fetches that tokens ask for.
const ASK_INTERVAL: Duration = Duration::from_secs(30);
/// The time for which keys stay in use while no fetch works.
const KEPT_FOR: Duration = Duration::from_secs(24 * 3600);

/// The fetches of the keys of one issuer.
#[derive(Debug)]
pub(super) struct Refresh {
    /// The time of the next fetch. `None`: one is running.
    due: Option<Instant>,
    /// The time at which a token asked for one.
    asked_at: Option<Instant>,
    /// Fetches that failed since the last that worked.
    failures: u32,
    /// The time of the last fetch that worked, while its keys are in use.
    worked_at: Option<Instant>,
}

impl Refresh {
    /// A first fetch is due at once.
    pub(super) fn new(now: Instant) -> Self {
        Self { due: Some(now), asked_at: None, failures: 0, worked_at: None }
    }

    /// Whether a fetch is to run now. If so, it counts as running.
    pub(super) fn begins(&mut self, now: Instant) -> bool {
        self.due.take_if(|due| *due <= now).is_some()
    }

    /// A fetch has ended. `jitter` is from 0 to 1.
    pub(super) fn ended(&mut self, worked: bool, now: Instant, jitter: f64) {
        let wait = if worked {
            (self.failures, self.worked_at) = (0, Some(now));
            REFRESH_INTERVAL
        } else {
            let wait = Duration::from_secs(1 << self.failures.min(5)).min(LONGEST_RETRY);
            self.failures += 1;
            wait
        };
        self.due = Some(now + wait.mul_f64(0.9 + 0.2 * jitter));
    }

    /// A token names a key that is not here. Whether that can change soon: a fetch runs, or is due by this, or the
    /// last one failed and is tried again.
    pub(super) fn ask(&mut self, now: Instant) -> bool {
        let lately = |asked_at: Instant| now.saturating_duration_since(asked_at) < ASK_INTERVAL;
        if self.due.is_none() || self.failures > 0 {
            return true;
        }
        if self.asked_at.is_some_and(lately) {
            return false;
        }
        (self.asked_at, self.due) = (Some(now), Some(now));
        true
    }

    /// Whether the keys are too old from now on. It is true once.
    pub(super) fn outlives(&mut self, now: Instant) -> bool {
        self.worked_at.take_if(|worked_at| now >= *worked_at + KEPT_FOR).is_some()
    }

    /// The age of the keys that are in use.
    pub(super) fn age(&self, now: Instant) -> Option<Duration> {
        self.worked_at.map(|worked_at| now.saturating_duration_since(worked_at))
    }

    /// The time at which there is something to do. `None`: only the running fetch can change something.
    pub(super) fn next(&self) -> Option<Instant> {
        let outlives = self.worked_at.map(|worked_at| worked_at + KEPT_FOR);
        self.due.into_iter().chain(outlives).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn keys_are_fetched_every_five_minutes_within_a_tenth() {
        for (jitter, wait) in [(0.0, 270), (0.5, 300), (1.0, 330)] {
            let start = clock::now();
            let mut refresh = Refresh::new(start);
            assert!(refresh.begins(start) && !refresh.begins(start), "it runs once");
            refresh.ended(true, start, jitter);
            let due = start + Duration::from_secs(wait);
            assert_eq!(refresh.next(), Some(due));
            assert!(!refresh.begins(due - SECOND / 1000) && refresh.begins(due));
        }
    }

    #[test]
    fn failed_fetch_is_tried_again_after_one_second_and_later_after_thirty() {
        let mut now = clock::now();
        let mut refresh = Refresh::new(now);
        let waits = [1, 2, 4, 8, 16, 30, 30, 30].map(Duration::from_secs);
        for wait in waits {
            assert!(refresh.begins(now));
            refresh.ended(false, now, 0.5);
            assert_eq!(refresh.next(), Some(now + wait));
            now += wait;
        }
        assert!(refresh.begins(now));
        refresh.ended(true, now, 0.5);
        assert_eq!(refresh.next(), Some(now + REFRESH_INTERVAL));
    }

    #[test]
    fn unknown_key_asks_for_one_fetch_in_thirty_seconds() {
        let start = clock::now();
        let mut refresh = Refresh::new(start);
        assert!(refresh.begins(start));
        assert!(refresh.ask(start), "the first fetch is running");
        refresh.ended(true, start, 0.5);
        let mut fetches = 0;
        // A token with an unknown key in each millisecond of 89 s.
        for millisecond in 0..89_000 {
            let now = start + Duration::from_millis(millisecond);
            let asked = refresh.ask(now);
            let begins = refresh.begins(now);
            assert_eq!(asked, begins, "{millisecond}");
            if begins {
                fetches += 1;
                assert!(refresh.ask(now), "it is running");
                refresh.ended(true, now, 0.5);
            }
        }
        assert_eq!(fetches, 3);
    }

    #[test]
    fn unknown_key_is_no_refusal_while_its_issuer_is_away() {
        let start = clock::now();
        let mut refresh = Refresh::new(start);
        assert!(refresh.begins(start));
        refresh.ended(false, start, 0.5);
        for _ in 0..100 {
            assert!(refresh.ask(start));
        }
        assert!(!refresh.begins(start), "no token makes it come sooner");
    }

    #[test]
    fn last_good_keys_stay_for_a_day() {
        let start = clock::now();
        let mut refresh = Refresh::new(start);
        assert!(!refresh.outlives(start + 2 * KEPT_FOR), "there were none");
        assert!(refresh.begins(start));
        refresh.ended(true, start, 0.5);
        let late = start + Duration::from_secs(3600);
        assert!(refresh.begins(late));
        refresh.ended(false, late, 0.5);
        assert!(!refresh.outlives(start + KEPT_FOR - SECOND));
        assert!(refresh.outlives(start + KEPT_FOR));
        assert!(!refresh.outlives(start + KEPT_FOR), "once");
        let later = start + KEPT_FOR + SECOND;
        assert!(refresh.begins(later));
        refresh.ended(true, later, 0.5);
        assert!(!refresh.outlives(later + KEPT_FOR - SECOND), "a day from the last good fetch");
    }
}
