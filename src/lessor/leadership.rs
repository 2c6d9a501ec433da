//! Who leads a consumer, and whether that is sure, or it is gone: shared by all that is known of its
//! incarnation, so that it can be asked of any lease. Who writes it, and why, is said in
//! `consumer::leading` and `consumer::knowing`.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use crate::broker::Leader;

#[derive(Debug, Clone)]
pub(super) struct Leadership(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    leader: AtomicU64,
    in_doubt: AtomicBool,
    over: AtomicBool,
}

impl Leadership {
    pub(super) fn new(leader: Leader) -> Self {
        let leader = AtomicU64::new(leader.0);
        Self(Arc::new(Shared { leader, in_doubt: false.into(), over: false.into() }))
    }

    /// As was last known.
    pub(super) fn leader(&self) -> Leader {
        Leader(self.0.leader.load(Ordering::Relaxed))
    }

    /// Returns who led before.
    pub(super) fn pass_to(&self, leader: Leader) -> Leader {
        Leader(self.0.leader.swap(leader.0, Ordering::Relaxed))
    }

    pub(super) fn in_doubt(&self) -> bool {
        self.0.in_doubt.load(Ordering::Relaxed)
    }

    /// `true` for the first who doubts.
    pub(super) fn doubt(&self) -> bool {
        !self.0.in_doubt.swap(true, Ordering::Relaxed)
    }

    pub(super) fn be_sure(&self) {
        self.0.in_doubt.store(false, Ordering::Relaxed);
    }

    /// The consumer is gone, or another one has its name.
    pub(super) fn end(&self) {
        self.0.over.store(true, Ordering::Relaxed);
    }

    pub(super) fn is_over(&self) -> bool {
        self.0.over.load(Ordering::Relaxed)
    }
}

/// It is no part of what a consumer is.
impl PartialEq for Leadership {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Leadership {}
