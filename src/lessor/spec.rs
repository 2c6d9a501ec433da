//! What has to be known of a consumer to lease its deliveries: read from CONSUMER.INFO, never
//! changed, replaced when the consumer changes. Pure.

use std::{sync::Arc, time::Duration};

use super::{
    Error, consumer::monitor::ConsumerView, error::Unsuitable, leadership::Leadership,
    rights::AckRight,
};
use crate::{
    broker::{AckPolicy, ConsumerInfo, ConsumerName, Delivery},
    lease::{ConsumerId, ack_wait_of},
    pump::PullLimits,
};

/// Below this, margins and round trips leave nothing of an ack wait to work in.
pub const SHORTEST_ACK_WAIT: Duration = Duration::from_millis(500);
/// Most messages of one pull, well below what an inbox can hold.
const LARGEST_BATCH: u32 = 10_000;
/// Longest that a surplus delivery is kept for the next waiter.
const LONGEST_PARK: Duration = Duration::from_secs(1);
/// An upper bound for the fields of an encoded delivery that do not depend on its contents: keys,
/// lengths, numbers, timestamps, and the part of the token that is not the ack subject.
const FIXED_SIZE: usize = 480;
/// The same for each header and each value of it.
const HEADER_SIZE: usize = 24;

/// One incarnation of one consumer, in one configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerSpec {
    /// Its name.
    pub name: ConsumerName,
    /// What the lease table calls this incarnation.
    pub id: ConsumerId,
    /// When it was made.
    pub created: Arc<str>,
    /// Attempts after which a message is given up; `None` is without limit.
    pub max_deliver: Option<u64>,
    pub(super) ack_wait: Duration,
    pub(super) backoff: Vec<Duration>,
    pub(super) replicated: bool,
    /// `leader` is another one after every change and every start.
    pub(super) leader_shows: bool,
    /// Who leads it, as was last known.
    pub(super) leadership: Leadership,
    /// Whether NATS lets us ack its messages.
    pub(super) ack_right: AckRight,
    limits: PullLimits,
}

impl ConsumerSpec {
    /// # Errors
    /// Leases cannot be kept on a consumer like this.
    pub(super) fn check(name: &ConsumerName, info: &ConsumerInfo) -> Result<(), Error> {
        unsuitable(info).map_or(Ok(()), |property| {
            Err(Error::ConsumerUnsuitable { name: name.clone(), property })
        })
    }

    /// What INFO says of a consumer that is suitable.
    pub(super) fn new(name: &ConsumerName, id: ConsumerId, info: &ConsumerInfo) -> Self {
        let shortest = info.backoff.iter().copied().fold(info.ack_wait, Duration::min);
        let unsettled = info.max_ack_pending.map_or(LARGEST_BATCH, saturating);
        Self {
            name: name.clone(),
            id,
            created: info.created.clone(),
            max_deliver: info.max_deliver,
            ack_wait: info.ack_wait,
            backoff: info.backoff.clone(),
            replicated: info.replicas > 1,
            leader_shows: info.leader_shows,
            leadership: Leadership::new(info.leader),
            ack_right: AckRight::default(),
            limits: PullLimits {
                max_batch: info
                    .max_batch
                    .unwrap_or(LARGEST_BATCH)
                    .min(unsettled)
                    .min(LARGEST_BATCH),
                max_expires: info.max_expires.unwrap_or(Duration::MAX),
                max_request_bytes: info.max_request_bytes,
                park: LONGEST_PARK.min(shortest / 8),
            },
        }
    }

    /// What the monitor decides by, before INFO is read again.
    pub(super) fn view(&self) -> ConsumerView {
        ConsumerView {
            created: self.created.clone(),
            leader: self.leadership.leader(),
            leader_shows: self.leader_shows,
            replicated: self.replicated,
            ack_wait: self.ack_wait,
            delivered: 0,
            delivered_stream: 0,
        }
    }

    /// The same consumer, whose deliveries are counted anew: no lease of before is one of it.
    pub(super) fn counted_anew(&self, id: ConsumerId) -> Self {
        Self { id, leadership: Leadership::new(self.leadership.leader()), ..self.clone() }
    }

    pub(super) fn limits(&self) -> PullLimits {
        self.limits.clone()
    }

    /// Another server can come to lead it, or the same one start anew, and our connections live on.
    pub(super) fn is_led_elsewhere(&self) -> bool {
        self.replicated || !self.leader_shows
    }

    /// The ack wait of one delivery.
    pub(super) fn ack_wait_of(&self, delivery_count: u64) -> Duration {
        ack_wait_of(self.ack_wait, &self.backoff, delivery_count)
    }

    /// The longest that JetStream waits for any delivery.
    pub(super) fn longest_ack_wait(&self) -> Duration {
        self.backoff.iter().copied().fold(self.ack_wait, Duration::max)
    }

    /// A Nak of this delivery would destroy its message.
    pub(super) fn last_attempt(&self, delivery_count: u64) -> bool {
        self.max_deliver.is_some_and(|most| delivery_count >= most)
    }

    /// The delay to ask JetStream for so that a delivery comes back `wanted` from now, and the
    /// delay that will result.
    ///
    /// JetStream re-times from `BackOff[0]` and expires by `BackOff[n]`, so with a BackOff the real
    /// delay is the asked one plus their difference; less than that difference is not to be had,
    /// except at once.
    pub(super) fn nak_delay(
        &self,
        wanted: Duration,
        delivery_count: u64,
    ) -> (Option<Duration>, Duration) {
        if wanted.is_zero() {
            return (None, Duration::ZERO);
        }
        let shortest = self.backoff.first().copied().unwrap_or(self.ack_wait);
        let distortion = self.ack_wait_of(delivery_count).saturating_sub(shortest);
        let asked = wanted.saturating_sub(distortion).max(Duration::from_nanos(1));
        (Some(asked), asked + distortion)
    }

