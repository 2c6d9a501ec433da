//! The network between replicas and NATS, and the ends of both: a replica's broker and bus on one side,
//! the model of JetStream on the other.
//!
//! ```text
//!  replica ── SimBroker ──▶ wire: two lanes, each in order ──▶ servers: JetStream, bus
//!                 ▲                 │ delay, stall, cut                   │
//!                 └─────────────────┴─────────────────────────────────────┘
//! ```
//! All that is under way stands in one queue, by time and then by the order in which it was sent. One
//! task takes it from there, so nothing here depends on the scheduler.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use bytes::Bytes;
use fetch_proxy::{
    broker::{
        AckKind, AckPublish, AckSubject, Arrival, Broker, BrokerError, Confirmation,
        ConnectionKind, ConsumerInfo, ConsumerName, Denial, Inbox, InboxEvent, InfoError,
        JetStream, Link, PullEnd, PullRequest, Search, Server, Unreadable,
    },
    bus::{Bus, Incoming, RequestError},
    clock,
};
use testkit::dice::Dice;
use tokio::sync::{Notify, mpsc, oneshot};

use super::{
    history::History,
    jetstream::{self, Answered, Applied, Connection, DeliveryId, InboxId, Sent, Time},
};

/// How the network is at the moment.
#[derive(Debug, Clone)]
pub struct Weather {
    /// One way, in milliseconds.
    pub delay: std::ops::Range<u64>,
    /// Until the next try to connect, in milliseconds.
    pub reconnect: std::ops::Range<u64>,
}

impl Weather {
    /// Everything arrives at once.
    pub fn instant() -> Self {
        Self { delay: 0..1, reconnect: 0..1 }
    }
}

#[derive(Clone)]
pub struct Net(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    woken: Notify,
    began: Instant,
}

/// The observer from outside.
pub trait Watcher: Send {
    /// A message has left the servers for a replica.
    fn sent(&mut self, now: Time, side: usize, sent: &Sent);
    /// A replica has seen a sign of another leader, or of another start of the server.
    fn learned(&mut self, now: Time, side: usize);
    /// It is there.
    fn arrived(&mut self, now: Time, id: DeliveryId);
    /// An ack has had its effect; `late`: it was under way for longer than it was meant to be.
    /// It left at `left`.
    fn applied(&mut self, now: Time, side: usize, applied: &Applied, way: Way);
}

/// How an ack has come.
#[derive(Debug, Clone, Copy)]
pub struct Way {
    pub left: Time,
    /// It was under way for longer than it was meant to be.
    pub late: bool,
}

pub struct State {
    pub model: jetstream::JetStream,
    pub weather: Weather,
    pub history: History,
    pub watcher: Option<Box<dyn Watcher>>,
    dice: Dice,
    /// The time of what is carried or done now.
    now: Time,
    queue: BTreeMap<(Time, u64), Event>,
    serial: u64,
    wires: BTreeMap<Connection, Wire>,
    sides: Vec<Side>,
    /// The callers that wait for answers, by the number of the question.
    asked: BTreeMap<u64, (Connection, oneshot::Sender<Answer>)>,
    server: ServerState,
}

#[derive(Debug, Clone, Copy)]
struct ServerState {
    start: u64,
    up: bool,
}

/// A replica's end.
struct Side {
    deliveries: Option<Connection>,
    settling: Option<Connection>,
    epoch: u64,
    heard: u64,
    link: Link,
    link_changed: Arc<Notify>,
    subjects: Vec<String>,
    into: mpsc::UnboundedSender<Incoming>,
    /// It can reach the servers.
    reachable: bool,
    dead: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Deliveries,
    Settling,
    Dedicated,
}

