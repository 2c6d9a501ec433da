//! Whether a consumer is in doubt: one flag, shared by all that is known of its incarnation. Who
//! raises it and what ends it is said in `feed::leading`.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

/// Set while a consumer is in doubt; shared by all that is known of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Doubt(Arc<AtomicBool>);

impl Doubt {
    pub(super) fn is_on(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// `true` for the first who doubts.
    pub(super) fn begin(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }

    pub(super) fn end(&self) {
        self.0.store(false, Ordering::Relaxed);
    }
}

/// It is no part of what a consumer is.
impl PartialEq for Doubt {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Doubt {}
