//! The wires, and all that is under way on them, by the time at which it happens.
//!
//! Each lane of a wire keeps its order. Two lanes have no common order.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use testkit::dice::Dice;
use tokio::sync::mpsc;

use super::{
    super::jetstream::{Connection, Time},
    carried::{Down, Item, Up},
};

/// How the network is at the moment.
#[derive(Debug, Clone)]
pub struct Weather {
    /// One way, in milliseconds.
    pub delay: Range<u64>,
    /// Until the next try to connect, in milliseconds.
    pub reconnect: Range<u64>,
}

impl Weather {
    /// Everything arrives at once.
    pub fn instant() -> Self {
        Self { delay: 0..1, reconnect: 0..1 }
    }
}

/// What a replica uses a wire for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Deliveries,
    Settling,
    Dedicated,
}

pub(super) struct Wire {
    pub(super) side: usize,
    pub(super) usage: Use,
    /// The client's end takes the wire for open.
    pub(super) client: bool,
    /// The server's end takes the wire for open.
    pub(super) server: bool,
    pub(super) to_server: Lane,
    pub(super) to_client: Lane,
    pub(super) inboxes: BTreeMap<u64, mpsc::UnboundedSender<Item>>,
    /// The subjects that the server knows its client to listen on.
    pub(super) subjects: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lane {
    /// Nothing arrives before what was sent before it.
    last: Time,
    stalled: Time,
    /// Frames under way are lost.
    pub(super) cut: bool,
}

impl Lane {
    /// When a frame arrives that would take until `arrives` on a free lane.
    fn take(&mut self, arrives: Time) -> Time {
        self.last = self.last.max(arrives).max(self.stalled);
        self.last
    }

    fn stall(&mut self, until: Time) {
        self.stalled = self.stalled.max(until);
        self.last = self.last.max(until);
    }
}

pub(super) enum Event {
    ToServer(Connection, Up),
    ToClient(Connection, Down),
    Connect(usize, Use),
    /// An end of a wire notices that it is cut.
    Lost {
        wire: Connection,
        client: bool,
    },
    /// A question behind a settlement must have been answered by now.
    Pulse(Connection, u64),
}

pub(super) struct Wires {
    pub(super) weather: Weather,
    pub(super) dice: Dice,
    wires: BTreeMap<Connection, Wire>,
    queue: BTreeMap<(Time, u64), Event>,
    serial: u64,
}

impl Wires {
    pub(super) fn new(seed: u64) -> Self {
        Self {
            weather: Weather::instant(),
            dice: Dice::new(seed, 0),
            wires: BTreeMap::new(),
            queue: BTreeMap::new(),
            serial: 0,
        }
    }

