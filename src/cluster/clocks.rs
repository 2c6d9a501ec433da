//! How far the time of day of other replicas differs from this one, by their heartbeats. Pure.
//!
//! ```text
//!  our uptime u ── heartbeat ──▶ heard there, held for h
//!    heard here ◀── heartbeat ── sent at s by the time of day there, echo (u, h)
//! ```
//! The clock there showed at most `s - h` when ours was at `u`. It showed at least `s` when that
//! heartbeat was heard here. The clocks of others are kept relative to our uptime, which is never set. So
//! it shows whose clock was set, and the clock of a replica that has gone is still known.
//!
//! 1. A clock that is called off is off: no delay on the way can make it look so.
//! 2. A clock that was set also counts as it was before: tokens were sealed by it then.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use crate::token::InstanceId;

/// The clocks of two replicas may differ by this much.
pub(super) const MAX_CLOCK_SKEW: Duration = Duration::from_millis(250);
/// Heartbeats that are compared together: the quickest of them tells most.
const READINGS: usize = 8;
/// How long the clock of a replica that has gone is remembered, and a clock that was set, as it was
/// before. Tokens are settled without their owner until the first end of their lease. That is an hour
/// at most with the default of the longest lease.
const CLOCK_MEMORY: Duration = Duration::from_secs(24 * 3600);
/// Replicas whose clocks are remembered.
const MAX_CLOCKS: usize = 4096;

/// How far a clock is ahead of ours, or of our uptime, in microseconds.
type Ahead = i64;

/// The known bounds of a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Bounds {
    least: Ahead,
    /// `None`: that replica has not echoed a heartbeat of ours yet.
    most: Option<Ahead>,
}

/// The times in one heartbeat.
#[derive(Debug, Clone, Copy)]
pub(super) struct PeerReading {
    /// The time of day at which it was sent, in microseconds since the Unix epoch.
    pub(super) sent: u64,
    /// Our uptime in the last heartbeat of ours that was heard there, and how long before `sent` it was
    /// heard. Both are in microseconds.
    pub(super) echo: Option<(u64, u64)>,
}

/// Our own clocks at one moment, in microseconds.
#[derive(Debug, Clone, Copy)]
pub(super) struct OwnClocks {
    /// Since our start.
    pub(super) uptime: u64,
    /// Since the Unix epoch.
    pub(super) time: u64,
}

/// How far a replica's time of day can be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Trust {
    /// It was never heard.
    Unknown,
    /// It is ahead of ours by at most this, as far as is known.
    Within(Duration),
    /// It differs by more than is allowed, or did when it may have sealed tokens. Its clock shows at
    /// least `least` by now, in microseconds since the Unix epoch.
    Off { least: u64 },
}

/// A change of the clock of a replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ClockNews {
    /// It is off: ahead of ours by about this many milliseconds.
    Off(i64),
    /// It is right again.
    Well,
}

#[derive(Debug)]
struct Clock {
    heard: Instant,
    /// Relative to our uptime.
    readings: VecDeque<Bounds>,
    past: Option<Past>,
    reported: bool,
}

/// A clock as it was before it was set, once or several times.
#[derive(Debug, Clone, Copy)]
struct Past {
    at: Instant,
    /// The highest of its lower bounds, and the lowest of its upper bounds.
    bounds: Bounds,
    /// The highest of its upper bounds.
    highest: Option<Ahead>,
}

/// The clocks of the others, there or gone.
#[derive(Debug, Default)]
pub(super) struct PeerClocks {
    known: BTreeMap<InstanceId, Clock>,
}

