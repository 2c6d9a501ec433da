//! One lease: its state and its two clocks. Knows nothing of the table around it.
//!
//! JetStream's clock is kept as its parts, never as their sum. A new ack wait, or a doubt about the start,
//! changes one part, and `ack_by` follows:
//!
//! ```text
//!  started          + ack_wait / 2            ack_by            JetStream redelivers
//!     ├──────────────────┼───────────────────────┼──── margin ────┤
//!     receipt, or        progress is sent,       nothing is begun
//!     the last progress  if the deadline is      from here on
//!     that counted       later than ack_by
//! ```

use std::time::Duration;

use super::{
    ConsumerId, LeaseSnapshot, PublishOutcome, SettleKind, SnapshotExpiry, Terms,
    ended::Ended,
    time::{NEVER, Nanos, Origin, PAST, margin_of, nanos},
};

/// A server that restarts cuts its stored times to whole seconds, and redelivers up to this much early.
/// Measured on nats-server 2.15 with an ack wait of 4 s: redelivered 3.05 s after the delivery.
pub(super) const RESTORED_TIME_TRUNCATION: Nanos = 1_000_000_000;
/// A kept lease that moves to another replica lives for at least this long there, unless its longest time ends sooner.
const MOVED_GRACE: Nanos = 30_000_000_000;
/// Progress that was confirmed within this time before a server restarts may not be stored.
const UNPERSISTED_WINDOW: Nanos = 250_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Held,
    /// `retried`: an earlier attempt of the same kind may have been applied.
    Settling {
        kind: SettleKind,
        retried: bool,
    },
    /// Sent, and not confirmed.
    Uncertain(SettleKind),
}

/// The end of the holder's time.
#[derive(Debug, Clone, Copy)]
enum Until {
    /// JetStream's own end, also if that changes, but never later than `latest`.
    JetStreamEnds { latest: Nanos },
    /// This time, as the caller asked.
    At(Nanos),
    /// This time, or `grace` after the stream of its caller has ended, if that is earlier.
    Kept { at_most: Nanos, grace: Nanos },
    /// No end. The proxy itself holds a last attempt until it is assigned.
    Assigned,
}

#[derive(Debug)]
pub(super) struct Lease<T> {
    pub(super) payload: T,
    pub(super) state: State,
    pub(super) consumer: ConsumerId,
    pub(super) sequence: u64,
    consumer_sequence: u64,
    delivery_count: u32,
    last_attempt: bool,
    until: Until,
    /// The length of the assignment. `None`: as long as JetStream waits by itself.
    granted: Option<Nanos>,
    ack_wait: Nanos,
    /// The last confirmed start of JetStream's clock.
    started: Nanos,
    /// `started` at a server that has lost all progress since `confirmed - UNPERSISTED_WINDOW`. JetStream
    /// stores the time at which a message was published, not the time of its delivery. In nats-server
    /// 2.15, `deliverMsg` passes that time to `updateDelivered`.
    stored: Nanos,
    /// The time at which progress confirmed `started`. `NEVER`: a delivery started the clock.
    confirmed: Nanos,
    /// The time of the last attempt at progress.
    tried: Nanos,
    /// A server may have cut `started` to a whole second.
    doubted: bool,
    /// JetStream has certainly given the message away.
    lost: bool,
}

impl<T> Lease<T> {
    /// A new delivery, held by the proxy itself.
    pub(super) fn new(terms: &Terms, payload: T, origin: Origin) -> Self {
        let ack_wait = nanos(terms.ack_wait);
        let arrived = origin.since(terms.received);
        // Half of the margin is for the way of the delivery. If JetStream may have sent it earlier than that, the lease
        // ends sooner. The machine may have been suspended between the pull and the arrival.
        let latest = terms.sent_after.map(|sent| origin.since(sent) + margin_of(ack_wait) / 2);
        let received = latest.map_or(arrived, |latest| arrived.min(latest));
        Self {
            payload,
            state: State::Held,
            consumer: terms.consumer,
            sequence: terms.sequence,
            consumer_sequence: terms.consumer_sequence,
            delivery_count: u32::try_from(terms.delivery_count).unwrap_or(u32::MAX),
            last_attempt: terms.last_attempt,
            until: Until::fresh(terms.last_attempt),
            granted: None,
            ack_wait,
            started: received,
            stored: received - nanos(terms.age),
            confirmed: NEVER,
            tried: received,
            doubted: false,
            lost: false,
        }
    }

