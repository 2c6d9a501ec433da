//! Refusals of the proxy: read from a status or from a part of an answer, and whether to repeat. Makes no call.

use std::{collections::BTreeMap, error, fmt, iter, time::Duration};

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::pb;

/// The longest wait before a call is repeated, besides the wait that the proxy asks for.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// A call, or the settlement of a message, failed. The page "Errors" has the reasons.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Error {
    /// The reason of the proxy. Without a reason of the proxy: the name of the status code.
    pub reason: String,
    /// The gRPC status code.
    pub code: Code,
    /// A text for people.
    pub message: String,
    /// How long the proxy asks to wait before a repeat. `None`: a wait does not help.
    pub retry_delay: Option<Duration>,
    /// More of the reason, by name. The page "Errors" has the names.
    pub metadata: BTreeMap<String, String>,
}

impl Error {
    pub(crate) fn new(reason: &str, code: Code, message: impl Into<String>) -> Self {
        let (reason, message) = (reason.to_owned(), message.into());
        Self { reason, code, message, retry_delay: None, metadata: BTreeMap::new() }
    }

    /// An argument or an option is not in its range.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new("INVALID_ARGUMENT", Code::InvalidArgument, message)
    }

    /// A file that is wrong now may be right soon.
    pub(crate) fn unusable(what: &str, error: &dyn error::Error) -> Self {
        Self::new("UNAVAILABLE", Code::Unavailable, format!("{what}: {}", chain(error)))
    }

    pub(crate) fn lease_expired(message: &str) -> Self {
        Self::new("LEASE_EXPIRED", Code::FailedPrecondition, message)
    }

    /// For a message whose handler was cancelled at a stop.
    pub(crate) fn stopped() -> Self {
        Self::new("CANCELLED", Code::Cancelled, "the worker was stopped")
    }

    /// Why a call failed.
    pub(crate) fn of_status(status: &Status) -> Self {
        let info = status.get_details_error_info().filter(|info| info.domain == "fetchproxy");
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        let trailer = status.metadata().get("fetchproxy-reason").and_then(|r| r.to_str().ok());
        let pushback = status.metadata().get("grpc-retry-pushback-ms");
        let pushback = pushback.and_then(|wait| wait.to_str().ok()?.parse().ok());
        let (reason, metadata) = match (info, trailer) {
            (Some(info), _) => (info.reason, info.metadata.into_iter().collect()),
            (None, Some(reason)) => (reason.to_owned(), BTreeMap::new()),
            (None, None) => (name_of(status.code()).to_owned(), BTreeMap::new()),
        };
        Self {
            reason,
            code: status.code(),
            // The causes of a failed connection are not in its message.
            message: error::Error::source(status)
                .map_or_else(|| status.message().to_owned(), chain),
            retry_delay: retry.or(pushback.map(Duration::from_millis)),
            metadata,
        }
    }

    /// Why a part of a call failed.
    pub(crate) fn of_part(part: &pb::SettleError) -> Self {
        Self {
            reason: part.reason.clone(),
            // A part with a reason that is not known here is only repeated if the proxy says when.
            code: code_of(&part.reason).unwrap_or(Code::FailedPrecondition),
            message: part.message.clone(),
            retry_delay: part.retry_delay.map(duration_of),
            metadata: part.metadata.clone().into_iter().collect(),
        }
    }

    /// Whether the same call may succeed later.
    pub fn can_repeat(&self) -> bool {
        use Code::*;
        if self.retry_delay.is_some() || self.reason == "SETTLE_UNCONFIRMED" {
            return true;
        }
        let is_hopeless = match self.code {
            InvalidArgument | NotFound | FailedPrecondition => true,
            PermissionDenied | Unauthenticated | Unimplemented => true,
            _ => self.reason == "REQUEST_TOO_LARGE",
        };
        !is_hopeless
    }

    /// How long to wait before the next try: at least as long as asked, and longer each time.
    pub(crate) fn backoff(&self, tries: &mut u32) -> Duration {
        let longest = Duration::from_millis(100 << (*tries).min(6)).min(PATIENCE);
        *tries += 1;
        let asked = self.retry_delay.unwrap_or_default().min(PATIENCE);
        asked + longest.mul_f64(0.5 + fastrand::f64() / 2.0)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.message)
    }
}

impl error::Error for Error {}

