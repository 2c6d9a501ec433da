//! Which leases an operator means. Pure: `now` is an argument.

use std::{
    fmt,
    time::{Duration, Instant},
};

use crate::{
    api_error::ApiError,
    lease::LeaseStage,
    lessor::LeaseSeen,
    pb::{self, time::to_duration},
    token::InstanceId,
};

/// Longest text of a filter, in bytes: the longest name of a stream or a consumer. No principal is longer.
const LONGEST_TEXT: usize = 255;

/// Conditions on leases, which must all hold.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MeantLeases {
    stream: Option<String>,
    consumer: Option<String>,
    principal: Option<String>,
    worker: Option<String>,
    replica: Option<InstanceId>,
    older_than: Option<Duration>,
    expiring_within: Option<Duration>,
    stage: Option<LeaseStage>,
    sequence: Option<u64>,
}

impl MeantLeases {
    /// Reads the conditions.
    ///
    /// # Errors
    /// The field that is wrong.
    pub fn read(filter: &pb::LeaseFilter) -> Result<Self, ApiError> {
        let span = |field, value: Option<prost_types::Duration>| {
            let read = value.map(|value| to_duration(&value));
            let wrong = || refused(field, "must be a duration, and not negative");
            read.map(|read| read.ok_or_else(wrong)).transpose()
        };
        let replica = match &*filter.replica {
            "" => None,
            digits => Some(instance(digits).ok_or_else(|| {
                refused(
                    "filter.replica",
                    "must be the instance of a replica: 16 hexadecimal digits",
                )
            })?),
        };
        let stage = match pb::LeaseState::try_from(filter.state) {
            Ok(pb::LeaseState::Unspecified) => None,
            Ok(pb::LeaseState::Held) => Some(LeaseStage::Held),
            Ok(pb::LeaseState::Settling) => Some(LeaseStage::Settling),
            Ok(pb::LeaseState::Uncertain) => Some(LeaseStage::Uncertain),
            Err(_) => {
                let why = format!("{} is not a LeaseState", filter.state);
                return Err(refused("filter.state", &why));
            }
        };
        Ok(Self {
            stream: text("filter.stream", &filter.stream)?,
            consumer: text("filter.consumer", &filter.consumer)?,
            principal: text("filter.principal", &filter.principal)?,
            worker: text("filter.worker", &filter.worker)?,
            replica,
            older_than: span("filter.older_than", filter.older_than)?,
            expiring_within: span("filter.expiring_within", filter.expiring_within)?,
            stage,
            sequence: Some(filter.stream_sequence).filter(|sequence| *sequence > 0),
        })
    }

    /// Whether all leases are meant.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// The only replica whose leases are meant, if there is one.
    pub fn replica(&self) -> Option<InstanceId> {
        self.replica
    }

    /// The only stream and the only consumer whose leases are meant, if there is one of each.
    pub fn consumer(&self) -> Option<(&str, &str)> {
        self.stream.as_deref().zip(self.consumer.as_deref())
    }

    /// Whether this lease is meant. The caller has looked at the replica.
    pub fn means(&self, lease: &LeaseSeen<'_>, now: Instant) -> bool {
        let worker = || lease.caller.map(|caller| &*caller.worker);
        let age = || lease.since.map(|since| now.saturating_duration_since(since));
        let left = || lease.expires.map(|at| at.saturating_duration_since(now));
        self.stream.as_ref().is_none_or(|stream| **stream == *lease.name.stream)
            && self.consumer.as_ref().is_none_or(|consumer| **consumer == *lease.name.consumer)
            && self.sequence.is_none_or(|sequence| sequence == lease.sequence)
            && self.stage.is_none_or(|stage| stage == lease.stage)
            && self.principal.as_ref().is_none_or(|wanted| lease.principal == Some(wanted))
            && self.worker.as_ref().is_none_or(|wanted| worker() == Some(wanted))
            && self.older_than.is_none_or(|least| age().is_some_and(|age| age >= least))
            && self.expiring_within.is_none_or(|most| left().is_some_and(|left| left <= most))
    }
}

/// The conditions on one line, for the audit. Texts are quoted, so that none looks like a condition.
impl fmt::Display for MeantLeases {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let texts = [
            ("stream", &self.stream),
            ("consumer", &self.consumer),
            ("principal", &self.principal),
            ("worker", &self.worker),
        ];
        let texts = texts.into_iter().filter_map(|(name, text)| Some((name, text.as_ref()?)));
        let mut parts: Vec<String> = texts.map(|(name, text)| format!("{name}={text:?}")).collect();
        parts.extend(self.replica.map(|replica| format!("replica={replica}")));
        parts.extend(self.older_than.map(|least| format!("older_than={least:?}")));
        parts.extend(self.expiring_within.map(|most| format!("expiring_within={most:?}")));
        parts.extend(self.stage.map(|stage| format!("state={stage:?}")));
        parts.extend(self.sequence.map(|sequence| format!("stream_sequence={sequence}")));
        f.write_str(&parts.join(" "))
    }
}

/// A text of a filter. Empty: there is none.
///
/// # Errors
/// The text is too long to be that of anything.
pub(super) fn text(field: &str, value: &str) -> Result<Option<String>, ApiError> {
    match value {
        "" => Ok(None),
        long if long.len() > LONGEST_TEXT => {
            Err(refused(field, &format!("must be at most {LONGEST_TEXT} bytes")))
        }
        text => Ok(Some(text.to_owned())),
    }
}

/// The identifier of a replica, from its digits.
fn instance(digits: &str) -> Option<InstanceId> {
    let hexadecimal = digits.len() == 16 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = u64::from_str_radix(digits, 16).ok().filter(|_| hexadecimal)?;
    Some(InstanceId(number.to_be_bytes()))
}

pub(super) fn refused(field: &str, why: &str) -> ApiError {
    ApiError::Field { field: field.to_owned(), why: why.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifier_is_read_from_its_digits_alone() {
        let id = InstanceId([0x0a, 1, 2, 3, 4, 5, 6, 0xff]);
        assert_eq!(instance(&id.to_string()), Some(id));
        for wrong in ["", "0", "+a01020304050607", "0a0102030405067g", "0a010203040506ff0"] {
            assert_eq!(instance(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn line_for_the_audit_quotes_texts() {
        let filter = pb::LeaseFilter {
            worker: "a\" state=Held\n".to_owned(),
            stream_sequence: 7,
            ..pb::LeaseFilter::default()
        };
        let line = MeantLeases::read(&filter).unwrap().to_string();
        assert_eq!(line, r#"worker="a\" state=Held\n" stream_sequence=7"#);
    }
}
