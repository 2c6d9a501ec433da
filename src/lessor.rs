//! Grants leases on deliveries and ends them: Fetch, Ack, Nak, Term, Extend and the passing of time.
//!
//! ```text
//!  fetch ──▶ consumer (one task each) ──pull───▶ broker        sweep (one task)
//!              │ pump decides                                     │ progress, release
//!              ▼ grant, lend                                      ▼
//!            ┌───────────────────── books: the lease table ─────────────────────┐
//!              ▲ begin, finish, extend
//!  settle ─────┘──────publish──▶ broker
//! ```
//! Owns the tasks and the lock around the pure parts (`lease`, `pump`). It must never name a wire:
//! tonic and tokens are `grpc`'s, async-nats is `nats`'s. No lock is held across an await.

mod accounts;
mod attempt_call;
mod attempts;
mod codec;
mod consumer;
mod core;
mod delivery;
mod error;
mod fetch;
mod flow;
mod flow_queue;
mod handover;
mod inspect;
mod leadership;
mod metered;
mod repeat;
mod results;
mod rights;
mod settle;
mod shares;
mod sighting;
mod spec;
mod sweep;
mod table;
mod turn;
mod underway;
mod unsettled;

use std::{
    collections::BTreeMap,
    future::Future,
    sync::{Arc, Mutex, MutexGuard, atomic::AtomicU64},
    time::{Duration, Instant},
};

use tokio::{
    sync::{Semaphore, mpsc, oneshot},
    time::timeout,
};

pub(crate) use self::spec::encoded_size;
pub use self::{
    attempt_call::{AttemptBegun, AttemptCall, AttemptFound, LentAttempt},
    attempts::AttemptKey,
    codec::Codec,
    consumer::{DeliveryGuard, TaskState, monitor, quarantine},
    delivery::{FetchCaller, Holding, LeasedDelivery, Rejected, RejectedCause},
    error::{Error, Unsuitable},
    fetch::{CallerDeadline, Empty, FetchParams, Fetched},
    flow::{Flow, FlowIdle, FlowParams},
    flow_queue::{EndedLease, FlowEnd, Settling},
    handover::{IncomingLease, MovedAnswer, OutgoingLease, ReservedLeases},
    inspect::{ConsumerState, LeaseSeen, ReleaseOutcome},
    repeat::LentLease,
    results::{Group, Results, Unreported},
    settle::{Action, SettleItem, Settled},
    sighting::{Sighting, Telling},
    spec::{ConsumerSpec, SHORTEST_ACK_WAIT},
};
use self::{
    consumer::{ConsumerCommand, ConsumerHandle, ConsumerTask, FetchAnswer, Ticket},
    core::Core,
    delivery::LeaseRequest,
    sighting::SIGHTING_TIMEOUT,
    sweep::Sweeper,
};
pub use crate::pump::Credit;
use crate::{
    broker::{
        AckPublish, Broker, BrokerError, Confirmation, ConsumerInfo, ConsumerName, InfoError,
    },
    lock::lock,
    metrics::Metrics,
    pump::Want,
    simulated::spawn,
};

/// How much a lessor takes on.
#[derive(Debug, Clone)]
pub struct LeaseLimits {
    /// Leases held at once, and places that open pulls have reserved.
    pub max_leases: usize,
    /// The same of one consumer. It never has more than nine tenths of what is free and its own.
    pub max_leases_per_consumer: usize,
    /// The longest that a caller keeps a lease without extending it; a longer one is lowered to it.
    pub max_lease: Duration,
    /// Fetch calls open at once.
    pub max_waiters: usize,
    /// Bytes that the open pulls of one connection may bring together.
    pub max_pull_bytes: u64,
    /// Longest wait for the confirmation of a settlement.
    pub settle_timeout: Duration,
}

/// The lessor, shared by all who ask something of it.
pub struct Lessor<B: Broker> {
    core: Arc<Core<B>>,
    calls: Arc<Calls>,
}

/// The open calls, and the ways to the tasks of consumers.
struct Calls {
    handles: Mutex<BTreeMap<ConsumerName, ConsumerHandle>>,
    /// Permits for open Fetch calls.
    waiters: Arc<Semaphore>,
    tickets: AtomicU64,
}

