//! The servers at work. A frame of a replica comes to its server, and from there to the leader of its
//! consumer, or to the replicas that listen.

use std::time::Duration;

use bytes::Bytes;
use fetch_proxy::{
    broker::{AckKind, Arrival, ConsumerName, InfoError, PullEnd},
    bus::Incoming,
};

use super::{
    super::{
        history::History,
        jetstream::{Connection, InboxId, JetStream, Time, parse},
    },
    agenda::{Agenda, Event},
    carried::{Ack, Answer, Down, Hop, Up},
    leaders::{Handler, Leaders},
    rights::Rights,
    servers::Servers,
    watcher::{Watcher, Way},
    wires::Wires,
};

/// A server without a leader of JetStream answers INFO with an error after this time (`errRespDelay` of
/// nats-server), so that a leader can be faster.
const ERROR_DELAY: Duration = Duration::from_millis(500);

/// A connection that no replica has.
pub(super) const NOBODY: Connection = Connection(0);

/// The parts of the world that the servers work with.
pub(super) struct Desk<'s> {
    pub(super) model: &'s mut JetStream,
    pub(super) history: &'s mut History,
    pub(super) watcher: Option<&'s mut Box<dyn Watcher>>,
    pub(super) wires: &'s mut Wires,
    pub(super) agenda: &'s mut Agenda,
    pub(super) servers: &'s mut Servers,
    pub(super) leaders: &'s mut Leaders,
    pub(super) rights: &'s Rights,
    pub(super) now: Time,
}

