//! The series that are counted as things happen. A series is found once, by whoever counts; from then on
//! counting is an atomic addition, or a lock of one histogram.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{
        counter::Counter, exemplar::HistogramWithExemplars, gauge::Gauge, histogram::Histogram,
    },
};

use super::{
    labels::Label,
    table::{FAMILIES, Family, FamilyId, FamilyKind},
};

/// The labels of a family that has series for each consumer.
const CONSUMER_LABELS: [&str; 2] = ["stream", "consumer"];

/// The values of the labels of a series, in the order of the table.
pub(super) type Values = Vec<Cow<'static, str>>;

/// All series that are counted.
#[derive(Debug)]
pub(super) struct SeriesStore {
    /// By the number of the family. Empty if nothing is counted.
    families: Vec<Mutex<BTreeMap<Values, Series>>>,
}

#[derive(Debug, Clone)]
pub(super) enum Series {
    Counter(Counter),
    Gauge(Gauge),
    Histogram(Histogram),
    TracedHistogram(HistogramWithExemplars<TraceLabel>),
}

/// The label of an exemplar.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct TraceLabel {
    trace_id: String,
}

/// A counter of one series. `None`: nothing is counted.
#[derive(Debug, Clone, Default)]
pub(super) struct Count(Option<Counter>);

/// A gauge that several owners add up to. `None`: nothing is counted.
#[derive(Debug, Clone, Default)]
pub(super) struct Amount(Option<Gauge>);

/// The counters of one family with one label, all of whose values are known.
#[derive(Debug)]
pub(super) struct Counts<L>(Vec<Count>, std::marker::PhantomData<L>);

/// The histogram of one series. `None`: nothing is observed.
#[derive(Debug, Clone, Default)]
pub(super) struct Times(Option<Histogram>);

/// The same, with the last trace of each bucket as its exemplar.
#[derive(Debug, Clone, Default)]
pub(super) struct TracedTimes(Option<HistogramWithExemplars<TraceLabel>>);

impl SeriesStore {
    /// A store of all families.
    pub(super) fn new() -> Self {
        Self { families: FAMILIES.iter().map(|_| Mutex::default()).collect() }
    }

    /// A store that counts nothing.
    pub(super) fn off() -> Self {
        Self { families: Vec::new() }
    }

    fn family(&self, id: FamilyId) -> Option<MutexGuard<'_, BTreeMap<Values, Series>>> {
        let family = self.families.get(id as usize)?;
        // A map of handles is whole after every step.
        Some(family.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The counter of these labels.
    pub(super) fn count(&self, id: FamilyId, values: Values) -> Count {
        self.show(id, values, &Count::unseen())
    }

    /// The gauge of these labels.
    pub(super) fn level(&self, id: FamilyId, values: Values) -> Amount {
        debug_assert_eq!(row(id).kind, FamilyKind::Gauge);
        debug_assert_eq!(row(id).labels.len(), values.len());
        let Some(mut family) = self.family(id) else { return Amount::default() };
        let Series::Gauge(gauge) =
            family.entry(values).or_insert_with(|| Series::Gauge(Gauge::default()))
        else {
            return Amount::default();
        };
        Amount(Some(gauge.clone()))
    }

    /// Ends the series whose first labels have these values.
    pub(super) fn end(&self, first: &[Cow<'static, str>]) {
        for row in FAMILIES.iter().filter(|row| row.labels.len() >= first.len()) {
            let family = self.family(row.id).filter(|_| row.labels[..2] == CONSUMER_LABELS);
            family.into_iter().for_each(|mut family| {
                family.retain(|values, _| !values.starts_with(first));
            });
        }
    }

    /// Shows a counter that was made before. An earlier counter of these labels stays, and is returned.
    pub(super) fn show(&self, id: FamilyId, values: Values, count: &Count) -> Count {
        debug_assert_eq!(row(id).kind, FamilyKind::Counter);
        debug_assert_eq!(row(id).labels.len(), values.len());
        let (Some(mut family), Some(counter)) = (self.family(id), &count.0) else {
            return Count::default();
        };
        let Series::Counter(counter) =
            family.entry(values).or_insert_with(|| Series::Counter(counter.clone()))
        else {
            return Count::default();
        };
        Count(Some(counter.clone()))
    }

    /// The histogram of these labels.
    pub(super) fn times(&self, id: FamilyId, values: Values) -> Times {
        debug_assert_eq!(row(id).labels.len(), values.len());
        let FamilyKind::Histogram(buckets) = row(id).kind else { return Times::default() };
        let Some(mut family) = self.family(id) else { return Times::default() };
        let new = || Series::Histogram(Histogram::new(buckets.iter().copied()));
        let Series::Histogram(histogram) = family.entry(values).or_insert_with(new) else {
            return Times::default();
        };
        Times(Some(histogram.clone()))
    }

    /// The histogram of these labels, which names traces.
    pub(super) fn traced_times(&self, id: FamilyId, values: Values) -> TracedTimes {
        debug_assert_eq!(row(id).labels.len(), values.len());
        let FamilyKind::Histogram(buckets) = row(id).kind else { return TracedTimes::default() };
        let Some(mut family) = self.family(id) else { return TracedTimes::default() };
        let new = || Series::TracedHistogram(HistogramWithExemplars::new(buckets.iter().copied()));
        let Series::TracedHistogram(histogram) = family.entry(values).or_insert_with(new) else {
            return TracedTimes::default();
        };
        TracedTimes(Some(histogram.clone()))
    }

    /// The values of the counters of a family, by their labels.
    pub(super) fn counted(&self, id: FamilyId) -> Vec<(Values, f64)> {
        let counted = |(values, series)| {
            let Series::Counter(counter) = series else { return None };
            Some((values, counter.get() as f64))
        };
        self.series(id).into_iter().filter_map(counted).collect()
    }

    /// The series of a family, by their labels.
    pub(super) fn series(&self, id: FamilyId) -> Vec<(Values, Series)> {
        let family = self.family(id);
        let series = family.iter().flat_map(|family| family.iter());
        series.map(|(values, series)| (values.clone(), series.clone())).collect()
    }
}

/// The row of a family. The table is in the order of the ids.
pub(super) fn row(id: FamilyId) -> &'static Family {
    &FAMILIES[id as usize]
}

impl Count {
    /// A counter that no scraper sees yet.
    pub(super) fn unseen() -> Self {
        Self(Some(Counter::default()))
    }

