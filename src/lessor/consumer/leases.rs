//! The leases of one consumer in the lease table: grants them, assigns them to callers, gives them back and
//! revises them. Owns the consumer's spec, which says under which id the leases are. The monitor decides when
//! leases lose trust, are lost or end.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::sync::OwnedSemaphorePermit;

use super::{
    monitor::{LeaderSigns, LeftKnowledge},
    send_bound::ArrivedDelivery,
};
use crate::{
    broker::{Broker, BrokerError, ConsumerInfo, ConsumerName, Delivery, Leader},
    clock,
    lease::{ConsumerEnd, GivenBack, Terms},
    lessor::{
        Error,
        accounts::LeaseHolder,
        codec::is_headers_only,
        core::{Core, assign, release},
        delivery::{AnswerEnd, GrantedDelivery, LeaseRequest, LeasedDelivery},
        metered,
        rights::AckRight,
        spec::ConsumerSpec,
        table::{HeldDelivery, LEASES_PER_LOCK},
    },
    metrics::{LeaseEnd, ReleaseCause},
};

/// NATS's clock may be ahead of ours by this much.
const NATS_CLOCK_SKEW: Duration = Duration::from_millis(250);

/// See the [module](self).
pub(super) struct ConsumerLeases<B: Broker> {
    core: Arc<Core<B>>,
    name: ConsumerName,
    /// `None` while the consumer was not read, or is gone.
    spec: Option<Arc<ConsumerSpec>>,
    /// The right belongs to the name of the consumer. INFO does not tell it.
    ack_right: AckRight,
}

impl<B: Broker> ConsumerLeases<B> {
    /// The leases of this consumer. `left`: the spec of those that an earlier task has left.
    pub(super) fn new(
        core: Arc<Core<B>>,
        name: ConsumerName,
        left: Option<Arc<ConsumerSpec>>,
    ) -> Self {
        let ack_right = left.as_ref().map(|spec| spec.ack_right.clone()).unwrap_or_default();
        Self { core, name, spec: left, ack_right }
    }

    /// Takes in the outcome of a settlement that was published elsewhere.
    pub(super) fn learn(&self, outcome: &Result<(), BrokerError>) {
        self.ack_right.learn(outcome);
    }

    pub(super) fn spec(&self) -> Option<&Arc<ConsumerSpec>> {
        self.spec.as_ref()
    }

    /// The number of leases that are held.
    pub(super) fn held(&self) -> usize {
        let held = |spec: &Arc<ConsumerSpec>| self.core.table.with(|table| table.held_by(spec.id));
        self.spec.as_ref().map_or(0, held)
    }

    /// The most leases that this consumer may have: something is always left for others. Permits that pulls
    /// have reserved count as left.
    pub(super) fn limit(&self) -> usize {
        let within = self.held() + self.core.table.unleased();
        self.core.limits.max_leases_per_consumer.min(nine_tenths(within))
    }

    /// Leases that may still be granted.
    pub(super) fn left(&self) -> usize {
        self.limit().saturating_sub(self.held())
    }

    /// Why a Fetch would wait for a lease to end.
    pub(super) fn refusal(&self) -> Option<Error> {
        if self.core.table.is_full() {
            return Some(Error::LeaseLimit(self.core.table.most()));
        }
        let (held, limit) = (self.held(), self.limit());
        (held > 0 && held >= limit).then_some(Error::ConsumerLeaseLimit(limit))
    }

