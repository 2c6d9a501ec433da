//! One Fetch call: from its permits to its answer.
//!
//! tonic drops a call when its client goes away. Until the answer is written nothing has been promised to
//! anyone. So two guards hold everything on the way and give it back when they are dropped: the waiter leaves
//! its pump ([`Leave`]), and deliveries go to the next waiter ([`DeliveryGuard`]).

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{sync::oneshot, time::timeout_at};

use super::{
    Action, Codec, Error, Lessor, SettleItem,
    consumer::{ConsumerHandle, DeliveryGuard, FetchAnswer, Ticket},
    delivery::{
        AnswerEnd, FetchCaller, Holding, LeaseRequest, LeasedDelivery, Rejected, RejectedCause,
    },
    metered::OpenFetch,
};
use crate::{
    broker::{Broker, Confirmation, ConsumerInfo, ConsumerName, InfoError},
    clock,
    pump::Want,
};

/// The request of a caller, checked and clamped.
#[derive(Debug, Clone)]
pub struct FetchParams {
    /// The consumer.
    pub name: ConsumerName,
    /// Most messages, at least 1.
    pub n: u32,
    /// Most bytes of the encoded answer.
    pub max_bytes: u64,
    /// Longest wait for a first message. Zero returns the messages that are there now.
    pub max_wait: Duration,
    /// The time to collect further messages after the first.
    pub linger: Duration,
    /// The length of the leases; `None` is JetStream's ack wait.
    pub lease: Option<Duration>,
    /// The caller.
    pub caller: Arc<FetchCaller>,
    /// The principal that the leases belong to.
    pub principal: Arc<str>,
    /// The codec that payloads must fit.
    pub codec: Codec,
    /// The caller's own deadline, if it has one.
    pub patience: Option<CallerDeadline>,
}

/// The caller's deadline, less the time that an answer takes.
#[derive(Debug, Clone, Copy)]
pub struct CallerDeadline {
    /// Stop waiting then.
    pub until: Instant,
    /// The answer must be on its way by then: time enough to find out why there is nothing.
    pub answer_by: Instant,
}

/// An answer to a caller. Its guard gives the messages back if the answer is dropped on its way.
#[derive(Debug)]
pub struct Fetched {
    pub(super) deliveries: DeliveryGuard,
    codec: Codec,
    max_bytes: u64,
    empty: Option<Empty>,
    pending: u64,
    ack_pending: u64,
}

/// Why there are no messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Empty {
    /// There were none.
    NoMessages,
    /// The consumer's limit of unsettled deliveries is reached.
    MaxAckPending,
    /// The consumer is paused.
    Paused,
    /// This replica is going.
    Draining,
    /// There was something, and it was rejected.
    Rejected,
    /// The attempt that the caller has named is over.
    AttemptOver,
}

impl<B: Broker> Lessor<B> {
    /// Waits for messages and leases them.
    ///
    /// # Errors
    /// See [`Error`]. Messages that were pulled for a failed call go to the next call.
    pub async fn fetch(&self, ask: FetchParams) -> Result<Fetched, Error> {
        let mut open = OpenFetch::new(self.core.metrics.clone());
        let answer = self.answer(ask, &mut open).await;
        open.answered(&answer);
        answer
    }

    async fn answer(&self, ask: FetchParams, open: &mut OpenFetch) -> Result<Fetched, Error> {
        let _place = self.admit(&ask.name)?;
        let now = clock::now();
        let until = now + ask.max_wait;
        let until = ask.patience.map_or(until, |patience| patience.until.min(until));
        let want = Want {
            n: ask.n,
            max_bytes: ask.max_bytes,
            until,
            linger: ask.linger.min(until.saturating_duration_since(now)),
            no_wait: ask.max_wait.is_zero(),
        };
        let account = self.core.accounts.of(&ask.principal);
        let holding = Holding::For(ask.lease);
        let lease = LeaseRequest { holding, caller: ask.caller, account };
        // The pump does not look at the end of a wait of zero.
        let patience = ask.patience.filter(|_| want.no_wait).map(|patience| patience.until);
        let answer = self.wait(&ask.name, want, lease, patience, open).await?;
        let mut fetched = Fetched::new(answer, ask.codec, ask.max_bytes);
        let answer_by = until + self.core.limits.settle_timeout;
        let answer_by = ask.patience.map_or(answer_by, |patience| patience.answer_by);
        self.terminate_rejected(&mut fetched, answer_by).await;
        if fetched.messages().is_empty() && fetched.empty.is_none() {
            self.explain(&mut fetched, &ask.name, answer_by).await?;
        }
        Ok(fetched)
    }

