//! The lease table of this replica behind its lock, and the permits that bound the number of leases.
//!
//! Owns the lock: nobody holds it across an await, and nobody reads the clock under it. Wakes the sweeper
//! when a lease is due sooner than the sweeper knew.

use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use super::{
    accounts::LeaseHolder,
    attempts::AttemptKey,
    delivery::{AnswerEnd, FetchCaller, TakenLease},
    flow_queue::Debit,
    spec::ConsumerSpec,
    turn::Turn,
};
use crate::{
    broker::{AckKind, AckPublish, AckSubject},
    clock::{self, Reading},
    lease::LeaseTable,
    lock::lock,
};

/// The number of ended leases that are remembered, at half a byte each.
const REMEMBERED_LEASES: usize = 4 << 20;

/// An idle pull gets at most this part of the permits that idle pulls may still take.
const IDLE_PULL_DIVISOR: usize = 16;

/// The most leases that a long task looks at under one lock.
pub(super) const LEASES_PER_LOCK: usize = 1024;

/// The payload of a lease. Dropping it frees the lease's permit.
#[derive(Debug)]
pub(super) struct HeldDelivery {
    pub(super) ack: AckSubject,
    pub(super) spec: Arc<ConsumerSpec>,
    pub(super) delivery_count: u64,
    /// When the lease came into the table.
    pub(super) since: Instant,
    /// The caller that has it. `None`: the proxy itself has it, for the next caller.
    pub(super) taken: Option<TakenLease>,
    /// The principal that the lease belongs to. `None`: no caller has had it, or it was adopted from a replica
    /// that does not know principals.
    pub(super) principal: Option<LeaseHolder>,
    /// The attempt that it belongs to. `None`: its caller has named none.
    pub(super) attempt: Option<Arc<AttemptKey>>,
    /// The delivery has no payload, and a header says how long it is.
    pub(super) headers_only: bool,
    /// The end of the answer that brings it to its caller. `None`: no caller of this replica has it.
    pub(super) answer: Option<AnswerEnd>,
    /// The credit that it uses. `None`: no flow has it.
    pub(super) debit: Option<Debit>,
    /// `None` for a late delivery of a pull that was given up.
    pub(super) _permit: Option<OwnedSemaphorePermit>,
}

impl HeldDelivery {
    /// The caller that has it and has not settled it. `None`: there is none, or it is not known.
    pub(super) fn unsettled_by(&self) -> Option<&Arc<FetchCaller>> {
        self.taken.as_ref().filter(|taken| !taken.is_settled)?.by.as_ref()
    }

    /// The settlement to publish. It must arrive by `by` or never.
    pub(super) fn ack_publish(&self, kind: AckKind, by: Option<Instant>) -> AckPublish {
        AckPublish { ack: self.ack.clone(), kind, confirm_group: self.spec.confirm_group(), by }
    }
}

struct Locked {
    table: LeaseTable<HeldDelivery>,
    /// The latest reading of the clocks.
    read: Reading,
}

pub(super) struct SharedLeaseTable {
    locked: Mutex<Locked>,
    sooner: Notify,
    permits: Arc<Semaphore>,
    most: usize,
}

impl SharedLeaseTable {
    pub(super) fn new(most: usize, longest: Duration, now: Instant) -> Self {
        Self {
            locked: Mutex::new(Locked {
                table: LeaseTable::new(now, longest, REMEMBERED_LEASES),
                read: clock::reading(),
            }),
            sooner: Notify::new(),
            permits: Arc::new(Semaphore::new(most)),
            most,
        }
    }

    /// Runs `act` on the table under its lock. Before that, the table learns of time that the clock did not
    /// count.
    pub(super) fn with<R>(&self, act: impl FnOnce(&mut LeaseTable<HeldDelivery>) -> R) -> R {
        let reading = clock::reading();
        let mut locked = self.lock();
        let Locked { table, read } = &mut *locked;
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
        drop(locked);
        if let Some(gap) = gap {
            tracing::warn!(?gap, "the clock stopped, as in a suspended machine: leases end sooner");
        }
        if sooner {
            self.sooner.notify_one();
        }
        result
    }

    /// The time at which the sweeper is needed next.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.lock().table.next_due()
    }

    fn lock(&self) -> MutexGuard<'_, Locked> {
        lock(&self.locked)
    }

    /// Waits until a lease is due sooner than [`SharedLeaseTable::next_due`] has returned.
    pub(super) async fn sooner(&self) {
        self.sooner.notified().await;
    }

    /// The most leases that may exist.
    pub(super) fn most(&self) -> usize {
        self.most
    }

    /// The number of free permits.
    pub(super) fn free(&self) -> u32 {
        u32::try_from(self.permits.available_permits()).unwrap_or(u32::MAX)
    }

    /// Takes `count` permits, if so many are free.
    pub(super) fn reserve(&self, count: u32) -> Option<OwnedSemaphorePermit> {
        self.permits.clone().try_acquire_many_owned(count).ok()
    }

    /// Waits until there is no lease, and no pull that may bring one.
    pub(super) async fn all_free(&self) {
        let all = u32::try_from(self.most).unwrap_or(u32::MAX);
        // The semaphore is never closed, so this gets every permit. All are returned at once.
        drop(self.permits.acquire_many(all).await);
    }

    /// A place in the queue for permits.
    pub(super) fn turn(&self) -> Turn {
        Turn::new(self.permits.clone())
    }

    /// Whether no lease may be added. Permits that pulls have reserved are free again soon, and count as free.
    pub(super) fn is_full(&self) -> bool {
        self.free() == 0 && self.unleased() == 0
    }

    /// The number of leases that may be added. Open pulls may have reserved their permits.
    pub(super) fn unleased(&self) -> usize {
        self.most.saturating_sub(self.lock().table.len())
    }

    /// The most permits for an idle pull, one that no message is known to wait for. Idle pulls leave half of
    /// the permits without a lease to other pulls. With more idle pulls each gets less, but at least one.
    pub(super) fn idle_share(&self) -> usize {
        let (unleased, free) = (self.unleased(), self.permits.available_permits());
        (free.saturating_sub(unleased / 2) / IDLE_PULL_DIVISOR).max(1)
    }
}
