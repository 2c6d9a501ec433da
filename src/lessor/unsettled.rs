//! Which workers let their leases end unsettled, and how often the log says so. No clock, no log.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::{broker::ConsumerName, lock::lock};

/// Between two lines about one worker of one consumer, at least.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// Workers that are remembered at once, about 200 bytes each.
const MAX_WORKERS: usize = 4096;

type Worker = (ConsumerName, Arc<str>);

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct UnsettledLog(Mutex<HashMap<Worker, Count>>);

#[derive(Debug)]
struct Count {
    /// When it was said last.
    said: Instant,
    /// Leases that have ended since then.
    since: u64,
}

impl UnsettledLog {
    /// So many more leases of a worker have ended. What is to be said now: how many since it was said last.
    pub(super) fn ended(&self, worker: Worker, count: u64, now: Instant) -> Option<u64> {
        let mut workers = lock(&self.0);
        if let Some(known) = workers.get_mut(&worker) {
            known.since += count;
            if now.saturating_duration_since(known.said) < LOG_INTERVAL {
                return None;
            }
            known.said = now;
            return Some(std::mem::take(&mut known.since));
        }
        if workers.len() >= MAX_WORKERS {
            workers.clear();
        }
        workers.insert(worker, Count { said: now, since: 0 });
        Some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn each_worker_is_named_once_a_minute_with_all_that_has_ended() {
        let (unsettled, start) = (UnsettledLog::default(), clock::now());
        let worker = |consumer: &str, name: &str| {
            let name = Arc::from(name);
            (ConsumerName { stream: "S".into(), consumer: consumer.into() }, name)
        };
        assert_eq!(unsettled.ended(worker("c", "w"), 2, start), Some(2));
        assert_eq!(unsettled.ended(worker("c", "v"), 1, start), Some(1));
        assert_eq!(unsettled.ended(worker("d", "w"), 1, start), Some(1));
        assert_eq!(unsettled.ended(worker("c", "w"), 3, start + LOG_INTERVAL / 2), None);
        assert_eq!(unsettled.ended(worker("c", "w"), 4, start + LOG_INTERVAL), Some(7));
    }
}
