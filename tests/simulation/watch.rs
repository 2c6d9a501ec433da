//! The view from outside: every delivery, every settlement and its effect, every answer to a
//! client. Owns the promises that a run is checked against. It knows nothing of what is inside a replica.
//!
//! 1. Nothing is settled that no client asked for, but poison.
//! 2. No settlement reaches the delivery of another holder, except in a window that the documentation
//!    admits. Each window is recognised by its own rule, and counted.
//! 3. A reason that promises "not applied" means it; CONFIRMED and DUPLICATE mean that it was applied.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use fetch_proxy::broker::{AckKind, ConsumerName};

use super::{
    jetstream::{self, Applied, DeliveryId, Sent, Time},
    net::{Watcher, Way},
};

/// Which kind of settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Ack,
    Nak,
    Term,
    Extend,
}

impl Kind {
    fn of(kind: &AckKind) -> Self {
        match kind {
            AckKind::Ack => Self::Ack,
            AckKind::Nak(_) => Self::Nak,
            AckKind::Term(_) => Self::Term,
            AckKind::Progress => Self::Extend,
        }
    }

    fn is_final(self) -> bool {
        matches!(self, Self::Ack | Self::Term)
    }
}

/// The answer that a client had for a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// It was applied.
    Applied,
    /// It was not, and never will be.
    NotApplied,
    /// Nobody knows, or no answer came.
    Unknown,
}

/// One client's hold on a message, as far as the client knows.
#[derive(Debug, Clone, Copy)]
struct Hold {
    from: Time,
    until: Time,
}

#[derive(Debug, Clone)]
struct Delivered {
    /// The consumer, and the sequence in its stream: two consumers may have one message each.
    message: (ConsumerName, u64),
    side: usize,
    at: Time,
    /// When the replica had it.
    arrived: Option<Time>,
    held: Option<Hold>,
    /// Calls of clients, by kind: open, and told "unknown", and told "applied".
    calls: BTreeMap<Kind, Calls>,
    applied: Vec<(Kind, Time)>,
    /// A client did not ask for a confirmation.
    sent: bool,
}

#[derive(Debug, Clone, Copy, Default)]
struct Calls {
    open: u32,
    unknown: u32,
    applied: u32,
}

/// A window in which two can settle one message, as the documentation admits it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Excuse {
    /// A NATS server started anew, or another leads: until the replica's next look, "every second".
    LeaderChanged,
    /// The ack wait was lowered: until the next look, "at most 30 s, or a third of the old ack wait, later".
    WaitLowered,
    /// The consumer was made again, or reset, while the replica was stopped: "When it continues, it can
    /// still settle a message of the new consumer with an old token".
    MadeAgainWhileStopped,
    /// The settlement was under way for longer than it was meant to be: "a settlement from before the stall
    /// can arrive late".
    LateOnTheWire,
    /// The delivery was under way for longer than a tenth of its ack wait: "the lease outlives the timer of
    /// JetStream by the difference".
    SlowDelivery,
    /// A worker said two things of one token, and the owner has died: "One misuse is not caught".
    Misuse,
}

impl Excuse {
    const ALL: [Self; 6] = [
        Self::LateOnTheWire,
        Self::SlowDelivery,
        Self::LeaderChanged,
        Self::WaitLowered,
        Self::MadeAgainWhileStopped,
        Self::Misuse,
    ];
}

/// An event, which counts for some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    LeaderChanged,
    WaitLowered,
    MadeAgain,
    Stopped { side: usize },
    Killed { side: usize },
}

/// A look every second, and its answer.
const UNTIL_NEXT_LOOK: Duration = Duration::from_secs(4);
const UNTIL_WAIT_IS_READ: Duration = Duration::from_secs(31);
/// The ack wait is a second at least, and a tenth of it is the margin of a lease.
const SLOW_DELIVERY: Duration = Duration::from_millis(100);

#[derive(Debug, Default)]
pub struct Watch {
    deliveries: BTreeMap<DeliveryId, Delivered>,
    /// Messages that the proxy terminates by itself, by stream and sequence: they break connections, or a
    /// client asked for JSON and they are none.
    poison: BTreeSet<(Arc<str>, u64)>,
    events: BTreeMap<Event, Time>,
    /// When each replica was last told who leads, or that somebody else may.
    learned: BTreeMap<usize, Time>,
    pub counts: BTreeMap<String, u64>,
    pub failures: Vec<String>,
}

impl Watch {
    pub fn count(&mut self, what: impl Into<String>) {
        *self.counts.entry(what.into()).or_default() += 1;
    }

