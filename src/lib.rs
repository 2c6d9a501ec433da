//! A gRPC service in front of NATS JetStream pull consumers: Fetch messages, then Ack, Nak or Term
//! each by an opaque token.
//!
//! JetStream does not fence: a worker that lost its message by timeout can still settle the
//! delivery that now belongs to another, and JetStream answers OK. Here every delivery in flight
//! is leased, and only a held lease can be settled.
//!
//! The rooms, from the top. A room names only rooms below it, and only those that the list in
//! `tests/house/rooms.rs` allows.
//!
//! ```text
//! main          parses the command line, runs a command, returns the exit code
//! commands      what each subcommand does, and its exit code
//! app           wires all rooms together and drains them in order
//! dev           a private NATS server with samples, for a first look
//! ops           the listener for operators: health, metrics, and a page for people
//! grpc          the contract: requests are read, answers are written
//! admin         the answers for operators: who holds what, at all replicas
//! cluster       the replicas: settling at any of them, hand-over, who is there
//! telemetry     the log: format, level and the thread that writes it
//! config        flags and environment variables, checked
//! refusal_log   the seldom log line of a refused call or token
//! api_error     what went wrong with a call, for its client; pure
//! credentials   the policy, the API keys and the keys of issuers in use, read again when they change
//! nats          the broker and the bus on NATS
//! net           connections of clients: accepted, bounded, closed
//! work          a worker that runs a command for each message, or posts it to a URL
//! audit         the log lines for auditors
//! lessor        leases deliveries to callers: pulls, grants, settles, sweeps
//! signals       the signals that begin an orderly end, and end it early
//! tls           TLS of the client port: its files, handshakes, and who a certificate names
//! traces        spans of calls, and the thread that sends them
//! clock         the only room that reads the time
//! request_log   the log line of a call that has ended
//! client        the client behind the commands that call a running fetch-proxy
//! fd_limit      raises the limit of open files to what the connections need
//! keys          the token keys, read again when their file changes
//! log_throttle  how often a log line that strangers cause may be written
//! readiness     whether this replica may serve, and why not; pure
//! simulated     a machine for tests: clocks, random bytes, tasks
//! access        who calls, and what each caller may do; pure
//! broker        the port to JetStream: a trait, its types, its errors
//! bus           the port to the other replicas: a trait, its types, its errors
//! lease         the lease table; pure
//! limits        limits of the contract and of a listener: numbers; pure
//! lock          takes a lock in spite of an earlier panic
//! metrics       the metrics: families, series, and their page
//! pb            code generated from the contract, and its times
//! pump          decides pulls and answers for one consumer; pure
//! reason        the one table of refusals: code, promise, wait; pure
//! secrets       reads files that hold secrets, within a time limit
//! token         tokens: sealed claims; pure
//! ```

#![warn(missing_docs, unreachable_pub)]
#![warn(clippy::print_stdout, clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

pub mod access;
pub mod admin;
pub mod api_error;
pub mod app;
pub mod audit;
pub mod broker;
pub mod bus;
pub mod client;
pub mod clock;
pub mod cluster;
pub mod commands;
pub mod config;
pub mod credentials;
pub mod dev;
pub mod fd_limit;
pub mod grpc;
pub mod keys;
pub mod lease;
pub mod lessor;
pub mod limits;
mod lock;
pub mod log_throttle;
pub mod metrics;
pub mod nats;
mod net;
pub mod ops;
pub mod pb;
pub mod pump;
pub mod readiness;
pub mod reason;
pub mod refusal_log;
pub mod request_log;
pub mod secrets;
pub mod signals;
pub mod simulated;
pub mod telemetry;
pub mod tls;
pub mod token;
pub mod traces;
pub mod work;
