//! The one open pull, and what its end asks of the next. No decision about waiters.

use std::time::{Duration, Instant};

use super::{PullOutcome, WaiterId};

/// After this long without an arrival, a pull is taken to have brought what there was: at
/// `max_ack_pending` a one-shot says nothing before it expires.
const QUIET_AFTER: Duration = Duration::from_millis(5);
/// A pull that has brought nothing for this long has nothing to bring at the moment. Longer than
/// [`QUIET_AFTER`]: the request is to travel, and the first message with it.
const EMPTY_AFTER: Duration = Duration::from_millis(100);
/// A pull whose end has not been told this long after it expired has ended unheard.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// Time before the next pull where the last one asked in vain and did not wait.
const BACK_OFF: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy)]
pub(super) struct Pull {
    pub(super) no: u64,
    asked: PullParams,
    got: u32,
    /// Whoever comes before this one had joined when it was issued.
    pub(super) waiters_before: WaiterId,
    half_time: Instant,
    /// When it was issued, then its last arrival.
    last_activity: Instant,
    /// When it is taken to have ended if nothing was heard.
    pub(super) ends_at: Instant,
}

/// What a pull asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct PullParams {
    pub(super) batch: u32,
    pub(super) expires: Duration,
    pub(super) mode: PullMode,
    /// It was allowed fewer bytes than its waiters want,
    pub(super) short_of_bytes: bool,
    /// or fewer messages.
    pub(super) short: bool,
    /// The one before came to its limit: something is there.
    pub(super) goes_on: bool,
}

/// How a pull asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct PullMode {
    /// For one message, waiting in line like any other pull: immune to Requests Pending.
    pub(super) plain: bool,
    /// For one message, whatever its size.
    pub(super) uncapped: bool,
    /// The next message was larger than what the last pull was allowed.
    pub(super) whole: bool,
}

/// What the pulls so far ask of the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct NextPull {
    pub(super) mode: PullMode,
    pub(super) not_before: Option<Instant>,
    /// The last one came to its limit, and its waiters want more: if the next one is not issued by
    /// then, they take what they have.
    pub(super) more_by: Option<Instant>,
}

impl Pull {
    pub(super) fn new(no: u64, asked: PullParams, waiters_before: WaiterId, now: Instant) -> Self {
        let expires = asked.expires;
        let (half_time, ends_at) = (now + expires / 2, now + expires + END_TIMEOUT);
        Self { no, asked, got: 0, waiters_before, half_time, last_activity: now, ends_at }
    }

    /// Counts an arrival; whether it was the last. No status tells the end of a full batch.
    pub(super) fn count(&mut self, now: Instant) -> bool {
        self.got += 1;
        self.last_activity = now;
        self.got >= self.asked.batch
    }

    /// When it has brought what there was, as far as whoever has some is concerned.
    pub(super) fn quiet_at(&self) -> Instant {
        let travels = self.asked.goes_on && self.got == 0;
        self.last_activity + if travels { EMPTY_AFTER } else { QUIET_AFTER }
    }

    /// When somebody who joined then knows that it has nothing for him.
    pub(super) fn silent_at(&self, joined: Instant) -> Instant {
        self.last_activity.max(joined) + EMPTY_AFTER
    }

    /// What a full batch asks of the next.
    pub(super) fn full(&self, now: Instant) -> NextPull {
        let more_by = self.asked.short.then_some(now + QUIET_AFTER);
        NextPull { more_by, ..NextPull::default() }
    }

    /// What its end asks of the next.
    pub(super) fn next(&self, end: PullOutcome, now: Instant) -> NextPull {
        let (back_off, mode) = (Some(now + BACK_OFF), self.asked.mode);
        match end {
            // One that waits for a first message does not come back early without: if it does,
            // asking again at once would spin.
            PullOutcome::Done if self.got == 0 && now < self.half_time => {
                NextPull { not_before: back_off, ..NextPull::default() }
            }
            PullOutcome::Done => NextPull::default(),
            PullOutcome::RequestsPending => {
                let mode = PullMode { plain: true, ..mode };
                NextPull { mode, not_before: Some(now + jitter(self.no)), more_by: None }
            }
            // Its bytes were used up.
            PullOutcome::Spent => self.full(now),
            PullOutcome::TooLarge if self.got > 0 => self.full(now),
            // It may fit into what its waiters want: the next one is allowed more.
            PullOutcome::TooLarge if self.asked.short_of_bytes && !mode.whole => {
                NextPull { mode: PullMode { whole: true, ..PullMode::default() }, ..self.full(now) }
            }
            PullOutcome::TooLarge => NextPull {
                mode: PullMode { uncapped: true, ..PullMode::default() },
                not_before: back_off.filter(|_| mode.uncapped),
                more_by: None,
            },
            PullOutcome::Refused => NextPull { mode, not_before: back_off, more_by: None },
        }
    }
}

/// 5 to 50 ms, all of them before one comes again: replicas that collide get out of step.
fn jitter(no: u64) -> Duration {
    Duration::from_millis(5 + no % 46 * 7 % 46)
}
