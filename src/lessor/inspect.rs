//! The leases and the consumers of this replica as operators see them, and leases that operators take away. A look
//! at the table is bounded: no caller waits long for its lock.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use tokio::{sync::oneshot, task::yield_now, time::timeout_at};

use super::{
    Error, Lessor, Unsuitable,
    consumer::{ConsumerCommand, TaskState},
    core::release,
    delivery::FetchCaller,
    metered,
    spec::{ConsumerSpec, unsuitable},
    table::{HeldDelivery, LEASES_PER_LOCK},
};
use crate::{
    broker::{Broker, ConsumerInfo, ConsumerName},
    clock,
    lease::{ConsumerId, LeaseId, LeaseStage, LeaseView, Revoked, ack_wait_of, margin},
    metrics::{LeaseEnd, ReleaseCause},
};

/// A lease as operators see it, at one moment.
#[derive(Debug, Clone, Copy)]
pub struct LeaseSeen<'t> {
    /// Its id.
    pub id: LeaseId,
    /// Its consumer.
    pub name: &'t ConsumerName,
    /// The message's sequence in its stream.
    pub sequence: u64,
    /// The number of the attempt, from 1.
    pub delivery_count: u64,
    /// The number of delivery attempts. `None`: no limit.
    pub max_deliver: Option<u64>,
    /// Its state.
    pub stage: LeaseStage,
    /// It is the last attempt.
    pub last_attempt: bool,
    /// The end for its holder. `None`: it has none yet.
    pub expires: Option<Instant>,
    /// The principal that it belongs to. `None`: no caller has it, or it is not known.
    pub principal: Option<&'t str>,
    /// The caller that has it. `None`: no caller has it, or the replica that handed it over did not tell.
    pub caller: Option<&'t FetchCaller>,
    /// When the caller got it, or when it was adopted from a replica that does not tell. `None`: the proxy itself has it, for the next caller.
    pub since: Option<Instant>,
}

/// The outcome for one lease that an operator takes away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReleaseOutcome {
    /// It has ended. Its message goes back to JetStream.
    Released,
    /// It is the last attempt, and stays.
    LastAttempt,
    /// It is being settled or handed over, or may have been settled. It stays.
    Settling,
    /// There is no such lease, or it is no longer one of those that were meant.
    Gone,
}

/// A consumer of which this replica has a task or leases.
#[derive(Debug, Clone)]
pub struct ConsumerState {
    /// Its name.
    pub name: ConsumerName,
    /// Leases that are held.
    pub leases: u64,
    /// Since when the oldest lease of a caller is held.
    pub oldest: Option<Instant>,
    /// The state of its task. `None`: there is no task, or it has not answered in time.
    pub task: Option<TaskState>,
}

/// The leases of one incarnation of a consumer.
struct Tally {
    spec: Arc<ConsumerSpec>,
    leases: u64,
    oldest: Option<Instant>,
}

impl<B: Broker> Lessor<B> {
    /// Fetch calls that are open.
    pub fn waiting(&self) -> usize {
        let most = self.core.limits.max_waiters;
        most.saturating_sub(self.calls.waiters.available_permits())
    }

    /// Consumers with a task.
    pub fn consumers(&self) -> usize {
        self.calls.handles().len()
    }

    /// Consumers with a connection of their own.
    pub fn own_connections(&self) -> usize {
        self.core.own_connections()
    }

    /// The most leases that this replica may have.
    pub fn max_leases(&self) -> usize {
        self.core.table.most()
    }

