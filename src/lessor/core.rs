//! The parts that all calls and tasks of a lessor share: the broker, the lease table, the capacity that is
//! left, and the tasks. It knows no consumer's task and no call: they know the core.

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    LeaseLimits,
    accounts::{LeaseAccounts, LeaseHolder},
    attempt_call::SharedAttempts,
    consumer::monitor::LeftKnowledge,
    delivery::{AnswerEnd, GrantedDelivery, Holding, LeaseRequest, LeasedDelivery, TakenLease},
    flow_queue::Debit,
    shares::Shares,
    sighting::{SIGHTING_TIMEOUT, Sighting, Telling},
    spec::ConsumerSpec,
    table::{HeldDelivery, SharedLeaseTable},
    unsettled::UnsettledLog,
};
use crate::{
    broker::{AckKind, Broker, Confirmation, ConsumerName},
    clock,
    lease::{ConsumerId, LeaseTable},
    lock::lock,
    log_throttle::LogThrottle,
    metrics::{Metrics, ReleaseCause},
    simulated::spawn,
};

/// Consumers that may have a connection of their own at the same time.
const MAX_DEDICATED_CONNECTIONS: usize = 64;
/// Searches for unreadable messages at the same time. Each one brings up to 4 MiB at a time, before acks.
const MAX_POISON_SEARCHES: usize = 4;
/// Log lines in ten seconds about consumers that cannot be read, and the same about unsettled leases.
const UNSERVED_LINES_PER_TEN_SECONDS: u32 = 10;

/// A consumer of which leases are held, and no task knows.
pub(super) type LeftConsumer = (Arc<ConsumerSpec>, Option<LeftKnowledge>);

/// See the [module](self).
pub(super) struct Core<B: Broker> {
    pub(super) broker: B,
    pub(super) metrics: Metrics,
    pub(super) table: SharedLeaseTable,
    /// The leases of each principal.
    pub(super) accounts: LeaseAccounts,
    /// The attempts that callers have named.
    pub(super) attempts: Arc<SharedAttempts>,
    pub(super) limits: LeaseLimits,
    /// The bytes that pulls on the shared connection may bring.
    pub(super) shares: Shares,
    /// Permits for a connection of one's own.
    pub(super) dedicated: Arc<Semaphore>,
    /// Permits for searches for unreadable messages.
    pub(super) searches: Semaphore,
    /// Whether the log may say of one more consumer why it cannot be read.
    pub(super) unread: LogThrottle,
    /// The workers that let leases end, and whether the log may name one more.
    pub(super) unsettled: (UnsettledLog, LogThrottle),
    /// The knowledge of consumers whose tasks have ended while leases were held.
    left: Mutex<HashMap<ConsumerName, LeftConsumer>>,
    /// The way to the other replicas, if there can be any.
    herald: OnceLock<mpsc::UnboundedSender<Telling>>,
    consumers: AtomicU32,
    pub(super) tasks: TaskTracker,
    /// The clocks stand still: leases are being handed over.
    pub(super) frozen: watch::Sender<bool>,
    /// No delivery is given back, because its lease is about to belong to another replica.
    pub(super) pinned: AtomicBool,
    pub(super) draining: CancellationToken,
    pub(super) closed: CancellationToken,
}

impl<B: Broker> Core<B> {
    pub(super) fn new(broker: B, limits: LeaseLimits, metrics: Metrics) -> Self {
        let throttle = || LogThrottle::few(UNSERVED_LINES_PER_TEN_SECONDS);
        Self {
            broker,
            metrics,
            table: SharedLeaseTable::new(limits.max_leases, limits.max_lease, clock::now()),
            accounts: LeaseAccounts::default(),
            attempts: Arc::new(SharedAttempts::new(limits.max_leases)),
            shares: Shares::new(limits.max_pull_bytes),
            dedicated: Arc::new(Semaphore::new(MAX_DEDICATED_CONNECTIONS)),
            searches: Semaphore::new(MAX_POISON_SEARCHES),
            limits,
            unread: throttle(),
            unsettled: (UnsettledLog::default(), throttle()),
            left: Mutex::default(),
            herald: OnceLock::new(),
            consumers: AtomicU32::new(0),
            tasks: TaskTracker::new(),
            frozen: watch::channel(false).0,
            pinned: AtomicBool::new(false),
            draining: CancellationToken::new(),
            closed: CancellationToken::new(),
        }
    }

    /// Keeps what an ending task knows, for the task that follows.
    pub(super) fn leave(&self, consumer: LeftConsumer) {
        let mut left = lock(&self.left);
        left.insert(consumer.0.name.clone(), consumer);
    }

    /// Takes what the last task of this consumer has left.
    pub(super) fn take_left(&self, name: &ConsumerName) -> Option<LeftConsumer> {
        lock(&self.left).remove(name)
    }

