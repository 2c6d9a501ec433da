//! The meters of calls, with the names of go-grpc-prometheus: dashboards that know those names work.

use std::{borrow::Cow, sync::Arc, time::Duration};

use super::{
    store::{Count, SeriesStore, TracedTimes},
    table::FamilyId,
};

/// The names of the codes of gRPC, by their numbers.
const CODES: [&str; 17] = [
    "OK",
    "Canceled",
    "Unknown",
    "InvalidArgument",
    "DeadlineExceeded",
    "NotFound",
    "AlreadyExists",
    "PermissionDenied",
    "ResourceExhausted",
    "FailedPrecondition",
    "Aborted",
    "OutOfRange",
    "Unimplemented",
    "Internal",
    "Unavailable",
    "DataLoss",
    "Unauthenticated",
];
/// The number of a code that is not known.
const UNKNOWN: usize = 2;
/// The service and the method of a path that is not served.
const NOT_SERVED: &str = "_OTHER";

/// A method that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RpcMethod<'n> {
    /// The full name of the service.
    pub service: &'n str,
    /// The name of the method.
    pub method: &'n str,
    /// Whether the client streams, and whether the server does.
    pub streams: (bool, bool),
}

/// The meters of all methods. A copy is the same meters.
#[derive(Debug, Clone)]
pub struct RpcMeters(Arc<[(Box<str>, RpcMeter)]>);

/// Counts the calls of one method. A copy is the same meter.
#[derive(Debug, Clone)]
pub struct RpcMeter(Arc<RpcCounts>);

#[derive(Debug)]
struct RpcCounts {
    store: Arc<SeriesStore>,
    method: Box<str>,
    started: Count,
    handled: Vec<Count>,
    /// `None` for a stream: it may be open for hours.
    time: Option<TracedTimes>,
}

impl RpcMeters {
    pub(super) fn new(store: &Arc<SeriesStore>, methods: &[RpcMethod<'_>]) -> Self {
        let other = RpcMethod { service: NOT_SERVED, method: NOT_SERVED, streams: (false, false) };
        let all = methods.iter().chain([&other]).map(|served| {
            let path = format!("/{}/{}", served.service, served.method);
            (path.into(), RpcMeter::new(store, served))
        });
        Self(all.collect())
    }

    /// The number of the method at this path, for [`RpcMeters::at`]. There are few, and the most common are first.
    pub fn number_of(&self, path: &str) -> usize {
        let known = self.0.iter().position(|(known, _)| **known == *path);
        // The last one is for all paths that are not served.
        known.unwrap_or(self.0.len() - 1)
    }

    /// The meter of the method with this number.
    pub fn at(&self, number: usize) -> &RpcMeter {
        &self.0[number].1
    }
}

impl RpcMeter {
    fn new(store: &Arc<SeriesStore>, served: &RpcMethod<'_>) -> Self {
        let kind = match served.streams {
            (false, false) => "unary",
            (true, false) => "client_stream",
            (false, true) => "server_stream",
            (true, true) => "bidi_stream",
        };
        let name = [kind, served.service, served.method].map(|part| Cow::Owned(part.to_owned()));
        let code = |code: &&'static str| {
            store.count(FamilyId::GrpcHandled, [&name[..], &[(*code).into()]].concat())
        };
        let time = match (served.streams, served.method) {
            // A Fetch waits on purpose.
            (_, "Fetch") => Some(store.traced_times(FamilyId::FetchTime, Vec::new())),
            ((false, false), _) => Some(store.traced_times(FamilyId::GrpcHandling, name.to_vec())),
            _ => None,
        };
        Self(Arc::new(RpcCounts {
            store: store.clone(),
            method: served.method.into(),
            started: store.count(FamilyId::GrpcStarted, name.to_vec()),
            handled: CODES.iter().map(code).collect(),
            time,
        }))
    }

    /// A call has begun.
    pub fn started(&self) {
        self.0.started.add(1);
    }

    /// A call has ended with this code. `trace_id`: its trace, if it is sampled. Returns the name of the code.
    pub fn handled(&self, code: usize, took: Duration, trace_id: Option<String>) -> &'static str {
        let code = if code < CODES.len() { code } else { UNKNOWN };
        self.0.handled[code].add(1);
        if let Some(time) = &self.0.time {
            time.observe(took.as_secs_f64(), trace_id);
        }
        CODES[code]
    }

    /// A call, or a token of it, was refused for this reason of the contract.
    pub fn refused(&self, reason: &str) {
        count_refusal(&self.0.store, reason, &self.0.method);
    }
}

pub(super) fn count_refusal(store: &SeriesStore, reason: &str, method: &str) {
    let labels = [reason, method].map(|value| Cow::Owned(value.to_owned()));
    store.count(FamilyId::Refusals, labels.to_vec()).add(1);
}
