//! The whole network at one moment: makes each event happen, and owns the accidents.

use std::time::Duration;

use fetch_proxy::{
    broker::{Arrival, ConsumerName, InboxEvent, PullEnd},
    bus::Incoming,
};
use tokio::sync::{mpsc, oneshot};

use super::{
    super::{
        history::History,
        jetstream::{Connection, DeliveryId, JetStream, Time},
    },
    carried::{Answer, Down, Item},
    questions::Questions,
    servers::{Around, Servers},
    side::Side,
    watcher::Watcher,
    wires::{Event, Use, Weather, Wire, Wires},
};

/// A process that has gone closes its wires this much later.
const CLOSING: Duration = Duration::from_millis(1);

pub struct State {
    pub model: JetStream,
    pub history: History,
    pub watcher: Option<Box<dyn Watcher>>,
    pub(super) wires: Wires,
    pub(super) sides: Vec<Side>,
    pub(super) servers: Servers,
    questions: Questions,
    /// The time of what is carried or done now.
    now: Time,
}

impl State {
    pub(super) fn new(seed: u64, history: History) -> Self {
        Self {
            model: JetStream::new(),
            history,
            watcher: None,
            wires: Wires::new(seed),
            sides: Vec::new(),
            servers: Servers::new(),
            questions: Questions::default(),
            now: Duration::ZERO,
        }
    }

    // The operator and the weather.

    pub fn set_weather(&mut self, weather: Weather) {
        self.wires.weather = weather;
    }

    /// A new replica's place.
    pub(super) fn join(&mut self, into: mpsc::UnboundedSender<Incoming>, now: Time) -> usize {
        self.sides.push(Side::new(into));
        let side = self.sides.len() - 1;
        self.wires.connect_later(side, Use::Deliveries, now);
        self.wires.connect_later(side, Use::Settling, now);
        side
    }

    /// Replicas so far, those that are gone among them.
    pub fn sides(&self) -> usize {
        self.sides.len()
    }

    /// The leader of this consumer is cut off from the other servers, together with these replicas.
    #[allow(dead_code, reason = "tests/broker uses it")]
    pub fn isolate_leader(&mut self, name: &ConsumerName, with: &[usize], now: Time) {
        let side = with.iter().flat_map(|side| self.wires.of(*side)).collect();
        self.model.isolate_leader(name, side, now);
    }

    /// The replica's process is gone: both ends of its wires are closed. The frames that it had sent still
    /// arrive.
    pub fn kill(&mut self, side: usize, now: Time) {
        self.sides[side].dead = true;
        for wire in self.wires.of(side) {
            self.lose(wire, true, InboxEvent::Lost);
            self.wires.at(now + CLOSING, Event::Lost { wire, client: false });
        }
    }

    /// Connections can be made or not.
    pub fn reach(&mut self, side: usize, reachable: bool) {
        self.sides[side].reachable = reachable;
    }

    /// Nothing of this replica's wires arrives before `until`: to the servers, from them, or both.
    pub fn stall(&mut self, side: usize, lanes: (bool, bool), until: Time) {
        self.wires.stall(side, lanes, until);
    }

    /// The wires of this replica break. Each end notices at its own time. `keep`: the frames that the replica
    /// has sent still arrive.
    pub fn cut(&mut self, side: usize, ends: (Time, Time), keep: bool) {
        self.wires.cut(side, ends, keep);
    }

    /// The server goes, with all connections.
    pub fn stop_server(&mut self) {
        self.servers.up = false;
        for wire in self.wires.all() {
            self.drop_server_end(wire);
            self.lose(wire, true, InboxEvent::Lost);
        }
    }

    pub fn start_server(&mut self, forgets: Duration, memory: bool, now: Time) {
        if self.servers.up {
            self.stop_server();
        }
        self.servers = Servers { start: self.servers.start + 1, up: true };
        self.model.restart(forgets, memory, now);
    }

    // Time.

    /// Begins a change at `now`, from outside.
    pub(super) fn begin(&mut self, now: Time) {
        self.now = now;
    }

    /// When something happens next by itself.
    pub(super) fn next_due(&self) -> Option<Time> {
        // A server that is away lets no time pass.
        let due = self.servers.up.then(|| self.model.next_due(self.now)).flatten();
        self.wires.next_due().into_iter().chain(due).min()
    }

    /// Lets everything happen that is due.
    pub(super) fn carry(&mut self, now: Time) {
        self.now = now;
        while let Some(event) = self.wires.due(now) {
            self.happen(event, now);
            self.settle_down(now);
        }
        if self.servers.up {
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
            self.wires.send_down(wire, sent.into(), now);
        }
    }

