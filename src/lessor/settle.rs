//! Settling and extending: the lease table decides, the broker is asked only for a lease that is
//! held, and what came of it goes back into the table. That order is the fence.
//!
//! Once begun, a settlement runs to its end whether or not its caller stays.

use std::{
    collections::HashSet,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio_util::task::TaskTracker;

use super::{Error, Lessor, consumer::ConsumerCommand, spec::ConsumerSpec, table::HeldDelivery};
use crate::{
    broker::{AckKind, AckPublish, Broker, BrokerError, Confirmation, Denial},
    clock,
    lease::{
        BeginResult, LeaseError, LeaseId, LeaseStatus, LeaseTable, PublishOutcome, SettleKind,
    },
};

const IN_DOUBT: &str = "it is not known which server leads the consumer";

/// One token's part of a Settle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettleItem {
    /// Which lease.
    pub lease: LeaseId,
    /// What to do with it.
    pub action: Action,
}

/// What can be done with a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The message is done.
    Ack,
    /// Deliver it again, this long from now.
    Nak(Duration),
    /// Never deliver it again, for this reason.
    Term(String),
    /// Let the lease end this long from now; without a length, as long as it was granted.
    Extend(Option<Duration>),
}

/// What was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// Settled. A Nak says how long from now the message comes back, unless it was the last attempt.
    Done {
        /// Whether JetStream said so, or it was only sent.
        confirmation: Confirmation,
        /// How long until the message is delivered again.
        redelivered_in: Option<Duration>,
    },
    /// Settled in this way before.
    Duplicate,
    /// The lease ends then.
    Extended(Instant),
}

/// A settlement that the table let through.
struct Begin {
    place: usize,
    lease: LeaseId,
    spec: Arc<ConsumerSpec>,
    redelivered_in: Option<Duration>,
}

/// What the table let through at once.
struct Round {
    begun: Vec<Begin>,
    orders: Vec<AckPublish>,
    /// Those that name a lease of this round again, each with its place.
    later: Vec<(usize, SettleItem)>,
}

impl<B: Broker> Lessor<B> {
    /// Settles or extends each; one result each, in order. Open ones are
    /// [`Error::Unconfirmed`] at `until`, or after the settle timeout if that is sooner.
    ///
    /// A lease that is named again is answered as a later call would be: after the settlement before
    /// it has ended.
    pub async fn settle(
        &self,
        asks: Vec<SettleItem>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<Result<Settled, Error>> {
        let until = until.min(clock::now() + self.limits.settle_timeout);
        let mut results = vec![Err(Error::Unconfirmed); asks.len()];
        let mut round = self.begin(asks.into_iter().enumerate().collect(), &mut results);
        if round.begun.is_empty() {
            return results;
        }
        let lessor = self.clone();
        let run = async move {
            // One round, unless a lease is named again.
            while !round.begun.is_empty() {
                let outcomes = lessor.broker.settle(round.orders, confirmation, until).await;
                lessor.finish(&mut results, round.begun, outcomes, confirmation);
                round = lessor.begin(round.later, &mut results);
            }
            results
        };
        FinishOnDrop { run: Some(Box::pin(run)), tasks: &self.tasks }.await
    }

    /// Asks the table. The results of what it let through are not known yet.
    fn begin(
        &self,
        asks: Vec<(usize, SettleItem)>,
        results: &mut [Result<Settled, Error>],
    ) -> Round {
        let now = clock::now();
        let mut begun: Vec<Begin> = Vec::with_capacity(asks.len());
        let mut orders = Vec::with_capacity(asks.len());
        let (mut busy, mut freed) = (Vec::new(), Vec::new());
        let mut decide = |table: &mut LeaseTable<HeldDelivery>,
                          place,
                          &SettleItem { lease, ref action }: &SettleItem| {
            let kind = match action {
                Action::Extend(length) => return extend(table, lease, *length, now),
                Action::Ack => SettleKind::Ack,
                Action::Nak(_) => SettleKind::Nak,
                Action::Term(_) => SettleKind::Term,
            };
            let by = table.ack_by(lease);
            let BeginResult::Publish(hold) = table.begin(lease, kind, now)? else {
                return Ok(Settled::Duplicate);
            };
            if hold.spec.leadership.in_doubt() {
                let (after, gone) = table.finish(lease, PublishOutcome::Unsent, now);
                freed.extend(gone);
                return Err(failure(BrokerError::Unsent(IN_DOUBT.to_owned()), after));
            }
            let (verdict, redelivered_in) = verdict(action.clone(), hold);
            orders.push(hold.order(verdict, by));
            let spec = hold.spec.clone();
            begun.push(Begin { place, lease, spec, redelivered_in });
            Err(Error::Unconfirmed)
        };
        self.table.with(|table| {
            for (place, ask) in asks {
                results[place] = decide(table, place, &ask);
                if results[place] == Err(Error::LeaseBusy) {
                    busy.push((place, ask));
                }
            }
        });
        if !busy.is_empty() {
            let ours: HashSet<LeaseId> = begun.iter().map(|begun| begun.lease).collect();
            // The others are being settled by another call.
            busy.retain(|(_, ask)| ours.contains(&ask.lease));
        }
        Round { begun, orders, later: busy }
    }

    fn finish(
        &self,
        results: &mut [Result<Settled, Error>],
        begun: Vec<Begin>,
        outcomes: Vec<Result<(), BrokerError>>,
        confirmation: Confirmation,
    ) {
        let now = clock::now();
        // Consumers of whose leader nobody can be sure any more.
        let mut doubtful: Vec<Arc<ConsumerSpec>> = Vec::new();
        // Holds are dropped after the lock is: freeing places wakes others.
        let freed: Vec<HeldDelivery> = self.table.with(|table| {
            let mut freed = Vec::with_capacity(begun.len());
            for (Begin { place, lease, spec, redelivered_in }, outcome) in
                begun.into_iter().zip(outcomes)
            {
                let (after, hold) = table.finish(lease, judged(&outcome), now);
                freed.extend(hold);
                if confirmation == Confirmation::Confirmed || outcome.is_err() {
                    spec.ack_right.learn(&outcome);
                }
                results[place] = match outcome {
                    Ok(()) => Ok(Settled::Done { confirmation, redelivered_in }),
                    Err(error) => Err(failure(error, after)),
                };
                let known = |doubtful: &Arc<ConsumerSpec>| doubtful.id == spec.id;
                if spec.is_led_elsewhere()
                    && in_doubt(&results[place])
                    && !doubtful.iter().any(known)
                {
                    doubtful.push(spec);
                }
            }
            freed
        });
        drop(freed);
        for spec in doubtful {
            if spec.leadership.doubt() {
                self.tell(&spec.name, ConsumerCommand::Doubt);
            }
        }
    }
}

/// Whether a settlement that ended so may have met another leader, or none.
fn in_doubt(result: &Result<Settled, Error>) -> bool {
    matches!(result, Err(Error::Unconfirmed | Error::Unavailable(_)))
}

fn extend(
    table: &mut LeaseTable<HeldDelivery>,
    lease: LeaseId,
    length: Option<Duration>,
    now: Instant,
) -> Result<Settled, Error> {
    if let Some(hold) = table.payload(lease) {
        if hold.spec.leadership.in_doubt() {
            return Err(Error::Unavailable(IN_DOUBT.to_owned()));
        }
        // Nothing could keep the message for longer than the ack wait.
        if let Some(subject) = hold.spec.ack_right.refused() {
            return Err(Error::Permission(subject));
        }
    }
    Ok(Settled::Extended(table.extend(lease, length, now)?))
}

/// A settlement that has begun. Its caller polls it; when the caller leaves, a task goes on with it.
/// A task from the start would cost every settlement two wake-ups.
struct FinishOnDrop<'t, T: Send + 'static> {
    run: Option<Pin<Box<dyn Future<Output = T> + Send>>>,
    tasks: &'t TaskTracker,
}

impl<T: Send + 'static> Future for FinishOnDrop<'_, T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let Some(run) = &mut self.run else { return Poll::Pending };
        let output = std::task::ready!(run.as_mut().poll(cx));
        self.run = None;
        Poll::Ready(output)
    }
}

