//! The errors of a call, with the details that its client receives. The reason of each error, and with it
//! the promise, comes from the table in `reason`. Pure: `grpc` turns an error into a status, and `cluster`
//! turns it into an entry of a Settle.

use std::{collections::HashMap, sync::Arc, time::Duration};

use crate::{
    access::{Denied, NotAccepted, OverLimit, ReachedLimit, RightLost, Unauthenticated},
    lease::SettleKind,
    lessor::Error,
    reason::Reason,
};

/// The error that a client receives instead of a result.
#[derive(Debug, Clone, PartialEq)]
pub enum ApiError {
    /// A field of the request has a value that is not allowed.
    Field {
        /// The path of the field, like `settlements[3].nak.delay`.
        field: String,
        /// The mistake in the value.
        why: String,
    },
    /// The token is not from this cluster.
    TokenInvalid,
    /// The token is sealed with a key that this replica does not have.
    KeyUnknown,
    /// The replica that holds the lease cannot be asked.
    OwnerUnreachable {
        /// Whether that replica may have received the question and applied it.
        maybe_applied: bool,
    },
    /// The replica that holds the lease refused, and this is its answer.
    Relayed {
        /// Its row of the table.
        reason: Reason,
        /// Its words for people.
        message: String,
        /// Its details for programs.
        metadata: HashMap<String, String>,
    },
    /// The client of a stream was silent for this long.
    StreamSilent(SilentDirection, Duration),
    /// No more calls are allowed at once. The number is the limit of this replica.
    CallLimit(usize, ExhaustedScope),
    /// No more open Fetch calls are allowed. The number is the limit of this replica.
    WaiterLimit(usize, ExhaustedScope),
    /// No more bytes are allowed at once.
    ByteLimit(BudgetKind, ExhaustedScope),
    /// The request did not arrive in full within this time.
    RequestTimeout(Duration),
    /// An error that a library found before a handler ran, in the words of that library.
    Foreign(Reason, String),
    /// No more connections are allowed. The number is the limit of this replica.
    ConnectionLimit(usize),
    /// The credential of the caller is not accepted.
    Unauthenticated(Unauthenticated),
    /// The keys of the issuer with this name are not here, so its token cannot be checked.
    AuthUnavailable(Arc<str>),
    /// The caller does not have the right.
    NotAllowed(Box<Denied>),
    /// The principal has reached one of its limits.
    OverLimit(OverLimit),
    /// The lessor refused or failed.
    Lessor(Error),
}

/// What a silent client did not do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SilentDirection {
    /// It sent no frame.
    Sending,
    /// It read nothing of what was to be written.
    Reading,
}

/// Whose limit is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExhaustedScope {
    /// The connection has used up its share.
    Connection,
    /// The replica has no more to give.
    Replica,
}

/// The use of the bytes of a budget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BudgetKind {
    /// Requests that are being read or worked on.
    Requests,
    /// Answers that their clients have not read.
    Answers,
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self::Lessor(error)
    }
}

impl From<NotAccepted> for ApiError {
    fn from(why: NotAccepted) -> Self {
        match why {
            NotAccepted::Unauthenticated(why) => Self::Unauthenticated(why),
            NotAccepted::KeysAway(issuer) => Self::AuthUnavailable(issuer),
            NotAccepted::UnknownKey(_) => Self::Unauthenticated(Unauthenticated::UnknownKey),
        }
    }
}

impl From<RightLost> for ApiError {
    fn from(lost: RightLost) -> Self {
        match lost {
            RightLost::NotAccepted(why) => why.into(),
            RightLost::Denied(denied) => denied.into(),
        }
    }
}

impl From<OverLimit> for ApiError {
    fn from(over: OverLimit) -> Self {
        Self::OverLimit(over)
    }
}

impl From<Denied> for ApiError {
    fn from(denied: Denied) -> Self {
        Self::NotAllowed(Box::new(denied))
    }
}