struct Wire {
    side: usize,
    usage: Use,
    /// Whether each end still takes it for open.
    client: bool,
    server: bool,
    to_server: Lane,
    to_client: Lane,
    inboxes: BTreeMap<u64, mpsc::UnboundedSender<Item>>,
    /// The server's view of what is listened on.
    subjects: Vec<String>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Lane {
    /// Nothing arrives before what was sent before it.
    last: Time,
    stalled: Time,
    /// Frames under way are lost.
    cut: bool,
}

enum Item {
    Arrival(Arrival),
    Ended(InboxEvent),
}

enum Event {
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

enum Up {
    Pull { inbox: u64, name: ConsumerName, asked: PullRequest },
    Ack { subject: AckSubject, kind: AckKind, reply: Option<u64>, by: Option<Time>, left: Time },
    Info { name: ConsumerName, reply: u64 },
    Look { name: ConsumerName, reply: u64 },
    Pulse(u64),
    Subscribe(Vec<String>),
    Say { subject: String, message: Bytes },
    Ask { subject: String, message: Bytes, reply: u64 },
}

enum Down {
    Arrival { inbox: u64, arrival: Arrival, poison: bool },
    Answer(u64, Answer),
    Said(Incoming),
}

#[derive(Debug)]
enum Answer {
    Ok,
    NoResponders,
    Info(Box<Result<ConsumerInfo, InfoError>>),
    Found(Vec<(u64, String)>),
    Said(Bytes),
}

impl Net {
    pub fn new(seed: u64, history: History) -> Self {
        let state = State {
            model: jetstream::JetStream::new(),
            weather: Weather::instant(),
            history,
            watcher: None,
            dice: Dice::new(seed, 0),
            now: Duration::ZERO,
            queue: BTreeMap::new(),
            serial: 0,
            wires: BTreeMap::new(),
            sides: Vec::new(),
            asked: BTreeMap::new(),
            server: ServerState { start: 1, up: true },
        };
        let began = clock::now();
        Self(Arc::new(Shared { state: Mutex::new(state), woken: Notify::new(), began }))
    }

    pub fn began(&self) -> Instant {
        self.0.began
    }

    pub fn now(&self) -> Time {
        clock::now() - self.0.began
    }

    /// Does one thing to the network or the servers; what comes of it happens at once.
    pub fn with<R>(&self, act: impl FnOnce(&mut State, Time) -> R) -> R {
        let now = self.now();
        let mut state = self.lock();
        state.now = now;
        let result = act(&mut state, now);
        state.settle_down(now);
        drop(state);
        self.0.woken.notify_one();
        result
    }

    /// A new replica's place.
    pub fn join(&self) -> SimBroker {
        let (into, heard) = mpsc::unbounded_channel();
        let side = self.with(|state, now| {
            state.sides.push(Side {
                deliveries: None,
                settling: None,
                epoch: 0,
                heard: 0,
                link: Link::Down("not connected yet".into()),
                link_changed: Arc::default(),
                subjects: Vec::new(),
                into,
                reachable: true,
                dead: false,
            });
            let side = state.sides.len() - 1;
            state.connect_later(side, Use::Deliveries, now);
            state.connect_later(side, Use::Settling, now);
            side
        });
        let heard = Arc::new(tokio::sync::Mutex::new(heard));
        SimBroker { net: self.clone(), side, heard }
    }

    /// Carries everything, for as long as it is polled.
    pub async fn drive(&self) {
        loop {
            let now = self.now();
            let next = {
                let mut state = self.lock();
                state.carry(now);
                let queued = state.queue.first_key_value().map(|((at, _), _)| *at);
                // A server that is away lets no time pass.
                let due = state.server.up.then(|| state.model.next_due()).flatten();
                queued.into_iter().chain(due).min()
            };
            let at = next.map(|at| self.0.began + at.max(now));
            tokio::select! {
                biased;
                () = self.0.woken.notified() => {}
                () = clock::sleep_until(at) => {}
            }
        }
    }

    fn at(&self, when: Instant) -> Time {
        when.saturating_duration_since(self.0.began)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }
}

impl State {
    // The operator and the weather.

    /// The replica's process is gone: both ends of its wires are closed, what it had sent still arrives.
    pub fn kill(&mut self, side: usize, now: Time) {
        self.sides[side].dead = true;
        for wire in self.of(side) {
            self.lose(wire, true, InboxEvent::Lost);
            self.at(now + Duration::from_millis(1), Event::Lost { wire, client: false });
        }
    }

    /// Connections can be made or not.
    pub fn reach(&mut self, side: usize, reachable: bool) {
        self.sides[side].reachable = reachable;
    }