    fn fail(&mut self, now: Time, why: String) {
        self.failures.push(format!("{:.3} s: {why}", now.as_secs_f64()));
    }

    /// Something happens, until then.
    pub fn event(&mut self, event: Event, until: Time) {
        let last = self.events.entry(event).or_default();
        *last = (*last).max(until);
    }

    /// Whether it happens now, or did lately.
    fn lately(&self, event: Event, within: Duration, now: Time) -> bool {
        self.events.get(&event).is_some_and(|until| now <= *until + within)
    }

    pub fn poisoned(&mut self, stream: &str, sequence: u64) {
        self.poison.insert((stream.into(), sequence));
    }

    /// A client has a message, and knows how long it may keep it.
    pub fn received(&mut self, id: DeliveryId, now: Time, lease: Duration) {
        self.count("message received");
        let message = self.deliveries.get(&id).map(|delivered| delivered.message.clone());
        let holds = |one: &Delivered| {
            Some(&one.message) == message.as_ref() && one.held.is_some_and(|hold| now < hold.until)
        };
        if self.deliveries.values().any(holds) {
            self.count("message received while another client may have it");
        }
        if let Some(delivered) = self.deliveries.get_mut(&id) {
            delivered.held = Some(Hold { from: now, until: now + lease });
        } else {
            self.fail(now, format!("a client has a message that was never delivered: {id:?}"));
        }
    }

    pub fn extended(&mut self, id: DeliveryId, now: Time, lease: Duration) {
        if let Some(hold) = self.deliveries.get_mut(&id).and_then(|one| one.held.as_mut()) {
            hold.until = now + lease;
        }
    }

    /// A client does not care any more.
    pub fn let_go(&mut self, id: DeliveryId, now: Time) {
        if let Some(hold) = self.deliveries.get_mut(&id).and_then(|one| one.held.as_mut()) {
            hold.until = hold.until.min(now);
        }
    }

    /// A client settles. `sent`: without a confirmation.
    pub fn called(&mut self, id: DeliveryId, kind: Kind, sent: bool) {
        if let Some(delivered) = self.deliveries.get_mut(&id) {
            delivered.sent |= sent;
            delivered.calls.entry(kind).or_default().open += 1;
        }
    }

    pub fn answered(&mut self, id: DeliveryId, kind: Kind, told: Told, reason: &str, now: Time) {
        self.count(format!("{kind:?} {reason}"));
        let Some(delivered) = self.deliveries.get_mut(&id) else { return };
        let calls = delivered.calls.entry(kind).or_default();
        calls.open -= 1;
        match told {
            Told::Applied => calls.applied += 1,
            Told::Unknown => calls.unknown += 1,
            Told::NotApplied => {}
        }
        let (calls, applied) = (*calls, delivered.applied.iter().any(|(one, _)| *one == kind));
        if kind == Kind::Extend {
            return;
        }
        let delivered = delivered.clone();
        // "`SENT` only promises that the settlement was given to the connection": so does its repeat.
        if told == Told::Applied && !applied && delivered.sent && reason == "OUTCOME_DUPLICATE" {
            self.count(format!("{kind:?} DUPLICATE of one that was only sent"));
        } else if told == Told::Applied && !applied {
            self.fail(now, format!("{kind:?} {reason}, and never applied: {id:?} {delivered:?}"));
        }
        let promised = calls.open == 0 && calls.unknown == 0 && calls.applied == 0;
        // A replica gives back by itself what no client has settled.
        if promised && applied && kind != Kind::Nak {
            self.fail(now, format!("{kind:?} {reason}, and applied: {id:?} {delivered:?}"));
        }
    }

    fn admits(&self, excuse: Excuse, stale: &Stale<'_>, now: Time) -> bool {
        let of = self.deliveries.get(&stale.applied.of);
        match excuse {
            Excuse::LateOnTheWire => stale.way.late,
            Excuse::SlowDelivery => of
                .is_some_and(|of| of.arrived.is_none_or(|arrived| arrived - of.at > SLOW_DELIVERY)),
            // A replica that has seen a sign settles nothing until it knows who leads.
            Excuse::LeaderChanged => {
                let changed = self.events.get(&Event::LeaderChanged).copied().unwrap_or_default();
                let knew = |at: &Time| *at >= changed && *at < stale.way.left;
                self.lately(Event::LeaderChanged, UNTIL_NEXT_LOOK, now)
                    && !self.learned.get(&stale.side).is_some_and(knew)
            }
            Excuse::WaitLowered => self.lately(Event::WaitLowered, UNTIL_WAIT_IS_READ, now),
            Excuse::MadeAgainWhileStopped => {
                let stopped = Event::Stopped { side: stale.side };
                self.lately(Event::MadeAgain, UNTIL_WAIT_IS_READ, now)
                    && self.lately(stopped, UNTIL_NEXT_LOOK, now)
            }
            Excuse::Misuse => of.is_some_and(|of| {
                let killed = Event::Killed { side: of.side };
                of.calls.len() > 1 && self.events.contains_key(&killed)
            }),
        }
    }