    pub(super) fn add(&self, more: u64) {
        if let Some(counter) = &self.0 {
            counter.inc_by(more);
        }
    }
}

impl Amount {
    /// The one owner has `now`.
    pub(super) fn set(&self, now: usize) {
        if let Some(gauge) = &self.0 {
            gauge.set(i64::try_from(now).unwrap_or(i64::MAX));
        }
    }

    /// The owner has `now` in place of `before`.
    pub(super) fn moves(&self, before: usize, now: usize) {
        if let Some(gauge) = self.0.as_ref().filter(|_| before != now) {
            gauge.inc_by(i64::try_from(now).unwrap_or(i64::MAX));
            gauge.dec_by(i64::try_from(before).unwrap_or(i64::MAX));
        }
    }
}

impl<L: Label> Counts<L> {
    /// The counters of a family whose last label is `L`, and whose other labels are these.
    pub(super) fn new(store: &SeriesStore, id: FamilyId, others: &[Cow<'static, str>]) -> Self {
        Self::only(store, id, others, |_| true)
    }

    /// The same, with the values that can happen alone.
    pub(super) fn only(
        store: &SeriesStore,
        id: FamilyId,
        others: &[Cow<'static, str>],
        can_happen: impl Fn(L) -> bool,
    ) -> Self {
        let one = |label: &L| match can_happen(*label) {
            true => store.count(id, [others, &[label.value().into()]].concat()),
            false => Count::default(),
        };
        Self(L::ALL.iter().map(one).collect(), std::marker::PhantomData)
    }

    /// Counters that no scraper sees yet.
    pub(super) fn unseen() -> Self {
        Self(L::ALL.iter().map(|_| Count::unseen()).collect(), std::marker::PhantomData)
    }

    pub(super) fn of(&self, label: L) -> &Count {
        &self.0[label.number()]
    }
}

impl Times {
    pub(super) fn observe(&self, value: f64) {
        if let Some(histogram) = &self.0 {
            histogram.observe(value);
        }
    }
}

impl TracedTimes {
    /// `trace_id`: the trace of what took so long, if it is sampled.
    pub(super) fn observe(&self, value: f64, trace_id: Option<String>) {
        if let Some(histogram) = &self.0 {
            histogram.observe(value, trace_id.map(|trace_id| TraceLabel { trace_id }), None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_the_order_of_the_ids() {
        for (place, family) in FAMILIES.iter().enumerate() {
            assert_eq!(family.id as usize, place, "{}", family.name);
        }
    }
}
