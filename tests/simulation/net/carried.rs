//! Everything that a wire carries, in both directions.

use bytes::Bytes;
use fetch_proxy::{
    broker::{
        AckKind, AckSubject, Arrival, ConsumerInfo, ConsumerName, InboxEvent, InfoError,
        PullRequest,
    },
    bus::Incoming,
};

use super::super::jetstream::{Answered, Sent, Time};

/// From a replica to the servers. `reply` is the number of a question.
pub(super) enum Up {
    Pull { inbox: u64, name: ConsumerName, asked: PullRequest },
    Ack { subject: AckSubject, kind: AckKind, reply: Option<u64>, by: Option<Time>, left: Time },
    Info { name: ConsumerName, reply: u64 },
    Look { name: ConsumerName, reply: u64 },
    Pulse(u64),
    Subscribe(Vec<String>),
    Say { subject: String, message: Bytes },
    Ask { subject: String, message: Bytes, reply: u64 },
}

/// From the servers to a replica.
pub(super) enum Down {
    Arrival { inbox: u64, arrival: Arrival, poison: bool },
    Answer(u64, Answer),
    Said(Incoming),
}

impl From<Sent> for Down {
    fn from(sent: Sent) -> Self {
        match sent {
            Sent::Message { to, delivery, poison } => {
                let arrival = Arrival::Message(Box::new(delivery));
                Self::Arrival { inbox: to.inbox, arrival, poison }
            }
            Sent::End { to, no, end } => {
                let arrival = Arrival::End { no, end };
                Self::Arrival { inbox: to.inbox, arrival, poison: false }
            }
            Sent::Answer { no, answered, .. } => match answered {
                Answered::Ok => Self::Answer(no, Answer::Ok),
                Answered::NoResponders => Self::Answer(no, Answer::NoResponders),
            },
        }
    }
}

/// The answer to a question.
#[derive(Debug)]
pub(super) enum Answer {
    Ok,
    NoResponders,
    Info(Box<Result<ConsumerInfo, InfoError>>),
    Found(Vec<(u64, String)>),
    Said(Bytes),
}

/// An item of an inbox at its replica.
pub(super) enum Item {
    Arrival(Arrival),
    Ended(InboxEvent),
}
