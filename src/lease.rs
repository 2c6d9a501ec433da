//! The lease table: who may settle which delivery, and until when.
//!
//! ```text
//!          grant            lend                begin               finish
//! arrival ──────▶ HELD by us ────▶ HELD by a caller ────▶ SETTLING(kind) ────────────▶ gone: ack, nak, term
//!                    │                │  ▲   ▲               │   │ unconfirmed Ack or Term
//!                    │ give_back      │  └───┼── unsent ─────┘   ▼
//!                    │                │extend└─────────── UNCERTAIN(kind) ──begin(same kind)──▶ SETTLING
//!                    ▼                ▼                         │
//!                  gone: lapsed     gone: lapsed, lost ◀────────┘ ack_by
//! ```
//! Two clocks end a lease: `deadline` is the caller's, `ack_by` is JetStream's (after it, somebody
//! else may have the message). A lease is alive before the earlier of the two. Where the deadline
//! is later than `ack_by`, progress moves `ack_by` along.
//!
//! 1. An id is given out once, and leaves the table once; how it ended is remembered for a while.
//! 2. Only a lease that is alive can be begun, extended or lent.
//! 3. Of one message of one consumer there is at most one lease: a newer delivery ends the older.
//! 4. SETTLING leases are not ended by time: their settlement is under way.
//! 5. `ack_by` never moves further than the broker confirmed, and only if it did so in time.
//! 6. `due` has exactly one entry for each lease that is not SETTLING, and none for those.
//!
//! Pure: no clock, no lock, no log. Callers pass `now` in, and put a lock around it. Every call is
//! bounded: those that concern many leases work in steps.

mod ended;
mod time;

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroU64,
    time::{Duration, Instant},
};

use self::ended::{Ended, Memory};
pub use self::time::{ack_wait_of, margin};
use self::time::{Nanos, Origin, nanos};

/// A server that forgot may redeliver this much early: it stores times in whole seconds
/// (measured on nats-server 2.15: ack wait 4 s, redelivered 3.05 s after a restart).
const FORGOTTEN_SECOND: Nanos = 1_000_000_000;
/// Progress confirmed this shortly before may not have been stored.
const UNSTORED: Nanos = 250_000_000;
/// The deadline of a lease that is kept until somebody takes it.
const NEVER: Nanos = Nanos::MAX;

/// Names one lease: sequential from 1, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(NonZeroU64);

impl LeaseId {
    /// The id of this number; there is no lease 0.
    pub fn new(number: u64) -> Option<Self> {
        NonZeroU64::new(number).map(Self)
    }

    /// Its number.
    pub fn get(self) -> u64 {
        self.0.get()
    }
}

/// One incarnation of one consumer; a consumer that is made anew gets a new one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConsumerId(pub u32);

/// How a message is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Done.
    Ack,
    /// Again.
    Nak,
    /// Never again.
    Term,
}

/// What is known of a delivery when it arrives.
#[derive(Debug, Clone)]
pub struct Terms {
    /// Whose delivery it is.
    pub consumer: ConsumerId,
    /// The message's sequence in its stream.
    pub sequence: u64,
    /// The delivery's sequence in its consumer.
    pub consumer_sequence: u64,
    /// A Nak would destroy the message.
    pub last_attempt: bool,
    /// When it arrived here.
    pub received: Instant,
    /// JetStream's patience with this very delivery.
    pub ack_wait: Duration,
    /// Which attempt it is, for when the ack wait changes.
    pub delivery_count: u64,
}

/// A lease in a caller's hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lent {
    /// When it ends, unless it is extended.
    pub deadline: Instant,
    /// The earlier of that and JetStream's own end.
    pub settle_by: Instant,
}

/// What to do about a settlement that was let through.
#[derive(Debug, PartialEq, Eq)]
pub enum Begun<'t, T> {
    /// Ask the broker, by what is kept here, and come back with the outcome.
    Publish(&'t T),
    /// It was settled in this way before: nothing is left to do.
    Duplicate,
}

