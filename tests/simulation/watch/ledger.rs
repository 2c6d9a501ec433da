//! The facts that were seen from outside, by message, delivery and call. Judges nothing. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use fetch_proxy::broker::{AckKind, ConsumerName};

use super::{
    super::jetstream::{Config, DeliveryId, Time},
    attempts::Attempt,
    calls::FetchId,
    looks::Looks,
    troubles::{Trouble, Troubles},
};

/// A message of one consumer: two consumers of one stream have one each.
pub type Message = (ConsumerName, u64);

/// The kind of a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Ack,
    Nak,
    Term,
    Extend,
}

impl Kind {
    pub fn of(kind: &AckKind) -> Self {
        match kind {
            AckKind::Ack => Self::Ack,
            AckKind::Nak(_) => Self::Nak,
            AckKind::Term(_) => Self::Term,
            AckKind::Progress => Self::Extend,
        }
    }
}

/// The meaning of the answer to a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It was applied.
    Applied,
    /// It was not applied, and never will be.
    NotApplied,
    /// Nobody knows, or no answer came.
    Unknown,
}

/// The right of one client to a message, as far as the client knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hold {
    pub from: Time,
    /// Until then the client may rely on it.
    pub until: Time,
    /// The latest end that the proxy may know: an answer may have been lost.
    pub longest: Time,
}

/// A settlement that a client asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SettleCall {
    pub kind: Kind,
    pub side: usize,
    pub began: Time,
    /// The delay of a Nak, or the length of an Extend.
    pub length: Option<Duration>,
    /// No confirmation was asked for.
    pub sent_only: bool,
    /// The client has a deadline, which may be sooner than any answer.
    pub hurried: bool,
    /// Its token was given back: it may not be applied.
    pub old_token: bool,
    pub ended: Option<(Time, Told)>,
}

impl SettleCall {
    /// It was applied, or may have been, or may still be.
    pub fn may_apply(&self) -> bool {
        self.ended.is_none_or(|(_, told)| told != Told::NotApplied)
    }
}

/// An ack that JetStream has handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effect {
    pub kind: Kind,
    pub at: Time,
    /// When it left its replica.
    pub left: Time,
    pub side: usize,
    /// It was on the wire for longer than it was meant to be.
    pub late: bool,
    /// The delivery that it had an effect on.
    pub settled: Option<DeliveryId>,
    /// Of a Nak.
    pub delay: Option<Duration>,
    /// A leader that leads no more has confirmed it, and nobody has it.
    pub unkept: bool,
}

/// One delivery.
#[derive(Debug, Clone, PartialEq)]
pub struct Delivered {
    pub message: Message,
    pub side: usize,
    pub attempt: u64,
    /// Its number among all deliveries of its consumer.
    pub number: u64,
    /// The ack wait of this attempt, when it was sent.
    pub ack_wait: Duration,
    pub sent: Time,
    pub arrived: Option<Time>,
    pub hold: Option<Hold>,
    /// Its client has asked for a length of the lease.
    pub own_end: bool,
    /// The length that its Fetch asked for.
    pub granted: Option<Duration>,
    /// It lives as long as its stream, and so much longer.
    pub kept: Option<Duration>,
    /// When its grace is over, because its stream has ended.
    pub grace_ends: Option<Time>,
    /// Each time at which it was leased anew to the same attempt: the begin and the end of the call.
    pub lent_again: Vec<(Time, Time)>,
    /// Since when its attempt is given back, and no other client has it.
    pub given_back: Option<Time>,
    /// The Fetch by which a client has it, or had it last.
    pub by: FetchId,
    pub calls: Vec<SettleCall>,
    pub effects: Vec<Effect>,
}

impl Delivered {
    /// A client has it, and may rely on it.
    pub fn is_held(&self, now: Time) -> bool {
        self.hold.is_some_and(|hold| hold.from <= now && now < hold.until)
    }

    pub fn calls_of(&self, kind: Kind) -> impl Iterator<Item = &SettleCall> {
        self.calls.iter().filter(move |call| call.kind == kind)
    }

    /// How many settlements of this kind may have been applied, as far as clients know.
    pub fn may_have_applied(&self, kind: Kind) -> usize {
        self.calls_of(kind).filter(|call| call.may_apply()).count()
    }

    /// How many acks these settlements may have become. A call at another replica becomes two if the owner
    /// applies it and does not answer: "`Ack`, `Term` go directly to JetStream".
    pub fn may_have_sent(&self, kind: Kind) -> usize {
        let acks = |call: &SettleCall| if call.side == self.side { 1 } else { 2 };
        self.calls_of(kind).filter(|call| call.may_apply()).map(acks).sum()
    }

    pub fn applied(&self, kind: Kind) -> usize {
        self.effects.iter().filter(|effect| effect.kind == kind).count()
    }
}

/// How a stored message may end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// By a settlement of a client.
    Plain,
    /// The proxy itself may terminate it: it breaks connections, or fails a codec.
    Terminated,
}

/// A message in its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    pub at: Time,
    pub fate: Fate,
    pub removed: Option<Time>,
}

/// Which call of a settlement: the delivery, and the place among its calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallId(pub DeliveryId, pub usize);

/// The begin of a denial, and its end, if it has one.
pub type DenialSpan = (Time, Option<Time>);

