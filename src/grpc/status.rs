//! The one table from what went wrong to what a client is told: by status on the unary calls, by
//! `SettleError` in Settle. Pure.
//!
//! A status is a promise about what has and has not happened. Each [`Reason`] has one code, one
//! promise and one advice on repeating; `docs/reference/errors.md` is rendered from here by a test.

use std::{collections::HashMap, time::Duration};

use prost_types::Duration as PbDuration;
use tonic::{Code, Status, metadata::MetadataMap};
use tonic_types::{ErrorDetails, StatusExt as _};

use super::budget::ExhaustedScope;
use crate::{
    lease::SettleKind,
    lessor::{Error, Unsuitable},
    pb,
};

/// The `domain` of every `google.rpc.ErrorInfo` of ours.
pub const DOMAIN: &str = "fetchproxy";
/// The trailer with the reason, for clients that cannot decode error details.
pub const REASON_TRAILER: &str = "fetchproxy-reason";
/// The trailer that stock gRPC retry policies obey, in milliseconds.
const PUSHBACK_TRAILER: &str = "grpc-retry-pushback-ms";

macro_rules! reasons {
    ($($(#[doc = $doc:literal])* $variant:ident = $name:literal, $code:ident, $retry:expr;)*) => {
        /// Every reason that a client can be told.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Reason { $($(#[doc = $doc])* $variant,)* }

        impl Reason {
            /// All of them, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// As it is written on the wire.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The status code that goes with it.
            pub fn code(self) -> Code {
                match self { $(Self::$variant => Code::$code,)* }
            }

            /// What has and has not happened.
            pub fn promise(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),*).trim_ascii(),)* }
            }

            /// After how long to repeat the call; `None` where repeating it as it is does not help,
            /// or needs no waiting.
            pub fn retry_after(self) -> Option<Duration> {
                let milliseconds: Option<u64> = match self { $(Self::$variant => $retry,)* };
                milliseconds.map(Duration::from_millis)
            }
        }
    };
}

reasons! {
    /// Nothing happened. The error names the field.
    InvalidField = "INVALID_FIELD", InvalidArgument, None;
    /// Nothing happened. The token is not from this cluster.
    TokenInvalid = "TOKEN_INVALID", InvalidArgument, None;
    /// Nothing happened. The token is sealed with a key that this replica does not have yet.
    KeyUnknown = "KEY_UNKNOWN", Unavailable, Some(1000);
    /// Nothing happened. The stream does not exist.
    StreamNotFound = "STREAM_NOT_FOUND", NotFound, None;
    /// Nothing happened. The stream has no such consumer.
    ConsumerNotFound = "CONSUMER_NOT_FOUND", NotFound, None;
    /// Nothing happened. The consumer cannot be used: metadata `property` says why.
    ConsumerUnsuitable = "CONSUMER_UNSUITABLE", FailedPrecondition, None;
    /// Nothing happened. A connection to NATS broke while it brought messages of this consumer, and the cause is not known. Repeat it.
    ConsumerSuspected = "CONSUMER_SUSPECTED", Unavailable, Some(1000);
    /// Nothing happened. The consumer has reached its `max_waiting` or another pull limit in JetStream.
    ConsumerBusy = "CONSUMER_BUSY", ResourceExhausted, Some(1000);
    /// Not applied. The lease has ended. The message is, or will be, delivered again, unless metadata `detail` is `last_attempt`.
    LeaseExpired = "LEASE_EXPIRED", FailedPrecondition, None;
    /// Not applied. The message was settled before in another way: metadata `settled_as`.
    LeaseSettled = "LEASE_SETTLED", FailedPrecondition, None;
    /// Nothing happened. Another call is settling the message.
    LeaseBusy = "LEASE_BUSY", Aborted, Some(100);
    /// Nothing happened. The NATS user of the proxy lacks the right to metadata `subject`. An operator must act.
    NatsPermission = "NATS_PERMISSION", PermissionDenied, None;
    /// Nothing happened. This replica, or this consumer at this replica, holds as many leases as it may.
    LeaseLimit = "LEASE_LIMIT", ResourceExhausted, Some(1000);
    /// Nothing happened. This replica, or this connection, has as many open Fetch calls as it may.
    WaiterLimit = "WAITER_LIMIT", ResourceExhausted, Some(1000);
    /// Nothing happened. This replica, or this connection, has as many running calls as it may.
    CallLimit = "CALL_LIMIT", ResourceExhausted, Some(1000);
    /// Nothing was settled or delivered. This replica, or this connection, holds as many bytes of requests or answers as it may. Messages of a Fetch go to another caller, or back to NATS, which costs them an attempt.
    ByteLimit = "BYTE_LIMIT", ResourceExhausted, Some(1000);
    /// Nothing happened. The whole request did not arrive within 10 s.
    RequestTimeout = "REQUEST_TIMEOUT", Unavailable, Some(1000);
    /// Nothing happened. This replica has as many connections as it may. Open a new connection, to any replica.
    ConnectionLimit = "CONNECTION_LIMIT", ResourceExhausted, Some(1000);
    /// Not applied. You still hold your lease.
    NatsUnavailable = "NATS_UNAVAILABLE", Unavailable, Some(1000);
    /// Nothing happened. Any other replica serves you.
    Draining = "DRAINING", Unavailable, Some(100);
    /// The replica that holds the lease does not answer. Metadata `applied` is `no` or `unknown`. Repeat it.
    OwnerUnreachable = "OWNER_UNREACHABLE", Unavailable, Some(1000);
    /// It may have been applied. Repeat it: a repeat never affects the delivery of another worker.
    SettleUnconfirmed = "SETTLE_UNCONFIRMED", DeadlineExceeded, None;
    /// Not applied. The consumer or its stream is gone. Repeating does not help.
    JetstreamDenied = "JETSTREAM_DENIED", FailedPrecondition, None;
    /// Nothing happened. The request cannot be decoded.
    Malformed = "MALFORMED", InvalidArgument, None;
    /// Nothing happened. The request is larger than 4 MiB, or its gzip unpacks to more than 20 times its size.
    RequestTooLarge = "REQUEST_TOO_LARGE", ResourceExhausted, None;
    /// Nothing happened. The method does not exist, or the compression is not supported.
    Unsupported = "UNSUPPORTED", Unimplemented, None;
}

