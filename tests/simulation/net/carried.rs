//! Everything that wires and routes carry, in both directions.

use bytes::Bytes;
use fetch_proxy::{
    broker::{
        AckKind, AckSubject, Arrival, ConsumerInfo, ConsumerName, Delivery, InfoError, PullRequest,
    },
    bus::Incoming,
};

use super::super::jetstream::{Answered, Connection, Sent, Time};

/// From a replica to a server. `reply` is the number of a question.
pub(super) enum Up {
    Pull {
        inbox: u64,
        name: ConsumerName,
        asked: PullRequest,
    },
    Ack(Ack),
    Info {
        name: ConsumerName,
        reply: u64,
    },
    /// Searches for messages that break connections.
    Look {
        name: ConsumerName,
        reply: u64,
    },
    /// Reads the message of a delivery again.
    Read {
        name: ConsumerName,
        ack: AckSubject,
        reply: u64,
    },
    /// A message of a replica to itself.
    Probe(u64),
    Subscribe(Vec<String>),
    Say {
        subject: String,
        message: Bytes,
    },
    Ask {
        subject: String,
        message: Bytes,
        reply: u64,
    },
}

pub(super) struct Ack {
    /// The replica that sends it. Its wire may be gone when the ack arrives.
    pub(super) side: usize,
    pub(super) name: ConsumerName,
    pub(super) subject: AckSubject,
    pub(super) kind: AckKind,
    pub(super) reply: Option<u64>,
    pub(super) by: Option<Time>,
    /// When it was given to the library.
    pub(super) left: Time,
}

/// From a server to a replica.
pub(super) enum Down {
    Arrival {
        inbox: u64,
        arrival: Arrival,
        poison: bool,
    },
    Answer(u64, Answer),
    Said(Incoming),
    /// The server refuses a subject. The question that was asked there has no answer.
    Refused {
        subject: String,
        question: Option<u64>,
    },
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

/// From one server to another.
pub(super) enum Hop {
    /// A request of a client of the first, to the leader at the second.
    Up(Connection, Up),
    /// To a client of the second.
    Down(Connection, Down),
    /// The client of this wire at the first listens.
    Listens(Connection),
}

/// The answer to a question.
#[derive(Debug)]
pub(super) enum Answer {
    Ok,
    NoResponders,
    Info {
        info: Box<Result<ConsumerInfo, InfoError>>,
        /// It shows a leader that does not know yet that another one leads.
        old: bool,
    },
    Found(Vec<(u64, String)>),
    Stored(Option<Box<Delivery>>),
    Said(Bytes),
    Refused(String),
}

/// An item of an inbox at its replica.
pub(super) enum Item {
    Arrival(Arrival),
    /// The wire is lost.
    Lost,
}
