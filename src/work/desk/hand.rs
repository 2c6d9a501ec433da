//! The messages in hand, and the work on them. Pure.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
    time::{Duration, Instant},
};

use super::{
    held::{HeldMessage, HeldState, WorkOutcome},
    types::{DeskStep, SettledMessage},
    waits::Waits,
};
use crate::{
    limits::MOST_SETTLEMENTS,
    pb::{SettleError, Settlement, time},
    work::verdict::WorkVerdict,
};

/// The messages in hand, by keys that are never used again.
#[derive(Debug, Default)]
pub(super) struct Hand {
    held: BTreeMap<u64, HeldMessage>,
    /// The keys of all work that has not ended, also of lost messages.
    at_work: BTreeSet<u64>,
    last_key: u64,
    pub(super) steps: Vec<DeskStep>,
}

impl Hand {
    pub(super) fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    pub(super) fn at_work(&self) -> usize {
        self.at_work.len()
    }

    pub(super) fn holds(&self, key: u64) -> bool {
        self.held.contains_key(&key)
    }

    /// Whether a message is settled by this stream.
    pub(super) fn has(&self, stream: u64) -> bool {
        self.held.values().any(|held| held.stream == stream)
    }

    /// The keys of the work on messages that are held.
    pub(super) fn working(&self) -> impl Iterator<Item = u64> {
        self.at_work.iter().copied().filter(|key| self.held.contains_key(key))
    }

    pub(super) fn add(&mut self, held: HeldMessage) {
        self.last_key += 1;
        self.held.insert(self.last_key, held);
    }

    /// Gives back what has not begun. A Nak would end a last attempt, so that is only given back if `also_last`.
    pub(super) fn give_back_waiting(&mut self, now: Instant, also_last: bool) {
        for held in self.held.values_mut() {
            let is_waiting = matches!(held.state, HeldState::Waiting(_));
            if is_waiting && (also_last || !held.is_last_attempt) {
                held.give_back("the worker stops", now);
            }
        }
    }

    /// Begins to work on the oldest messages, while less than `width` are at work.
    pub(super) fn begin(&mut self, width: usize) {
        for (key, held) in &mut self.held {
            if self.at_work.len() >= width {
                return;
            }
            if let HeldState::Waiting(message) = &mut held.state {
                let message = mem::take(message);
                held.state = HeldState::Working;
                self.at_work.insert(*key);
                self.steps.push(DeskStep::Begin(*key, message));
            }
        }
    }

    /// The work has ended. If `giving_back`, a message that is not done goes back without a delay.
    pub(super) fn done(&mut self, now: Instant, key: u64, verdict: WorkVerdict, giving_back: bool) {
        self.at_work.remove(&key);
        let Some(held) = self.held.get_mut(&key) else { return };
        if giving_back && matches!(verdict, WorkVerdict::Nak { .. }) {
            held.give_back("the worker stops", now);
        } else {
            held.decide(verdict, now);
        }
    }

    /// The work could not begin.
    pub(super) fn unable(&mut self, now: Instant, key: u64, why: &str) {
        self.at_work.remove(&key);
        if let Some(held) = self.held.get_mut(&key) {
            held.give_back(why, now);
        }
    }

    /// A live stream keeps the leases of its messages until `ends`.
    pub(super) fn keep(&mut self, stream: u64, ends: Instant) {
        let mine = |held: &&mut HeldMessage| held.stream == stream && held.number != 0;
        self.held.values_mut().filter(mine).for_each(|held| held.ends = ends);
    }

    /// A stream has ended. Its messages are settled or extended by another stream, by token.
    pub(super) fn move_over(&mut self, now: Instant, from: u64, to: u64, ends: Instant) {
        for held in self.held.values_mut().filter(|held| held.stream == from) {
            if held.number != 0 {
                held.ends = ends;
            }
            (held.stream, held.number, held.sent, held.due) = (to, 0, None, now);
        }
    }

    /// How many messages a stream holds and is not asked to settle, and how much other work there is.
    pub(super) fn load(&self, stream: u64) -> (usize, usize) {
        let mine = |held: &&HeldMessage| held.stream == stream && held.number != 0;
        let here = self.held.values().filter(mine).filter(|held| held.sent.is_none()).count();
        let elsewhere = self.held.values().filter(|held| !mine(held) && held.is_open()).count();
        let lost = self.at_work.iter().filter(|key| !self.held.contains_key(key)).count();
        (here, elsewhere + lost)
    }

