//! Settles and extends leases. The lease table decides first, the broker publishes only for a lease that
//! is held, and the outcome goes back into the table. This order is the fence.
//!
//! A settlement that has begun runs to its end, also if its caller leaves.

use std::{
    collections::HashSet,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use tokio_util::task::TaskTracker;

use super::{
    Error, Lessor,
    accounts::LeaseHolder,
    consumer::ConsumerCommand,
    metered,
    results::{Group, Results},
    spec::ConsumerSpec,
    table::HeldDelivery,
};
use crate::{
    broker::{AckKind, AckPublish, Broker, BrokerError, Confirmation, Denial},
    clock,
    lease::{
        BeginResult, LeaseError, LeaseId, LeaseStatus, LeaseTable, PublishOutcome, SettleKind,
    },
    metrics::{LeaseEnd, SettlementKind},
    simulated::spawn,
};

const IN_DOUBT: &str = "it is not known which server leads the consumer";
/// A leader that has not answered for this long may be away. Callers may wait for a shorter time.
const LEADER_PATIENCE: Duration = Duration::from_millis(250);

/// One token's part of a Settle.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SettleItem {
    /// The lease.
    pub lease: LeaseId,
    /// The action on the lease.
    pub action: Action,
    /// The principal that the lease must belong to. `None`: any.
    pub by: Option<Arc<str>>,
}

/// An action on a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// The message is done.
    Ack,
    /// Deliver the message again, this long from now.
    Nak(Duration),
    /// Never deliver the message again, for this reason.
    Term(String),
    /// Let the lease end this long from now. Without a length it is the length of the assignment.
    Extend(Option<Duration>),
}

/// The result of a settlement or an Extend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Settled {
    /// Settled.
    Done {
        /// Whether JetStream has confirmed it, or it was only sent, now or by an earlier call.
        confirmation: Confirmation,
        /// The time until the message is delivered again, at the latest. Set for a Nak, unless it was the
        /// last attempt.
        redelivered_in: Option<Duration>,
    },
    /// Settled in the same way before.
    Duplicate,
    /// Extended: the lease ends at this time.
    Extended(Instant),
}

/// A settlement that the table allowed.
struct Begin {
    lease: LeaseId,
    kind: SettlementKind,
    spec: Arc<ConsumerSpec>,
    redelivered_in: Option<Duration>,
}

/// How settlements were published.
#[derive(Clone, Copy)]
struct Sent {
    at: Instant,
    /// Nobody waits for longer.
    until: Instant,
    confirmation: Confirmation,
}

/// The meaning of an outcome for the leader of the consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum LeaderSign {
    /// The connection is gone, so another server may lead.
    Unheard,
    /// The connection was there, and nobody led.
    Missed,
}

impl LeaderSign {
    /// `None`: the outcome says nothing about the leader.
    fn of(outcome: &Result<(), BrokerError>, sent: Sent, now: Instant) -> Option<Self> {
        match outcome {
            Ok(()) | Err(BrokerError::Denied(_) | BrokerError::Late) => None,
            Err(BrokerError::Leaderless(_)) => Some(Self::Missed),
            Err(BrokerError::Unconfirmed) if now - sent.at >= LEADER_PATIENCE => Some(Self::Missed),
            // The caller was in a hurry.
            Err(BrokerError::Unconfirmed) if now >= sent.until => None,
            Err(BrokerError::Unconfirmed | BrokerError::Unsent(_)) => Some(Self::Unheard),
        }
    }
}

/// The settlements that are published together.
struct Round {
    begun: Group<Begin>,
    /// One for each of `begun`, in the same order.
    publishes: Vec<AckPublish>,
    /// Items that name a lease of this round again.
    later: Group<SettleItem>,
}

