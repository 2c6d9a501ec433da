//! Decides whether this replica should receive work. Pure: it turns named conditions into one verdict, which
//! gRPC health and `/readyz` report.
//!
//! ```text
//!  never reached NATS ─▶ not serving      NATS lost < 10 s ─▶ serving (calls fail fast)
//!  connected ──────────▶ serving          NATS lost ≥ 10 s ─▶ not serving
//!  a server too old, or other replicas that share no key ─▶ not serving, at once
//!  no JetStream there ─▶ not serving: at once where it never was, else after 10 s
//! ```
//! A drain is reported to health without this verdict.
//!
//! A short outage of NATS must not remove all replicas from their Service. A single replica that is cut
//! off should leave the Service.

use std::time::{Duration, Instant};

use crate::broker::{JetStream, Link};

/// How long NATS or JetStream may be lost before the replica is not ready.
pub const OUTAGE_GRACE: Duration = Duration::from_secs(10);

/// The answer of health.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The replica should receive work.
    Serving,
    /// The replica should receive no work. The text says why, for people.
    NotServing(String),
}

/// The conditions that are known.
#[derive(Debug, Clone)]
pub struct Readiness {
    link: Link,
    /// When the link was lost, if it is lost.
    lost_at: Option<Instant>,
    reached: bool,
    /// JetStream has answered once.
    answered: bool,
    /// Why JetStream is absent, and since when this is known.
    absent: Option<(String, Instant)>,
    incompatibility: Option<String>,
}

impl Readiness {
    /// The conditions at the start.
    pub fn new(link: Link, now: Instant) -> Self {
        let nothing = Link::Down("not connected yet".into());
        let mut readiness = Self {
            link: nothing,
            lost_at: None,
            reached: false,
            answered: false,
            absent: None,
            incompatibility: None,
        };
        readiness.link(link, now);
        readiness
    }

    /// The link changed.
    pub fn link(&mut self, link: Link, now: Instant) {
        match &link {
            Link::Up(_) => (self.reached, self.lost_at) = (true, None),
            Link::Down(_) | Link::Unsupported(_) => self.lost_at = self.lost_at.or(Some(now)),
        }
        self.link = link;
    }

    /// The state of JetStream as a whole has changed.
    pub fn jetstream(&mut self, jetstream: &JetStream, now: Instant) {
        match jetstream {
            JetStream::Unknown => {}
            JetStream::There => (self.answered, self.absent) = (true, None),
            JetStream::Absent(why) => {
                let since = self.absent.take().map_or(now, |(_, since)| since);
                self.absent = Some((why.to_string(), since));
            }
        }
    }

    /// Sets why this replica must not serve next to the other replicas. `None`: it may serve.
    pub fn incompatibility(&mut self, why: Option<String>) {
        self.incompatibility = why;
    }

    /// The verdict, and the time at which it changes if nothing else happens.
    pub fn verdict(&self, now: Instant) -> (Verdict, Option<Instant>) {
        let not = |why: &str| (Verdict::NotServing(why.to_owned()), None);
        let patient_until = self.lost_at.filter(|_| self.reached).map(|lost| lost + OUTAGE_GRACE);
        match (&self.link, patient_until) {
            (Link::Unsupported(why), _) => not(why),
            _ if let Some(why) = &self.incompatibility => not(why),
            (Link::Up(_), _) => match &self.absent {
                None => (Verdict::Serving, None),
                Some((_, since)) if self.answered && now < *since + OUTAGE_GRACE => {
                    (Verdict::Serving, Some(*since + OUTAGE_GRACE))
                }
                Some((why, _)) => not(why),
            },
            (Link::Down(_), Some(until)) if now < until => (Verdict::Serving, Some(until)),
            (Link::Down(why), _) => not(why),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{broker::Server, clock};
    use std::sync::Arc;

    fn up() -> Link {
        Link::Up(Arc::new(Server {
            epoch: 1,
            bus_epoch: 1,
            id: "a".into(),
            name: "nats-0".into(),
            version: "2.15.1".into(),
            max_payload: 1 << 20,
        }))
    }

    fn down() -> Link {
        Link::Down("lost".into())
    }

    fn serving(readiness: &Readiness, now: Instant) -> bool {
        readiness.verdict(now).0 == Verdict::Serving
    }

    #[test]
    fn replica_that_never_reached_nats_is_not_ready() {
        let now = clock::now();
        let mut readiness = Readiness::new(down(), now);
        assert!(!serving(&readiness, now));
        readiness.link(up(), now);
        assert!(serving(&readiness, now));
    }

    #[test]
    fn lost_link_is_tolerated_for_ten_seconds() {
        let now = clock::now();
        let mut readiness = Readiness::new(up(), now);
        readiness.link(down(), now);
        readiness.link(Link::Down("other words".into()), now + Duration::from_secs(9));
        let just_before = now + OUTAGE_GRACE - Duration::from_nanos(1);
        assert_eq!(readiness.verdict(just_before), (Verdict::Serving, Some(now + OUTAGE_GRACE)));
        assert!(!serving(&readiness, now + OUTAGE_GRACE));
        readiness.link(up(), now + OUTAGE_GRACE);
        assert!(serving(&readiness, now + OUTAGE_GRACE));
    }

    #[test]
    fn replica_without_jetstream_is_not_ready() {
        let (now, absent) = (clock::now(), JetStream::Absent("not enabled".into()));
        let mut readiness = Readiness::new(up(), now);
        assert!(serving(&readiness, now), "what is not known is no reason");
        readiness.jetstream(&absent, now);
        assert_eq!(readiness.verdict(now).0, Verdict::NotServing("not enabled".into()));
        readiness.jetstream(&JetStream::There, now);
        assert!(serving(&readiness, now));
        // JetStream was there before: a short outage must not empty the Service.
        readiness.jetstream(&absent, now);
        readiness.jetstream(&absent, now + OUTAGE_GRACE / 2);
        assert_eq!(readiness.verdict(now), (Verdict::Serving, Some(now + OUTAGE_GRACE)));
        assert!(!serving(&readiness, now + OUTAGE_GRACE));
        readiness.jetstream(&JetStream::There, now + OUTAGE_GRACE);
        assert!(serving(&readiness, now + OUTAGE_GRACE));
    }

    #[test]
    fn unsupported_server_is_not_ready_at_once() {
        let now = clock::now();
        let mut readiness = Readiness::new(up(), now);
        readiness.link(Link::Unsupported("too old".into()), now);
        assert_eq!(readiness.verdict(now).0, Verdict::NotServing("too old".into()));
    }
}
