//! The configuration of a consumer, as far as leases need it. It is read from CONSUMER.INFO, never
//! changed, and replaced when the consumer changes. Pure.

use std::{sync::Arc, time::Duration};

use super::{Error, error::Unsuitable, leadership::Leadership, rights::AckRight};
use crate::{
    broker::{AckPolicy, ConsumerInfo, ConsumerName, Delivery},
    lease::{ConsumerId, ack_wait_of},
    metrics::ConsumerMeter,
    pump::{PullLimits, SHORTEST_PULL},
};

/// A shorter ack wait has no time left after margins and round trips.
pub const SHORTEST_ACK_WAIT: Duration = Duration::from_millis(500);
/// Most messages of one pull, well below what an inbox can hold.
const LARGEST_BATCH: u32 = 10_000;
/// The longest time for which a surplus delivery is kept for the next waiter.
const LONGEST_PARK: Duration = Duration::from_secs(1);
/// An upper bound for the fixed fields of an encoded delivery, in bytes: keys, lengths, numbers and
/// timestamps. It includes the part of the token that is not the ack subject, with the longest principal
/// and with the span of the Fetch. A test of `grpc::encode` measures it.
const FIXED_SIZE: usize = 600;
/// The same for each header name and each header value.
const HEADER_SIZE: usize = 24;

/// One incarnation of one consumer, in one configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerSpec {
    /// Its name.
    pub name: ConsumerName,
    /// The id of this incarnation in the lease table.
    pub id: ConsumerId,
    /// The creation time of the consumer.
    pub created: Arc<str>,
    /// The number of delivery attempts. `None`: no limit.
    pub max_deliver: Option<u64>,
    pub(super) ack_wait: Duration,
    pub(super) backoff: Vec<Duration>,
    pub(super) replicated: bool,
    /// Whether `leader` changes with every change of leader and every start of a server.
    pub(super) leader_shows: bool,
    /// The last known leader.
    pub(super) leadership: Leadership,
    /// Whether NATS allows us to ack its messages.
    pub(super) ack_right: AckRight,
    /// Counts what happens to the consumer.
    pub(super) meter: ConsumerMeter,
    limits: PullLimits,
}

impl ConsumerSpec {
    /// # Errors
    /// The consumer cannot be leased from.
    pub(super) fn check(name: &ConsumerName, info: &ConsumerInfo) -> Result<(), Error> {
        unsuitable(info).map_or(Ok(()), |property| {
            Err(Error::ConsumerUnsuitable { name: name.clone(), property })
        })
    }

    /// The spec of a suitable consumer, from its INFO.
    pub(super) fn new(
        name: &ConsumerName,
        id: ConsumerId,
        info: &ConsumerInfo,
        ack_right: AckRight,
        meter: ConsumerMeter,
    ) -> Self {
        let shortest = info.backoff.iter().copied().fold(info.ack_wait, Duration::min);
        // A lease counts from the sending of its pull, so a pull that waits long makes leases short.
        let longest_pull = (shortest / 5).max(SHORTEST_PULL);
        // A limit beyond `u32` bounds no pull.
        let max_unsettled = info.max_ack_pending.and_then(|most| u32::try_from(most).ok());
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
            ack_right,
            meter,
            limits: PullLimits {
                max_batch: info.max_batch.unwrap_or(LARGEST_BATCH).min(LARGEST_BATCH),
                max_unsettled: max_unsettled.unwrap_or(u32::MAX),
                max_expires: info.max_expires.unwrap_or(Duration::MAX).min(longest_pull),
                max_request_bytes: info.max_request_bytes,
                park: LONGEST_PARK.min(shortest / 8),
                linger: shortest / 2,
            },
        }
    }

    /// The same consumer after its deliveries were counted from 1 again. No earlier lease belongs to it.
    pub(super) fn counted_again(&self, id: ConsumerId) -> Self {
        Self { id, leadership: Leadership::new(self.leadership.leader()), ..self.clone() }
    }

    pub(super) fn limits(&self) -> PullLimits {
        self.limits.clone()
    }

    /// Whether its leader can change or restart while our connections stay.
    pub(super) fn is_led_elsewhere(&self) -> bool {
        self.replicated || !self.leader_shows
    }

    /// The ack wait of one delivery.
    pub(super) fn ack_wait_of(&self, delivery_count: u64) -> Duration {
        ack_wait_of(self.ack_wait, &self.backoff, delivery_count)
    }

    /// The length of a lease whose caller wants this length. Without the right to ack, no lease is longer than the ack
    /// wait, because nothing could keep it alive.
    pub(super) fn lease_length(
        &self,
        wanted: Option<Duration>,
        delivery_count: u64,
    ) -> Option<Duration> {
        let ack_wait = || self.ack_wait_of(delivery_count);
        wanted.filter(|wanted| *wanted < ack_wait() || self.ack_right.refused().is_none())
    }

    /// The longest ack wait of any delivery.
    pub(super) fn longest_ack_wait(&self) -> Duration {
        self.backoff.iter().copied().fold(self.ack_wait, Duration::max)
    }

    /// Whether this is the last attempt. A Nak would destroy the message.
    pub(super) fn last_attempt(&self, delivery_count: u64) -> bool {
        self.max_deliver.is_some_and(|most| delivery_count >= most)
    }

    /// The delay to ask JetStream for, so that a delivery comes back after `wanted`, and the real delay.
    ///
    /// JetStream counts the delay from `BackOff[0]` and expires by `BackOff[n]`. With a backoff, the real
    /// delay is therefore the delay that was asked for, plus the difference of the two. If the backoff grows,
    /// the shortest real delay is that difference, but zero is possible. If it shrinks, more is asked for.
    pub(super) fn nak_delay(
        &self,
        wanted: Duration,
        delivery_count: u64,
    ) -> (Option<Duration>, Duration) {
        if wanted.is_zero() {
            return (None, Duration::ZERO);
        }
        let first = self.backoff.first().copied().unwrap_or(self.ack_wait);
        let step = self.ack_wait_of(delivery_count);
        let (longer, shorter) = (step.saturating_sub(first), first.saturating_sub(step));
        let asked = (wanted + shorter).saturating_sub(longer).max(Duration::from_nanos(1));
        (Some(asked), asked + longer - shorter)
    }

    /// The confirm group of this consumer's acks. See [`crate::broker::AckPublish`].
    pub(super) fn confirm_group(&self) -> Option<u32> {
        (!self.is_led_elsewhere()).then_some(self.id.0)
    }

    /// The delay of a Nak that gives a delivery back at once.
    ///
    /// A replicated consumer keeps a Nak without delay in its leader's memory only. All replicas agree on a
    /// Nak with a delay, and a nanosecond is too short to matter. A backoff would distort it.
    pub(super) fn release_delay(&self) -> Option<Duration> {
        (self.replicated && self.backoff.is_empty()).then_some(Duration::from_nanos(1))
    }
}

