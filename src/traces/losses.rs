//! The count of spans that wait for the exporter, and of spans that are lost. Pure, but for its atomics.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The spans that have ended and were not sent.
#[derive(Debug, Default)]
pub(super) struct Losses {
    /// Spans that wait for the exporter.
    queued: AtomicUsize,
    dropped: AtomicU64,
}

impl Losses {
    /// Takes a place of `most` in the queue. `false`: there is none, and the span counts as dropped.
    pub(super) fn queue(&self, most: usize) -> bool {
        let next = |queued| (queued < most).then_some(queued + 1);
        let taken = self.queued.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok();
        if !taken {
            self.lose(1);
        }
        taken
    }

    /// The exporter has taken these spans.
    pub(super) fn unqueue(&self, spans: usize) {
        self.queued.fetch_sub(spans, Ordering::Relaxed);
    }

    /// Counts spans that nobody will receive.
    pub(super) fn lose(&self, spans: usize) {
        self.dropped.fetch_add(spans as u64, Ordering::Relaxed);
    }

    pub(super) fn queued(&self) -> usize {
        self.queued.load(Ordering::Relaxed)
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn span_without_a_place_in_the_queue_is_counted() {
        let losses = Losses::default();
        let taken = (0..5).filter(|_| losses.queue(3)).count();
        assert_eq!((taken, losses.queued(), losses.dropped()), (3, 3, 2));
        losses.unqueue(2);
        assert!(losses.queue(3), "there is a place again");
        losses.lose(2);
        assert_eq!((losses.queued(), losses.dropped()), (2, 4));
    }
}
