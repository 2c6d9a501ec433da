//! The network between replicas and NATS, and the ends of both. A replica's broker and bus are one end, and
//! the model of JetStream is the other end.
//!
//! ```text
//!  replica ── SimBroker ──▶ wire: two lanes, each in order ──▶ servers: JetStream, bus
//!                 ▲                 │ delay, stall, cut                   │
//!                 └─────────────────┴─────────────────────────────────────┘
//! ```
//! - `carried` lists what is carried, and `questions` who waits for an answer.
//! - `wires` carries it: the wires, their lanes, and everything that is under way, by time.
//! - `servers` is the end of NATS, and `side` the end of one replica.
//! - `state` puts them together, and makes each event happen. `network` is the handle on it, and its clock.
//! - `broker` and `inbox` are the ports of the real code.
//!
//! Everything under way stands in one queue, by its time and then by the order in which it was sent. One
//! task takes it from there, so nothing here depends on the scheduler.

mod broker;
mod carried;
mod inbox;
mod network;
mod questions;
mod servers;
mod side;
mod state;
mod watcher;
mod wires;

pub use self::{
    broker::SimBroker,
    network::Net,
    watcher::{Watcher, Way},
    wires::Weather,
};