/// The property because of which messages of the consumer cannot be leased, if there is one.
pub(super) fn unsuitable(info: &ConsumerInfo) -> Option<Unsuitable> {
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

/// An upper bound for the size of a delivery in an encoded answer, in bytes.
pub(crate) fn encoded_size(delivery: &Delivery) -> u64 {
    let headers: usize = delivery
        .headers
        .iter()
        .map(|(name, values)| {
            let values: usize = values.iter().map(|value| value.len() + HEADER_SIZE).sum();
            name.len() + HEADER_SIZE + values
        })
        .sum();
    // The token contains the ack subject, at four characters for every three bytes.
    let token = delivery.ack.0.len() * 4 / 3;
    (delivery.payload.len() + delivery.subject.len() + headers + token + FIXED_SIZE) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{broker::Leader, metrics::Metrics};

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
            waiting: 0,
            redelivered: 0,
            filter_subjects: Vec::new(),
            delivered: 0,
            delivered_stream: 0,
        }
    }

    fn spec(info: &ConsumerInfo) -> Result<ConsumerSpec, Error> {
        let name = ConsumerName { stream: "S".into(), consumer: "c".into() };
        ConsumerSpec::check(&name, info)?;
        let meter = Metrics::off().other_consumers().clone();
        Ok(ConsumerSpec::new(&name, ConsumerId(1), info, AckRight::default(), meter))
    }

    fn property(info: &ConsumerInfo) -> Option<Unsuitable> {
        match spec(info) {
            Err(Error::ConsumerUnsuitable { property, .. }) => Some(property),
            _ => None,
        }
    }

    #[test]
    fn an_unsuitable_consumer_is_refused_with_its_property() {
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
        for unsuitable in [
            ConsumerInfo { ack_wait: short, ..info() },
            ConsumerInfo { backoff: vec![Duration::from_secs(1), short], ..info() },
        ] {
            assert_eq!(property(&unsuitable), Some(Unsuitable::AckWait));
        }
        assert!(spec(&ConsumerInfo { ack_wait: SHORTEST_ACK_WAIT, ..info() }).is_ok());
    }

    #[test]
    fn acks_share_a_confirmation_only_if_the_connected_server_leads_their_consumer() {
        for (replicas, leader_shows, shared) in
            [(1, true, true), (1, false, false), (3, true, false), (3, false, false)]
        {
            let spec = spec(&ConsumerInfo { replicas, leader_shows, ..info() }).unwrap();
            assert_eq!(spec.confirm_group().is_some(), shared, "{replicas} {leader_shows}");
        }
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
    fn nak_delay_is_not_shortened_by_a_backoff_that_shrinks() {
        let secs = Duration::from_secs;
        let backoff = vec![secs(5), secs(2)];
        let spec = spec(&ConsumerInfo { backoff, max_deliver: None, ..info() }).unwrap();
        assert_eq!(spec.nak_delay(secs(10), 1), (Some(secs(10)), secs(10)));
        assert_eq!(spec.nak_delay(secs(1), 2), (Some(secs(4)), secs(1)));
        assert_eq!(spec.nak_delay(secs(0), 2), (None, secs(0)));
    }

    #[test]
    fn only_the_attempt_that_reaches_max_deliver_is_the_last() {
        let spec = spec(&info()).unwrap();
        assert!(!spec.last_attempt(1));
        assert!(spec.last_attempt(2));
        let unlimited = ConsumerInfo { max_deliver: None, ..info() };
        assert!(!self::spec(&unlimited).unwrap().last_attempt(99));
    }
}
