//! The gRPC side: the only rooms that name tonic and the generated contract.
//!
//! `decode` reads requests into the lessor's words, `encode` writes its answers, `to_status` makes
//! a status of an error, `service` joins the three, `route` finds the replica that holds a lease.
//! `reasons` gives tonic's own errors our reasons. `calls` bounds what is under way, by the budgets of
//! `budget`; `reading` reads requests within their bounds. `answer` knows what was not written, and
//! `unwritten` ends what makes no progress. `connection` is what these know of one connection. `server` and `ops` are the two listeners, `edge` and `preface` what both
//! stand on; `probe` and `hand` are clients. Nothing here decides about leases.

mod answer;
mod budget;
mod calls;
mod connection;
mod decode;
mod edge;
mod encode;
mod hand;
mod health;
mod ops;
mod preface;
mod probe;
mod protocol;
mod reading;
mod reasons;
mod refusals;
mod route;
mod server;
mod service;
mod to_status;
mod unwritten;

pub use self::{
    calls::CallLimits,
    decode::{
        DEFAULT_MAX_BYTES, DEFAULT_WAIT, LEAST_MAX_BYTES, LONGEST_DELAY, LONGEST_LINGER,
        LONGEST_NAME, LONGEST_REASON, LONGEST_WAIT, LONGEST_WORKER, MOST_MAX_BYTES, MOST_MESSAGES,
        MOST_SETTLEMENTS, SHORTEST_LEASE,
    },
    edge::{ListenerLimits, turned_away},
    hand::{Client, wire},
    health::{Health, LIVENESS},
    ops::serve_ops,
    probe::probe,
    route::Router,
    server::{ContractError, serve},
    service::Service,
};

/// The service's full name, as health and reflection call it.
pub const SERVICE: &str = "fetchproxy.v1.FetchService";
