//! The delivery log of a run: every message that was published, every delivery to a worker, every
//! attempt to settle it with its answer, and every fault. The log judges nothing: each test has its
//! own view of it.
//!
//! Workers, proxy and nats-server share the wall clock of one machine, so all times compare.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::Write as _,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use fetch_proxy::pb;
use tonic::Status;

/// Microseconds of the wall clock.
pub type At = i64;

pub fn now() -> At {
    at(SystemTime::now())
}

fn at(time: SystemTime) -> At {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_micros()).unwrap()
}

pub fn micros(length: Duration) -> At {
    i64::try_from(length.as_micros()).unwrap()
}

/// The configuration of a consumer, as far as it decides when a message comes back.
#[derive(Debug, Clone, Default)]
pub struct Terms {
    pub name: &'static str,
    pub ack_wait: Duration,
    pub backoff: Vec<Duration>,
    pub max_deliver: Option<u32>,
}

impl Terms {
    pub fn ack_wait_of(&self, attempt: u32) -> At {
        let steps = (attempt.max(1) as usize).min(self.backoff.len());
        micros(if steps == 0 { self.ack_wait } else { self.backoff[steps - 1] })
    }

    pub fn longest_ack_wait(&self) -> At {
        micros(self.backoff.iter().copied().fold(self.ack_wait, Duration::max))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Ack,
    Nak,
    Term,
    Extend,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// There is no answer, or an answer without a reason. Anything may have happened.
    Unknown,
    Confirmed,
    Sent,
    Duplicate,
    Extended,
    /// An error with this reason.
    Refused(String),
}

impl Outcome {
    pub fn accepted(&self) -> bool {
        matches!(self, Self::Confirmed | Self::Sent | Self::Extended)
    }

    /// The answer of a call that settled one token.
    pub fn of(answer: Result<pb::Outcome, &Status>) -> Self {
        match answer {
            Ok(pb::Outcome::Confirmed) => Self::Confirmed,
            Ok(pb::Outcome::Sent) => Self::Sent,
            Ok(pb::Outcome::Duplicate) => Self::Duplicate,
            Ok(pb::Outcome::Extended) => Self::Extended,
            Ok(pb::Outcome::Unspecified) => Self::Refused("nothing".to_owned()),
            Err(status) => {
                // The proxy gives a reason. A status without a reason promises nothing.
                let reason = status.metadata().get("fetchproxy-reason");
                let reason = reason.and_then(|reason| reason.to_str().ok());
                reason.map_or(Self::Unknown, |reason| Self::Refused(reason.to_owned()))
            }
        }
    }

    /// The answer for one token of a Settle.
    pub fn of_result(result: &pb::SettleResult) -> Self {
        match &result.error {
            Some(error) => Self::Refused(error.reason.clone()),
            None => Self::of(Ok(result.outcome())),
        }
    }

    /// Whether the proxy refused with this reason.
    pub fn is(&self, reason: &str) -> bool {
        matches!(self, Self::Refused(refused) if refused == reason)
    }

    /// Whether the lease was over, or the delivery settled in another way.
    pub fn is_over(&self) -> bool {
        self.is("LEASE_EXPIRED") || self.is("LEASE_SETTLED")
    }

