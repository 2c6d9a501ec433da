//! The whole network at one moment. Makes each event happen at the end of the wire that it is for.

use std::time::Duration;

use fetch_proxy::{
    broker::{Arrival, ConsumerName, PullEnd},
    bus::Incoming,
};
use tokio::sync::{mpsc, oneshot};

use super::{
    super::{
        history::History,
        jetstream::{self, Connection, DeliveryId, JetStream, Sent, Time},
    },
    agenda::{Agenda, Event, Use},
    carried::{Answer, Down, Item, Up},
    desk::Desk,
    elections,
    leaders::Leaders,
    probe::Turn,
    questions::Questions,
    rights::Rights,
    servers::{Found, Node, Servers},
    side::Side,
    watcher::Watcher,
    wires::Wires,
};

pub struct State {
    pub model: JetStream,
    pub history: History,
    pub watcher: Option<Box<dyn Watcher>>,
    pub(super) agenda: Agenda,
    pub(super) wires: Wires,
    pub(super) sides: Vec<Side>,
    pub(super) servers: Servers,
    pub(super) leaders: Leaders,
    pub(super) rights: Rights,
    questions: Questions,
    /// The time of what is carried or done now.
    now: Time,
}

impl State {
    pub(super) fn new(seed: u64, history: History, servers: usize) -> Self {
        Self {
            model: JetStream::new(),
            history,
            watcher: None,
            agenda: Agenda::new(seed),
            wires: Wires::default(),
            sides: Vec::new(),
            servers: Servers::new(servers),
            leaders: Leaders::default(),
            rights: Rights::default(),
            questions: Questions::default(),
            now: Time::ZERO,
        }
    }

    /// A new replica's place.
    pub(super) fn join(&mut self, into: mpsc::UnboundedSender<Incoming>, now: Time) -> usize {
        let together = self.agenda.dice.percent(50);
        self.sides.push(Side::new(into, together));
        let side = self.sides.len() - 1;
        self.agenda.connect_later(side, Use::Deliveries, now);
        self.agenda.connect_later(side, Use::Settling, now);
        side
    }

    /// Replicas so far, those that are gone among them.
    pub fn sides(&self) -> usize {
        self.sides.len()
    }

    /// The leader of this consumer is cut off from the other servers, together with these replicas.
    #[allow(dead_code, reason = "tests/broker uses it")]
    pub fn isolate_leader(&mut self, name: &ConsumerName, with: &[usize], now: Time) {
        let side = self.wires.which(|wire| with.contains(&wire.side)).into_iter().collect();
        self.model.isolate_leader(name, side, now);
    }

