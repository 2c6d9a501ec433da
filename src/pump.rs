//! The pump: how much to pull for all open Fetch calls of one consumer, and who gets what.
//!
//! ```text
//!   join ──▶ waiters, first come first served ──▶ answers
//!                │ wants           ▲ messages
//!   step ──▶     ▼                 │
//!            NO PULL ──issue──▶ OPEN, got < batch ──end, full, unheard, down──▶ NO PULL
//!                                  │ surplus, and what nobody took
//!                                  ▼
//!                               parked ──▶ the next waiter, or overdue
//! ```
//! A pull cannot be cancelled, and what it brings for somebody who has left would wait for a whole
//! ack wait. So there is one pull at a time, for no more than what its waiters still want; a waiter
//! who leaves leaves its share to the next; surplus is parked for a moment before it is given back.
//! Waiters gather while a pull is out, so the next one is as large as it can be: it clocks itself.
//!
//! A pull is JetStream's one-shot (`no_wait` with `expires`): it waits for a first message, brings
//! what is there and says that it has ended; but not after the last of a full batch, which is
//! counted, nor at `max_ack_pending`, which is noticed by quiet. A pull may be allowed less than its
//! waiters want. Where it came to that limit, the next pull follows at once, and waiters who have
//! some wait for what that brings: an answer is filled from several pulls.
//!
//! 1. Every message that arrives is in one place: with a waiter, in an answer, parked, or overdue.
//! 2. At most one pull is open.
//! 3. A waiter is answered once.
//! 4. The messages of an answer never exceed its bytes; `too_large` would not fit even alone.
//! 5. First come, first served: a message goes to the first waiter it fits, of the first 64.
//! 6. While somebody waits a pull is open, unless there is no connection or nothing is allowed, the last
//!    one was refused a moment ago, or all have little time left and were there for one in vain.
//! 7. After `step` has nothing more to do, `next_deadline` is later than `now`.
//!
//! Pure: no clock, no runtime, no lock, no log; `now` is an argument and never goes back, and
//! [`Step`]s are for others to do. No call costs more for many waiters than for few, but for
//! [`Pump::fail`].

mod appetite;
mod bound;
mod budget;
mod parked;
mod pull;
mod types;
mod waiters;

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

pub use self::{
    appetite::{Appetite, Course},
    bound::{Cause, PullBound},
    budget::{ByteRequest, PullBudget},
    types::{Allowance, Demand, PullLimits, PullOutcome, Step, WaiterId, Want, Why},
};
use self::{
    parked::Parked,
    pull::{NextPull, Pull, PullParams},
    waiters::{Fit, Waiters},
};

/// A pull ends this long before the last of its waiters does, for its end to arrive in time.
const HEAD_START: Duration = Duration::from_millis(50);
/// Shortest and longest wait of a pull. The longest bounds how long a drain takes, and how long a
/// pull hangs at `max_ack_pending`.
const SHORTEST_PULL: Duration = Duration::from_millis(100);
const LONGEST_PULL: Duration = Duration::from_secs(5);
/// The wait of a pull for those only who want what is there now.
const NO_WAIT_PULL: Duration = Duration::from_millis(50);
/// Whoever wants what is there now is not kept longer, whatever keeps the pump from finding out.
const NO_WAIT_AT_MOST: Duration = Duration::from_secs(1);
/// What a message takes in an answer beyond what JetStream counts: its token and its fields.
const OVERHEAD: u64 = 600;

/// See the [module](self).
#[derive(Debug)]
pub struct Pump<M> {
    limits: PullLimits,
    waiters: Waiters<M>,
    parked: Parked<M>,
    /// Answers that are decided and not taken yet.
    answers: VecDeque<Step<M>>,
    pull: Option<Pull>,
    issued: u64,
    next: NextPull,
    /// Whoever comes before this one was there for a pull that brought all there was.
    told: WaiterId,
    up: bool,
    draining: bool,
    starved: bool,
}

