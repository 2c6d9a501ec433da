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

impl Report {
    pub fn fail(&mut self, check: &'static str, at: Time, why: String) {
        self.findings.push(Finding { check, at, why });
    }
}
