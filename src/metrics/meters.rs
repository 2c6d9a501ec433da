//! The meters of the process: its log and its runtime.

use std::{sync::Arc, time::Duration};

use super::{
    labels::{Label as _, Severity},
    store::{Amount, Count, Counts, SeriesStore, Times},
    table::FamilyId,
};

/// Counts the lines of the log. A copy is the same meter. It is made before the metrics, because the log starts
/// first.
#[derive(Debug, Clone)]
pub struct LogMeter(Arc<Lines>);

#[derive(Debug)]
struct Lines {
    logged: Counts<Severity>,
    dropped: Count,
    panics: Count,
}

impl Default for LogMeter {
    fn default() -> Self {
        let (dropped, panics) = (Count::unseen(), Count::unseen());
        Self(Arc::new(Lines { logged: Counts::unseen(), dropped, panics }))
    }
}

impl LogMeter {
    /// A line of this level was logged. The level is a word of the log, in any case.
    pub fn logged(&self, level: &str) {
        let known = Severity::ALL.iter().find(|known| known.value().eq_ignore_ascii_case(level));
        known.iter().for_each(|level| self.0.logged.of(**level).add(1));
    }

    /// A line was lost.
    pub fn dropped(&self) {
        self.0.dropped.add(1);
    }

    /// A task has panicked.
    pub fn panicked(&self) {
        self.0.panics.add(1);
    }

    pub(super) fn show(&self, store: &SeriesStore) {
        for level in Severity::ALL {
            let lines = self.0.logged.of(*level);
            store.show(FamilyId::LogLines, vec![level.value().into()], lines);
        }
        store.show(FamilyId::LogLinesDropped, Vec::new(), &self.0.dropped);
        store.show(FamilyId::Panics, Vec::new(), &self.0.panics);
    }
}

/// Shows whether a file can be used.
#[derive(Debug, Clone, Default)]
pub struct FileMeter(Amount);

impl FileMeter {
    pub(super) fn new(store: &SeriesStore, name: &'static str) -> Self {
        Self(store.level(FamilyId::FileUnusable, vec![name.into()]))
    }

    /// The last look at the file found this.
    pub fn usable(&self, usable: bool) {
        self.0.set(usize::from(!usable));
    }
}

/// Observes the runtime.
#[derive(Debug, Clone)]
pub struct RuntimeMeter {
    lag: Times,
}

impl RuntimeMeter {
    pub(super) fn new(store: &SeriesStore) -> Self {
        Self { lag: store.times(FamilyId::RuntimeLag, Vec::new()) }
    }

    /// A timer was so late.
    pub fn late(&self, by: Duration) {
        self.lag.observe(by.as_secs_f64());
    }
}