impl ApiError {
    /// The row of the table that this error belongs to.
    pub fn reason(&self) -> Reason {
        match self {
            Self::Field { .. } => Reason::InvalidField,
            Self::TokenInvalid => Reason::TokenInvalid,
            Self::KeyUnknown => Reason::KeyUnknown,
            Self::OwnerUnreachable { .. } => Reason::OwnerUnreachable,
            Self::Relayed { reason, .. } => *reason,
            Self::CallLimit(..) => Reason::CallLimit,
            Self::WaiterLimit(..) => Reason::WaiterLimit,
            Self::ByteLimit(..) => Reason::ByteLimit,
            Self::RequestTimeout(_) => Reason::RequestTimeout,
            Self::StreamSilent(..) => Reason::StreamSilent,
            Self::Foreign(reason, _) => *reason,
            Self::ConnectionLimit(_) => Reason::ConnectionLimit,
            Self::Unauthenticated(_) => Reason::Unauthenticated,
            Self::AuthUnavailable(_) => Reason::AuthUnavailable,
            Self::NotAllowed(_) => Reason::NotAllowed,
            Self::OverLimit(over) => match over.limit {
                ReachedLimit::Leases(_) => Reason::LeaseLimit,
                ReachedLimit::Waiters(_) => Reason::WaiterLimit,
                ReachedLimit::Calls(_) => Reason::CallLimit,
                ReachedLimit::Rate { .. } => Reason::RateLimit,
            },
            Self::Lessor(error) => match error {
                Error::NotHolder => Reason::NotAllowed,
                Error::StreamNotFound(_) => Reason::StreamNotFound,
                Error::ConsumerNotFound(_) => Reason::ConsumerNotFound,
                Error::ConsumerUnsuitable { .. } => Reason::ConsumerUnsuitable,
                Error::ConsumerSuspected { .. } => Reason::ConsumerSuspected,
                Error::ConsumerBusy(_) => Reason::ConsumerBusy,
                Error::LeaseLimit(_) | Error::ConsumerLeaseLimit(_) => Reason::LeaseLimit,
                Error::WaiterLimit(_) => Reason::WaiterLimit,
                Error::Draining => Reason::Draining,
                Error::Unavailable(_) => Reason::NatsUnavailable,
                Error::Permission(_) => Reason::NatsPermission,
                Error::LeaseExpired { .. } | Error::LastAttempt => Reason::LeaseExpired,
                Error::LeaseSettled(_) => Reason::LeaseSettled,
                Error::LeaseBusy => Reason::LeaseBusy,
                Error::Unconfirmed => Reason::SettleUnconfirmed,
                Error::ConsumerGone => Reason::JetstreamDenied,
            },
        }
    }

    /// How long to wait before the call is repeated, if that helps.
    pub fn retry_after(&self) -> Option<Duration> {
        let free_in = if let Self::OverLimit(over) = self { over.free_in() } else { None };
        free_in.or_else(|| self.reason().retry_after())
    }

    /// The error in words, for people.
    pub fn message(&self) -> String {
        match self {
            Self::Field { field, why } => format!("{field}: {why}"),
            Self::TokenInvalid => "not a token of this service".to_owned(),
            Self::KeyUnknown => "the token is sealed with a key that is not known here".to_owned(),
            Self::OwnerUnreachable { .. } => {
                "the replica that granted this lease does not answer".to_owned()
            }
            Self::Relayed { message, .. } => message.clone(),
            Self::CallLimit(most, ExhaustedScope::Replica) => {
                format!("all {most} places for calls are taken")
            }
            Self::CallLimit(_, ExhaustedScope::Connection) => {
                "this connection has its share of the places for calls".to_owned()
            }
            Self::WaiterLimit(most, ExhaustedScope::Replica) => {
                format!("all {most} places for Fetch calls are taken")
            }
            Self::WaiterLimit(_, ExhaustedScope::Connection) => {
                "this connection has its share of the places for Fetch calls".to_owned()
            }
            Self::ByteLimit(counted, short) => {
                let counted = match counted {
                    BudgetKind::Requests => "requests that are being read",
                    BudgetKind::Answers => "answers that are not read yet",
                };
                match short {
                    ExhaustedScope::Replica => {
                        format!("this replica has no more bytes for {counted}")
                    }
                    ExhaustedScope::Connection => {
                        format!("this connection has its share of the bytes for {counted}")
                    }
                }
            }
            Self::RequestTimeout(time) => format!("the request was not there within {time:?}"),
            Self::StreamSilent(SilentDirection::Sending, time) => {
                format!("no frame came from the client for {time:?}")
            }
            Self::StreamSilent(SilentDirection::Reading, time) => {
                format!("the client has read nothing for {time:?}")
            }
            Self::Foreign(_, message) => message.clone(),
            Self::ConnectionLimit(most) => format!("all {most} connections are taken"),
            Self::Unauthenticated(why) => why.message(),
            Self::AuthUnavailable(issuer) => {
                format!("the keys of the issuer `{issuer}` are not here, or are fetched again")
            }
            Self::NotAllowed(denied) => denied.message(),
            Self::OverLimit(over) => over.message(),
            Self::Lessor(error) => error.to_string(),
        }
    }