    /// A lease that comes from another table. The snapshot was true at `at`.
    pub(super) fn adopted(
        snapshot: &LeaseSnapshot,
        consumer: ConsumerId,
        payload: T,
        at: Nanos,
    ) -> Self {
        let ack_wait = nanos(snapshot.ack_wait);
        // The clock is split into its parts again, so that the lease continues like any other.
        let started = at + nanos(snapshot.ack_by) - ack_wait + margin_of(ack_wait);
        let doubt = snapshot.doubt.max(snapshot.doubt_unseen);
        Self {
            payload,
            state: snapshot.uncertain.map_or(State::Held, State::Uncertain),
            consumer,
            sequence: snapshot.sequence,
            consumer_sequence: snapshot.consumer_sequence,
            delivery_count: u32::try_from(snapshot.delivery_count).unwrap_or(u32::MAX),
            last_attempt: snapshot.last_attempt,
            until: match snapshot.until {
                SnapshotExpiry::JetStreamEnds => Until::JETSTREAM_ENDS,
                SnapshotExpiry::At(left) => Until::At(at + nanos(left)),
            },
            granted: snapshot.granted.map(nanos),
            ack_wait,
            started,
            stored: started - nanos(doubt),
            confirmed: match (doubt.is_zero(), snapshot.doubt.is_zero()) {
                (true, _) => started,
                // It was stored when the snapshot was true, and nobody knows since when.
                (false, true) => at - UNPERSISTED_WINDOW,
                (false, false) => NEVER,
            },
            tried: started,
            doubted: false,
            lost: false,
        }
    }

    /// The lease at `now`, for another table. The leader was last seen at `seen`. `None`: it is being settled.
    pub(super) fn snapshot(&self, now: Nanos, seen: Nanos) -> Option<LeaseSnapshot> {
        let uncertain = match self.state {
            State::Held => None,
            State::Uncertain(kind) => Some(kind),
            State::Settling { .. } => return None,
        };
        let left = |then: Nanos| Duration::from_nanos((then - now).max(0).unsigned_abs());
        Some(LeaseSnapshot {
            sequence: self.sequence,
            consumer_sequence: self.consumer_sequence,
            delivery_count: u64::from(self.delivery_count),
            last_attempt: self.last_attempt,
            ack_wait: self.ack_wait(),
            ack_by: left(self.ack_by()),
            doubt: self.doubt(now),
            doubt_unseen: self.doubt(seen.min(now)),
            until: match self.until {
                Until::JetStreamEnds { latest } if latest < self.ack_by() => {
                    SnapshotExpiry::At(left(latest))
                }
                // The other table also holds it itself until it is assigned.
                Until::JetStreamEnds { .. } | Until::Assigned => SnapshotExpiry::JetStreamEnds,
                Until::At(deadline) => SnapshotExpiry::At(left(deadline)),
                // Its stream is about to end, and its caller needs time to come to the other replica.
                Until::Kept { at_most, grace } => {
                    SnapshotExpiry::At(left(at_most.min(now + grace.max(MOVED_GRACE))))
                }
            },
            granted: self.granted.map(|length| Duration::from_nanos(length.unsigned_abs())),
            uncertain,
        })
    }

    /// How much earlier JetStream's clock started for a server that takes over at `when`.
    fn doubt(&self, when: Nanos) -> Duration {
        let stored = if when < self.unstored_until() { self.stored } else { self.started };
        Duration::from_nanos((self.started - stored).max(0).unsigned_abs())
    }