/// What the broker made of a settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It has had its effect.
    Confirmed,
    /// It never left us.
    Unsent,
    /// The consumer is gone.
    Denied,
    /// Nobody knows.
    Unconfirmed,
}

/// Where a lease stands after its settlement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Held as before.
    Held,
    /// It may be settled in the same way again.
    Uncertain,
    /// Out of the table.
    Gone,
}

/// The table said no.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It lapsed or was lost.
    Expired {
        /// It ended so long ago that how is not remembered.
        forgotten: bool,
    },
    /// It was, or may have been, settled in another way.
    Settled {
        /// In this.
        by: Kind,
    },
    /// It is being settled at this moment.
    Busy,
}

/// Something that time has made due.
#[derive(Debug, PartialEq, Eq)]
pub enum Due<T> {
    /// Tell the broker that it is still worked on, and [`LeaseTable::progressed`] what came of it.
    Progress {
        /// Which.
        id: LeaseId,
    },
    /// Its holder let it lapse.
    Lapsed {
        /// Which.
        id: LeaseId,
        /// What was kept with it.
        payload: T,
        /// It may be given back: nobody else can have it yet, and it is not the last attempt.
        release: bool,
    },
    /// JetStream may have given it away: nothing may be sent for it.
    Lost {
        /// Which.
        id: LeaseId,
        /// What was kept with it.
        payload: T,
    },
}

/// A delivery that goes back unhanded.
#[derive(Debug, PartialEq, Eq)]
pub struct GivenBack<T> {
    /// What was kept with it.
    pub payload: T,
    /// A Nak may be sent for it.
    pub release: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Held,
    Settling(Kind),
    Uncertain(Kind),
}

#[derive(Debug)]
struct Lease<T> {
    payload: T,
    deadline: Nanos,
    ack_by: Nanos,
    ack_wait: Nanos,
    /// When the next progress is due; meaningful while the deadline is later than `ack_by`.
    progress_at: Nanos,
    /// `ack_by` before the last confirmed progress, and when that was.
    before: Option<(Nanos, Nanos)>,
    sequence: u64,
    consumer_sequence: u64,
    consumer: ConsumerId,
    delivery_count: u32,
    last_attempt: bool,
    state: State,
}

/// See the module.
#[derive(Debug)]
pub struct LeaseTable<T> {
    origin: Origin,
    next: NonZeroU64,
    leases: BTreeMap<LeaseId, Lease<T>>,
    due: BTreeSet<(Nanos, LeaseId)>,
    /// Leases by consumer and stream sequence.
    consumers: BTreeMap<ConsumerId, BTreeMap<u64, LeaseId>>,
    /// Consumers that were deleted, or made anew: their leases are lost, and leave as time comes to
    /// them.
    dead: BTreeSet<ConsumerId>,
    memory: Memory,
}

impl<T> LeaseTable<T> {
    /// An empty table. `origin` is not after any `now`; of `remembered` leases it is known how
    /// they ended, at half a byte each.
    pub fn new(origin: Instant, remembered: usize) -> Self {
        Self {
            origin: Origin(origin),
            next: NonZeroU64::MIN,
            leases: BTreeMap::new(),
            due: BTreeSet::new(),
            consumers: BTreeMap::new(),
            dead: BTreeSet::new(),
            memory: Memory::new(remembered),
        }
    }

