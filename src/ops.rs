//! The listener for operators and probes, and the health that it and the listener for clients tell.
//! Serves nothing that a client needs to fetch or settle.

mod health;
mod server;

pub use self::{
    health::{Health, LIVENESS},
    server::serve,
};
