//! The listener for operators and probes: health, which the listener for clients tells too, and metrics.
//! Serves nothing that a client needs to fetch or settle.

mod health;
mod scrape;
mod server;

pub use self::{
    health::{Health, LIVENESS},
    server::{Pages, serve},
};