    /// Nothing of this replica's wires arrives for a while: to the servers, from them, or both.
    pub fn stall(&mut self, side: usize, (up, down): (bool, bool), until: Time) {
        for wire in self.of(side) {
            let Some(wire) = self.wires.get_mut(&wire) else { continue };
            for (lane, _) in [(&mut wire.to_server, up), (&mut wire.to_client, down)]
                .into_iter()
                .filter(|(_, stalls)| *stalls)
            {
                lane.stalled = lane.stalled.max(until);
                lane.last = lane.last.max(until);
            }
        }
        self.hold_up(side, (up, down), until);
    }

    /// A frame under way waits too.
    fn hold_up(&mut self, side: usize, (up, down): (bool, bool), until: Time) {
        let held = |state: &Self, event: &Event| match event {
            Event::ToServer(wire, _) => {
                up && state.wires.get(wire).is_some_and(|one| one.side == side)
            }
            Event::ToClient(wire, _) => {
                down && state.wires.get(wire).is_some_and(|one| one.side == side)
            }
            Event::Connect(..) | Event::Lost { .. } | Event::Pulse(..) => false,
        };
        let early: Vec<(Time, u64)> = self.queue.range(..(until, 0)).map(|(key, _)| *key).collect();
        for key in early {
            if self.queue.get(&key).is_some_and(|event| held(self, event))
                && let Some(event) = self.queue.remove(&key)
            {
                self.queue.insert((until, key.1), event);
            }
        }
    }

    /// The wires of this replica break. Each end notices at its own time; `keep`: what the replica has sent
    /// still arrives.
    pub fn cut(&mut self, side: usize, (client, server): (Time, Time), keep: bool) {
        for id in self.of(side) {
            if let Some(wire) = self.wires.get_mut(&id) {
                wire.to_client.cut = true;
                wire.to_server.cut |= !keep;
            }
            self.at(client, Event::Lost { wire: id, client: true });
            self.at(server, Event::Lost { wire: id, client: false });
        }
    }

    /// The server goes, with all connections.
    pub fn stop_server(&mut self) {
        self.server.up = false;
        let wires: Vec<_> = self.wires.keys().copied().collect();
        for wire in wires {
            self.drop_server_end(wire);
            self.lose(wire, true, InboxEvent::Lost);
        }
    }

    pub fn start_server(&mut self, forgets: Duration, memory: bool, now: Time) {
        if self.server.up {
            self.stop_server();
        }
        self.server = ServerState { start: self.server.start + 1, up: true };
        self.model.restart(forgets, memory, now);
    }

    fn of(&self, side: usize) -> Vec<Connection> {
        let of = self.wires.iter().filter(|(_, wire)| wire.side == side);
        of.map(|(id, _)| *id).collect()
    }

    /// Replicas so far, those that are gone among them.
    pub fn sides(&self) -> usize {
        self.sides.len()
    }

    // How things are carried.

    fn at(&mut self, when: Time, event: Event) {
        self.serial += 1;
        self.queue.insert((when, self.serial), event);
    }

    fn delay(&mut self) -> Duration {
        let range = self.weather.delay.clone();
        self.dice.millis(range)
    }

    fn connect_later(&mut self, side: usize, usage: Use, now: Time) {
        let range = self.weather.reconnect.clone();
        let wait = self.dice.millis(range);
        self.at(now + wait, Event::Connect(side, usage));
    }

    fn send_up(&mut self, wire: Connection, what: Up, now: Time) {
        let arrives = now + self.delay();
        if let Some(on) = self.wires.get_mut(&wire).filter(|on| on.client) {
            on.to_server.last = on.to_server.last.max(arrives).max(on.to_server.stalled);
            let when = on.to_server.last;
            self.at(when, Event::ToServer(wire, what));
        }
    }

    fn send_down(&mut self, wire: Connection, what: Down, now: Time) {
        let arrives = now + self.delay();
        if let Some(on) = self.wires.get_mut(&wire).filter(|on| on.server) {
            on.to_client.last = on.to_client.last.max(arrives).max(on.to_client.stalled);
            let when = on.to_client.last;
            self.at(when, Event::ToClient(wire, what));
        }
    }

    fn carry(&mut self, now: Time) {
        self.now = now;
        while let Some(first) = self.queue.first_entry().filter(|first| first.key().0 <= now) {
            let event = first.remove();
            self.happen(event, now);
            self.settle_down(now);
        }
        if self.server.up {
            self.model.advance(now);
        }
        self.settle_down(now);
    }