    /// Whether somebody else holds the message of this delivery.
    fn stolen(&mut self, stale: &Stale<'_>, now: Time) {
        let Stale { applied, kind, .. } = *stale;
        let Some(settled) = applied.settled.filter(|settled| *settled != applied.of) else {
            return;
        };
        let Some(victim) = self.deliveries.get(&settled).cloned() else { return };
        // Progress that comes late does no more than to make the next ack wait longer.
        let held = victim.held.is_some_and(|hold| hold.from <= now && now < hold.until);
        if !held || kind == Kind::Extend {
            return self.count(format!("stale {kind:?} that hurt nobody"));
        }
        let excuse = Excuse::ALL.into_iter().find(|excuse| self.admits(*excuse, stale, now));
        match excuse {
            Some(excuse) => self.count(format!("two holders, admitted: {excuse:?}")),
            None => {
                let of = self.deliveries.get(&applied.of);
                let why = format!(
                    "a stale {kind:?} settles the delivery of another: {applied:?} {of:?} {victim:?}"
                );
                self.fail(now, why);
            }
        }
    }
}

/// An ack that may be of an older delivery.
#[derive(Clone, Copy)]
struct Stale<'s> {
    applied: &'s Applied,
    kind: Kind,
    side: usize,
    way: Way,
}

/// A watch that the network tells what it carries.
#[derive(Clone)]
pub struct Shared(pub Arc<std::sync::Mutex<Watch>>);

impl Watcher for Shared {
    fn sent(&mut self, now: Time, side: usize, sent: &Sent) {
        let Sent::Message { delivery, .. } = sent else { return };
        let mut watch = self.0.lock().unwrap();
        let id = DeliveryId::of(delivery.published);
        let Some(named) = jetstream::parse(&delivery.ack.0) else { return };
        watch.count(if delivery.delivery_count > 1 { "redelivery" } else { "first delivery" });
        let delivered = Delivered {
            message: (named.name, delivery.stream_sequence),
            side,
            at: now,
            arrived: None,
            held: None,
            calls: BTreeMap::new(),
            applied: Vec::new(),
            sent: false,
        };
        watch.deliveries.insert(id, delivered);
    }

    fn arrived(&mut self, now: Time, id: DeliveryId) {
        if let Some(delivered) = self.0.lock().unwrap().deliveries.get_mut(&id) {
            delivered.arrived = Some(now);
        }
    }

    fn learned(&mut self, now: Time, side: usize) {
        self.0.lock().unwrap().learned.insert(side, now);
    }

    fn elected(&mut self, now: Time) {
        self.0.lock().unwrap().event(Event::LeaderChanged, now);
    }

    fn unkept(&mut self, now: Time, of: DeliveryId, kind: &AckKind) {
        let (mut watch, kind) = (self.0.lock().unwrap(), Kind::of(kind));
        watch.count(format!("{kind:?} answered by an old leader, and not kept"));
        if let Some(delivered) = watch.deliveries.get_mut(&of) {
            // JetStream has confirmed it, so the replica cannot know better.
            delivered.applied.push((kind, now));
        }
    }

    fn applied(&mut self, now: Time, side: usize, applied: &Applied, way: Way) {
        let mut watch = self.0.lock().unwrap();
        let kind = Kind::of(&applied.kind);
        watch.count(format!("applied {kind:?}"));
        // Whoever looks for poison does not know the delivery.
        let poison = [Some(applied.of), applied.settled].into_iter().flatten().any(|id| {
            watch.deliveries.get(&id).is_some_and(|one| {
                let (name, sequence) = &one.message;
                *sequence == applied.stream_sequence
                    && watch.poison.contains(&(name.stream.clone(), *sequence))
            })
        });
        let calls = watch.deliveries.get_mut(&applied.of).map(|delivered| {
            delivered.applied.push((kind, now));
            delivered.calls.get(&kind).copied().unwrap_or_default()
        });
        let asked = calls.is_some_and(|calls| calls.open + calls.unknown + calls.applied > 0);
        if kind.is_final() && !asked && !poison {
            watch
                .fail(now, format!("applied, and nobody asked for it or was told so: {applied:?}"));
        }
        watch.stolen(&Stale { applied, kind, side, way }, now);
    }
}
