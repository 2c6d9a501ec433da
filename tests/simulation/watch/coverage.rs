//! Counts of all that a run, or many runs, have exercised, and the longest time of each window. Pure.

use std::{collections::BTreeMap, fmt, time::Duration};

use super::windows::Window;

/// What was exercised: counts, and the longest of each kind of time. Rows are named `group: row`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coverage {
    pub counts: BTreeMap<String, u64>,
    longest: BTreeMap<String, Duration>,
    seeds: u64,
}

/// How often each window may be excused in a thousand seeds. More of them are not plausible: the check then
/// excuses a defect. In the first 300 seeds that were measured, one window was open in all.
const PLAUSIBLE: [(Window, u64); 15] = [
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

    /// Adds the counts of another run.
    pub fn merge(&mut self, other: &Self) {
        self.seeds += other.seeds.max(1);
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

    /// The windows that were excused more often than is plausible.
    pub fn implausible(&self) -> Vec<String> {
        // A few runs say nothing about how often something happens.
        let many = self.seeds.max(1_000);
        let over = PLAUSIBLE.iter().filter_map(|(window, most)| {
            let count = self.of(&row_of(*window));
            (count * 1000 > most * many).then(|| {
                format!("{window:?}: {count} times in {} seeds, {most} in 1000 at most", self.seeds)
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
    fn merged_counts_are_sums_and_the_longest_time_stays() {
        let (mut sum, mut one, mut other) = Default::default();
        let parts: [(&mut Coverage, u64); 2] = [(&mut one, 3), (&mut other, 2)];
        for (part, secs) in parts {
            part.count("a: b");
            part.lasted("window: c", Duration::from_secs(secs));
        }
        Coverage::merge(&mut sum, &one);
        sum.merge(&other);
        assert_eq!((sum.of("a: b"), sum.of("window: c"), sum.seeds), (2, 2, 2));
        assert!(sum.to_string().contains("| window: c | 2 | 3.000 s |"), "{sum}");
    }

    #[test]
    fn row_that_was_demanded_and_not_exercised_is_missing() {
        let mut coverage = Coverage::default();
        coverage.count("a: b");
        assert_eq!(coverage.missing(&["a: b", "a: c"]), ["a: c"]);
    }

    #[test]
    fn window_that_is_excused_too_often_is_implausible() {
        let mut coverage = Coverage { seeds: 1000, ..Coverage::default() };
        for _ in 0..30 {
            coverage.count(row_of(Window::Misuse));
        }
        assert!(coverage.implausible().is_empty());
        coverage.count(row_of(Window::Misuse));
        assert_eq!(coverage.implausible().len(), 1);
    }
}