    /// Sends what the model has to send, and tells who watches.
    fn settle_down(&mut self, now: Time) {
        for sent in self.model.sent() {
            let (to, arrival, poison) = match &sent {
                Sent::Message { to, delivery, poison } => {
                    (*to, Arrival::Message(Box::new(delivery.clone())), *poison)
                }
                Sent::End { to, no, end } => {
                    (*to, Arrival::End { no: *no, end: end.clone() }, false)
                }
            };
            let side = self.wires.get(&to.connection).map_or(usize::MAX, |wire| wire.side);
            self.history.add(now, format_args!("js>{side} {sent:?}"));
            if let Some(watcher) = &mut self.watcher {
                watcher.sent(now, side, &sent);
            }
            self.send_down(to.connection, Down::Arrival { inbox: to.inbox, arrival, poison }, now);
        }
    }

    fn happen(&mut self, event: Event, now: Time) {
        match event {
            Event::ToServer(wire, what) => {
                let there = |on: &&Wire| on.server && !on.to_server.cut;
                if self.server.up && self.wires.get(&wire).as_ref().is_some_and(there) {
                    self.serve(wire, what, now);
                }
            }
            Event::ToClient(wire, what) => {
                let there = |on: &&Wire| on.client && !on.to_client.cut;
                if self.wires.get(&wire).as_ref().is_some_and(there) {
                    self.arrive(wire, what, now);
                }
            }
            Event::Connect(side, usage) => self.connect(side, usage, now),
            Event::Lost { wire, client: true } => self.lose(wire, true, InboxEvent::Lost),
            Event::Lost { wire, client: false } => self.drop_server_end(wire),
            Event::Pulse(wire, question) => {
                if self.asked.remove(&question).is_some() {
                    self.history.add(now, format_args!("pulse missed on {wire:?}"));
                    // The kernel still sends its part; the part of the library ends here.
                    let kept = self.dice.percent(50);
                    if let Some(on) = self.wires.get_mut(&wire) {
                        on.to_server.cut |= !kept;
                    }
                    self.lose(wire, true, InboxEvent::Lost);
                    self.at(now + Duration::from_millis(1), Event::Lost { wire, client: false });
                }
            }
        }
    }

    fn connect(&mut self, side: usize, usage: Use, now: Time) {
        let end = &self.sides[side];
        if end.dead {
            return;
        }
        if !self.server.up || !end.reachable {
            return self.connect_later(side, usage, now);
        }
        let wire = self.open_wire(side, usage);
        let end = &mut self.sides[side];
        match usage {
            Use::Deliveries => {
                end.epoch += 1;
                end.deliveries = Some(wire);
            }
            Use::Settling => {
                end.heard += 1;
                end.settling = Some(wire);
                let subjects = end.subjects.clone();
                self.send_up(wire, Up::Subscribe(subjects), now);
            }
            Use::Dedicated => {}
        }
        self.tell_link(side);
    }

    fn open_wire(&mut self, side: usize, usage: Use) -> Connection {
        self.serial += 1;
        let id = Connection(self.serial);
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
        self.model.connect(id);
        id
    }

    fn tell_link(&mut self, side: usize) {
        let start = self.server.start;
        let end = &mut self.sides[side];
        let link = if end.deliveries.is_some() && end.settling.is_some() {
            Link::Up(Arc::new(Server {
                epoch: end.epoch,
                bus_epoch: end.heard,
                id: format!("start {start}"),
                version: "2.15.1".to_owned(),
                max_payload: 1 << 20,
            }))
        } else {
            Link::Down("a connection was lost".into())
        };
        if end.link != link {
            end.link = link;
            end.link_changed.notify_waiters();
        }
    }

    fn drop_server_end(&mut self, id: Connection) {
        if let Some(wire) = self.wires.get_mut(&id) {
            wire.server = false;
            let gone = !wire.client;
            self.model.disconnect(id);
            if gone {
                self.wires.remove(&id);
            }
        }
    }

