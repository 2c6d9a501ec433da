//! Grants leases on deliveries and ends them: Fetch, Ack, Nak, Term, Extend and the passing of time.
//!
//! ```text
//!  fetch ──▶ feed (one task a consumer) ──pull──▶ broker        sweep (one task)
//!              │ pump decides                                     │ progress, release
//!              ▼ grant, lend                                      ▼
//!            ┌───────────────────── books: the lease table ─────────────────────┐
//!              ▲ begin, finish, extend
//!  settle ─────┘──────publish──▶ broker
//! ```
//! Owns the tasks and the lock around the pure parts (`lease`, `pump`). It must never name a wire:
//! tonic and tokens are `grpc`'s, async-nats is `nats`'s. No lock is held across an await.

mod codec;
mod consumer;
mod delivery;
mod error;
mod fetch;
mod handover;
mod leadership;
mod results;
mod rights;
mod settle;
mod shares;
mod sighting;
mod spec;
mod sweep;
mod table;
mod turn;
mod unsettled;

use std::{
    collections::HashMap,
    ops::Deref,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

pub(crate) use self::spec::encoded_size;
pub use self::{
    codec::Codec,
    consumer::monitor,
    delivery::LeasedDelivery,
    error::{Error, Unsuitable},
    fetch::{CallerDeadline, Empty, FetchParams, Fetched, Rejected, RejectedCause},
    handover::{IncomingLease, OutgoingLease, ReservedLeases},
    results::{Group, Results, Unreported},
    settle::{Action, SettleItem, Settled},
    sighting::{Sighting, Telling},
    spec::{ConsumerSpec, SHORTEST_ACK_WAIT},
};
use self::{
    consumer::{ConsumerCommand, ConsumerHandle, ConsumerTask, FetchAnswer, Ticket},
    delivery::LeaseRequest,
    shares::Shares,
    table::{HeldDelivery, SharedLeaseTable},
    unsettled::UnsettledLog,
};
use crate::{
    broker::{Broker, ConsumerName},
    clock,
    lease::{ConsumerId, LeaseTable},
    lock::lock,
    log_throttle::LogThrottle,
    pump::Want,
};

/// Consumers that may have a connection of their own at once.
const MAX_DEDICATED_CONNECTIONS: usize = 64;
/// Looks for unreadable messages at once: each brings up to 4 MiB at a time, before acks.
const MAX_POISON_SEARCHES: usize = 4;

/// Lines of the log in ten seconds that say which consumer cannot be read.
const UNREADABLE_LINES_PER_TEN_SECONDS: u32 = 10;

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

/// The lessor, shared by everybody who asks of it.
pub struct Lessor<B: Broker>(Arc<Shared<B>>);

/// What the lessor's calls and tasks share.
pub struct Shared<B: Broker> {
    broker: B,
    table: SharedLeaseTable,
    limits: LeaseLimits,
    waiters: Arc<Semaphore>,
    /// What pulls on the shared connection may bring.
    shares: Shares,
    /// Connections that consumers may have of their own.
    apart: Arc<Semaphore>,
    /// Looks for unreadable messages that may go on at once.
    looks: Semaphore,
    handles: Mutex<HashMap<ConsumerName, ConsumerHandle>>,
    /// Whether the log may say of one more consumer why it cannot be read.
    unread: LogThrottle,
    /// Who lets leases end, and whether the log may say so of one more.
    unsettled: (UnsettledLog, LogThrottle),
    /// What was known of consumers whose feeds have ended while leases were held.
    left: Mutex<HashMap<ConsumerName, Arc<ConsumerSpec>>>,
    /// The way to the other replicas, if there can be any.
    herald: OnceLock<mpsc::UnboundedSender<Telling>>,
    tickets: AtomicU64,
    consumers: AtomicU32,
    tasks: TaskTracker,
    /// The clocks stand still: leases are being handed over.
    frozen: watch::Sender<bool>,
    draining: CancellationToken,
    closed: CancellationToken,
}

impl<B: Broker> Clone for Lessor<B> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<B: Broker> Deref for Lessor<B> {
    type Target = Shared<B>;

    fn deref(&self) -> &Shared<B> {
        &self.0
    }
}

impl<B: Broker> Lessor<B> {
    /// A lessor on this broker. Its tasks run on the present runtime until [`Lessor::close`].
    pub fn start(broker: B, limits: LeaseLimits) -> Self {
        let lessor = Self(Arc::new(Shared {
            broker,
            table: SharedLeaseTable::new(limits.max_leases, limits.max_lease, clock::now()),
            waiters: Arc::new(Semaphore::new(limits.max_waiters.min(Semaphore::MAX_PERMITS))),
            shares: Shares::new(limits.max_pull_bytes),
            apart: Arc::new(Semaphore::new(MAX_DEDICATED_CONNECTIONS)),
            looks: Semaphore::new(MAX_POISON_SEARCHES),
            limits,
            handles: Mutex::default(),
            unread: LogThrottle::few(UNREADABLE_LINES_PER_TEN_SECONDS),
            unsettled: (
                UnsettledLog::default(),
                LogThrottle::few(UNREADABLE_LINES_PER_TEN_SECONDS),
            ),
            left: Mutex::default(),
            herald: OnceLock::new(),
            tickets: AtomicU64::new(0),
            consumers: AtomicU32::new(0),
            tasks: TaskTracker::new(),
            frozen: watch::channel(false).0,
            draining: CancellationToken::new(),
            closed: CancellationToken::new(),
        }));
        lessor.tasks.spawn(lessor.clone().sweep());
        lessor
    }

    /// The broker that it works on.
    pub fn broker(&self) -> &B {
        &self.broker
    }

    /// Leases that are held now.
    pub fn held(&self) -> usize {
        self.table.with(|table| table.len())
    }

    /// Longest wait for the confirmation of a settlement.
    pub fn settle_timeout(&self) -> Duration {
        self.limits.settle_timeout
    }

    /// The longest that a caller keeps a lease without extending it.
    pub fn max_lease(&self) -> Duration {
        self.limits.max_lease
    }

    /// Leases that may still be granted.
    pub fn room(&self) -> u32 {
        self.table.free()
    }

    /// Whether nothing is granted any more.
    pub fn is_draining(&self) -> bool {
        self.draining.is_cancelled()
    }

    /// Stops granting: new calls are refused, open ones return when their pull has ended.
    /// Settling goes on.
    pub fn drain(&self) {
        self.draining.cancel();
    }

    /// Waits until no Fetch is open any more. Only ever comes true after [`Lessor::drain`].
    pub async fn drained(&self) {
        let all = u32::try_from(self.limits.max_waiters).unwrap_or(u32::MAX);
        // The semaphore is never closed: an error cannot happen, and would mean there is no waiter.
        drop(self.waiters.acquire_many(all).await);
    }

    /// Waits until no lease is held any more. Only ever comes true after [`Lessor::drained`].
    pub async fn settled(&self) {
        self.table.all_free().await;
    }

    /// Ends the tasks; settlements under way are waited for.
    pub async fn close(&self) {
        self.drain();
        self.closed.cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Adds a waiter to the feed of its consumer.
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

    /// Tells the feed of a consumer something; one is started if there is none.
    fn tell(&self, name: &ConsumerName, mut command: ConsumerCommand) -> ConsumerHandle {
        let mut handles = lock(&self.handles);
        loop {
            let handle = handles.entry(name.clone()).or_insert_with(|| {
                let (handle, task) = ConsumerTask::new(self.clone(), name.clone());
                self.tasks.spawn(task.run());
                handle
            });
            match handle.send(command) {
                Ok(()) => return handle.clone(),
                // It has ended and not told yet.
                Err(refused) => command = refused,
            }
            handles.remove(name);
        }
    }

    /// Whether leases of this consumer may be held. A feed keeps what it leaves before it is forgotten,
    /// so the order matters here.
    fn has_leased_of(&self, name: &ConsumerName) -> bool {
        let served = lock(&self.handles).contains_key(name);
        served || lock(&self.left).contains_key(name)
    }

    /// Keeps what an ending feed knows of its consumer, for the feed that follows.
    fn leave(&self, spec: Arc<ConsumerSpec>) {
        let mut left = lock(&self.left);
        left.insert(spec.name.clone(), spec);
    }

    /// What the last feed of this consumer has left.
    fn take_left(&self, name: &ConsumerName) -> Option<Arc<ConsumerSpec>> {
        lock(&self.left).remove(name)
    }

    /// Forgets a feed that takes no more commands.
    fn forget_handle(&self, name: &ConsumerName) {
        let mut handles = lock(&self.handles);
        if handles.get(name).is_some_and(ConsumerHandle::has_ended) {
            handles.remove(name);
        }
    }

    /// Revises many leases, a bounded number under each lock.
    fn in_steps(&self, revise: impl Fn(&mut LeaseTable<HeldDelivery>, Option<u64>) -> Option<u64>) {
        let mut after = None;
        loop {
            after = self.table.with(|table| revise(table, after));
            if after.is_none() {
                return;
            }
        }
    }

    /// A name for one more incarnation of a consumer.
    fn next_consumer(&self) -> ConsumerId {
        ConsumerId(self.consumers.fetch_add(1, Ordering::Relaxed))
    }
}