    /// Leases a delivery that has just arrived to the proxy itself, and ends an older lease of the
    /// same message: its arrival is the proof that JetStream gave it away.
    pub fn grant(&mut self, terms: Terms, payload: T) -> (LeaseId, Option<(LeaseId, T)>) {
        let id = LeaseId(self.next);
        self.next = self.next.saturating_add(1);
        self.memory.extend_to(id);
        let ack_wait = nanos(terms.ack_wait);
        let received = self.origin.since(terms.received);
        let ack_by = received + ack_wait - time::margin_of(ack_wait);
        let older = self.consumers.entry(terms.consumer).or_default().insert(terms.sequence, id);
        let superseded = older.and_then(|older| self.remove(older, Ended::Lost, false));
        let lease = Lease {
            payload,
            deadline: if terms.last_attempt { NEVER } else { ack_by },
            ack_by,
            ack_wait,
            progress_at: received + ack_wait / 2,
            before: None,
            sequence: terms.sequence,
            consumer_sequence: terms.consumer_sequence,
            consumer: terms.consumer,
            delivery_count: u32::try_from(terms.delivery_count).unwrap_or(u32::MAX),
            last_attempt: terms.last_attempt,
            state: State::Held,
        };
        self.due.insert((lease.due_at(), id));
        self.leases.insert(id, lease);
        (id, superseded)
    }

    /// Hands a lease to a caller, for this long; as long as JetStream waits when there is no length.
    ///
    /// # Errors
    /// When it is not alive any more.
    pub fn lend(
        &mut self,
        id: LeaseId,
        length: Option<Duration>,
        now: Instant,
    ) -> Result<Lent, Refusal> {
        let now = self.origin.since(now);
        self.change(id, now, |lease| {
            lease.set_deadline(length.map_or(lease.ack_by, |length| now + nanos(length)), now);
        })?;
        let lease = self.lease(id)?;
        let (deadline, settle_by) = (lease.deadline, lease.deadline.min(lease.ack_by));
        Ok(Lent { deadline: self.origin.at(deadline), settle_by: self.origin.at(settle_by) })
    }

    /// Moves the end of a lease to this long from now; it may come closer.
    ///
    /// # Errors
    /// When it is not held any more.
    pub fn extend(
        &mut self,
        id: LeaseId,
        length: Duration,
        now: Instant,
    ) -> Result<Instant, Refusal> {
        let now = self.origin.since(now);
        let deadline = now + nanos(length);
        self.change(id, now, |lease| lease.set_deadline(deadline, now))?;
        Ok(self.origin.at(deadline))
    }

    /// Keeps a lent last attempt that came back unhanded, until somebody takes it.
    pub fn keep(&mut self, id: LeaseId, now: Instant) {
        let now = self.origin.since(now);
        // One that is not held any more cannot be kept.
        let _ = self.change(id, now, |lease| {
            if lease.last_attempt {
                lease.set_deadline(NEVER, now);
            }
        });
    }

