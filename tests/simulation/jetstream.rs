//! A model of JetStream: one cluster of NATS servers, its streams and their pull consumers. The model is
//! a pure state machine. `now` is an argument, and [`JetStream::sent`] returns everything that it sends.
//!
//! The model does the same as the real servers, also where that helps nobody:
//!
//! 1. A delivery is known by its stream sequence alone. A stale ack subject settles the delivery of
//!    the present holder, and the answer is a success.
//! 2. A nacked message goes before a new one, in the order of the Naks, and passes `max_ack_pending`. An
//!    expired message goes in the order of the stream, after the messages that were nacked before.
//! 3. A `max_deliver` above 1 is looked at only when a pull asks for the next message.
//! 4. The stored time of a delivery is the time of publication, and not the time of the delivery. So a
//!    leader that comes, or comes back, hands out unsettled messages that are older than their ack wait.
//! 5. A plain Nak is only in the leader's memory. Progress and delayed Naks are answered before they
//!    are replicated. Without copies, everything is answered before it is on the disk.
//! 6. With copies, a delivery and the answer to an Ack or Term leave after a majority has the change. A
//!    leader that is cut off from the majority still answers everything else for some time.
//!
//! Times are counted from the beginning of the world. Comments on lines name the part of nats-server that
//! was read (main 1787eee). "Measured" means nats-server 2.15.1. tests/broker/contract holds what a client
//! can see, on the model and on real servers.

mod ack_subject;
mod again;
mod config;
mod consumer;
mod journal;
mod leadership;
mod outbox;
mod pulls;
mod servers;
mod state;
mod stream;
mod surroundings;
mod types;

pub use self::{
    ack_subject::parse,
    config::Config,
    servers::JetStream,
    types::{Answered, Applied, Connection, DeliveryId, InboxId, Sent, Time},
};