    /// The details for programs, by name.
    pub fn metadata(&self) -> HashMap<String, String> {
        let one = |name: &str, value: &str| HashMap::from([(name.to_owned(), value.to_owned())]);
        match self {
            Self::Field { field, .. } => one("field", field),
            Self::OwnerUnreachable { maybe_applied } => {
                one("applied", if *maybe_applied { "unknown" } else { "no" })
            }
            Self::Relayed { metadata, .. } => metadata.clone(),
            Self::StreamSilent(SilentDirection::Sending, _) => one("direction", "sending"),
            Self::StreamSilent(SilentDirection::Reading, _) => one("direction", "reading"),
            Self::CallLimit(_, short) | Self::WaiterLimit(_, short) => one("scope", scope(*short)),
            Self::ByteLimit(counted, short) => {
                let counted = match counted {
                    BudgetKind::Requests => "requests",
                    BudgetKind::Answers => "answers",
                };
                [("scope", scope(*short)), ("of", counted)]
                    .map(|(name, value)| (name.to_owned(), value.to_owned()))
                    .into()
            }
            Self::Lessor(Error::ConsumerUnsuitable { property, .. }) => {
                one("property", property.name())
            }
            Self::Lessor(Error::LeaseSettled(kind)) => one("settled_as", kind_name(*kind)),
            Self::Unauthenticated(why) => one("why", why.name()),
            Self::AuthUnavailable(issuer) => one("issuer", issuer),
            Self::NotAllowed(denied) => {
                let consumer = denied.consumer.as_ref();
                let known = [
                    ("principal", denied.principal.as_deref()),
                    ("verb", Some(denied.verb.name())),
                    ("stream", consumer.map(|(stream, _)| &**stream)),
                    ("consumer", consumer.map(|(_, consumer)| &**consumer)),
                    ("detail", denied.detail()),
                ];
                let known = known.into_iter().filter_map(|(name, value)| Some((name, value?)));
                known.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
            }
            Self::OverLimit(over) => [("scope", "principal"), ("principal", &*over.principal)]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            Self::Lessor(Error::NotHolder) => one("detail", "foreign_token"),
            Self::Lessor(Error::LeaseExpired { forgotten: true }) => one("detail", "forgotten"),
            Self::Lessor(Error::LastAttempt) => one("detail", "last_attempt"),
            Self::Lessor(
                Error::Permission(subject) | Error::ConsumerSuspected { needs: Some(subject), .. },
            ) => one("subject", subject),
            Self::TokenInvalid
            | Self::KeyUnknown
            | Self::ConnectionLimit(_)
            | Self::RequestTimeout(_)
            | Self::Foreign(..)
            | Self::Lessor(_) => HashMap::new(),
        }
    }
}

fn scope(short: ExhaustedScope) -> &'static str {
    match short {
        ExhaustedScope::Connection => "connection",
        ExhaustedScope::Replica => "replica",
    }
}

fn kind_name(kind: SettleKind) -> &'static str {
    match kind {
        SettleKind::Ack => "ACK",
        SettleKind::Nak => "NAK",
        SettleKind::Term => "TERM",
    }
}