    /// Lets a settlement through, if the lease is alive and nobody else is settling it.
    ///
    /// # Errors
    /// See [`Refusal`].
    pub fn begin(
        &mut self,
        id: LeaseId,
        kind: Kind,
        now: Instant,
    ) -> Result<Begun<'_, T>, Refusal> {
        let now = self.origin.since(now);
        let Some(lease) = self.leases.get_mut(&id) else {
            return match refusal(&self.memory, id) {
                Refusal::Settled { by } if by == kind => Ok(Begun::Duplicate),
                refusal => Err(refusal),
            };
        };
        match lease.state {
            _ if self.dead.contains(&lease.consumer) => {
                return Err(Refusal::Expired { forgotten: false });
            }
            State::Held if lease.alive(now) => {}
            State::Uncertain(by) if by != kind => return Err(Refusal::Settled { by }),
            State::Uncertain(_) if now < lease.ack_by => {}
            State::Settling(_) => return Err(Refusal::Busy),
            State::Held | State::Uncertain(_) => return Err(Refusal::Expired { forgotten: false }),
        }
        self.due.remove(&(lease.due_at(), id));
        lease.state = State::Settling(kind);
        Ok(Begun::Publish(&lease.payload))
    }

    /// What came of a settlement that [`LeaseTable::begin`] let through. What was kept comes out
    /// when the lease has left the table.
    pub fn finish(&mut self, id: LeaseId, outcome: Outcome, now: Instant) -> (After, Option<T>) {
        let now = self.origin.since(now);
        let Some(lease) = self.leases.get_mut(&id) else { return (After::Gone, None) };
        let dead = self.dead.contains(&lease.consumer);
        let State::Settling(kind) = lease.state else { return (After::Held, None) };
        let (state, ended) = match outcome {
            Outcome::Confirmed => (None, Ended::settled(kind)),
            Outcome::Denied => (None, Ended::Lost),
            Outcome::Unsent if lease.alive(now) && !dead => (Some(State::Held), Ended::Lost),
            Outcome::Unsent if now < lease.ack_by => (None, Ended::Lapsed),
            Outcome::Unsent => (None, Ended::Lost),
            // It may be on its way still: a second could hit the next holder's delivery.
            Outcome::Unconfirmed if kind == Kind::Nak => (None, Ended::Nak),
            Outcome::Unconfirmed if now < lease.ack_by && !dead => {
                (Some(State::Uncertain(kind)), Ended::Lost)
            }
            Outcome::Unconfirmed => (None, Ended::Lost),
        };
        match state {
            Some(state) => {
                lease.state = state;
                self.due.insert((lease.due_at(), id));
                (if state == State::Held { After::Held } else { After::Uncertain }, None)
            }
            None => (After::Gone, self.remove(id, ended, true).map(|(_, payload)| payload)),
        }
    }

    /// Takes back a delivery that nobody was handed. `None` if it is not held any more.
    pub fn give_back(&mut self, id: LeaseId, now: Instant) -> Option<GivenBack<T>> {
        let now = self.origin.since(now);
        let lease = self.leases.get(&id).filter(|lease| lease.state == State::Held)?;
        let release = lease.may_release(now) && !self.dead.contains(&lease.consumer);
        let (_, payload) = self.remove(id, Ended::Lapsed, true)?;
        Some(GivenBack { payload, release })
    }

    /// What is due by now, at most `limit` of it; there may be more when it is as much.
    pub fn sweep(&mut self, now: Instant, limit: usize) -> Vec<Due<T>> {
        let now = self.origin.since(now);
        let mut swept = Vec::new();
        while swept.len() < limit
            && let Some(&(at, id)) = self.due.first()
            && at <= now
        {
            swept.extend(self.sweep_one(id, now));
        }
        swept
    }

    fn sweep_one(&mut self, id: LeaseId, now: Nanos) -> Option<Due<T>> {
        let Some(lease) = self.leases.get_mut(&id) else {
            // Invariant 6 says that this cannot be; without it, sweeping would never end.
            self.due.pop_first();
            return None;
        };
        if self.dead.contains(&lease.consumer) || now >= lease.ack_by {
            let (id, payload) = self.remove(id, Ended::Lost, true)?;
            return Some(Due::Lost { id, payload });
        }
        if lease.state == State::Held && now >= lease.deadline {
            let release = lease.may_release(now);
            let (id, payload) = self.remove(id, Ended::Lapsed, true)?;
            return Some(Due::Lapsed { id, payload, release });
        }
        // Tried again after an eighth, unless it is confirmed before.
        let due = (lease.due_at(), id);
        lease.progress_at = now + lease.ack_wait / 8;
        let next = (lease.due_at(), id);
        self.due.remove(&due);
        self.due.insert(next);
        Some(Due::Progress { id })
    }

    /// What came of a progress that was sent at `sent_at`. It counts only if it was confirmed
    /// before the old `ack_by`: after that JetStream answers, and does nothing.
    pub fn progressed(&mut self, id: LeaseId, sent_at: Instant, confirmed: bool, now: Instant) {
        let (sent_at, now) = (self.origin.since(sent_at), self.origin.since(now));
        let Some(lease) = self.leases.get_mut(&id) else { return };
        if !confirmed || now >= lease.ack_by || self.dead.contains(&lease.consumer) {
            return;
        }
        let due = (lease.due_at(), id);
        let ack_by = sent_at + lease.ack_wait - time::margin_of(lease.ack_wait);
        if ack_by > lease.ack_by {
            lease.before = Some((lease.ack_by, now));
            lease.ack_by = ack_by;
        }
        lease.progress_at = lease.progress_at.max(sent_at + lease.ack_wait / 2);
        if self.due.remove(&due) {
            self.due.insert((lease.due_at(), id));
        }
    }

    /// When [`LeaseTable::sweep`] next has something to do.
    pub fn next_due(&self) -> Option<Instant> {
        self.due.first().map(|(at, _)| self.origin.at(*at))
    }

    /// What is kept with a lease.
    pub fn payload(&self, id: LeaseId) -> Option<&T> {
        self.leases.get(&id).map(|lease| &lease.payload)
    }

    /// Until when JetStream waits for this lease, as far as is known.
    pub fn ack_by(&self, id: LeaseId) -> Option<Instant> {
        self.leases.get(&id).map(|lease| self.origin.at(lease.ack_by))
    }

    /// Leases in the table.
    pub fn len(&self) -> usize {
        self.leases.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.leases.is_empty()
    }

    /// Leases of one consumer.
    pub fn held_by(&self, consumer: ConsumerId) -> usize {
        self.consumers.get(&consumer).map_or(0, BTreeMap::len)
    }

    /// The consumer is gone, or another one under its name: all its leases are lost from now on.
    pub fn end_consumer(&mut self, consumer: ConsumerId) {
        if self.consumers.contains_key(&consumer) {
            self.dead.insert(consumer);
        }
    }

    /// Looks at up to `limit` leases of a consumer after the stream sequence `after`, and gives
    /// each a new ack wait. Returns where to go on, until there is nothing left.
    pub fn retune(
        &mut self,
        consumer: ConsumerId,
        ack_wait: impl Fn(u64) -> Duration,
        after: Option<u64>,
        limit: usize,
    ) -> Option<u64> {
        self.revise(consumer, after, limit, |lease| {
            let started = lease.ack_by + time::margin_of(lease.ack_wait) - lease.ack_wait;
            lease.ack_wait = nanos(ack_wait(u64::from(lease.delivery_count)));
            lease.ack_by = started + lease.ack_wait - time::margin_of(lease.ack_wait);
            lease.progress_at = started + lease.ack_wait / 2;
            lease.before = None;
        })
    }

    /// The server may have forgotten the last moments of what it promised to this consumer. In
    /// steps, like [`LeaseTable::retune`].
    pub fn distrust(
        &mut self,
        consumer: ConsumerId,
        now: Instant,
        after: Option<u64>,
        limit: usize,
    ) -> Option<u64> {
        let now = self.origin.since(now);
        self.revise(consumer, after, limit, |lease| {
            if let Some((ack_by, at)) = lease.before.take()
                && now < at + UNSTORED
            {
                lease.ack_by = ack_by;
            }
            lease.ack_by = lease.ack_by.saturating_sub(FORGOTTEN_SECOND);
            lease.progress_at = lease.progress_at.min(now);
        })
    }

    /// The server remembers deliveries up to this consumer sequence only: leases after it are
    /// lost. In steps, like [`LeaseTable::retune`].
    pub fn lose_after(
        &mut self,
        consumer: ConsumerId,
        delivered: u64,
        after: Option<u64>,
        limit: usize,
    ) -> Option<u64> {
        self.revise(consumer, after, limit, |lease| {
            if lease.consumer_sequence > delivered {
                lease.ack_by = 0;
            }
        })
    }

    fn revise(
        &mut self,
        consumer: ConsumerId,
        after: Option<u64>,
        limit: usize,
        change: impl Fn(&mut Lease<T>),
    ) -> Option<u64> {
        let leases = self.consumers.get(&consumer)?;
        let from = after.map_or(0, |after| after.saturating_add(1));
        let ids: Vec<(u64, LeaseId)> =
            leases.range(from..).take(limit).map(|(sequence, id)| (*sequence, *id)).collect();
        for (_, id) in &ids {
            let Some(lease) = self.leases.get_mut(id) else { continue };
            let due = (lease.due_at(), *id);
            // A lease that ends with JetStream's clock goes on doing so.
            let bound = lease.deadline == lease.ack_by;
            change(lease);
            if bound {
                lease.deadline = lease.ack_by;
            }
            if self.due.remove(&due) {
                self.due.insert((lease.due_at(), *id));
            }
        }
        ids.last().filter(|_| ids.len() == limit).map(|(sequence, _)| *sequence)
    }

    /// Changes a lease that is held and alive.
    fn change(
        &mut self,
        id: LeaseId,
        now: Nanos,
        change: impl FnOnce(&mut Lease<T>),
    ) -> Result<(), Refusal> {
        let lease = self.lease(id)?;
        match lease.state {
            State::Held if lease.alive(now) => {}
            State::Held => return Err(Refusal::Expired { forgotten: false }),
            State::Settling(_) => return Err(Refusal::Busy),
            State::Uncertain(by) => return Err(Refusal::Settled { by }),
        }
        if let Some(lease) = self.leases.get_mut(&id) {
            self.due.remove(&(lease.due_at(), id));
            change(lease);
            self.due.insert((lease.due_at(), id));
        }
        Ok(())
    }

    /// A lease in the table whose consumer is still the one it was granted for.
    fn lease(&self, id: LeaseId) -> Result<&Lease<T>, Refusal> {
        match self.leases.get(&id) {
            Some(lease) if self.dead.contains(&lease.consumer) => {
                Err(Refusal::Expired { forgotten: false })
            }
            Some(lease) => Ok(lease),
            None => Err(refusal(&self.memory, id)),
        }
    }

    /// Takes a lease out. `indexed`: the index by sequence still points to it.
    fn remove(&mut self, id: LeaseId, ended: Ended, indexed: bool) -> Option<(LeaseId, T)> {
        let lease = self.leases.remove(&id)?;
        self.due.remove(&(lease.due_at(), id));
        self.memory.remember(id, ended);
        if indexed && let Some(consumer) = self.consumers.get_mut(&lease.consumer) {
            consumer.remove(&lease.sequence);
            if consumer.is_empty() {
                self.consumers.remove(&lease.consumer);
                self.dead.remove(&lease.consumer);
            }
        }
        Some((id, lease.payload))
    }
}

