//! One lease: its state, its two clocks, and what they say. Knows nothing of the table around it.
//!
//! JetStream's clock is kept as its parts, never as their sum, so that a new ack wait or a doubt
//! about its start changes one part and `ack_by` follows:
//!
//! ```text
//!  started          + ack_wait / 2            ack_by            JetStream redelivers
//!     ├──────────────────┼───────────────────────┼──── margin ────┤
//!     receipt, or        progress is sent,       nothing is let
//!     the last sending   if the deadline is      through after it
//!     that counted       later than ack_by
//! ```

use std::time::Duration;

use super::{
    ConsumerId, LeaseSnapshot, PublishOutcome, SettleKind, SnapshotExpiry, Terms,
    ended::Ended,
    time::{NEVER, Nanos, Origin, PAST, margin_of, nanos},
};

/// A server that restarts cuts the times it stored to whole seconds, and so redelivers up to this
/// much early (measured on nats-server 2.15: ack wait 4 s, redelivered 3.05 s after the delivery).
pub(super) const RESTORED_TIME_TRUNCATION: Nanos = 1_000_000_000;
/// Progress confirmed this shortly before a server forgot may not have been stored.
const UNPERSISTED_WINDOW: Nanos = 250_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Held,
    /// `again`: an earlier try, of the same kind, may have been applied.
    Settling {
        kind: SettleKind,
        again: bool,
    },
    /// Never of a Nak: that one is not tried again.
    Uncertain(SettleKind),
}

/// How long its holder may keep it.
#[derive(Debug, Clone, Copy)]
enum Until {
    /// As long as JetStream waits by itself, also when that changes, but not beyond `latest`.
    JetStreamEnds { latest: Nanos },
    /// As was asked.
    At(Nanos),
    /// A last attempt in the proxy's own hands: until somebody takes it.
    Taken,
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
    /// The length that its caller was granted; `None` is as long as JetStream waits by itself.
    granted: Option<Nanos>,
    ack_wait: Nanos,
    /// When JetStream's clock last started, by what it confirmed.
    started: Nanos,
    /// `started` as a server knows it that forgot all progress since `confirmed - UNPERSISTED_WINDOW`. Of a
    /// delivery JetStream stores when its message was published, and not when it was delivered
    /// (nats-server 2.15: `deliverMsg` hands that time to `updateDelivered`).
    stored: Nanos,
    /// When `started` was learned; never, if it was by a delivery.
    confirmed: Nanos,
    /// When progress was last asked for.
    tried: Nanos,
    /// `started` may have been cut to a whole second.
    doubted: bool,
    /// JetStream has given it away for certain.
    lost: bool,
}

