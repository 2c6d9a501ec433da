//! The results that are to be written. While messages are about to come, results wait for them for a moment, so that
//! one frame has both. Pure.

use std::time::{Duration, Instant};

use crate::{grpc::budget::Taken, pb};

/// The longest wait. With 64 streams of one lease each, two busy cores took 4 ms from a settlement to the next message.
const MAX_RESULT_WAIT: Duration = Duration::from_millis(5);

/// The memory of the results of a frame.
type ResultMemory = Vec<Taken>;

/// See the [module](self).
#[derive(Default)]
pub(super) struct PendingResults {
    results: Vec<pb::ConsumeResult>,
    memory: ResultMemory,
    waits_until: Option<Instant>,
}

impl PendingResults {
    /// Adds a result with the memory that it takes.
    pub(super) fn push(&mut self, result: pb::ConsumeResult, memory: Option<Taken>) {
        self.results.push(result);
        self.memory.extend(memory);
    }

    pub(super) fn len(&self) -> usize {
        self.results.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.results.is_empty()
    }

    /// Whether the results wait. `messages_to_come`: there is nothing else to write now, and messages are about to
    /// come.
    pub(super) fn wait(&mut self, messages_to_come: bool, now: Instant) -> bool {
        if self.results.is_empty() || !messages_to_come {
            self.waits_until = None;
            return false;
        }
        now < *self.waits_until.get_or_insert(now + MAX_RESULT_WAIT)
    }

    /// The end of the wait.
    pub(super) fn waits_until(&self) -> Option<Instant> {
        self.waits_until
    }

    /// Takes all of them.
    pub(super) fn take(&mut self) -> (Vec<pb::ConsumeResult>, ResultMemory) {
        let Self { results, memory, .. } = std::mem::take(self);
        (results, memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_wait_a_moment_for_messages_and_not_without_them() {
        let now = crate::clock::now();
        let mut results = PendingResults::default();
        assert!(!results.wait(true, now), "there is nothing that could wait");
        results.push(pb::ConsumeResult::default(), None);
        assert!(!results.wait(false, now));
        assert!(results.wait(true, now));
        let almost = now + MAX_RESULT_WAIT - Duration::from_nanos(1);
        results.push(pb::ConsumeResult::default(), None);
        assert!(results.wait(true, almost), "a later result does not make the wait longer");
        assert_eq!(results.waits_until(), Some(now + MAX_RESULT_WAIT));
        assert!(!results.wait(true, now + MAX_RESULT_WAIT));
        assert_eq!((results.take().0.len(), results.waits_until()), (2, None));
    }
}