    fn unstored_until(&self) -> Nanos {
        self.confirmed.saturating_add(UNPERSISTED_WINDOW)
    }

    pub(super) fn consumer_sequence(&self) -> u64 {
        self.consumer_sequence
    }

    /// The time from which somebody else may have the message.
    pub(super) fn ack_by(&self) -> Nanos {
        if self.lost {
            return PAST;
        }
        self.earliest_start() + self.ack_wait - margin_of(self.ack_wait)
    }

    /// The holder's clock.
    pub(super) fn deadline(&self) -> Nanos {
        match self.until {
            Until::JetStreamEnds { latest } => self.ack_by().min(latest),
            Until::At(deadline) | Until::Kept { at_most: deadline, .. } => deadline,
            Until::Assigned => NEVER,
        }
    }

    /// The time of its holder ends it, with or without a length. Nothing has moved `ack_by` before that time.
    pub(super) fn runs_out(&self) -> bool {
        let surprised = self.lost || self.doubted;
        self.state == State::Held && !surprised && self.deadline() <= self.ack_by()
    }

    /// The time until which nobody else can have the message, whatever this table does with a lease that its caller
    /// does not end. The stream of the caller may end at once.
    pub(super) fn settle_by(&self, now: Nanos) -> Nanos {
        let first_end = match self.until {
            Until::Kept { at_most, grace } => at_most.min(now + grace),
            Until::JetStreamEnds { .. } | Until::At(_) | Until::Assigned => self.deadline(),
        };
        first_end.min(self.ack_by())
    }

    /// The next time at which a sweep must look at the lease.
    pub(super) fn due_at(&self) -> Option<Nanos> {
        let (deadline, ack_by) = (self.deadline(), self.ack_by());
        match self.state {
            State::Settling { .. } => None,
            // Progress would delay the redelivery that the Nak asked for.
            State::Uncertain(SettleKind::Nak) => Some(ack_by),
            State::Held | State::Uncertain(_) if deadline > ack_by => {
                Some(ack_by.min(self.progress_at()))
            }
            State::Held => Some(deadline),
            State::Uncertain(_) => Some(ack_by),
        }
    }

    /// Whether it is the last attempt.
    pub(super) fn is_last_attempt(&self) -> bool {
        self.last_attempt
    }

    /// The time until which our Nak is harmless: nobody else can have the message before it. `None`: the
    /// Nak has no time to arrive, or no attempt is left.
    pub(super) fn release_by(&self, now: Nanos) -> Option<Nanos> {
        self.nak_by(now).filter(|_| !self.last_attempt)
    }

    /// The same for a Nak that may end the last attempt.
    pub(super) fn nak_by(&self, now: Nanos) -> Option<Nanos> {
        let by = self.ack_by();
        let in_time = by.saturating_sub(now) > margin_of(self.ack_wait);
        in_time.then_some(by)
    }

    pub(super) fn ack_wait(&self) -> Duration {
        Duration::from_nanos(self.ack_wait.unsigned_abs())
    }

    /// Gives the lease to a caller for `length`, or for as long as JetStream waits by itself, but at most
    /// until `latest`.
    pub(super) fn assign(&mut self, length: Option<Nanos>, now: Nanos, latest: Nanos) {
        self.granted = length;
        self.until = match length {
            Some(length) => Until::At((now + length).min(latest)),
            None => Until::JetStreamEnds { latest },
        };
    }

    /// Gives the lease to a caller for as long as the caller's stream lives and `grace` longer, but at most until
    /// `at_most`.
    pub(super) fn assign_kept(&mut self, at_most: Nanos, grace: Nanos) {
        self.granted = None;
        self.until = Until::Kept { at_most, grace };
    }

    /// The stream of the caller has ended.
    pub(super) fn end_kept(&mut self, now: Nanos) {
        if let Until::Kept { at_most, grace } = self.until {
            self.until = Until::At(at_most.min(now + grace));
        }
    }

