//! Budgets of this process (calls, bytes, streams), and the share of each budget that one connection may
//! hold. Owns the counts. Does not know what is counted.
//!
//! A connection may hold at most as many units as are still free after it. So one connection alone holds at
//! most half. `n` greedy connections hold one part of `n + 1` each, and the next connection finds as
//! much. A connection that holds nothing may always take free units.

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use tokio::{sync::Notify, time::timeout_at};

use crate::{api_error::ExhaustedScope, lock::lock};

/// One budget of this process.
#[derive(Debug, Clone)]
pub(super) struct MemoryBudget(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    most: usize,
    free: Mutex<usize>,
    /// Units that callers wait for.
    waited_for: AtomicUsize,
    freed: Notify,
}

/// The part of a budget that one connection may take.
#[derive(Debug, Clone)]
pub(super) struct MemoryShare {
    pool: Arc<Pool>,
    held: Arc<AtomicUsize>,
    /// Most units of this share, even if more are free.
    most: usize,
}

/// Units that are held until this is dropped.
#[derive(Debug)]
pub(super) struct Taken {
    share: MemoryShare,
    count: usize,
}

impl MemoryBudget {
    /// A budget of `most` units, all free.
    pub(super) fn new(most: usize) -> Self {
        let (free, waited_for) = (Mutex::new(most), AtomicUsize::new(0));
        Self(Arc::new(Pool { most, free, waited_for, freed: Notify::new() }))
    }

    /// All units, free or not.
    pub(super) fn most(&self) -> usize {
        self.0.most
    }

    /// Units that are taken.
    pub(super) fn taken(&self) -> usize {
        self.0.most - *self.0.free()
    }

    /// A share for one more connection.
    pub(super) fn share(&self) -> MemoryShare {
        MemoryShare { pool: self.0.clone(), held: Arc::default(), most: usize::MAX }
    }

    /// Waits until all units are free.
    pub(super) async fn all_free(&self) {
        loop {
            let freed = self.0.freed.notified();
            if *self.0.free() == self.0.most {
                return;
            }
            freed.await;
        }
    }
}

impl Pool {
    fn free(&self) -> MutexGuard<'_, usize> {
        lock(&self.free)
    }
}

impl MemoryShare {
    /// Limits the share to `most` units.
    pub(super) fn at_most(self, most: usize) -> Self {
        Self { most, ..self }
    }

    /// Takes `count` units.
    ///
    /// # Errors
    /// See [`ExhaustedScope`].
    pub(super) fn take(&self, count: usize) -> Result<Taken, ExhaustedScope> {
        self.add(count)?;
        Ok(Taken { share: self.clone(), count })
    }

    /// Takes `count` units, and waits for them until `until`. A caller that waits holds memory
    /// already, so callers wait for at most half of the budget at once.
    ///
    /// # Errors
    /// See [`ExhaustedScope`].
    pub(super) async fn take_by(
        &self,
        count: usize,
        until: Instant,
    ) -> Result<Taken, ExhaustedScope> {
        let short = match self.take(count) {
            Ok(taken) => return Ok(taken),
            Err(short) => short,
        };
        let _waiting = Waiting::new(&self.pool, count).ok_or(short)?;
        let take = async {
            loop {
                let freed = self.pool.freed.notified();
                if let Ok(taken) = self.take(count) {
                    return taken;
                }
                freed.await;
            }
        };
        timeout_at(until.into(), take).await.map_err(|_| short)
    }

    fn add(&self, count: usize) -> Result<(), ExhaustedScope> {
        let mut free = self.pool.free();
        // It changes only under the lock.
        let held = self.held.load(Ordering::Relaxed);
        let Some(left) = free.checked_sub(count) else { return Err(ExhaustedScope::Replica) };
        if held > 0 && held + count > left.min(self.most) {
            return Err(ExhaustedScope::Connection);
        }
        *free = left;
        self.held.store(held + count, Ordering::Relaxed);
        Ok(())
    }

    fn give_back(&self, count: usize) {
        {
            let mut free = self.pool.free();
            *free += count;
            self.held.fetch_sub(count, Ordering::Relaxed);
        }
        self.pool.freed.notify_waiters();
    }
}

