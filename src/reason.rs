//! The one table of refusals: every reason that a client can receive, with its status code, its promise
//! and its advice on repeating. Pure: it knows no library of gRPC or of protobuf.
//!
//! A reason is a promise about what has and has not happened. A unary call carries it in its status, and
//! Settle carries it in a `SettleError`. A test renders the page of errors from this table.

use std::time::Duration;

/// The `domain` of every `google.rpc.ErrorInfo` of this service.
pub const DOMAIN: &str = "fetchproxy";
/// The trailer with the reason, for clients that cannot decode error details.
pub const REASON_TRAILER: &str = "fetchproxy-reason";
/// The trailer with the wait before a repeat, in milliseconds. Stock gRPC retry policies obey it.
pub const PUSHBACK_TRAILER: &str = "grpc-retry-pushback-ms";

/// The canonical gRPC codes that a reason can have, by their numbers in the gRPC specification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum Code {
    /// The request itself is wrong.
    InvalidArgument = 3,
    /// The call ended before its effect was confirmed.
    DeadlineExceeded = 4,
    /// The stream or the consumer does not exist.
    NotFound = 5,
    /// The caller lacks a right, or the proxy lacks a right in NATS.
    PermissionDenied = 7,
    /// A limit is reached.
    ResourceExhausted = 8,
    /// The state of the lease or of the consumer does not allow it.
    FailedPrecondition = 9,
    /// Another call is in the way.
    Aborted = 10,
    /// The method is not served.
    Unimplemented = 12,
    /// The service, or a part of it, cannot be reached now.
    Unavailable = 14,
    /// The caller has no credential that is accepted.
    Unauthenticated = 16,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])* $variant:ident = $name:literal, $code:ident, $retry:expr;)*) => {
        /// Each reason for which a call, or one settlement of a call, fails.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Reason { $($(#[doc = $doc])* $variant,)* }

        impl Reason {
            /// Every reason, in the order of the table.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The name on the wire, in capitals.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The status code of a call that fails for this reason.
            pub fn code(self) -> Code {
                match self { $(Self::$variant => Code::$code,)* }
            }

            /// The promise about what has and has not happened, in words.
            pub fn promise(self) -> &'static str {
                match self { $(Self::$variant => concat!($($doc),*).trim_ascii(),)* }
            }

            /// How long to wait before the call is repeated. `None`: repeating the same call does not
            /// help, or needs no wait.
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
    /// Not applied. The message was settled before in another way, or such a settlement is not confirmed: metadata `settled_as`.
    LeaseSettled = "LEASE_SETTLED", FailedPrecondition, None;
    /// Nothing happened. Another call is settling the message, or its lease is being handed over.
    LeaseBusy = "LEASE_BUSY", Aborted, Some(100);
    /// Nothing happened. The call has no credential that is accepted: metadata `why`. Send a good one.
    Unauthenticated = "UNAUTHENTICATED", Unauthenticated, None;
    /// Nothing happened. The keys of the issuer of the token are not here yet, or are being fetched again: metadata `issuer`. Repeat it.
    AuthUnavailable = "AUTH_UNAVAILABLE", Unavailable, Some(1000);
    /// Nothing happened. The policy does not allow it to the caller: metadata `principal`, `verb`, `stream`, `consumer` and `detail`. An operator must act.
    NotAllowed = "NOT_ALLOWED", PermissionDenied, None;
    /// Nothing happened. The NATS user of the proxy lacks the right to metadata `subject`. An operator must act.
    NatsPermission = "NATS_PERMISSION", PermissionDenied, None;
    /// Nothing happened. The principal makes more calls in a second than it may at this replica. The status says when the next call is free, which is after a second at most.
    RateLimit = "RATE_LIMIT", ResourceExhausted, Some(1000);
    /// Nothing happened. This replica, this consumer, or the principal at this replica holds as many leases as it may.
    LeaseLimit = "LEASE_LIMIT", ResourceExhausted, Some(1000);
    /// Nothing happened. This replica, this connection, or the principal at this replica has as many open Fetch calls as it may.
    WaiterLimit = "WAITER_LIMIT", ResourceExhausted, Some(1000);
    /// Nothing happened. This replica, this connection, or the principal at this replica has as many running calls as it may.
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
    /// The client of a Consume said nothing, or read nothing, for three heartbeats: metadata `direction` is `sending` or `reading`. Settlements that were answered are done. Leases end as they do when a stream ends.
    StreamSilent = "STREAM_SILENT", DeadlineExceeded, None;
    /// Not applied. The consumer or its stream is gone. Repeating does not help.
    JetstreamDenied = "JETSTREAM_DENIED", FailedPrecondition, None;
    /// Nothing happened. The request cannot be decoded.
    Malformed = "MALFORMED", InvalidArgument, None;
    /// Nothing happened. The request is larger than 4 MiB, or its gzip unpacks to more than 20 times its size.
    RequestTooLarge = "REQUEST_TOO_LARGE", ResourceExhausted, None;
    /// Nothing happened. The method does not exist, or the compression is not supported.
    Unsupported = "UNSUPPORTED", Unimplemented, None;
}