/// Everything that was seen.
#[derive(Debug, Default)]
pub struct Ledger {
    pub deliveries: BTreeMap<DeliveryId, Delivered>,
    /// The deliveries of each message, in the order in which they were sent.
    pub of: BTreeMap<Message, Vec<DeliveryId>>,
    pub stored: BTreeMap<(Arc<str>, u64), Stored>,
    /// Streams whose messages leave at this age.
    pub ages: BTreeMap<Arc<str>, Duration>,
    pub configs: BTreeMap<ConsumerName, Vec<(Time, Config)>>,
    /// How much later than the clock of JetStream starts, a delivery of a consumer with copies leaves.
    pub lags: BTreeMap<ConsumerName, Duration>,
    pub troubles: Troubles,
    /// The Fetch calls that have a name, by that name.
    pub attempts: BTreeMap<String, Attempt>,
    /// The most leases of each process.
    pub places: BTreeMap<usize, usize>,
    /// When each replica last saw a sign of who leads, or that another server may.
    pub learned: BTreeMap<usize, Time>,
    /// When each replica last had all its connections again.
    pub linked: BTreeMap<usize, Time>,
    /// The questions of the replicas about their consumers.
    pub looks: Looks,
    /// Since when a replica knows that it may not ack the messages of a consumer.
    pub refused: BTreeMap<(usize, ConsumerName), Time>,
    /// The times in which a replica obeys a policy without rights at a consumer. The last one may have no end yet.
    pub denied: BTreeMap<(usize, ConsumerName), Vec<DenialSpan>>,
    /// Processes that have ended and had leases that they did not hand over.
    pub ended: BTreeSet<usize>,
    /// Processes that have ended and have handed nothing over.
    pub alone: BTreeSet<usize>,
    /// By how many milliseconds the clock of each process was ahead, each time that it was set.
    pub clocks: BTreeMap<usize, Vec<i64>>,
    /// The longest way between a replica and NATS in good weather, to and fro.
    pub round_trip: Duration,
}

impl Ledger {
    /// From now on, no replica has to know of earlier refusals at a consumer. `None`: at all consumers.
    pub fn forget_refusals(&mut self, consumer: Option<&ConsumerName>) {
        self.refused.retain(|(_, name), _| consumer.is_some_and(|deleted| deleted != name));
    }

    pub fn config(&self, name: &ConsumerName) -> Option<&Config> {
        self.configs.get(name).and_then(|all| all.last()).map(|(_, config)| config)
    }

    /// The longest ack wait of any attempt, by every configuration since `since`.
    pub fn longest_wait(&self, name: &ConsumerName, since: Time) -> Duration {
        let all = self.configs.get(name).map(Vec::as_slice).unwrap_or_default();
        let first = all.iter().rposition(|(at, _)| *at <= since).unwrap_or(0);
        let of =
            |config: &Config| config.backoff.iter().copied().fold(config.ack_wait, Duration::max);
        all[first..].iter().map(|(_, config)| of(config)).max().unwrap_or_default()
    }

    /// From now on, messages of this age leave the stream. Those of the age before have left.
    pub fn ages(&mut self, stream: &str, age: Duration, now: Time) {
        let before = self.ages.insert(stream.into(), age);
        let stored = self.stored.iter_mut().filter(|((of, _), _)| **of == *stream);
        for (_, stored) in stored {
            if before.is_some_and(|before| stored.at + before <= now) {
                stored.removed.get_or_insert(now);
            }
        }
    }

    /// Whether a message has left its stream.
    pub fn is_removed(&self, (stream, sequence): (&Arc<str>, u64), now: Time) -> bool {
        let stored = self.stored.get(&(stream.clone(), sequence));
        let age = self.ages.get(stream);
        stored.is_some_and(|stored| {
            stored.removed.is_some() || age.is_some_and(|age| stored.at + *age <= now)
        })
    }

    /// Whether it was, or has become, the last attempt.
    pub fn is_last_attempt(&self, one: &Delivered) -> bool {
        let all = self.configs.get(&one.message.0).map(Vec::as_slice).unwrap_or_default();
        let first = all.iter().rposition(|(at, _)| *at <= one.sent).unwrap_or(0);
        let over = |config: &Config| config.max_deliver.is_some_and(|most| one.attempt >= most);
        all[first..].iter().any(|(_, config)| over(config))
    }

    /// The deliveries of a message before the newest, or before this one.
    pub fn earlier(&self, id: DeliveryId) -> impl Iterator<Item = (DeliveryId, &Delivered)> {
        let of = self.deliveries.get(&id).and_then(|one| self.of.get(&one.message));
        let of = of.map(Vec::as_slice).unwrap_or_default();
        let before = of.iter().take_while(move |other| **other != id);
        before.filter_map(|other| Some((*other, self.deliveries.get(other)?)))
    }

    /// A process begins to drain: "Deadlines are sent as remaining time, less the longest time that a part was
    /// on its way." On good wires this is the way to another replica, to and fro.
    pub fn shorten_leases(&mut self, side: usize, now: Time) {
        let (less, troubles) = (2 * self.round_trip, &self.troubles);
        for one in self.deliveries.values_mut() {
            let before = Trouble::Draining { side: one.side };
            let owns = one.side == side || troubles.happened(before, &one.message.0, one.sent, now);
            if let Some(hold) = one.hold.as_mut().filter(|hold| owns && now < hold.until) {
                hold.until = hold.until.saturating_sub(less);
            }
        }
    }

    pub fn newest(&self, message: &Message) -> Option<&Delivered> {
        self.deliveries.get(self.of.get(message)?.last()?)
    }
}

/// The ack wait of one attempt: "If the consumer has a backoff, the ack wait is that of this attempt."
pub fn wait_of(config: &Config, attempt: u64) -> Duration {
    let place = usize::try_from(attempt.saturating_sub(1)).unwrap_or(usize::MAX);
    let step = config.backoff.get(place).or(config.backoff.last());
    step.copied().unwrap_or(config.ack_wait)
}
