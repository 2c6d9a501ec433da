//! Values of the contract as text: times, lengths of time, outcomes.

use std::time::{Duration, SystemTime};

use prost_types::{Duration as PbDuration, Timestamp};

use crate::pb;

/// A time in UTC; `None` without a time or for a time out of range.
pub(super) fn time(at: Option<&Timestamp>) -> Option<String> {
    let at = SystemTime::try_from(*at?).ok()?;
    Some(humantime::format_rfc3339_millis(at).to_string())
}

pub(super) fn length(of: Option<&PbDuration>) -> Option<Duration> {
    Duration::try_from(*of?).ok()
}

pub(super) fn word(outcome: pb::Outcome) -> &'static str {
    outcome.as_str_name().trim_start_matches("OUTCOME_")
}