    /// A number that nothing else has.
    pub(super) fn number(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    pub(super) fn open(&mut self, side: usize, usage: Use) -> Connection {
        let id = Connection(self.number());
        let lane = Lane::default();
        let wire = Wire {
            side,
            usage,
            client: true,
            server: true,
            to_server: lane,
            to_client: lane,
            inboxes: BTreeMap::new(),
            subjects: Vec::new(),
        };
        self.wires.insert(id, wire);
        id
    }

    pub(super) fn get(&self, id: Connection) -> Option<&Wire> {
        self.wires.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: Connection) -> Option<&mut Wire> {
        self.wires.get_mut(&id)
    }

    /// Forgets a wire that neither end takes for open.
    pub(super) fn tidy(&mut self, id: Connection) {
        if self.wires.get(&id).is_some_and(|wire| !wire.client && !wire.server) {
            self.wires.remove(&id);
        }
    }

    pub(super) fn all(&self) -> Vec<Connection> {
        self.wires.keys().copied().collect()
    }

    /// The replica of a wire, or an impossible one.
    pub(super) fn side(&self, id: Connection) -> usize {
        self.wires.get(&id).map_or(usize::MAX, |wire| wire.side)
    }

    pub(super) fn of(&self, side: usize) -> Vec<Connection> {
        let of = self.wires.iter().filter(|(_, wire)| wire.side == side);
        of.map(|(id, _)| *id).collect()
    }

    /// The wires whose servers know that their clients listen on this subject.
    pub(super) fn listeners(&self, subject: &str) -> Vec<Connection> {
        let listens = |wire: &Wire| wire.server && wire.subjects.iter().any(|one| one == subject);
        self.wires.iter().filter(|(_, wire)| listens(wire)).map(|(id, _)| *id).collect()
    }

    // The time at which things happen.

    pub(super) fn at(&mut self, when: Time, event: Event) {
        let number = self.number();
        self.queue.insert((when, number), event);
    }

    pub(super) fn next_due(&self) -> Option<Time> {
        self.queue.first_key_value().map(|((at, _), _)| *at)
    }

    /// The first event that is due, in order.
    pub(super) fn due(&mut self, now: Time) -> Option<Event> {
        let first = self.queue.first_entry().filter(|first| first.key().0 <= now)?;
        Some(first.remove())
    }

    pub(super) fn connect_later(&mut self, side: usize, usage: Use, now: Time) {
        let wait = self.dice.millis(self.weather.reconnect.clone());
        self.at(now + wait, Event::Connect(side, usage));
    }

    pub(super) fn send_up(&mut self, id: Connection, what: Up, now: Time) {
        let arrives = now + self.delay();
        if let Some(wire) = self.wires.get_mut(&id).filter(|wire| wire.client) {
            let when = wire.to_server.take(arrives);
            self.at(when, Event::ToServer(id, what));
        }
    }

    pub(super) fn send_down(&mut self, id: Connection, what: Down, now: Time) {
        let arrives = now + self.delay();
        if let Some(wire) = self.wires.get_mut(&id).filter(|wire| wire.server) {
            let when = wire.to_client.take(arrives);
            self.at(when, Event::ToClient(id, what));
        }
    }

    fn delay(&mut self) -> Duration {
        self.dice.millis(self.weather.delay.clone())
    }

    // Accidents.

    /// Nothing of this replica's wires arrives before `until`: to the servers, from them, or both.
    pub(super) fn stall(&mut self, side: usize, (up, down): (bool, bool), until: Time) {
        for wire in self.wires.values_mut().filter(|wire| wire.side == side) {
            if up {
                wire.to_server.stall(until);
            }
            if down {
                wire.to_client.stall(until);
            }
        }
        self.hold_up(side, (up, down), until);
    }

    /// Frames that are under way wait, too.
    fn hold_up(&mut self, side: usize, (up, down): (bool, bool), until: Time) {
        let Self { wires, queue, .. } = self;
        let of_side =
            |wire: &Connection| wires.get(wire).is_some_and(|wire: &Wire| wire.side == side);
        let held = |event: &Event| match event {
            Event::ToServer(wire, _) => up && of_side(wire),
            Event::ToClient(wire, _) => down && of_side(wire),
            Event::Connect(..) | Event::Lost { .. } | Event::Pulse(..) => false,
        };
        let early = queue.range(..(until, 0)).filter(|(_, event)| held(event));
        let early: Vec<(Time, u64)> = early.map(|(key, _)| *key).collect();
        for key in early {
            if let Some(event) = queue.remove(&key) {
                queue.insert((until, key.1), event);
            }
        }
    }

    /// The wires of this replica break. Each end notices at its own time. `keep`: the frames that the replica
    /// has sent still arrive.
    pub(super) fn cut(&mut self, side: usize, (client, server): (Time, Time), keep: bool) {
        for id in self.of(side) {
            if let Some(wire) = self.wires.get_mut(&id) {
                wire.to_client.cut = true;
                wire.to_server.cut |= !keep;
            }
            self.at(client, Event::Lost { wire: id, client: true });
            self.at(server, Event::Lost { wire: id, client: false });
        }
    }
}
