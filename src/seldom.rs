//! When something may be said again that strangers can cause as often as they like: a line in the log,
//! above all. Reads no clock and says nothing itself.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// Between one time and the next, at least, unless told otherwise.
const AGAIN: Duration = Duration::from_secs(10);

/// Remembers when it was last said.
#[derive(Debug)]
pub struct Seldom {
    again: Duration,
    said_at: Mutex<Option<Instant>>,
}

impl Default for Seldom {
    fn default() -> Self {
        Self::every(AGAIN)
    }
}

impl Seldom {
    /// Something that is said once in this time.
    pub fn every(again: Duration) -> Self {
        Self { again, said_at: Mutex::default() }
    }

    /// Whether it may be said now; if so, it counts as said.
    pub fn may_say(&self, now: Instant) -> bool {
        let mut said_at = self.said_at.lock().unwrap_or_else(PoisonError::into_inner);
        let may = said_at.is_none_or(|said| now.duration_since(said) >= self.again);
        if may {
            *said_at = Some(now);
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
}