    pub(super) fn desk(&mut self) -> Desk<'_> {
        Desk {
            model: &mut self.model,
            history: &mut self.history,
            watcher: self.watcher.as_mut(),
            wires: &mut self.wires,
            agenda: &mut self.agenda,
            servers: &mut self.servers,
            leaders: &mut self.leaders,
            rights: &self.rights,
            now: self.now,
        }
    }

    // Time.

    /// Begins a change at `now`, from outside.
    pub(super) fn begin(&mut self, now: Time) {
        self.now = now;
    }

    /// When something happens next by itself.
    pub(super) fn next_due(&self) -> Option<Time> {
        // Servers that are away let no time pass.
        let due = self.servers.any_up().then(|| self.model.next_due(self.now)).flatten();
        self.agenda.next_due().into_iter().chain(due).min()
    }

    /// Lets everything happen that is due.
    pub(super) fn carry(&mut self, now: Time) {
        self.now = now;
        while let Some(event) = self.agenda.due(now) {
            self.happen(event, now);
            self.settle_down(now);
        }
        if self.servers.any_up() {
            self.model.advance(now);
        }
        self.settle_down(now);
    }

    /// Sends what the model has to send, and tells the watcher.
    pub(super) fn settle_down(&mut self, now: Time) {
        for sent in self.model.sent() {
            let wire = sent.connection();
            let side = self.wires.side(wire);
            self.history.add(now, format_args!("js>{side} {sent:?}"));
            if let Some(watcher) = &mut self.watcher {
                watcher.sent(now, side, &sent);
            }
            let name = match (&sent, sent.inbox()) {
                (Sent::Answer { no, .. }, _) => self.questions.about(*no),
                (_, Some(to)) => self.wires.consumer_of(wire, to.inbox),
                _ => None,
            };
            self.desk().send(name.as_ref(), wire, sent.into());
        }
    }

    /// Makes an event happen at a wire, or at its replica.
    fn happen(&mut self, event: Event, now: Time) {
        let Some(event) = self.park(event) else { return };
        match event {
            Event::ToServer(wire, what) => {
                let there = self.wires.get(wire).filter(|on| on.ends.server && !on.to_server.cut);
                if there.is_some_and(|on| self.servers.is_up(on.server)) {
                    self.desk().receive(wire, what);
                }
            }
            Event::ToClient(wire, what) => {
                if self.wires.get(wire).is_some_and(|on| on.ends.client && !on.to_client.cut) {
                    self.arrive(wire, what, now);
                }
            }
            Event::Hop { from, to, hop } => self.desk().relay(from, to, hop),
            Event::RouteMade(one, other) => self.desk().route_made(one, other),
            Event::Answer { server, wire, what } => {
                if self.servers.is_up(server) {
                    self.wires.send_down(wire, what, now, &mut self.agenda);
                }
            }
            Event::Connect(side, usage) => self.connect(side, usage, now),
            Event::Lost { wire, client: true } => self.lose(wire),
            Event::Lost { wire, client: false } => self.drop_server_end(wire),
            Event::Probe(wire) => self.probe(wire, now),
            Event::Written(wire) => self.wires.write(wire, now, &mut self.agenda),
            Event::Unread(wire) => self.unread(wire, now),
            Event::Elect { name, round } => elections::elect(&mut self.desk(), &name, round),
            Event::OldLeaderEnds => elections::old_leader_ends(&mut self.desk()),
        }
    }

    /// Keeps an event for later, if its replica's process is stopped.
    fn park(&mut self, event: Event) -> Option<Event> {
        let side = match &event {
            Event::ToClient(wire, _)
            | Event::Lost { wire, client: true }
            | Event::Probe(wire)
            | Event::Written(wire) => self.wires.side(*wire),
            Event::Connect(side, _) => *side,
            _ => return Some(event),
        };
        let stopped = self.sides.get_mut(side).and_then(|side| side.stopped.as_mut());
        let Some(stopped) = stopped else { return Some(event) };
        stopped.push(event);
        None
    }

    // The two ends of a wire.

    fn connect(&mut self, side: usize, usage: Use, now: Time) {
        if self.sides[side].dead {
            return;
        }
        match self.find_server(side, usage, now) {
            Found::Later(at) => {
                // A try that fails takes a moment, also where everything else takes none.
                let at = at.max(now + Duration::from_millis(1));
                self.agenda.connect_later(side, usage, at);
            }
            Found::Now(server) => {
                let wire = self.open_wire(side, usage, server);
                self.sides[side].connected(usage, wire);
                if usage == Use::Settling {
                    self.subscribe(side, now);
                    self.agenda.at(now, Event::Probe(wire));
                }
                self.tell_link(side, now);
            }
        }
    }

    /// A server to connect to: the same as that of the other connection, or any.
    pub(super) fn find_server(&mut self, side: usize, usage: Use, now: Time) -> Found {
        let count = self.servers.count();
        let first = self.agenda.dice.within(0..count as u64) as usize;
        let end = &self.sides[side];
        let other = if usage == Use::Settling { end.deliveries } else { end.settling };
        let other = other.filter(|_| end.together).and_then(|wire| self.wires.get(wire));
        let first = other.map_or(first, |wire| wire.server);
        let order: Vec<usize> = (first..first + count).map(|server| server % count).collect();
        self.servers.find(side, &order, now)
    }

    pub(super) fn open_wire(&mut self, side: usize, usage: Use, server: usize) -> Connection {
        let wire = self.wires.open((side, usage), server, &mut self.agenda);
        self.model.connect(wire);
        wire
    }

    /// Tells the servers what this replica listens on.
    pub(super) fn subscribe(&mut self, side: usize, now: Time) {
        let Side { settling, subjects, .. } = &self.sides[side];
        if let Some(wire) = *settling {
            let subscribe = Up::Subscribe(subjects.clone());
            self.wires.send_up(wire, subscribe, now, &mut self.agenda);
        }
    }

    fn tell_link(&mut self, side: usize, now: Time) {
        let wire = self.sides[side].deliveries.and_then(|wire| self.wires.get(wire));
        let server = wire.map(|wire| self.servers.id(wire.server));
        let linked = self.sides[side].tell_link(server);
        if let Some(watcher) = self.watcher.as_mut().filter(|_| linked) {
            watcher.linked(now, side);
        }
    }

    pub(super) fn drop_server_end(&mut self, id: Connection) {
        if let Some(wire) = self.wires.get_mut(id) {
            wire.ends.server = false;
            self.model.disconnect(id);
            self.wires.tidy(id);
        }
    }

    /// The client's end of a wire ends.
    pub(super) fn lose(&mut self, id: Connection) {
        let Some(wire) = self.wires.get_mut(id).filter(|wire| wire.ends.client) else { return };
        wire.ends.client = false;
        let (side, usage) = (wire.side, wire.usage);
        for (_, inbox) in std::mem::take(&mut wire.inboxes).into_values() {
            let _ = inbox.send(Item::Lost);
        }
        if let Some(watcher) = &mut self.watcher {
            watcher.learned(self.now, side);
            watcher.broke(self.now, side);
        }
        // The server notices after everything that was written.
        self.wires.close(id, true, self.now, &mut self.agenda);
        self.wires.tidy(id);
        self.questions.forget_wire(id);
        let end = &mut self.sides[side];
        end.lost(usage, id);
        if usage == Use::Dedicated {
            return;
        }
        if !end.dead {
            self.agenda.connect_later(side, usage, self.now);
        }
        self.tell_link(side, self.now);
    }

    /// The server closes a wire. The client notices after everything that was sent to it.
    pub(super) fn close_by_server(&mut self, wire: Connection, now: Time) {
        self.drop_server_end(wire);
        self.wires.close(wire, false, now, &mut self.agenda);
    }

    /// A frame arrives at its replica.
    fn arrive(&mut self, id: Connection, what: Down, now: Time) {
        let Some(wire) = self.wires.get_mut(id) else { return };
        let sign = match &what {
            Down::Arrival { arrival: Arrival::End { end, .. }, .. } => *end == PullEnd::LeaderGone,
            Down::Answer(_, Answer::Info { old, .. }) => !old,
            Down::Arrival { .. } | Down::Answer(..) | Down::Said(_) | Down::Refused { .. } => false,
        };
        if let Some(watcher) = self.watcher.as_mut().filter(|_| sign) {
            watcher.learned(now, wire.side);
        }
        match what {
            // The library hangs up.
            Down::Arrival { poison: true, .. } => self.lose(id),
            Down::Arrival { inbox, arrival, .. } => {
                if let (Some(watcher), Arrival::Message(delivery)) = (&mut self.watcher, &arrival) {
                    watcher.arrived(now, DeliveryId::of(delivery.published));
                }
                if let Some((_, inbox)) = wire.inboxes.get(&inbox) {
                    let _ = inbox.send(Item::Arrival(arrival));
                }
            }
            Down::Answer(question, answer) => {
                if wire.usage == Use::Settling {
                    let turn = wire.probe.echo(question, now);
                    turn.into_iter().for_each(|at| self.agenda.at(at, Event::Probe(id)));
                }
                self.questions.answer(question, answer);
            }
            Down::Said(incoming) => drop(self.sides[wire.side].into.send(incoming)),
            Down::Refused { subject, question } => {
                wire.refused.push((now, subject.clone()));
                let name = question.and_then(|_| jetstream::parse(&subject)).map(|ack| ack.name);
                if let (Some(watcher), Some(name)) = (&mut self.watcher, name) {
                    watcher.refused(now, wire.side, &name);
                }
                if let Some(question) = question {
                    self.questions.answer(question, Answer::Refused(subject));
                }
            }
        }
    }

    // The library of a replica.

    /// A new question on this wire, and the place where its answer arrives.
    pub(super) fn ask(
        &mut self,
        wire: Connection,
        about: Option<ConsumerName>,
    ) -> (u64, oneshot::Receiver<Answer>) {
        let number = self.agenda.number();
        (number, self.questions.ask(number, wire, about))
    }

    /// A settlement was given to this wire that must arrive by `by`.
    pub(super) fn must_arrive(&mut self, wire: Connection, by: Time, now: Time) {
        if let Some(on) = self.wires.get_mut(wire) {
            let turn = on.probe.must_arrive(by, now);
            self.agenda.at(turn.max(now), Event::Probe(wire));
        }
    }

    fn probe(&mut self, id: Connection, now: Time) {
        let Some(wire) = self.wires.get_mut(id).filter(|wire| wire.ends.client) else { return };
        match wire.probe.turn(now) {
            Turn::Wait => {}
            Turn::End => {
                self.history.add(now, format_args!("no echo on {id:?}"));
                self.lose(id);
            }
            Turn::Send => {
                let number = self.agenda.number();
                let turn = wire.probe.sent(number, now);
                self.agenda.at(turn, Event::Probe(id));
                self.wires.send_up(id, Up::Probe(number), now, &mut self.agenda);
            }
        }
    }

    /// The server has waited for its client to read. It closes the wire, if the client still does not.
    fn unread(&mut self, id: Connection, now: Time) {
        let Some(wire) = self.wires.get(id).filter(|wire| wire.ends.server) else { return };
        let of_wire = |event: &&Event| matches!(event, Event::ToClient(wire, _) if *wire == id);
        let parked = self.sides.get(wire.side).and_then(|side| side.stopped.as_ref());
        let parked = parked.is_some_and(|events| events.iter().find(of_wire).is_some());
        let stalled = wire.to_client.stalled > now;
        // The buffers of both kernels may take everything that there is.
        if (parked || stalled) && self.agenda.dice.percent(50) {
            self.history.add(now, format_args!("slow consumer on {id:?}"));
            self.close_by_server(id, now);
        }
    }

    /// A replica can connect to some server now.
    pub(super) fn reaches_any(&self, side: usize, now: Time) -> bool {
        (0..self.servers.count()).any(|server| {
            self.servers.is_up(server)
                && self.servers.parted(Node::Replica(side), Node::Server(server), now).is_none()
        })
    }
}
