//! The leader of a consumer, and whether it is certain, or the consumer is gone. Everything that is known
//! of one incarnation shares it, so any lease can read it. The consumer's task changes it, as its monitor
//! decides. A settlement without an answer puts the leader in doubt, too.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Instant,
};

use crate::{broker::Leader, lock::lock};

#[derive(Debug, Clone)]
pub(super) struct Leadership(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    leader: AtomicU64,
    /// When INFO was last asked whose answer named the leader.
    seen_at: Mutex<Option<Instant>>,
    in_doubt: AtomicBool,
    over: AtomicBool,
    announcing: AtomicBool,
}

impl Leadership {
    pub(super) fn new(leader: Leader) -> Self {
        let leader = AtomicU64::new(leader.0);
        let (in_doubt, over, announcing) = (false.into(), false.into(), false.into());
        let seen_at = Mutex::default();
        Self(Arc::new(Shared { leader, seen_at, in_doubt, over, announcing }))
    }

    /// The last known leader.
    pub(super) fn leader(&self) -> Leader {
        Leader(self.0.leader.load(Ordering::Relaxed))
    }

    /// INFO, which was asked at `seen_at`, has named this leader.
    pub(super) fn pass_to(&self, leader: Leader, seen_at: Instant) {
        *lock(&self.0.seen_at) = Some(seen_at);
        self.0.leader.store(leader.0, Ordering::Relaxed);
    }

    /// When INFO was last asked whose answer named the leader.
    pub(super) fn seen_at(&self) -> Option<Instant> {
        *lock(&self.0.seen_at)
    }

    pub(super) fn in_doubt(&self) -> bool {
        self.0.in_doubt.load(Ordering::Relaxed)
    }

    /// `true` for the first doubt.
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

    /// Takes note of whether the other replicas are told at this moment that the consumer began again. Until they
    /// know, leases of theirs may be of the time before.
    pub(super) fn announce(&self, announcing: bool) {
        self.0.announcing.store(announcing, Ordering::Relaxed);
    }

    pub(super) fn is_announcing(&self) -> bool {
        self.0.announcing.load(Ordering::Relaxed)
    }
}

/// Two specs with different leaders are equal: the leader is not part of a consumer's configuration.
impl PartialEq for Leadership {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Leadership {}
