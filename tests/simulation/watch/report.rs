//! The findings of the checks, and the counts. Pure.

use std::fmt;

use super::{super::jetstream::Time, coverage::Coverage};

/// One promise that was not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The check that has found it.
    pub check: &'static str,
    pub at: Time,
    pub why: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:.3} s: {}", self.check, self.at.as_secs_f64(), self.why)
    }
}

#[derive(Debug, Default)]
pub struct Report {
    pub findings: Vec<Finding>,
    pub coverage: Coverage,
}

/// Findings that nobody has decided yet: the proxy breaks a promise, or the rule demands more than the documentation
/// promises. Each is work to do. Until then they fail a run of seeds only if they are more common than when they were
/// measured. A finding is open by its check and a part of its text. The number is the most seeds of 1,000 that may
/// have such findings: about twice as many as had them in 6,000 seeds. 0 stands for a few seeds of a whole run.
const OPEN: [(&str, &[&str], u64); 2] = [("holders", &[""], 0), ("leases", &[""], 0)];

fn row_of_open(check: &str) -> String {
    format!("open findings: seeds of the check {check}")
}

/// The checks whose open findings are more common than when they were measured.
pub fn too_common(coverage: &Coverage, seeds: u64) -> Vec<String> {
    let over = OPEN.iter().filter_map(|(check, _, most)| {
        let found = coverage.of(&row_of_open(check));
        // A few seeds say nothing about how common something is.
        let allowed = most * seeds / 1000 + 4;
        (found > allowed).then(|| format!("{check}: {found} of {seeds} seeds, at most {allowed}"))
    });
    over.collect()
}

impl Report {
    /// Takes the open findings out, and counts them. To be called at the end of a run.
    pub fn set_open_findings_aside(&mut self) {
        for (check, parts, _) in OPEN {
            let is_open = |finding: &mut Finding| {
                finding.check == check && parts.iter().any(|part| finding.why.contains(part))
            };
            if self.findings.extract_if(.., is_open).count() > 0 {
                self.coverage.count(row_of_open(check));
            }
        }
    }

    pub fn fail(&mut self, check: &'static str, at: Time, why: String) {
        self.findings.push(Finding { check, at, why });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(findings: &[(&'static str, &str)]) -> Report {
        let mut report = Report::default();
        for (check, why) in findings {
            report.fail(check, Time::ZERO, (*why).to_owned());
        }
        report.set_open_findings_aside();
        report
    }

    #[test]
    fn open_findings_are_counted_once_for_a_seed_and_others_stay() {
        let open = ("holders", "another holder");
        let report = report(&[open, open, ("promises", "never applied"), ("world", "dark")]);
        let left: Vec<_> = report.findings.iter().map(|finding| finding.check).collect();
        assert_eq!(left, ["promises", "world"]);
        assert_eq!(report.coverage.of(&row_of_open("holders")), 1);
    }

    #[test]
    fn open_findings_fail_a_run_once_they_are_more_common_than_before() {
        let mut coverage = Coverage::default();
        for seeds in 1..=4 {
            coverage.merge(&report(&[("holders", "another holder")]).coverage);
            assert!(too_common(&coverage, 1_000).is_empty(), "{seeds}");
        }
        coverage.merge(&report(&[("holders", "another holder")]).coverage);
        assert_eq!(too_common(&coverage, 1_000).len(), 1);
    }
}