    /// A task of this consumer has left leases, and no task has followed.
    pub(super) fn has_left(&self, name: &ConsumerName) -> bool {
        lock(&self.left).contains_key(name)
    }

    /// Revises many leases, a bounded number under each lock.
    pub(super) fn in_steps(
        &self,
        revise: impl Fn(&mut LeaseTable<HeldDelivery>, Option<u64>) -> Option<u64>,
    ) {
        let mut after = None;
        loop {
            after = self.table.with(|table| revise(table, after));
            if after.is_none() {
                return;
            }
        }
    }

    /// Consumers that have a connection of their own.
    pub(super) fn own_connections(&self) -> usize {
        MAX_DEDICATED_CONNECTIONS - self.dedicated.available_permits()
    }

    /// An id for one more incarnation of a consumer.
    pub(super) fn next_consumer(&self) -> ConsumerId {
        ConsumerId(self.consumers.fetch_add(1, Ordering::Relaxed))
    }

    /// The sightings that the other replicas must learn from now on. A second reader gets `None`.
    pub(super) fn sightings(&self) -> Option<mpsc::UnboundedReceiver<Telling>> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.herald.set(sender).is_ok().then_some(receiver)
    }

    /// Tells the other replicas, and waits for their answers for a second at most. `None`: there are none.
    pub(super) fn tell_others(
        &self,
        sighting: Sighting,
    ) -> Option<impl Future<Output = ()> + use<B>> {
        let (told, waiting) = oneshot::channel();
        self.herald.get()?.send(Telling { sighting, told }).ok()?;
        Some(async move {
            // The others have answered, or the time is over, or nobody is left. We continue in any case.
            let _ = timeout(SIGHTING_TIMEOUT, waiting).await;
        })
    }
}

/// Gives deliveries back, before JetStream might redeliver them by itself. They come again after `delay`. Nobody
/// waits for an answer: if a Nak does not arrive, the ack wait has the same effect later.
pub(super) fn release<B: Broker>(
    core: &Arc<Core<B>>,
    mut holds: Vec<(HeldDelivery, Instant)>,
    cause: ReleaseCause,
    delay: Duration,
) {
    // A new leader may have given the messages away.
    holds.retain(|(hold, _)| !hold.spec.leadership.in_doubt());
    let Some(by) = holds.iter().map(|(_, by)| *by).min() else { return };
    tracing::debug!(count = holds.len(), "released");
    holds.iter().for_each(|(hold, _)| hold.spec.meter.released(cause));
    let nak = |(hold, by): &(HeldDelivery, Instant)| {
        let (asked, _) = hold.spec.nak_delay(delay, hold.delivery_count);
        let asked = asked.or_else(|| hold.spec.release_delay());
        hold.ack_publish(AckKind::Nak(asked), Some(*by))
    };
    let naks = holds.iter().map(nak).collect();
    let run = core.clone();
    spawn(&core.tasks, async move {
        run.broker.settle(naks, Confirmation::Sent, by).await;
    });
}

/// Makes leases the caller's own, whose answer has this end, each with the credit that it uses. A lease that has ended
/// meanwhile is left out.
pub(super) fn assign<B: Broker>(
    core: &Core<B>,
    granted: Vec<(GrantedDelivery, Option<Debit>)>,
    (request, end): (&LeaseRequest, &AnswerEnd),
    now: Instant,
) -> Vec<LeasedDelivery> {
    core.table.with(|table| {
        let assign = |(granted, debit): (GrantedDelivery, Option<Debit>)| {
            let count = granted.delivery.delivery_count;
            let length = |wanted| granted.spec.lease_length(wanted, count);
            let assigned = match request.holding {
                // Without the right to ack, the lease may be an ordinary one.
                Holding::Kept { at_most, grace } if length(Some(at_most)).is_some() => {
                    table.assign_kept(granted.id, (at_most, grace), now)
                }
                Holding::Kept { .. } => table.assign(granted.id, None, now),
                Holding::For(wanted) => table.assign(granted.id, length(wanted), now),
            };
            let assigned = assigned.ok()?;
            let number = debit.as_ref().map_or(0, Debit::number);
            table.update_payload(granted.id, |held| {
                let by = Some(request.caller.clone());
                held.taken = Some(TakenLease { by, at: now, is_settled: false });
                held.principal = Some(LeaseHolder::new(&request.account));
                held.attempt = None;
                held.answer = Some(end.clone());
                held.debit = debit;
            });
            let (deadline, settle_by) = (assigned.deadline, assigned.settle_by);
            let leader = granted.spec.leadership.leader();
            Some(LeasedDelivery { id: granted.id, deadline, settle_by, leader, number, granted })
        };
        granted.into_iter().filter_map(assign).collect()
    })
}