    /// Whether the answer promises that the settlement has not been applied.
    pub fn not_applied(&self) -> bool {
        let Self::Refused(reason) = self else { return false };
        matches!(
            reason.as_str(),
            "LEASE_EXPIRED" | "LEASE_SETTLED" | "LEASE_BUSY" | "NATS_UNAVAILABLE"
        )
    }
}

/// One attempt to settle one delivery.
#[derive(Debug, Clone)]
pub struct Try {
    pub kind: Kind,
    /// Whether the worker asked for `CONFIRMATION_SENT`.
    pub fast: bool,
    pub sent: At,
    pub answered: Option<At>,
    pub outcome: Outcome,
    /// The delay of a Nak.
    pub delay: At,
    /// The time at which the message comes back, by the answer to a Nak.
    pub again: Option<At>,
    /// `least` and `most` of the holding before this attempt.
    pub before: (At, At),
}

/// One delivery in a worker's hands.
#[derive(Debug, Clone)]
pub struct Holding {
    pub worker: usize,
    pub attempt: u32,
    /// The consumer's number of this delivery. A crash of the server sets it back.
    pub consumer_sequence: u64,
    pub handed: At,
    /// The earliest end of the lease, as far as its holder knows.
    pub least: At,
    /// The latest end of the lease.
    pub most: At,
    /// Whether the lease can only last that long if JetStream receives progress.
    pub needs_progress: bool,
    /// Whether the proxy terminated the message for its codec, so that no worker had it.
    pub rejected: bool,
    pub tries: Vec<Try>,
}

/// The key of one holding.
#[derive(Debug, Clone, Copy)]
pub struct HoldingId {
    pub consumer: usize,
    pub sequence: u64,
    index: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FaultKind {
    /// nats-server was killed, and may have forgotten its last confirmations.
    Crash,
    /// NATS was out of reach, or slower than usual.
    Nats,
    /// Some workers could not reach the proxy.
    Workers,
}

#[derive(Debug, Clone)]
pub struct Fault {
    pub kind: FaultKind,
    pub name: String,
    pub from: At,
    /// The beginning of the repair. A killed server sends nothing before that.
    pub mended: At,
    /// The end of the fault. `None` while it lasts.
    pub to: Option<At>,
}

/// The records of one consumer.
#[derive(Debug, Default)]
pub struct ConsumerRecords {
    pub terms: Terms,
    /// The deliveries of each message, by stream sequence.
    pub messages: BTreeMap<u64, Vec<Holding>>,
    /// The times of Fetch calls that their callers left.
    pub walked_away: Vec<At>,
    /// Messages that JetStream gave up, by its advisories.
    pub given_up: BTreeSet<u64>,
    /// Messages that were terminated, by JetStream's advisories.
    pub terminated: BTreeSet<u64>,
}

#[derive(Debug, Default)]
pub struct Records {
    pub consumers: Vec<ConsumerRecords>,
    /// The stream at the end of the run: the time and the id of each message, by sequence.
    pub stored: BTreeMap<u64, (At, u64)>,
    /// The sequence of each message whose PubAck came, by id.
    pub confirmed: HashMap<u64, u64>,
    pub unconfirmed: u64,
    pub faults: Vec<Fault>,
    pub settled: u64,
    pub calls: u64,
    /// Findings that are wrong whatever else happened.
    pub wrong: Vec<String>,
}

#[derive(Debug)]
pub struct DeliveryLog(Mutex<Records>);

impl DeliveryLog {
    pub fn open(consumers: &[Terms]) -> Self {
        let consumer =
            |terms: &Terms| ConsumerRecords { terms: terms.clone(), ..ConsumerRecords::default() };
        let consumers = consumers.iter().map(consumer).collect();
        Self(Mutex::new(Records { consumers, ..Records::default() }))
    }

    pub fn read(&self) -> MutexGuard<'_, Records> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn published(&self, id: u64, sequence: Option<u64>) {
        let mut records = self.read();
        match sequence {
            Some(sequence) => drop(records.confirmed.insert(id, sequence)),
            None => records.unconfirmed += 1,
        }
    }

    pub fn wrong(&self, what: String) {
        self.read().wrong.push(what);
    }

    pub fn walked_away(&self, consumer: usize) {
        self.read().consumers[consumer].walked_away.push(now());
    }

    /// A fault begins. The result is its key for [`DeliveryLog::mends`] and [`DeliveryLog::over`].
    pub fn begins(&self, kind: FaultKind, name: String) -> usize {
        let mut records = self.read();
        records.faults.push(Fault { kind, name, from: now(), mended: At::MAX, to: None });
        records.faults.len() - 1
    }

