//! The listener for operators and probes: health, which the listener for clients tells too, metrics, and a page for
//! people.
//! Serves nothing that a client needs to fetch or settle.

mod health;
mod page;
mod scrape;
mod server;

pub use self::{
    health::{Health, LIVENESS},
    page::{NatsShown, StatusSources},
    server::{Pages, serve},
};
