//! The line for places, where none is free: first come, first served. One stands in it for one place.
//! The next pull takes what is free then.
//!
//! ```text
//!   OUT ──stand──▶ IN LINE ──a place is freed──▶ CALLED ──take──▶ OUT
//!    ▲                │                            │
//!    └─────leave──────┴────────────────────────────┘
//! ```
//! 1. A freed place goes to the head of the line. It is free for others only when nobody stands in line.
//! 2. Whoever is called holds one place until he takes it or leaves.

use std::{fmt, future::Future, pin::Pin, sync::Arc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

type Waiting = Pin<Box<dyn Future<Output = Option<OwnedSemaphorePermit>> + Send>>;

/// The place in line of one consumer.
pub(super) struct Turn {
    places: Arc<Semaphore>,
    waiting: Option<Waiting>,
    called: Option<OwnedSemaphorePermit>,
}

impl Turn {
    pub(super) fn new(places: Arc<Semaphore>) -> Self {
        Self { places, waiting: None, called: None }
    }

    /// Stands in line from the next [`Turn::come`] on. Whoever stands there already keeps its place.
    pub(super) fn stand(&mut self) {
        if self.called.is_none() && self.waiting.is_none() {
            let places = self.places.clone();
            // Never closed, so the only outcome is a place.
            self.waiting = Some(Box::pin(async move { places.acquire_owned().await.ok() }));
        }
    }

    /// Waits to be called; for ever, where one does not stand in line. May be dropped and called again:
    /// that does not change the place in line.
    pub(super) async fn come(&mut self) {
        match &mut self.waiting {
            Some(waiting) => {
                self.called = waiting.await;
                self.waiting = None;
            }
            None => std::future::pending().await,
        }
    }

    /// Wants nothing any more.
    pub(super) fn leave(&mut self) {
        (self.waiting, self.called) = (None, None);
    }

    /// Places that one can take: the one that is held, or else those that are free.
    pub(super) fn free(&self) -> usize {
        let held = self.called.as_ref().map(OwnedSemaphorePermit::num_permits);
        held.unwrap_or_else(|| self.places.available_permits())
    }

    /// Takes `count` places, if one can take so many. Others may have taken free ones in between, but
    /// never the one that is held.
    pub(super) fn take(&mut self, count: u32) -> Option<OwnedSemaphorePermit> {
        match self.called.take() {
            Some(called) if called.num_permits() >= count as usize => Some(called),
            Some(_) | None => self.places.clone().try_acquire_many_owned(count).ok(),
        }
    }
}

impl fmt::Debug for Turn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Turn").field("called", &self.called.is_some()).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::task::{Context, Poll, Waker};

    use super::*;

    fn called(turn: &mut Turn) -> bool {
        let mut come = Box::pin(turn.come());
        come.as_mut().poll(&mut Context::from_waker(Waker::noop())) == Poll::Ready(())
    }

    #[test]
    fn a_freed_place_goes_to_whoever_waits_longest_and_to_nobody_else() {
        let places = Arc::new(Semaphore::new(2));
        let (mut first, mut second) = (Turn::new(places.clone()), Turn::new(places.clone()));
        let mut held = first.take(2).unwrap();
        for turn in [&mut first, &mut second] {
            turn.stand();
            assert!(!called(turn));
        }
        drop(held.split(1));
        let mut third = Turn::new(places.clone());
        assert_eq!((third.free(), third.take(1).is_none()), (0, true), "somebody passed the line");
        first.stand();
        assert!(!called(&mut second));
        assert!(called(&mut first));
        assert_eq!(first.free(), 1);
        let mut taken = first.take(1);
        assert!(taken.is_some());
        // Whoever had one stands behind.
        first.stand();
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
    fn whoever_leaves_lets_the_next_pass() {
        let places = Arc::new(Semaphore::new(1));
        let (mut first, mut second) = (Turn::new(places.clone()), Turn::new(places));
        let held = first.take(1);
        for turn in [&mut first, &mut second] {
            turn.stand();
            assert!(!called(turn));
        }
        first.leave();
        drop(held);
        assert!(called(&mut second) && !called(&mut first));
    }
}
