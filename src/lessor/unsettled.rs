//! Counts the leases that each worker let end unsettled, and decides when to log them. No clock, no log.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use crate::{broker::ConsumerName, lock::lock};

/// The shortest time between two lines about one worker of one consumer.
const LOG_INTERVAL: Duration = Duration::from_secs(60);
/// The most workers that are remembered, at about 200 bytes each.
const MAX_WORKERS: usize = 4096;

type Worker = (ConsumerName, Arc<str>);

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct UnsettledLog(Mutex<HashMap<Worker, Count>>);

#[derive(Debug)]
struct Count {
    /// The time of the last line.
    logged_at: Instant,
    /// The leases that have ended since then.
    since: u64,
}

impl UnsettledLog {
    /// Counts leases of a worker that have ended. Returns the number since the last line if a line is due.
    pub(super) fn ended(&self, worker: Worker, count: u64, now: Instant) -> Option<u64> {
        let mut workers = lock(&self.0);
        if let Some(known) = workers.get_mut(&worker) {
            known.since += count;
            if now.saturating_duration_since(known.logged_at) < LOG_INTERVAL {
                return None;
            }
            known.logged_at = now;
            return Some(std::mem::take(&mut known.since));
        }
        if workers.len() >= MAX_WORKERS {
            workers.clear();
        }
        workers.insert(worker, Count { logged_at: now, since: 0 });
        Some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn each_worker_is_logged_once_a_minute_with_all_ended_leases() {
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
