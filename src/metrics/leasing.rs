//! The meter of a lessor: what has no consumer of its own.

use std::time::{Duration, Instant};

use super::{
    consumers::ConsumerMeter,
    labels::{Label as _, LeaseEnd, ProgressResult, SettlementKind},
    store::{Counts, SeriesStore, Times},
    table::FamilyId,
};

/// Counts and observes what happens to all leases.
#[derive(Debug)]
pub struct LeaseMeter {
    batch: Times,
    delay: Times,
    arrival: Times,
    /// By [`LeaseEnd`]. A lease that ended for no reason of its holder has no histogram.
    held: Vec<Option<Times>>,
    progress: Counts<ProgressResult>,
    /// By [`SettlementKind`]; `None` for an Extend, which publishes nothing.
    settle: Vec<Option<Times>>,
    settle_batch: Times,
}

impl LeaseMeter {
    pub(super) fn new(store: &SeriesStore) -> Self {
        let times = |id| store.times(id, Vec::new());
        let held = |how: &LeaseEnd| match how {
            LeaseEnd::Ack | LeaseEnd::Nak | LeaseEnd::Term | LeaseEnd::Lapsed => {
                Some(store.times(FamilyId::LeaseHeld, vec![how.value().into()]))
            }
            LeaseEnd::Lost | LeaseEnd::Overtaken | LeaseEnd::GivenBack | LeaseEnd::Moved => None,
        };
        let settle = |kind: &SettlementKind| {
            let published = *kind != SettlementKind::Extend;
            published.then(|| store.times(FamilyId::SettleTime, vec![kind.value().into()]))
        };
        Self {
            batch: times(FamilyId::FetchBatch),
            delay: times(FamilyId::DeliveryDelay),
            arrival: times(FamilyId::ArrivalToAnswer),
            held: LeaseEnd::ALL.iter().map(held).collect(),
            progress: Counts::new(store, FamilyId::Progress, &[]),
            settle: SettlementKind::ALL.iter().map(settle).collect(),
            settle_batch: times(FamilyId::SettleBatch),
        }
    }

    /// A Fetch is answered with messages. Its first message arrived `since_arrival` ago. It was published
    /// `since_publish` ago, if it is delivered for the first time.
    pub fn answered(
        &self,
        messages: usize,
        since_arrival: Duration,
        since_publish: Option<Duration>,
    ) {
        self.batch.observe(messages as f64);
        self.arrival.observe(since_arrival.as_secs_f64());
        since_publish.iter().for_each(|delay| self.delay.observe(delay.as_secs_f64()));
    }

    /// A lease of this consumer, held `since` then, has ended `now`.
    pub fn ended(&self, consumer: &ConsumerMeter, how: LeaseEnd, since: Instant, now: Instant) {
        consumer.ended(how);
        if let Some(held) = &self.held[how.number()] {
            held.observe(now.saturating_duration_since(since).as_secs_f64());
        }
    }

    /// Progress has its result.
    pub fn progressed(&self, result: ProgressResult) {
        self.progress.of(result).add(1);
    }

    /// Settlements of these kinds were published together, and JetStream has answered after this time.
    pub fn published(&self, kinds: impl ExactSizeIterator<Item = SettlementKind>, took: Duration) {
        self.settle_batch.observe(kinds.len() as f64);
        let mut seen = [false; SettlementKind::ALL.len()];
        for kind in kinds {
            if !std::mem::replace(&mut seen[kind.number()], true) {
                self.settle[kind.number()].iter().for_each(|it| it.observe(took.as_secs_f64()));
            }
        }
    }
}