    fn happen(&mut self, event: Event, now: Time) {
        match event {
            Event::ToServer(wire, what) => {
                let there = |on: &Wire| on.server && !on.to_server.cut;
                if self.servers.up && self.wires.get(wire).is_some_and(there) {
                    let Self { model, wires, history, servers, watcher, .. } = self;
                    let watcher = watcher.as_mut();
                    servers.serve(Around { model, wires, history, watcher }, wire, what, now);
                }
            }
            Event::ToClient(wire, what) => {
                let there = |on: &Wire| on.client && !on.to_client.cut;
                if self.wires.get(wire).is_some_and(there) {
                    self.arrive(wire, what, now);
                }
            }
            Event::Connect(side, usage) => self.connect(side, usage, now),
            Event::Lost { wire, client: true } => self.lose(wire, true, InboxEvent::Lost),
            Event::Lost { wire, client: false } => self.drop_server_end(wire),
            Event::Pulse(wire, question) => {
                if self.questions.forget(question) {
                    self.history.add(now, format_args!("pulse missed on {wire:?}"));
                    // The kernel still sends its part; the part of the library ends here.
                    let kept = self.wires.dice.percent(50);
                    if let Some(on) = self.wires.get_mut(wire) {
                        on.to_server.cut |= !kept;
                    }
                    self.lose(wire, true, InboxEvent::Lost);
                    self.wires.at(now + CLOSING, Event::Lost { wire, client: false });
                }
            }
        }
    }

    // The two ends of a wire.

    fn connect(&mut self, side: usize, usage: Use, now: Time) {
        let end = &self.sides[side];
        if end.dead {
            return;
        }
        if !self.servers.up || !end.reachable {
            return self.wires.connect_later(side, usage, now);
        }
        let wire = self.open_wire(side, usage);
        self.sides[side].connected(usage, wire);
        if usage == Use::Settling {
            self.subscribe(side, now);
        }
        self.sides[side].tell_link(self.servers.start);
    }

    pub(super) fn open_wire(&mut self, side: usize, usage: Use) -> Connection {
        let wire = self.wires.open(side, usage);
        self.model.connect(wire);
        wire
    }

    /// Tells the servers what this replica listens on.
    pub(super) fn subscribe(&mut self, side: usize, now: Time) {
        let Side { settling, subjects, .. } = &self.sides[side];
        if let Some(wire) = *settling {
            let subscribe = super::carried::Up::Subscribe(subjects.clone());
            self.wires.send_up(wire, subscribe, now);
        }
    }

    fn drop_server_end(&mut self, id: Connection) {
        if let Some(wire) = self.wires.get_mut(id) {
            wire.server = false;
            self.model.disconnect(id);
            self.wires.tidy(id);
        }
    }

    /// The client's end of a wire ends. `again`: it connects again.
    fn lose(&mut self, id: Connection, again: bool, how: InboxEvent) {
        let Some(wire) = self.wires.get_mut(id).filter(|wire| wire.client) else { return };
        wire.client = false;
        let (side, usage) = (wire.side, wire.usage);
        for inbox in std::mem::take(&mut wire.inboxes).into_values() {
            let _ = inbox.send(Item::Ended(how));
        }
        if let Some(watcher) = &mut self.watcher {
            watcher.learned(self.now, side);
        }
        self.wires.tidy(id);
        self.questions.forget_wire(id);
        let end = &mut self.sides[side];
        end.lost(usage, id);
        if usage == Use::Dedicated {
            return;
        }
        if again && !end.dead {
            self.wires.connect_later(side, usage, self.now);
        }
        self.sides[side].tell_link(self.servers.start);
    }

    /// A replica closes a wire that is its own.
    pub(super) fn hang_up(&mut self, wire: Connection, now: Time) {
        self.lose(wire, false, InboxEvent::Lost);
        self.wires.at(now + CLOSING, Event::Lost { wire, client: false });
    }

    /// A frame arrives at its replica.
    fn arrive(&mut self, id: Connection, what: Down, now: Time) {
        let Some(wire) = self.wires.get(id) else { return };
        let sign = match &what {
            Down::Arrival { arrival: Arrival::End { end, .. }, .. } => *end == PullEnd::LeaderGone,
            Down::Answer(_, Answer::Info(_)) => true,
            Down::Arrival { .. } | Down::Answer(..) | Down::Said(_) => false,
        };
        if let Some(watcher) = self.watcher.as_mut().filter(|_| sign) {
            watcher.learned(now, wire.side);
        }
        match what {
            Down::Arrival { poison: true, .. } => {
                self.lose(id, true, InboxEvent::Broken);
                self.wires.at(now, Event::Lost { wire: id, client: false });
            }
            Down::Arrival { inbox, arrival, .. } => {
                if let (Some(watcher), Arrival::Message(delivery)) = (&mut self.watcher, &arrival) {
                    watcher.arrived(now, DeliveryId::of(delivery.published));
                }
                if let Some(inbox) = wire.inboxes.get(&inbox) {
                    let _ = inbox.send(Item::Arrival(arrival));
                }
            }
            Down::Answer(question, answer) => self.questions.answer(question, answer),
            Down::Said(incoming) => drop(self.sides[wire.side].into.send(incoming)),
        }
    }

    /// A new question on this wire, and the place where its answer arrives.
    pub(super) fn ask(&mut self, wire: Connection) -> (u64, oneshot::Receiver<Answer>) {
        let number = self.wires.number();
        (number, self.questions.ask(number, wire))
    }
}