impl PeerClocks {
    /// Takes the times in a heartbeat of a replica.
    pub(super) fn hear(
        &mut self,
        from: InstanceId,
        reading: PeerReading,
        ours: OwnClocks,
        now: Instant,
    ) -> Option<ClockNews> {
        self.make_room(from, now);
        let clock = self.known.entry(from).or_insert_with(|| Clock {
            heard: now,
            readings: VecDeque::new(),
            past: None,
            reported: false,
        });
        clock.heard = now;
        clock.read(reading, ours, now);
        let bounds = clock.now()?.less(ours.offset());
        if bounds.are_beyond(MAX_CLOCK_SKEW) && !clock.reported {
            clock.reported = true;
            return Some(ClockNews::Off(bounds.middle() / 1000));
        }
        // Half of the limit, so that a clock at the limit does not change to and fro.
        if clock.reported && !bounds.are_beyond(MAX_CLOCK_SKEW / 2) {
            clock.reported = false;
            return Some(ClockNews::Well);
        }
        None
    }

    /// How far the time of day of this replica can be trusted, also if it has gone.
    pub(super) fn trust(&self, replica: InstanceId, ours: OwnClocks, now: Instant) -> Trust {
        let Some(clock) = self.known.get(&replica) else { return Trust::Unknown };
        let Some(bounds) = clock.now() else { return Trust::Unknown };
        let past = clock.past.filter(|past| now.saturating_duration_since(past.at) < CLOCK_MEMORY);
        let was = past.map(|past| past.bounds.less(ours.offset()));
        let is = bounds.less(ours.offset());
        if is.are_beyond(MAX_CLOCK_SKEW) || was.is_some_and(|was| was.are_beyond(MAX_CLOCK_SKEW)) {
            let least = past.map_or(bounds.least, |past| past.bounds.least.min(bounds.least));
            let shows = least.saturating_add(micros(ours.uptime));
            return Trust::Off { least: u64::try_from(shows).unwrap_or(0) };
        }
        let highest = past.and_then(|past| past.highest).map(|most| most - ours.offset());
        let most = is.most.max(highest).map_or(0, |most| u64::try_from(most).unwrap_or(0));
        Trust::Within(Duration::from_micros(most))
    }

    /// The replicas whose clocks are off.
    pub(super) fn off(&self, ours: OwnClocks, now: Instant) -> impl Iterator<Item = InstanceId> {
        let all = self.known.keys().copied();
        all.filter(move |id| matches!(self.trust(*id, ours, now), Trust::Off { .. }))
    }

    fn make_room(&mut self, from: InstanceId, now: Instant) {
        if self.known.len() < MAX_CLOCKS || self.known.contains_key(&from) {
            return;
        }
        self.known.retain(|_, clock| now.saturating_duration_since(clock.heard) < CLOCK_MEMORY);
        while self.known.len() >= MAX_CLOCKS
            && let Some((oldest, _)) = self.known.iter().min_by_key(|(_, clock)| clock.heard)
        {
            let oldest = *oldest;
            self.known.remove(&oldest);
        }
    }
}

impl Clock {
    fn read(&mut self, reading: PeerReading, ours: OwnClocks, now: Instant) {
        let sent = micros(reading.sent);
        let bounds = Bounds {
            least: sent - micros(ours.uptime),
            // An echo of a heartbeat that was not sent yet is forged.
            most: reading
                .echo
                .filter(|(uptime, _)| *uptime <= ours.uptime)
                .map(|(uptime, held)| sent.saturating_sub(micros(held)) - micros(uptime)),
        };
        let before = self.now();
        self.readings.push_back(bounds);
        if self.readings.len() > READINGS {
            self.readings.pop_front();
        }
        let contradicts =
            self.now().is_none_or(|all| all.most.is_some_and(|most| all.least > most));
        if contradicts && let Some(before) = before {
            // The clock was set since the last heartbeat.
            self.past = Some(Past::and(self.past, before, now));
            self.readings = [bounds].into();
        }
    }

    /// The bounds by all its readings together.
    fn now(&self) -> Option<Bounds> {
        let all = self.readings.iter().copied();
        all.reduce(|one, other| Bounds {
            least: one.least.max(other.least),
            most: lower(one.most, other.most),
        })
    }
}

