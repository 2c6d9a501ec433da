//! The wires between replicas and servers. Each lane of a wire keeps its order. Two lanes have no common
//! order.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use fetch_proxy::broker::ConsumerName;
use tokio::sync::mpsc;

use super::{
    super::jetstream::{Connection, Time},
    agenda::{Agenda, Event, Use},
    carried::{Down, Item, Up},
    library::Library,
    probe::Probe,
};

/// A replica notices a silent connection after this, in milliseconds: three pings of 3 s, without an answer.
const CLIENT_PATIENCE: std::ops::Range<u64> = 9_000..12_000;
/// A server closes a connection that takes nothing for this long, if it has something to write: the default
/// `write_deadline` of nats-server, in milliseconds.
pub(super) const WRITE_DEADLINE: std::ops::Range<u64> = 10_000..10_500;

pub(super) struct Wire {
    pub(super) side: usize,
    pub(super) usage: Use,
    /// The server at its other end.
    pub(super) server: usize,
    pub(super) ends: Ends,
    pub(super) to_server: Lane,
    pub(super) to_client: Lane,
    pub(super) library: Library,
    pub(super) probe: Probe,
    pub(super) inboxes: BTreeMap<u64, (ConsumerName, mpsc::UnboundedSender<Item>)>,
    /// The subjects that the client listens on, as its server knows them.
    pub(super) subjects: Vec<String>,
    /// The servers that know of these subjects.
    pub(super) known_at: BTreeSet<usize>,
    /// The refusals of the server, as the client knows them.
    pub(super) refused: Vec<(Time, String)>,
}

/// Whether each end still takes the wire for open.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub(super) client: bool,
    pub(super) server: bool,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Lane {
    /// Nothing arrives before what was sent before it.
    last: Time,
    pub(super) stalled: Time,
    /// Frames under way are lost.
    pub(super) cut: bool,
}

impl Lane {
    /// When a frame arrives that would take until `arrives` on a free lane.
    pub(super) fn take(&mut self, arrives: Time) -> Time {
        self.last = self.last.max(arrives).max(self.stalled);
        self.last
    }

    pub(super) fn stall(&mut self, until: Time) {
        self.stalled = self.stalled.max(until);
        self.last = self.last.max(until);
    }
}

/// A direction or both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lanes {
    pub up: bool,
    pub down: bool,
}

impl Lanes {
    pub const BOTH: Self = Self { up: true, down: true };
}

#[derive(Default)]
pub(super) struct Wires(BTreeMap<Connection, Wire>);

impl Wires {
    pub(super) fn open(
        &mut self,
        (side, usage): (usize, Use),
        server: usize,
        agenda: &mut Agenda,
    ) -> Connection {
        let id = Connection(agenda.number());
        let lane = Lane::default();
        let wire = Wire {
            side,
            usage,
            server,
            ends: Ends { client: true, server: true },
            to_server: lane,
            to_client: lane,
            library: Library::default(),
            probe: Probe::default(),
            inboxes: BTreeMap::new(),
            subjects: Vec::new(),
            known_at: BTreeSet::new(),
            refused: Vec::new(),
        };
        self.0.insert(id, wire);
        id
    }

    pub(super) fn get(&self, id: Connection) -> Option<&Wire> {
        self.0.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: Connection) -> Option<&mut Wire> {
        self.0.get_mut(&id)
    }

    /// Forgets a wire that neither end takes for open.
    pub(super) fn tidy(&mut self, id: Connection) {
        if self.0.get(&id).is_some_and(|wire| !wire.ends.client && !wire.ends.server) {
            self.0.remove(&id);
        }
    }

    /// The wires that `wanted` names.
    pub(super) fn which(&self, wanted: impl Fn(&Wire) -> bool) -> Vec<Connection> {
        self.0.iter().filter(|(_, wire)| wanted(wire)).map(|(id, _)| *id).collect()
    }

    /// The consumer of an inbox on this wire.
    pub(super) fn consumer_of(&self, id: Connection, inbox: u64) -> Option<ConsumerName> {
        Some(self.0.get(&id)?.inboxes.get(&inbox)?.0.clone())
    }

