//! Counts of all that a run, or many runs, have exercised, and the longest time of each window. Pure.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::windows::Window;

/// What was exercised: counts, and the longest of each kind of time. Rows are named `group: row`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    pub counts: BTreeMap<String, u64>,
    longest: BTreeMap<String, Duration>,
    seeds: u64,
    /// For each row, the seeds in which it was counted, and the highest count of one seed.
    of_seeds: BTreeMap<String, (u64, u64)>,
}

/// The most settlements that one window may excuse in one seed. One accident can concern all leases of a replica, of
/// which a plan gives 200 at most, and few of them are settled in the window.
const MOST_IN_A_SEED: u64 = 50;

/// In how many seeds of a thousand each window may be open. More of them are not plausible: the check then excuses a
/// defect. In the first 300 seeds that were measured, one window was open in all.
const PLAUSIBLE: [(Window, u64); 16] = [
    (Window::LateOnTheWire, 30),
    (Window::LeaderChanged, 30),
    (Window::LeaderUnseen, 30),
    (Window::LeaderCutOff, 10),
    (Window::WaitLowered, 30),
    (Window::WaitLoweredWithoutOwner, 10),
    (Window::MadeAgainWhileStopped, 10),
    (Window::MadeAgainWhileStalled, 10),
    (Window::ResetWithoutOwner, 10),
    (Window::ResetNoticedLate, 10),
    (Window::ClockBehind, 10),
    (Window::OwnerNeverHeard, 10),
    (Window::OvertakenDelivery, 10),
    (Window::DeliveryForgotten, 10),
    (Window::AfterStaleNak, 10),
    (Window::Misuse, 30),
];

impl Coverage {
    pub fn count(&mut self, what: impl Into<String>) {
        *self.counts.entry(what.into()).or_default() += 1;
    }

    /// Counts something that took a time.
    pub fn lasted(&mut self, what: impl Into<String>, time: Duration) {
        let what = what.into();
        let longest = self.longest.entry(what.clone()).or_default();
        *longest = (*longest).max(time);
        self.count(what);
    }

    pub fn of(&self, what: &str) -> u64 {
        self.counts.get(what).copied().unwrap_or_default()
    }

    /// Adds the counts of one seed.
    pub fn add_seed(&mut self, one: &Self) {
        self.seeds += 1;
        for (what, count) in &one.counts {
            let (seeds, most) = self.of_seeds.entry(what.clone()).or_default();
            (*seeds, *most) = (*seeds + 1, (*most).max(*count));
        }
        self.add(one);
    }

    fn add(&mut self, other: &Self) {
        for (what, count) in &other.counts {
            *self.counts.entry(what.clone()).or_default() += count;
        }
        for (what, time) in &other.longest {
            let longest = self.longest.entry(what.clone()).or_default();
            *longest = (*longest).max(*time);
        }
    }

    /// The rows that were demanded and not exercised.
    pub fn missing<'d>(&self, demanded: &[&'d str]) -> Vec<&'d str> {
        demanded.iter().copied().filter(|what| self.of(what) == 0).collect()
    }

    /// The windows that were open more often than is plausible. A seed alone is judged like one of a thousand.
    pub fn implausible(&self) -> Vec<String> {
        // A few runs say nothing about how often something happens.
        let many = self.seeds.max(1_000);
        let over = PLAUSIBLE.iter().filter_map(|(window, share)| {
            let (seeds, most) = self.of_seeds.get(&row_of(*window)).copied().unwrap_or_default();
            (seeds * 1000 > share * many || most > MOST_IN_A_SEED).then(|| {
                format!(
                    "{window:?}: in {seeds} of {} seeds, {share} of 1000 at most; {most} times in one \
                     seed, {MOST_IN_A_SEED} at most",
                    self.seeds
                )
            })
        });
        over.collect()
    }
}

/// The row of a window that was excused.
pub fn row_of(window: Window) -> String {
    format!("window: {window:?}")
}

/// A table in Markdown.
impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| exercised | times | longest |\n| --- | ---: | ---: |")?;
        self.counts.iter().try_for_each(|(what, count)| {
            let longest = self.longest.get(what);
            let longest = longest.map(|time| format!("{:.3} s", time.as_secs_f64()));
            writeln!(f, "| {what} | {count} | {} |", longest.unwrap_or_default())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_seeds_are_summed_and_the_longest_time_stays() {
        let (mut sum, mut one, mut other) = Default::default();
        let parts: [(&mut Coverage, u64); 2] = [(&mut one, 3), (&mut other, 2)];
        for (part, secs) in parts {
            part.count("a: b");
            part.lasted("window: c", Duration::from_secs(secs));
        }
        Coverage::add_seed(&mut sum, &one);
        sum.add_seed(&other);
        assert_eq!((sum.of("a: b"), sum.of("window: c"), sum.seeds), (2, 2, 2));
        assert!(sum.to_string().contains("| window: c | 2 | 3.000 s |"), "{sum}");
    }

    #[test]
    fn row_that_was_demanded_and_not_exercised_is_missing() {
        let mut coverage = Coverage::default();
        coverage.count("a: b");
        assert_eq!(coverage.missing(&["a: b", "a: c"]), ["a: c"]);
    }

    /// A seed in which the window was open so many times.
    fn open(times: u64) -> Coverage {
        let mut seed = Coverage::default();
        (0..times).for_each(|_| seed.count(row_of(Window::MadeAgainWhileStalled)));
        seed
    }

    #[test]
    fn window_that_is_open_in_too_many_seeds_is_implausible() {
        let mut coverage = Coverage::default();
        let seeds = (0..1000).map(|seed| open(if seed < 10 { 20 } else { 0 }));
        seeds.for_each(|seed| coverage.add_seed(&seed));
        assert!(coverage.implausible().is_empty());
        coverage.add_seed(&open(1));
        assert_eq!(coverage.implausible().len(), 1);
    }

    #[test]
    fn seed_that_is_run_alone_is_judged_like_the_same_seed_among_others() {
        for (times, implausible) in [(20, 0), (MOST_IN_A_SEED + 1, 1)] {
            let (mut alone, mut among) = (Coverage::default(), Coverage::default());
            alone.add_seed(&open(times));
            (0..2000).for_each(|seed| among.add_seed(&open(if seed == 7 { times } else { 0 })));
            assert_eq!(alone.implausible().len(), implausible);
            assert_eq!(among.implausible().len(), implausible);
        }
    }
}
