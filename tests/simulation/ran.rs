//! The sum of all seeds that were run: its line of progress, and its summary.

use std::{collections::BTreeMap, time::Duration};

use super::{run::Outcome, settings::Settings, watch::Coverage};

#[derive(Debug, Default)]
pub struct Ran {
    pub seeds: u64,
    /// How often each thing happened.
    pub coverage: Coverage,
    /// The first failure of each seed that failed.
    pub failed: BTreeMap<u64, String>,
    lines: u64,
    simulated: Duration,
    pub took: Duration,
    /// CPU time of the process meanwhile.
    pub cpu: Duration,
}

impl Ran {
    pub fn add(&mut self, seed: u64, outcome: Outcome) {
        self.seeds += 1;
        self.lines += outcome.history.digest().1;
        self.simulated += outcome.history.until();
        self.coverage.add_seed(outcome.watch.coverage());
        if let Some(finding) = outcome.watch.findings().first() {
            self.failed.insert(seed, finding.to_string());
        }
    }

    /// One line. `left`: the time until no seed begins any more, if there is a limit.
    pub fn progress(&self, settings: &Settings, took: Duration, left: Option<Duration>) -> String {
        let rate = self.seeds as f64 / took.as_secs_f64();
        let rest = settings.seeds.saturating_sub(self.seeds) as f64 / rate.max(0.001);
        let left = left.map_or(rest, |left| rest.min(left.as_secs_f64()));
        format!(
            "{} of {} seeds, {rate:.1} a second, {} failed, {left:.0} s left",
            spaced(self.seeds),
            spaced(settings.seeds),
            self.failed.len(),
        )
    }

    /// The counts of everything that happened, and how fast it was.
    pub fn summary(&self, settings: &Settings) -> String {
        let seeds = self.seeds.max(1);
        let (took, cpu) = (self.took.as_secs_f64(), self.cpu.as_secs_f64() * 1e3);
        let simulated = self.simulated.as_secs_f64();
        format!(
            "{}\n\
             {} of {} seeds from {}, in {took:.1} s on {} threads: {:.1} a second, {} failed\n\
             A seed: {:.0} simulated seconds, {} lines of history, {:.1} ms of CPU\n\
             Ten simulated minutes: {:.0} ms of CPU\n",
            self.coverage,
            spaced(self.seeds),
            spaced(settings.seeds),
            settings.from,
            settings.threads,
            self.seeds as f64 / took,
            self.failed.len(),
            simulated / seeds as f64,
            spaced(self.lines / seeds),
            cpu / seeds as f64,
            cpu * 600.0 / simulated.max(1.0),
        )
    }
}

/// A number with its thousands apart.
fn spaced(number: u64) -> String {
    let digits = number.to_string();
    let mut spaced = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            spaced.push(',');
        }
        spaced.push(digit);
    }
    spaced
}

#[test]
fn thousands_stand_apart() {
    for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
        assert_eq!(spaced(number), text);
    }
}
