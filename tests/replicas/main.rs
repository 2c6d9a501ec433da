//! Several replicas in front of one NATS, and clients that go to any of them.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

#[path = "../support/mod.rs"]
mod support;

mod forwarding;
mod handover;
mod keys;
mod orphans;
mod pair;
mod rights;
