//! The pump: how much to pull for all open Fetch calls of one consumer, and who gets what.
//!
//! ```text
//!   join ──▶ waiters, first in first out ──▶ answers
//!                ▲ wants            ▲ messages
//!   step ──▶ one pull at a time ────┘ surplus ──▶ parked ──▶ the next waiter, or overdue
//! ```
//! A pull cannot be cancelled, and what it brings for somebody who has left would wait for a whole
//! ack wait. So there is one pull at a time, for no more than what its waiters still want; a waiter
//! who leaves leaves its share to the next; surplus is parked for a moment before it is given back.
//! Waiters gather while a pull is out, so the next one is as large as it can be: it clocks itself.
//!
//! A pull is JetStream's one-shot (`no_wait` with `expires`): it waits for a first message, brings
//! what is there and says that it has ended; but not after the last of a full batch, which is
//! counted, nor at `max_ack_pending`, which is noticed by quiet.
//!
//! 1. Every message that arrives is answered, overdue, parked or with a waiter: in one of them.
//! 2. At most one pull is open.
//! 3. A waiter is answered once; its messages never exceed its bytes, unless as `too_large`.
//! 4. At most one waiter has messages: it is filled before another gets any.
//!
//! Pure: no clock, no runtime, no log; `now` is an argument, and [`Step`]s are for others to do.

mod parked;
mod waiters;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

pub use self::waiters::{WaiterId, Want};
use self::{parked::Parked, waiters::Waiters};

/// After this long without an arrival, a pull is taken to have brought what there was.
const QUIET: Duration = Duration::from_millis(5);
/// A pull ends this long before the last of its waiters does, for its end to arrive in time.
const HEAD_START: Duration = Duration::from_millis(50);
/// Shortest and longest wait of a pull; the longest bounds how long a drain takes, and how long a
/// pull may hang at `max_ack_pending`.
const SHORTEST_PULL: Duration = Duration::from_millis(100);
const LONGEST_PULL: Duration = Duration::from_secs(5);
/// The wait of a pull for those who want what is there now.
const NO_WAIT_PULL: Duration = Duration::from_millis(50);
/// A pull whose end has not been told by then has ended unheard.
const UNHEARD: Duration = Duration::from_secs(1);
/// Time before the next pull when the last was refused.
const REFUSED: Duration = Duration::from_millis(100);
/// What a message takes in an answer beyond what JetStream counts: its token and its fields.
const OVERHEAD: u64 = 600;

/// Bounds of the consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Most messages of one pull, at least 1.
    pub max_batch: u32,
    /// Longest wait of one pull.
    pub max_expires: Duration,
    /// Most bytes that one pull may ask for.
    pub max_request_bytes: Option<u64>,
    /// How long surplus waits for the next waiter.
    pub park: Duration,
}

/// Why a pull ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullEnd {
    /// It brought what there was, or its time is over.
    Done,
    /// Other pulls wait for what is pending.
    RequestsPending,
    /// The next message exceeds the pull's bytes.
    TooLarge,
    /// Anything else: the next pull waits for a moment.
    Refused,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub enum Step<M> {
    /// Ask for messages.
    Pull {
        /// Names the pull in [`Pump::ended`].
        no: u64,
        /// Most messages.
        batch: u32,
        /// Longest wait.
        expires: Duration,
        /// End with what is there at the first message.
        no_wait: bool,
        /// Most bytes, as JetStream counts them.
        max_bytes: Option<u64>,
    },
    /// Answer a waiter, who is out of the pump with this.
    Answer {
        /// Whom.
        waiter: WaiterId,
        /// With what.
        messages: Vec<M>,
        /// A message that does not fit into any answer of this waiter's.
        too_large: Option<M>,
        /// Why now.
        why: Why,
    },
    /// Nobody wants this message: give it back.
    Overdue {
        /// Which.
        message: M,
    },
}

/// Why a waiter is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// It has what it wants, or what there is.
    Filled,
    /// Its time is over.
    Waited,
    /// Its time is over, and there is no connection.
    Down,
    /// The replica is going.
    Draining,
}

