//! Leases that go to another replica and leases that come from one: the lease table's part of a hand-over.
//! The module `cluster` decides which replica hands over, to which replica and when.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::timeout_at,
};

use super::{
    Error, Lessor,
    accounts::LeaseHolder,
    consumer::{ConsumerCommand, SpecQuestion},
    delivery::{AnswerEnd, FetchCaller, TakenLease},
    metered,
    spec::ConsumerSpec,
    table::{HeldDelivery, LEASES_PER_LOCK},
};
use crate::{
    broker::{AckSubject, Broker, ConsumerName, Leader},
    clock,
    lease::{Adopted, AdoptedLeases, LeaseId, LeaseSnapshot, OutcomeSlice},
    metrics::LeaseEnd,
};

/// A lease that can be handed over.
#[derive(Debug)]
pub struct OutgoingLease {
    /// Its id here.
    pub id: LeaseId,
    /// Its consumer.
    pub name: ConsumerName,
    /// The creation time of the consumer.
    pub created: Arc<str>,
    /// The consumer's leader, as far as is known here.
    pub leader: Leader,
    /// The ack subject of the delivery.
    pub ack: AckSubject,
    /// The principal that it belongs to, if that is known.
    pub principal: Option<Arc<str>>,
    /// The caller that has it, if that is known.
    pub caller: Option<Arc<FetchCaller>>,
    /// How long a caller has had it. `None`: no caller has it.
    pub held: Option<Duration>,
    /// Its clocks and its state.
    pub snapshot: LeaseSnapshot,
}

/// A lease that comes from another replica.
#[derive(Debug)]
pub struct IncomingLease {
    /// Its consumer, as it is known here.
    pub spec: Arc<ConsumerSpec>,
    /// The consumer's leader, as far as the sender knew.
    pub leader: Leader,
    /// The ack subject of the delivery.
    pub ack: AckSubject,
    /// The principal that it belongs to, if that is known.
    pub principal: Option<Arc<str>>,
    /// The caller that has it, if that is known.
    pub caller: Option<Arc<FetchCaller>>,
    /// How long a caller has had it, at `at`. `None`: no caller has it, or the sender does not tell.
    pub held: Option<Duration>,
    /// Its clocks and its state.
    pub snapshot: LeaseSnapshot,
    /// The earliest moment at which the snapshot was true.
    pub at: Instant,
}

/// An answer to a Fetch that is being written while its leases move to another replica.
#[derive(Debug)]
pub struct MovedAnswer {
    leases: Vec<LeaseId>,
    end: AnswerEnd,
}

impl MovedAnswer {
    /// Waits for the end of the answer. Returns the leases that nobody has, as they were known here.
    pub async fn nobodys(self) -> Vec<LeaseId> {
        if *self.end.wait().await { Vec::new() } else { self.leases }
    }
}

/// Permits that are reserved for leases from another replica.
#[derive(Debug)]
pub struct ReservedLeases(OwnedSemaphorePermit);

impl ReservedLeases {
    /// These permits and the others together.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.0.merge(other.0);
        self
    }
}

impl<B: Broker> Lessor<B> {
    /// Whether a settlement is running, also if its caller has left.
    pub fn is_settling(&self) -> bool {
        self.core.table.with(|table| table.settling() > 0)
    }

    /// Stops the sweep: no lease lapses, is released or kept alive until [`Lessor::thaw`].
    pub fn freeze(&self) {
        // Under the lock, so that no sweep is running.
        self.core.table.with(|_| self.core.frozen.send_replace(true));
    }

    /// Continues the sweep.
    pub fn thaw(&self) {
        self.core.pinned.store(false, Ordering::Relaxed);
        self.core.frozen.send_replace(false);
    }

