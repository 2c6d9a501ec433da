//! The pump: how much to pull for all open Fetch calls of one consumer, and which call gets which message.
//!
//! ```text
//!   join ──▶ waiters, first come first served ──▶ answers
//!                │ wants           ▲ messages
//!   step ──▶     ▼                 │
//!            NO PULL ──issue──▶ OPEN, got < batch ──end, full, unheard, down──▶ NO PULL
//!                                  │ surplus, and answers that nobody took
//!                                  ▼
//!                               parked ──▶ the next waiter, or overdue
//! ```
//! A pull cannot be cancelled, and its messages for a waiter that has left would wait for a whole ack wait.
//! So there is one pull at a time, for no more than its waiters still want. If a waiter leaves, the next
//! waiter gets its messages. Surplus is parked for a moment before it is given back. Waiters gather while a
//! pull is open, so the next pull is as large as it can be.
//!
//! A pull asks with `no_wait` and `expires`. JetStream waits for a first message, sends the messages that
//! are available, and sends the end of the pull. Two kinds of pull have no such end. A full batch is
//! counted. At `max_ack_pending`, a pull ends when no message has come for a while. A pull may be allowed
//! less than its waiters want. If it reaches that limit, the next pull follows at once, and waiters that
//! have messages wait for it. An answer can be filled from several pulls.
//!
//! A flow is a caller that stays. It has credit for messages that it holds at the same time. A message goes to
//! whoever has waited for longest among the waiters and the flows that hold nothing. Only if there is nobody, it
//! goes to a flow that holds something and has room: a buffer is filled while nobody is idle. If flows alone
//! want messages, their pull has no `no_wait`. It stays open for its whole batch, so a trickle needs no pull for
//! each message.
//!
//! 1. Every message that arrives is in one place: with a waiter, in an answer, with a flow, parked, or overdue.
//! 2. At most one pull is open.
//! 3. A waiter is answered once.
//! 4. The messages of an answer never exceed its bytes. A `too_large` message would not fit even alone.
//! 5. First come, first served: a message goes to the first waiter it fits, among the first 64, or to the idle
//!    flow that was handed a message before that waiter came.
//! 6. While somebody waits, a pull is open. There are four exceptions: no connection, no allowance, a
//!    refusal a moment ago, or only waiters with little time left that had a pull which brought nothing.
//! 7. After `step` has nothing more to do, `next_deadline` is later than `now`.
//! 8. A flow is handed a message only if it has room: it is not stalled, and holds less than its credit in messages
//!    and in bytes. A flow that holds something is handed none that a waiter or an idle flow can take.
//! 9. A pull without `no_wait` for several messages is issued only if no waiter wants one, for no more than the room
//!    that the flows have, or will have once the settlements under way have ended, less what is parked. While a flow
//!    has room, a pull is open, or follows after 1 ms, with the exceptions of 6.
//!
//! Pure: no clock, no runtime, no lock, no log. `now` is an argument and never goes back. The caller performs
//! the [`Step`]s. Except for [`Pump::fail`], no call costs more for many waiters than for few.

mod appetite;
mod bound;
mod budget;
mod demand;
mod flows;
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
    types::{
        Allowance, Credit, Demand, FlowId, PullLimits, PullOutcome, Step, WaiterId, Want, Why,
    },
};
use self::{
    flows::Flows,
    parked::Parked,
    pull::{NextPull, Pull},
    waiters::{Fit, Waiters},
};

/// A pull ends this long before its last waiter does, so that the end arrives in time.
const HEAD_START: Duration = Duration::from_millis(50);
/// The shortest wait of a pull.
pub const SHORTEST_PULL: Duration = Duration::from_millis(100);
/// The longest wait of a pull. It bounds a drain, and a pull that hangs at `max_ack_pending`.
const LONGEST_PULL: Duration = Duration::from_secs(5);
/// The wait of a pull whose waiters all want only the messages that are available now.
const NO_WAIT_PULL: Duration = Duration::from_millis(50);
/// The longest time to an answer for a waiter that wants only the messages that are available now.
const NO_WAIT_AT_MOST: Duration = Duration::from_secs(1);
/// The bytes of a message in an answer that JetStream does not count: its token and its fields.
const OVERHEAD: u64 = 600;

/// The pump of one consumer. See the [module](self).
#[derive(Debug)]
pub struct Pump<M> {
    limits: PullLimits,
    waiters: Waiters<M>,
    flows: Flows<M>,
    parked: Parked<M>,
    /// Answers that are decided and that `step` has not returned yet.
    answers: VecDeque<Step<M>>,
    pull: Option<Pull>,
    issued: u64,
    next: NextPull,
    /// All earlier waiters have waited for a pull that brought every available message.
    answered_before: WaiterId,
    up: bool,
    draining: bool,
    starved: bool,
}