    /// The settlements and the Extends that are due on a stream, with their keys.
    pub(super) fn due(
        &mut self,
        now: Instant,
        stream: u64,
        grace: Duration,
    ) -> (Vec<u64>, Vec<Settlement>) {
        let due = |held: &HeldMessage| held.stream == stream && held.is_due(now);
        let due = self.held.iter_mut().filter(|(_, held)| due(held)).take(MOST_SETTLEMENTS);
        let settlement = |(key, held): (&u64, &mut HeldMessage)| {
            held.sent = Some(now);
            (*key, held.settlement(grace))
        };
        due.map(settlement).unzip()
    }

    /// A lease was extended by an Extend. The next is due after `beat`.
    pub(super) fn extended(&mut self, now: Instant, key: u64, lease: Duration, beat: Duration) {
        let Some(held) = self.held.get_mut(&key) else { return };
        held.ends = held.sent.take().unwrap_or(now) + lease;
        // A decision that was made meanwhile is due already.
        held.due = if held.is_open() { now + beat } else { now };
        held.tries = 0;
    }

    /// A settlement or an Extend was refused: for now, or because the lease is lost.
    pub(super) fn refused(
        &mut self,
        now: Instant,
        key: u64,
        error: &SettleError,
        waits: &mut Waits,
    ) {
        let Some(held) = self.held.get_mut(&key) else { return };
        let asked = error.retry_delay.as_ref().and_then(time::to_duration);
        if asked.is_none() && error.reason != "SETTLE_UNCONFIRMED" {
            return self.lose(key, &refusal(error));
        }
        (held.sent, held.due) = (None, now + waits.next(asked.unwrap_or_default(), held.tries));
        held.tries += 1;
    }

    pub(super) fn settle(&mut self, key: u64) {
        let Some(held) = self.held.remove(&key) else { return };
        if let HeldState::Decided(outcome, _, why) = &held.state {
            self.report(key, &held, *outcome, why.clone());
        }
    }

    pub(super) fn lose(&mut self, key: u64, why: &str) {
        let Some(held) = self.held.remove(&key) else { return };
        if self.at_work.contains(&key) {
            self.steps.push(DeskStep::EndWork(key));
        }
        self.report(key, &held, WorkOutcome::Lost, why.to_owned());
    }

    /// The lease of the message with this number has ended.
    pub(super) fn lose_number(&mut self, stream: u64, number: u64, why: &SettleError) {
        let is_it = |held: &HeldMessage| held.stream == stream && held.number == number;
        let key = self.held.iter().find(|(_, held)| is_it(held)).map(|(key, _)| *key);
        if let Some(key) = key {
            self.lose(key, &refusal(why));
        }
    }

    pub(super) fn lose_lapsed(&mut self, now: Instant) {
        let lapsed = self.held.iter().filter(|(_, held)| now >= held.gives_up_at());
        for key in lapsed.map(|(key, _)| *key).collect::<Vec<_>>() {
            self.lose(key, "the end of the lease has passed");
        }
    }

    pub(super) fn lose_all(&mut self, why: &str) {
        for key in self.held.keys().copied().collect::<Vec<_>>() {
            self.lose(key, why);
        }
    }

    /// When the first lease ends, or the first settlement is due on an open stream.
    pub(super) fn wake(&self, now: Instant, is_open: impl Fn(u64) -> bool) -> Option<Instant> {
        let times = self.held.values().flat_map(|held| {
            let waits = held.sent.is_none() && held.due > now && is_open(held.stream);
            [Some(held.gives_up_at()), waits.then_some(held.due)]
        });
        times.flatten().min()
    }

    fn report(&mut self, key: u64, held: &HeldMessage, outcome: WorkOutcome, why: String) {
        let HeldMessage { subject, sequence, attempt, .. } = held;
        let (subject, sequence, attempt) = (subject.clone(), *sequence, *attempt);
        let settled = SettledMessage { key, outcome, subject, sequence, attempt, why };
        self.steps.push(DeskStep::Settled(settled));
    }
}

fn refusal(error: &SettleError) -> String {
    format!("{}: {}", error.reason, error.message)
}