    /// The replica of a wire, or an impossible one.
    pub(super) fn side(&self, id: Connection) -> usize {
        self.0.get(&id).map_or(usize::MAX, |wire| wire.side)
    }

    /// The client's end works, as far as the client knows.
    pub(super) fn is_open(&self, id: Connection) -> bool {
        self.0.get(&id).is_some_and(|wire| wire.ends.client)
    }

    /// Gives a frame to the library of the replica, which writes it at once if it can.
    pub(super) fn send_up(&mut self, id: Connection, what: Up, now: Time, agenda: &mut Agenda) {
        let Some(wire) = self.0.get_mut(&id).filter(|wire| wire.ends.client) else { return };
        if let Some(what) = wire.library.take(what, now < wire.to_server.stalled) {
            let when = wire.to_server.take(now + agenda.delay());
            agenda.at(when, Event::ToServer(id, what));
        } else {
            agenda.at(wire.to_server.stalled, Event::Written(id));
        }
    }

    /// The library writes everything that waits in it, as far as the lane takes it.
    pub(super) fn write(&mut self, id: Connection, now: Time, agenda: &mut Agenda) {
        let Some(wire) = self.0.get_mut(&id).filter(|wire| wire.ends.client) else { return };
        if now < wire.to_server.stalled {
            return;
        }
        for what in wire.library.waiting() {
            let when = wire.to_server.take(now + agenda.delay());
            agenda.at(when, Event::ToServer(id, what));
        }
    }

    pub(super) fn send_down(&mut self, id: Connection, what: Down, now: Time, agenda: &mut Agenda) {
        let Some(wire) = self.0.get_mut(&id).filter(|wire| wire.ends.server) else { return };
        if wire.to_client.stalled > now + Duration::from_millis(WRITE_DEADLINE.start) {
            let deadline = agenda.dice.millis(WRITE_DEADLINE);
            agenda.at(now + deadline, Event::Unread(id));
        }
        let when = wire.to_client.take(now + agenda.delay());
        agenda.at(when, Event::ToClient(id, what));
    }

    /// An end closes the wire. The other end notices after everything that was sent to it.
    pub(super) fn close(
        &mut self,
        id: Connection,
        by_client: bool,
        now: Time,
        agenda: &mut Agenda,
    ) {
        let Some(wire) = self.0.get_mut(&id) else { return };
        let lane = if by_client { &mut wire.to_server } else { &mut wire.to_client };
        let when = lane.take(now + agenda.delay());
        agenda.at(when, Event::Lost { wire: id, client: !by_client });
    }

    // Accidents.

    /// Nothing arrives on these wires before `until`: to the servers, from them, or both. An end that hears
    /// nothing for too long gives the wire up.
    pub(super) fn stall(
        &mut self,
        ids: &[Connection],
        lanes: Lanes,
        (now, until): (Time, Time),
        agenda: &mut Agenda,
    ) {
        for id in ids {
            let Some(wire) = self.0.get_mut(id) else { continue };
            if lanes.up {
                wire.to_server.stall(until);
                wire.library.stalled(&mut agenda.dice);
            }
            if lanes.down {
                wire.to_client.stall(until);
            }
            let patience = agenda.dice.millis(CLIENT_PATIENCE);
            if now + patience < until {
                agenda.at(now + patience, Event::Lost { wire: *id, client: true });
            }
        }
        agenda.hold_up(until, |event| match event {
            Event::ToServer(wire, _) => lanes.up && ids.contains(wire),
            Event::ToClient(wire, _) => lanes.down && ids.contains(wire),
            // The end of a wire comes behind its frames. An end that loses patience does not wait.
            _ => false,
        });
    }

    /// These wires break. Each end notices at its own time. `keep`: the frames that the replica has sent still
    /// arrive.
    pub(super) fn cut(
        &mut self,
        ids: &[Connection],
        (client, server): (Time, Time),
        keep: bool,
        agenda: &mut Agenda,
    ) {
        for id in ids {
            if let Some(wire) = self.0.get_mut(id) {
                wire.to_client.cut = true;
                wire.to_server.cut |= !keep;
            }
            agenda.at(client, Event::Lost { wire: *id, client: true });
            agenda.at(server, Event::Lost { wire: *id, client: false });
        }
    }
}
