//! Reads the answers to settlements: what they promise.

use std::time::Duration;

use fetch_proxy::{pb, reason::REASON_TRAILER};
use tonic::Status;
use tonic_types::StatusExt as _;

use crate::watch::Told;

/// What a client has heard of one settlement.
#[derive(Debug, Clone)]
pub struct Heard {
    pub told: Told,
    pub reason: String,
    /// The lease that an Extend was granted.
    pub lease: Option<Duration>,
}

impl Heard {
    /// No answer came. `done`: nothing was even sent.
    pub fn nothing(reason: &str, told: Told) -> Self {
        Self { told, reason: reason.to_owned(), lease: None }
    }

    pub fn outcome(outcome: i32, lease: Option<prost_types::Duration>) -> Self {
        let outcome = pb::Outcome::try_from(outcome).unwrap();
        // With SENT, nothing was sent perhaps.
        let told = if outcome == pb::Outcome::Sent { Told::Unknown } else { Told::Applied };
        let lease = lease.and_then(|lease| lease.try_into().ok());
        Self { told, reason: outcome.as_str_name().to_owned(), lease }
    }

    pub fn result(result: pb::SettleResult) -> Self {
        match result.error {
            None => Self::outcome(result.outcome, result.lease),
            Some(error) => {
                let applied = error.metadata.get("applied").map(String::as_str);
                Self::failure(error.reason, applied)
            }
        }
    }

    pub fn status(status: &Status) -> Self {
        let details = status.get_error_details();
        let applied =
            details.error_info().and_then(|info| info.metadata.get("applied").map(String::as_str));
        Self::failure(reason(status), applied)
    }

    fn failure(reason: String, applied: Option<&str>) -> Self {
        // A status without a reason of the service promises nothing.
        let unknown = reason == "SETTLE_UNCONFIRMED"
            || reason.starts_with("bare")
            || applied.is_some_and(|applied| applied != "no");
        let told = if unknown { Told::Unknown } else { Told::NotApplied };
        Self { told, reason, lease: None }
    }

    /// Nothing more is to be had after this.
    pub fn is_final(&self) -> bool {
        const FINAL: [&str; 5] =
            ["OUTCOME_SENT", "LEASE_EXPIRED", "LEASE_SETTLED", "JETSTREAM_DENIED", "TOKEN_INVALID"];
        self.told == Told::Applied || FINAL.contains(&&*self.reason)
    }
}

pub fn reason(status: &Status) -> String {
    let trailer = status.metadata().get(REASON_TRAILER);
    let of_details = || status.get_error_details().error_info().map(|info| info.reason.clone());
    trailer
        .and_then(|reason| reason.to_str().ok())
        .map(str::to_owned)
        .or_else(of_details)
        .unwrap_or_else(|| format!("bare {:?}", status.code()))
}