    /// One more open call, or a refusal at once.
    pub(super) fn admit(
        &self,
        name: &ConsumerName,
    ) -> Result<tokio::sync::OwnedSemaphorePermit, Error> {
        if self.core.draining.is_cancelled() {
            return Err(Error::Draining);
        }
        // The task of a consumer may have leased messages that nobody has taken.
        if self.core.table.is_full() && !self.calls.handles().contains_key(name) {
            return Err(Error::LeaseLimit(self.core.table.most()));
        }
        let place = self.calls.waiters.clone().try_acquire_owned();
        place.map_err(|_| Error::WaiterLimit(self.core.limits.max_waiters))
    }

    /// Waits for the task's answer. Nothing has come for this call if there is none at `until`.
    async fn wait(
        &self,
        name: &ConsumerName,
        want: Want,
        lease: LeaseRequest,
        until: Option<Instant>,
        open: &mut OpenFetch,
    ) -> Result<FetchAnswer, Error> {
        let (reply, answer) = oneshot::channel();
        let ticket = Ticket(self.calls.tickets.fetch_add(1, Ordering::Relaxed));
        let handle = self.join(name, ticket, want, lease, reply);
        open.joined(&handle.meter);
        let leave = Leave { handle: &handle, ticket, armed: true };
        let answer = tokio::select! {
            biased;
            answer = answer => answer,
            () = clock::sleep_until(until) => {
                let deliveries = DeliveryGuard::new(Vec::new(), None, handle.clone(), AnswerEnd::default());
                return Ok(FetchAnswer { deliveries, draining: false });
            }
        };
        // A task answers everybody before it ends. A task that does not has been torn down.
        let answer = answer.unwrap_or(Err(Error::Draining))?;
        leave.disarm();
        Ok(answer)
    }

    /// Terminates what the codec does not take; it goes to the caller as rejected.
    pub(super) async fn terminate_rejected(&self, fetched: &mut Fetched, until: Instant) {
        let Fetched { deliveries, codec, .. } = fetched;
        let (mut misfits, mut reasons) = (Vec::new(), Vec::new());
        let check = |leased: &LeasedDelivery| codec.check(leased.delivery()).err();
        if let Some(first) = deliveries.messages.iter().position(|leased| check(leased).is_some()) {
            for leased in deliveries.messages.split_off(first) {
                match check(&leased) {
                    None => deliveries.messages.push(leased),
                    Some(reason) => {
                        reasons.push(reason);
                        misfits.push(leased);
                    }
                }
            }
        }
        if misfits.is_empty() {
            return;
        }
        self.lend_as_unset(&mut misfits);
        let asks = misfits.iter().zip(&reasons).map(|(leased, reason)| SettleItem {
            lease: leased.id,
            action: Action::Term(format!("fetch-proxy: {reason}")),
            by: None,
        });
        let results = self.settle(asks.collect(), Confirmation::Confirmed, until).await;
        for ((leased, reason), result) in misfits.into_iter().zip(reasons).zip(results) {
            if let Err(error) = &result {
                tracing::warn!(%error, "a message that fails its codec could not be terminated");
            }
            let cause = RejectedCause::Codec(reason);
            deliveries.rejected.push(Rejected { leased, cause, held: result.is_err() });
        }
        if deliveries.messages.is_empty() {
            fetched.empty = Some(Empty::Rejected);
        }
    }

    /// Lets leases end with JetStream's patience. Where a Term fails after its caller has left, nobody
    /// has the token, and a long lease would keep the message from everybody.
    fn lend_as_unset(&self, misfits: &mut [LeasedDelivery]) {
        let now = clock::now();
        self.core.table.with(|table| {
            for leased in misfits {
                // One that is over is refused again by its Term.
                if let Ok(lent) = table.assign(leased.id, None, now) {
                    (leased.deadline, leased.settle_by) = (lent.deadline, lent.settle_by);
                }
            }
        });
    }

    /// Finds out why nothing came; "no messages" is never said while NATS is away.
    async fn explain(
        &self,
        fetched: &mut Fetched,
        name: &ConsumerName,
        until: Instant,
    ) -> Result<(), Error> {
        let Some(handle) = &fetched.deliveries.handle else { return Ok(()) };
        let info = self.recent_info(handle, name, until).await?;
        (fetched.pending, fetched.ack_pending) = (info.pending, info.ack_pending);
        fetched.empty = Some(Empty::of(&info));
        Ok(())
    }

