//! The queue for permits while none is free: first come, first served. A consumer queues for one permit.
//! Its next pull takes the permits that are free then.
//!
//! ```text
//!   OUT ──enter──▶ QUEUED ──a permit is freed──▶ CALLED ──take──▶ OUT
//!    ▲                │                            │
//!    └─────leave──────┴────────────────────────────┘
//! ```
//! 1. A freed permit goes to the head of the queue. It is free for others only if the queue is empty.
//! 2. A consumer that is called holds one permit until it takes the permit or leaves.

use std::{fmt, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::underway::Underway;

/// The place of one consumer in the queue.
pub(super) struct Turn {
    permits: Arc<Semaphore>,
    waiting: Underway<Option<OwnedSemaphorePermit>>,
    held: Option<OwnedSemaphorePermit>,
}

impl Turn {
    pub(super) fn new(permits: Arc<Semaphore>) -> Self {
        Self { permits, waiting: Underway::none(), held: None }
    }

    /// Enters the queue at the next [`Turn::called`]. A consumer in the queue keeps its place.
    pub(super) fn enter(&mut self) {
        if self.held.is_none() && !self.waiting.is_some() {
            let permits = self.permits.clone();
            // The semaphore is never closed, so this gets a permit.
            self.waiting.begin(async move { permits.acquire_owned().await.ok() });
        }
    }

    /// Waits until the consumer is called. Never returns if it is not in the queue. The future may be
    /// dropped and made again: the consumer keeps its place.
    pub(super) async fn called(&mut self) {
        self.held = self.waiting.next().await;
    }

    /// Leaves the queue.
    pub(super) fn leave(&mut self) {
        self.waiting.cancel();
        self.held = None;
    }

    /// The number of permits that can be taken: the one that is held, or else those that are free.
    pub(super) fn free(&self) -> usize {
        let held = self.held.as_ref().map(OwnedSemaphorePermit::num_permits);
        held.unwrap_or_else(|| self.permits.available_permits())
    }

    /// Takes `count` permits, if so many can be taken. Others may have taken free permits in between, but
    /// never the one that is held.
    pub(super) fn take(&mut self, count: u32) -> Option<OwnedSemaphorePermit> {
        match self.held.take() {
            Some(held) if held.num_permits() >= count as usize => Some(held),
            Some(_) | None => self.permits.clone().try_acquire_many_owned(count).ok(),
        }
    }
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn").field("held", &self.held.is_some()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn called(turn: &mut Turn) -> bool {
        let mut called = Box::pin(turn.called());
        called.as_mut().poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(())
    }

    #[test]
    fn a_freed_permit_goes_to_the_longest_waiter_alone() {
        let permits = Arc::new(Semaphore::new(2));
        let (mut first, mut second) = (Turn::new(permits.clone()), Turn::new(permits.clone()));
        let mut held = first.take(2).unwrap();
        for turn in [&mut first, &mut second] {
            turn.enter();
            assert!(!called(turn));
        }
        drop(held.split(1));
        let mut third = Turn::new(permits.clone());
        assert_eq!((third.free(), third.take(1).is_none()), (0, true), "a permit passed the queue");
        first.enter();
        assert!(!called(&mut second));
        assert!(called(&mut first));
        assert_eq!(first.free(), 1);
        let mut taken = first.take(1);
        assert!(taken.is_some());
        // The first has had a permit, so it queues behind the second.
        first.enter();
        assert!(!called(&mut first));
        taken.take();
        assert!(!called(&mut first));
        assert!(called(&mut second));
        second.leave();
        assert!(called(&mut first));
        drop(held);
        assert_eq!(first.free(), 1);
        drop(first.take(1).unwrap());
        assert_eq!(first.free(), 2);
        assert!(first.take(3).is_none(), "there are two");
        assert_eq!(first.take(2).unwrap().num_permits(), 2);
    }

    #[test]
    fn a_waiter_that_leaves_lets_the_next_one_pass() {
        let permits = Arc::new(Semaphore::new(1));
        let (mut first, mut second) = (Turn::new(permits.clone()), Turn::new(permits));
        let held = first.take(1);
        for turn in [&mut first, &mut second] {
            turn.enter();
            assert!(!called(turn));
        }
        first.leave();
        drop(held);
        assert!(called(&mut second) && !called(&mut first));
    }
}
