//! The end of NATS: takes in what replicas send, and passes it to JetStream or to other replicas.

use bytes::Bytes;
use fetch_proxy::{
    broker::{Arrival, PullEnd},
    bus::Incoming,
};

use super::{
    super::{
        history::History,
        jetstream::{Connection, InboxId, JetStream, Time},
    },
    carried::{Answer, Down, Up},
    watcher::{Watcher, Way},
    wires::Wires,
};

pub(super) struct Servers {
    /// Counts the starts of the server.
    pub(super) start: u64,
    pub(super) up: bool,
}

/// The parts of the world that the servers work with.
pub(super) struct Around<'s> {
    pub(super) model: &'s mut JetStream,
    pub(super) wires: &'s mut Wires,
    pub(super) history: &'s mut History,
    pub(super) watcher: Option<&'s mut Box<dyn Watcher>>,
}

impl Servers {
    pub(super) fn new() -> Self {
        Self { start: 1, up: true }
    }

    /// A frame of a replica arrives.
    pub(super) fn serve(&self, around: Around<'_>, wire: Connection, what: Up, now: Time) {
        let Around { model, wires, history, mut watcher } = around;
        let side = wires.side(wire);
        match what {
            Up::Pull { inbox, name, asked } => {
                history.add(now, format_args!("{side}>js pull {name} {asked:?}"));
                let to = InboxId { connection: wire, inbox };
                if !model.pull(&name, to, asked, now) {
                    let end = PullEnd::ConsumerGone;
                    let arrival = Arrival::End { no: asked.no, end };
                    wires.send_down(wire, Down::Arrival { inbox, arrival, poison: false }, now);
                }
            }
            Up::Ack { subject, kind, reply, by, left } => {
                let late = by.is_some_and(|by| now >= by);
                history.add(now, format_args!("{side}>js {kind:?} {} late={late}", subject.0));
                model.ack(wire, &subject.0, &kind, reply, now);
                for applied in model.applied() {
                    if let Some(watcher) = &mut watcher {
                        watcher.applied(now, side, &applied, Way { left, late });
                    }
                }
            }
            Up::Info { name, reply } => {
                if let Some(info) = model.info(wire, &name, now) {
                    history.add(now, format_args!("{side}>js info {info:?}"));
                    wires.send_down(wire, Down::Answer(reply, Answer::Info(Box::new(info))), now);
                }
            }
            Up::Look { name, reply } => {
                let found = model.unreadable(&name);
                wires.send_down(wire, Down::Answer(reply, Answer::Found(found)), now);
            }
            Up::Pulse(reply) => wires.send_down(wire, Down::Answer(reply, Answer::Ok), now),
            Up::Subscribe(subjects) => {
                if let Some(on) = wires.get_mut(wire) {
                    on.subjects = subjects;
                }
            }
            Up::Say { subject, message } => {
                history.add(now, format_args!("bus {subject} {} bytes", message.len()));
                say(wires, &subject, &message, None, now);
            }
            Up::Ask { subject, message, reply } => {
                if wires.listeners(&subject).is_empty() {
                    wires.send_down(wire, Down::Answer(reply, Answer::NoResponders), now);
                } else {
                    history.add(now, format_args!("bus {subject} {} bytes", message.len()));
                    let reply = format!("_INBOX.{}.{reply}", wire.0);
                    say(wires, &subject, &message, Some(&reply), now);
                }
            }
        }
    }
}

/// Passes a message to all that listen on its subject, or an answer to the one that asked.
fn say(wires: &mut Wires, subject: &str, message: &Bytes, reply: Option<&str>, now: Time) {
    if let Some((wire, question)) = asked_by(subject) {
        return wires.send_down(wire, Down::Answer(question, Answer::Said(message.clone())), now);
    }
    for wire in wires.listeners(subject) {
        let (subject, message) = (subject.to_owned(), message.clone());
        let reply = reply.map(str::to_owned);
        wires.send_down(wire, Down::Said(Incoming { subject, message, reply }), now);
    }
}

/// The wire and the number of the question that is answered on this subject.
fn asked_by(subject: &str) -> Option<(Connection, u64)> {
    let (wire, question) = subject.strip_prefix("_INBOX.")?.split_once('.')?;
    Some((Connection(wire.parse().ok()?), question.parse().ok()?))
}
