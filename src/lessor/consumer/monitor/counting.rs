//! Whether the deliveries of a consumer are still counted as before. JetStream counts them from 1 when a
//! consumer is made, and again from 1 when it is reset (`CONSUMER.RESET`, from nats-server 2.14 on). A reset
//! changes nothing else that shows. Pure: `now` is an argument.
//!
//! ```text
//!  FRESH ──── sequence 1 is seen ────▶ BEGUN ──── sequence 1 is seen again: void ──▶ BEGUN
//!   │▲                                   ▲ ▲
//!   ││ void: nothing is delivered yet    │ │ sequence 1 is seen: void, or INFO tells if the
//!   ││                                   │ │ counting was noticed a moment before
//!   │└── any state ── void: another ──▶ UNDER WAY since
//!   │                  sequence is seen    │
//!   │                                      │ sequence 1 is seen: INFO tells whether it was only
//!   └─ a later sequence ─▶ TOLD since ─────┘ on its way, or void after a long time
//!      is seen or leased
//! ```
//! 1. A sequence that is not higher than the highest that has arrived voids every older lease.
//! 2. The first delivery of a counting voids nothing of that counting.
//! 3. A sighting of another replica voids nothing, if its counting was noticed before.
//!
//! A replica knows by two signs that a sighting is of a counting which it has not noticed. Sequence 1 is
//! delivered once in each counting. And the replicas number the countings: if two replicas notice the same
//! counting by themselves, both give it the next number. So a higher number is news, however soon it comes.

use std::time::{Duration, Instant};

use crate::lessor::sighting::Sighting;

/// All sightings of one counting arrive within this time of each other, if nobody is cut off.
const NEWS: Duration = Duration::from_secs(2);
/// A replica that was cut off notices a counting later, and gives it the number that it has.
const LATE_NEWS: Duration = Duration::from_secs(30);
/// No delivery is on its way for so long. A NATS server closes a client connection after 10 s in which it can write
/// nothing, and a route stalls for as long as three.
const LONGEST_WAY: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Start {
    /// Nothing has been delivered, as far as is known.
    Fresh,
    /// Since then, later deliveries are known. The one with sequence 1 may be on its way, to here or to another
    /// replica.
    Told(Instant),
    /// Something else than sequence 1 was delivered when the counting was noticed, which was then.
    UnderWay(Instant),
    /// The delivery with sequence 1 has arrived here, or at another replica.
    Begun,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Counting {
    start: Start,
    /// The highest sequence that has arrived here.
    highest: u64,
    /// How many countings followed the first, as far as this replica has noticed or heard.
    number: u64,
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
    /// The same, or the first of another counting: INFO tells.
    Perhaps,
    /// Every older lease is void.
    Again,
}

/// The meaning of a sighting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CountingNews {
    /// Nothing is void.
    Known,
    /// Another counting may have begun: INFO tells.
    Perhaps,
    /// Every older lease is void.
    Again,
}

impl Start {
    /// INFO, or another replica, knows deliveries up to this one.
    fn of(delivered: u64, now: Instant) -> Self {
        if delivered == 0 { Self::Fresh } else { Self::UnderWay(now) }
    }
}

impl Counting {
    /// INFO was read for the first time, and knew so many deliveries.
    pub(super) fn new(delivered: u64, now: Instant) -> Self {
        Self { start: Start::of(delivered, now), highest: 0, number: 0, noticed: None }
    }

    /// How many countings followed the first, for the other replicas.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// A delivery with this sequence has arrived. The deliveries of one inbox arrive in the order of their
    /// sequences.
    pub(super) fn arrived(&mut self, sequence: u64, now: Instant) -> DeliveryCount {
        let lower = sequence <= self.highest;
        let counted = match sequence {
            _ if lower => DeliveryCount::Again,
            1 => match self.start {
                Start::Fresh => DeliveryCount::Began,
                Start::Told(since) if is_within(LONGEST_WAY, since, now) => DeliveryCount::Perhaps,
                Start::Told(_) | Start::UnderWay(_) | Start::Begun => DeliveryCount::Again,
            },
            _ => DeliveryCount::On,
        };
        let start = if sequence == 1 { Start::Begun } else { Start::UnderWay(now) };
        match counted {
            DeliveryCount::On => self.told(now),
            DeliveryCount::Began | DeliveryCount::Perhaps => self.start = start,
            DeliveryCount::Again => self.notice(start, self.number + 1, now),
        }
        self.highest = sequence;
        counted
    }

    /// Leases of this counting were taken over from another replica. `first`: the delivery with sequence 1 is among
    /// them.
    pub(super) fn adopted(&mut self, first: bool, now: Instant) {
        if first { self.start = Start::Begun } else { self.told(now) }
    }