    /// The client's end of a wire ends.
    fn lose(&mut self, id: Connection, tell: bool, how: InboxEvent) {
        let Some(wire) = self.wires.get_mut(&id).filter(|wire| wire.client) else { return };
        wire.client = false;
        let (side, usage, gone) = (wire.side, wire.usage, !wire.server);
        if let Some(watcher) = &mut self.watcher {
            watcher.learned(self.now, side);
        }
        for inbox in std::mem::take(&mut wire.inboxes).into_values() {
            let _ = inbox.send(Item::Ended(how));
        }
        if gone {
            self.wires.remove(&id);
        }
        // Each caller that waits for an answer learns that there is none.
        self.asked.retain(|_, (on, _)| *on != id);
        let end = &mut self.sides[side];
        match usage {
            Use::Deliveries => end.deliveries = end.deliveries.filter(|one| *one != id),
            Use::Settling => end.settling = end.settling.filter(|one| *one != id),
            Use::Dedicated => return,
        }
        if tell && !self.sides[side].dead {
            self.connect_later(side, usage, self.now);
        }
        self.tell_link(side);
    }

    // The servers.

    fn serve(&mut self, wire: Connection, what: Up, now: Time) {
        let side = self.wires.get(&wire).map_or(usize::MAX, |wire| wire.side);
        match what {
            Up::Pull { inbox, name, asked } => {
                self.history.add(now, format_args!("{side}>js pull {name} {asked:?}"));
                let to = InboxId { connection: wire, inbox };
                if !self.model.pull(&name, to, asked, now) {
                    let end = PullEnd::ConsumerGone;
                    let arrival = Arrival::End { no: asked.no, end };
                    self.send_down(wire, Down::Arrival { inbox, arrival, poison: false }, now);
                }
            }
            Up::Ack { subject, kind, reply, by, left } => {
                let late = by.is_some_and(|by| now >= by);
                self.history.add(now, format_args!("{side}>js {kind:?} {} late={late}", subject.0));
                let answered = self.model.ack(&subject.0, &kind, now);
                for applied in self.model.applied() {
                    if let Some(watcher) = &mut self.watcher {
                        watcher.applied(now, side, &applied, Way { left, late });
                    }
                }
                let answer = match answered {
                    Answered::Ok => Answer::Ok,
                    Answered::NoResponders => Answer::NoResponders,
                    Answered::Nothing => return,
                };
                if let Some(reply) = reply {
                    self.send_down(wire, Down::Answer(reply, answer), now);
                }
            }
            Up::Info { name, reply } => {
                if let Some(info) = self.model.info(&name, now) {
                    self.history.add(now, format_args!("{side}>js info {info:?}"));
                    let start = self.server.start;
                    let info = info.map(|info| alone(info, start));
                    self.send_down(wire, Down::Answer(reply, Answer::Info(Box::new(info))), now);
                }
            }
            Up::Look { name, reply } => {
                let found = self.model.unreadable(&name);
                self.send_down(wire, Down::Answer(reply, Answer::Found(found)), now);
            }
            Up::Pulse(reply) => self.send_down(wire, Down::Answer(reply, Answer::Ok), now),
            Up::Subscribe(subjects) => {
                if let Some(on) = self.wires.get_mut(&wire) {
                    on.subjects = subjects;
                }
            }
            Up::Say { subject, message } => self.say(subject, message, None, now),
            Up::Ask { subject, message, reply } => {
                let listened = |on: &Wire| on.server && on.subjects.contains(&subject);
                if self.wires.values().any(listened) {
                    let reply = format!("_INBOX.{}.{reply}", wire.0);
                    self.say(subject, message, Some(reply), now);
                } else {
                    self.send_down(wire, Down::Answer(reply, Answer::NoResponders), now);
                }
            }
        }
    }

    fn say(&mut self, subject: String, message: Bytes, reply: Option<String>, now: Time) {
        let asked = subject.strip_prefix("_INBOX.").and_then(|rest| {
            let (wire, question) = rest.split_once('.')?;
            Some((Connection(wire.parse().ok()?), question.parse().ok()?))
        });
        self.history.add(now, format_args!("bus {subject} {} bytes", message.len()));
        if let Some((wire, question)) = asked {
            return self.send_down(wire, Down::Answer(question, Answer::Said(message)), now);
        }
        let listened = |on: &Wire| on.server && on.subjects.contains(&subject);
        let to: Vec<_> =
            self.wires.iter().filter(|(_, on)| listened(on)).map(|(id, _)| *id).collect();
        for wire in to {
            let (subject, message, reply) = (subject.clone(), message.clone(), reply.clone());
            self.send_down(wire, Down::Said(Incoming { subject, message, reply }), now);
        }
    }