impl Taken {
    /// Takes `count` more units.
    ///
    /// # Errors
    /// See [`ExhaustedScope`]. The units that it has stay.
    pub(super) fn grow(&mut self, count: usize) -> Result<(), ExhaustedScope> {
        self.share.add(count)?;
        self.count += count;
        Ok(())
    }

    /// Gives back all but `count` units.
    pub(super) fn shrink_to(&mut self, count: usize) {
        let surplus = self.count.saturating_sub(count);
        if surplus > 0 {
            self.count -= surplus;
            self.share.give_back(surplus);
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.shrink_to(0);
    }
}

/// Units that a caller waits for.
struct Waiting<'p> {
    pool: &'p Pool,
    count: usize,
}

impl<'p> Waiting<'p> {
    /// `None` if callers wait for too many units already.
    fn new(pool: &'p Pool, count: usize) -> Option<Self> {
        let before = pool.waited_for.fetch_add(count, Ordering::Relaxed);
        // If it is too much, this is dropped at once.
        let waiting = Self { pool, count };
        (before + count <= pool.most / 2).then_some(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.pool.waited_for.fetch_sub(self.count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock;

    /// Takes one unit after another until a unit is refused.
    fn all(share: &MemoryShare) -> (Vec<Taken>, ExhaustedScope) {
        let mut taken = Vec::new();
        loop {
            match share.take(1) {
                Ok(one) => taken.push(one),
                Err(short) => return (taken, short),
            }
        }
    }

    #[test]
    fn one_connection_has_half_and_the_next_half_of_the_rest() {
        let budget = MemoryBudget::new(100);
        let (first, second) = (budget.share(), budget.share());
        let (held, short) = all(&first);
        assert_eq!((held.len(), short), (50, ExhaustedScope::Connection));
        let (also, short) = all(&second);
        assert_eq!((also.len(), short), (25, ExhaustedScope::Connection));
        drop(held);
        assert_eq!(all(&first).0.len(), 37);
    }

    #[test]
    fn new_connection_finds_room_next_to_any_number_of_greedy_ones() {
        let budget = MemoryBudget::new(1000);
        let shares: Vec<MemoryShare> = (0..100).map(|_| budget.share()).collect();
        let mut held: Vec<Taken> = Vec::new();
        // All connections take in turns until none receives a unit.
        loop {
            let round: Vec<Taken> = shares.iter().filter_map(|share| share.take(1).ok()).collect();
            if round.is_empty() {
                break;
            }
            held.extend(round);
        }
        assert!(!all(&budget.share()).0.is_empty());
    }

    #[test]
    fn last_unit_goes_to_a_connection_without_units() {
        let budget = MemoryBudget::new(1);
        let (first, second) = (budget.share(), budget.share());
        let held = first.take(1).unwrap();
        assert_eq!(second.take(1).unwrap_err(), ExhaustedScope::Replica);
        drop(held);
        second.take(1).unwrap();
    }

    #[test]
    fn units_grow_within_the_share_and_return_once() {
        let budget = MemoryBudget::new(10);
        let share = budget.share();
        let mut taken = share.take(2).unwrap();
        taken.grow(3).unwrap();
        assert_eq!(taken.grow(1).unwrap_err(), ExhaustedScope::Connection);
        taken.shrink_to(1);
        taken.shrink_to(4);
        assert_eq!(*budget.0.free(), 9);
        drop(taken);
        assert_eq!((*budget.0.free(), share.held.load(Ordering::Relaxed)), (10, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_caller_receives_free_units_or_gives_up() {
        let budget = MemoryBudget::new(10);
        let (first, second) = (budget.share(), budget.share());
        let held = first.take(8).unwrap();
        let until = clock::now() + Duration::from_secs(1);
        assert_eq!(second.take_by(5, until).await.unwrap_err(), ExhaustedScope::Replica);
        let until = clock::now() + Duration::from_secs(1);
        let (taken, too_much, ()) =
            tokio::join!(second.take_by(4, until), second.take_by(5, until), async {
                tokio::task::yield_now().await;
                drop(held);
            });
        taken.unwrap();
        assert_eq!(too_much.unwrap_err(), ExhaustedScope::Replica, "it is too much to wait for");
        tokio::time::timeout(Duration::from_secs(1), budget.all_free()).await.unwrap();
    }
}
