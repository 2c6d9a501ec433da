//! A message that the worker holds, until it is settled or lost. Pure.

use std::time::{Duration, Instant};

use crate::{
    pb::{
        AckAction, Delivery, ExtendAction, NakAction, Rejected, Settlement, TermAction,
        settlement::Action, time,
    },
    work::verdict::WorkVerdict,
};

/// The longest time in which a settlement without an answer is repeated after its lease has ended by our clock.
/// An Ack or a Term can still count then. A Nak cannot: the message comes back by itself.
const LATE_SETTLEMENT: Duration = Duration::from_secs(60);
/// The delay of a message that is larger than any frame. A worker of another version may take it.
const TOO_LARGE_DELAY: Duration = Duration::from_secs(60);
/// Longest lease of a replica that names none.
const LONGEST_LEASE: Duration = Duration::from_secs(3600);

/// How a message has left the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum WorkOutcome {
    /// It is done.
    Acked,
    /// It comes again.
    Nacked,
    /// It never comes again.
    Terminated,
    /// It was not worked on to the end, and comes again to any worker.
    GivenBack,
    /// Its lease has ended: another worker has it, or will have it.
    Lost,
}

/// The state of a message.
#[derive(Debug)]
pub(super) enum HeldState {
    /// No work has begun.
    Waiting(Box<Delivery>),
    /// The work is under way.
    Working,
    /// The settlement is known.
    Decided(WorkOutcome, Action, String),
}

/// A message in hand.
#[derive(Debug)]
pub(super) struct HeldMessage {
    /// The stream that carries its settlement.
    pub(super) stream: u64,
    /// Its number on that stream. 0: it came by an earlier stream, and is settled by token.
    pub(super) number: u64,
    pub(super) token: String,
    pub(super) state: HeldState,
    /// The end of its lease by our clock, if no frame comes. A stream with its number moves this end.
    pub(super) ends: Instant,
    /// The end that no stream moves.
    pub(super) bound: Instant,
    /// When its settlement is to be sent, or its Extend.
    pub(super) due: Instant,
    /// A settlement or an Extend has no result yet: when it was sent.
    pub(super) sent: Option<Instant>,
    /// How often its settlement was refused for now.
    pub(super) tries: u32,
    pub(super) subject: String,
    pub(super) sequence: u64,
    pub(super) attempt: u32,
    /// A Nak ends it for the consumer.
    pub(super) is_last_attempt: bool,
}

impl HeldMessage {
    pub(super) fn new(stream: u64, message: Delivery, now: Instant, ends: Instant) -> Self {
        let lease = message.lease.as_ref().and_then(time::to_duration).unwrap_or(LONGEST_LEASE);
        let most = message.max_deliver;
        Self {
            stream,
            number: message.number,
            token: message.token.clone(),
            ends,
            bound: now + lease,
            due: now,
            sent: None,
            tries: 0,
            subject: message.subject.clone(),
            sequence: message.stream_sequence,
            attempt: message.delivery_count,
            is_last_attempt: most > 0 && message.delivery_count >= most,
            state: HeldState::Waiting(Box::new(message)),
        }
    }

    /// A message that came without its payload. No codec is asked for, so it is larger than any frame.
    pub(super) fn of_rejected(stream: u64, it: Rejected, now: Instant, ends: Instant) -> Self {
        let message = Delivery {
            subject: it.subject,
            stream_sequence: it.stream_sequence,
            delivery_count: it.delivery_count,
            token: it.token,
            lease: it.lease,
            number: it.number,
            ..Delivery::default()
        };
        let mut held = Self::new(stream, message, now, ends);
        held.decide(WorkVerdict::Nak { delay: TOO_LARGE_DELAY, why: it.detail }, now);
        held
    }

    fn outcome(&self) -> Option<WorkOutcome> {
        match self.state {
            HeldState::Waiting(_) | HeldState::Working => None,
            HeldState::Decided(outcome, ..) => Some(outcome),
        }
    }

    /// Whether its work has not ended.
    pub(super) fn is_open(&self) -> bool {
        !matches!(self.state, HeldState::Decided(..))
    }

    /// The end of all that can be done with it.
    pub(super) fn gives_up_at(&self) -> Instant {
        let ends = self.ends.min(self.bound);
        let counts_late =
            [WorkOutcome::Acked, WorkOutcome::Terminated].map(Some).contains(&self.outcome());
        if counts_late { ends + LATE_SETTLEMENT } else { ends }
    }

    pub(super) fn decide(&mut self, verdict: WorkVerdict, now: Instant) {
        let (outcome, action, why) = match verdict {
            WorkVerdict::Ack => (WorkOutcome::Acked, Action::Ack(AckAction {}), String::new()),
            WorkVerdict::Term(reason) => {
                let action = Action::Term(TermAction { reason: reason.clone() });
                (WorkOutcome::Terminated, action, reason)
            }
            WorkVerdict::Nak { delay, why } => {
                let again = match self.is_last_attempt {
                    true => "it was the last attempt".to_owned(),
                    false => format!("again in {}", shown(delay)),
                };
                let action = Action::Nak(NakAction { delay: Some(time::duration(delay)) });
                (WorkOutcome::Nacked, action, format!("{why}; {again}"))
            }
        };
        (self.state, self.due) = (HeldState::Decided(outcome, action, why), now);
    }

    /// Gives it back without a delay.
    pub(super) fn give_back(&mut self, why: &str, now: Instant) {
        let action = Action::Nak(NakAction::default());
        (self.state, self.due) =
            (HeldState::Decided(WorkOutcome::GivenBack, action, why.to_owned()), now);
    }

    /// Whether its settlement is due, or an Extend because no stream keeps its lease.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.sent.is_none() && self.due <= now && (!self.is_open() || self.number == 0)
    }

    /// The settlement to send, or an Extend by `grace`.
    pub(super) fn settlement(&self, grace: Duration) -> Settlement {
        let extend = || Action::Extend(ExtendAction { lease: Some(time::duration(grace)) });
        let action = match &self.state {
            HeldState::Decided(_, action, _) => action.clone(),
            HeldState::Waiting(_) | HeldState::Working => extend(),
        };
        let token = if self.number == 0 { self.token.clone() } else { String::new() };
        Settlement { token, action: Some(action), number: self.number }
    }
}

/// A delay for people, without the digits that nobody reads.
fn shown(delay: Duration) -> String {
    let unit = if delay < Duration::from_secs(10) { 100_000_000 } else { 1_000_000_000 };
    let rounded = delay.as_nanos().div_ceil(unit) * unit;
    let rounded = Duration::from_nanos(u64::try_from(rounded).unwrap_or(u64::MAX));
    humantime::format_duration(rounded).to_string()
}
