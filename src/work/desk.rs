//! The state of a worker over Consume: its streams, the messages in hand, and what is to be done next. Pure: time is an
//! argument, and [`Desk::steps`] says what to do.
//!
//! ```text
//!   a message    waiting ── at work ── decided ── settled
//!                   └──────────┴──────────┴────── lost: the work ends, and nothing is settled
//! ```
//!
//! 1. Never more than `jobs` messages are at work. A lost message counts until its work has ended.
//! 2. The work on a message begins once.
//! 3. A message is lost when the proxy says so, or when the end of its lease has passed by our clock.
//! 4. No message of a stopping worker begins, unless it is on its last attempt.
//! 5. Everything in hand is settled or lost before the desk is over.

mod gate;
mod hand;
mod held;
mod stream;
mod types;
mod waits;

use std::{
    collections::BTreeMap,
    mem,
    time::{Duration, Instant},
};

use self::{gate::Gate, hand::Hand, held::HeldMessage, stream::WorkStream, waits::Waits};
pub use self::{
    held::WorkOutcome,
    types::{DeskPlan, DeskStep, SettledMessage},
};
use crate::{
    client::Refused,
    pb::{
        ConsumeIdle, ConsumeRequest, ConsumeResponse, ConsumeResult, ConsumeSettle, Delivery,
        EmptyReason, Outcome, SettleResult, time,
    },
    work::verdict::WorkVerdict,
};

/// A stream without a frame for so many heartbeats is dead.
const MISSED_BEATS: u32 = 3;
/// Heartbeats in a grace. A stream that is dead is noticed after half of its grace, so half is left for the next stream.
const BEATS_OF_A_GRACE: u32 = 6;
/// The shortest and the longest heartbeat.
const BEATS: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];
/// Most bytes of messages in hand. The proxy allows no more.
const CREDIT_BYTES: u64 = 64 * 1024 * 1024;
/// How long a worker that ends on an empty queue waits for a proxy or for NATS.
const UNSERVED_PATIENCE: Duration = Duration::from_secs(30);
/// How often in a row a worker that was served tries to read its files.
const PATIENT_TRIES: u32 = 10;

/// How far the stop of a worker is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stopping {
    No,
    /// The work ends by itself.
    Gently,
    /// The work is being ended, and its messages go back.
    GivingBack,
}

/// The state of a worker.
#[derive(Debug)]
pub struct Desk {
    plan: DeskPlan,
    beat: Duration,
    next_beat: Instant,
    stopping: Stopping,
    failure: Option<String>,
    streams: BTreeMap<u64, WorkStream>,
    /// The stream that is open, or will be next.
    current: u64,
    /// When to open the current stream, if it is not open.
    open_at: Option<Instant>,
    /// Streams in a row that were not served.
    tries: u32,
    was_served: bool,
    /// When the proxy last told something about the queue.
    useful_at: Instant,
    hand: Hand,
    taken: u64,
    gate: Gate,
    waits: Waits,
    steps: Vec<DeskStep>,
}

impl Desk {
    /// A worker that begins now.
    pub fn new(plan: DeskPlan, now: Instant) -> Self {
        let [shortest, longest] = BEATS;
        let beat = (plan.grace / BEATS_OF_A_GRACE).clamp(shortest, longest);
        Self {
            beat,
            next_beat: now + beat,
            waits: Waits::new(plan.seed),
            plan,
            stopping: Stopping::No,
            failure: None,
            streams: BTreeMap::new(),
            current: 1,
            open_at: Some(now),
            tries: 0,
            was_served: false,
            useful_at: now,
            hand: Hand::default(),
            taken: 0,
            gate: Gate::default(),
            steps: Vec::new(),
        }
    }

    /// Why the worker cannot continue, if it cannot.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// The number of messages at work.
    pub fn at_work(&self) -> usize {
        self.hand.at_work()
    }

    /// Whether the message of this key is neither settled nor lost.
    pub fn holds(&self, key: u64) -> bool {
        self.hand.holds(key)
    }

    /// Whether everything is done.
    pub fn is_over(&self) -> bool {
        let is_told = self.stopping > Stopping::No || self.failure.is_some();
        is_told && self.streams.is_empty() && self.hand.is_empty() && self.hand.at_work() == 0
    }

