//! The promises of the contract, through a real client, a real proxy and a real nats-server.

#[path = "../support/mod.rs"]
mod support;

mod fetching;
mod fuzz;
mod health;
mod leases;
mod raw;
mod refusals;
mod settling;
