//! Owns the clocks: the only module that reads the time. All decisions take `now` as an argument, so that
//! tests can choose it.
//!
//! The monotonic clock stands still while a machine is suspended, and JetStream's clock does not. A time
//! that ends with JetStream's ack wait is therefore compared by a [`Reading`]. A reading shows how long
//! the machine was suspended, by two clocks: the clock that counts suspension, and the wall clock, which is
//! corrected after a virtual machine was paused.

use std::{
    pin::Pin,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use crate::simulated::{self, SimulatedClocks};

/// Shortest suspension that counts. The margin of a lease covers a shorter one.
const LEAST_GAP: Duration = Duration::from_millis(10);
/// Longest time in which all clocks must be read to count as read at once.
const ONE_MOMENT: Duration = Duration::from_millis(1);
/// How often this is tried.
const TRIES: u32 = 100;
/// Smallest step of the wall clock that counts. NTP usually sets the clock by less: it slews a difference
/// below 128 ms.
const WALL_MARGIN: Duration = Duration::from_secs(1);

/// The monotonic time, which measures leases and waits.
///
/// This is tokio's clock, so a test that pauses tokio's time also pauses this time.
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads the clock")]
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The wall clock at this moment, as the time since the Unix epoch. Only for times that leave the process:
/// timestamps in answers, and the `settle_by` inside tokens.
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads the clock")]
pub fn unix_time() -> Duration {
    if let Some(clocks) = simulated::clocks(now()) {
        return clocks.wall;
    }
    // This is zero, except in a test that has paused time and advanced it. Then the wall clock must advance
    // as well, or the two clocks would drift apart.
    let ahead = now().saturating_duration_since(Instant::now());
    wall() + ahead
}

#[expect(clippy::disallowed_methods, reason = "this is the one place that reads the clock")]
fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The two clocks at one moment, to turn a monotonic time into a time of day.
#[derive(Debug, Clone, Copy)]
pub struct ClockPair {
    /// As [`now`] tells it.
    pub now: Instant,
    /// As [`unix_time`] tells it.
    pub unix: Duration,
}

impl ClockPair {
    /// Both clocks at this moment.
    pub fn read() -> Self {
        Self { now: now(), unix: unix_time() }
    }

    /// The time of day at `when`, as the time since the Unix epoch.
    pub fn unix_at(self, when: Instant) -> Duration {
        match when.checked_duration_since(self.now) {
            Some(ahead) => self.unix + ahead,
            None => self.unix.saturating_sub(self.now.duration_since(when)),
        }
    }
}

/// All clocks at this moment.
pub fn reading() -> Reading {
    if let Some(SimulatedClocks { boot_ahead, wall_ahead, .. }) = simulated::clocks(now()) {
        return Reading { now: now(), boot_ahead, wall_ahead };
    }
    let (mut tries, mut before) = (0, monotonic());
    let (boot, wall, monotonic) = loop {
        let (boot, wall, after) = (counting_suspension(), wall(), monotonic());
        tries += 1;
        // If the thread lost its processor in between, it has read the clocks at different moments.
        if after.saturating_sub(before) < ONE_MOMENT || tries == TRIES {
            break (boot, wall, after);
        }
        before = after;
    };
    let ahead = |clock: Option<Duration>| {
        let nanos = |time: Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
        clock.map_or(0, |clock| nanos(clock).saturating_sub(nanos(monotonic)))
    };
    Reading { now: now(), boot_ahead: ahead(boot), wall_ahead: ahead(Some(wall)) }
}

/// The clocks at one moment, as their difference to the monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reading {
    /// The time of [`now`].
    pub now: Instant,
    /// How far the clock that counts suspension is ahead, in nanoseconds.
    boot_ahead: i64,
    /// How far the wall clock is ahead, in nanoseconds.
    wall_ahead: i64,
}

impl Reading {
    /// The same clocks this much later, on a machine that was awake. For tests.
    #[doc(hidden)]
    #[must_use]
    pub fn later(self, by: Duration) -> Self {
        Self { now: self.now + by, ..self }
    }

    /// A reading of chosen clocks, in nanoseconds ahead of the monotonic one. For tests.
    #[doc(hidden)]
    pub fn of(now: Instant, boot_ahead: i64, wall_ahead: i64) -> Self {
        Self { now, boot_ahead, wall_ahead }
    }

    /// How long the monotonic clock stood still since an earlier reading. `None` if it did not. The wall
    /// clock counts only if it went ahead by a second or more, and not if it was set back.
    pub fn gap_since(&self, earlier: &Self) -> Option<Duration> {
        let beyond = |ahead: i64, before: i64, margin: Duration| {
            let gap = Duration::from_nanos(ahead.saturating_sub(before).max(0).unsigned_abs());
            (gap >= margin).then_some(gap)
        };
        let suspended = beyond(self.boot_ahead, earlier.boot_ahead, LEAST_GAP);
        suspended.max(beyond(self.wall_ahead, earlier.wall_ahead, WALL_MARGIN))
    }

    /// The reading to compare later readings with, after this one. Readings of several threads may come
    /// in a different order than they were made.
    #[must_use]
    pub fn after(self, earlier: Self) -> Self {
        let latest = if self.now < earlier.now { earlier } else { self };
        Self { boot_ahead: self.boot_ahead.max(earlier.boot_ahead), ..latest }
    }
}

