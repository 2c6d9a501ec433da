//! The metrics: their families, their series, and the page that a scraper reads. Names no other room: each owner
//! says what happened, and what can be read is read at a scrape.
//!
//! ```text
//!  who counts ── a meter: atomics ─────▶ store ─┐
//!  who owns   ◀─ asked at a scrape ──── sheet ──┴─▶ exposition ─▶ GET /metrics
//! ```
//! 1. `table` is the only place with the name of a family;
//! 2. a call touches atomics and the lock of one histogram, and no map;
//! 3. a family without a label `consumer`, `principal` or `issuer` has all its series from the start.
//!
//! `labels` has the values of labels, `process` reads `/proc`.

mod exposition;
mod labels;
mod meters;
mod process;
mod sheet;
mod store;
mod table;

use std::sync::Arc;

pub use self::{
    exposition::Format,
    meters::{LogMeter, RuntimeMeter},
    process::process,
    sheet::Sheet,
    table::{FAMILIES, Family, FamilyId, FamilyKind},
};
use self::{sheet::Sources, store::SeriesStore};

/// All metrics of one replica. A copy is the same metrics.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Arc<SeriesStore>,
    sources: Sources,
    runtime: RuntimeMeter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::of(SeriesStore::new())
    }
}

impl Metrics {
    /// The metrics of a process with this log.
    pub fn new(log: &LogMeter) -> Self {
        let metrics = Self::default();
        log.show(&metrics.0.store);
        metrics
    }

    /// No metrics: nothing is counted, and the page has no series.
    pub fn off() -> Self {
        Self::of(SeriesStore::off())
    }

    fn of(store: SeriesStore) -> Self {
        let runtime = RuntimeMeter::new(&store);
        Self(Arc::new(Inner { store: Arc::new(store), sources: Sources::default(), runtime }))
    }

    /// Asks `source` at each scrape. A source is brief, and takes no lock that a call holds for long.
    pub fn ask(&self, source: impl Fn(&mut Sheet) + Send + Sync + 'static) {
        self.0.sources.add(source);
    }

    /// The meter of the runtime.
    pub fn runtime(&self) -> &RuntimeMeter {
        &self.0.runtime
    }

    /// The page for scrapers. It takes milliseconds, and waits for nothing else.
    pub fn page(&self, format: Format) -> String {
        exposition::page(format, &self.0.store, &self.0.sources)
    }
}
