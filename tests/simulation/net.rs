//! The network between replicas and NATS, and the ends of both. A replica's broker and bus are one end, and
//! the model of JetStream is the other end.
//!
//! ```text
//!  replica ── broker ──▶ library ──▶ wire ──▶ server ──▶ route ──▶ server of the leader: JetStream
//!     ▲                                 │        │
//!     └──────── wire ◀── route ◀────────┴────────┴──▶ the replicas that listen
//! ```
//! - `carried` lists everything that is carried, and `questions` who waits for an answer.
//! - `agenda` has everything that is under way, by time, and the dice.
//! - `wires` are the wires between replicas and servers. `library` and `probe` are the ends of a wire that
//!   `src/nats` and its client library are in a real replica.
//! - `servers` are the NATS servers and the routes between them, `leaders` and `elections` say who leads,
//!   `rights` what is refused, and `desk` does the work of a server.
//! - `side` is the end of one replica. `state` puts all of them together.
//! - `network` is the handle on it, and its clock. `accidents` is all that can happen to it.
//! - `broker`, `inbox`, `requests` and `settle` are the ports of the real code.
//!
//! Everything under way stands in one agenda, by its time and then by the order in which it was sent. One
//! task takes it from there, so nothing here depends on the scheduler.

mod accidents;
mod agenda;
mod broker;
mod carried;
mod desk;
mod elections;
mod inbox;
mod leaders;
mod library;
mod network;
mod probe;
mod questions;
mod requests;
mod rights;
mod servers;
mod settle;
mod side;
mod state;
mod watcher;
mod wires;

pub use self::{
    agenda::Weather,
    broker::SimBroker,
    elections::Stop,
    network::Net,
    rights::Right,
    servers::Node,
    watcher::{Watcher, Way},
    wires::Lanes,
};