/// Why a lease that is not in the table is not.
fn refusal(memory: &Memory, id: LeaseId) -> Refusal {
    match memory.ended(id) {
        Some(Ended::Ack) => Refusal::Settled { by: Kind::Ack },
        Some(Ended::Nak) => Refusal::Settled { by: Kind::Nak },
        Some(Ended::Term) => Refusal::Settled { by: Kind::Term },
        Some(Ended::Lapsed | Ended::Lost) => Refusal::Expired { forgotten: false },
        None => Refusal::Expired { forgotten: true },
    }
}

impl<T> Lease<T> {
    fn alive(&self, now: Nanos) -> bool {
        now < self.deadline.min(self.ack_by)
    }

    /// When time next has something to do with it.
    fn due_at(&self) -> Nanos {
        match self.state {
            State::Settling(_) => NEVER,
            State::Uncertain(_) | State::Held if self.deadline > self.ack_by => {
                self.ack_by.min(self.progress_at)
            }
            State::Uncertain(_) => self.ack_by,
            State::Held => self.deadline,
        }
    }

    fn set_deadline(&mut self, deadline: Nanos, now: Nanos) {
        self.deadline = deadline;
        let half = self.ack_by + time::margin_of(self.ack_wait) - self.ack_wait / 2;
        self.progress_at = half.max(now);
    }

    /// Nobody else can have it for a while, and a Nak does not destroy it.
    fn may_release(&self, now: Nanos) -> bool {
        !self.last_attempt && self.ack_by.saturating_sub(now) > time::margin_of(self.ack_wait)
    }
}