    /// Takes no more messages. The work that has begun continues.
    pub fn stop(&mut self, now: Instant) {
        self.stopping = self.stopping.max(Stopping::Gently);
        self.hand.give_back_waiting(now, false);
        let is_idle = self.hand.is_empty();
        let unserved = self.streams.iter().filter(|(_, stream)| is_idle && !stream.is_served);
        for id in unserved.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.drop_stream(id);
        }
    }

    /// Ends all work, and gives its messages back.
    pub fn give_back(&mut self, now: Instant) {
        self.stop(now);
        self.stopping = Stopping::GivingBack;
        self.hand.give_back_waiting(now, true);
        self.steps.extend(self.hand.working().map(DeskStep::EndWork));
    }

    /// Forgets everything that has no answer. Messages in hand come back when their leases end.
    pub fn give_up(&mut self) {
        self.fail("the worker was stopped before all of its messages were settled".to_owned());
    }

    /// Takes a frame of the proxy.
    pub fn frame(&mut self, now: Instant, id: u64, frame: ConsumeResponse) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        stream.hear(now, frame.credit_id);
        self.was_served = true;
        let ends = now + self.plan.grace;
        self.hand.keep(id, ends);
        for result in frame.results {
            self.note_results(now, id, result);
        }
        for ended in frame.ended {
            let why = ended.why.unwrap_or_default();
            self.hand.lose_number(id, ended.number, &why);
        }
        for message in frame.messages {
            self.take(now, id, message, ends);
        }
        for rejected in frame.rejected {
            self.hand.add(HeldMessage::of_rejected(id, rejected, now, ends));
        }
        if frame.draining.is_some() && id == self.current {
            self.note("the proxy ends this stream soon, and the next is opened".to_owned());
            self.next_stream(now);
        }
        if let Some(idle) = frame.idle.filter(|_| id == self.current) {
            self.note_idle(now, idle);
        }
    }

    /// A stream has ended: in order, or for a reason.
    pub fn ended(&mut self, now: Instant, id: u64, refused: Option<Refused>) {
        let Some(stream) = self.streams.remove(&id) else { return };
        if id == self.current {
            self.next_stream(now);
            self.tries = if stream.is_served { 0 } else { self.tries };
            if let Some(why) = refused.as_ref().and_then(|why| self.is_final(&stream, why)) {
                return self.fail(why);
            }
            let asked = refused.as_ref().and_then(|refused| refused.retry_delay);
            let wait = self.waits.next(asked.unwrap_or_default(), self.tries);
            self.open_at = Some(now + wait);
            if let Some(Refused { reason, message, .. }) = refused {
                self.tries += 1;
                let seconds = wait.as_secs_f64();
                self.note(format!("{reason}: {message}; the next try is in {seconds:.1} s"));
            }
        }
        // The proxy keeps these for the grace, counted from the end that it has seen.
        self.hand.move_over(now, id, self.current, stream.heard + self.plan.grace);
    }

    /// The work on a message has ended. `is_reached` says whether its place was reached, if it has one.
    pub fn done(&mut self, now: Instant, key: u64, verdict: WorkVerdict, is_reached: Option<bool>) {
        if let Some(closed) = is_reached.and_then(|is_reached| self.gate.learn(now, is_reached)) {
            let seconds = closed.as_secs_f64();
            self.note(format!("no message begins for {seconds:.1} s, because the server is away"));
        }
        self.hand.done(now, key, verdict, self.stopping == Stopping::GivingBack);
    }

    /// The work on a message could not begin, and no other work could. The message goes back.
    pub fn unable(&mut self, now: Instant, key: u64, why: &str) {
        self.hand.unable(now, key, why);
        self.stop(now);
    }

    /// When to ask for the steps again, if nothing happens before.
    pub fn wake(&self, now: Instant) -> Instant {
        let hand = self.hand.wake(now, |stream| self.streams.contains_key(&stream));
        let times = [hand, self.open_at, self.gate.opens_at(now), Some(self.next_beat)];
        times.into_iter().flatten().min().unwrap_or(self.next_beat)
    }

    /// The steps that are due now.
    pub fn steps(&mut self, now: Instant) -> Vec<DeskStep> {
        let is_beat = now >= self.next_beat;
        if is_beat {
            self.next_beat = now + self.beat;
        }
        self.end_silent(now);
        self.hand.lose_lapsed(now);
        self.open(now);
        let width = self.gate.width(now, self.plan.jobs as usize);
        self.hand.begin(width);
        for id in self.streams.keys().copied().collect::<Vec<_>>() {
            self.write(now, id, is_beat);
        }
        self.steps.append(&mut self.hand.steps);
        mem::take(&mut self.steps)
    }

    /// Whether a refusal ends the worker, and why.
    fn is_final(&self, stream: &WorkStream, refused: &Refused) -> Option<String> {
        let Refused { reason, message, retry_delay: None } = refused else { return None };
        let is_stale = match &**reason {
            // The file may have a newer credential.
            "UNAUTHENTICATED" => stream.is_served,
            // Somebody may write the file at this moment.
            "CLIENT_FILE" => self.was_served && self.tries < PATIENT_TRIES,
            _ => false,
        };
        (!is_stale).then(|| format!("{reason}: {message}"))
    }

    fn end_silent(&mut self, now: Instant) {
        let silence = self.beat * MISSED_BEATS;
        let is_dead = |stream: &WorkStream| stream.is_served && now > stream.heard + silence;
        let dead = self.streams.iter().filter(|(_, stream)| is_dead(stream)).map(|(id, _)| *id);
        for id in dead.collect::<Vec<_>>() {
            self.steps.push(DeskStep::Drop(id));
            let refused = Refused {
                reason: "SILENT".to_owned(),
                message: format!("the proxy has sent nothing for {silence:?}"),
                retry_delay: Some(Duration::ZERO),
            };
            self.ended(now, id, Some(refused));
        }
        if !self.hand.is_empty() {
            self.useful_at = now;
        }
        let is_waiting = self.plan.until_empty && self.stopping == Stopping::No;
        if is_waiting && now > self.useful_at + UNSERVED_PATIENCE {
            self.fail(format!("the consumer cannot be read for {UNSERVED_PATIENCE:?}"));
        }
    }

    fn open(&mut self, now: Instant) {
        let is_wanted = self.stopping == Stopping::No || !self.hand.is_empty();
        if !is_wanted || self.failure.is_some() {
            self.open_at = None;
        }
        if self.open_at.is_some_and(|at| at <= now) {
            self.open_at = None;
            self.streams.insert(self.current, WorkStream::new(now));
            self.steps.push(DeskStep::Open(self.current));
        }
    }

    /// The credit of the current stream, after everything that is sent is settled.
    fn credit(&self, now: Instant) -> u32 {
        if self.stopping > Stopping::No {
            return 0;
        }
        let (here, elsewhere) = self.hand.load(self.current);
        let jobs = self.gate.width(now, self.plan.jobs as usize);
        let free = jobs.saturating_sub(elsewhere) as u64;
        let left = self.plan.max.map_or(u64::MAX, |max| max.saturating_sub(self.taken));
        u32::try_from(free.min(left.saturating_add(here as u64))).unwrap_or(u32::MAX)
    }

    fn write(&mut self, now: Instant, id: u64, is_beat: bool) {
        let Some(stream) = self.streams.get(&id).filter(|stream| !stream.is_half_closed) else {
            return;
        };
        let mut frame = ConsumeRequest::default();
        if !stream.is_started {
            frame.start = Some(self.plan.start(self.beat));
        }
        let (keys, settlements) = self.hand.due(now, id, self.plan.grace);
        let stopping = self.stopping > Stopping::No;
        let leases = if id == self.current { Some(self.credit(now)) } else { None };
        let leases = leases.or(stopping.then_some(0));
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let credit = leases.and_then(|leases| stream.credit(leases, CREDIT_BYTES));
        match &mut frame.start {
            Some(start) => (stream.is_started, start.credit) = (true, credit),
            None => frame.credit = credit,
        }
        if !settlements.is_empty() {
            let id = stream.send(keys);
            frame.settle = Some(ConsumeSettle { id, settlements, ..ConsumeSettle::default() });
        }
        if is_beat || frame != ConsumeRequest::default() {
            self.steps.push(DeskStep::Send(id, frame));
        }
        if stopping && !self.hand.has(id) && stream.is_paused() && stream.sent.is_empty() {
            stream.is_half_closed = true;
            self.steps.push(DeskStep::HalfClose(id));
        }
    }

    fn next_stream(&mut self, now: Instant) {
        self.current += 1;
        self.open_at = Some(now);
    }

    fn take(&mut self, now: Instant, id: u64, message: Delivery, ends: Instant) {
        self.taken += 1;
        self.useful_at = now;
        let mut held = HeldMessage::new(id, message, now, ends);
        let is_surplus = self.plan.max.is_some_and(|max| self.taken > max);
        let is_late = self.stopping > Stopping::No && !held.is_last_attempt;
        if is_surplus || is_late || self.stopping == Stopping::GivingBack {
            held.give_back("the worker stops", now);
        }
        self.hand.add(held);
        if self.plan.max.is_some_and(|max| self.taken == max) {
            self.stopping = self.stopping.max(Stopping::Gently);
        }
    }

    fn note_idle(&mut self, now: Instant, idle: ConsumeIdle) {
        let reason = idle.reason();
        if reason != EmptyReason::NatsUnavailable {
            self.useful_at = now;
        }
        let is_empty = matches!(reason, EmptyReason::NoMessages | EmptyReason::Paused);
        if self.plan.until_empty && is_empty {
            self.stop(now);
        }
    }

    fn note_results(&mut self, now: Instant, id: u64, result: ConsumeResult) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let keys = stream.sent.remove(&result.id).unwrap_or_default();
        let failed = |error| SettleResult { error: Some(error), ..SettleResult::default() };
        let results = match result.error {
            Some(error) => vec![failed(error); keys.len()],
            None => result.results,
        };
        for (key, result) in keys.into_iter().zip(results) {
            let lease = result.lease.as_ref().and_then(time::to_duration);
            match &result.error {
                Some(error) => self.hand.refused(now, key, error, &mut self.waits),
                None if result.outcome() == Outcome::Extended => {
                    self.hand.extended(now, key, lease.unwrap_or_default(), self.beat);
                }
                None => self.hand.settle(key),
            }
        }
    }

    fn fail(&mut self, why: String) {
        self.hand.lose_all(&why);
        for id in self.streams.keys().copied().collect::<Vec<_>>() {
            self.drop_stream(id);
        }
        self.open_at = None;
        self.failure.get_or_insert(why);
    }

    fn note(&mut self, text: String) {
        self.steps.push(DeskStep::Note(text));
    }

    fn drop_stream(&mut self, id: u64) {
        self.streams.remove(&id);
        self.steps.push(DeskStep::Drop(id));
    }
}