    pub fn mends(&self, fault: usize) {
        self.read().faults[fault].mended = now();
    }

    pub fn over(&self, fault: usize) {
        self.read().faults[fault].to = Some(now());
    }

    /// A worker has received a message. `asked` is the lease that it asked for.
    pub fn handed(
        &self,
        consumer: usize,
        worker: usize,
        asked: Option<Duration>,
        delivery: &pb::Delivery,
    ) -> HoldingId {
        let expires = at(delivery.lease_expire_time.unwrap().try_into().unwrap());
        let mut holding = Holding {
            worker,
            attempt: delivery.delivery_count,
            consumer_sequence: delivery.consumer_sequence,
            handed: now(),
            least: expires,
            most: expires,
            needs_progress: false,
            rejected: false,
            tries: Vec::new(),
        };
        let mut records = self.read();
        let of_consumer = &mut records.consumers[consumer];
        holding.needs_progress = asked.is_some() && of_consumer.terms.needs_progress(&holding);
        of_consumer.add(consumer, delivery.stream_sequence, holding)
    }

    /// A worker has received a message as rejected.
    pub fn rejected(&self, consumer: usize, worker: usize, rejected: &pb::Rejected) -> HoldingId {
        let now = now();
        let expires = rejected.lease_expire_time;
        let expires = expires.map_or(now, |time| at(time.try_into().unwrap()));
        let mut records = self.read();
        let of_consumer = &mut records.consumers[consumer];
        let held = of_consumer.messages.get(&rejected.stream_sequence);
        let before = held.and_then(|held| held.last()).map_or(0, |last| last.consumer_sequence);
        let mut tries = Vec::new();
        if rejected.cause() == pb::RejectedCause::Codec {
            // The proxy has tried to terminate the message. A token says that NATS did not confirm it.
            let done = rejected.token.is_empty();
            let outcome = if done { Outcome::Confirmed } else { Outcome::Unknown };
            let (kind, fast, delay) = (Kind::Term, false, 0);
            let (sent, answered) = (now, Some(now).filter(|_| done));
            let (again, before) = (None, (expires, expires));
            tries.push(Try { kind, fast, sent, answered, outcome, delay, again, before });
        }
        let holding = Holding {
            worker,
            attempt: rejected.delivery_count,
            consumer_sequence: before + 1,
            handed: now,
            least: expires,
            most: expires,
            needs_progress: true,
            rejected: rejected.token.is_empty(),
            tries,
        };
        of_consumer.add(consumer, rejected.stream_sequence, holding)
    }

    /// A worker begins an attempt. `length` is the delay of a Nak or the lease of an Extend. The
    /// result is the number of the attempt for [`DeliveryLog::answered`].
    pub fn tries(&self, id: HoldingId, kind: Kind, fast: bool, length: Duration) -> usize {
        let (sent, delay) = (now(), micros(length));
        let mut records = self.read();
        let holding = records.holding(id);
        let before = (holding.least, holding.most);
        if kind == Kind::Extend {
            holding.least = holding.least.min(sent + delay);
            // The answer will say the end of the lease.
            holding.most = holding.most.max(sent + delay + micros(Duration::from_secs(10)));
        }
        let (answered, outcome, again) = (None, Outcome::Unknown, None);
        holding.tries.push(Try { kind, fast, sent, answered, outcome, delay, again, before });
        holding.tries.len() - 1
    }

