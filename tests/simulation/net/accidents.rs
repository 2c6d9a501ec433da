//! The accidents of the network, and what the operator of the NATS servers does. Each is a method with plain
//! arguments. Times are absolute.

use std::time::Duration;

use fetch_proxy::broker::ConsumerName;

use super::{
    super::jetstream::{Connection, Time},
    agenda::{Event, Use, Weather},
    carried::{Ack, Up},
    elections::{self, Stop},
    library::MAX_UNFLUSHED,
    rights::Right,
    servers::Node,
    state::State,
    wires::{Lanes, WRITE_DEADLINE, Wire},
};

pub struct Accidents<'s> {
    pub(super) state: &'s mut State,
    pub(super) now: Time,
}

impl Accidents<'_> {
    pub fn set_weather(&mut self, weather: Weather) {
        self.state.agenda.weather = weather;
    }

    // Wires.

    fn of(&self, side: usize) -> Vec<Connection> {
        self.state.wires.which(|wire| wire.side == side)
    }

    /// Nothing of this replica's wires arrives before `until`: to the servers, from them, or both. New wires
    /// can be made.
    pub fn stall(&mut self, side: usize, lanes: Lanes, until: Time) {
        let ids = self.of(side);
        let State { wires, agenda, .. } = &mut *self.state;
        wires.stall(&ids, lanes, (self.now, until), agenda);
    }

    /// The wires of this replica break. Each end notices at its own time, and until then the wire is
    /// half-open. `keep`: the frames that the replica has sent still arrive.
    pub fn cut(&mut self, side: usize, client: Time, server: Time, keep: bool) {
        let ids = self.of(side);
        let State { wires, agenda, .. } = &mut *self.state;
        wires.cut(&ids, (client, server), keep, agenda);
    }

    /// Two nodes cannot reach each other before `until`. Frames under way arrive then, if both ends still wait
    /// for them.
    pub fn part(&mut self, one: Node, other: Node, until: Time) {
        self.state.servers.part(one, other, until);
        match (one.min(other), one.max(other)) {
            (Node::Replica(side), Node::Server(server)) => {
                let of = |wire: &Wire| wire.side == side && wire.server == server;
                let ids = self.state.wires.which(of);
                let State { wires, agenda, .. } = &mut *self.state;
                wires.stall(&ids, Lanes::BOTH, (self.now, until), agenda);
            }
            (Node::Server(one), Node::Server(other)) => {
                let State { servers, agenda, .. } = &mut *self.state;
                servers.stall((one, other), until, agenda);
                servers.stall((other, one), until, agenda);
                elections::parted(&mut self.state.desk(), until);
            }
            _ => {}
        }
    }

    /// A replica cannot reach any server before `until`.
    pub fn part_from_all(&mut self, side: usize, until: Time) {
        for server in 0..self.state.servers.count() {
            self.part(Node::Replica(side), Node::Server(server), until);
        }
    }

    /// A server cannot reach the other servers before `until`.
    pub fn part_from_servers(&mut self, server: usize, until: Time) {
        let others = (0..self.state.servers.count()).filter(|other| *other != server);
        let State { servers, agenda, .. } = &mut *self.state;
        for other in others {
            servers.stall((server, other), until, agenda);
            servers.stall((other, server), until, agenda);
        }
        elections::parted(&mut self.state.desk(), until);
    }

    // Routes and servers.

    /// Nothing arrives from one server at another before `until`.
    pub fn stall_route(&mut self, from: usize, to: usize, until: Time) {
        let State { servers, agenda, .. } = &mut *self.state;
        servers.stall((from, to), until, agenda);
        elections::parted(&mut self.state.desk(), until);
    }

    /// The route between two servers breaks, with everything on it, and is made again at `until`.
    pub fn cut_route(&mut self, one: usize, other: usize, until: Time) {
        let State { servers, agenda, .. } = &mut *self.state;
        servers.cut(one, other, until, agenda);
        agenda.at(until, Event::RouteMade(one, other));
        elections::parted(&mut self.state.desk(), until);
    }

    /// A server stops, with its wires alone. If it is the only one, nothing is answered until it is back.
    pub fn stop_server(&mut self, server: usize, how: Stop) {
        if self.state.servers.is_up(server) {
            self.cut_off(server, how);
            elections::stopped(&mut self.state.desk(), server, how);
        }
    }

    /// A server starts again. Consumers without copies that it leads keep the state that was on its disk
    /// `forgets` ago.
    pub fn start_server(&mut self, server: usize, forgets: Duration) {
        self.stop_server(server, Stop::Killed);
        self.state.servers.start(server);
        let mut desk = self.state.desk();
        (0..desk.servers.count()).for_each(|other| desk.route_made(server, other));
        elections::started(&mut desk, server, forgets);
    }

    /// All servers stop.
    pub fn stop_all(&mut self, how: Stop) {
        if how == Stop::Graceful {
            self.state.model.shut_down(self.now);
            // The ends of pulls leave before the wires end.
            self.state.settle_down(self.now);
        }
        for server in 0..self.state.servers.count() {
            if self.state.servers.is_up(server) {
                self.cut_off(server, how);
            }
        }
    }

    /// All servers start again. Consumers without copies keep the state that was on the disk `forgets` ago, and
    /// no consumer keeps anything without `memory`.
    pub fn start_all(&mut self, forgets: Duration, memory: bool) {
        self.stop_all(Stop::Killed);
        for server in 0..self.state.servers.count() {
            self.state.servers.start(server);
        }
        self.state.model.restart(forgets, memory, self.now);
        self.state.leaders.restore();
    }

    /// The wires of a server end.
    fn cut_off(&mut self, server: usize, how: Stop) {
        self.state.servers.stop(server, how != Stop::Dark);
        for wire in self.state.wires.which(|wire| wire.server == server) {
            self.state.drop_server_end(wire);
            let State { wires, agenda, .. } = &mut *self.state;
            if how == Stop::Dark {
                // Nobody says that the wire is gone, so the client has to notice.
                let forever = self.now + Duration::from_secs(3_600);
                wires.stall(&[wire], Lanes::BOTH, (self.now, forever), agenda);
            } else {
                wires.close(wire, false, self.now, agenda);
            }
        }
    }

    /// The consumer has no leader, until [`Accidents::change_leader`]. `graceful`: the leader leaves in order.
    pub fn lose_leader(&mut self, name: &ConsumerName, graceful: bool) {
        let desk = self.state.desk();
        desk.leaders.lose(name);
        if graceful {
            desk.model.step_down(name, self.now);
        } else {
            desk.model.lose_leader(name, self.now);
        }
    }

    /// Another server leads the consumer, as soon as one reaches a majority. A consumer without copies stays
    /// at its server. If another accident has brought that server back, it does not start again.
    pub fn change_leader(&mut self, name: &ConsumerName, forgets: Duration) {
        let mut desk = self.state.desk();
        if desk.leaders.get(name).is_some_and(|led| !led.copies && led.at.is_some()) {
            return;
        }
        if !elections::pass_on(&mut desk, name, forgets) {
            let round = desk.leaders.lose(name);
            elections::elect_later(&mut desk, name, round);
        }
    }

    // Rights.

    /// The servers refuse subjects of this kind to the proxy, until [`Accidents::grant`].
    pub fn refuse(&mut self, right: Right) {
        self.state.rights.refuse(right);
    }

    pub fn grant(&mut self, right: Right) {
        self.state.rights.grant(right);
    }

    // Processes.

    /// The replica's process is gone: both ends of its wires are closed. The frames that the kernel has still
    /// arrive.
    pub fn kill(&mut self, side: usize) {
        self.state.sides[side].dead = true;
        self.state.sides[side].stopped = None;
        for wire in self.of(side) {
            self.state.lose(wire);
        }
    }

    /// The replica's process is stopped, together with its machine's `stop`. It reads nothing. The last
    /// settlements of this moment are still in the library, and are written when it continues.
    pub fn stop_process(&mut self, side: usize) {
        if self.state.sides[side].dead || self.state.sides[side].stopped.is_some() {
            return;
        }
        self.state.sides[side].stopped = Some(Vec::new());
        for id in self.of(side) {
            let State { wires, agenda, .. } = &mut *self.state;
            let Some(wire) = wires.get_mut(id) else { continue };
            let deadline = agenda.dice.millis(WRITE_DEADLINE);
            agenda.at(self.now + deadline, Event::Unread(id));
            if wire.usage != Use::Settling {
                continue;
            }
            let mut taken = agenda.take(|event| match event {
                Event::ToServer(wire, Up::Ack(Ack { left, .. })) => {
                    *wire == id && *left == self.now
                }
                _ => false,
            });
            let most = taken.len().min(MAX_UNFLUSHED) as u64;
            let waits = agenda.dice.within(0..most + 1) as usize;
            let unwritten = taken.split_off(taken.len() - waits);
            for (when, event) in taken {
                agenda.at(when, event);
            }
            wire.library.put_back(unwritten.into_iter().filter_map(|(_, event)| match event {
                Event::ToServer(_, what) => Some(what),
                _ => None,
            }));
        }
    }

    /// The process continues, before its machine's `resume`.
    pub fn resume_process(&mut self, side: usize) {
        let Some(waiting) = self.state.sides[side].stopped.take() else { return };
        let State { wires, agenda, .. } = &mut *self.state;
        // The library writes on another thread than the one that finds that an echo is missing, so either
        // can be the first.
        let writes_first = agenda.dice.percent(50);
        let of_side = wires.which(|wire| wire.side == side);
        if writes_first {
            of_side.iter().for_each(|wire| wires.write(*wire, self.now, agenda));
        }
        for event in waiting {
            agenda.at(self.now, event);
        }
        of_side.iter().for_each(|wire| agenda.at(self.now, Event::Written(*wire)));
    }
}