/// A message with the facts that decide its place.
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
            flows: Flows::new(),
            parked: Parked::new(),
            answers: VecDeque::new(),
            pull: None,
            issued: 0,
            next: NextPull::default(),
            answered_before: WaiterId(0),
            up: false,
            draining: false,
            starved: false,
        }
    }

    /// Sets new bounds of the consumer. They hold from the next pull on.
    pub fn set_limits(&mut self, limits: PullLimits) {
        self.limits = limits;
    }

    /// Adds an open Fetch.
    pub fn join(&mut self, want: Want, now: Instant) -> WaiterId {
        self.waiters.join(want, now)
    }

    /// Removes a waiter that has left. Its messages go to the next waiter, and the pull stays as it is. A
    /// waiter that is already answered is no longer here: its answer comes back by [`Pump::unhanded`].
    pub fn leave(&mut self, id: WaiterId, now: Instant) {
        if let Some(waiter) = self.waiters.remove(id) {
            self.parked.push_front(waiter.messages, now + self.limits.park);
        }
    }

    /// A message has arrived. `size` is an upper bound of its bytes in an answer.
    pub fn arrived(&mut self, message: M, size: u64, last_attempt: bool, now: Instant) {
        if let Some(pull) = &mut self.pull
            && pull.count(now)
        {
            self.next = pull.full(now);
            self.pull = None;
            self.flows.pull_ended(now);
        }
        self.serve_parked(now);
        if let Err(item) = self.give(Item { message, size, last_attempt }, now) {
            self.parked.push_back(item, now + self.limits.park);
        }
    }

    /// Takes back an answer that nobody took: for each message its size, and whether it is a last attempt.
    /// These messages are the first for the next waiter.
    pub fn unhanded(&mut self, messages: Vec<(M, u64, bool)>, now: Instant) {
        self.park_first(messages, now + self.limits.park);
    }

    /// The same for an answer that its waiter had and gave back. A waiter of another replica may want the messages, so
    /// they are parked for a quarter of the time.
    pub fn returned(&mut self, messages: Vec<(M, u64, bool)>, now: Instant) {
        self.park_first(messages, now + self.limits.park / 4);
    }

    fn park_first(&mut self, messages: Vec<(M, u64, bool)>, until: Instant) {
        let items = messages.into_iter();
        let items = items.map(|(message, size, last_attempt)| Item { message, size, last_attempt });
        self.parked.push_front(items.collect(), until);
    }

    /// A pull has ended. The end of an older pull is ignored.
    pub fn ended(&mut self, no: u64, end: PullOutcome, now: Instant) {
        let Some(pull) = self.pull.take_if(|pull| pull.no == no) else { return };
        self.next = pull.next(end, now);
        self.flows.pull_ended(now);
        if end == PullOutcome::Done {
            self.answered_before = pull.waiters_before;
        }
    }

    /// There is a connection, and nothing is pulled on it yet.
    pub fn up(&mut self, _now: Instant) {
        (self.up, self.pull, self.next) = (true, None, NextPull::default());
    }

    /// The connection is lost, and the open pull with it.
    pub fn down(&mut self, _now: Instant) {
        (self.up, self.pull, self.next) = (false, None, NextPull::default());
    }

    /// Pulls nothing more. Waiters are answered, and flows are over, when the open pull has ended.
    pub fn drain(&mut self, _now: Instant) {
        self.draining = true;
    }

    /// Removes all waiters, and the caller answers them with an error. Their messages go to the next
    /// waiters. Answers that are already decided stay.
    pub fn fail(&mut self, now: Instant) -> Vec<WaiterId> {
        let (ids, items) = self.waiters.remove_all();
        self.parked.push_front(items, now + self.limits.park);
        ids
    }

    /// Removes all parked messages.
    pub fn take_parked(&mut self) -> Vec<M> {
        self.parked.take_all()
    }

    /// Returns the next step. The caller calls it after every event and at [`Pump::next_deadline`], until it
    /// returns `None`. `allowed` bounds the pull, if a pull is due.
    pub fn step(&mut self, now: Instant, allowed: Allowance) -> Option<Step<M>> {
        if let Some(pull) = self.pull.filter(|pull| now >= pull.ends_at) {
            self.ended(pull.no, PullOutcome::Done, now);
        }
        self.serve_parked(now);
        if let Some((flow, items)) = self.flows.pop_handed() {
            let messages = items.into_iter().map(|item| (item.message, item.size)).collect();
            return Some(Step::Deliver { flow, messages });
        }
        if let Some(answer) = self.answers.pop_front() {
            return Some(answer);
        }
        if let Some((id, why)) = self.due(now) {
            return self.take_out(id, why, None);
        }
        if let Some(message) = self.parked.pop_overdue(now) {
            return Some(Step::Overdue { message });
        }
        if self.draining
            && self.pull.is_none()
            && let Some(flow) = self.flows.first()
        {
            self.flows.close(flow);
            return Some(Step::Over { flow });
        }
        self.issue(now, allowed)
    }

    /// The time at which [`Pump::step`] has something to do if nothing else happens. The caller itself waits
    /// for a missing allowance.
    pub fn next_deadline(&self, now: Instant) -> Option<Instant> {
        let brisk = self.waiters.first_brisk_holder();
        let retry = self.next.not_before.filter(|at| now < *at && self.wants_to_pull(now));
        let for_flows = self.flows_want().then(|| self.flows_pull_at(now)).flatten();
        [
            self.pull.map(|pull| pull.ends_at),
            self.quiet_at().filter(|_| brisk.is_some()),
            self.waiters.first_end().map(|(end, _)| end),
            self.waiters.first_impatient().map(|(_, joined)| self.known_at(joined)),
            self.parked.next_deadline(),
            retry,
            for_flows.filter(|at| now < *at),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    /// Whether a pull is open.
    pub fn has_pull(&self) -> bool {
        self.pull.is_some()
    }

    /// Whether there is no waiter, no flow, no parked message and no pull.
    pub fn is_idle(&self) -> bool {
        let nobody = self.waiters() == 0 && self.flows.is_empty();
        nobody && self.parked() == 0 && self.pull.is_none()
    }

    /// The number of open calls.
    pub fn waiters(&self) -> usize {
        self.waiters.len() + self.answers.len()
    }

    /// The number of flows.
    pub fn flows(&self) -> usize {
        self.flows.len()
    }

    /// The number of messages that the waiters and the flows still want.
    pub fn wanted(&self) -> usize {
        let wanted = self.waiters.wanted().saturating_add(self.wanted_by_flows());
        usize::try_from(wanted).unwrap_or(usize::MAX)
    }

    /// The number of messages that the open pull may still bring.
    pub fn pulled(&self) -> usize {
        self.pull.map_or(0, |pull| pull.left())
    }

    /// The number of parked messages.
    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// Whether a pull was due at the last [`Pump::step`] and had no allowance.
    pub fn starved(&self) -> bool {
        self.starved
    }

    fn serve_parked(&mut self, now: Instant) {
        while (!self.waiters.is_empty() || self.flows.have_room())
            && let Some(mut parked) = self.parked.pop()
        {
            match self.give(parked.item, now) {
                Ok(()) => {}
                Err(item) => {
                    parked.item = item;
                    return self.parked.put_back(parked);
                }
            }
        }
    }

    /// Gives a message to the first waiter it fits, or to the flow that is before it in line. A waiter that has
    /// messages, and too little room for this one, is full and is answered. If the message fits nobody, the first
    /// waiter it could never fit is answered with it as too large.
    fn give(&mut self, item: Item<M>, now: Instant) -> Result<(), Item<M>> {
        loop {
            let fit = self.waiters.fit(item.size);
            let idle = self.flows.first_idle();
            let flow = match (fit, idle) {
                (Fit::Fits(id) | Fit::NextIsFull(id), Some((turn, flow))) if turn < id => {
                    Some(flow)
                }
                (Fit::Fits(_) | Fit::NextIsFull(_), _) => None,
                (Fit::TooLarge(_) | Fit::Nobody, Some((_, flow))) => Some(flow),
                (Fit::TooLarge(_) | Fit::Nobody, None) => self.flows.first_filling(),
            };
            if let Some(flow) = flow {
                let turn = self.waiters.turn();
                self.flows.hand(flow, item, turn, now);
                return Ok(());
            }
            match fit {
                Fit::Fits(id) => {
                    if self.waiters.hand(id, item, self.limits.linger, now) {
                        self.answer(id, None);
                    }
                    return Ok(());
                }
                Fit::NextIsFull(id) => self.answer(id, None),
                Fit::TooLarge(id) => {
                    self.answer(id, Some(item.message));
                    return Ok(());
                }
                Fit::Nobody => return Err(item),
            }
        }
    }

    /// The waiter that must be answered now, and the reason.
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
            (id < self.answered_before || now >= self.known_at(joined)).then_some(id)
        };
        let drained = || self.waiters.first().filter(|_| self.draining && self.pull.is_none());
        filled()
            .map(|id| (id, Why::Filled))
            .or_else(|| over().or_else(knows).map(|id| (id, nothing)))
            .or_else(|| drained().map(|id| (id, Why::Draining)))
    }

    /// The time until which a waiter with messages waits for more. `None`: it does not wait.
    fn quiet_at(&self) -> Option<Instant> {
        self.pull.map_or(self.next.more_by, |pull| Some(pull.quiet_at()))
    }

    /// The time at which a waiter that does not wait, and has no message, is answered.
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
}