/// Something a client is told in place of what it asked for.
#[derive(Debug, Clone, PartialEq)]
pub enum ApiError {
    /// A field of the request is not what it may be.
    Field {
        /// Its path, like `settlements[3].nak.delay`.
        field: String,
        /// What is wrong with it.
        why: String,
    },
    /// The token is not one of ours.
    TokenInvalid,
    /// The token is sealed with a key that we do not have.
    KeyUnknown,
    /// The replica that holds the lease cannot be asked.
    OwnerUnreachable {
        /// It may have heard the question, and done what was asked.
        maybe: bool,
    },
    /// What the replica that holds the lease says.
    Relayed {
        /// Its row of the table.
        reason: Reason,
        /// All of it.
        error: pb::SettleError,
    },
    /// As many calls are under way as may be: so many of this replica.
    CallLimit(usize, ExhaustedScope),
    /// As many Fetch calls are open as may be: so many of this replica.
    WaiterLimit(usize, ExhaustedScope),
    /// As many bytes are under way as may be.
    ByteLimit(BudgetKind, ExhaustedScope),
    /// The request was not there in whole within this time.
    RequestTimeout(Duration),
    /// An error that is found before a handler runs.
    Foreign(Reason, String),
    /// This many connections are open already.
    ConnectionLimit(usize),
    /// The lessor's own words.
    Lessor(Error),
}

/// The bytes that a budget counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BudgetKind {
    /// Of requests that are read or worked on.
    Requests,
    /// Of answers that their clients have not read.
    Answers,
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        Self::Lessor(error)
    }
}

impl ApiError {
    /// What another replica refused. A reason that only a newer one knows says nothing here.
    pub(super) fn relayed(error: pb::SettleError) -> Self {
        match Reason::ALL.iter().find(|reason| reason.name() == error.reason) {
            Some(reason) => Self::Relayed { reason: *reason, error },
            None => Self::OwnerUnreachable { maybe: true },
        }
    }

