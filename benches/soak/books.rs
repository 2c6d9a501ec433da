//! What happened, written down as it happens: what was published, who was handed what until when,
//! what each tried to do with it and what was answered, and which faults there were. Judges nothing.
//!
//! Workers, proxy and nats-server share one machine and one wall clock, so its times compare.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use fetch_proxy::pb;

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

/// A consumer as it was made.
#[derive(Debug, Clone)]
pub struct Terms {
    pub name: &'static str,
    pub ack_wait: Duration,
    pub backoff: Vec<Duration>,
    pub max_deliver: Option<u32>,
}

impl Terms {
    pub fn ack_wait_of(&self, attempt: u32) -> At {
        let place = (attempt.max(1) as usize).min(self.backoff.len());
        micros(if place == 0 { self.ack_wait } else { self.backoff[place - 1] })
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
    /// No answer yet, or none at all, or one without a reason: anything may have happened.
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

    /// A promise that it has not been applied.
    pub fn not_applied(&self) -> bool {
        let Self::Refused(reason) = self else { return false };
        matches!(
            reason.as_str(),
            "LEASE_EXPIRED" | "LEASE_SETTLED" | "LEASE_BUSY" | "NATS_UNAVAILABLE"
        )
    }
}

/// One call for one token.
#[derive(Debug, Clone)]
pub struct Try {
    pub kind: Kind,
    /// Only sent, not confirmed.
    pub fast: bool,
    pub sent: At,
    pub answered: Option<At>,
    pub outcome: Outcome,
    /// A Nak's delay.
    pub delay: At,
    /// When the message comes back, as the answer has it.
    pub again: Option<At>,
    /// The holding's `least` and `most` as they were before.
    pub before: (At, At),
}

/// One delivery in a worker's hands.
#[derive(Debug, Clone)]
pub struct Holding {
    pub worker: usize,
    pub attempt: u32,
    /// Grows with every delivery of the consumer, until a crash sets it back.
    pub consumer_sequence: u64,
    pub handed: At,
    /// The lease lasts at least until then, as far as its holder can tell, and at most.
    pub least: At,
    pub most: At,
    /// It can only last that long if JetStream hears progress meanwhile.
    pub needs_progress: bool,
    /// Terminated for its codec on the way: never in anybody's hands.
    pub rejected: bool,
    pub tries: Vec<Try>,
}

/// Names one holding.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub consumer: usize,
    pub sequence: u64,
    index: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blow {
    /// nats-server was killed: it may forget what it confirmed last.
    Crash,
    /// NATS could not be reached, or not as usual.
    Nats,
    /// Some workers could not reach the proxy.
    Workers,
}

#[derive(Debug, Clone)]
pub struct Fault {
    pub blow: Blow,
    pub name: String,
    pub from: At,
    /// When it began to be mended: until then nothing came from a server that was killed.
    pub mended: At,
    /// When all was well again. `None` while it lasts.
    pub to: Option<At>,
}

#[derive(Debug)]
pub struct Account {
    pub terms: Terms,
    pub messages: BTreeMap<u64, Vec<Holding>>,
    /// Fetch calls whose answer, if there was one, nobody took.
    pub walked_away: Vec<At>,
    /// Told by JetStream's advisories.
    pub given_up: BTreeSet<u64>,
    pub terminated: BTreeSet<u64>,
}

#[derive(Debug, Default)]
pub struct Ledger {
    pub accounts: Vec<Account>,
    /// What the stream holds, read at the end: when it was stored, and the message's id.
    pub stored: BTreeMap<u64, (At, u64)>,
    /// Whose PubAck came: id and place.
    pub confirmed: HashMap<u64, u64>,
    pub unconfirmed: u64,
    pub faults: Vec<Fault>,
    pub settled: u64,
    pub calls: u64,
    /// What is wrong by itself, whatever else happened.
    pub wrong: Vec<String>,
}

#[derive(Debug)]
pub struct Books(Mutex<Ledger>);

impl Books {
    pub fn open(consumers: &[Terms]) -> Self {
        let account = |terms: &Terms| Account {
            terms: terms.clone(),
            messages: BTreeMap::new(),
            walked_away: Vec::new(),
            given_up: BTreeSet::new(),
            terminated: BTreeSet::new(),
        };
        let accounts = consumers.iter().map(account).collect();
        Self(Mutex::new(Ledger { accounts, ..Ledger::default() }))
    }

    pub fn read(&self) -> MutexGuard<'_, Ledger> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn published(&self, id: u64, sequence: Option<u64>) {
        let mut ledger = self.read();
        match sequence {
            Some(sequence) => drop(ledger.confirmed.insert(id, sequence)),
            None => ledger.unconfirmed += 1,
        }
    }

