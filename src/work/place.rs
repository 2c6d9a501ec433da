//! The place where the work on a message is done: a command on this machine, or a server.

use std::io;

use bytes::Bytes;
use tokio::sync::watch;

use super::{
    command::WorkCommand,
    environment::{request_headers, variables},
    http::WorkServer,
    job::{JobEnd, JobOrder},
};
use crate::pb::{Delivery, delivery::Payload};

/// The place of the work.
#[derive(Debug, Clone)]
pub enum WorkPlace {
    /// A command, which runs once for each message.
    Command(WorkCommand),
    /// A server, which gets each message in a request.
    Http(WorkServer),
}

impl WorkPlace {
    /// Works on a message until it is done, or until `orders` ends the work.
    ///
    /// # Errors
    /// The work cannot begin, for this message and for any other.
    pub(super) async fn work(
        &self,
        stream: &str,
        consumer: &str,
        message: Delivery,
        orders: watch::Receiver<JobOrder>,
    ) -> io::Result<JobEnd> {
        match self {
            Self::Command(command) => {
                let variables = variables(stream, consumer, &message);
                command.run(payload(message), variables, orders).await
            }
            Self::Http(server) => {
                let headers = request_headers(stream, consumer, &message);
                Ok(server.post(payload(message), headers, orders).await)
            }
        }
    }
}

fn payload(message: Delivery) -> Bytes {
    match message.payload {
        Some(Payload::Data(bytes)) => bytes,
        Some(Payload::Text(text)) => text.into(),
        None => Bytes::new(),
    }
}