    /// Shows living leases after `after` to `visit`, in the order of their ids, until `visit` returns `false`. Looks at
    /// a bounded number of them. Returns the id to continue after, or `None` at the end.
    pub fn look_at_leases(
        &self,
        after: Option<LeaseId>,
        mut visit: impl FnMut(LeaseSeen<'_>) -> bool,
    ) -> Option<LeaseId> {
        let now = clock::now();
        self.core.table.with(|table| {
            table.walk(after, LEASES_PER_LOCK, now, |lease| visit(LeaseSeen::of(&lease)))
        })
    }

    /// Ends those of these leases for which `meant` is true, and asks JetStream to deliver their messages again after
    /// `delay`. The last attempt of a message ends only if `forced`. One outcome for each lease.
    pub fn release_leases(
        &self,
        leases: &[LeaseId],
        delay: Duration,
        forced: bool,
        meant: impl Fn(&LeaseSeen<'_>) -> bool,
    ) -> Vec<ReleaseOutcome> {
        let mut outcomes = Vec::with_capacity(leases.len());
        for step in leases.chunks(LEASES_PER_LOCK) {
            let (now, mut released, mut ended) = (clock::now(), Vec::new(), Vec::new());
            self.core.table.with(|table| {
                let moving = *self.core.frozen.borrow() || self.core.pinned.load(Ordering::Relaxed);
                for id in step {
                    let seen = table.view(*id, now);
                    if !seen.is_some_and(|lease| meant(&LeaseSeen::of(&lease))) {
                        outcomes.push(ReleaseOutcome::Gone);
                        continue;
                    }
                    if moving {
                        outcomes.push(ReleaseOutcome::Settling);
                        continue;
                    }
                    outcomes.push(match table.revoke(*id, forced, now) {
                        Revoked::Done(hold, by) => {
                            match by {
                                Some(by) => released.push((hold, by)),
                                None => ended.push(hold),
                            }
                            ReleaseOutcome::Released
                        }
                        Revoked::LastAttempt => ReleaseOutcome::LastAttempt,
                        Revoked::Settling => ReleaseOutcome::Settling,
                        Revoked::Gone => ReleaseOutcome::Gone,
                    });
                }
            });
            let holds = released.iter().map(|(hold, _)| hold).chain(&ended);
            metered::ended(&self.core.metrics, LeaseEnd::GivenBack, holds, now);
            // Dropped after the lock: each freed permit wakes a waiter.
            drop(ended);
            release(&self.core, released, ReleaseCause::Operator, delay);
        }
        outcomes
    }

    /// The consumers of which this replica has a task or leases, by name. Tasks answer until `until`.
    pub async fn described_consumers(&self, until: Instant) -> Vec<ConsumerState> {
        let handles: Vec<_> = self
            .calls
            .handles()
            .iter()
            .map(|(name, handle)| (name.clone(), handle.clone()))
            .collect();
        let asked = handles.into_iter().map(|(name, handle)| async move {
            let (reply, answer) = oneshot::channel();
            // A task that has ended drops the question.
            let _ = handle.send(ConsumerCommand::Describe(reply));
            let task = timeout_at(until.into(), answer).await.ok().and_then(Result::ok);
            (name, task)
        });
        let state = |(name, task): (ConsumerName, Option<TaskState>)| {
            (name.clone(), ConsumerState { name, leases: 0, oldest: None, task })
        };
        let mut consumers: BTreeMap<_, _> = join_all(asked).await.into_iter().map(state).collect();
        for Tally { spec, leases, oldest } in self.tally().await {
            let name = &spec.name;
            let consumer = consumers.entry(name.clone()).or_insert_with(|| ConsumerState {
                name: name.clone(),
                leases: 0,
                oldest: None,
                task: None,
            });
            consumer.leases += leases;
            consumer.oldest = [consumer.oldest, oldest].into_iter().flatten().min();
        }
        consumers.into_values().collect()
    }

    /// INFO of a consumer, at most a second old if its task is here, and why no message of it can be leased.
    ///
    /// # Errors
    /// The consumer cannot be read.
    pub async fn consumer_info(
        &self,
        name: &ConsumerName,
        until: Instant,
    ) -> Result<(ConsumerInfo, Option<Unsuitable>), Error> {
        let handle = self.calls.handles().get(name).cloned();
        let info = match handle {
            Some(handle) => self.recent_info(&handle, name, until).await?,
            None => self.info(name, until).await.map_err(|error| Error::of_info(error, name))?,
        };
        let unsuitable = unsuitable(&info);
        Ok((info, unsuitable))
    }

    /// The length of a lease of a first attempt of this consumer, if its caller gives none.
    pub fn unset_lease(&self, info: &ConsumerInfo) -> Duration {
        let ack_wait = ack_wait_of(info.ack_wait, &info.backoff, 1);
        ack_wait.saturating_sub(margin(ack_wait)).min(self.core.limits.max_lease)
    }

    /// The leases of each incarnation of a consumer.
    async fn tally(&self) -> Vec<Tally> {
        let (mut tallies, mut after) = (BTreeMap::<ConsumerId, Tally>::new(), None);
        loop {
            let now = clock::now();
            after = self.core.table.with(|table| {
                table.walk(after, LEASES_PER_LOCK, now, |lease| {
                    let spec = &lease.payload.spec;
                    let tally = tallies.entry(spec.id).or_insert_with(|| Tally {
                        spec: spec.clone(),
                        leases: 0,
                        oldest: None,
                    });
                    tally.leases += 1;
                    let since = lease.payload.taken.as_ref().map(|taken| taken.at);
                    tally.oldest = [tally.oldest, since].into_iter().flatten().min();
                    true
                })
            });
            if after.is_none() {
                return tallies.into_values().collect();
            }
            yield_now().await;
        }
    }
}

impl<'t> LeaseSeen<'t> {
    fn of(lease: &LeaseView<'t, HeldDelivery>) -> Self {
        let hold = lease.payload;
        let taken = hold.taken.as_ref();
        // A lease that was taken back still knows the principal that had it.
        let principal = hold.principal.as_ref().filter(|_| taken.is_some());
        Self {
            id: lease.id,
            name: &hold.spec.name,
            sequence: lease.sequence,
            delivery_count: hold.delivery_count,
            max_deliver: hold.spec.max_deliver,
            stage: lease.stage,
            last_attempt: lease.last_attempt,
            expires: lease.expires,
            principal: principal.map(|holder| &**holder.principal()),
            caller: taken.and_then(|taken| taken.by.as_deref()),
            since: taken.map(|taken| taken.at),
        }
    }
}
