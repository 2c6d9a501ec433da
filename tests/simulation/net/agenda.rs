//! Everything that is under way or due, by its time, and what chance decides about it.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use fetch_proxy::broker::ConsumerName;
use testkit::dice::Dice;

use super::{
    super::jetstream::{Connection, Time},
    carried::{Down, Hop, Up},
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

/// The use of a wire for its replica.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    Deliveries,
    Settling,
    Dedicated,
}

pub(super) enum Event {
    /// A frame arrives at its end of a wire.
    ToServer(Connection, Up),
    ToClient(Connection, Down),
    /// A frame arrives at the end of a route, from one server to another.
    Hop {
        from: usize,
        to: usize,
        hop: Hop,
    },
    /// A route between two servers is made again.
    RouteMade(usize, usize),
    /// A server answers after a while.
    Answer {
        server: usize,
        wire: Connection,
        what: Down,
    },
    /// A replica tries to connect.
    Connect(usize, Use),
    /// An end of a wire notices that the wire is gone.
    Lost {
        wire: Connection,
        client: bool,
    },
    /// The arrival probe of a settling wire has its next turn.
    Probe(Connection),
    /// The library can write again what waits in it.
    Written(Connection),
    /// The server has waited for its client to read for long enough.
    Unread(Connection),
    /// The servers of a consumer elect another leader, unless another round has begun.
    Elect {
        name: ConsumerName,
        round: u64,
    },
    /// A leader that did not know of its successor knows.
    OldLeaderEnds,
}

pub(super) struct Agenda {
    pub(super) weather: Weather,
    pub(super) dice: Dice,
    queue: BTreeMap<(Time, u64), Event>,
    serial: u64,
}

impl Agenda {
    pub(super) fn new(seed: u64) -> Self {
        let (weather, dice) = (Weather::instant(), Dice::new(seed, 0));
        Self { weather, dice, queue: BTreeMap::new(), serial: 0 }
    }

    /// A number that nothing else has.
    pub(super) fn number(&mut self) -> u64 {
        self.serial += 1;
        self.serial
    }

    /// How long a frame takes now.
    pub(super) fn delay(&mut self) -> Duration {
        self.dice.millis(self.weather.delay.clone())
    }

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

    pub(super) fn connect_later(&mut self, side: usize, usage: Use, after: Time) {
        let wait = self.dice.millis(self.weather.reconnect.clone());
        self.at(after + wait, Event::Connect(side, usage));
    }

    /// Holds up until `until` every earlier event that is `held`. They keep their order.
    pub(super) fn hold_up(&mut self, until: Time, held: impl Fn(&Event) -> bool) {
        let early = self.queue.range(..(until, 0)).filter(|(_, event)| held(event));
        let early: Vec<(Time, u64)> = early.map(|(key, _)| *key).collect();
        for key in early {
            if let Some(event) = self.queue.remove(&key) {
                self.queue.insert((until, key.1), event);
            }
        }
    }

    /// Takes the events that `wanted` names, in their order, each with its time.
    pub(super) fn take(&mut self, wanted: impl Fn(&Event) -> bool) -> Vec<(Time, Event)> {
        let keys = self.queue.iter().filter(|(_, event)| wanted(event));
        let keys: Vec<(Time, u64)> = keys.map(|(key, _)| *key).collect();
        keys.into_iter().filter_map(|key| Some((key.0, self.queue.remove(&key)?))).collect()
    }
}