impl<T> Lease<T> {
    /// A delivery in the proxy's own hands.
    pub(super) fn new(terms: &Terms, payload: T, origin: Origin) -> Self {
        let received = origin.since(terms.received);
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
            ack_wait: nanos(terms.ack_wait),
            started: received,
            stored: received - nanos(terms.age),
            confirmed: NEVER,
            tried: received,
            doubted: false,
            lost: false,
        }
    }

    /// A lease that comes from another table, where it was like this at `at`.
    pub(super) fn adopted(
        moving: &LeaseSnapshot,
        consumer: ConsumerId,
        payload: T,
        at: Nanos,
    ) -> Self {
        let ack_wait = nanos(moving.ack_wait);
        // As its parts, so that it goes on like one of ours.
        let started = at + nanos(moving.ack_by) - ack_wait + margin_of(ack_wait);
        Self {
            payload,
            state: moving.uncertain.map_or(State::Held, State::Uncertain),
            consumer,
            sequence: moving.sequence,
            consumer_sequence: moving.consumer_sequence,
            delivery_count: u32::try_from(moving.delivery_count).unwrap_or(u32::MAX),
            last_attempt: moving.last_attempt,
            until: match moving.until {
                SnapshotExpiry::JetStreamEnds => Until::JETSTREAM_ENDS,
                SnapshotExpiry::At(left) => Until::At(at + nanos(left)),
            },
            granted: moving.granted.map(nanos),
            ack_wait,
            started,
            stored: started - nanos(moving.doubt),
            confirmed: if moving.doubt.is_zero() { started } else { NEVER },
            tried: started,
            doubted: false,
            lost: false,
        }
    }

    /// What is left of it at `now`, for another table. `None` while it is being settled.
    pub(super) fn moving(&self, now: Nanos) -> Option<LeaseSnapshot> {
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
            ack_wait: Duration::from_nanos(self.ack_wait.unsigned_abs()),
            ack_by: left(self.ack_by()),
            doubt: self.doubt(now),
            until: match self.until {
                Until::JetStreamEnds { latest } if latest < self.ack_by() => {
                    SnapshotExpiry::At(left(latest))
                }
                // Nobody takes it there either before a caller does.
                Until::JetStreamEnds { .. } | Until::Taken => SnapshotExpiry::JetStreamEnds,
                Until::At(deadline) => SnapshotExpiry::At(left(deadline)),
            },
            granted: self.granted.map(|length| Duration::from_nanos(length.unsigned_abs())),
            uncertain,
        })
    }

    /// How much earlier its clock has started to a server that takes over now.
    fn doubt(&self, now: Nanos) -> Duration {
        let stored = if now < self.unstored_until() { self.stored } else { self.started };
        Duration::from_nanos((self.started - stored).max(0).unsigned_abs())
    }

    fn unstored_until(&self) -> Nanos {
        self.confirmed.saturating_add(UNPERSISTED_WINDOW)
    }

    pub(super) fn consumer_sequence(&self) -> u64 {
        self.consumer_sequence
    }

    /// From then on somebody else may have the message.
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
            Until::At(deadline) => deadline,
            Until::Taken => NEVER,
        }
    }

    /// When time next has something to do with it.
    pub(super) fn due_at(&self) -> Option<Nanos> {
        let (deadline, ack_by) = (self.deadline(), self.ack_by());
        match self.state {
            State::Settling { .. } => None,
            State::Held | State::Uncertain(_) if deadline > ack_by => {
                Some(ack_by.min(self.progress_at()))
            }
            State::Held => Some(deadline),
            State::Uncertain(_) => Some(ack_by),
        }
    }

    /// Until when a Nak by us is harmless: nobody else can have the message before, there is time for
    /// it to arrive, and an attempt left.
    pub(super) fn release_by(&self, now: Nanos) -> Option<Nanos> {
        let by = self.ack_by();
        let in_time = by.saturating_sub(now) > margin_of(self.ack_wait);
        (in_time && !self.last_attempt).then_some(by)
    }

    /// Into a caller's hands for this long, or for as long as JetStream waits by itself; at the
    /// longest until `latest`.
    pub(super) fn assign(&mut self, length: Option<Nanos>, now: Nanos, latest: Nanos) {
        self.granted = length;
        self.until = match length {
            Some(length) => Until::At((now + length).min(latest)),
            None => Until::JetStreamEnds { latest },
        };
    }

    /// For this long from now, or for as long as it was granted; at the longest until `latest`.
    pub(super) fn extend(&mut self, length: Option<Nanos>, now: Nanos, latest: Nanos) {
        let patience = self.ack_wait - margin_of(self.ack_wait);
        let length = length.or(self.granted).unwrap_or(patience);
        self.until = Until::At((now + length).min(latest));
    }

    /// Into the proxy's own hands, as when it was new.
    pub(super) fn keep(&mut self) {
        self.until = Until::fresh(self.last_attempt);
    }

    /// Progress is being asked for: again after an eighth of the ack wait, unless it counted.
    pub(super) fn try_progress(&mut self, now: Nanos) {
        self.tried = now;
    }

    /// Progress sent at `sent_at` was confirmed. After `ack_by` JetStream confirms it too, and does
    /// nothing.
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

    /// JetStream's patience has changed; it counts from the clock's last start. Over stays over.
    pub(super) fn retune(&mut self, ack_wait: impl Fn(u64) -> Nanos, now: Nanos) {
        self.lost |= now >= self.ack_by();
        self.ack_wait = ack_wait(u64::from(self.delivery_count));
    }

    /// The server forgot at `when`. Doubt does not add up: a time is cut to its second once.
    pub(super) fn distrust(&mut self, when: Nanos) {
        if when < self.unstored_until() {
            self.started = self.stored;
        }
        self.doubted = true;
    }

    /// The server remembers the deliveries of its consumer up to this one.
    pub(super) fn lose_after(&mut self, delivered: u64) {
        self.lost |= self.consumer_sequence > delivered;
    }

    fn earliest_start(&self) -> Nanos {
        if self.doubted { self.started - RESTORED_TIME_TRUNCATION } else { self.started }
    }

    /// At half time, so that there is half an ack wait to try again in; one try per eighth.
    fn progress_at(&self) -> Nanos {
        (self.earliest_start() + self.ack_wait / 2).max(self.tried + self.ack_wait / 8)
    }
}

impl Until {
    const JETSTREAM_ENDS: Self = Self::JetStreamEnds { latest: NEVER };

    /// Nothing can be done with a last attempt that nobody takes: released, it would be destroyed.
    fn fresh(last_attempt: bool) -> Self {
        if last_attempt { Self::Taken } else { Self::JETSTREAM_ENDS }
    }
}

/// What a settlement of this kind leaves behind: a state, or an end. `over`: JetStream may have
/// given the message away in the meantime.
pub(super) fn conclude(
    kind: SettleKind,
    again: bool,
    outcome: PublishOutcome,
    over: bool,
) -> Result<State, Ended> {
    match outcome {
        PublishOutcome::Confirmed => Err(Ended::Settled(kind)),
        PublishOutcome::Denied => Err(Ended::Lost),
        // It may still be on its way: a second one could hit the next holder's delivery.
        PublishOutcome::Unconfirmed if kind == SettleKind::Nak => Err(Ended::Settled(kind)),
        PublishOutcome::Unsent | PublishOutcome::Unconfirmed if over => Err(Ended::Lost),
        PublishOutcome::Unsent if !again => Ok(State::Held),
        PublishOutcome::Unsent | PublishOutcome::Unconfirmed => Ok(State::Uncertain(kind)),
    }
}