    pub fn wrong(&self, what: String) {
        self.read().wrong.push(what);
    }

    pub fn walked_away(&self, consumer: usize) {
        self.read().accounts[consumer].walked_away.push(now());
    }

    /// A fault begins; the answer names it for [`Books::over`].
    pub fn begins(&self, blow: Blow, name: String) -> usize {
        let mut ledger = self.read();
        ledger.faults.push(Fault { blow, name, from: now(), mended: At::MAX, to: None });
        ledger.faults.len() - 1
    }

    pub fn mends(&self, fault: usize) {
        self.read().faults[fault].mended = now();
    }

    pub fn over(&self, fault: usize) {
        self.read().faults[fault].to = Some(now());
    }

    /// A message has come to a worker; `asked` is the lease that it asked for.
    pub fn handed(
        &self,
        consumer: usize,
        worker: usize,
        asked: Option<Duration>,
        delivery: &pb::Delivery,
    ) -> Place {
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
        let mut ledger = self.read();
        let account = &mut ledger.accounts[consumer];
        holding.needs_progress = asked.is_some() && account.terms.needs_progress(&holding);
        account.add(consumer, delivery.stream_sequence, holding)
    }

    /// The same for one that came back as rejected.
    pub fn rejected(&self, consumer: usize, worker: usize, rejected: &pb::Rejected) -> Place {
        let now = now();
        let expires = rejected.lease_expire_time;
        let expires = expires.map_or(now, |time| at(time.try_into().unwrap()));
        let mut ledger = self.read();
        let account = &mut ledger.accounts[consumer];
        let held = account.messages.get(&rejected.stream_sequence);
        let before = held.and_then(|held| held.last()).map_or(0, |last| last.consumer_sequence);
        let mut tries = Vec::new();
        if rejected.cause() == pb::RejectedCause::Codec {
            // The proxy has tried to terminate it; with a token, that was not confirmed.
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
        account.add(consumer, rejected.stream_sequence, holding)
    }

    /// A call for a token is about to be made. `length` is a Nak's delay or the lease of an Extend.
    pub fn tries(&self, place: Place, kind: Kind, fast: bool, length: Duration) -> usize {
        let (sent, delay) = (now(), micros(length));
        let mut ledger = self.read();
        let holding = ledger.holding(place);
        let before = (holding.least, holding.most);
        if kind == Kind::Extend {
            holding.least = holding.least.min(sent + delay);
            // Until it is answered, by when the answer says.
            holding.most = holding.most.max(sent + delay + micros(Duration::from_secs(10)));
        }
        let (answered, outcome, again) = (None, Outcome::Unknown, None);
        holding.tries.push(Try { kind, fast, sent, answered, outcome, delay, again, before });
        holding.tries.len() - 1
    }

    /// What was answered. `time` is when a nacked message comes back, or an extended lease ends.
    pub fn answered(
        &self,
        place: Place,
        which: usize,
        outcome: Outcome,
        time: Option<prost_types::Timestamp>,
    ) {
        let (now, time) = (now(), time.map(|time| at(time.try_into().unwrap())));
        let mut ledger = self.read();
        ledger.calls += 1;
        let waits = ledger.accounts[place.consumer].terms.clone();
        let holding = ledger.holding(place);
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
        ledger.settled += u64::from(settled);
    }

    /// Until when the holder may count on its lease.
    pub fn least(&self, place: Place) -> At {
        self.read().holding(place).least
    }
}

impl Terms {
    /// Whether the lease lasts longer than JetStream waits by itself. A message may have been with
    /// the proxy for a while, parked, when it was handed over.
    fn needs_progress(&self, holding: &Holding) -> bool {
        let wait = self.ack_wait_of(holding.attempt);
        let parked = (wait / 8).min(1_000_000);
        holding.most > holding.handed + wait - margin(wait) - parked - 50_000
    }
}

/// What the proxy takes off an ack wait.
pub fn margin(ack_wait: At) -> At {
    (ack_wait / 10).clamp(50_000, 2_000_000)
}

impl Account {
    fn add(&mut self, consumer: usize, sequence: u64, holding: Holding) -> Place {
        let holdings = self.messages.entry(sequence).or_default();
        holdings.push(holding);
        Place { consumer, sequence, index: holdings.len() - 1 }
    }
}

impl Ledger {
    fn holding(&mut self, place: Place) -> &mut Holding {
        let messages = &mut self.accounts[place.consumer].messages;
        &mut messages.get_mut(&place.sequence).unwrap()[place.index]
    }
}