    /// Uses this configuration from now on. A consumer that was known keeps its id and its leader.
    pub(super) fn adopt(&mut self, info: &ConsumerInfo) -> &ConsumerSpec {
        let known = self.spec.take();
        let id = known.as_ref().map_or_else(|| self.core.next_consumer(), |spec| spec.id);
        let meter = match &known {
            Some(known) => known.meter.clone(),
            None => {
                let ConsumerName { stream, consumer } = &self.name;
                self.core.metrics.consumer(stream, consumer, clock::now())
            }
        };
        let mut spec = ConsumerSpec::new(&self.name, id, info, self.ack_right.clone(), meter);
        if let Some(known) = known {
            spec.leadership = known.leadership.clone();
            if (known.ack_wait, &known.backoff) != (spec.ack_wait, &spec.backoff) {
                tracing::info!(consumer = %self.name, "the ack wait of the consumer has changed");
                let ack_wait = |count| spec.ack_wait_of(count);
                self.core
                    .in_steps(|table, after| table.retune(id, ack_wait, after, LEASES_PER_LOCK));
            }
        }
        self.spec.insert(Arc::new(spec))
    }

    /// The consumer is not the one that it was: nothing that was leased of it can be settled.
    pub(super) fn end(&mut self) {
        self.end_as(ConsumerEnd::Gone);
    }

    fn end_as(&mut self, how: ConsumerEnd) {
        if let Some(spec) = self.spec.take() {
            // First, for leases that are just being taken over.
            spec.leadership.end();
            self.core.table.with(|table| table.end_consumer(spec.id, how));
        }
    }

    /// The deliveries are counted from the beginning again: the messages of older leases are delivered again.
    pub(super) fn void(&mut self) {
        let Some(spec) = self.spec.clone() else { return };
        tracing::warn!(
            consumer = %self.name,
            "deliveries of the consumer are counted from 1 again: older leases end"
        );
        self.end_as(ConsumerEnd::Reset);
        self.spec = Some(Arc::new(spec.counted_again(self.core.next_consumer())));
    }

    /// The other replicas are told that the consumer began again, or they know it now.
    pub(super) fn announce(&self, announcing: bool) {
        self.spec.iter().for_each(|spec| spec.leadership.announce(announcing));
    }

    /// The server may have forgotten what it promised from then on, or a moment before.
    pub(super) fn distrust(&self, since: Instant, signs: LeaderSigns) {
        let Some(spec) = &self.spec else { return };
        if signs.any() {
            let LeaderSigns { another, missed, forgotten } = signs;
            let consumer = &self.name;
            tracing::info!(
                %consumer,
                another,
                missed,
                forgotten,
                "the leader of the consumer may have forgotten deliveries"
            );
        }
        self.core.in_steps(|table, after| table.distrust(spec.id, since, after, LEASES_PER_LOCK));
    }

    /// Leases of deliveries after this consumer sequence are lost.
    pub(super) fn lose_after(&self, last: u64) {
        let Some(spec) = &self.spec else { return };
        self.core.in_steps(|table, after| table.lose_after(spec.id, last, after, LEASES_PER_LOCK));
    }

    pub(super) fn pass_to(&self, leader: Leader, seen_at: Instant) {
        self.spec.iter().for_each(|spec| spec.leadership.pass_to(leader, seen_at));
    }

    pub(super) fn doubt(&self) {
        self.spec.iter().for_each(|spec| _ = spec.leadership.doubt());
    }

    pub(super) fn trust(&self) {
        self.spec.iter().for_each(|spec| spec.leadership.be_sure());
    }

    /// Leases what has arrived. Each lease takes one of the permits, as long as there are any.
    pub(super) fn grant(
        &self,
        deliveries: impl IntoIterator<Item = ArrivedDelivery>,
        permits: &mut Option<OwnedSemaphorePermit>,
        now: Instant,
    ) -> Vec<GrantedDelivery> {
        let Some(spec) = &self.spec else { return Vec::new() };
        let (mut superseded, unix) = (Vec::new(), clock::unix_time());
        let granted = self.core.table.with(|table| {
            let grant = |ArrivedDelivery { delivery, sent_after }| {
                let held = HeldDelivery {
                    ack: delivery.ack.clone(),
                    spec: spec.clone(),
                    delivery_count: delivery.delivery_count,
                    since: now,
                    taken: None,
                    principal: None,
                    attempt: None,
                    headers_only: is_headers_only(&delivery),
                    answer: None,
                    debit: None,
                    _permit: permits.as_mut().and_then(|permits| permits.split(1)),
                };
                let (id, older) =
                    table.grant(terms(spec, &delivery, sent_after, (now, unix)), held);
                spec.meter.granted();
                superseded.extend(older);
                GrantedDelivery { id, delivery, spec: spec.clone(), arrived_at: now }
            };
            deliveries.into_iter().map(grant).collect()
        });
        let overtaken = superseded.iter().map(|(_, hold)| hold);
        metered::ended(&self.core.metrics, LeaseEnd::Overtaken, overtaken, now);
        if !superseded.is_empty() {
            let (consumer, count) = (&self.name, superseded.len());
            tracing::info!(
                %consumer,
                count,
                "messages were delivered again while leased: the older leases ended"
            );
        }
        granted
    }

