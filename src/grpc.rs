//! The gRPC service: from the bytes of a call to the lessor, and back.
//!
//! `server` composes the `layers` that a call passes, and lists them. `decode` reads requests into the
//! lessor's types, `encode` writes its answers, `to_status` makes a status of an error, `service` joins the
//! three. `method` knows the methods, `call` is the record of a call, `received` shows an answer to the traces and to
//! the request log, `admin` has the calls for operators, `budget` counts what calls hold, `answer_memory` is the part of
//! a budget that handlers take from, `settlements` is what Settle, Fetch and Consume share, `consume` runs a Consume, `backend` is what handlers work with. Nothing here decides about leases.

mod admin;
mod allowed_fetch;
mod answer_memory;
mod backend;
mod budget;
mod call;
mod consume;
mod decode;
mod encode;
mod layers;
mod method;
mod received;
mod reflection;
mod server;
mod service;
mod settlements;
mod to_status;

pub(crate) use self::to_status::to_status;
pub use self::{
    admin::{AdminSocketError, serve_admin},
    layers::{FrameHold, FrameHolds},
    method::SERVICE,
    reflection::ContractError,
    server::{Served, serve},
    service::Service,
};
