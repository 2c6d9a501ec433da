//! The series of single consumers, bounded in number. Owns who has a place.
//!
//! ```text
//!  a consumer that JetStream knows ─▶ a place is free ──▶ series of its own ── 10 min unused ──▶ they end
//!                                  └▶ none is free ────▶ the series `_other`, for as long as it is used
//! ```

use std::{
    borrow::Cow,
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    labels::{
        FetchResult, Label as _, LeaseEnd, PullResult, RejectionCause, ReleaseCause,
        SettlementKind, SettlementResult,
    },
    sheet::Sheet,
    store::{Amount, Count, Counts, SeriesStore},
    table::FamilyId,
};

/// The name of all consumers without a place.
const OTHER: &str = "_other";
/// A place that nobody has used for this long comes back.
const UNUSED: Duration = Duration::from_secs(600);

/// The consumers that have series.
#[derive(Debug)]
pub(super) struct Consumers {
    store: Arc<SeriesStore>,
    most: usize,
    places: Mutex<Places>,
    other: ConsumerMeter,
}

/// By the stream and the consumer.
type Places = BTreeMap<(Arc<str>, Arc<str>), Placed>;

#[derive(Debug)]
struct Placed {
    meter: ConsumerMeter,
    /// When nobody had the meter, as first seen. `None`: somebody has it.
    unused_since: Option<Instant>,
}

/// Counts what happens to one consumer, or to all consumers without a place. A copy is the same meter.
#[derive(Debug, Clone)]
pub struct ConsumerMeter(Arc<ConsumerCounts>);

#[derive(Debug)]
struct ConsumerCounts {
    /// The labels of its series.
    name: [Box<str>; 2],
    fetches: Counts<FetchResult>,
    messages: Count,
    bytes: Count,
    redelivered: Count,
    rejected: Counts<RejectionCause>,
    unwritten: Count,
    pulls: Counts<PullResult>,
    granted: Count,
    adopted: Count,
    ended: Counts<LeaseEnd>,
    releases: Counts<ReleaseCause>,
    unreadable: Count,
    settlements: Vec<Counts<SettlementResult>>,
    waiters: Amount,
    wanted: Amount,
    pulled: Amount,
    parked: Amount,
    /// `None` for the consumers without a place: their numbers have no common meaning.
    info: Option<Mutex<Option<SeenInfo>>>,
}

/// What JetStream has said of a consumer.
#[derive(Debug, Clone, Copy)]
struct SeenInfo {
    pending: u64,
    ack_pending: u64,
    at: Instant,
}

/// The present state of the pump of one consumer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PumpState {
    /// Calls that wait.
    pub waiters: usize,
    /// Messages that they want.
    pub wanted: usize,
    /// Messages that the open pull may still bring.
    pub pulled: usize,
    /// Messages that wait for a call.
    pub parked: usize,
}

/// What one task shows of its pump, until this is dropped.
#[derive(Debug)]
pub struct ShownPump {
    meter: ConsumerMeter,
    shown: PumpState,
}

/// Two meters are equal: a meter is no property of a consumer.
impl PartialEq for ConsumerMeter {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for ConsumerMeter {}

impl Consumers {
    pub(super) fn new(store: &Arc<SeriesStore>, most: usize) -> Self {
        let other = ConsumerMeter::new(store, OTHER, OTHER);
        Self { store: store.clone(), most, places: Mutex::default(), other }
    }

    /// The meter of a consumer that JetStream knows.
    pub(super) fn of(&self, stream: &str, consumer: &str, now: Instant) -> ConsumerMeter {
        let mut places = self.places();
        let name = (Arc::from(stream), Arc::from(consumer));
        if let Some(placed) = places.get_mut(&name) {
            placed.unused_since = None;
            return placed.meter.clone();
        }
        if places.len() >= self.most {
            self.tidy(&mut places, now);
        }
        if places.len() >= self.most || (stream, consumer) == (OTHER, OTHER) {
            return self.other.clone();
        }
        let meter = ConsumerMeter::new(&self.store, stream, consumer);
        places.insert(name, Placed { meter: meter.clone(), unused_since: None });
        meter
    }

    /// The meter of consumers without a place.
    pub(super) fn other(&self) -> &ConsumerMeter {
        &self.other
    }

    /// Ends the series of consumers that nobody has used for long, and shows what JetStream said.
    pub(super) fn show(&self, sheet: &mut Sheet, now: Instant) {
        let mut places = self.places();
        self.tidy(&mut places, now);
        // Leases are counted where they are held. A consumer without leases has 0, which an alert looks for.
        sheet.add_of(FamilyId::Leases, [OTHER, OTHER], 0.0);
        for ((stream, consumer), placed) in &*places {
            sheet.add_of(FamilyId::Leases, [&**stream, &**consumer], 0.0);
            let seen = placed.meter.0.info.as_ref().and_then(|info| *unpoisoned(info));
            if let Some(SeenInfo { pending, ack_pending, at }) = seen {
                let name = [&**stream, &**consumer];
                sheet.set_of(FamilyId::ConsumerPending, name, pending as f64);
                sheet.set_of(FamilyId::ConsumerAckPending, name, ack_pending as f64);
                let age = now.saturating_duration_since(at).as_secs_f64();
                sheet.set_of(FamilyId::ConsumerInfoAge, name, age);
            }
        }
    }

