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

mod connections;
mod consumers;
mod exposition;
mod labels;
mod leasing;
mod meters;
mod nats;
mod principals;
mod process;
mod routing;
mod rpcs;
mod sheet;
mod store;
mod table;

use std::{sync::Arc, time::Instant};

pub use self::{
    connections::{ConnectionEnd, ConnectionMeter, MeteredConnection},
    consumers::{ConsumerMeter, PumpState, ShownPump},
    exposition::Format,
    labels::{
        ConnectionClose, ConnectionRefusal, FetchResult, ForwardFailure, LeaseEnd, NatsRight,
        NatsRole, ProgressResult, PullResult, RejectionCause, ReleaseCause, SettlementKind,
        SettlementResult, SettlementRoute,
    },
    leasing::LeaseMeter,
    meters::{FileMeter, LogMeter, RuntimeMeter},
    nats::NatsMeter,
    principals::PrincipalMeter,
    process::process,
    routing::RouteMeter,
    rpcs::{RpcMeter, RpcMeters, RpcMethod},
    sheet::Sheet,
    table::{FAMILIES, Family, FamilyId, FamilyKind},
};
use self::{consumers::Consumers, sheet::Sources, store::SeriesStore};

/// Consumers with series of their own, if no flag says otherwise.
pub const DEFAULT_MAX_CONSUMERS: usize = 200;

/// All metrics of one replica. A copy is the same metrics.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Arc<SeriesStore>,
    sources: Sources,
    consumers: Consumers,
    leases: LeaseMeter,
    nats: NatsMeter,
    principals: PrincipalMeter,
    routes: RouteMeter,
    runtime: RuntimeMeter,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::of(SeriesStore::new(), DEFAULT_MAX_CONSUMERS)
    }
}

impl Metrics {
    /// The metrics of a process with this log. At most `max_consumers` consumers have series of their own.
    pub fn new(log: &LogMeter, max_consumers: usize) -> Self {
        let metrics = Self::of(SeriesStore::new(), max_consumers);
        log.show(&metrics.0.store);
        metrics
    }

    /// No metrics: nothing is counted, and the page has no series.
    pub fn off() -> Self {
        Self::of(SeriesStore::off(), 0)
    }

    fn of(store: SeriesStore, max_consumers: usize) -> Self {
        let store = Arc::new(store);
        Self(Arc::new(Inner {
            sources: Sources::default(),
            consumers: Consumers::new(&store, max_consumers),
            leases: LeaseMeter::new(&store),
            nats: NatsMeter::new(&store),
            principals: PrincipalMeter::new(&store),
            routes: RouteMeter::new(&store),
            runtime: RuntimeMeter::new(&store),
            store,
        }))
    }

    /// Asks `source` at each scrape. A source is brief, and takes no lock that a call holds for long.
    pub fn ask(&self, source: impl Fn(&mut Sheet) + Send + Sync + 'static) {
        self.0.sources.add(source);
    }

    /// The meter of the runtime.
    pub fn runtime(&self) -> &RuntimeMeter {
        &self.0.runtime
    }

    /// The meter of the connections to NATS.
    pub fn nats(&self) -> &NatsMeter {
        &self.0.nats
    }

    /// The meter of principals.
    pub fn principals(&self) -> &PrincipalMeter {
        &self.0.principals
    }

    /// The meter of tokens on their way.
    pub fn routes(&self) -> &RouteMeter {
        &self.0.routes
    }

    /// The meter of a file that is read again when it changes.
    pub fn file(&self, name: &'static str) -> FileMeter {
        FileMeter::new(&self.0.store, name)
    }

    /// The meters of the methods that are served.
    pub fn rpcs(&self, methods: &[RpcMethod<'_>]) -> RpcMeters {
        RpcMeters::new(&self.0.store, methods)
    }

    /// A token of a call of this method was refused for this reason of the contract.
    pub fn refused(&self, reason: &str, method: &str) {
        rpcs::count_refusal(&self.0.store, reason, method);
    }

    /// The meter of the connections of a listener, of which at most `most` are open.
    pub fn connections(&self, listener: &'static str, most: usize) -> ConnectionMeter {
        ConnectionMeter::new(&self.0.store, listener, most)
    }

    /// The meter of all leases.
    pub fn leases(&self) -> &LeaseMeter {
        &self.0.leases
    }

    /// The meter of a consumer. Only for names that JetStream has confirmed: each one may take a place.
    pub fn consumer(&self, stream: &str, consumer: &str, now: Instant) -> ConsumerMeter {
        self.0.consumers.of(stream, consumer, now)
    }

    /// The meter of all consumers without series of their own.
    pub fn other_consumers(&self) -> &ConsumerMeter {
        self.0.consumers.other()
    }

    /// The page for scrapers. It takes milliseconds, and waits for nothing else.
    pub fn page(&self, format: Format, now: Instant) -> String {
        // Leases that have ended are read first, those that are held next, and those that began last. So a lease that
        // moves meanwhile is missing among the last, and never among those that began.
        let ended = self.0.store.counted(FamilyId::LeasesEnded);
        let mut sheet = self.0.sources.ask();
        sheet.show_all(FamilyId::LeasesEnded, ended);
        self.0.consumers.show(&mut sheet, now);
        exposition::page(format, &self.0.store, sheet)
    }
}