    /// A later delivery than the first is known.
    fn told(&mut self, now: Instant) {
        if self.start == Start::Fresh {
            self.start = Start::Told(now);
        }
    }

    /// INFO knows fewer deliveries than were known when it was asked: only those of another counting.
    pub(super) fn went_down(&mut self, delivered: u64, now: Instant) {
        self.notice(Start::of(delivered, now), self.number + 1, now);
    }

    /// A new leader knows so many deliveries only. It gives the sequences after that again.
    pub(super) fn lost(&mut self, delivered: u64) {
        self.highest = self.highest.min(delivered);
    }

    /// Another replica has seen something.
    pub(super) fn heard(&mut self, sighting: &Sighting, now: Instant) -> CountingNews {
        let news = sighting.counting > self.number;
        let heard = if sighting.began && !news {
            self.heard_beginning(now)
        } else if sighting.began || sighting.again && !self.is_known(sighting.counting, now) {
            CountingNews::Again
        } else {
            CountingNews::Known
        };
        let start = if sighting.began { Start::Begun } else { Start::of(sighting.delivered, now) };
        if heard == CountingNews::Again {
            self.notice(start, sighting.counting.max(self.number), now);
        } else if sighting.began {
            self.start = start;
        }
        heard
    }

    fn notice(&mut self, start: Start, number: u64, now: Instant) {
        *self = Self { start, highest: 0, number, noticed: Some(now) };
    }

    /// Sequence 1 is delivered elsewhere. It begins the present counting or another one.
    fn heard_beginning(&self, now: Instant) -> CountingNews {
        match self.start {
            Start::Fresh => CountingNews::Known,
            Start::UnderWay(since) if is_within(NEWS, since, now) => CountingNews::Perhaps,
            Start::Told(since) if is_within(LONGEST_WAY, since, now) => CountingNews::Perhaps,
            Start::Told(_) | Start::UnderWay(_) | Start::Begun => CountingNews::Again,
        }
    }

    /// Another replica tells of a counting that was noticed before. A number that is not higher may be of the present
    /// counting.
    fn is_known(&self, number: u64, now: Instant) -> bool {
        let within = if number == self.number { LATE_NEWS } else { NEWS };
        number <= self.number && self.noticed.is_some_and(|at| is_within(within, at, now))
    }
}

