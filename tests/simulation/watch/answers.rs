//! Reads the answers to clients: the reason or the outcome, and what it promises. The promise of a reason is
//! the one of the table in `src/reason.rs`. Pure.

use std::time::Duration;

use fetch_proxy::{
    pb,
    reason::{REASON_TRAILER, Reason},
};
use tonic::Status;
use tonic_types::StatusExt as _;

use super::ledger::{Kind, Told};

/// The answer to one settlement.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// The reason or the outcome.
    pub name: String,
    pub told: Told,
    pub settled_as: Option<Kind>,
    /// Of an Extend.
    pub lease: Option<Duration>,
    /// Of a Nak, since the Unix epoch.
    pub redeliver: Option<Duration>,
}

/// The names of what is no answer of the service.
pub const NO_ANSWER: &str = "no answer";
pub const OVERDUE: &str = "no answer in time";
pub const UNSENT: &str = "not sent";

impl Reading {
    pub fn of_result(result: &pb::SettleResult) -> Self {
        let Some(error) = &result.error else {
            return Self::of_outcome(result.outcome, result.lease, result.redeliver_time);
        };
        let of = |key: &str| error.metadata.get(key).map(String::as_str);
        Self {
            settled_as: match of("settled_as") {
                Some("ACK") => Some(Kind::Ack),
                Some("NAK") => Some(Kind::Nak),
                Some("TERM") => Some(Kind::Term),
                _ => None,
            },
            ..Self::of_reason(&error.reason, of("applied"))
        }
    }

    pub fn of_outcome(
        outcome: i32,
        lease: Option<prost_types::Duration>,
        redeliver: Option<prost_types::Timestamp>,
    ) -> Self {
        let outcome = pb::Outcome::try_from(outcome).unwrap_or_default();
        let told = match outcome {
            pb::Outcome::Confirmed | pb::Outcome::Duplicate | pb::Outcome::Extended => {
                Told::Applied
            }
            pb::Outcome::Sent | pb::Outcome::Unspecified => Told::Unknown,
        };
        let since_epoch = |time: prost_types::Timestamp| {
            let secs = Duration::from_secs(u64::try_from(time.seconds).unwrap_or_default());
            secs + Duration::from_nanos(u64::try_from(time.nanos).unwrap_or_default())
        };
        Self {
            told,
            lease: lease.and_then(|lease| lease.try_into().ok()),
            redeliver: redeliver.map(since_epoch),
            ..Self::of_reason(outcome.as_str_name(), None)
        }
    }

    pub fn of_status(status: &Status) -> Self {
        let details = status.get_error_details();
        let of = |key: &str| details.error_info().and_then(|info| info.metadata.get(key).cloned());
        let settled_as = match of("settled_as").as_deref() {
            Some("ACK") => Some(Kind::Ack),
            Some("NAK") => Some(Kind::Nak),
            Some("TERM") => Some(Kind::Term),
            _ => None,
        };
        Self { settled_as, ..Self::of_reason(&reason_of(status), of("applied").as_deref()) }
    }

    /// The call was not answered: an answer may have been lost, or its client has hung up.
    pub fn nothing() -> Self {
        Self::of_reason(NO_ANSWER, None)
    }

    /// A patient client has waited for as long as any call may take.
    pub fn overdue() -> Self {
        Self::of_reason(OVERDUE, None)
    }

    /// Nobody was there to be asked.
    pub fn unsent() -> Self {
        Self { told: Told::NotApplied, ..Self::of_reason(UNSENT, None) }
    }

    fn of_reason(name: &str, applied: Option<&str>) -> Self {
        let told = promise_of(name, applied);
        Self { name: name.to_owned(), told, settled_as: None, lease: None, redeliver: None }
    }
}

/// The reason that a status carries, or `bare` and its code.
pub fn reason_of(status: &Status) -> String {
    let trailer = status.metadata().get(REASON_TRAILER);
    let of_details = || status.get_error_details().error_info().map(|info| info.reason.clone());
    trailer
        .and_then(|reason| reason.to_str().ok())
        .map(str::to_owned)
        .or_else(of_details)
        .unwrap_or_else(|| format!("bare {:?}", status.code()))
}

/// The promise of the table about a settlement.
fn promise_of(reason: &str, applied: Option<&str>) -> Told {
    let row = Reason::ALL.iter().find(|row| row.name() == reason);
    let nothing = ["Nothing happened.", "Not applied.", "Nothing was settled"];
    let promised =
        row.is_some_and(|row| nothing.iter().any(|words| row.promise().starts_with(words)));
    match (reason, applied) {
        ("OWNER_UNREACHABLE", Some("no")) => Told::NotApplied,
        _ if promised => Told::NotApplied,
        _ => Told::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promise_is_the_one_of_the_table() {
        assert_eq!(promise_of("LEASE_EXPIRED", None), Told::NotApplied);
        assert_eq!(promise_of("NATS_UNAVAILABLE", None), Told::NotApplied);
        assert_eq!(promise_of("SETTLE_UNCONFIRMED", None), Told::Unknown);
        assert_eq!(promise_of("OWNER_UNREACHABLE", Some("unknown")), Told::Unknown);
        assert_eq!(promise_of("OWNER_UNREACHABLE", Some("no")), Told::NotApplied);
        assert_eq!(promise_of("bare Unavailable", None), Told::Unknown);
    }

    #[test]
    fn reason_without_a_promise_is_one_of_three() {
        let open = Reason::ALL.iter().filter(|row| promise_of(row.name(), None) == Told::Unknown);
        let open: Vec<_> = open.map(|row| row.name()).collect();
        assert_eq!(open, ["OWNER_UNREACHABLE", "SETTLE_UNCONFIRMED", "STREAM_SILENT"]);
    }
}
