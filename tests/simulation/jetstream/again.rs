//! The line of messages to deliver again, and the timer that puts expired messages there.

use std::{collections::VecDeque, time::Duration};

use super::{
    config::Config,
    state::State,
    types::{BEFORE, Time},
};

/// The timer fires this much after an ack wait, so that messages of one moment expire together
/// (consumer.go: ackWaitDelay).
const DELAY: Duration = Duration::from_millis(1);
/// A delayed Nak lets the timer fire after this time (consumer.go:3306).
const AFTER_NAK: Duration = Duration::from_millis(10);
/// A change of the ack wait lets the timer fire after this time (consumer.go:2645).
const AFTER_CHANGE: Duration = Duration::from_millis(100);

#[derive(Default)]
pub struct Again {
    line: VecDeque<u64>,
    timer: Option<Time>,
}

impl Again {
    pub fn len(&self) -> usize {
        self.line.len()
    }

    /// Puts a message at the end of the line, if it is not in the line yet.
    pub fn push(&mut self, sequence: u64) {
        if !self.line.contains(&sequence) {
            self.line.push_back(sequence);
        }
    }

    pub fn pop(&mut self) -> Option<u64> {
        self.line.pop_front()
    }

    pub fn remove(&mut self, sequence: u64) {
        self.line.retain(|other| *other != sequence);
    }

    /// A purge or the loss of the leader empties the line, but does not stop the timer.
    pub fn clear(&mut self) {
        self.line.clear();
    }

    /// Sets the timer for a delivery, if it is to fire earlier than it is set (trackPending).
    pub fn delivered(&mut self, wait: Duration, now: Time) {
        let due = now + wait + DELAY;
        self.timer = Some(self.timer.map_or(due, |timer| timer.min(due)));
    }

    pub fn nacked_with_delay(&mut self, now: Time) {
        self.timer = self.timer.map(|_| now + AFTER_NAK);
    }

    pub fn wait_changed(&mut self, now: Time) {
        self.timer = self.timer.map(|_| now + AFTER_CHANGE);
    }

    /// A new leader, or a server that has started, looks at everything at once (consumer.go:1909).
    pub fn start(&mut self, now: Time) {
        self.line.clear();
        self.timer = Some(now);
    }

    pub fn next_due(&self) -> Option<Time> {
        self.timer
    }

    /// Moves expired messages to the end of the line, in the order of the stream, if the timer has fired.
    /// Returns the messages whose attempts are over (checkPending).
    pub fn check(&mut self, state: &mut State, config: &Config, now: Time) -> Vec<u64> {
        if self.timer.is_none_or(|timer| timer > now) {
            return Vec::new();
        }
        let longest = config.backoff.last().copied().unwrap_or(config.ack_wait + DELAY);
        let (mut next, mut over, mut expired) = (longest, Vec::new(), Vec::new());
        for (sequence, pending) in &state.pending {
            let attempts = state.attempts(*sequence);
            let due = (pending.began + config.wait(attempts)).saturating_sub(BEFORE);
            if now < due {
                next = next.min(due - now);
            } else if !self.line.contains(sequence) {
                // The server counts repetitions here, and a first attempt as one (deliveryCount). So a limit
                // of one ends here, and a limit above, if it was not lowered, when a pull asks.
                let counted = attempts.saturating_sub(1).max(1);
                let last = config.max_deliver.is_some_and(|most| counted >= most);
                if last { over.push(*sequence) } else { expired.push(*sequence) }
            }
            if !config.backoff.is_empty() {
                next = next.min(config.wait(attempts + 1));
            }
        }
        // The expired ones count from now, and keep their distances (checkPending).
        if let Some(first) = expired.first() {
            let shift = (now + BEFORE).saturating_sub(state.pending[first].began);
            for sequence in &expired {
                if let Some(pending) = state.pending.get_mut(sequence) {
                    pending.began += shift;
                }
            }
        }
        self.line.extend(&expired);
        let pending = state.pending.len() > over.len();
        if !pending {
            self.line.clear();
        }
        self.timer = pending.then_some(now + next);
        over
    }
}
