//! Faults between a client, the proxy and NATS, made on purpose. After each fault the delivery log
//! is checked. With `--nocapture` each test prints what it has measured.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

mod arrival;
mod attempts;
mod backlog;
mod cancelled;
mod consuming;
mod cut_answers;
mod edge;
mod greedy;
mod half_closed;
mod imports;
mod leaving;
mod nats_away;
mod poison;
mod remote_leader;
mod replicated;
mod restarts;
mod rights;
mod run;
mod short_lived;
mod stale_nak;
mod stopped;
mod unwritten;
mod wire;