    /// Whether, and as which, orders for this consumer stand in line; see [`crate::broker::AckPublish`].
    pub(super) fn line(&self) -> Option<u32> {
        (!self.replicated).then_some(self.id.0)
    }

    /// The delay of a Nak by which we give a delivery back at once.
    ///
    /// A replicated consumer keeps a plain Nak in its leader's memory only; a delayed one is
    /// agreed on, and a nanosecond is no delay. A BackOff would distort it.
    pub(super) fn release_delay(&self) -> Option<Duration> {
        (self.replicated && self.backoff.is_empty()).then_some(Duration::from_nanos(1))
    }
}

fn unsuitable(info: &ConsumerInfo) -> Option<Unsuitable> {
    let short = |wait: &Duration| *wait < SHORTEST_ACK_WAIT;
    match &info.ack_policy {
        _ if info.push => Some(Unsuitable::Push),
        AckPolicy::Other(policy) => Some(Unsuitable::AckPolicy(policy.clone())),
        AckPolicy::Explicit if info.priority_groups => Some(Unsuitable::PriorityGroups),
        AckPolicy::Explicit if short(&info.ack_wait) || info.backoff.iter().any(short) => {
            Some(Unsuitable::AckWait)
        }
        AckPolicy::Explicit => None,
    }
}

fn saturating(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

/// An upper bound of what a delivery takes in an encoded answer, in bytes.
pub(crate) fn encoded_size(delivery: &Delivery) -> u64 {
    let headers: usize = delivery
        .headers
        .iter()
        .map(|(name, values)| {
            let values: usize = values.iter().map(|value| value.len() + HEADER_SIZE).sum();
            name.len() + HEADER_SIZE + values
        })
        .sum();
    // The token carries the ack subject, four characters for every three bytes.
    let token = delivery.ack.0.len() * 4 / 3;
    (delivery.payload.len() + delivery.subject.len() + headers + token + FIXED_SIZE) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::broker::Leader;

    fn info() -> ConsumerInfo {
        ConsumerInfo {
            created: "2026-11-23T08:00:00Z".into(),
            ack_policy: AckPolicy::Explicit,
            push: false,
            priority_groups: false,
            paused: false,
            ack_wait: Duration::from_secs(30),
            backoff: Vec::new(),
            max_deliver: Some(2),
            max_ack_pending: Some(1000),
            max_batch: None,
            max_expires: None,
            max_request_bytes: None,
            replicas: 1,
            leader: Leader(1),
            leader_shows: true,
            pending: 0,
            ack_pending: 0,
            delivered: 0,
            delivered_stream: 0,
        }
    }

    fn spec(info: &ConsumerInfo) -> Result<ConsumerSpec, Error> {
        let name = ConsumerName { stream: "S".into(), consumer: "c".into() };
        ConsumerSpec::check(&name, info)?;
        Ok(ConsumerSpec::new(&name, ConsumerId(1), info))
    }

    fn property(info: &ConsumerInfo) -> Option<Unsuitable> {
        match spec(info) {
            Err(Error::ConsumerUnsuitable { property, .. }) => Some(property),
            _ => None,
        }
    }

    #[test]
    fn consumers_that_cannot_be_leased_from_are_refused_and_told_why() {
        let short = Duration::from_millis(499);
        let all = AckPolicy::Other("all".to_owned());
        assert_eq!(property(&ConsumerInfo { push: true, ..info() }), Some(Unsuitable::Push));
        assert_eq!(
            property(&ConsumerInfo { ack_policy: all, ..info() }),
            Some(Unsuitable::AckPolicy("all".to_owned()))
        );
        assert_eq!(
            property(&ConsumerInfo { priority_groups: true, ..info() }),
            Some(Unsuitable::PriorityGroups)
        );
        for unfit in [
            ConsumerInfo { ack_wait: short, ..info() },
            ConsumerInfo { backoff: vec![Duration::from_secs(1), short], ..info() },
        ] {
            assert_eq!(property(&unfit), Some(Unsuitable::AckWait));
        }
        assert!(spec(&ConsumerInfo { ack_wait: SHORTEST_ACK_WAIT, ..info() }).is_ok());
    }

    #[test]
    fn a_nak_delay_is_corrected_for_the_backoff() {
        let secs = Duration::from_secs;
        let backoff = vec![secs(1), secs(3), secs(5)];
        let spec = spec(&ConsumerInfo { backoff, max_deliver: None, ..info() }).unwrap();
        assert_eq!(spec.nak_delay(secs(0), 2), (None, secs(0)));
        assert_eq!(spec.nak_delay(secs(10), 1), (Some(secs(10)), secs(10)));
        assert_eq!(spec.nak_delay(secs(10), 2), (Some(secs(8)), secs(10)));
        assert_eq!(spec.nak_delay(secs(10), 9), (Some(secs(6)), secs(10)));
        let least = Duration::from_nanos(1);
        assert_eq!(spec.nak_delay(secs(1), 3), (Some(least), secs(4) + least));
    }

    #[test]
    fn only_the_attempt_that_reaches_max_deliver_is_the_last() {
        let spec = spec(&info()).unwrap();
        assert!(!spec.last_attempt(1));
        assert!(spec.last_attempt(2));
        let unlimited = ConsumerInfo { max_deliver: None, ..info() };
        assert!(!ConsumerSpec::new(&spec.name, ConsumerId(1), &unlimited).last_attempt(99));
    }
}