    /// INFO that is at most a second old. Calls that ask together share one request.
    pub(super) async fn recent_info(
        &self,
        handle: &ConsumerHandle,
        name: &ConsumerName,
        until: Instant,
    ) -> Result<ConsumerInfo, Error> {
        const FRESH: Duration = Duration::from_secs(1);
        const EXPLAIN_TIMEOUT: Duration = Duration::from_secs(2);
        const EXPLAIN_TRIES: u32 = 2;
        const EXPLAIN_PAUSE: Duration = Duration::from_millis(250);
        let Ok(mut recent) = timeout_at(until.into(), handle.recent_info.lock()).await else {
            return Err(Error::Unavailable("the consumer was not read in time".to_owned()));
        };
        let now = clock::now();
        if let Some((read_at, info)) = &*recent
            && now.duration_since(*read_at) < FRESH
        {
            return Ok(info.clone());
        }
        let mut info = self.info(name, until.min(now + EXPLAIN_TIMEOUT)).await;
        // The task knew the consumer a moment ago, so somebody may be making it again.
        let gone = |info: &Result<_, InfoError>| {
            matches!(info, Err(InfoError::NoStream | InfoError::NoConsumer))
        };
        for _ in 0..EXPLAIN_TRIES {
            let again = clock::now() + EXPLAIN_PAUSE;
            if !gone(&info) || again >= until {
                break;
            }
            clock::sleep_until(Some(again)).await;
            info = self.info(name, until.min(again + EXPLAIN_TIMEOUT)).await;
        }
        let info = info.map_err(|error| Error::of_info(error, name))?;
        *recent = Some((clock::now(), info.clone()));
        let meter = handle.meter.get();
        meter.iter().for_each(|meter| meter.seen(info.pending, info.ack_pending, clock::now()));
        Ok(info)
    }
}

impl Empty {
    /// Why a consumer in this state gives nothing out.
    pub(super) fn of(info: &ConsumerInfo) -> Self {
        if info.paused {
            Self::Paused
        } else if info.max_ack_pending.is_some_and(|most| info.ack_pending >= most) {
            Self::MaxAckPending
        } else {
            Self::NoMessages
        }
    }
}

impl Fetched {
    /// The messages of a flow.
    pub(super) fn of(deliveries: DeliveryGuard, codec: Codec, max_bytes: u64) -> Self {
        Self::new(FetchAnswer { deliveries, draining: false }, codec, max_bytes)
    }

    fn new(answer: FetchAnswer, codec: Codec, max_bytes: u64) -> Self {
        let FetchAnswer { deliveries, draining } = answer;
        let (messages, rejected) = (deliveries.messages(), deliveries.rejected());
        let last = messages.last().or(rejected.first().map(|rejected| &rejected.leased));
        let pending = last.map_or(0, |leased| leased.delivery().pending);
        let empty = match (rejected, draining) {
            ([_, ..], _) => Some(Empty::Rejected),
            ([], true) => Some(Empty::Draining),
            ([], false) => None,
        };
        let empty = empty.filter(|_| messages.is_empty());
        Self { deliveries, codec, max_bytes, empty, pending, ack_pending: 0 }
    }

    /// The answer to a repeated call: messages that are leased to its attempt. Without any, the attempt is over.
    pub(super) fn again(
        messages: Vec<LeasedDelivery>,
        rejected: Vec<Rejected>,
        (codec, max_bytes): (Codec, u64),
    ) -> Self {
        let empty = if rejected.is_empty() { Empty::AttemptOver } else { Empty::Rejected };
        let empty = messages.is_empty().then_some(empty);
        let pending = messages.last().map_or(0, |leased| leased.delivery().pending);
        let deliveries = DeliveryGuard::again(messages, rejected);
        Self { deliveries, codec, max_bytes, empty, pending, ack_pending: 0 }
    }

    /// The messages, each leased.
    pub fn messages(&self) -> &[LeasedDelivery] {
        self.deliveries.messages()
    }

    /// Messages that could not be given as asked.
    pub fn rejected(&self) -> &[Rejected] {
        self.deliveries.rejected()
    }

    /// The codec that the caller asked for.
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// Most bytes of the encoded answer.
    pub fn max_bytes(&self) -> u64 {
        self.max_bytes
    }

    /// Why there are no messages.
    pub fn empty(&self) -> Option<Empty> {
        self.empty
    }

    /// Messages left for this consumer, as last seen.
    pub fn pending(&self) -> u64 {
        self.pending
    }

    /// Unsettled deliveries of the consumer, to anyone. They are known if INFO was asked why there are no
    /// messages, and 0 otherwise.
    pub fn ack_pending(&self) -> u64 {
        self.ack_pending
    }

    /// The guard of the messages, for the rest of their way.
    pub fn into_deliveries(self) -> DeliveryGuard {
        self.deliveries
    }

    /// From now on the messages are the caller's.
    pub fn delivered(self) {
        self.deliveries.deliver();
    }
}

/// Tells the pump that its waiter has gone.
struct Leave<'f> {
    handle: &'f ConsumerHandle,
    ticket: Ticket,
    armed: bool,
}

impl Leave<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.handle.leave(self.ticket);
        }
    }
}
