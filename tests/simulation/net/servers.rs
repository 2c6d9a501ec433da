//! The NATS servers: which of them run, the routes between them, and who cannot reach whom.
//!
//! Routes are a full mesh, and nothing takes two of them: if one is stalled, no third server passes its
//! frames on.

use std::{collections::BTreeMap, time::Duration};

use super::{
    super::jetstream::Time,
    agenda::{Agenda, Event},
    carried::Hop,
    wires::Lane,
};

/// An attempt to connect to a server that does not answer ends after this: `CONNECT_TIMEOUT` of
/// `src/nats/connection.rs`.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

/// An end of a wire or of a route.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    Replica(usize),
    Server(usize),
}

struct Server {
    /// Counts its starts.
    start: u64,
    up: bool,
    /// While it is down, attempts to connect are refused at once. If not, they have no answer.
    refuses: bool,
}

#[derive(Default)]
struct Route {
    lane: Lane,
    /// It is down until then, and frames are lost.
    down: Time,
}

pub(super) struct Servers {
    all: Vec<Server>,
    routes: BTreeMap<(usize, usize), Route>,
    /// Until when two nodes cannot reach each other. The lower one is the first.
    parted: BTreeMap<(Node, Node), Time>,
}

/// A server to connect to.
pub(super) enum Found {
    Now(usize),
    /// None before this time.
    Later(Time),
}

impl Servers {
    pub(super) fn new(count: usize) -> Self {
        let server = |_| Server { start: 1, up: true, refuses: true };
        let (all, parted) = ((0..count).map(server).collect(), BTreeMap::new());
        Self { all, routes: BTreeMap::new(), parted }
    }

    pub(super) fn count(&self) -> usize {
        self.all.len()
    }

    pub(super) fn is_up(&self, server: usize) -> bool {
        self.all[server].up
    }

    pub(super) fn any_up(&self) -> bool {
        self.all.iter().any(|server| server.up)
    }

    /// The server's id, which is new at every start.
    pub(super) fn id(&self, server: usize) -> String {
        format!("n{} start {}", server + 1, self.all[server].start)
    }

    /// `refuses`: its machine still runs, so everybody notices at once.
    pub(super) fn stop(&mut self, server: usize, refuses: bool) {
        let one = &mut self.all[server];
        (one.up, one.refuses) = (false, refuses);
    }

    pub(super) fn start(&mut self, server: usize) {
        let one = &mut self.all[server];
        (one.up, one.start) = (true, one.start + 1);
    }

    // Partitions.

    pub(super) fn part(&mut self, one: Node, other: Node, until: Time) {
        let last = self.parted.entry((one.min(other), one.max(other))).or_default();
        *last = (*last).max(until);
    }

    /// When these two can reach each other again. `None`: they can.
    pub(super) fn parted(&self, one: Node, other: Node, now: Time) -> Option<Time> {
        let until = self.parted.get(&(one.min(other), one.max(other))).copied();
        until.filter(|until| now < *until)
    }

    /// The first server of this order that a replica can connect to. A server that does not answer costs
    /// time, and one that refuses costs none.
    pub(super) fn find(&self, side: usize, order: &[usize], now: Time) -> Found {
        let mut at = now;
        for server in order {
            let parted = self.parted(Node::Replica(side), Node::Server(*server), at).is_some();
            let dark = !self.all[*server].up && !self.all[*server].refuses;
            if parted || dark {
                at += CONNECT_TIMEOUT;
            } else if self.all[*server].up {
                return if at == now { Found::Now(*server) } else { Found::Later(at) };
            }
        }
        Found::Later(at)
    }

    /// Whether both servers are up, and hear each other.
    pub(super) fn in_touch(&self, one: usize, other: usize, now: Time) -> bool {
        let route = self.routes.get(&(one.min(other), one.max(other)));
        let stalled = |from: usize, to: usize| {
            self.routes.get(&(from, to)).is_some_and(|route| now < route.lane.stalled)
        };
        let down = route.is_some_and(|route| now < route.down);
        let apart = down || stalled(one, other) || stalled(other, one);
        self.all[one].up && self.all[other].up && (one == other || !apart)
    }

    /// Whether a server reaches a majority, itself included.
    pub(super) fn has_majority(&self, server: usize, now: Time) -> bool {
        let reached = (0..self.count()).filter(|other| self.in_touch(server, *other, now)).count();
        2 * reached > self.count()
    }

    // Routes.

    /// Whether a server takes its route to another for open. It may be stalled.
    pub(super) fn is_open(&self, from: usize, to: usize, now: Time) -> bool {
        let route = self.routes.get(&(from.min(to), from.max(to)));
        self.all[to].up && route.is_none_or(|route| now >= route.down)
    }

    pub(super) fn send(
        &mut self,
        (from, to): (usize, usize),
        hop: Hop,
        (now, leaves): (Time, Time),
        agenda: &mut Agenda,
    ) {
        if self.is_open(from, to, now) {
            let route = self.routes.entry((from, to)).or_default();
            let when = route.lane.take(leaves + agenda.delay());
            agenda.at(when, Event::Hop { from, to, hop });
        }
    }

    /// Nothing arrives from one server at the other before `until`, and then everything does.
    pub(super) fn stall(&mut self, (from, to): (usize, usize), until: Time, agenda: &mut Agenda) {
        self.routes.entry((from, to)).or_default().lane.stall(until);
        agenda.hold_up(until, |event| match event {
            Event::Hop { from: one, to: other, .. } => (*one, *other) == (from, to),
            _ => false,
        });
    }

    /// The route between two servers breaks, with everything on it, and is made again at `until`.
    pub(super) fn cut(&mut self, one: usize, other: usize, until: Time, agenda: &mut Agenda) {
        let (one, other) = (one.min(other), one.max(other));
        self.routes.entry((one, other)).or_default().down = until;
        for pair in [(one, other), (other, one)] {
            self.routes.entry(pair).or_default().lane = Lane::default();
        }
        agenda.take(|event| match event {
            Event::Hop { from, to, .. } => (*from.min(to), *from.max(to)) == (one, other),
            _ => false,
        });
    }
}