    // The replica's end.

    fn arrive(&mut self, id: Connection, what: Down, now: Time) {
        let Some(wire) = self.wires.get(&id) else { return };
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
                self.at(now, Event::Lost { wire: id, client: false });
            }
            Down::Arrival { inbox, arrival, .. } => {
                if let (Some(watcher), Arrival::Message(delivery)) = (&mut self.watcher, &arrival) {
                    watcher.arrived(now, DeliveryId::of(delivery.published));
                }
                if let Some(inbox) = wire.inboxes.get(&inbox) {
                    let _ = inbox.send(Item::Arrival(arrival));
                }
            }
            Down::Answer(question, answer) => {
                if let Some((_, waiting)) = self.asked.remove(&question) {
                    let _ = waiting.send(answer);
                }
            }
            Down::Said(incoming) => drop(self.sides[wire.side].into.send(incoming)),
        }
    }

    fn ask(&mut self, wire: Connection) -> (u64, oneshot::Receiver<Answer>) {
        self.serial += 1;
        let (tell, told) = oneshot::channel();
        self.asked.insert(self.serial, (wire, tell));
        (self.serial, told)
    }
}

/// A consumer without copies is led by the server itself, which has another id with each start.
fn alone(info: ConsumerInfo, start: u64) -> ConsumerInfo {
    if info.replicas > 1 {
        return info;
    }
    let leader = fetch_proxy::broker::Leader::new(&format!("start {start}"), "");
    ConsumerInfo { leader, leader_shows: true, ..info }
}

/// The broker and the bus of one replica.
#[derive(Clone)]
pub struct SimBroker {
    net: Net,
    side: usize,
    heard: Arc<tokio::sync::Mutex<mpsc::UnboundedReceiver<Incoming>>>,
}

impl SimBroker {
    pub fn side(&self) -> usize {
        self.side
    }

    /// Asks on the settling connection; `None`: there is none, or no answer came.
    async fn ask(&self, until: Instant, what: impl FnOnce(u64) -> Up) -> Result<Answer, Asked> {
        let told = self.net.with(|state, now| {
            let wire = state.sides[self.side].settling?;
            let (question, told) = state.ask(wire);
            state.send_up(wire, what(question), now);
            Some(told)
        });
        let told = told.ok_or(Asked::Unsent)?;
        match tokio::time::timeout_at(until.into(), told).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(_)) | Err(_) => Err(Asked::Silent),
        }
    }
}

enum Asked {
    Unsent,
    Silent,
}

impl Broker for SimBroker {
    type Inbox = SimInbox;

    fn link(&self) -> Link {
        self.net.lock().sides[self.side].link.clone()
    }

    async fn link_change(&self, seen: &Link) -> Link {
        let changed = self.net.lock().sides[self.side].link_changed.clone();
        loop {
            let notified = changed.notified();
            tokio::pin!(notified);
            notified.as_mut().enable();
            let link = self.link();
            if link != *seen {
                return link;
            }
            notified.await;
        }
    }

    fn jetstream(&self) -> JetStream {
        JetStream::There
    }

    async fn info(&self, name: &ConsumerName, until: Instant) -> Result<ConsumerInfo, InfoError> {
        let asked = self.ask(until, |reply| Up::Info { name: name.clone(), reply }).await;
        match asked {
            Ok(Answer::Info(info)) => *info,
            Ok(_) | Err(_) => Err(InfoError::Unavailable("no answer".to_owned())),
        }
    }