    /// The row of the table.
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
            Self::Foreign(reason, _) => *reason,
            Self::ConnectionLimit(_) => Reason::ConnectionLimit,
            Self::Lessor(error) => match error {
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

    pub(super) fn message(&self) -> String {
        match self {
            Self::Field { field, why } => format!("{field}: {why}"),
            Self::TokenInvalid => "not a token of this service".to_owned(),
            Self::KeyUnknown => "the token is sealed with a key that is not known here".to_owned(),
            Self::OwnerUnreachable { .. } => {
                "the replica that granted this lease does not answer".to_owned()
            }
            Self::Relayed { error, .. } => error.message.clone(),
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
            Self::Foreign(_, message) => message.clone(),
            Self::ConnectionLimit(most) => format!("all {most} connections are taken"),
            Self::Lessor(error) => error.to_string(),
        }
    }

    fn metadata(&self) -> HashMap<String, String> {
        let one = |name: &str, value: &str| HashMap::from([(name.to_owned(), value.to_owned())]);
        match self {
            Self::Field { field, .. } => one("field", field),
            Self::OwnerUnreachable { maybe } => {
                one("applied", if *maybe { "unknown" } else { "no" })
            }
            Self::Relayed { error, .. } => error.metadata.clone(),
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
                one("property", property_name(property))
            }
            Self::Lessor(Error::LeaseSettled(kind)) => one("settled_as", kind_name(*kind)),
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

    /// What a unary call is told.
    pub fn status(&self) -> Status {
        let reason = self.reason();
        let mut details = ErrorDetails::with_error_info(reason.name(), DOMAIN, self.metadata());
        match self {
            Self::Field { field, why } => {
                details.add_bad_request_violation(field, why);
            }
            Self::Lessor(Error::StreamNotFound(name)) => {
                details.set_resource_info("stream", &*name.stream, "", self.message());
            }
            Self::Lessor(Error::ConsumerNotFound(name)) => {
                details.set_resource_info("consumer", name.to_string(), "", self.message());
            }
            Self::Lessor(Error::ConsumerUnsuitable { name, property }) => {
                let kind = property_name(property);
                details.add_precondition_failure_violation(kind, name.to_string(), self.message());
            }
            Self::CallLimit(..)
            | Self::WaiterLimit(..)
            | Self::ByteLimit(..)
            | Self::ConnectionLimit(_)
            | Self::Lessor(
                Error::LeaseLimit(_) | Error::ConsumerLeaseLimit(_) | Error::WaiterLimit(_),
            ) => {
                details.add_quota_failure_violation("replica", self.message());
            }
            Self::TokenInvalid
            | Self::KeyUnknown
            | Self::OwnerUnreachable { .. }
            | Self::Relayed { .. }
            | Self::RequestTimeout(_)
            | Self::Foreign(..)
            | Self::Lessor(_) => {}
        }
        status(reason, self.message(), details)
    }

    /// What the same is called inside a Settle.
    pub fn settle_error(&self) -> pb::SettleError {
        let reason = self.reason();
        pb::SettleError {
            reason: reason.name().to_owned(),
            message: self.message(),
            metadata: self.metadata(),
            retry_delay: reason.retry_after().map(pb_duration),
        }
    }
}

fn status(reason: Reason, message: String, mut details: ErrorDetails) -> Status {
    let mut trailers = MetadataMap::new();
    // Reasons and numbers are ASCII, so both always parse.
    if let Ok(name) = reason.name().parse() {
        trailers.insert(REASON_TRAILER, name);
    }
    if let Some(delay) = reason.retry_after() {
        details.set_retry_info(Some(delay));
        if let Ok(milliseconds) = delay.as_millis().to_string().parse() {
            trailers.insert(PUSHBACK_TRAILER, milliseconds);
        }
    }
    Status::with_error_details_and_metadata(reason.code(), message, details, trailers)
}

fn pb_duration(duration: Duration) -> PbDuration {
    // Our delays are seconds; the conversion fails beyond 292 billion years.
    duration.try_into().unwrap_or_default()
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

fn property_name(property: &Unsuitable) -> &'static str {
    match property {
        Unsuitable::Push => "push",
        Unsuitable::AckPolicy(_) => "ack_policy",
        Unsuitable::PriorityGroups => "priority_groups",
        Unsuitable::AckWait => "ack_wait",
        Unsuitable::Unreadable { .. } => "unreadable_message",
    }
}