#[derive(Debug, Clone, Copy)]
struct Pull {
    no: u64,
    batch: u32,
    got: u32,
    since: Instant,
    last_arrival: Instant,
    ends_at: Instant,
}

/// What the last end asks of the next pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Normal,
    /// One message, whatever its size.
    Uncapped,
    /// One message, waiting in line like any other pull.
    Plain,
}

/// See the module.
#[derive(Debug)]
pub struct Pump<M> {
    limits: Limits,
    waiters: Waiters<M>,
    parked: Parked<M>,
    ready: VecDeque<Step<M>>,
    pull: Option<Pull>,
    pulls: u64,
    /// Waiters from this one on joined after the last pull was issued.
    unpulled: WaiterId,
    next: Next,
    not_before: Option<Instant>,
    up: bool,
    draining: bool,
    starved: bool,
}

impl<M> Pump<M> {
    /// A pump without a connection.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            waiters: Waiters::default(),
            parked: Parked::default(),
            ready: VecDeque::new(),
            pull: None,
            pulls: 0,
            unpulled: WaiterId::default(),
            next: Next::Normal,
            not_before: None,
            up: false,
            draining: false,
            starved: false,
        }
    }

    /// The consumer's bounds have changed.
    pub fn set_limits(&mut self, limits: Limits) {
        self.limits = limits;
    }

    /// One more open Fetch.
    pub fn join(&mut self, want: Want, now: Instant) -> WaiterId {
        self.waiters.join(want, now)
    }

    /// A waiter has gone. What it had goes to the next; the pull is left alone.
    pub fn leave(&mut self, id: WaiterId, now: Instant) {
        // One that is answered already is not here any more; its answer comes back unhanded.
        if let Some(waiter) = self.waiters.remove(id) {
            self.parked.put_back(waiter.messages, now + self.limits.park);
        }
    }

    /// A message has arrived. `size` bounds what it takes in an answer.
    pub fn arrived(&mut self, message: M, size: u64, last_attempt: bool, now: Instant) {
        if let Some(pull) = &mut self.pull {
            pull.got += 1;
            pull.last_arrival = now;
            if pull.got >= pull.batch {
                // There may be more.
                self.pull = None;
                self.unpulled = WaiterId::default();
            }
        }
        let item = Item { message, size, last_attempt };
        if let Err(item) = self.give(item, now) {
            self.parked.park(item, now + self.limits.park);
        }
    }

    /// An answer that nobody took: first in line for the next waiter.
    pub fn unhanded(&mut self, messages: Vec<(M, u64, bool)>, now: Instant) {
        let items = messages.into_iter();
        let items = items.map(|(message, size, last_attempt)| Item { message, size, last_attempt });
        self.parked.put_back(items.collect(), now + self.limits.park);
    }

    /// A pull has ended. That of an older pull says nothing.
    pub fn ended(&mut self, no: u64, end: PullEnd, now: Instant) {
        let Some(pull) = self.pull.take_if(|pull| pull.no == no) else { return };
        // Only the end of what there was has told the waiters anything.
        self.unpulled = WaiterId::default();
        (self.next, self.not_before) = match end {
            PullEnd::TooLarge if pull.got == 0 => (Next::Uncapped, None),
            PullEnd::Done | PullEnd::TooLarge => (Next::Normal, None),
            // Spread, so that replicas that collided do not do so again.
            PullEnd::RequestsPending => {
                (Next::Plain, Some(now + Duration::from_millis(5 + no.wrapping_mul(7) % 46)))
            }
            PullEnd::Refused => (Next::Normal, Some(now + REFUSED)),
        };
        if end == PullEnd::Done {
            self.unpulled = self.waiters.joined_after(pull.since);
            for id in self.waiters.impatient(pull.since) {
                self.answer(id, Why::Waited, None);
            }
        }
    }

    /// There is a connection; nothing is pulled on it yet.
    pub fn up(&mut self, _now: Instant) {
        self.up = true;
        self.pull = None;
        self.next = Next::Normal;
        self.not_before = None;
    }

    /// The connection is lost, and the pull with it.
    pub fn down(&mut self, _now: Instant) {
        self.up = false;
        self.pull = None;
    }

    /// Pulls nothing more; waiters return when the pull has ended.
    pub fn drain(&mut self, _now: Instant) {
        self.draining = true;
    }

    /// Takes out all waiters that have nothing yet, for the caller to answer; what the first may
    /// have is answered as it is.
    pub fn fail(&mut self, _now: Instant) -> Vec<WaiterId> {
        if let Some(first) = self.waiters.filling() {
            self.answer(first, Why::Filled, None);
        }
        self.waiters.take_all()
    }

    /// Takes out what is parked.
    pub fn take_parked(&mut self) -> Vec<M> {
        self.parked.take_all().into_iter().map(|item| item.message).collect()
    }

    /// What is to be done now; to be called until there is nothing more. `permits`: leases that may
    /// still be granted.
    pub fn step(&mut self, now: Instant, permits: u32) -> Option<Step<M>> {
        if self.pull.is_some_and(|pull| now >= pull.ends_at) {
            self.pull = None;
        }
        self.serve_parked(now);
        self.answer_due(now);
        if let Some(answer) = self.ready.pop_front() {
            return Some(answer);
        }
        if let Some(item) = self.parked.overdue(now) {
            return Some(Step::Overdue { message: item.message });
        }
        self.issue(now, permits)
    }

    /// When [`Pump::step`] has something to do if nothing else happens.
    pub fn next_deadline(&self, now: Instant) -> Option<Instant> {
        let lingers = self.waiters.filling().and_then(|id| self.waiters.linger_until(id));
        let quiet = self.pull.zip(lingers).map(|(pull, over)| over.max(pull.last_arrival + QUIET));
        let retry = self.not_before.filter(|at| *at > now && !self.waiters.is_empty());
        [
            self.waiters.next_deadline(),
            quiet,
            self.pull.map(|pull| pull.ends_at),
            self.parked.next_deadline(),
            retry.filter(|_| self.pull.is_none() && self.up),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Nothing is going on.
    pub fn is_idle(&self) -> bool {
        self.waiters.is_empty()
            && self.parked.len() == 0
            && self.pull.is_none()
            && self.ready.is_empty()
    }

    /// Open calls.
    pub fn waiters(&self) -> usize {
        self.waiters.len() + self.ready.len()
    }

    /// Surplus messages.
    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Only a permit is missing for the next pull.
    pub fn starved(&self) -> bool {
        self.starved
    }

    /// Gives a message to the first waiter it fits. A waiter that has some, and no room for this
    /// one, is full. If it fits nobody it is the first one's to know of.
    fn give(&mut self, item: Item<M>, now: Instant) -> Result<(), Item<M>> {
        while let Some(first) = self.waiters.filling() {
            if self.waiters.fits(first, item.size) {
                return self.hand(first, item, now);
            }
            self.answer(first, Why::Filled, None);
        }
        match (self.waiters.first_that_fits(item.size), self.waiters.first()) {
            (Some(fit), _) => self.hand(fit, item, now),
            (None, Some(first)) => {
                self.answer(first, Why::Filled, Some(item.message));
                Ok(())
            }
            (None, None) => Err(item),
        }
    }

    fn hand(&mut self, id: WaiterId, item: Item<M>, now: Instant) -> Result<(), Item<M>> {
        if self.waiters.hand(id, item, now) {
            self.answer(id, Why::Filled, None);
        }
        Ok(())
    }

    fn serve_parked(&mut self, now: Instant) {
        while !self.waiters.is_empty()
            && let Some(item) = self.parked.pop()
        {
            // There is a waiter, so it is taken.
            if self.give(item, now).is_err() {
                break;
            }
        }
    }

    fn answer_due(&mut self, now: Instant) {
        if let Some(first) = self.waiters.filling() {
            let quiet = self.pull.is_none_or(|pull| now >= pull.last_arrival + QUIET);
            let over = self.waiters.linger_until(first).is_none_or(|until| now >= until);
            if over && quiet || !self.up {
                self.answer(first, Why::Filled, None);
            }
        }
        let why = if self.up { Why::Waited } else { Why::Down };
        while let Some(id) = self.waiters.due(now) {
            // Somebody who wants what is there now waits for a pull of its own, if it has to.
            match self.may_still_come(id, now) {
                Some(until) => self.waiters.postpone(id, until),
                None => self.answer(id, why, None),
            }
        }
        if self.draining && self.pull.is_none() {
            while let Some(first) = self.waiters.first() {
                self.answer(first, Why::Draining, None);
            }
        }
    }

    /// Somebody who wants what is there now waits for a pull of its own to say so, unless the open
    /// one has brought nothing for longer; until when, at the latest.
    fn may_still_come(&self, id: WaiterId, now: Instant) -> Option<Instant> {
        let joined =
            self.waiters.joined(id).filter(|_| self.up && self.waiters.is_impatient(id))?;
        let quiet = self.pull.is_some_and(|pull| pull.got == 0 && pull.since <= joined);
        let patient_until = joined + UNHEARD;
        (!quiet && now < patient_until).then_some(patient_until)
    }

    fn answer(&mut self, waiter: WaiterId, why: Why, too_large: Option<M>) {
        if let Some(answered) = self.waiters.remove(waiter) {
            let messages: Vec<M> = answered.messages.into_iter().map(|item| item.message).collect();
            let why = if messages.is_empty() { why } else { Why::Filled };
            self.ready.push_back(Step::Answer { waiter, messages, too_large, why });
        }
    }

    fn issue(&mut self, now: Instant, permits: u32) -> Option<Step<M>> {
        self.starved = false;
        let wanted = self.waiters.wanted();
        let early = self.not_before.is_some_and(|at| now < at);
        if self.pull.is_some() || !self.up || self.draining || early || wanted == 0 {
            return None;
        }
        let left = self.waiters.last_deadline()?.saturating_duration_since(now);
        let fresh = self.waiters.last().is_some_and(|last| last >= self.unpulled);
        if !fresh && left < SHORTEST_PULL {
            return None;
        }
        if permits == 0 {
            self.starved = true;
            return None;
        }
        let next = std::mem::replace(&mut self.next, Next::Normal);
        let most = if next == Next::Normal { self.limits.max_batch.max(1) } else { 1 };
        let batch = u32::try_from(wanted).unwrap_or(u32::MAX).min(permits).min(most);
        let expires = self.expires(left);
        let max_bytes = (next != Next::Uncapped).then(|| self.max_bytes(batch));
        self.pulls += 1;
        let no = self.pulls;
        self.pull = Some(Pull {
            no,
            batch,
            got: 0,
            since: now,
            last_arrival: now,
            ends_at: now + expires + UNHEARD,
        });
        self.unpulled = self.waiters.next_id();
        self.not_before = None;
        Some(Step::Pull { no, batch, expires, no_wait: next != Next::Plain, max_bytes })
    }

    fn expires(&self, left: Duration) -> Duration {
        let expires = if self.waiters.all_impatient() {
            NO_WAIT_PULL
        } else {
            left.saturating_sub(HEAD_START).clamp(SHORTEST_PULL, LONGEST_PULL)
        };
        expires.min(self.limits.max_expires)
    }

    /// What the waiters have room for, less what each message takes beyond what JetStream counts;
    /// at least what the first has room for.
    fn max_bytes(&self, batch: u32) -> u64 {
        let all = self.waiters.bytes_left().saturating_sub(u64::from(batch) * OVERHEAD);
        let first = self.waiters.first_bytes_left().saturating_sub(OVERHEAD).max(1);
        all.max(first).min(self.limits.max_request_bytes.unwrap_or(u64::MAX))
    }
}

/// A message and what has to be known of it.
#[derive(Debug)]
struct Item<M> {
    message: M,
    size: u64,
    last_attempt: bool,
}