fn is_within(time: Duration, since: Instant, now: Instant) -> bool {
    now.saturating_duration_since(since) < time
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{broker::ConsumerName, clock};

    /// Long enough that everybody has heard.
    const LATER: Duration = NEWS;

    fn sighting(counting: u64, delivered: u64) -> Sighting {
        Sighting {
            name: ConsumerName { stream: "S".into(), consumer: "c".into() },
            created: "2026-11-29T08:00:00Z".into(),
            delivered,
            began: false,
            again: true,
            counting,
        }
    }

    /// The counting of this number has begun elsewhere.
    fn began(counting: u64) -> Sighting {
        Sighting { began: true, again: counting > 0, ..sighting(counting, 1) }
    }

    #[test]
    fn a_counting_that_begins_voids_nothing() {
        let now = clock::now();
        let mut counting = Counting::new(0, now);
        assert_eq!(counting.arrived(1, now), DeliveryCount::Began);
        assert_eq!(counting.arrived(2, now), DeliveryCount::On);
        let mut elsewhere = Counting::new(0, now);
        // It has got the second delivery before it hears of the first.
        assert_eq!(elsewhere.arrived(2, now), DeliveryCount::On);
        assert_eq!(elsewhere.heard(&began(0), now + LATER), CountingNews::Perhaps, "INFO tells");
    }

    #[test]
    fn a_replica_that_has_just_read_the_consumer_may_hear_of_its_beginning_later() {
        let now = clock::now();
        assert_eq!(Counting::new(5, now).heard(&began(0), now + LATER / 2), CountingNews::Perhaps);
        assert_eq!(Counting::new(5, now).heard(&began(0), now + LATER), CountingNews::Again);
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
    fn sequences_that_a_new_leader_gives_again_void_nothing() {
        let now = clock::now();
        let mut counting = Counting::new(0, now);
        counting.arrived(7, now);
        counting.lost(5);
        assert_eq!(counting.arrived(6, now), DeliveryCount::On);
        counting.lost(9);
        assert_eq!(counting.arrived(6, now), DeliveryCount::Again);
    }

    #[test]
    fn a_second_beginning_voids_what_is_older_wherever_it_arrives() {
        let now = clock::now();
        let mut counting = Counting::new(0, now);
        counting.arrived(1, now);
        assert_eq!(
            counting.heard(&began(1), now),
            CountingNews::Again,
            "the next counting has begun elsewhere"
        );
        assert_eq!(counting.arrived(2, now), DeliveryCount::On, "it is the second of that");
        let mut counting = Counting::new(0, now);
        assert_eq!(counting.heard(&began(0), now), CountingNews::Known);
        assert_eq!(counting.arrived(1, now), DeliveryCount::Again, "the next one has begun here");
    }

    #[test]
    fn each_of_two_resets_in_a_moment_voids_what_is_older() {
        let now = clock::now();
        let mut counting = Counting::new(0, now);
        counting.arrived(7, now);
        for number in [1, 2] {
            assert_eq!(counting.heard(&began(number), now), CountingNews::Again);
        }
        assert_eq!(
            counting.heard(&sighting(3, 0), now),
            CountingNews::Again,
            "INFO has shown it elsewhere"
        );
        assert_eq!(
            counting.heard(&sighting(4, 2), now),
            CountingNews::Again,
            "its first delivery was lost"
        );
        counting.went_down(0, now);
        assert_eq!(
            counting.heard(&began(6), now),
            CountingNews::Again,
            "it was not the one that INFO has shown"
        );
        assert_eq!(counting.arrived(1, now), DeliveryCount::Again);
        // Another replica has got the first delivery of a counting that was not noticed here.
        assert_eq!(counting.heard(&began(6), now), CountingNews::Again);
    }

    #[test]
    fn reset_that_several_replicas_notice_is_applied_once() {
        let now = clock::now();
        let mut counting = Counting::new(0, now);
        counting.arrived(7, now);
        assert_eq!(counting.arrived(3, now), DeliveryCount::Again);
        assert_eq!(counting.heard(&began(1), now), CountingNews::Perhaps, "INFO tells");
        assert_eq!(counting.heard(&sighting(1, 2), now), CountingNews::Known);
        let mut counting = Counting::new(7, now);
        counting.went_down(0, now);
        assert_eq!(counting.heard(&sighting(1, 0), now), CountingNews::Known);
        assert_eq!(counting.arrived(2, now), DeliveryCount::On);
        assert_eq!(counting.heard(&began(1), now + LATER), CountingNews::Perhaps, "INFO tells");
        assert_eq!(counting.heard(&sighting(1, 5), now + LATER / 2), CountingNews::Known);
    }

    #[test]
    fn replica_that_was_cut_off_tells_nothing_new() {
        let now = clock::now();
        let mut counting = Counting::new(0, now);
        counting.arrived(7, now);
        assert_eq!(counting.arrived(1, now), DeliveryCount::Again);
        assert_eq!(counting.heard(&sighting(1, 5), now + LATER * 3), CountingNews::Known);
        assert_eq!(counting.heard(&sighting(1, 5), now + LATE_NEWS), CountingNews::Again);
    }

    /// A replica that has just started does not know of the countings before.
    #[test]
    fn late_sighting_of_a_lower_number_is_of_another_counting() {
        let now = clock::now();
        let mut counting = Counting::new(0, now);
        assert_eq!(counting.heard(&sighting(6, 3), now), CountingNews::Again);
        assert_eq!(counting.heard(&sighting(1, 3), now), CountingNews::Known);
        assert_eq!(counting.heard(&sighting(1, 3), now + LATER), CountingNews::Again);
        assert_eq!(counting.number(), 6);
    }

    #[test]
    fn first_delivery_after_leases_were_taken_over_may_be_of_another_counting() {
        let now = clock::now();
        let taken_over = |first| {
            let mut counting = Counting::new(0, now);
            counting.adopted(first, now);
            counting
        };
        for at in [now, now + LONGEST_WAY - LATER] {
            assert_eq!(taken_over(false).arrived(1, at), DeliveryCount::Perhaps);
            assert_eq!(taken_over(false).heard(&began(0), at), CountingNews::Perhaps);
        }
        let late = now + LONGEST_WAY;
        assert_eq!(taken_over(false).arrived(1, late), DeliveryCount::Again);
        assert_eq!(taken_over(false).heard(&began(0), late), CountingNews::Again);
        assert_eq!(taken_over(true).arrived(1, now), DeliveryCount::Again);
        assert_eq!(taken_over(true).heard(&began(0), now), CountingNews::Again);
        let mut counting = taken_over(false);
        assert_eq!(counting.arrived(3, now), DeliveryCount::On, "it is one more");
        let mut counting = taken_over(false);
        counting.arrived(1, now);
        assert_eq!(counting.heard(&began(0), now), CountingNews::Again, "it has begun here");
    }
}