    /// The answer to an attempt. `time` is the return of a nacked message, or the end of an extended
    /// lease.
    pub fn answered(
        &self,
        id: HoldingId,
        which: usize,
        outcome: Outcome,
        time: Option<prost_types::Timestamp>,
    ) {
        let (now, time) = (now(), time.map(|time| at(time.try_into().unwrap())));
        let mut records = self.read();
        records.calls += 1;
        let waits = records.consumers[id.consumer].terms.clone();
        let holding = records.holding(id);
        if outcome == Outcome::Extended {
            let expires = time.unwrap();
            (holding.least, holding.most) = (expires, expires);
            holding.needs_progress |= waits.needs_progress(holding);
        }
        if holding.tries[which].kind == Kind::Extend && outcome.not_applied() {
            (holding.least, holding.most) = holding.tries[which].before;
        }
        let settled = matches!(outcome, Outcome::Confirmed | Outcome::Sent);
        let tried = &mut holding.tries[which];
        tried.again = time.filter(|_| tried.kind == Kind::Nak);
        (tried.answered, tried.outcome) = (Some(now), outcome);
        records.settled += u64::from(settled);
    }

    /// The time until which the holder may count on its lease.
    pub fn least(&self, id: HoldingId) -> At {
        self.read().holding(id).least
    }
}

impl Terms {
    /// Whether the lease lasts longer than JetStream waits by itself. The proxy may have parked the
    /// message for a while before the worker received it.
    fn needs_progress(&self, holding: &Holding) -> bool {
        let wait = self.ack_wait_of(holding.attempt);
        let parked = (wait / 8).min(1_000_000);
        holding.most > holding.handed + wait - margin(wait) - parked - 50_000
    }
}

/// The safety margin that the proxy subtracts from an ack wait.
pub fn margin(ack_wait: At) -> At {
    (ack_wait / 10).clamp(50_000, 2_000_000)
}

impl ConsumerRecords {
    fn add(&mut self, consumer: usize, sequence: u64, holding: Holding) -> HoldingId {
        let holdings = self.messages.entry(sequence).or_default();
        holdings.push(holding);
        HoldingId { consumer, sequence, index: holdings.len() - 1 }
    }
}

impl Records {
    /// The history of one message and the faults of that time, in seconds since `start`.
    pub fn history(&self, sequence: u64, held: &[Holding], start: At) -> String {
        let mut lines: Vec<(At, String)> = Vec::new();
        if let Some((published, id)) = self.stored.get(&sequence) {
            lines.push((*published, format!("published as {id}")));
        }
        for holding in held {
            let (worker, attempt) = (holding.worker, holding.attempt);
            let until = seconds(holding.least - start);
            let what = if holding.rejected { "rejected for" } else { "handed to" };
            let number = holding.consumer_sequence;
            lines.push((
                holding.handed,
                format!("{what} w{worker}, attempt {attempt}, delivery {number}, until {until}"),
            ));
            for tried in &holding.tries {
                let fast = if tried.fast { ", only sent" } else { "" };
                let after = tried.answered.map_or_else(|| "never".into(), |at| seconds(at - start));
                let again = tried.again.map_or_else(String::new, |at| {
                    format!(", comes back at {}", seconds(at - start))
                });
                lines.push((
                    tried.sent,
                    format!(
                        "w{worker} (attempt {attempt}) {:?}{fast}: {:?} at {after}{again}",
                        tried.kind, tried.outcome
                    ),
                ));
            }
        }
        let first = lines.iter().map(|(at, _)| *at).min().unwrap_or(0) - 2_000_000;
        let last = lines.iter().map(|(at, _)| *at).max().unwrap_or(0) + 2_000_000;
        for fault in &self.faults {
            let to = fault.to.unwrap_or(At::MAX);
            if fault.from < last && to > first {
                lines.push((fault.from, format!("~ {} until {}", fault.name, seconds(to - start))));
            }
        }
        lines.sort();
        lines.iter().fold(String::new(), |mut text, (at, line)| {
            let _ = writeln!(text, "    {:>9} {line}", seconds(at - start));
            text
        })
    }

    fn holding(&mut self, id: HoldingId) -> &mut Holding {
        let messages = &mut self.consumers[id.consumer].messages;
        &mut messages.get_mut(&id.sequence).unwrap()[id.index]
    }
}

/// A time or a length in seconds.
pub fn seconds(micros: At) -> String {
    format!("{:.3}", micros as f64 / 1e6)
}