impl Desk<'_> {
    /// A frame of a replica arrives at the server of its wire.
    pub(super) fn receive(&mut self, wire: Connection, what: Up) {
        let Some(server) = self.wires.get(wire).map(|wire| wire.server) else { return };
        if let Some(subject) = self.rights.refused(&what) {
            return self.refuse(wire, what, subject);
        }
        match what {
            Up::Probe(reply) => self.answer(server, wire, reply, Answer::Ok),
            Up::Subscribe(subjects) => {
                let Some(on) = self.wires.get_mut(wire) else { return };
                on.subjects = subjects;
                on.known_at.insert(server);
                for other in (0..self.servers.count()).filter(|other| *other != server) {
                    self.hop((server, other), Hop::Listens(wire), self.now);
                }
            }
            Up::Say { subject, message } => self.say(server, &subject, &message, None),
            Up::Ask { subject, message, reply } => {
                if self.listeners(server, &subject).is_empty() {
                    self.answer(server, wire, reply, Answer::NoResponders);
                } else {
                    let reply = format!("_INBOX.{}.{reply}", wire.0);
                    self.say(server, &subject, &message, Some(&reply));
                }
            }
            Up::Pull { ref name, .. }
            | Up::Ack(Ack { ref name, .. })
            | Up::Info { ref name, .. }
            | Up::Look { ref name, .. }
            | Up::Read { ref name, .. } => {
                let name = name.clone();
                self.meet(&name);
                match self.leaders.handler(&name, server, self.now) {
                    Handler::Leader(at) if at == server => self.lead(server, wire, what),
                    Handler::Leader(at) if self.servers.is_open(server, at, self.now) => {
                        self.hop((server, at), Hop::Up(wire, what), self.now);
                    }
                    Handler::Old(at) => self.lead_no_more(at, wire, what),
                    Handler::Leader(_) | Handler::Nobody => self.nobody(server, wire, what),
                }
            }
        }
    }

    /// A frame arrives over a route.
    pub(super) fn relay(&mut self, from: usize, to: usize, hop: Hop) {
        if !self.servers.is_up(to) {
            return;
        }
        match hop {
            Hop::Down(wire, what) => self.wires.send_down(wire, what, self.now, self.agenda),
            Hop::Listens(wire) => {
                if let Some(on) = self.wires.get_mut(wire).filter(|on| on.server == from) {
                    on.known_at.insert(to);
                }
            }
            Hop::Up(wire, what) => {
                if let Some(name) = consumer_of(&what)
                    && self.leaders.handler(name, to, self.now) == Handler::Leader(to)
                {
                    self.lead(to, wire, what);
                }
            }
        }
    }

    /// Two servers have a route again. Each tells the other what its clients listen on.
    pub(super) fn route_made(&mut self, one: usize, other: usize) {
        for (from, to) in [(one, other), (other, one)] {
            if from == to || !self.servers.is_up(from) {
                continue;
            }
            for wire in self.wires.which(|wire| wire.server == from && wire.ends.server) {
                let Some(on) = self.wires.get_mut(wire) else { continue };
                on.known_at.remove(&to);
                if !on.subjects.is_empty() {
                    self.hop((from, to), Hop::Listens(wire), self.now);
                }
            }
        }
    }

    /// A consumer that nobody has asked for before is led by any server.
    pub(super) fn meet(&mut self, name: &ConsumerName) {
        if self.leaders.get(name).is_none()
            && let Some(Ok(info)) = self.model.info(NOBODY, name, self.now)
        {
            let at = self.agenda.dice.within(0..self.servers.count() as u64) as usize;
            self.leaders.meet(name, at, info.replicas > 1);
        }
    }

    /// The server that leads this consumer has sent something to a wire.
    pub(super) fn send(&mut self, name: Option<&ConsumerName>, wire: Connection, what: Down) {
        let Some(to) = self.wires.get(wire).map(|wire| wire.server) else { return };
        let led = name.and_then(|name| self.leaders.get(name));
        let (from, alone) = led.map_or((to, Time::ZERO), |led| (led.last, led.alone_until));
        let message = matches!(what, Down::Arrival { arrival: Arrival::Message(_), .. });
        // A message leaves when a majority knows of the delivery.
        let leaves = if message { alone.max(self.now) } else { self.now };
        if from == to {
            self.wires.send_down(wire, what, leaves, self.agenda);
        } else {
            self.hop((from, to), Hop::Down(wire, what), leaves);
        }
    }

    fn hop(&mut self, route: (usize, usize), hop: Hop, leaves: Time) {
        self.servers.send(route, hop, (self.now, leaves), self.agenda);
    }

    fn answer(&mut self, from: usize, wire: Connection, reply: u64, answer: Answer) {
        let Some(to) = self.wires.get(wire).map(|wire| wire.server) else { return };
        let down = Down::Answer(reply, answer);
        if from == to {
            self.wires.send_down(wire, down, self.now, self.agenda);
        } else {
            self.hop((from, to), Hop::Down(wire, down), self.now);
        }
    }

    fn end_pull(&mut self, wire: Connection, (inbox, no): (u64, u64), end: PullEnd) {
        let arrival = Down::Arrival { inbox, arrival: Arrival::End { no, end }, poison: false };
        self.wires.send_down(wire, arrival, self.now, self.agenda);
    }

    fn refuse(&mut self, wire: Connection, what: Up, subject: String) {
        let question = match what {
            Up::Pull { inbox, asked, .. } => {
                return self.end_pull(wire, (inbox, asked.no), PullEnd::Permission(subject));
            }
            Up::Ack(Ack { reply, .. }) => reply,
            Up::Info { reply, .. } | Up::Look { reply, .. } | Up::Read { reply, .. } => Some(reply),
            _ => None,
        };
        let refused = Down::Refused { subject, question };
        self.wires.send_down(wire, refused, self.now, self.agenda);
    }

    // The leader of a consumer.

    fn lead(&mut self, server: usize, wire: Connection, what: Up) {
        let now = self.now;
        let alone = consumer_of(&what).and_then(|name| self.leaders.get(name));
        let alone = alone.map_or(Time::ZERO, |led| led.alone_until);
        let by_majority = match &what {
            Up::Ack(ack) => matches!(ack.kind, AckKind::Ack | AckKind::Term(_)),
            what => matches!(what, Up::Pull { .. }),
        };
        if by_majority && now < alone {
            let (from, hop) = (server, Hop::Up(wire, what));
            return self.agenda.at(alone, Event::Hop { from, to: server, hop });
        }
        let side = self.wires.side(wire);
        match what {
            Up::Pull { inbox, name, asked } => {
                self.history.add(now, format_args!("{side}>js pull {name} {asked:?}"));
                let to = InboxId { connection: wire, inbox };
                if !self.model.pull(&name, to, asked, now) {
                    let end = Arrival::End { no: asked.no, end: PullEnd::ConsumerGone };
                    let down = Down::Arrival { inbox, arrival: end, poison: false };
                    self.send(Some(&name), wire, down);
                }
            }
            Up::Ack(ack) => self.take_ack(wire, ack),
            Up::Info { name, reply } => {
                if let Some(info) = self.model.info(wire, &name, now) {
                    self.history.add(now, format_args!("{side}>js info {info:?}"));
                    if let (Some(watcher), Ok(info)) = (&mut self.watcher, &info) {
                        watcher.told(now, &name, info);
                    }
                    let answer = Answer::Info { info: Box::new(info), old: false };
                    self.answer(server, wire, reply, answer);
                }
            }
            Up::Look { name, reply } => {
                let found = self.model.unreadable(&name);
                self.answer(server, wire, reply, Answer::Found(found));
            }
            Up::Read { ack, reply, .. } => {
                let stored = self.model.stored(&ack).map(Box::new);
                self.answer(server, wire, reply, Answer::Stored(stored));
            }
            _ => {}
        }
    }

    fn take_ack(&mut self, wire: Connection, ack: Ack) {
        let now = self.now;
        let Ack { side, subject, kind, reply, by, left, .. } = ack;
        let late = by.is_some_and(|by| now >= by);
        self.history.add(now, format_args!("{side}>js {kind:?} {} late={late}", subject.0));
        self.model.ack(wire, &subject.0, &kind, reply, now);
        for applied in self.model.applied() {
            if let Some(watcher) = &mut self.watcher {
                watcher.applied(now, side, &applied, Way { left, late });
            }
        }
    }

    /// A leader that does not know that it leads no more. It cannot keep anything.
    fn lead_no_more(&mut self, server: usize, wire: Connection, what: Up) {
        let (now, side) = (self.now, self.wires.side(wire));
        let name = consumer_of(&what).cloned();
        let old = name.as_ref().and_then(|name| self.leaders.get(name)?.old.as_ref());
        let Some(old) = old else { return };
        let (until, info) = (old.until, old.info.clone());
        match what {
            Up::Pull { inbox, asked, .. } => {
                let (ends, end) = if now + asked.expires < until {
                    (now + asked.expires, PullEnd::Done)
                } else {
                    (until, PullEnd::LeaderGone)
                };
                let arrival = Arrival::End { no: asked.no, end };
                let what = Down::Arrival { inbox, arrival, poison: false };
                self.agenda.at(ends, Event::Answer { server, wire, what });
            }
            Up::Ack(Ack { subject, kind, reply, .. }) => {
                self.history.add(now, format_args!("{side}>js {kind:?} to an old leader"));
                // It answers an Ack or a Term when a majority has the change.
                if !matches!(kind, AckKind::Nak(_) | AckKind::Progress) {
                    return;
                }
                if let (Some(watcher), Some(of)) = (&mut self.watcher, parse(&subject.0)) {
                    watcher.unkept(now, of.of, &kind);
                }
                if let Some(reply) = reply {
                    self.answer(server, wire, reply, Answer::Ok);
                }
            }
            Up::Info { reply, .. } => {
                self.history.add(now, format_args!("{side}>js info of an old leader"));
                if let (Some(watcher), Some(name)) = (&mut self.watcher, &name) {
                    watcher.told(now, name, &info);
                }
                let answer = Answer::Info { info: Box::new(Ok(info)), old: true };
                self.answer(server, wire, reply, answer);
            }
            _ => {}
        }
    }

    /// Nobody leads, or nobody who leads is reached from this server.
    fn nobody(&mut self, server: usize, wire: Connection, what: Up) {
        match what {
            Up::Pull { inbox, asked, .. } => {
                self.end_pull(wire, (inbox, asked.no), PullEnd::ConsumerGone);
            }
            Up::Ack(Ack { reply: Some(reply), .. }) => {
                self.answer(server, wire, reply, Answer::NoResponders);
            }
            Up::Info { name, reply } => {
                let missing = self.model.info(NOBODY, &name, self.now).and_then(Result::err);
                let answers = self.agenda.dice.percent(50);
                let why = missing.or(answers.then(|| {
                    InfoError::Unavailable("JetStream system temporarily unavailable".to_owned())
                }));
                if let Some(why) = why {
                    let answer = Answer::Info { info: Box::new(Err(why)), old: true };
                    let what = Down::Answer(reply, answer);
                    let when = self.now + ERROR_DELAY;
                    self.agenda.at(when, Event::Answer { server, wire, what });
                }
            }
            _ => {}
        }
    }

    // The replicas that listen.

    /// Passes a message to all that listen on its subject, or an answer to the one that asked.
    fn say(&mut self, server: usize, subject: &str, message: &Bytes, reply: Option<&str>) {
        self.history.add(self.now, format_args!("bus {subject} {} bytes", message.len()));
        if let Some((wire, question)) = asked_by(subject) {
            return self.answer(server, wire, question, Answer::Said(message.clone()));
        }
        for (wire, at) in self.listeners(server, subject) {
            let (subject, message) = (subject.to_owned(), message.clone());
            let reply = reply.map(str::to_owned);
            let said = Down::Said(Incoming { subject, message, reply });
            if at == server {
                self.wires.send_down(wire, said, self.now, self.agenda);
            } else {
                self.hop((server, at), Hop::Down(wire, said), self.now);
            }
        }
    }

    /// The wires whose clients listen on this subject, as this server knows it, each with its own server.
    fn listeners(&self, server: usize, subject: &str) -> Vec<(Connection, usize)> {
        let at = |id: Connection| (id, self.wires.get(id).map_or(server, |wire| wire.server));
        let listens = self.wires.which(|wire| {
            wire.ends.server
                && wire.known_at.contains(&server)
                && (wire.server == server || self.servers.is_open(server, wire.server, self.now))
                && wire.subjects.iter().any(|one| one == subject)
        });
        listens.into_iter().map(at).collect()
    }
}

fn consumer_of(what: &Up) -> Option<&ConsumerName> {
    match what {
        Up::Pull { name, .. }
        | Up::Ack(Ack { name, .. })
        | Up::Info { name, .. }
        | Up::Look { name, .. }
        | Up::Read { name, .. } => Some(name),
        Up::Probe(_) | Up::Subscribe(_) | Up::Say { .. } | Up::Ask { .. } => None,
    }
}

/// The wire and the number of the question that is answered on this subject.
fn asked_by(subject: &str) -> Option<(Connection, u64)> {
    let (wire, question) = subject.strip_prefix("_INBOX.")?.split_once('.')?;
    Some((Connection(wire.parse().ok()?), question.parse().ok()?))
}
