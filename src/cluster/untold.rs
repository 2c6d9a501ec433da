//! The sightings of this replica in the last moments, and which replicas were told of each. Pure.
//!
//! A replica that starts while another one is cut off does not know that one, so it cannot tell it what it
//! sees. When it hears that replica for the first time, the news are still wanted: leases of the time before
//! may be there.

use std::time::{Duration, Instant};

use super::members::STALLED_TIME;
use crate::token::InstanceId;

#[derive(Debug)]
struct Recent {
    seen_at: Instant,
    request: Vec<u8>,
    /// The replicas that were known then. A request waits in a stalled connection, so it is not repeated.
    told: Vec<InstanceId>,
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(super) struct RecentSightings(Vec<Recent>);

impl RecentSightings {
    /// These replicas are told a sighting.
    pub(super) fn tell(&mut self, request: Vec<u8>, told: Vec<InstanceId>, now: Instant) {
        self.0.retain(|recent| is_recent(recent.seen_at, now));
        self.0.push(Recent { seen_at: now, request, told });
    }

    /// The sightings that a replica must still be told, and is told now. It has run for `uptime`: before that it
    /// had no leases.
    pub(super) fn untold(
        &mut self,
        other: InstanceId,
        uptime: Duration,
        now: Instant,
    ) -> Vec<Vec<u8>> {
        let untold = self.0.iter_mut().filter(|recent| {
            let age = now.saturating_duration_since(recent.seen_at);
            is_recent(recent.seen_at, now) && age < uptime && !recent.told.contains(&other)
        });
        let tell = |recent: &mut Recent| {
            recent.told.push(other);
            recent.request.clone()
        };
        untold.map(tell).collect()
    }
}

/// A replica that is cut off for longer has lost its connection, and reads its consumers again.
fn is_recent(seen_at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(seen_at) < STALLED_TIME
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const KNOWN: InstanceId = InstanceId([1; 8]);
    const UNKNOWN: InstanceId = InstanceId([2; 8]);
    const LONG: Duration = Duration::MAX;

    #[test]
    fn replica_that_was_not_known_is_told_once_and_for_a_time() {
        let seen = clock::now();
        let mut recent = RecentSightings::default();
        recent.tell(vec![7], vec![KNOWN], seen);
        assert!(recent.untold(KNOWN, LONG, seen).is_empty());
        assert_eq!(recent.untold(UNKNOWN, LONG, seen), [[7]]);
        assert!(recent.untold(UNKNOWN, LONG, seen).is_empty());
        let other = InstanceId([3; 8]);
        assert!(recent.untold(other, LONG, seen + STALLED_TIME).is_empty());
        recent.tell(vec![8], Vec::new(), seen + STALLED_TIME);
        assert_eq!(recent.0.len(), 1, "the first is forgotten");
    }

    #[test]
    fn replica_that_has_started_since_has_no_older_lease() {
        let (seen, second) = (clock::now(), Duration::from_secs(1));
        let mut recent = RecentSightings::default();
        recent.tell(vec![7], Vec::new(), seen);
        assert!(recent.untold(UNKNOWN, second, seen + second).is_empty());
        assert_eq!(recent.untold(UNKNOWN, second * 2, seen + second), [[7]]);
    }
}