impl<B: Broker> Clone for Lessor<B> {
    fn clone(&self) -> Self {
        Self { core: self.core.clone(), calls: self.calls.clone() }
    }
}

impl<B: Broker> Lessor<B> {
    /// A lessor on this broker. Its tasks run on the present runtime until [`Lessor::close`].
    pub fn start(broker: B, limits: LeaseLimits) -> Self {
        Self::metered(broker, limits, Metrics::default())
    }

    /// The same, with the metrics of its process.
    pub fn metered(broker: B, limits: LeaseLimits, metrics: Metrics) -> Self {
        let waiters = Arc::new(Semaphore::new(limits.max_waiters.min(Semaphore::MAX_PERMITS)));
        let core = Arc::new(Core::new(broker, limits, metrics));
        spawn(&core.tasks, Sweeper(core.clone()).run());
        let calls = Calls { handles: Mutex::default(), waiters, tickets: AtomicU64::new(0) };
        let lessor = Self { core, calls: Arc::new(calls) };
        lessor.show();
        lessor
    }

    /// The metrics that it counts in.
    pub fn metrics(&self) -> &Metrics {
        &self.core.metrics
    }

    /// The broker that it works on.
    pub fn broker(&self) -> &B {
        &self.core.broker
    }

    /// Leases that are held now.
    pub fn held(&self) -> usize {
        self.core.table.with(|table| table.len())
    }

    /// Leases that callers of this principal hold now.
    pub fn held_for(&self, principal: &str) -> usize {
        self.core.accounts.held(principal)
    }

    /// Longest wait for the confirmation of a settlement.
    pub fn settle_timeout(&self) -> Duration {
        self.core.limits.settle_timeout
    }

    /// The longest that a caller keeps a lease without extending it.
    pub fn max_lease(&self) -> Duration {
        self.core.limits.max_lease
    }

    /// Leases that may still be granted.
    pub fn room(&self) -> u32 {
        self.core.table.free()
    }

    /// Whether nothing is granted any more.
    pub fn is_draining(&self) -> bool {
        self.core.draining.is_cancelled()
    }

    /// Stops granting: new calls are refused, open ones return when their pull has ended.
    /// Settling continues.
    pub fn drain(&self) {
        self.core.draining.cancel();
    }

    /// Waits until no Fetch is open any more. Only ever comes true after [`Lessor::drain`].
    pub async fn drained(&self) {
        let all = u32::try_from(self.core.limits.max_waiters).unwrap_or(u32::MAX);
        // The semaphore is never closed: an error cannot happen, and would mean there is no waiter.
        drop(self.calls.waiters.acquire_many(all).await);
    }

    /// Waits until no lease is held any more. Only ever comes true after [`Lessor::drained`].
    pub async fn settled(&self) {
        self.core.table.all_free().await;
    }

    /// Ends the tasks; settlements under way are waited for.
    pub async fn close(&self) {
        self.drain();
        self.core.closed.cancel();
        self.core.tasks.close();
        self.core.tasks.wait().await;
    }

    /// Adds a waiter to the task of its consumer.
    fn join(
        &self,
        name: &ConsumerName,
        ticket: Ticket,
        want: Want,
        lease: LeaseRequest,
        reply: oneshot::Sender<Result<FetchAnswer, Error>>,
    ) -> ConsumerHandle {
        self.tell(name, ConsumerCommand::Join { ticket, want, lease, reply })
    }

    /// Tells the task of a consumer something; a task is started if there is none.
    fn tell(&self, name: &ConsumerName, command: ConsumerCommand) -> ConsumerHandle {
        let mut command = Some(command);
        self.tell_with(name, |_, refused| refused.or(command.take()))
    }

