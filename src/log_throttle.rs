//! Limits how often a line may be logged that strangers can cause as often as they like. Reads no clock
//! and logs nothing itself.

mod counting;

use std::{
    collections::HashMap,
    hash::{BuildHasher as _, Hash, RandomState},
    sync::Mutex,
    time::{Duration, Instant},
};

pub use self::counting::CountingThrottle;
use crate::lock::lock;

/// The interval of a throttle that names none.
const DEFAULT_INTERVAL: Duration = Duration::from_secs(10);

/// Allows a number of lines in an interval. Remembers when the interval began, and the lines since then.
#[derive(Debug)]
pub struct LogThrottle {
    most: u32,
    again: Duration,
    said: Mutex<Option<(Instant, u32)>>,
}

/// One line in ten seconds.
impl Default for LogThrottle {
    fn default() -> Self {
        Self::every(DEFAULT_INTERVAL)
    }
}

impl LogThrottle {
    /// Allows one line in this time.
    pub fn every(again: Duration) -> Self {
        Self { most: 1, again, said: Mutex::default() }
    }

    /// Allows `most` lines in ten seconds.
    pub fn few(most: u32) -> Self {
        Self { most, ..Self::default() }
    }

    /// Whether a line may be logged now. If so, the line counts as logged.
    pub fn allow(&self, now: Instant) -> bool {
        let mut said = lock(&self.said);
        let (since, times) = match *said {
            Some((since, times)) if now.duration_since(since) < self.again => (since, times),
            Some(_) | None => (now, 0),
        };
        let may = times < self.most;
        if may {
            *said = Some((since, times + 1));
        }
        may
    }
}

/// Most keys that are remembered at once, with 24 bytes each.
const MAX_KEYS: usize = 4096;

/// Allows one line for each key in an interval, and only a few lines in ten seconds.
#[derive(Debug)]
pub struct KeyedLogThrottle {
    again: Duration,
    few: LogThrottle,
    digests: RandomState,
    said: Mutex<HashMap<u64, Instant>>,
}

impl KeyedLogThrottle {
    /// Allows one line for each key in `again`, and at most `few` lines in ten seconds.
    pub fn new(again: Duration, few: u32) -> Self {
        let few = LogThrottle::few(few);
        Self { again, few, digests: RandomState::new(), said: Mutex::default() }
    }

    /// Whether a line about `what` may be logged now. If so, the line counts as logged. If there is no
    /// room for another key, all keys are forgotten.
    pub fn allow(&self, what: &impl Hash, now: Instant) -> bool {
        let what = self.digests.hash_one(what);
        let mut said = lock(&self.said);
        let lately = said.get(&what).is_some_and(|when| now.duration_since(*when) < self.again);
        if lately || !self.few.allow(now) {
            return false;
        }
        if said.len() >= MAX_KEYS {
            said.clear();
        }
        said.insert(what, now);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn a_line_is_logged_once_in_ten_seconds() {
        let (throttle, start) = (LogThrottle::default(), clock::now());
        let said = (0..30).filter(|seconds| throttle.allow(start + Duration::from_secs(*seconds)));
        assert_eq!(said.collect::<Vec<_>>(), [0, 10, 20]);
    }

    #[test]
    fn a_line_that_may_repeat_is_logged_that_often_in_ten_seconds() {
        let (throttle, start) = (LogThrottle::few(2), clock::now());
        let said = (0..21).filter(|seconds| throttle.allow(start + Duration::from_secs(*seconds)));
        assert_eq!(said.collect::<Vec<_>>(), [0, 1, 10, 11, 20]);
    }

    #[test]
    fn each_key_is_logged_once_in_a_while_and_few_at_a_time() {
        let (firsts, start) = (KeyedLogThrottle::new(Duration::from_secs(60), 2), clock::now());
        let may = |what: &str, seconds| firsts.allow(&what, start + Duration::from_secs(seconds));
        assert!(may("a", 0));
        assert!(!may("a", 1), "logged lately");
        assert!(may("b", 1));
        assert!(!may("c", 2), "too many lines");
        assert!(may("c", 11), "a refused line may be logged later");
        assert!(!may("a", 59));
        assert!(may("a", 61));
    }

    #[test]
    fn the_number_of_remembered_keys_is_bounded() {
        let (firsts, start) =
            (KeyedLogThrottle::new(Duration::from_secs(3600), u32::MAX), clock::now());
        for number in 0..3 * MAX_KEYS {
            assert!(firsts.allow(&number, start));
        }
        assert!(firsts.said.lock().unwrap().len() <= MAX_KEYS);
    }
}
