//! The one lease table of this replica behind its one lock, and the permits that bound it.
//!
//! Owns the lock: nobody holds it across an await, and nobody reads the clock under it. Wakes the
//! sweeper when something is due sooner than it knew.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::{spec::ConsumerSpec, turn::Turn};
use crate::{
    broker::{AckKind, AckPublish, AckSubject},
    clock::{self, Reading},
    lease::LeaseTable,
    lock::lock,
};

/// How many ended leases are remembered, half a byte each.
const REMEMBERED_LEASES: usize = 4 << 20;

/// An idle pull has at most this part of what idle pulls have left of their half.
const IDLE_PULL_DIVISOR: usize = 16;

/// Leases that one pass of a long task looks at under one lock.
pub(super) const LEASES_PER_LOCK: usize = 1024;

/// What a lease holds on to. Dropping it frees the lease's place.
#[derive(Debug)]
pub(super) struct HeldDelivery {
    pub(super) ack: AckSubject,
    pub(super) spec: Arc<ConsumerSpec>,
    pub(super) delivery_count: u64,
    /// The worker that has it, as its Fetch names it. `None`: nobody has it, or it was taken over.
    pub(super) worker: Option<Arc<str>>,
    /// `None` for a delivery that came unasked, late from a pull that was given up.
    pub(super) _place: Option<OwnedSemaphorePermit>,
}

impl HeldDelivery {
    /// What to publish for it, by then or never.
    pub(super) fn order(&self, kind: AckKind, by: Option<Instant>) -> AckPublish {
        AckPublish { ack: self.ack.clone(), kind, confirm_group: self.spec.line(), by }
    }
}

struct Kept {
    table: LeaseTable<HeldDelivery>,
    /// The clocks as they were last read.
    read: Reading,
}

pub(super) struct SharedLeaseTable {
    kept: Mutex<Kept>,
    sooner: Notify,
    places: Arc<Semaphore>,
    most: usize,
}

impl SharedLeaseTable {
    pub(super) fn new(most: usize, longest: Duration, now: Instant) -> Self {
        Self {
            kept: Mutex::new(Kept {
                table: LeaseTable::new(now, longest, REMEMBERED_LEASES),
                read: clock::reading(),
            }),
            sooner: Notify::new(),
            places: Arc::new(Semaphore::new(most)),
            most,
        }
    }

    /// Does one thing to the table. Before, it is told of time that its clock did not count.
    pub(super) fn with<R>(&self, act: impl FnOnce(&mut LeaseTable<HeldDelivery>) -> R) -> R {
        let reading = clock::reading();
        let mut kept = self.lock();
        let Kept { table, read } = &mut *kept;
        let before = table.next_due();
        let gap = reading.gap_since(read);
        if let Some(gap) = gap {
            table.slept(gap, reading.now);
        }
        *read = reading.after(*read);
        let result = act(table);
        let sooner = match (before, table.next_due()) {
            (Some(before), Some(after)) => after < before,
            (None, after) => after.is_some(),
            (Some(_), None) => false,
        };
        drop(kept);
        if let Some(gap) = gap {
            tracing::warn!(?gap, "the clock stopped, as in a suspended machine: leases end sooner");
        }
        if sooner {
            self.sooner.notify_one();
        }
        result
    }

    /// When the sweeper is next needed.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.lock().table.next_due()
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        lock(&self.kept)
    }

    /// Waits until something is due sooner than [`SharedLeaseTable::next_due`] said.
    pub(super) async fn sooner(&self) {
        self.sooner.notified().await;
    }

    /// The most leases that may be held.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// Places that are free now.
    pub(super) fn free(&self) -> u32 {
        u32::try_from(self.places.available_permits()).unwrap_or(u32::MAX)
    }

    /// Takes `count` places, if so many are free.
    pub(super) fn reserve(&self, count: u32) -> Option<OwnedSemaphorePermit> {
        self.places.clone().try_acquire_many_owned(count).ok()
    }

    /// Waits until no lease is held and no pull may bring any.
    pub(super) async fn all_free(&self) {
        let all = u32::try_from(self.most).unwrap_or(u32::MAX);
        // Never closed, so the only outcome is every place, and all are put back at once.
        drop(self.places.acquire_many(all).await);
    }

    /// A way to stand in line for places.
    pub(super) fn turn(&self) -> Turn {
        Turn::new(self.places.clone())
    }

    /// Places that no lease has. Open pulls may have reserved them.
    pub(super) fn unleased(&self) -> usize {
        self.most.saturating_sub(self.lock().table.len())
    }

    /// The most places for a pull where nothing is known to be there: such pulls leave half of what no
    /// lease has to others. They become smaller as they become more, and keep one place at least.
    pub(super) fn idle_share(&self) -> usize {
        let (unleased, free) = (self.unleased(), self.places.available_permits());
        (free.saturating_sub(unleased / 2) / IDLE_PULL_DIVISOR).max(1)
    }
}