impl Past {
    fn and(past: Option<Self>, bounds: Bounds, at: Instant) -> Self {
        let past = past.filter(|past| at.saturating_duration_since(past.at) < CLOCK_MEMORY);
        let Some(past) = past else { return Self { at, bounds, highest: bounds.most } };
        let least = past.bounds.least.max(bounds.least);
        let most = lower(past.bounds.most, bounds.most);
        Self { at, bounds: Bounds { least, most }, highest: past.highest.max(bounds.most) }
    }
}

impl Bounds {
    fn less(self, by: Ahead) -> Self {
        Self { least: self.least - by, most: self.most.map(|most| most - by) }
    }

    /// Whether the number is certainly further from zero than this.
    fn are_beyond(self, allowed: Duration) -> bool {
        let allowed = Ahead::try_from(allowed.as_micros()).unwrap_or(Ahead::MAX);
        self.least > allowed || self.most.is_some_and(|most| most < -allowed)
    }

    fn middle(self) -> Ahead {
        self.most.map_or(self.least, |most| Ahead::midpoint(self.least, most))
    }
}

impl OwnClocks {
    /// The own time of day, relative to the own uptime.
    fn offset(self) -> Ahead {
        micros(self.time) - micros(self.uptime)
    }
}

/// The lower of two numbers that may be unknown.
fn lower(one: Option<Ahead>, other: Option<Ahead>) -> Option<Ahead> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// Microseconds as a signed number, at most a quarter of its range: others may send any number, and it is
/// added and subtracted.
fn micros(of_a_clock: u64) -> Ahead {
    Ahead::try_from(of_a_clock).unwrap_or(Ahead::MAX).min(Ahead::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use proptest::prelude::*;

    const THEM: InstanceId = InstanceId([1; 8]);
    /// Noon of a day in 2026, in microseconds since the Unix epoch.
    const NOON: u64 = 1_790_000_000_000_000;
    const SECOND: u64 = 1_000_000;

    /// Two replicas, both up since noon, and the way between them.
    struct Two {
        clocks: PeerClocks,
        start: Instant,
        /// How far their clock, and ours, are ahead of the true time.
        theirs: i64,
        ours: i64,
        uptime: u64,
        /// The uptime in our last heartbeat, and when they heard it.
        heard: Option<(u64, u64)>,
    }

    impl Two {
        fn new(theirs: i64, ours: i64) -> Self {
            let (clocks, start) = (PeerClocks::default(), clock::now());
            Self { clocks, start, theirs, ours, uptime: SECOND, heard: None }
        }

        fn now(&self) -> (OwnClocks, Instant) {
            let time = (NOON + self.uptime).checked_add_signed(self.ours).unwrap();
            let at = self.start + Duration::from_micros(self.uptime);
            (OwnClocks { uptime: self.uptime, time }, at)
        }

        /// Each sends a heartbeat, with these delays there and back.
        fn exchange(&mut self, there: u64, back: u64) -> Option<ClockNews> {
            self.heard = Some((self.uptime, self.uptime + there));
            self.uptime += SECOND;
            let sent = (NOON + self.uptime).checked_add_signed(self.theirs).unwrap();
            let echo = self.heard.filter(|(_, heard)| *heard <= self.uptime);
            let echo = echo.map(|(uptime, heard)| (uptime, self.uptime - heard));
            self.uptime += back;
            let (ours, now) = self.now();
            self.clocks.hear(THEM, PeerReading { sent, echo }, ours, now)
        }

        fn trust(&self) -> Trust {
            let (ours, now) = self.now();
            self.clocks.trust(THEM, ours, now)
        }

        fn is_off(&self) -> bool {
            matches!(self.trust(), Trust::Off { .. })
        }
    }

    #[test]
    fn a_clock_that_was_never_heard_is_unknown() {
        assert_eq!(Two::new(0, 0).trust(), Trust::Unknown);
    }

    #[test]
    fn a_clock_that_is_off_is_reported_once_and_so_is_its_return() {
        for ten in [10_000_000, -10_000_000] {
            let mut two = Two::new(ten, 0);
            let news: Vec<_> = (0..20).filter_map(|_| two.exchange(2000, 2000)).collect();
            let [ClockNews::Off(ahead)] = news[..] else { panic!("{news:?}") };
            assert!((ahead - ten / 1000).abs() < 10, "{ahead}");
            assert!(two.is_off());
            two.theirs = 0;
            let news: Vec<_> = (0..20).filter_map(|_| two.exchange(2000, 2000)).collect();
            assert_eq!(news, [ClockNews::Well]);
            assert!(two.is_off(), "what it sealed before is as it was");
        }
    }

    #[test]
    fn a_clock_is_remembered_after_the_death_of_its_replica() {
        let mut two = Two::new(10_000_000, 0);
        for _ in 0..3 {
            two.exchange(2000, 2000);
        }
        two.uptime += 3600 * SECOND;
        let Trust::Off { least } = two.trust() else { panic!("{:?}", two.trust()) };
        let shows = NOON + two.uptime + 10 * SECOND;
        assert!((shows - 5000..=shows).contains(&least), "its own clock goes on");
    }

    #[test]
    fn if_our_own_clock_is_set_all_others_are_off_until_it_is_set_back() {
        let mut two = Two::new(0, 0);
        for _ in 0..3 {
            two.exchange(2000, 2000);
        }
        assert_eq!(two.trust(), Trust::Within(Duration::from_millis(2)));
        two.ours = -10_000_000;
        assert!(two.is_off(), "also when its replica is gone by then");
        for _ in 0..3 {
            two.exchange(2000, 2000);
        }
        assert!(two.is_off());
        two.ours = 0;
        for _ in 0..3 {
            two.exchange(2000, 2000);
        }
        assert!(!two.is_off(), "it was ours, and what they sealed is right");
    }

    proptest! {
        #[test]
        fn no_delay_makes_a_clock_look_off_or_hides_how_far_it_may_be(
            delays in prop::collection::vec((0..5 * SECOND, 0..5 * SECOND), 1..20),
            ahead in -400_000_i64..400_000, drift in -200_i64..200,
        ) {
            let mut two = Two::new(ahead, 0);
            for (there, back) in delays {
                two.exchange(there, back);
                // Half a second in an hour.
                two.theirs += drift;
            }
            let truth = two.theirs;
            let slack = 8 * 200 * 8;
            match two.trust() {
                Trust::Off { .. } => prop_assert!(truth.abs() > 250_000 - slack, "{truth}"),
                Trust::Within(most) if two.clocks.known[&THEM].now().unwrap().most.is_some() => {
                    let most = i64::try_from(most.as_micros()).unwrap();
                    prop_assert!(truth <= most + slack, "{truth} {most}");
                }
                Trust::Within(_) => {}
                Trust::Unknown => prop_assert!(false),
            }
        }
    }

    #[test]
    fn the_clocks_that_were_heard_last_are_remembered() {
        let (mut clocks, now) = (PeerClocks::default(), clock::now());
        for number in 0..2 * MAX_CLOCKS as u64 {
            let (from, at) = (InstanceId(number.to_be_bytes()), now + Duration::from_secs(number));
            let (reading, ours) = (
                PeerReading { sent: u64::MAX, echo: Some((1, u64::MAX)) },
                OwnClocks { uptime: 1, time: 1 },
            );
            clocks.hear(from, reading, ours, at);
        }
        assert_eq!(clocks.known.len(), MAX_CLOCKS);
        let last = InstanceId((2 * MAX_CLOCKS as u64 - 1).to_be_bytes());
        assert!(clocks.known.contains_key(&last));
    }
}
