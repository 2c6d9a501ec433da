//! One lease of the reference: its clocks, computed from their history whenever they are asked.

use fetch_proxy::lease::SettleKind;

/// A server that restarts cuts stored times to whole seconds.
const RESTORED_TIME_TRUNCATION: i64 = 1000;
/// A server that forgets may lose confirmations that are younger than this.
const UNPERSISTED_WINDOW: i64 = 250;

/// When the start of a clock was stored that is not.
pub(super) const NEVER: i64 = i64::MAX / 2;

/// How a lease stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Held,
    Settling(SettleKind, Tries),
    Uncertain(SettleKind),
}

/// Whether a settlement under way is the first of its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tries {
    First,
    Again,
}

/// How long its holder may keep it.
#[derive(Debug, Clone, Copy)]
pub(super) enum Until {
    /// But not beyond this.
    JetStreamEnds(i64),
    At(i64),
    /// At most until then, and this much longer than the stream of its holder.
    Kept(i64, i64),
    Taken,
}

#[derive(Debug, Clone)]
pub(super) struct Lease {
    pub(super) id: u64,
    pub(super) consumer: u32,
    pub(super) state: State,
    pub(super) sequence: u64,
    pub(super) consumer_sequence: u64,
    pub(super) delivery_count: u64,
    pub(super) last_attempt: bool,
    pub(super) ack_wait: i64,
    /// Each start of JetStream's clock, and when it was stored. A delivery's own never is: what is
    /// stored in its place is when its message was published, and that comes first.
    pub(super) starts: Vec<(i64, i64)>,
    pub(super) doubted: bool,
    pub(super) lost: bool,
    pub(super) until: Until,
    /// `None` is as long as JetStream waits.
    pub(super) granted: Option<i64>,
    pub(super) tried: i64,
}

impl Lease {
    fn start(&self) -> i64 {
        self.starts.last().unwrap().0 - if self.doubted { RESTORED_TIME_TRUNCATION } else { 0 }
    }

    pub(super) fn ack_by(&self) -> i64 {
        if self.lost {
            return 0;
        }
        self.start() + self.ack_wait - margin(self.ack_wait)
    }

    /// The earliest time at which the message can go to somebody else.
    pub(super) fn settle_by(&self, now: i64) -> i64 {
        let end = match self.until {
            Until::Kept(at_most, grace) => Some(at_most.min(now + grace)),
            _ => self.deadline(),
        };
        end.map_or(self.ack_by(), |end| end.min(self.ack_by()))
    }

    pub(super) fn progress_at(&self) -> i64 {
        (self.start() + self.ack_wait / 2).max(self.tried + self.ack_wait / 8)
    }

    /// `None` is never.
    pub(super) fn deadline(&self) -> Option<i64> {
        match self.until {
            Until::JetStreamEnds(latest) => Some(self.ack_by().min(latest)),
            Until::At(deadline) | Until::Kept(deadline, _) => Some(deadline),
            Until::Taken => None,
        }
    }

    /// A message that may be on its way back is not kept.
    pub(super) fn is_kept_alive(&self) -> bool {
        let outlives = self.deadline().is_none_or(|deadline| deadline > self.ack_by());
        outlives && self.state != State::Uncertain(SettleKind::Nak)
    }

    /// Only the time of its holder ends it: no other leader, and no end of JetStream before that time.
    pub(super) fn runs_out(&self) -> bool {
        let first = self.deadline().is_some_and(|deadline| deadline <= self.ack_by());
        first && self.state == State::Held && !self.lost && !self.doubted
    }

    pub(super) fn past_deadline(&self, now: i64) -> bool {
        self.deadline().is_some_and(|deadline| now >= deadline)
    }

    /// Progress sent at `sent_at` was confirmed in time.
    pub(super) fn restart(&mut self, sent_at: i64, now: i64) {
        self.starts.push((sent_at, now));
        self.doubted = false;
    }

    /// Undoes the confirmations that came shortly before, and what they undid.
    pub(super) fn distrust(&mut self, when: i64) {
        let mut forgot = when;
        while self.starts.len() > 1 && forgot < self.starts.last().unwrap().1 + UNPERSISTED_WINDOW {
            forgot = self.starts.pop().unwrap().1;
        }
        self.doubted = true;
    }

    pub(super) fn reclaim(&mut self) {
        self.until = if self.last_attempt { Until::Taken } else { Until::JetStreamEnds(NEVER) };
    }
}

pub(super) fn margin(ack_wait: i64) -> i64 {
    (ack_wait / 10).clamp(50, 2000)
}
