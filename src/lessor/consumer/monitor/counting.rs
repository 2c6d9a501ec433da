//! Whether the deliveries of a consumer are still counted as before. JetStream counts them from 1 when a
//! consumer is made, and again from 1 when it is reset (`CONSUMER.RESET`, from nats-server 2.14 on). A reset
//! changes nothing else that shows. Pure: `now` is an argument.
//!
//! ```text
//!  FRESH ──── sequence 1 is seen ────▶ BEGUN ──── sequence 1 is seen again: void ──▶ BEGUN
//!    ▲                                   ▲
//!    │ void: a lower sequence            │ sequence 1 is seen: void, unless the consumer
//!    │                                   │ was read for the first time a moment before
//!    └── any state                    UNDER WAY since
//! ```
//! 1. A sequence that is not higher than the highest that has arrived voids every older lease.
//! 2. The first delivery of a counting voids nothing of that counting.
//! 3. A sighting of another replica voids nothing, if its counting was noticed before.

use std::time::{Duration, Instant};

/// All sightings of one counting arrive within this time of each other.
const NEWS: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Start {
    /// Nothing has been delivered, as far as is known.
    Fresh,
    /// Something had been delivered when the consumer was read for the first time, which was then.
    UnderWay(Instant),
    /// The delivery with sequence 1 has arrived here, or at another replica.
    Begun,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Counting {
    start: Start,
    /// The highest sequence that has arrived here.
    highest: u64,
    /// When a new counting was noticed last.
    noticed: Option<Instant>,
}

/// The meaning of an arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DeliveryCount {
    /// It is one more.
    On,
    /// It is the first of the first counting that is known.
    Began,
    /// Every older lease is void.
    Again,
}

impl Counting {
    /// INFO was read for the first time, and knew so many deliveries.
    pub(super) fn new(delivered: u64, now: Instant) -> Self {
        let start = if delivered == 0 { Start::Fresh } else { Start::UnderWay(now) };
        Self { start, highest: 0, noticed: None }
    }

    /// A delivery with this sequence has arrived. The deliveries of one inbox arrive in the order of their
    /// sequences.
    pub(super) fn arrived(&mut self, sequence: u64, now: Instant) -> DeliveryCount {
        let lower = sequence <= self.highest;
        let counted = match sequence {
            1 if self.start == Start::Fresh && !lower => DeliveryCount::Began,
            1 => DeliveryCount::Again,
            _ if lower => DeliveryCount::Again,
            _ => DeliveryCount::On,
        };
        match counted {
            DeliveryCount::On => {}
            DeliveryCount::Began => self.start = Start::Begun,
            DeliveryCount::Again => {
                self.noticed = Some(now);
                self.start = if sequence == 1 { Start::Begun } else { Start::Fresh };
            }
        }
        self.highest = sequence;
        counted
    }

    /// Another replica says that the delivery with sequence 1 has arrived there. `true`: every older
    /// lease is void.
    pub(super) fn heard_beginning(&mut self, now: Instant) -> bool {
        let known = self.noticed_lately(now);
        let void = self.begins(now) && !known;
        if void {
            (self.noticed, self.highest) = (Some(now), 0);
        }
        void
    }

    /// Another replica, or INFO, says that the sequences went down. `true`: every older lease is void.
    pub(super) fn heard_again(&mut self, now: Instant) -> bool {
        if self.noticed_lately(now) {
            return false;
        }
        (self.start, self.highest, self.noticed) = (Start::Fresh, 0, Some(now));
        true
    }

    /// Sequence 1 was delivered. `true`: to a counting that had begun before.
    fn begins(&mut self, now: Instant) -> bool {
        match std::mem::replace(&mut self.start, Start::Begun) {
            Start::Fresh => false,
            Start::UnderWay(since) => now.saturating_duration_since(since) >= NEWS,
            Start::Begun => true,
        }
    }

    fn noticed_lately(&self, now: Instant) -> bool {
        self.noticed.is_some_and(|at| now.saturating_duration_since(at) < NEWS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    /// Long enough that everybody has heard.
    const LATER: Duration = NEWS;

    #[test]
    fn a_counting_that_begins_voids_nothing() {
        let now = clock::now();
        let mut counting = Counting::new(0, now);
        assert_eq!(counting.arrived(1, now), DeliveryCount::Began);
        assert_eq!(counting.arrived(2, now), DeliveryCount::On);
        let mut elsewhere = Counting::new(0, now);
        // It has got the second delivery before it hears of the first.
        assert_eq!(elsewhere.arrived(2, now), DeliveryCount::On);
        assert!(!elsewhere.heard_beginning(now + LATER));
    }

    #[test]
    fn a_replica_that_has_just_read_the_consumer_may_hear_of_its_beginning_later() {
        let now = clock::now();
        assert!(!Counting::new(5, now).heard_beginning(now + LATER / 2));
        assert!(Counting::new(5, now).heard_beginning(now + LATER));
    }

    #[test]
    fn a_lower_sequence_voids_what_is_older() {
        let now = clock::now();
        for (first, then) in [(5, 5), (5, 4), (5, 1), (1, 1)] {
            let mut counting = Counting::new(0, now);
            counting.arrived(first, now);
            assert_eq!(counting.arrived(then, now), DeliveryCount::Again, "{first} then {then}");
            assert_eq!(counting.arrived(then + 1, now), DeliveryCount::On);
        }
    }

    #[test]
    fn a_second_beginning_voids_what_is_older_wherever_it_arrives() {
        let now = clock::now();
        let mut counting = Counting::new(0, now);
        counting.arrived(1, now);
        assert!(counting.heard_beginning(now), "the next counting has begun elsewhere");
        assert_eq!(counting.arrived(2, now), DeliveryCount::On, "it is the second of that");
        let mut counting = Counting::new(0, now);
        assert!(!counting.heard_beginning(now));
        assert_eq!(counting.arrived(1, now), DeliveryCount::Again, "the next one has begun here");
    }

    #[test]
    fn known_reset_is_not_applied_again_by_announcements() {
        let now = clock::now();
        let mut counting = Counting::new(0, now);
        counting.arrived(7, now);
        assert_eq!(counting.arrived(3, now), DeliveryCount::Again);
        assert!(!counting.heard_beginning(now));
        assert!(!counting.heard_again(now));
        assert!(counting.heard_again(now + LATER));
        assert!(!counting.heard_again(now + LATER));
    }
}