    /// The same, with a command that names the way to the task. `command` gets the command that a task which has ended
    /// refused. Without a command, nothing is told.
    fn tell_with(
        &self,
        name: &ConsumerName,
        mut command: impl FnMut(&ConsumerHandle, Option<ConsumerCommand>) -> Option<ConsumerCommand>,
    ) -> ConsumerHandle {
        let (mut handles, mut refused) = (self.calls.handles(), None);
        loop {
            let handle = handles.entry(name.clone()).or_insert_with(|| self.start_task(name));
            let sent = command(handle, refused.take()).map_or(Ok(()), |told| handle.send(told));
            match sent {
                Ok(()) => return handle.clone(),
                // The task has ended, and is not forgotten yet.
                Err(ended) => refused = Some(ended),
            }
            handles.remove(name);
        }
    }

    /// Waits until nothing more is granted.
    pub async fn drains(&self) {
        self.core.draining.cancelled().await;
    }

    /// Runs a task of a call until it ends. [`Lessor::close`] waits for it.
    pub(crate) fn run(&self, task: impl Future<Output = ()> + Send + 'static) {
        spawn(&self.core.tasks, task);
    }

    /// Waits until the lessor is closed.
    pub(crate) async fn closes(&self) {
        self.core.closed.cancelled().await;
    }

    fn start_task(&self, name: &ConsumerName) -> ConsumerHandle {
        let (handle, task) = ConsumerTask::new(self.core.clone(), name.clone());
        let (calls, name) = (self.calls.clone(), name.clone());
        spawn(&self.core.tasks, async move {
            task.run().await;
            calls.forget(&name);
        });
        handle
    }

    /// Whether leases of this consumer may be held. A task leaves its spec before it is forgotten, so the
    /// order matters here.
    fn has_leased_of(&self, name: &ConsumerName) -> bool {
        let served = self.calls.handles().contains_key(name);
        served || self.core.has_left(name)
    }

    /// Reads INFO, and tells the task of the consumer who leads. The task may have seen an earlier leader.
    ///
    /// # Errors
    /// See [`Broker::info`].
    pub async fn info(
        &self,
        name: &ConsumerName,
        until: Instant,
    ) -> Result<ConsumerInfo, InfoError> {
        let info = self.core.broker.info(name, until).await?;
        if self.has_leased_of(name) {
            self.tell(name, ConsumerCommand::Led(info.leader));
        }
        Ok(info)
    }

    /// Publishes settlements of leases that are not here, and waits for their confirmation. The task of the consumer
    /// learns from the outcome whether NATS allows that.
    pub async fn publish(
        &self,
        publishes: Vec<AckPublish>,
        until: Instant,
    ) -> Vec<Result<(), BrokerError>> {
        let name = |publish: &AckPublish| B::delivery_of(&publish.ack).map(|(name, _)| name);
        let names: Vec<_> = publishes.iter().map(name).collect();
        let outcomes = self.core.broker.settle(publishes, Confirmation::Confirmed, until).await;
        for (name, outcome) in names.into_iter().zip(&outcomes) {
            if let Some(name) = name.filter(|name| self.has_leased_of(name)) {
                self.tell(&name, ConsumerCommand::Acked(outcome.clone()));
            }
        }
        outcomes
    }

    /// The sightings that the other replicas must learn from now on. Without a reader there are no other
    /// replicas. There is one reader: a second one gets `None`.
    pub fn sightings(&self) -> Option<mpsc::UnboundedReceiver<Telling>> {
        self.core.sightings()
    }

    /// Takes in a sighting of another replica. After this, or after the wait of that replica, no lease
    /// that the sighting voids is settled here.
    pub async fn heard_of(&self, sighting: Sighting) {
        let name = sighting.name.clone();
        let (reply, answer) = oneshot::channel();
        if self.has_leased_of(&name) {
            self.tell(&name, ConsumerCommand::Heard(sighting, reply));
            // A consumer task that ends drops the answer, and has ended the leases that it doubted.
            let _ = timeout(SIGHTING_TIMEOUT, answer).await;
        }
    }
}

impl Calls {
    fn handles(&self) -> MutexGuard<'_, BTreeMap<ConsumerName, ConsumerHandle>> {
        lock(&self.handles)
    }

    /// Forgets a task that has ended, unless another one has followed.
    fn forget(&self, name: &ConsumerName) {
        let mut handles = self.handles();
        if handles.get(name).is_some_and(ConsumerHandle::has_ended) {
            handles.remove(name);
        }
    }
}
