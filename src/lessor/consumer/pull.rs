//! Pulling: does what the pump says, leases what arrives, and reads why a pull has ended.

use std::time::{Duration, Instant};

use super::{
    ConsumerTask,
    sharing::{PullPlaces, wire_size},
};
use crate::{
    broker::{
        Arrival, Broker, BrokerError, Delivery, Inbox, InboxEvent, Link, PullEnd, PullRequest,
    },
    clock,
    lease::{LeaseId, Terms},
    lessor::{Error, delivery::GrantedDelivery, spec::ConsumerSpec, table::HeldDelivery},
    pump::{Allowance, PullOutcome, Step},
};

/// NATS's clock may be ahead of ours by this much.
const CLOCKS: Duration = Duration::from_millis(250);

/// How often it is looked whether leases of the consumer itself have ended, where it has its limit.
pub(super) const STARVED: Duration = Duration::from_millis(100);

impl<B: Broker> ConsumerTask<B> {
    /// Does what the pump says, until it has nothing more to say.
    pub(super) async fn perform(&mut self) {
        loop {
            let now = clock::now();
            let step = self.pump.step(now, Allowance::NONE);
            // One whose end was never told keeps no place either, and others may be waiting for it.
            let freed = self.free_places(now);
            let step = step.or_else(|| {
                let allowed = self.allowance(now)?;
                self.pump.step(now, allowed)
            });
            match step {
                None if freed => {}
                None => return,
                Some(Step::Pull { no, batch, expires, no_wait, max_bytes }) => {
                    self.pull(PullRequest { no, batch, expires, no_wait, max_bytes }).await;
                }
                Some(Step::Answer { waiter, messages, too_large, why }) => {
                    self.answer(waiter, messages, too_large, why, now);
                }
                Some(Step::Overdue { message }) => self.release(vec![message], now),
            }
        }
    }

    /// What a pull may ask for, if one is due.
    fn allowance(&mut self, now: Instant) -> Option<Allowance> {
        // While one connection is missing, or INFO is overdue, nothing new is pulled.
        let pulls = self.up() && self.inbox.is_some() && self.fresh(now) && !self.outdated();
        let pulls = pulls && self.may_pull(now);
        let demand = self.pump.demand(now);
        if demand.is_none() || self.inbox.is_none() {
            self.turn.leave();
        }
        // While INFO is read again, one keeps its place in line.
        let allowed = demand.filter(|_| pulls).and_then(|demand| {
            let Link::Up(server) = &self.link else { return None };
            let table = &self.lessor.table;
            let (mine, free) = (self.lease_limit().saturating_sub(self.held()), self.turn.free());
            match (mine, free) {
                (0, _) => self.turn.leave(),
                (_, 0) => self.turn.stand(),
                _ => {}
            }
            if mine == 0 || free == 0 {
                return None;
            }
            let places = PullPlaces { most: mine.min(most_of(free)), idle: table.idle_share() };
            let allowed = self.sharing.allow(&demand, places, server.max_payload, now);
            if allowed.is_none() {
                // Whoever waits for bytes keeps no place from others.
                self.turn.leave();
            }
            Some(allowed)
        });
        if allowed.is_none() {
            self.sharing.rest();
        }
        allowed.flatten()
    }

    /// How many leases this consumer may have: for others there is always something left. Places that
    /// pulls have reserved count as left.
    pub(super) fn lease_limit(&self) -> usize {
        let within = self.held() + self.lessor.table.unleased();
        self.lessor.limits.max_leases_per_consumer.min(most_of(within))
    }

    /// Why a Fetch would wait for a lease of its own consumer to end.
    pub(super) fn full(&self) -> Option<Error> {
        let (held, limit) = (self.held(), self.lease_limit());
        (held > 0 && held >= limit).then_some(Error::ConsumerLeaseLimit(limit))
    }

    /// Where no pull is open, nothing is to come. `true`: there were places kept for it.
    fn free_places(&mut self, now: Instant) -> bool {
        let open = self.pump.has_pull();
        self.sharing.settle(open, now);
        !open && self.places.take().is_some()
    }

    pub(super) async fn pull(&mut self, pull: PullRequest) {
        self.places = None;
        self.places = self.turn.take(pull.batch);
        self.sharing.issued(pull.no, pull.batch, pull.max_bytes);
        let sent = match (&self.places, &mut self.inbox) {
            (Some(_), Some(inbox)) => inbox.pull(pull).await,
            // Others took the places in between, or the connection went: the pump tries again.
            _ => Err(BrokerError::Unsent("no room".to_owned())),
        };
        let now = clock::now();
        if sent.is_ok() {
            self.pulled_at = Some(now);
            self.sighted.single.issued(pull.no, pull.batch, now + pull.expires);
            if let Some(spec) = &self.spec {
                self.quarantine.pulled(spec.longest_ack_wait(), now);
            }
        } else {
            self.places = None;
            self.sharing.unsent();
            self.pump.ended(pull.no, PullOutcome::Refused, now);
        }
    }

