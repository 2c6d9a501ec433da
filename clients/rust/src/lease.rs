//! The lease of a message that came by a Fetch: until when it lasts, and when to settle or extend it. Makes no call;
//! time is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// The shortest lease that the proxy accepts.
pub(crate) const SHORTEST: Duration = Duration::from_secs(1);
/// The shortest time between two extensions.
const LEAST_WAIT: Duration = Duration::from_millis(50);

#[derive(Clone, Debug)]
pub(crate) struct Lease {
    /// How long it was granted.
    granted: Duration,
    pub ends: Instant,
    /// When to settle or extend it. `None`: it is not extended any more.
    pub due: Option<Instant>,
    /// Whether the call under way settles the message. Otherwise the call extends the lease.
    pub is_settling: bool,
    /// The bytes of its payload.
    pub size: usize,
}

impl Lease {
    /// `latest` is the end of the longest time for its handler.
    pub fn new(granted: Duration, size: usize, latest: Instant, now: Instant) -> Self {
        let mut lease = Self { granted, ends: now, due: Some(now), is_settling: false, size };
        lease.lasts(now, granted, latest);
        lease
    }

    /// It lasts for `length` from the moment when the call was sent. The next extension is due after a third of the
    /// lease, or at once if the lease is too long for its handler.
    pub fn lasts(&mut self, from: Instant, length: Duration, latest: Instant) {
        let left = latest.saturating_duration_since(from);
        self.ends = from + length.min(left);
        let third = from + (length / 3).max(LEAST_WAIT);
        let is_too_long = length > left.max(SHORTEST) + Duration::from_millis(1);
        self.due = match latest.saturating_duration_since(third) {
            _ if is_too_long => Some(from),
            rest if rest < SHORTEST => None,
            _ => Some(third),
        };
    }

    /// The length to ask for. `None`: as long as it was granted.
    pub fn extension(&self, now: Instant, latest: Instant) -> Option<Duration> {
        let left = latest.saturating_duration_since(now);
        (left < self.granted).then(|| left.max(SHORTEST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn seconds(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn lease_is_extended_after_a_third_of_it() {
        let now = Instant::now();
        let lease = Lease::new(seconds(30), 0, now + seconds(3600), now);
        assert_eq!((lease.due, lease.ends), (Some(now + seconds(10)), now + seconds(30)));
        assert_eq!(lease.extension(now, now + seconds(3600)), None);
    }

    #[test]
    fn lease_is_not_extended_beyond_the_longest_time_of_its_handler() {
        let now = Instant::now();
        let latest = now + seconds(35);
        let mut lease = Lease::new(seconds(30), 0, latest, now);
        assert_eq!(lease.extension(now + seconds(10), latest), Some(seconds(25)));
        lease.lasts(now + seconds(10), seconds(25), latest);
        assert_eq!(lease.ends, latest);
        lease.lasts(now + seconds(34), seconds(1), latest);
        assert_eq!((lease.due, lease.ends), (None, latest));
    }

    #[test]
    fn lease_that_is_longer_than_its_handler_may_take_is_shortened_at_once() {
        let now = Instant::now();
        let lease = Lease::new(seconds(30), 0, now + seconds(5), now);
        assert_eq!((lease.due, lease.ends), (Some(now), now + seconds(5)));
    }
}