impl<B: Broker> Lessor<B> {
    /// Settles or extends each lease: one result each, in order. A settlement without an answer ends as
    /// [`Error::Unconfirmed`] at `until`, or after the settle timeout if that is sooner.
    ///
    /// If a list names a lease twice, the second item waits until the first settlement has ended. It
    /// has the result that a later call would have.
    pub async fn settle(
        &self,
        items: Vec<SettleItem>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<Result<Settled, Error>> {
        let until = until.min(clock::now() + self.core.limits.settle_timeout);
        let mut results = Results::new(items.len());
        let mut round = self.begin(items.into(), &mut results);
        if round.begun.is_empty() {
            return results.into_vec();
        }
        let lessor = self.clone();
        let run = async move {
            // One round, unless a lease is named again.
            while !round.begun.is_empty() {
                let sent_at = clock::now();
                let outcomes =
                    lessor.core.broker.settle(round.publishes, confirmation, until).await;
                let took = clock::now().saturating_duration_since(sent_at);
                let kinds = round.begun.items().iter().map(|begun| begun.kind);
                lessor.core.metrics.leases().published(kinds, took);
                let sent = Sent { at: sent_at, until, confirmation };
                lessor.finish(&mut results, round.begun, outcomes, sent);
                round = lessor.begin(round.later, &mut results);
            }
            results.into_vec()
        };
        FinishOnDrop { run: Some(Box::pin(run)), tasks: &self.core.tasks }.await
    }

    /// Asks the table. The items of the round have no result yet. All others have one.
    fn begin(
        &self,
        items: Group<SettleItem>,
        results: &mut Results<Result<Settled, Error>>,
    ) -> Round {
        let now = clock::now();
        let mut begun: Group<Begin> = Group::with_capacity(items.items().len());
        let mut publishes = Vec::with_capacity(items.items().len());
        let (mut busy, mut lost, mut arrived) = (Vec::new(), Vec::new(), Vec::new());
        // `None`: the settlement has begun.
        let mut decide = |table: &mut LeaseTable<HeldDelivery>, index, item: &SettleItem| {
            let SettleItem { lease, ref action, .. } = *item;
            check_holder(table, item)?;
            // The caller of an attempt has the token, so its answer has arrived.
            arrived.extend(table.payload(lease).and_then(|hold| hold.attempt.clone()));
            let kind = match action {
                Action::Extend(length) => return extend(table, lease, *length, now).map(Some),
                Action::Ack => SettleKind::Ack,
                Action::Nak(_) => SettleKind::Nak,
                Action::Term(_) => SettleKind::Term,
            };
            let by = table.ack_by(lease);
            let hold = match table.begin(lease, kind, now)? {
                BeginResult::Publish(hold) => hold,
                BeginResult::Duplicate => return Ok(Some(Settled::Duplicate)),
                BeginResult::NakUnconfirmed { ack_wait } => {
                    return Ok(Some(unconfirmed_nak(table, lease, action, ack_wait)));
                }
            };
            if hold.spec.leadership.in_doubt() {
                let (after, gone) = table.finish(lease, PublishOutcome::Unsent, now);
                lost.extend(gone);
                return Err(failure(BrokerError::Unsent(IN_DOUBT.to_owned()), after));
            }
            let (ack, redelivered_in) = ack_kind(action.clone(), hold);
            publishes.push(hold.ack_publish(ack, by));
            let (kind, spec) = (action.kind(), hold.spec.clone());
            begun.push(index, Begin { lease, kind, spec, redelivered_in });
            Ok(None)
        };
        self.core.table.with(|table| {
            for (index, item) in items {
                let result = match decide(table, index, &item) {
                    Ok(None) => continue,
                    Err(Error::LeaseBusy) => {
                        busy.push((index, item));
                        continue;
                    }
                    Ok(Some(settled)) => Ok(settled),
                    Err(error) => Err(error),
                };
                if let Some(hold) = table.payload(item.lease) {
                    metered::settled(&hold.spec.meter, item.action.kind(), &result);
                }
                results.set(index, result);
            }
        });
        metered::ended(&self.core.metrics, LeaseEnd::Lost, &lost, now);
        arrived.dedup();
        arrived.iter().for_each(|attempt| self.core.attempts.arrived(**attempt));
        let mut later = Group::default();
        if !busy.is_empty() {
            let ours: HashSet<LeaseId> = begun.items().iter().map(|begun| begun.lease).collect();
            for (index, item) in busy {
                if ours.contains(&item.lease) {
                    later.push(index, item);
                } else {
                    // Another call is settling this lease.
                    results.set(index, Err(Error::LeaseBusy));
                }
            }
        }
        Round { begun, publishes, later }
    }

    fn finish(
        &self,
        results: &mut Results<Result<Settled, Error>>,
        begun: Group<Begin>,
        outcomes: Vec<Result<(), BrokerError>>,
        sent: Sent,
    ) {
        let now = clock::now();
        let confirmation = sent.confirmation;
        // Consumers that may have another leader now.
        let mut doubtful: Vec<(Arc<ConsumerSpec>, LeaderSign)> = Vec::new();
        let (indices, begun) = begun.into_parts();
        // Holds are dropped after the lock: each freed permit wakes a waiter.
        let mut freed: Vec<(LeaseEnd, HeldDelivery)> = Vec::with_capacity(begun.len());
        let settled = self.core.table.with(|table| {
            let pairs = begun.into_iter().zip(outcomes);
            let settled = pairs.map(|(Begin { lease, kind, spec, redelivered_in }, outcome)| {
                let (after, hold) = table.finish(lease, publish_outcome(&outcome), now);
                let end = metered::end(kind, outcome.is_ok());
                freed.extend(hold.map(|hold| (end, hold)));
                if after == LeaseStatus::Uncertain {
                    // The worker has settled it, so it does not let the lease end.
                    table.update_payload(lease, |hold| {
                        hold.taken.iter_mut().for_each(|taken| taken.is_settled = true);
                    });
                }
                if confirmation == Confirmation::Confirmed || outcome.is_err() {
                    spec.ack_right.learn(&outcome);
                }
                let sign = LeaderSign::of(&outcome, sent, now);
                let result = match outcome {
                    Ok(()) => Ok(Settled::Done { confirmation, redelivered_in }),
                    Err(error) => Err(failure(error, after)),
                };
                metered::settled(&spec.meter, kind, &result);
                // A settlement that came too late to be sent says nothing either.
                let over = matches!(result, Err(Error::LeaseExpired { .. }));
                if let Some(sign) = sign.filter(|_| spec.is_led_elsewhere() && !over) {
                    match doubtful.iter_mut().find(|(known, _)| known.id == spec.id) {
                        Some((_, known)) => *known = sign.max(*known),
                        None => doubtful.push((spec, sign)),
                    }
                }
                result
            });
            settled.collect::<Vec<_>>()
        });
        results.set_all(indices, settled);
        for (end, hold) in freed {
            metered::ended(&self.core.metrics, end, [&hold], now);
        }
        for (spec, sign) in doubtful {
            if spec.leadership.doubt() {
                let missed = sign == LeaderSign::Missed;
                self.tell(&spec.name, ConsumerCommand::Doubt { missed });
            }
        }
    }
}

/// Refuses a lease of another principal. A lease that has ended is judged by the table.
fn check_holder(table: &LeaseTable<HeldDelivery>, item: &SettleItem) -> Result<(), Error> {
    let holder = table.payload(item.lease).and_then(|hold| hold.principal.as_ref());
    let holder = holder.map(LeaseHolder::principal);
    match (&item.by, holder) {
        (Some(by), Some(holder)) if by != holder => Err(Error::NotHolder),
        (Some(_) | None, _) => Ok(()),
    }
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
        // Without the right to ack, nothing can keep the message for longer than the ack wait.
        if let Some(subject) = hold.spec.ack_right.refused() {
            return Err(Error::Permission(subject));
        }
    }
    Ok(Settled::Extended(table.extend(lease, length, now)?))
}

