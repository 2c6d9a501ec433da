//! The words of the metrics for the events of the lessor, and its values at a scrape. Decides nothing.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use super::{Action, Empty, Error, Fetched, Lessor, RejectedCause, Settled, table::HeldDelivery};
use crate::{
    broker::{Broker, BrokerError, Confirmation, ConsumerName},
    clock,
    metrics::{
        ConsumerMeter, FamilyId, FetchResult, LeaseEnd, Metrics, ProgressResult, PullResult,
        RejectionCause, SettlementKind, SettlementResult,
    },
    pump::PullOutcome,
};

/// Leases have ended.
pub(super) fn ended<'h>(
    metrics: &Metrics,
    how: LeaseEnd,
    holds: impl IntoIterator<Item = &'h HeldDelivery>,
    now: Instant,
) {
    for hold in holds {
        metrics.leases().ended(&hold.spec.meter, how, hold.since, now);
    }
}

/// A pull has ended.
pub(super) fn pull(outcome: PullOutcome) -> PullResult {
    match outcome {
        PullOutcome::Done => PullResult::Done,
        PullOutcome::Spent => PullResult::Spent,
        PullOutcome::RequestsPending => PullResult::RequestsPending,
        PullOutcome::TooLarge => PullResult::TooLarge,
        PullOutcome::Refused => PullResult::Refused,
    }
}

/// Progress has its result.
pub(super) fn progress(result: &Result<(), BrokerError>) -> ProgressResult {
    match result {
        Ok(()) => ProgressResult::Confirmed,
        Err(BrokerError::Denied(_)) => ProgressResult::Denied,
        Err(BrokerError::Late | BrokerError::Unconfirmed) => ProgressResult::Unconfirmed,
        Err(BrokerError::Unsent(_) | BrokerError::Leaderless(_)) => ProgressResult::Unsent,
    }
}

/// The end of a lease that leaves the table after its settlement.
pub(super) fn end(kind: SettlementKind, done: bool) -> LeaseEnd {
    match kind {
        SettlementKind::Ack if done => LeaseEnd::Ack,
        SettlementKind::Nak if done => LeaseEnd::Nak,
        SettlementKind::Term if done => LeaseEnd::Term,
        SettlementKind::Ack
        | SettlementKind::Nak
        | SettlementKind::Term
        | SettlementKind::Extend => LeaseEnd::Lost,
    }
}

/// A settlement of a lease that is here has its result. Refusals by the table are not counted: it may not know
/// the consumer any more. The caller has the token, and counts them.
pub(super) fn settled(
    meter: &ConsumerMeter,
    kind: SettlementKind,
    result: &Result<Settled, Error>,
) {
    let result = match result {
        Ok(Settled::Done { confirmation: Confirmation::Confirmed, .. }) => {
            Some(SettlementResult::Confirmed)
        }
        Ok(Settled::Done { confirmation: Confirmation::Sent, .. }) => Some(SettlementResult::Sent),
        Ok(Settled::Extended(_)) => Some(SettlementResult::Extended),
        Err(Error::Permission(_) | Error::ConsumerGone) => Some(SettlementResult::Denied),
        Err(Error::Unavailable(_)) => Some(SettlementResult::Unsent),
        Err(Error::Unconfirmed) => Some(SettlementResult::Unconfirmed),
        Ok(Settled::Duplicate)
        | Err(
            Error::LeaseExpired { .. }
            | Error::LastAttempt
            | Error::LeaseSettled(_)
            | Error::NotHolder
            | Error::LeaseBusy
            | Error::StreamNotFound(_)
            | Error::ConsumerNotFound(_)
            | Error::ConsumerUnsuitable { .. }
            | Error::ConsumerSuspected { .. }
            | Error::ConsumerBusy(_)
            | Error::LeaseLimit(_)
            | Error::ConsumerLeaseLimit(_)
            | Error::WaiterLimit(_)
            | Error::Draining,
        ) => None,
    };
    result.iter().for_each(|result| meter.settled(kind, *result));
}

impl Action {
    /// The kind of the action.
    pub(crate) fn kind(&self) -> SettlementKind {
        match self {
            Self::Ack => SettlementKind::Ack,
            Self::Nak(_) => SettlementKind::Nak,
            Self::Term(_) => SettlementKind::Term,
            Self::Extend(_) => SettlementKind::Extend,
        }
    }
}

/// An open Fetch. If nobody says how it ended, its caller went away.
pub(super) struct OpenFetch {
    metrics: Metrics,
    /// The meter of its consumer. `None` before it has joined the task of the consumer.
    meter: Option<Arc<OnceLock<ConsumerMeter>>>,
    result: FetchResult,
}

impl OpenFetch {
    pub(super) fn new(metrics: Metrics) -> Self {
        Self { metrics, meter: None, result: FetchResult::Left }
    }

