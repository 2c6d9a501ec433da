//! When something may be said again that strangers can cause as often as they like: a line in the log,
//! above all. Reads no clock and says nothing itself.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Between one time and the next, at least, unless told otherwise.
const AGAIN: Duration = Duration::from_secs(10);

/// Remembers when it was last said, and how often since then.
#[derive(Debug)]
pub struct Seldom {
    most: u32,
    again: Duration,
    said: Mutex<Option<(Instant, u32)>>,
}

/// Once in ten seconds.
impl Default for Seldom {
    fn default() -> Self {
        Self::every(AGAIN)
    }
}

impl Seldom {
    /// Something that is said once in this time.
    pub fn every(again: Duration) -> Self {
        Self { most: 1, again, said: Mutex::default() }
    }

    /// Something that is said this often in ten seconds.
    pub fn few(most: u32) -> Self {
        Self { most, ..Self::default() }
    }

    /// Whether it may be said now; if so, it counts as said.
    pub fn may_say(&self, now: Instant) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn it_is_said_once_in_ten_seconds() {
        let (seldom, start) = (Seldom::default(), clock::now());
        let said = (0..30).filter(|seconds| seldom.may_say(start + Duration::from_secs(*seconds)));
        assert_eq!(said.collect::<Vec<_>>(), [0, 10, 20]);
    }

    #[test]
    fn what_may_be_said_several_times_is_said_so_often_in_ten_seconds() {
        let (seldom, start) = (Seldom::few(2), clock::now());
        let said = (0..21).filter(|seconds| seldom.may_say(start + Duration::from_secs(*seconds)));
        assert_eq!(said.collect::<Vec<_>>(), [0, 1, 10, 11, 20]);
    }
}