/// A message and what has to be known of it.
#[derive(Debug)]
struct Item<M> {
    message: M,
    size: u64,
    last_attempt: bool,
}

impl<M> Pump<M> {
    /// A pump without a connection.
    pub fn new(limits: PullLimits) -> Self {
        Self {
            limits,
            waiters: Waiters::new(),
            parked: Parked::new(),
            answers: VecDeque::new(),
            pull: None,
            issued: 0,
            next: NextPull::default(),
            told: WaiterId(0),
            up: false,
            draining: false,
            starved: false,
        }
    }

    /// The consumer's bounds have changed; they hold from the next pull on.
    pub fn set_limits(&mut self, limits: PullLimits) {
        self.limits = limits;
    }

    /// One more open Fetch.
    pub fn join(&mut self, want: Want, now: Instant) -> WaiterId {
        self.waiters.join(want, now)
    }

    /// A waiter has gone. What it had goes to the next; the pull is left alone. One that is
    /// answered already is not here any more: its answer comes back [`Pump::unhanded`].
    pub fn leave(&mut self, id: WaiterId, now: Instant) {
        if let Some(waiter) = self.waiters.remove(id) {
            self.parked.push_front(waiter.messages, now + self.limits.park);
        }
    }

    /// A message has arrived. `size` bounds what it takes in an answer, in bytes.
    pub fn arrived(&mut self, message: M, size: u64, last_attempt: bool, now: Instant) {
        if let Some(pull) = &mut self.pull
            && pull.count(now)
        {
            self.next = pull.full(now);
            self.pull = None;
        }
        self.serve_parked(now);
        if let Err(item) = self.give(Item { message, size, last_attempt }, now) {
            self.parked.push_back(item, now + self.limits.park);
        }
    }

    /// An answer that nobody took, as message, size and whether it is a last attempt: first in line
    /// for the next waiter.
    pub fn unhanded(&mut self, messages: Vec<(M, u64, bool)>, now: Instant) {
        let items = messages.into_iter();
        let items = items.map(|(message, size, last_attempt)| Item { message, size, last_attempt });
        self.parked.push_front(items.collect(), now + self.limits.park);
    }

    /// A pull has ended. The end of an older pull says nothing.
    pub fn ended(&mut self, no: u64, end: PullOutcome, now: Instant) {
        let Some(pull) = self.pull.take_if(|pull| pull.no == no) else { return };
        self.next = pull.next(end, now);
        if end == PullOutcome::Done {
            self.told = pull.waiters_before;
        }
    }

    /// There is a connection; nothing is pulled on it yet.
    pub fn up(&mut self, _now: Instant) {
        (self.up, self.pull, self.next) = (true, None, NextPull::default());
    }

    /// The connection is lost, and the pull with it.
    pub fn down(&mut self, _now: Instant) {
        (self.up, self.pull, self.next) = (false, None, NextPull::default());
    }

    /// Pulls nothing more; waiters return when the pull has ended.
    pub fn drain(&mut self, _now: Instant) {
        self.draining = true;
    }

    /// Takes out all waiters, for the caller to tell them of an error; what they had goes to the
    /// next. Answers that are decided already are still there to be taken.
    pub fn fail(&mut self, now: Instant) -> Vec<WaiterId> {
        let (ids, items) = self.waiters.remove_all();
        self.parked.push_front(items, now + self.limits.park);
        ids
    }

    /// Takes out what is parked.
    pub fn take_parked(&mut self) -> Vec<M> {
        self.parked.take_all()
    }

    /// What is to be done now; to be called after every event and at [`Pump::next_deadline`], until
    /// there is nothing more. `allowed`: what a pull may ask for, if one is due.
    pub fn step(&mut self, now: Instant, allowed: Allowance) -> Option<Step<M>> {
        if let Some(pull) = self.pull.filter(|pull| now >= pull.ends_at) {
            self.ended(pull.no, PullOutcome::Done, now);
        }
        self.serve_parked(now);
        if let Some(answer) = self.answers.pop_front() {
            return Some(answer);
        }
        if let Some((id, why)) = self.due(now) {
            return self.take_out(id, why, None);
        }
        if let Some(message) = self.parked.pop_overdue(now) {
            return Some(Step::Overdue { message });
        }
        self.issue(now, allowed)
    }

