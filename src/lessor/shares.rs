//! The byte budget of one connection for deliveries, behind its lock, and the wake-ups of the consumers
//! that wait for a share. Owns the lock: nobody holds it across an await, and nobody reads the clock under
//! it.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Instant,
};

use tokio::sync::Notify;

use crate::{
    broker::ConsumerName,
    lock::lock,
    pump::{ByteRequest, Cause, PullBound, PullBudget},
};

/// The shares of one connection. All clones are the same shares.
#[derive(Debug, Clone)]
pub(super) struct Shares(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    budget: PullBudget<ConsumerName>,
    bound: PullBound,
    bells: HashMap<ConsumerName, Arc<Notify>>,
    cut: Option<Cut>,
}

/// A connection that was cut.
#[derive(Debug)]
struct Cut {
    /// The connection.
    epoch: u64,
    /// The bytes that busy pulls could still bring at that time.
    out: u64,
    explained: Option<Explained>,
}

/// The cause of a cut, as far as the bytes show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Explained {
    pub(super) cause: Cause,
    /// The bytes that all pulls together may bring from now on.
    pub(super) bound: u64,
    /// Whether this is the first caller that asks.
    pub(super) first: bool,
}

impl Shares {
    /// A budget of `bound` bytes for one connection.
    pub(super) fn new(bound: u64) -> Self {
        Self::of(PullBound::new(bound))
    }

    fn of(bound: PullBound) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            budget: PullBudget::new(bound.most(), u64::MAX),
            bound,
            bells: HashMap::new(),
            cut: None,
        })))
    }

    /// The same budget for another connection to the same server.
    pub(super) fn another(&self) -> Self {
        let bound = self.lock().bound.clone();
        Self::of(bound)
    }

    /// A connection was lost while pulls were open. Every consumer reports it, and it is noted once.
    pub(super) fn cut(&self, epoch: u64) {
        let mut inner = self.lock();
        if inner.cut.as_ref().is_none_or(|cut| cut.epoch != epoch) {
            let out = inner.budget.busy_out();
            inner.cut = Some(Cut { epoch, out, explained: None });
        }
    }

    /// Nothing else explains the cut. Returns whether its bytes do.
    pub(super) fn explain(&self, epoch: u64, now: Instant) -> Option<Explained> {
        self.act(|inner| {
            let cut = inner.cut.as_mut().filter(|cut| cut.epoch == epoch)?;
            if let Some(explained) = cut.explained {
                return Some(Explained { first: false, ..explained });
            }
            let cause = inner.bound.cut(cut.out, now);
            let bound = inner.bound.at(now);
            let explained = Explained { cause, bound, first: true };
            cut.explained = Some(explained);
            inner.budget.set_bound(bound);
            Some(explained)
        })
    }

    /// Runs `act` on the budget, and wakes the consumers that have a share now.
    fn act<R>(&self, act: impl FnOnce(&mut Inner) -> R) -> R {
        let mut inner = self.lock();
        let result = act(&mut inner);
        for called in inner.budget.called() {
            if let Some(bell) = inner.bells.remove(&called) {
                bell.notify_one();
            }
        }
        result
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.0)
    }
}

/// One consumer at the shares of one connection. Dropping it leaves the queue.
#[derive(Debug)]
pub(super) struct PullSeat {
    shares: Shares,
    name: ConsumerName,
    bell: Arc<Notify>,
}

impl PullSeat {
    pub(super) fn new(shares: Shares, name: ConsumerName) -> Self {
        Self { shares, name, bell: Arc::default() }
    }

    /// The shares of its connection.
    pub(super) fn shares(&self) -> &Shares {
        &self.shares
    }

    /// Notified when the consumer should ask again.
    pub(super) fn bell(&self) -> Arc<Notify> {
        self.bell.clone()
    }

    /// Asks for a share. `None`: there is none yet, and the consumer waits in the queue.
    pub(super) fn ask(&self, ask: ByteRequest, now: Instant) -> Option<PullShare> {
        let granted = self.shares.act(|inner| {
            let bound = inner.bound.at(now);
            inner.budget.set_bound(bound);
            let granted = inner.budget.ask(&self.name, ask);
            if granted.is_none() {
                inner.bells.insert(self.name.clone(), self.bell.clone());
            }
            granted
        })?;
        Some(PullShare { shares: self.shares.clone(), name: self.name.clone(), granted })
    }

    /// Leaves the queue.
    pub(super) fn leave(&self) {
        self.shares.act(|inner| {
            inner.bells.remove(&self.name);
            inner.budget.leave(&self.name);
        });
    }
}

impl Drop for PullSeat {
    fn drop(&mut self) {
        self.leave();
    }
}

/// The bytes that the open pull of one consumer may still bring. Dropping the share frees them.
#[derive(Debug)]
pub(super) struct PullShare {
    shares: Shares,
    name: ConsumerName,
    /// The size of the share at first, in bytes.
    pub(super) granted: u64,
}

impl PullShare {
    /// Notes that `bytes` have arrived.
    pub(super) fn arrived(&self, bytes: u64) {
        self.shares.act(|inner| {
            inner.bound.came(bytes);
            inner.budget.arrived(&self.name, bytes);
        });
    }

    /// Frees `bytes` that the pull has not asked for.
    pub(super) fn give_back(&self, bytes: u64) {
        self.shares.act(|inner| inner.budget.arrived(&self.name, bytes));
    }

    /// The end of the pull never came, so its messages may still be on their way.
    pub(super) fn doubt(self) -> Doubt {
        let kept = self.shares.act(|inner| inner.budget.keep(&self.name, u64::MAX));
        Doubt { shares: self.shares.clone(), name: self.name.clone(), kept }
    }
}

impl Drop for PullShare {
    fn drop(&mut self) {
        self.shares.act(|inner| inner.budget.end(&self.name));
    }
}

/// The bytes of a pull that may still be on their way. Dropping it frees them.
#[derive(Debug)]
pub(super) struct Doubt {
    shares: Shares,
    name: ConsumerName,
    kept: u64,
}

impl Drop for Doubt {
    fn drop(&mut self) {
        self.shares.act(|inner| inner.budget.release(&self.name, self.kept));
    }
}
