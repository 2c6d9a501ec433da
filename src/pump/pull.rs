//! The open pull, and the form of the next pull after its end. Decides nothing about waiters.

use std::time::{Duration, Instant};

use super::{PullOutcome, WaiterId};

/// After this time without an arrival, a pull counts as one that has brought every available message. At
/// `max_ack_pending` JetStream sends no end before the pull expires.
const QUIET_AFTER: Duration = Duration::from_millis(5);
/// The same for a pull for flows. It brings what is stored without a break, and has no end while it waits for more.
const QUIET_AFTER_FOR_FLOWS: Duration = Duration::from_millis(1);
/// After this time without a first message, no message is available at the moment. It is longer than
/// [`QUIET_AFTER`], because the request and the first message must travel.
const EMPTY_AFTER: Duration = Duration::from_millis(100);
/// A pull counts as ended if its end has not arrived this long after it expired.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// The wait before the next pull if the last one ended at once with nothing.
const BACK_OFF: Duration = Duration::from_millis(100);

#[derive(Debug, Clone, Copy)]
pub(super) struct Pull {
    pub(super) no: u64,
    asked: PullParams,
    /// The number of messages that have arrived.
    got: u32,
    /// All earlier waiters had joined when the pull was issued.
    pub(super) waiters_before: WaiterId,
    half_time: Instant,
    /// The time of its last arrival, or of its issue.
    last_activity: Instant,
    /// The time at which it counts as ended, even without an end from JetStream.
    pub(super) ends_at: Instant,
}

/// The parameters of a pull.
#[derive(Debug, Clone, Copy)]
pub(super) struct PullParams {
    pub(super) batch: u32,
    pub(super) expires: Duration,
    pub(super) mode: PullMode,
    /// It was allowed fewer bytes than its waiters want.
    pub(super) short_of_bytes: bool,
    /// It was allowed fewer bytes or fewer messages than its waiters want.
    pub(super) short: bool,
    /// The pull before reached its limit, so messages are available.
    pub(super) continues: bool,
    /// It waits for its whole batch, for flows.
    pub(super) for_flows: bool,
}

/// The form of a pull.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct PullMode {
    /// A plain pull for one message. It queues behind other pulls and never ends with Requests Pending.
    pub(super) plain: bool,
    /// A pull for one message of any size.
    pub(super) uncapped: bool,
    /// The next message was larger than the allowance of the last pull.
    pub(super) whole: bool,
}

/// The form of the next pull, by the pulls so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct NextPull {
    pub(super) mode: PullMode,
    pub(super) not_before: Option<Instant>,
    /// Set if the last pull reached its limit and its waiters want more. If the next pull is not issued by
    /// then, the waiters get the messages that they have.
    pub(super) more_by: Option<Instant>,
}

impl Pull {
    pub(super) fn new(no: u64, asked: PullParams, waiters_before: WaiterId, now: Instant) -> Self {
        let expires = asked.expires;
        let (half_time, ends_at) = (now + expires / 2, now + expires + END_TIMEOUT);
        Self { no, asked, got: 0, waiters_before, half_time, last_activity: now, ends_at }
    }

    /// Counts an arrival. `true`: it was the last one, because JetStream sends no end of a full batch.
    pub(super) fn count(&mut self, now: Instant) -> bool {
        self.got += 1;
        self.last_activity = now;
        self.got >= self.asked.batch
    }

    /// The number of messages that it may still bring.
    pub(super) fn left(&self) -> usize {
        self.asked.batch.saturating_sub(self.got) as usize
    }

    /// The time at which a waiter with messages need not wait for more of this pull.
    pub(super) fn quiet_at(&self) -> Instant {
        let travels = self.asked.continues && self.got == 0;
        let quiet = if self.asked.for_flows { QUIET_AFTER_FOR_FLOWS } else { QUIET_AFTER };
        self.last_activity + if travels { EMPTY_AFTER } else { quiet }
    }

    /// The time at which a waiter that joined at `joined` need not wait for a first message of this pull.
    pub(super) fn silent_at(&self, joined: Instant) -> Instant {
        self.last_activity.max(joined) + EMPTY_AFTER
    }

    /// The next pull after a full batch.
    pub(super) fn full(&self, now: Instant) -> NextPull {
        let more_by = self.asked.short.then_some(now + QUIET_AFTER);
        NextPull { more_by, ..NextPull::default() }
    }

    /// The next pull after this end.
    pub(super) fn next(&self, end: PullOutcome, now: Instant) -> NextPull {
        let (back_off, mode) = (Some(now + BACK_OFF), self.asked.mode);
        match end {
            // A pull that waits for a first message should not end early with nothing. If it does, pulling
            // again at once would spin.
            PullOutcome::Done if self.got == 0 && now < self.half_time => {
                NextPull { not_before: back_off, ..NextPull::default() }
            }
            PullOutcome::Done => NextPull::default(),
            PullOutcome::RequestsPending => {
                let mode = PullMode { plain: true, ..mode };
                NextPull { mode, not_before: Some(now + jitter(self.no)), more_by: None }
            }
            // The bytes of the pull were used up.
            PullOutcome::Spent => self.full(now),
            PullOutcome::TooLarge if self.got > 0 => self.full(now),
            // The message may fit into the room of the waiters. The next pull is allowed more.
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

/// 5 to 50 ms. Every value comes before one is repeated, so that replicas that collide get out of step.
fn jitter(no: u64) -> Duration {
    Duration::from_millis(5 + no % 46 * 7 % 46)
}
