//! Several replicas in front of one NATS, and clients that go to any of them.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

mod announcements;
mod attempts;
mod consuming;
mod forwarding;
mod handover;
mod incompatible;
mod inspecting;
mod keys;
mod linked;
mod metered;
mod moving;
mod one_call;
mod ownerless;
mod pair;
mod principals;
mod recreated;
mod rights;
mod skew;
mod traces;
mod versions;
