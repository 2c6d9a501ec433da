//! The program as a person or a cluster runs it: its command line, its signals, grpcurl by its
//! page, the page for operators, and an old NATS behind it.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

mod access;
mod admin;
mod admission;
mod audit;
mod cli;
mod client;
mod client_tls;
mod dev;
mod drain;
mod fairness;
mod grpcurl;
mod identity;
mod jetstream;
mod log;
mod old_server;
mod operations;
mod operators;
mod page;
mod policy;
mod quotas;
mod request_log;
mod status;
mod tls;
mod tls_page;
mod tokens;
mod traces;
mod tutorial;
mod work;