/// A settlement that has begun. The caller polls it, and a task continues it if the caller leaves. A task
/// from the start would cost every settlement two wake-ups.
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
            spawn(self.tasks, run);
        }
    }
}

/// The answer to a Nak whose first attempt may have been applied. The message comes back at the end of the
/// delay, or within the ack wait if the Nak was not applied. The caller hears the later time.
fn unconfirmed_nak(
    table: &LeaseTable<HeldDelivery>,
    lease: LeaseId,
    action: &Action,
    ack_wait: Duration,
) -> Settled {
    let delay = table.payload(lease).and_then(|hold| ack_kind(action.clone(), hold).1);
    let redelivered_in = delay.map(|delay| delay.max(ack_wait));
    Settled::Done { confirmation: Confirmation::Sent, redelivered_in }
}

/// The ack to publish, and the time until the message comes back.
fn ack_kind(action: Action, hold: &HeldDelivery) -> (AckKind, Option<Duration>) {
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

fn publish_outcome(outcome: &Result<(), BrokerError>) -> PublishOutcome {
    match outcome {
        Ok(()) => PublishOutcome::Confirmed,
        Err(BrokerError::Unsent(_) | BrokerError::Leaderless(_)) => PublishOutcome::Unsent,
        // Refused without the right: it had no effect, so the holder keeps the lease.
        Err(BrokerError::Denied(Denial::Permission(_))) => PublishOutcome::Unsent,
        Err(BrokerError::Denied(Denial::Gone)) => PublishOutcome::Denied,
        Err(BrokerError::Late | BrokerError::Unconfirmed) => PublishOutcome::Unconfirmed,
    }
}

fn failure(error: BrokerError, after: LeaseStatus) -> Error {
    match (error, after) {
        // This try did not leave, but an earlier one may have been applied.
        (BrokerError::Unsent(_) | BrokerError::Leaderless(_), LeaseStatus::Uncertain) => {
            Error::Unconfirmed
        }
        (BrokerError::Unsent(_) | BrokerError::Leaderless(_), LeaseStatus::Gone) => {
            Error::LeaseExpired { forgotten: false }
        }
        (error, _) => error.into(),
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