    /// All leases that can be handed over: those that are alive and not being settled.
    pub fn leaving(&self) -> Vec<OutgoingLease> {
        let (mut leaving, mut after) = (Vec::new(), None);
        loop {
            let now = clock::now();
            after = self.core.table.with(|table| {
                let seen = |hold: &HeldDelivery| hold.spec.leadership.seen_at().unwrap_or(now);
                let (leases, next) = table.leaving(after, LEASES_PER_LOCK, now, seen);
                leaving.extend(leases.into_iter().map(
                    |(id, snapshot, hold): (_, _, &HeldDelivery)| {
                        // The receiver does not know of our doubt.
                        let in_doubt = hold.spec.leadership.in_doubt();
                        let snapshot = if in_doubt { snapshot.distrusted() } else { snapshot };
                        OutgoingLease {
                            id,
                            name: hold.spec.name.clone(),
                            created: hold.spec.created.clone(),
                            leader: hold.spec.leadership.leader(),
                            ack: hold.ack.clone(),
                            principal: hold.principal.as_ref().map(|it| it.principal().clone()),
                            caller: hold.taken.as_ref().and_then(|taken| taken.by.clone()),
                            held: hold
                                .taken
                                .as_ref()
                                .map(|taken| now.saturating_duration_since(taken.at)),
                            snapshot,
                        }
                    },
                ));
                next
            });
            if after.is_none() {
                return leaving;
            }
        }
    }

    /// Forgets leases that another replica has adopted. Returns those of answers that are not written yet.
    pub fn forget_moved(&self, leases: &[LeaseId]) -> Vec<MovedAnswer> {
        let mut unwritten: Vec<MovedAnswer> = Vec::new();
        for step in leases.chunks(LEASES_PER_LOCK) {
            // Dropped after the lock: each freed permit wakes a waiter.
            let gone: Vec<(LeaseId, HeldDelivery)> = self.core.table.with(|table| {
                let gone = step.iter().filter_map(|id| Some((*id, table.remove_moved(*id)?)));
                gone.collect()
            });
            let holds = gone.iter().map(|(_, hold)| hold);
            metered::ended(&self.core.metrics, LeaseEnd::Moved, holds, clock::now());
            for (id, hold) in &gone {
                // Giving a last attempt back would be the end of its message.
                let last = hold.spec.last_attempt(hold.delivery_count);
                let Some(end) = hold.answer.as_ref().filter(|_| !last) else { continue };
                if end.get() == Some(&true) {
                    continue;
                }
                match unwritten.iter_mut().find(|answer| Arc::ptr_eq(&answer.end, end)) {
                    Some(answer) => answer.leases.push(*id),
                    None => unwritten.push(MovedAnswer { leases: vec![*id], end: end.clone() }),
                }
            }
        }
        unwritten
    }

    /// Whether all of these leases are still there. A lease is gone if its delivery went back because nobody took it.
    /// A lease is gone, too, if its consumer was made again or reset, or is gone. If all are there, none of them is
    /// given back until [`Lessor::thaw`].
    pub fn pin(&self, leases: &[LeaseId]) -> bool {
        // Under the lock, so that nothing is just being given back.
        self.core.table.with(|_| self.core.pinned.store(true, Ordering::Relaxed));
        let all = leases.chunks(LEASES_PER_LOCK).all(|step| {
            self.core.table.with(|table| {
                let mut holds = step.iter().map(|id| table.payload(*id));
                holds.all(|hold| hold.is_some_and(|hold| !hold.spec.leadership.is_over()))
            })
        });
        self.core.pinned.store(all, Ordering::Relaxed);
        all
    }

    /// The ends of this replica's leases, in slices.
    pub fn outcomes(&self) -> Vec<OutcomeSlice> {
        let (mut slices, mut after) = (Vec::new(), None);
        loop {
            let slice = self.core.table.with(|table| table.outcomes(after));
            let Some(slice) = slice else { return slices };
            after = Some(slice.last());
            slices.push(slice);
        }
    }

    /// Whether a lease is in the table.
    pub fn is_held(&self, lease: LeaseId) -> bool {
        self.core.table.with(|table| table.payload(lease).is_some())
    }

    /// Notes the ends of adopted leases.
    pub fn record_ends(&self, adopted: &mut AdoptedLeases) {
        self.core.table.with(|table| adopted.record_ends(table));
    }

    /// The configuration of a consumer, as its task knows it. Starts the task if there is none. `created`: another
    /// replica has read this consumer of that name. If the task knows another one, it reads INFO first.
    ///
    /// # Errors
    /// The consumer cannot be leased from, or is not known by `until`.
    pub async fn know(
        &self,
        name: &ConsumerName,
        created: Option<Arc<str>>,
        until: Instant,
    ) -> Result<Arc<ConsumerSpec>, Error> {
        self.ask_for_spec(name, (created, None), until).await
    }

