//! Leases that go to another replica and leases that come from one: the books' side of a hand-over.
//! Who hands over to whom, and when, is `peer`'s to say.

use std::{sync::Arc, time::Instant};

use tokio::{
    sync::{OwnedSemaphorePermit, oneshot},
    time::timeout_at,
};

use super::{
    Error, Lessor,
    consumer::ConsumerCommand,
    spec::ConsumerSpec,
    table::{HeldDelivery, LEASES_PER_LOCK},
};
use crate::{
    broker::{AckSubject, Broker, ConsumerName, Leader},
    clock,
    lease::{Adopted, AdoptedLeases, LeaseId, LeaseSnapshot, OutcomeSlice},
};

/// A lease that can go.
#[derive(Debug)]
pub struct OutgoingLease {
    /// Its number here.
    pub id: LeaseId,
    /// Its consumer.
    pub name: ConsumerName,
    /// When that was made.
    pub created: Arc<str>,
    /// Who leads it, as far as is known here.
    pub leader: Leader,
    /// Where the delivery is settled.
    pub ack: AckSubject,
    /// What its clocks and its state are.
    pub moving: LeaseSnapshot,
}

/// A lease that comes.
#[derive(Debug)]
pub struct IncomingLease {
    /// Its consumer, as it is known here.
    pub spec: Arc<ConsumerSpec>,
    /// Who led that, as far as was known where it comes from.
    pub leader: Leader,
    /// Where the delivery is settled.
    pub ack: AckSubject,
    /// What its clocks and its state were.
    pub moving: LeaseSnapshot,
    /// When they were so, at the earliest.
    pub at: Instant,
}

/// ReservedLeases kept for leases that come.
#[derive(Debug)]
pub struct ReservedLeases(OwnedSemaphorePermit);

impl ReservedLeases {
    /// Both.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.0.merge(other.0);
        self
    }
}

impl<B: Broker> Lessor<B> {
    /// Whether the settlement of a lease is under way, be its caller there or not.
    pub fn is_settling(&self) -> bool {
        self.table.with(|table| table.settling() > 0)
    }

    /// Stops the clocks: nothing lapses, is released or kept alive until [`Lessor::thaw`].
    pub fn freeze(&self) {
        // Under the lock, so that no sweep is half done.
        self.table.with(|_| self.frozen.send_replace(true));
    }

    /// Lets the clocks run again.
    pub fn thaw(&self) {
        self.frozen.send_replace(false);
    }

    /// All leases that can go: those that are alive and not being settled.
    pub fn leaving(&self) -> Vec<OutgoingLease> {
        let (mut leaving, mut after) = (Vec::new(), None);
        loop {
            let now = clock::now();
            after = self.table.with(|table| {
                let (leases, next) = table.leaving(after, LEASES_PER_LOCK, now);
                leaving.extend(leases.into_iter().map(
                    |(id, moving, hold): (_, _, &HeldDelivery)| {
                        // Whoever takes it over does not know of our doubt.
                        let in_doubt = hold.spec.leadership.in_doubt();
                        let moving = if in_doubt { moving.distrusted() } else { moving };
                        OutgoingLease {
                            id,
                            name: hold.spec.name.clone(),
                            created: hold.spec.created.clone(),
                            leader: hold.spec.leadership.leader(),
                            ack: hold.ack.clone(),
                            moving,
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

    /// Forgets leases that are another replica's now.
    pub fn let_go(&self, leases: &[LeaseId]) {
        for step in leases.chunks(LEASES_PER_LOCK) {
            // Dropped after the lock is: freeing places wakes others.
            let _gone: Vec<HeldDelivery> =
                self.table.with(|table| step.iter().filter_map(|id| table.moved(*id)).collect());
        }
    }

    /// How leases of this replica have ended, piece by piece.
    pub fn memories(&self) -> Vec<OutcomeSlice> {
        let (mut pieces, mut after) = (Vec::new(), None);
        loop {
            let piece = self.table.with(|table| table.memories(after));
            let Some(piece) = piece else { return pieces };
            after = Some(piece.last());
            pieces.push(piece);
        }
    }

    /// Whether a lease is in the table.
    pub fn is_held(&self, lease: LeaseId) -> bool {
        self.table.with(|table| table.payload(lease).is_some())
    }

    /// Notes how leases that were taken over have ended.
    pub fn settle_up(&self, inheritance: &mut AdoptedLeases) {
        self.table.with(|table| inheritance.settle_up(table));
    }

    /// What a consumer is, as its feed knows it; a feed is started if there is none.
    ///
    /// # Errors
    /// Why it cannot be leased from, or is not known by `until`.
    pub async fn know(
        &self,
        name: &ConsumerName,
        until: Instant,
    ) -> Result<Arc<ConsumerSpec>, Error> {
        let (reply, known) = oneshot::channel();
        self.tell(name, ConsumerCommand::Know(reply));
        match timeout_at(until.into(), known).await {
            Ok(Ok(known)) => known,
            Ok(Err(_)) => Err(Error::Draining),
            Err(_) => Err(Error::Unavailable("the consumer is not known in time".to_owned())),
        }
    }

    /// Keeps places for leases that come.
    pub fn keep_places(&self, count: usize) -> Option<ReservedLeases> {
        let count = u32::try_from(count).ok()?;
        self.table.reserve(count).map(ReservedLeases)
    }

    /// Takes leases in: the number of each here, `None` for one that is not taken because somebody
    /// has its message anew, or its consumer has gone meanwhile.
    pub fn adopt(
        &self,
        coming: Vec<IncomingLease>,
        places: &mut ReservedLeases,
    ) -> Vec<Option<LeaseId>> {
        let (mut taken, mut superseded) = (Vec::with_capacity(coming.len()), Vec::new());
        let mut coming = coming.into_iter().peekable();
        while coming.peek().is_some() {
            let now = clock::now();
            self.table.with(|table| {
                for IncomingLease { spec, leader, ack, moving, at } in
                    coming.by_ref().take(LEASES_PER_LOCK)
                {
                    if spec.leadership.is_over() {
                        taken.push(None);
                        continue;
                    }
                    // One of the two has not heard of the other one's leader.
                    let another = spec.leadership.leader() != leader;
                    let moving = if another { moving.distrusted() } else { moving };
                    let (id, count) = (spec.id, moving.delivery_count);
                    let place = places.0.split(1);
                    let worker = None;
                    let hold =
                        HeldDelivery { ack, spec, delivery_count: count, worker, _place: place };
                    taken.push(match table.adopt(&moving, id, at, hold, now) {
                        Adopted::Here(id, older) => {
                            superseded.extend(older);
                            Some(id)
                        }
                        Adopted::Not(hold) => {
                            superseded.push(hold);
                            None
                        }
                    });
                }
            });
        }
        taken
    }
}