/// A time by which something must have happened, on a machine that may be suspended before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Deadline {
    /// The time by the monotonic clock.
    pub at: Instant,
    made: Reading,
}

impl Deadline {
    /// The deadline at `at`, as far as this reading knows.
    pub fn new(at: Instant, made: Reading) -> Self {
        Self { at, made }
    }

    /// Whether the deadline has passed at this reading. If the clock stood still, it counts as passed.
    pub fn passed(&self, reading: &Reading) -> bool {
        reading.now >= self.at || reading.gap_since(&self.made).is_some()
    }
}

#[cfg(target_os = "linux")]
fn counting_suspension() -> Option<Duration> {
    read(rustix::time::ClockId::Boottime)
}

#[cfg(not(target_os = "linux"))]
fn counting_suspension() -> Option<Duration> {
    None
}

fn monotonic() -> Duration {
    read(rustix::time::ClockId::Monotonic).unwrap_or_default()
}

fn read(clock: rustix::time::ClockId) -> Option<Duration> {
    Duration::try_from(rustix::time::clock_gettime(clock)).ok()
}

/// Sleeps until `when`. Without a `when`, never returns.
pub async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when.into()).await,
        None => std::future::pending().await,
    }
}

/// A timer that stays set for the time it has while later times are asked for. To set one for an earlier time than all
/// others of a thread costs a system call, and another to wake up for it.
#[derive(Debug, Default)]
pub struct Alarm(Option<Pin<Box<tokio::time::Sleep>>>);

impl Alarm {
    /// Sleeps until `when`. Without a `when`, never returns. The task may be polled before `when`, for an earlier time.
    pub async fn sleep_until(&mut self, when: Option<Instant>) {
        let Some(when) = when else {
            return std::future::pending().await;
        };
        while now() < when {
            let at = when.into();
            let sleep = self.0.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
            if sleep.is_elapsed() || sleep.deadline() > at {
                sleep.as_mut().reset(at);
            }
            sleep.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: i64 = 1_000_000;

    fn gap(earlier: (i64, i64), later: (i64, i64)) -> Option<Duration> {
        let now = now();
        let of = |(boot, wall): (i64, i64)| Reading::of(now, boot * MILLI, wall * MILLI);
        of(later).gap_since(&of(earlier))
    }

    #[test]
    fn a_suspended_machine_is_told_by_the_clock_that_counts_it() {
        assert_eq!(gap((0, 0), (0, 0)), None);
        assert_eq!(gap((500, 0), (505, 5)), None, "no more than is in reserve");
        assert_eq!(gap((500, 0), (3500, 3000)), Some(Duration::from_secs(3)));
    }

    #[test]
    fn a_machine_that_was_paused_from_outside_is_told_by_the_wall_clock() {
        assert_eq!(gap((0, 0), (0, 900)), None, "it is set a little now and then");
        assert_eq!(gap((0, 100), (0, 5100)), Some(Duration::from_secs(5)));
        assert_eq!(gap((0, 5000), (0, 0)), None, "set back");
        assert_eq!(gap((0, 0), (2000, 5000)), Some(Duration::from_secs(5)), "the longer one");
    }

    #[test]
    fn readings_in_another_order_are_no_gap() {
        let now = now();
        let (first, second) = (Reading::of(now, 50 * MILLI, 0), Reading::of(now, 0, 0));
        assert_eq!(first.gap_since(&second.after(first)), None);
    }

    #[test]
    fn a_deadline_passes_by_time_and_by_a_gap() {
        let made = Reading::of(now(), 0, 0);
        let deadline = Deadline::new(made.now + Duration::from_secs(1), made);
        assert!(!deadline.passed(&made));
        assert!(!deadline.passed(&Reading { now: made.now + Duration::from_millis(999), ..made }));
        assert!(deadline.passed(&Reading { now: deadline.at, ..made }));
        assert!(deadline.passed(&Reading::of(made.now, 20 * MILLI, 0)));
    }

    #[tokio::test(start_paused = true)]
    async fn an_alarm_rings_at_its_time_whatever_it_was_set_for_before() {
        let start = now();
        let at = |millis| Some(start + Duration::from_millis(millis));
        let mut alarm = Alarm::default();
        for (given_up, rings) in [(10, 20), (90, 30), (31, 90), (40, 40), (200, 100)] {
            let set = alarm.sleep_until(at(given_up));
            assert_eq!(
                tokio::time::timeout(Duration::ZERO, set).await.is_ok(),
                at(given_up) <= Some(now())
            );
            alarm.sleep_until(at(rings)).await;
            assert_eq!(Some(now()), at(rings).max(at(90).filter(|_| rings == 40)));
        }
        assert!(
            tokio::time::timeout(Duration::from_secs(60), alarm.sleep_until(None)).await.is_err()
        );
    }

    #[test]
    fn the_clocks_of_this_machine_can_be_read_and_agree_while_it_is_awake() {
        let (first, second) = (reading(), reading());
        assert_eq!(second.gap_since(&first), None);
        assert!(first.wall_ahead > 0, "{first:?}");
    }
}