    /// Makes leases the caller's own, whose answer has this end. See [`assign`].
    pub(super) fn assign(
        &self,
        granted: Vec<GrantedDelivery>,
        request: (&LeaseRequest, &AnswerEnd),
        now: Instant,
    ) -> Vec<LeasedDelivery> {
        assign(
            &self.core,
            granted.into_iter().map(|granted| (granted, None)).collect(),
            request,
            now,
        )
    }

    /// Nobody has taken these. A last attempt is kept alive until somebody does.
    pub(super) fn take_back(&self, granted: &[GrantedDelivery], now: Instant) {
        self.core.table.with(|table| {
            for granted in granted {
                table.update_payload(granted.id, |held| {
                    (held.taken, held.attempt, held.answer) = (None, None, None);
                    held.debit = None;
                    held.principal.iter_mut().for_each(LeaseHolder::take_back);
                });
                if granted.last_attempt() {
                    table.reclaim(granted.id, now);
                }
            }
        });
    }

    /// Gives deliveries back to JetStream that nobody here wants.
    pub(super) fn release(&self, granted: Vec<GrantedDelivery>, cause: ReleaseCause, now: Instant) {
        // Dropped after the lock: each freed permit wakes a waiter.
        let back: Vec<GivenBack<HeldDelivery>> = self.core.table.with(|table| {
            if self.core.pinned.load(Ordering::Relaxed) {
                return Vec::new();
            }
            granted.iter().filter_map(|granted| table.give_back(granted.id, now)).collect()
        });
        let given_back = back.iter().map(|back| &back.payload);
        metered::ended(&self.core.metrics, LeaseEnd::GivenBack, given_back, now);
        let released = back.into_iter().filter_map(|back| Some((back.payload, back.release?)));
        release(&self.core, released.collect(), cause, Duration::ZERO);
    }

    /// The task ends. If leases are held, the next task of the consumer finds its spec, and what the monitor
    /// knew.
    pub(super) fn leave(&self, known: Option<LeftKnowledge>) {
        if let Some(spec) = self.spec.clone().filter(|_| self.held() > 0) {
            self.core.leave((spec, known));
        }
    }
}

/// Nine tenths; all of a count below ten, because a tenth of it is none.
pub(super) fn nine_tenths(count: usize) -> usize {
    count - count / 10
}

/// How long ago, at most, the message was published, by NATS's clock.
fn age(delivery: &Delivery, now: Duration) -> Duration {
    (now + NATS_CLOCK_SKEW).saturating_sub(Duration::from_nanos(delivery.published))
}

/// The terms of a delivery that arrives `now`, which is `unix` by the wall clock.
fn terms(
    spec: &ConsumerSpec,
    delivery: &Delivery,
    sent_after: Option<Instant>,
    (now, unix): (Instant, Duration),
) -> Terms {
    Terms {
        consumer: spec.id,
        sequence: delivery.stream_sequence,
        consumer_sequence: delivery.consumer_sequence,
        last_attempt: spec.last_attempt(delivery.delivery_count),
        received: now,
        sent_after,
        age: age(delivery, unix),
        ack_wait: spec.ack_wait_of(delivery.delivery_count),
        delivery_count: delivery.delivery_count,
    }
}
