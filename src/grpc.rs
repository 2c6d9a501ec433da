//! The gRPC service: from the bytes of a call to the lessor, and back.
//!
//! `server` composes it. `decode` reads requests into the lessor's words, `encode` writes its answers,
//! `to_status` makes a status of an error, `service` joins the three.
//! `reasons` gives tonic's own errors our reasons. `calls` bounds the calls that run, by
//! the budgets of `budget`; `reading` reads requests within their bounds. `answer` knows which part of
//! an answer was not written. Nothing here decides about leases.

mod answer;
mod budget;
mod calls;
mod decode;
mod encode;
mod protocol;
mod reading;
mod reasons;
mod server;
mod service;
mod to_status;

pub(crate) use self::to_status::to_status;
pub use self::{
    server::{ContractError, serve},
    service::Service,
};

/// The service's full name, as health and reflection call it.
pub const SERVICE: &str = "fetchproxy.v1.FetchService";