    async fn open(
        &self,
        name: &ConsumerName,
        kind: ConnectionKind,
    ) -> Result<SimInbox, BrokerError> {
        self.net.with(|state, _| {
            let end = &state.sides[self.side];
            let wire = match kind {
                ConnectionKind::Shared => end.deliveries,
                ConnectionKind::Dedicated if end.reachable && state.server.up => {
                    Some(state.open_wire(self.side, Use::Dedicated))
                }
                ConnectionKind::Dedicated => None,
            };
            let wire = wire.ok_or(BrokerError::Unsent("no connection".to_owned()))?;
            state.serial += 1;
            let inbox = state.serial;
            let (into, arrivals) = mpsc::unbounded_channel();
            if let Some(on) = state.wires.get_mut(&wire) {
                on.inboxes.insert(inbox, into);
            }
            let (net, name) = (self.net.clone(), name.clone());
            let dedicated = kind == ConnectionKind::Dedicated;
            Ok(SimInbox { net, wire, inbox, name, arrivals, ended: None, dedicated })
        })
    }

    async fn unreadable(
        &self,
        name: &ConsumerName,
        _: u64,
        until: Instant,
    ) -> Result<Search, InfoError> {
        let asked = self.ask(until, |reply| Up::Look { name: name.clone(), reply }).await;
        let Ok(Answer::Found(found)) = asked else {
            return Err(InfoError::Unavailable("no answer".to_owned()));
        };
        let found = found.into_iter().map(|(stream_sequence, ack)| Unreadable {
            ack: AckSubject(ack.into()),
            stream_sequence,
            why: "poison".to_owned(),
        });
        Ok(Search { found: found.collect(), complete: true })
    }

    async fn settle(
        &self,
        orders: Vec<AckPublish>,
        confirmation: Confirmation,
        until: Instant,
    ) -> Vec<Result<(), BrokerError>> {
        let sent = self.net.with(|state, now| {
            let Some(wire) = state.sides[self.side].settling else {
                return orders.iter().map(|_| None).collect::<Vec<_>>();
            };
            let mut sent = Vec::new();
            let mut earliest: Option<Time> = None;
            for (place, order) in orders.iter().enumerate() {
                let by = order.by.map(|by| self.net.at(by));
                if by.is_some_and(|by| by <= now) {
                    sent.push(None);
                    continue;
                }
                earliest = [earliest, by].into_iter().flatten().min();
                // The answer to the last of a line stands for those before it.
                let later = orders[place + 1..].iter();
                let mut later =
                    later.filter(|later| later.by.is_none_or(|by| self.net.at(by) > now));
                let covered = order.confirm_group.is_some()
                    && later.any(|later| later.confirm_group == order.confirm_group);
                let asked = (!covered).then(|| state.ask(wire));
                let (reply, told) = asked.map_or((None, None), |(no, told)| (Some(no), Some(told)));
                let (subject, kind) = (order.ack.clone(), order.kind.clone());
                state.send_up(wire, Up::Ack { subject, kind, reply, by, left: now }, now);
                sent.push(Some(told));
            }
            if let Some(by) = earliest {
                let (pulse, _) = state.ask(wire);
                state.send_up(wire, Up::Pulse(pulse), now);
                state.at(by, Event::Pulse(wire, pulse));
            }
            sent
        });
        let mut results: Vec<Result<(), BrokerError>> = Vec::new();
        let mut asked = Vec::new();
        for told in sent {
            asked.push(matches!(told, Some(Some(_))));
            results.push(match told {
                None => Err(BrokerError::Unsent("too late, or no connection".to_owned())),
                Some(_) if confirmation == Confirmation::Sent => Ok(()),
                Some(None) => Err(BrokerError::Unconfirmed),
                Some(Some(told)) => match tokio::time::timeout_at(until.into(), told).await {
                    Ok(Ok(Answer::Ok)) => Ok(()),
                    Ok(Ok(Answer::NoResponders)) => Err(Denial::Gone.into()),
                    Ok(Ok(_) | Err(_)) | Err(_) => Err(BrokerError::Unconfirmed),
                },
            });
        }
        if confirmation == Confirmation::Confirmed {
            self.stand_for_the_line(&orders, &asked, &mut results);
        }
        let now = clock::now();
        for (order, result) in orders.iter().zip(&mut results) {
            let late = order.by.is_some_and(|by| by <= now);
            // JetStream confirms what settled the next holder's delivery, too.
            if late && *result == Ok(()) && confirmation == Confirmation::Confirmed {
                *result = Err(BrokerError::Unconfirmed);
            }
        }
        results
    }