    fn tidy(&self, places: &mut Places, now: Instant) {
        places.retain(|(stream, consumer), placed| {
            if Arc::strong_count(&placed.meter.0) > 1 {
                placed.unused_since = None;
                return true;
            }
            let since = *placed.unused_since.get_or_insert(now);
            let kept = now.saturating_duration_since(since) < UNUSED;
            if !kept {
                self.store.end(&labels(stream, consumer));
            }
            kept
        });
    }

    fn places(&self) -> MutexGuard<'_, Places> {
        unpoisoned(&self.places)
    }
}

/// What is behind these locks is whole after every step.
fn unpoisoned<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether an action can have this result.
fn can_happen(kind: SettlementKind, result: SettlementResult) -> bool {
    match result {
        SettlementResult::Extended => kind == SettlementKind::Extend,
        SettlementResult::Confirmed
        | SettlementResult::Sent
        | SettlementResult::Duplicate
        | SettlementResult::Unconfirmed => kind != SettlementKind::Extend,
        SettlementResult::Expired
        | SettlementResult::Settled
        | SettlementResult::Busy
        | SettlementResult::Denied
        | SettlementResult::Unsent
        | SettlementResult::NotAllowed => true,
    }
}

fn labels(stream: &str, consumer: &str) -> [Cow<'static, str>; 2] {
    [stream, consumer].map(|name| Cow::Owned(name.to_owned()))
}

impl ConsumerMeter {
    fn new(store: &SeriesStore, stream: &str, consumer: &str) -> Self {
        let name = labels(stream, consumer);
        let count = |id| store.count(id, name.to_vec());
        let level = |id| store.level(id, name.to_vec());
        let settlements = |of: &SettlementKind| {
            let kind = [&name[..], &[of.value().into()]].concat();
            Counts::only(store, FamilyId::Settlements, &kind, |result| can_happen(*of, result))
        };
        Self(Arc::new(ConsumerCounts {
            name: [stream.into(), consumer.into()],
            fetches: Counts::new(store, FamilyId::Fetches, &name),
            messages: count(FamilyId::MessagesFetched),
            bytes: count(FamilyId::MessageBytes),
            redelivered: count(FamilyId::MessagesRedelivered),
            rejected: Counts::new(store, FamilyId::MessagesRejected, &name),
            unwritten: count(FamilyId::MessagesUnwritten),
            pulls: Counts::new(store, FamilyId::Pulls, &name),
            granted: count(FamilyId::LeasesGranted),
            adopted: count(FamilyId::LeasesAdopted),
            ended: Counts::new(store, FamilyId::LeasesEnded, &name),
            releases: Counts::new(store, FamilyId::Releases, &name),
            unreadable: count(FamilyId::UnreadableTerminated),
            settlements: SettlementKind::ALL.iter().map(settlements).collect(),
            waiters: level(FamilyId::Waiters),
            wanted: level(FamilyId::PumpWanted),
            pulled: level(FamilyId::PumpPulled),
            parked: level(FamilyId::Parked),
            info: ((stream, consumer) != (OTHER, OTHER)).then(Mutex::default),
        }))
    }

    /// The stream and the consumer, as its series name them.
    pub fn name(&self) -> [&str; 2] {
        self.0.name.each_ref().map(|name| &**name)
    }

    /// A Fetch has ended.
    pub fn fetched(&self, result: FetchResult) {
        self.0.fetches.of(result).add(1);
    }

    /// Messages were written to their caller: so many, with so many bytes, some of them not for the first time.
    pub fn written(&self, messages: usize, bytes: usize, redelivered: usize) {
        self.0.messages.add(messages as u64);
        self.0.bytes.add(bytes as u64);
        self.0.redelivered.add(redelivered as u64);
    }

    /// Messages were not written to their caller.
    pub fn unwritten(&self, messages: usize) {
        self.0.unwritten.add(messages as u64);
    }

    /// A message could not be given as asked.
    pub fn rejected(&self, cause: RejectionCause) {
        self.0.rejected.of(cause).add(1);
    }

    /// A pull has ended.
    pub fn pulled(&self, end: PullResult) {
        self.0.pulls.of(end).add(1);
    }

    /// A message that arrived was leased.
    pub fn granted(&self) {
        self.0.granted.add(1);
    }

    /// A lease came from another replica.
    pub fn adopted(&self) {
        self.0.adopted.add(1);
    }

    /// The proxy gave a message back.
    pub fn released(&self, cause: ReleaseCause) {
        self.0.releases.of(cause).add(1);
    }

    /// A message that nobody can read was terminated.
    pub fn unreadable(&self) {
        self.0.unreadable.add(1);
    }

    /// A token has its result.
    pub fn settled(&self, kind: SettlementKind, result: SettlementResult) {
        self.0.settlements[kind.number()].of(result).add(1);
    }