    /// It waits for the task of its consumer.
    pub(super) fn joined(&mut self, meter: &Arc<OnceLock<ConsumerMeter>>) {
        self.meter = Some(meter.clone());
    }

    /// The Fetch has this answer.
    pub(super) fn answered(mut self, answer: &Result<Fetched, Error>) {
        self.result = match answer {
            Err(_) => FetchResult::Refused,
            Ok(fetched) => {
                self.observe(fetched);
                match fetched.empty() {
                    None => FetchResult::Messages,
                    Some(Empty::NoMessages) => FetchResult::NoMessages,
                    Some(Empty::MaxAckPending) => FetchResult::MaxAckPending,
                    Some(Empty::Paused) => FetchResult::Paused,
                    Some(Empty::Draining) => FetchResult::Draining,
                    Some(Empty::Rejected) => FetchResult::Rejected,
                    Some(Empty::AttemptOver) => FetchResult::AttemptOver,
                }
            }
        };
    }

    fn observe(&self, fetched: &Fetched) {
        for rejected in fetched.rejected() {
            self.consumer().rejected(match rejected.cause {
                RejectedCause::Codec(_) => RejectionCause::Codec,
                RejectedCause::TooLarge => RejectionCause::TooLarge,
            });
        }
        if let Some(first) = fetched.messages().first() {
            let since_arrival = clock::now().saturating_duration_since(first.granted.arrived_at);
            let published = Duration::from_nanos(first.delivery().published);
            let since_publish = (first.delivery().delivery_count == 1)
                .then(|| clock::unix_time().saturating_sub(published));
            let messages = fetched.messages().len();
            self.metrics.leases().answered(messages, since_arrival, since_publish);
        }
    }

    fn consumer(&self) -> &ConsumerMeter {
        let known = self.meter.as_ref().and_then(|meter| meter.get());
        known.unwrap_or(self.metrics.other_consumers())
    }
}

impl Drop for OpenFetch {
    fn drop(&mut self) {
        self.consumer().fetched(self.result);
    }
}

impl<B: Broker> Lessor<B> {
    /// The meter of a consumer that a token names. `None`: the token names none.
    pub fn meter_of(&self, consumer: Option<&ConsumerName>) -> ConsumerMeter {
        let metrics = &self.core.metrics;
        match consumer {
            Some(name) => metrics.consumer(&name.stream, &name.consumer, clock::now()),
            None => metrics.other_consumers().clone(),
        }
    }

    /// A Fetch is refused before it asks for messages.
    pub fn refuse_fetch(&self, name: &ConsumerName) {
        self.count_fetch(name, FetchResult::Refused);
    }

    /// A Fetch that has not asked for messages has ended.
    pub(super) fn count_fetch(&self, name: &ConsumerName, result: FetchResult) {
        let mut open = OpenFetch::new(self.core.metrics.clone());
        // JetStream may not know a consumer without a task.
        let task = self.calls.handles().get(name).cloned();
        task.iter().for_each(|task| open.joined(&task.meter));
        open.result = result;
    }

    /// A token was settled without a lease.
    pub fn count_unleased(
        &self,
        consumer: Option<&ConsumerName>,
        kind: SettlementKind,
        result: &Result<Settled, Error>,
    ) {
        settled(&self.meter_of(consumer), kind, result);
    }

    /// Shows the leases at each scrape, for as long as the lessor lives.
    pub(super) fn show(&self) {
        let (core, calls) = (Arc::downgrade(&self.core), Arc::downgrade(&self.calls));
        self.core.metrics.ask(move |sheet| {
            let (Some(core), Some(calls)) = (core.upgrade(), calls.upgrade()) else { return };
            let (held, oldest) = core.table.with(|table| {
                let held = table.consumers().map(|(hold, count)| (hold.spec.meter.clone(), count));
                (held.collect::<Vec<_>>(), table.oldest().map(|hold| hold.since))
            });
            for (meter, count) in held {
                sheet.add_of(FamilyId::Leases, meter.name(), count as f64);
            }
            let age = oldest.map(|since| clock::now().saturating_duration_since(since));
            sheet.set(FamilyId::OldestLease, age.unwrap_or_default().as_secs_f64());
            sheet.set(FamilyId::LeasesLimit, core.table.most() as f64);
            sheet.set(FamilyId::LeasePlacesFree, f64::from(core.table.free()));
            sheet.set(FamilyId::NatsOwnConnections, core.own_connections() as f64);
            for (principal, held) in core.accounts.all() {
                let principals = core.metrics.principals();
                principals.show(sheet, FamilyId::PrincipalLeases, &principal, held as f64);
            }
            sheet.set(FamilyId::WaitersLimit, core.limits.max_waiters as f64);
            sheet.set(FamilyId::Consumers, calls.handles().len() as f64);
        });
    }
}