    /// As [`Lease::assign`], for the caller that has it. The lease does not end earlier by this.
    pub(super) fn assign_again(&mut self, length: Option<Nanos>, now: Nanos, latest: Nanos) {
        let (until, deadline) = (self.until, self.deadline());
        self.assign(length, now, latest);
        if self.deadline() < deadline && !matches!(until, Until::Assigned) {
            self.until = until;
        }
    }

    /// Moves the end to `length` from now, or by the length of the assignment, but at most to `latest`.
    pub(super) fn extend(&mut self, length: Option<Nanos>, now: Nanos, latest: Nanos) {
        let patience = self.ack_wait - margin_of(self.ack_wait);
        let length = length.or(self.granted).unwrap_or(patience);
        self.until = Until::At((now + length).min(latest));
    }

    /// Takes the lease back, as if it were new.
    pub(super) fn reclaim(&mut self) {
        self.until = Until::fresh(self.last_attempt);
    }

    /// Notes an attempt at progress. The next attempt follows after an eighth of the ack wait, unless this
    /// one counts.
    pub(super) fn try_progress(&mut self, now: Nanos) {
        self.tried = now;
    }

    /// Counts progress that was sent at `sent_at` and confirmed. Progress after `ack_by` does not count:
    /// JetStream confirms it and does nothing.
    pub(super) fn progressed(&mut self, sent_at: Nanos, now: Nanos) {
        if now >= self.ack_by() || sent_at <= self.started {
            return;
        }
        if now >= self.unstored_until() {
            self.stored = self.started;
        }
        self.started = sent_at;
        self.confirmed = now;
        self.doubted = false;
    }

    /// Sets a new ack wait, which counts from the last start of the clock. A lease that is over stays over.
    pub(super) fn retune(&mut self, ack_wait: impl Fn(u64) -> Nanos, now: Nanos) {
        self.lost |= now >= self.ack_by();
        self.ack_wait = ack_wait(u64::from(self.delivery_count));
    }

    /// The server lost its last state at `when`. Doubt does not add up, because a time is cut to its second
    /// only once.
    pub(super) fn distrust(&mut self, when: Nanos) {
        if when < self.unstored_until() {
            self.started = self.stored;
        }
        self.doubted = true;
    }

    /// The server knows the deliveries of the consumer up to this consumer sequence.
    pub(super) fn lose_after(&mut self, delivered: u64) {
        self.lost |= self.consumer_sequence > delivered;
    }

    fn earliest_start(&self) -> Nanos {
        if self.doubted { self.started - RESTORED_TIME_TRUNCATION } else { self.started }
    }

    /// The time of the next progress: at half of the ack wait, so that half remains for further attempts.
    /// One attempt is made in each eighth.
    fn progress_at(&self) -> Nanos {
        (self.earliest_start() + self.ack_wait / 2).max(self.tried + self.ack_wait / 8)
    }
}

impl Until {
    const JETSTREAM_ENDS: Self = Self::JetStreamEnds { latest: NEVER };

    /// Nobody may release a last attempt: a release would destroy the message.
    fn fresh(last_attempt: bool) -> Self {
        if last_attempt { Self::Assigned } else { Self::JETSTREAM_ENDS }
    }
}

/// The state of a lease after a settlement, or its end. `over`: JetStream may have given the message away
/// in the meantime.
pub(super) fn conclude(
    kind: SettleKind,
    retried: bool,
    outcome: PublishOutcome,
    over: bool,
) -> Result<State, Ended> {
    match outcome {
        PublishOutcome::Confirmed => Err(Ended::Settled(kind)),
        PublishOutcome::Denied => Err(Ended::Gone),
        PublishOutcome::Unsent | PublishOutcome::Unconfirmed if over => Err(Ended::Lost),
        PublishOutcome::Unsent if !retried => Ok(State::Held),
        PublishOutcome::Unsent | PublishOutcome::Unconfirmed => Ok(State::Uncertain(kind)),
    }
}
