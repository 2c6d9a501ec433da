//! Several replicas in front of one NATS, and clients that go to any of them.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

mod anew;
mod forwarding;
mod handover;
mod keys;
mod linked;
mod moving;
mod orphans;
mod pair;
mod rights;
mod skew;
mod strangers;
mod telling;
mod versions;
