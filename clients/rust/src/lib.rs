#![doc = include_str!("../README.md")]

mod client;
mod connection;
mod consume;
mod error;
mod event;
mod fetching;
mod hand;
mod job;
mod lease;
mod message;
#[cfg(feature = "opentelemetry")]
pub mod otel;
mod outcome;
mod stop;
mod stream;
#[cfg(feature = "testing")]
pub mod testing;
mod worker;

pub use client::{Client, Effect, FetchOptions, Fetched, Settlement};
pub use connection::Credentials;
pub use error::Error;
pub use event::{Event, log_event};
pub use job::{Handling, Source, Tracer};
pub use message::{Envelope, Headers, Message, Rejected, RejectedCause};
pub use outcome::{Failure, Nak, Term};
pub use stop::Stop;
pub use tonic::Code;
pub use worker::{Mode, Worker};

/// The generated contract.
#[allow(clippy::all, missing_docs, reason = "generated")]
mod pb {
    include!("gen/fetchproxy.v1.rs");
}
