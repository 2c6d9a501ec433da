//! The program as a person or a cluster runs it: its command line, its signals, grpcurl in front
//! of it, an old NATS behind it.

#[path = "../support/mod.rs"]
mod support;

mod cli;
mod dev;
mod drain;
mod grpcurl;
mod old_server;