    /// The same for leases that another replica hands over. That replica knows this leader. If the task knows another
    /// one, it reads INFO first, but waits for it until `looked_by` only.
    ///
    /// # Errors
    /// As [`Lessor::know`].
    pub async fn know_for_handover(
        &self,
        name: &ConsumerName,
        (created, leader): (Arc<str>, Leader),
        (looked_by, until): (Instant, Instant),
    ) -> Result<Arc<ConsumerSpec>, Error> {
        let known = (Some(created.clone()), Some(leader));
        match self.ask_for_spec(name, known, until.min(looked_by)).await {
            // Nobody leads at this moment, or the other replica knows an older leader.
            Err(Error::Unavailable(_)) => self.know(name, Some(created), until).await,
            known => known,
        }
    }

    async fn ask_for_spec(
        &self,
        name: &ConsumerName,
        (created, leader): (Option<Arc<str>>, Option<Leader>),
        until: Instant,
    ) -> Result<Arc<ConsumerSpec>, Error> {
        let (reply, known) = oneshot::channel();
        self.tell(name, ConsumerCommand::Know(SpecQuestion { created, leader, reply }));
        match timeout_at(until.into(), known).await {
            Ok(Ok(known)) => known,
            Ok(Err(_)) => Err(Error::Draining),
            Err(_) => Err(Error::Unavailable("the consumer is not known in time".to_owned())),
        }
    }

    /// Reserves permits for leases from another replica. `None`: too few are free.
    pub fn reserve_leases(&self, count: usize) -> Option<ReservedLeases> {
        let count = u32::try_from(count).ok()?;
        self.core.table.reserve(count).map(ReservedLeases)
    }

    /// Adopts leases, and returns the id of each one here. `None`: the lease is not adopted, because its
    /// message was delivered again, its consumer is gone, or its consumer has just begun again.
    pub fn adopt(
        &self,
        coming: Vec<IncomingLease>,
        permits: &mut ReservedLeases,
    ) -> Vec<Option<LeaseId>> {
        let mut adopted = Vec::with_capacity(coming.len());
        let (mut superseded, mut refused) = (Vec::new(), Vec::new());
        let mut consumers = BTreeMap::new();
        let mut coming = coming.into_iter().peekable();
        while coming.peek().is_some() {
            let now = clock::now();
            self.core.table.with(|table| {
                for coming in coming.by_ref().take(LEASES_PER_LOCK) {
                    let IncomingLease { spec, leader, ack, principal, caller, held, snapshot, at } =
                        coming;
                    if spec.leadership.is_over() || spec.leadership.is_announcing() {
                        adopted.push(None);
                        continue;
                    }
                    // One of the two replicas does not know the latest leader.
                    let another = spec.leadership.leader() != leader;
                    let snapshot = if another { snapshot.distrusted() } else { snapshot };
                    let (id, count) = (spec.id, snapshot.delivery_count);
                    // The sender may not know that it was lowered.
                    let snapshot = snapshot.lowered(spec.ack_wait_of(count));
                    let sequence = snapshot.consumer_sequence;
                    let (_, sequences) = consumers
                        .entry(id)
                        .or_insert_with(|| (spec.name.clone(), (sequence, sequence)));
                    *sequences = (sequences.0.min(sequence), sequences.1.max(sequence));
                    let permit = permits.0.split(1);
                    let hold = HeldDelivery {
                        ack,
                        spec,
                        delivery_count: count,
                        since: now,
                        taken: Some(TakenLease {
                            by: caller,
                            at: held.and_then(|held| at.checked_sub(held)).unwrap_or(now),
                            is_settled: snapshot.uncertain.is_some(),
                        }),
                        attempt: None,
                        headers_only: false,
                        answer: None,
                        debit: None,
                        principal: principal
                            .map(|name| LeaseHolder::new(&self.core.accounts.of(&name))),
                        _permit: permit,
                    };
                    let meter = hold.spec.meter.clone();
                    adopted.push(match table.adopt(&snapshot, id, at, hold, now) {
                        Adopted::Here(id, older) => {
                            meter.adopted();
                            superseded.extend(older);
                            Some(id)
                        }
                        Adopted::Not(hold) => {
                            refused.push(hold);
                            None
                        }
                    });
                }
            });
        }
        metered::ended(&self.core.metrics, LeaseEnd::Overtaken, &superseded, clock::now());
        for (name, sequences) in consumers.values() {
            self.tell(name, ConsumerCommand::Adopted(*sequences));
        }
        adopted
    }
}
