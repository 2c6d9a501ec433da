//! A gRPC service in front of NATS JetStream pull consumers: Fetch messages, then Ack, Nak or Term
//! each by an opaque token.
//!
//! JetStream does not fence: a worker that lost its message by timeout can still settle the
//! delivery that now belongs to another, and JetStream answers OK. Here every delivery in flight
//! is leased, and only a held lease can be settled.
//!
//! An arrow means "may name"; a test enforces it.
//!
//! ```text
//! main   -> app, config, dev, guard, ...   parse, run, exit code
//! app    -> everything                     the only place that wires
//! grpc   -> peer, lessor, keys, token, pb  the only rooms that name tonic
//! peer   -> lessor, bus, broker, keys, pb  replicas that answer for each other
//! lessor -> lease, pump, broker, clock     grants, settles, extends, sweeps
//! nats   -> broker, bus, clock             the only rooms that name async_nats
//! broker, bus -> std, bytes                the ports: traits, their words, their errors
//! lease, pump, token -> std, crypto        pure: no runtime, no clock, no lock, no log
//! ```

#![warn(missing_docs, unreachable_pub)]
#![warn(clippy::print_stdout, clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

pub mod app;
pub mod broker;
pub mod bus;
pub mod clock;
pub mod cluster;
pub mod config;
pub mod dev;
pub mod fd_limit;
pub mod grpc;
pub mod keys;
pub mod lease;
pub mod lessor;
pub mod log_throttle;
pub mod nats;
pub mod pb;
pub mod pump;
pub mod readiness;
pub mod secrets;
pub mod telemetry;
pub mod token;
