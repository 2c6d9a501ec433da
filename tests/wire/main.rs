//! The promises of the contract, through a real client, a real proxy and a real nats-server.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

mod attempts;
mod consuming;
mod ending;
mod fetching;
mod fuzz;
mod fuzz_frames;
mod health;
mod keeping;
mod leases;
mod metrics;
mod one_call;
mod ordering;
mod payloads;
mod raw;
mod refusals;
mod settling;
mod silent;