    /// Leases what has arrived, and tells the pump.
    pub(super) fn arrived(&mut self, now: Instant) {
        self.watch_answers(now);
        let arrivals: Vec<Arrival> = self.arrivals.drain(..).collect();
        let Some(spec) = self.spec.clone() else {
            // The consumer is gone, and its deliveries with it; the ends of pulls count.
            for arrival in arrivals {
                if let Arrival::End { no, end } = arrival {
                    self.end_on(no, end, now);
                }
            }
            return;
        };
        let places = &mut self.places;
        let mut superseded = Vec::new();
        let mut granted: Vec<(LeaseId, Box<Delivery>)> = Vec::with_capacity(arrivals.len());
        let mut ends = Vec::new();
        self.lessor.table.with(|table| {
            for arrival in arrivals {
                match arrival {
                    Arrival::Message(delivery) => {
                        let hold = HeldDelivery {
                            ack: delivery.ack.clone(),
                            spec: spec.clone(),
                            delivery_count: delivery.delivery_count,
                            worker: None,
                            _place: places.as_mut().and_then(|places| places.split(1)),
                        };
                        self.seen = (
                            self.seen.0.max(delivery.consumer_sequence),
                            self.seen.1.max(delivery.stream_sequence),
                        );
                        let (id, older) = table.grant(terms(&spec, &delivery, now), hold);
                        superseded.extend(older);
                        granted.push((id, delivery));
                    }
                    Arrival::End { no, end } => ends.push((no, end)),
                }
            }
        });
        if !superseded.is_empty() {
            let (consumer, count) = (&self.name, superseded.len());
            tracing::info!(%consumer, count, "delivered anew while leased: the older leases ended");
        }
        self.sharing.arrived(granted.iter().map(|(_, delivery)| wire_size(delivery)));
        for (id, delivery) in granted {
            self.hand_on(GrantedDelivery { id, delivery, spec: spec.clone() }, now);
        }
        for (no, end) in ends {
            self.end_on(no, end, now);
        }
    }

    /// A pull has ended. Some ends say more than that.
    pub(super) fn ended(&mut self, no: u64, end: PullEnd, now: Instant) {
        let end = match end {
            PullEnd::Done => {
                self.limited = false;
                PullOutcome::Done
            }
            PullEnd::RequestsPending => PullOutcome::RequestsPending,
            PullEnd::TooLarge => PullOutcome::TooLarge,
            PullEnd::Spent => PullOutcome::Spent,
            PullEnd::Busy(why) => {
                // A limit that INFO tells is kept to from the next pull on; what it does not tell,
                // like too many pulls of others, is for the callers to know.
                if self.limited || why.contains("MaxWaiting") {
                    self.fail_waiters(&Error::ConsumerBusy(why), now);
                }
                self.limited = true;
                self.ask_at = now;
                PullOutcome::Refused
            }
            PullEnd::LeaderGone => {
                self.distrust(now);
                self.missed(now);
                PullOutcome::Refused
            }
            PullEnd::ConsumerGone => {
                self.missed(now);
                PullOutcome::Refused
            }
            PullEnd::Permission(subject) => {
                self.fail_waiters(&Error::Permission(subject), now);
                self.disconnected(now);
                self.learned_on = None;
                PullOutcome::Refused
            }
            PullEnd::Other(why) => {
                tracing::warn!(consumer = %self.name, why, "a pull was refused");
                PullOutcome::Refused
            }
        };
        self.sharing.ended(no, end);
        self.pump.ended(no, end, now);
        self.free_places(now);
    }

    pub(super) fn disconnected(&mut self, now: Instant) {
        self.inbox = None;
        self.places = None;
        self.sharing.lost();
        self.sighted.single.lost();
        // What was asked before may not know of what has arrived until now.
        if self.asking.take().is_some() {
            self.ask_at = now;
        }
        if self.apart.take().is_some() {
            // The link says nothing of a connection of our own.
            (self.learned_on, self.ask_at) = (None, now);
        }
        self.pump.down(now);
    }
}

/// Nine tenths, and of a few the last one too: a tenth of them is none.
fn most_of(count: usize) -> usize {
    count - count / 10
}

/// What comes through the inbox, while there is one.
pub(super) async fn next<I: Inbox>(inbox: &mut Option<I>, into: &mut Vec<Arrival>) -> InboxEvent {
    match inbox {
        Some(inbox) => inbox.next(into).await,
        None => std::future::pending().await,
    }
}

/// How long ago, at most, the message was published, by NATS's clock.
fn age(delivery: &Delivery, now: Duration) -> Duration {
    (now + CLOCKS).saturating_sub(Duration::from_nanos(delivery.published))
}

fn terms(spec: &ConsumerSpec, delivery: &Delivery, received: Instant) -> Terms {
    Terms {
        consumer: spec.id,
        sequence: delivery.stream_sequence,
        consumer_sequence: delivery.consumer_sequence,
        last_attempt: spec.last_attempt(delivery.delivery_count),
        received,
        age: age(delivery, clock::unix_time()),
        ack_wait: spec.ack_wait_of(delivery.delivery_count),
        delivery_count: delivery.delivery_count,
    }
}