    /// JetStream has told the state of the consumer.
    pub fn seen(&self, pending: u64, ack_pending: u64, at: Instant) {
        if let Some(info) = &self.0.info {
            *unpoisoned(info) = Some(SeenInfo { pending, ack_pending, at });
        }
    }

    /// Shows the pump of one task from now on.
    pub fn pump(&self) -> ShownPump {
        ShownPump { meter: self.clone(), shown: PumpState::default() }
    }

    /// A lease has ended.
    pub(super) fn ended(&self, how: LeaseEnd) {
        self.0.ended.of(how).add(1);
    }
}

impl ShownPump {
    /// The pump has this state now.
    pub fn show(&mut self, now: PumpState) {
        let before = std::mem::replace(&mut self.shown, now);
        if before != now {
            let ConsumerCounts { waiters, wanted, pulled, parked, .. } = &*self.meter.0;
            waiters.moves(before.waiters, now.waiters);
            wanted.moves(before.wanted, now.wanted);
            pulled.moves(before.pulled, now.pulled);
            parked.moves(before.parked, now.parked);
        }
    }
}

impl Drop for ShownPump {
    fn drop(&mut self) {
        self.show(PumpState::default());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock,
        metrics::{Format, Metrics, table::FAMILIES},
    };

    fn metrics(most: usize) -> Metrics {
        Metrics::new(&crate::metrics::LogMeter::default(), most)
    }

    fn series(page: &str) -> usize {
        page.lines().filter(|line| !line.starts_with('#')).count()
    }

    /// The series of one consumer, and the value of its grants.
    fn granted(page: &str, consumer: &str) -> Option<String> {
        let name =
            format!("fetchproxy_leases_granted_total{{stream=\"S\",consumer=\"{consumer}\"}} ");
        page.lines().find_map(|line| Some(line.strip_prefix(&*name)?.to_owned()))
    }

    #[test]
    fn ten_thousand_names_keep_the_number_of_series() {
        let (metrics, now) = (metrics(200), clock::now());
        let page = || metrics.page(Format::Text, now);
        let meters: Vec<_> = (0..200).map(|n| metrics.consumer("S", &n.to_string(), now)).collect();
        let before = series(&page());
        for number in 0..10_000 {
            metrics.consumer("S", &number.to_string(), now).granted();
        }
        assert_eq!(series(&page()), before);
        assert_eq!(granted(&page(), "7").as_deref(), Some("1"));
        let other = "fetchproxy_leases_granted_total{stream=\"_other\",consumer=\"_other\"} 9800\n";
        assert!(page().contains(other));
        let of_one = before / 201;
        assert!((70..100).contains(&of_one), "{of_one} series of one consumer");
        drop(meters);
    }

    #[test]
    fn place_that_nobody_uses_comes_back_after_ten_minutes() {
        let (metrics, start) = (metrics(1), clock::now());
        let page = |at| metrics.page(Format::Text, at);
        let first = metrics.consumer("S", "first", start);
        first.granted();
        let empty = series(&metrics.page(Format::Text, start));
        // A task or a lease has the meter.
        assert!(granted(&page(start + 10 * UNUSED), "first").is_some());
        assert_eq!(metrics.consumer("S", "second", start).name(), [OTHER, OTHER]);
        drop(first);
        let unused = start + 10 * UNUSED;
        assert!(granted(&page(unused), "first").is_some());
        assert!(granted(&page(unused + UNUSED - Duration::from_secs(1)), "first").is_some());
        // It is used again.
        drop(metrics.consumer("S", "first", unused));
        assert!(granted(&page(unused + UNUSED), "first").is_some());
        assert!(granted(&page(unused + 2 * UNUSED), "first").is_none());
        let second = metrics.consumer("S", "second", unused + 2 * UNUSED);
        assert_eq!(second.name(), ["S", "second"]);
        assert_eq!(series(&page(unused + 2 * UNUSED)), empty);
        assert_eq!(granted(&page(unused + 2 * UNUSED), "second").as_deref(), Some("0"));
    }

    #[test]
    fn odd_names_are_escaped_and_no_line_is_broken() {
        let (metrics, now) = (metrics(10), clock::now());
        let name = "a\"b\\c\nd é 日 \u{1f980} ,}{";
        let meter = metrics.consumer("S", name, now);
        meter.granted();
        for format in [Format::Text, Format::OpenMetrics] {
            let page = metrics.page(format, now);
            let shown = r#"consumer="a\"b\\c\nd é 日 🦀 ,}{"} 1"#;
            assert!(page.contains(&format!("{{stream=\"S\",{shown}\n")), "{format:?}");
            assert!(page.lines().all(|line| line.starts_with('#')
                || line.rsplit_once(' ').is_some_and(|(_, value)| value.parse::<f64>().is_ok())));
        }
    }

    #[test]
    fn each_family_of_a_consumer_names_it_first() {
        for family in FAMILIES.iter().filter(|family| family.labels.contains(&"consumer")) {
            assert_eq!(family.labels[..2], ["stream", "consumer"], "{}", family.name);
        }
    }
}