    fn delivery_of(ack: &AckSubject) -> Option<(ConsumerName, u64)> {
        jetstream::parse(&ack.0).map(|parsed| (parsed.name, parsed.delivery_count))
    }

    async fn close(&self, _: Instant) {
        self.net.with(|state, now| state.kill(self.side, now));
    }
}

impl SimBroker {
    fn stand_for_the_line(
        &self,
        orders: &[AckPublish],
        asked: &[bool],
        results: &mut [Result<(), BrokerError>],
    ) {
        for place in 0..orders.len() {
            if asked[place] || results[place] != Err(BrokerError::Unconfirmed) {
                continue;
            }
            let line = orders[place].confirm_group;
            let last = (place + 1..orders.len()).find(|later| {
                asked[*later] && line.is_some() && orders[*later].confirm_group == line
            });
            if let Some(last) = last
                && results[last] == Ok(())
            {
                results[place] = Ok(());
            }
        }
    }
}

impl Bus for SimBroker {
    async fn request(
        &self,
        subject: &str,
        question: Bytes,
        until: Instant,
    ) -> Result<Bytes, RequestError> {
        let subject = subject.to_owned();
        match self.ask(until, |reply| Up::Ask { subject, message: question, reply }).await {
            Ok(Answer::Said(answer)) => Ok(answer),
            Ok(Answer::NoResponders) => Err(RequestError::Nobody),
            Ok(_) | Err(Asked::Silent) => Err(RequestError::Silent),
            Err(Asked::Unsent) => Err(RequestError::Unsent("no connection".to_owned())),
        }
    }

    async fn publish(&self, subject: &str, message: Bytes, _: Instant) {
        self.net.with(|state, now| {
            if let Some(wire) = state.sides[self.side].settling {
                state.send_up(wire, Up::Say { subject: subject.to_owned(), message }, now);
            }
        });
    }

    fn subscribe(&self, subjects: Vec<String>) {
        self.net.with(|state, now| {
            state.sides[self.side].subjects.clone_from(&subjects);
            if let Some(wire) = state.sides[self.side].settling {
                state.send_up(wire, Up::Subscribe(subjects), now);
            }
        });
    }

    async fn next(&self) -> Incoming {
        match self.heard.lock().await.recv().await {
            Some(heard) => heard,
            None => std::future::pending().await,
        }
    }
}

pub struct SimInbox {
    net: Net,
    wire: Connection,
    inbox: u64,
    name: ConsumerName,
    arrivals: mpsc::UnboundedReceiver<Item>,
    ended: Option<InboxEvent>,
    dedicated: bool,
}

impl Inbox for SimInbox {
    async fn pull(&mut self, asked: PullRequest) -> Result<(), BrokerError> {
        self.net.with(|state, now| {
            if !state.wires.get(&self.wire).is_some_and(|wire| wire.client) {
                return Err(BrokerError::Unsent("the connection is gone".to_owned()));
            }
            let (inbox, name) = (self.inbox, self.name.clone());
            state.send_up(self.wire, Up::Pull { inbox, name, asked }, now);
            Ok(())
        })
    }

    async fn next(&mut self, into: &mut Vec<Arrival>) -> InboxEvent {
        if let Some(ended) = self.ended {
            return ended;
        }
        let mut item = self.arrivals.recv().await;
        let had = into.len();
        loop {
            match item {
                Some(Item::Arrival(arrival)) => into.push(arrival),
                Some(Item::Ended(how)) => self.ended = Some(how),
                None => self.ended = self.ended.or(Some(InboxEvent::Lost)),
            }
            match self.arrivals.try_recv() {
                Ok(next) if self.ended.is_none() => item = Some(next),
                Ok(_) | Err(_) => break,
            }
        }
        if into.len() > had { InboxEvent::Arrived } else { self.ended.unwrap_or(InboxEvent::Lost) }
    }
}

impl Drop for SimInbox {
    fn drop(&mut self) {
        self.net.with(|state, now| {
            if let Some(on) = state.wires.get_mut(&self.wire) {
                on.inboxes.remove(&self.inbox);
            }
            if self.dedicated {
                state.lose(self.wire, false, InboxEvent::Lost);
                let (wire, client) = (self.wire, false);
                state.at(now + Duration::from_millis(1), Event::Lost { wire, client });
            }
        });
    }
}