    /// What a pull would ask for now, if one is due.
    pub fn demand(&self, now: Instant) -> Option<Demand> {
        let ready = self.next.not_before.is_none_or(|at| now >= at) && self.wants_to_pull(now);
        ready.then(|| {
            let mode = self.next.mode;
            let single = mode.plain || mode.uncapped;
            let most = if single { 1 } else { self.limits.max_batch.max(1) };
            let messages = u32::try_from(self.waiters.wanted()).unwrap_or(u32::MAX).min(most);
            let bytes = (!mode.uncapped).then(|| self.max_bytes(messages));
            Demand { messages, bytes }
        })
    }

    /// When [`Pump::step`] has something to do if nothing else happens. An allowance that is missing
    /// is for the caller to wait for.
    pub fn next_deadline(&self, now: Instant) -> Option<Instant> {
        let brisk = self.waiters.first_brisk_holder();
        let retry = self.next.not_before.filter(|at| now < *at && self.wants_to_pull(now));
        [
            self.pull.map(|pull| pull.ends_at),
            self.quiet_at().filter(|_| brisk.is_some()),
            self.waiters.first_end().map(|(end, _)| end),
            self.waiters.first_impatient().map(|(_, joined)| self.known_at(joined)),
            self.parked.next_deadline(),
            retry,
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// A pull is open.
    pub fn has_pull(&self) -> bool {
        self.pull.is_some()
    }

    /// Nothing is going on.
    pub fn is_idle(&self) -> bool {
        self.waiters() == 0 && self.parked() == 0 && self.pull.is_none()
    }

    /// Open calls.
    pub fn waiters(&self) -> usize {
        self.waiters.len() + self.answers.len()
    }

    /// Messages that nobody waits for.
    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Only an allowance was missing for a pull at the last [`Pump::step`].
    pub fn starved(&self) -> bool {
        self.starved
    }

    fn serve_parked(&mut self, now: Instant) {
        while !self.waiters.is_empty()
            && let Some(mut spot) = self.parked.pop()
        {
            match self.give(spot.item, now) {
                Ok(()) => {}
                Err(item) => {
                    spot.item = item;
                    return self.parked.return_spot(spot);
                }
            }
        }
    }

    /// Gives a message to the first waiter it fits. One that has some, and too little room for
    /// this one, is full. If it fits nobody it is for the first to know of whom it would never fit.
    fn give(&mut self, item: Item<M>, now: Instant) -> Result<(), Item<M>> {
        loop {
            match self.waiters.fit(item.size) {
                Fit::Free(id) => {
                    if self.waiters.hand(id, item, now) {
                        self.answer(id, None);
                    }
                    return Ok(());
                }
                Fit::Full(id) => self.answer(id, None),
                Fit::TooSmall(id) => {
                    self.answer(id, Some(item.message));
                    return Ok(());
                }
                Fit::None => return Err(item),
            }
        }
    }

    /// Who is to be answered because of what has happened around it, and why.
    fn due(&self, now: Instant) -> Option<(WaiterId, Why)> {
        let nothing = if self.up { Why::Waited } else { Why::Down };
        let filled = || {
            let quiet = self.quiet_at().is_none_or(|at| now >= at);
            let brisk = self.waiters.first_brisk_holder().filter(|_| quiet);
            brisk.or_else(|| self.waiters.first_holder().filter(|_| !self.up))
        };
        let over = || self.waiters.first_end().filter(|(end, _)| now >= *end).map(|(_, id)| id);
        let knows = || {
            let (id, joined) = self.waiters.first_impatient()?;
            (id < self.told || now >= self.known_at(joined)).then_some(id)
        };
        let drained = || self.waiters.first().filter(|_| self.draining && self.pull.is_none());
        filled()
            .map(|id| (id, Why::Filled))
            .or_else(|| over().or_else(knows).map(|id| (id, nothing)))
            .or_else(|| drained().map(|id| (id, Why::Draining)))
    }

    /// When whoever has some is not to wait for more. `None`: now.
    fn quiet_at(&self) -> Option<Instant> {
        self.pull.map_or(self.next.more_by, |pull| Some(pull.quiet_at()))
    }

    /// When somebody who wants what is there now, and has nothing, knows that there is nothing.
    fn known_at(&self, joined: Instant) -> Instant {
        let at_most = joined + NO_WAIT_AT_MOST;
        self.pull.map_or(at_most, |pull| at_most.min(pull.silent_at(joined)))
    }

    fn answer(&mut self, id: WaiterId, too_large: Option<M>) {
        let answer = self.take_out(id, Why::Filled, too_large);
        self.answers.extend(answer);
    }

    fn take_out(&mut self, id: WaiterId, why: Why, too_large: Option<M>) -> Option<Step<M>> {
        let items = self.waiters.remove(id)?.messages;
        let messages: Vec<M> = items.into_iter().map(|item| item.message).collect();
        let why = if messages.is_empty() { why } else { Why::Filled };
        Some(Step::Answer { waiter: id, messages, too_large, why })
    }

    /// Somebody has time left for a pull, or has been told nothing yet. For others none is issued:
    /// what it brought would come too late, and cost an attempt. (In a drain nobody is left.)
    fn wants_to_pull(&self, now: Instant) -> bool {
        let fresh = self.waiters.last().is_some_and(|last| last >= self.told);
        let in_time = self.waiters.last_end().is_some_and(|end| end >= now + SHORTEST_PULL);
        self.up && self.pull.is_none() && (fresh || in_time)
    }

    fn issue(&mut self, now: Instant, allowed: Allowance) -> Option<Step<M>> {
        let demand = self.demand(now);
        self.starved = demand.is_some() && (allowed.messages == 0 || allowed.bytes == 0);
        let demand = demand.filter(|_| !self.starved)?;
        let batch = demand.messages.min(allowed.messages);
        // Fewer messages leave more room to each.
        let max_bytes = demand.bytes.map(|_| self.max_bytes(batch).min(allowed.bytes));
        let limited = demand.bytes.is_some_and(|bytes| allowed.bytes < bytes);
        let asked = PullParams {
            batch,
            expires: self.expires(now).min(allowed.wait),
            mode: self.next.mode,
            short_of_bytes: limited,
            short: limited || batch < demand.messages,
            goes_on: self.next.more_by.is_some(),
        };
        self.issued += 1;
        let no = self.issued;
        self.pull = Some(Pull::new(no, asked, self.waiters.next(), now));
        let PullParams { expires, mode, .. } = asked;
        Some(Step::Pull { no, batch, expires, no_wait: !mode.plain, max_bytes })
    }

    fn expires(&self, now: Instant) -> Duration {
        let wait = self.waiters.last_end().map_or(NO_WAIT_PULL, |end| {
            let left = end.saturating_duration_since(now);
            left.saturating_sub(HEAD_START).clamp(SHORTEST_PULL, LONGEST_PULL)
        });
        wait.min(self.limits.max_expires)
    }

    /// The room of the waiters, less what each message takes beyond what JetStream counts. A single
    /// message that would have fitted without the others is pulled by its own, uncapped.
    fn max_bytes(&self, batch: u32) -> u64 {
        let room = self.waiters.room().saturating_sub(u128::from(u64::from(batch) * OVERHEAD));
        let most = self.limits.max_request_bytes.unwrap_or(u64::MAX).min(i64::MAX as u64);
        u64::try_from(room).unwrap_or(u64::MAX).min(most).max(1)
    }
}