/// The text of an error and of its causes.
pub(crate) fn chain(error: &dyn error::Error) -> String {
    let causes = iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

pub(crate) fn duration_of(length: prost_types::Duration) -> Duration {
    length.try_into().unwrap_or_default()
}

/// At most a year, which no field of the contract exceeds.
pub(crate) fn to_duration(length: Duration) -> prost_types::Duration {
    let year = Duration::from_secs(365 * 24 * 3600);
    length.min(year).try_into().unwrap_or_default()
}

fn name_of(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// The status code of a reason. `None`: the reason is not known here.
pub(crate) fn code_of(reason: &str) -> Option<Code> {
    REASONS.iter().find(|(known, _)| *known == reason).map(|(_, code)| *code)
}

/// The reasons of the proxy, as the page "Errors" has them. A test compares.
const REASONS: [(&str, Code); 31] = [
    ("INVALID_FIELD", Code::InvalidArgument),
    ("TOKEN_INVALID", Code::InvalidArgument),
    ("KEY_UNKNOWN", Code::Unavailable),
    ("STREAM_NOT_FOUND", Code::NotFound),
    ("CONSUMER_NOT_FOUND", Code::NotFound),
    ("CONSUMER_UNSUITABLE", Code::FailedPrecondition),
    ("CONSUMER_SUSPECTED", Code::Unavailable),
    ("CONSUMER_BUSY", Code::ResourceExhausted),
    ("LEASE_EXPIRED", Code::FailedPrecondition),
    ("LEASE_SETTLED", Code::FailedPrecondition),
    ("LEASE_BUSY", Code::Aborted),
    ("UNAUTHENTICATED", Code::Unauthenticated),
    ("AUTH_UNAVAILABLE", Code::Unavailable),
    ("NOT_ALLOWED", Code::PermissionDenied),
    ("NATS_PERMISSION", Code::PermissionDenied),
    ("RATE_LIMIT", Code::ResourceExhausted),
    ("LEASE_LIMIT", Code::ResourceExhausted),
    ("WAITER_LIMIT", Code::ResourceExhausted),
    ("CALL_LIMIT", Code::ResourceExhausted),
    ("BYTE_LIMIT", Code::ResourceExhausted),
    ("REQUEST_TIMEOUT", Code::Unavailable),
    ("CONNECTION_LIMIT", Code::ResourceExhausted),
    ("NATS_UNAVAILABLE", Code::Unavailable),
    ("DRAINING", Code::Unavailable),
    ("OWNER_UNREACHABLE", Code::Unavailable),
    ("SETTLE_UNCONFIRMED", Code::DeadlineExceeded),
    ("STREAM_SILENT", Code::DeadlineExceeded),
    ("JETSTREAM_DENIED", Code::FailedPrecondition),
    ("MALFORMED", Code::InvalidArgument),
    ("REQUEST_TOO_LARGE", Code::ResourceExhausted),
    ("UNSUPPORTED", Code::Unimplemented),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_those_of_the_page_of_errors() {
        let page = include_str!("../../../docs/reference/errors.md");
        let mut listed = 0;
        for line in page.lines().filter(|line| line.starts_with("| `")) {
            let cells: Vec<&str> =
                line.split('|').map(|cell| cell.trim().trim_matches('`')).collect();
            let Some(code) = code_of(cells[1]) else { continue };
            let code = format!("{code:?}");
            assert!(cells.contains(&code.as_str()), "{line} does not have {code}");
            listed += 1;
        }
        assert!(listed >= REASONS.len(), "{listed} of {} reasons are on the page", REASONS.len());
    }

    #[test]
    fn waits_grow_and_last_as_long_as_the_proxy_asks() {
        let mut error = Error::new("NATS_UNAVAILABLE", Code::Unavailable, "");
        let mut tries = 0;
        let waits: Vec<Duration> = (0..9).map(|_| error.backoff(&mut tries)).collect();
        assert!(waits[0] <= Duration::from_millis(100), "{waits:?}");
        assert!(waits[8] >= PATIENCE / 2 && waits[8] <= PATIENCE, "{waits:?}");
        error.retry_delay = Some(Duration::from_secs(2));
        assert!(error.backoff(&mut 0) >= Duration::from_secs(2));
    }

    #[test]
    fn part_with_an_unknown_reason_is_repeated_if_the_proxy_says_when() {
        let part = |retry_delay| {
            let reason = "A_NEW_REASON".to_owned();
            Error::of_part(&pb::SettleError { reason, retry_delay, ..Default::default() })
        };
        assert!(!part(None).can_repeat());
        assert!(part(Some(to_duration(Duration::from_secs(1)))).can_repeat());
    }

    #[test]
    fn refusal_that_a_person_must_look_at_is_not_repeated() {
        let can_repeat = |reason: &str| {
            Error::new(reason, code_of(reason).unwrap_or(Code::Unknown), "").can_repeat()
        };
        for reason in ["NOT_ALLOWED", "REQUEST_TOO_LARGE", "LEASE_EXPIRED", "STREAM_NOT_FOUND"] {
            assert!(!can_repeat(reason), "{reason}");
        }
        for reason in ["SETTLE_UNCONFIRMED", "DRAINING", "LEASE_BUSY", "UNKNOWN"] {
            assert!(can_repeat(reason), "{reason}");
        }
    }
}
