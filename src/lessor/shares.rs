//! The budget in bytes of one connection for deliveries, behind its one lock, and who is woken when his
//! share is there. Owns the lock: nobody holds it across an await, and nobody reads the clock under it.

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

/// The shares of one connection. Clones are the same.
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
    /// Which one.
    epoch: u64,
    /// Bytes that busy pulls could still bring then.
    out: u64,
    explained: Option<Explained>,
}

/// Why a connection was cut, as far as its bytes tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Explained {
    pub(super) cause: Cause,
    /// Bytes that pulls may bring together from now on.
    pub(super) bound: u64,
    /// This is the first who asks.
    pub(super) first: bool,
}

impl Shares {
    /// So many bytes for one connection.
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

    /// As many bytes, for another connection to the same server.
    pub(super) fn another(&self) -> Self {
        let bound = self.lock().bound.clone();
        Self::of(bound)
    }

    /// A connection was lost while pulls were open; told by everybody, and noted once.
    pub(super) fn cut(&self, epoch: u64) {
        let mut inner = self.lock();
        if inner.cut.as_ref().is_none_or(|cut| cut.epoch != epoch) {
            let out = inner.budget.busy_out();
            inner.cut = Some(Cut { epoch, out, explained: None });
        }
    }

    /// Nothing that was found explains that cut: whether its bytes do.
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

    /// Does one thing to the budget, and wakes whose turn has come by it.
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

/// The place of one consumer at the shares of one connection. Dropped, it leaves the line.
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

    /// Those of its connection.
    pub(super) fn shares(&self) -> &Shares {
        &self.shares
    }

    /// Rings when it is worth to ask again.
    pub(super) fn bell(&self) -> Arc<Notify> {
        self.bell.clone()
    }

    /// Asks for a share; where there is none yet, it stands in line for it.
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

    /// Wants nothing any more.
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

/// What the open pull of one consumer may still bring, in bytes. Dropped, it is free.
#[derive(Debug)]
pub(super) struct PullShare {
    shares: Shares,
    name: ConsumerName,
    /// How much it was at first.
    pub(super) granted: u64,
}

impl PullShare {
    /// So many bytes have arrived.
    pub(super) fn arrived(&self, bytes: u64) {
        self.shares.act(|inner| {
            inner.bound.came(bytes);
            inner.budget.arrived(&self.name, bytes);
        });
    }

    /// The pull has asked for less.
    pub(super) fn give_back(&self, bytes: u64) {
        self.shares.act(|inner| inner.budget.arrived(&self.name, bytes));
    }

    /// Nothing was heard of the pull any more, and what it brings may still be on its way.
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

/// Bytes of a pull that may still be on their way. Dropped, they are free.
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
