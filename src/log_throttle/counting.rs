//! How often a line may be written that strangers can cause, if no event may be lost from the count. Pure.
//!
//! 1. Events of one key have at most one line in [`KEY_INTERVAL`].
//! 2. All keys together have at most [`MOST_LINES`] lines in that time.
//! 3. A line tells how many events of its key had no line since the last one, unless its key was forgotten.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

/// The least time between two lines of one key.
const KEY_INTERVAL: Duration = Duration::from_secs(1);
/// Most lines in that time: a day of them takes some gigabytes of a disk.
const MOST_LINES: u32 = 100;
/// Most keys that are remembered at once, with about 40 bytes each.
const MAX_COUNTED_KEYS: usize = 4096;

/// The lines that were written lately.
#[derive(Debug, Default)]
pub struct CountingThrottle {
    keys: BTreeMap<u64, KeyHistory>,
    /// The begin of the present interval, and the lines in it.
    interval: Option<(Instant, u32)>,
}

#[derive(Debug, Default)]
struct KeyHistory {
    line: Option<Instant>,
    /// Events without a line since then.
    silent: u64,
}

impl CountingThrottle {
    /// An event of this key. Returns the number of events without a line before it, if it has a line.
    pub fn line(&mut self, key: u64, now: Instant) -> Option<u64> {
        self.make_room(key, now);
        let lately = |at: Instant| now.saturating_duration_since(at) < KEY_INTERVAL;
        let (began, lines) = self.interval.filter(|(began, _)| lately(*began)).unwrap_or((now, 0));
        let history = self.keys.entry(key).or_default();
        if lines >= MOST_LINES || history.line.is_some_and(lately) {
            history.silent += 1;
            return None;
        }
        self.interval = Some((began, lines + 1));
        history.line = Some(now);
        Some(std::mem::take(&mut history.silent))
    }

    /// Forgets keys if there is no room for another. Keys that have told everything go first.
    fn make_room(&mut self, key: u64, now: Instant) {
        if self.keys.len() < MAX_COUNTED_KEYS || self.keys.contains_key(&key) {
            return;
        }
        let lately = |at: Instant| now.saturating_duration_since(at) < KEY_INTERVAL;
        self.keys.retain(|_, history| history.silent > 0 || history.line.is_some_and(lately));
        if self.keys.len() >= MAX_COUNTED_KEYS {
            self.keys.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    /// Events of one key at these milliseconds, and the lines.
    fn lines(throttle: &mut CountingThrottle, key: u64, at: &[u64]) -> Vec<Option<u64>> {
        let start = clock::now();
        at.iter().map(|at| throttle.line(key, start + Duration::from_millis(*at))).collect()
    }

    #[test]
    fn key_has_one_line_a_second_which_counts_the_others() {
        let mut throttle = CountingThrottle::default();
        let told = lines(&mut throttle, 1, &[0, 1, 999, 1000, 1500, 3000, 4000]);
        assert_eq!(told, [Some(0), None, None, Some(2), None, Some(1), Some(0)]);
    }

    #[test]
    fn many_keys_have_few_lines_and_lose_no_count() {
        let (mut throttle, start) = (CountingThrottle::default(), clock::now());
        let first = (0..1000).filter(|key| throttle.line(*key, start).is_some()).count();
        assert_eq!(first, MOST_LINES as usize);
        let later = start + KEY_INTERVAL;
        assert_eq!(throttle.line(500, later), Some(1));
        assert_eq!(throttle.line(0, later), Some(0));
    }

    #[test]
    fn number_of_keys_is_bounded_and_silent_events_are_kept_longest() {
        let (mut throttle, start) = (CountingThrottle::default(), clock::now());
        lines(&mut throttle, 0, &[0, 1]);
        let mut now = start;
        for key in 1..3 * MAX_COUNTED_KEYS as u64 {
            now += Duration::from_millis(20);
            assert!(throttle.line(key, now).is_some(), "{key}");
            assert!(throttle.keys.len() <= MAX_COUNTED_KEYS);
        }
        assert_eq!(throttle.line(0, now + KEY_INTERVAL), Some(1));
    }
}
