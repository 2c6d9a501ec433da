//! Two replicas have read consumers of one name that were made at different times: which one is there?

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// If a replica has read a newer consumer, an INFO that shows the older one is not accepted for this long.
const BELIEVED: Duration = Duration::from_secs(2);

/// The consumer that another replica has read.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Contradiction {
    created: Arc<str>,
    since: Instant,
    /// INFO has shown an older consumer, and is not asked before this time again.
    pub(super) retry_at: Option<Instant>,
}

impl Contradiction {
    /// Another replica has read a consumer that was made at this time.
    pub(super) fn new(created: Arc<str>, now: Instant) -> Self {
        Self { created, since: now, retry_at: None }
    }

    /// INFO shows a consumer that was made at this time, and it may be the older one.
    pub(super) fn stands_against(&self, created: &str, now: Instant) -> bool {
        let lately = now.saturating_duration_since(self.since) < BELIEVED;
        lately && is_later(&self.created, created)
    }
}

/// Whether the first time is later. JetStream writes times by RFC 3339, in UTC, without zeros at the end.
fn is_later(first: &str, second: &str) -> bool {
    first.trim_end_matches('Z') > second.trim_end_matches('Z')
}

#[cfg(test)]
mod tests {
    use super::is_later;

    #[test]
    fn times_are_compared_with_and_without_a_fraction() {
        for (first, second) in [
            ("2026-11-29T08:00:01Z", "2026-11-29T08:00:00.9Z"),
            ("2026-11-29T08:00:00.5Z", "2026-11-29T08:00:00Z"),
            ("2026-11-29T08:00:00.55Z", "2026-11-29T08:00:00.5Z"),
            ("2026-11-30T00:00:00Z", "2026-11-29T23:59:59.999999999Z"),
        ] {
            assert!(is_later(first, second) && !is_later(second, first), "{first} and {second}");
        }
        assert!(!is_later("2026-11-29T08:00:00Z", "2026-11-29T08:00:00Z"));
    }
}