impl<T: Send + 'static> Drop for FinishOnDrop<'_, T> {
    fn drop(&mut self) {
        if let Some(run) = self.run.take() {
            self.tasks.spawn(run);
        }
    }
}

/// What to publish, and when the message comes back.
fn verdict(action: Action, hold: &HeldDelivery) -> (AckKind, Option<Duration>) {
    match action {
        Action::Ack => (AckKind::Ack, None),
        Action::Term(reason) => (AckKind::Term(reason), None),
        Action::Nak(wanted) => {
            let (asked, real) = hold.spec.nak_delay(wanted, hold.delivery_count);
            let again = !hold.spec.last_attempt(hold.delivery_count);
            (AckKind::Nak(asked), again.then_some(real))
        }
        Action::Extend(_) => (AckKind::Progress, None),
    }
}

fn judged(outcome: &Result<(), BrokerError>) -> PublishOutcome {
    match outcome {
        Ok(()) => PublishOutcome::Confirmed,
        Err(BrokerError::Unsent(_)) => PublishOutcome::Unsent,
        // ApiError for want of rights: it had no effect, so the holder keeps the lease.
        Err(BrokerError::Denied(Denial::Permission(_))) => PublishOutcome::Unsent,
        Err(BrokerError::Denied(Denial::Gone)) => PublishOutcome::Denied,
        Err(BrokerError::Unconfirmed) => PublishOutcome::Unconfirmed,
    }
}

fn failure(error: BrokerError, after: LeaseStatus) -> Error {
    match error {
        BrokerError::Unsent(why) => match after {
            LeaseStatus::Held => Error::Unavailable(why),
            // This try did not leave, but an earlier one may have been applied.
            LeaseStatus::Uncertain => Error::Unconfirmed,
            LeaseStatus::Gone => Error::LeaseExpired { forgotten: false },
        },
        BrokerError::Denied(Denial::Gone) => Error::ConsumerGone,
        BrokerError::Denied(Denial::Permission(subject)) => Error::Permission(subject),
        BrokerError::Unconfirmed => Error::Unconfirmed,
    }
}

impl From<LeaseError> for Error {
    fn from(refusal: LeaseError) -> Self {
        match refusal {
            LeaseError::Expired { forgotten } => Self::LeaseExpired { forgotten },
            LeaseError::Settled { by } => Self::LeaseSettled(by),
            LeaseError::Busy => Self::LeaseBusy,
        }
    }
}
