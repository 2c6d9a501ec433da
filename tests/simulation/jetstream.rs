//! A model of JetStream: one cluster of NATS servers, its streams and their pull consumers. A pure state
//! machine: `now` is an argument, and what it sends is taken from it by [`JetStream::sent`].
//!
//! It does what the real one does, also where that is no use to anybody:
//!
//! 1. A delivery is known by its stream sequence alone. A stale ack subject settles the delivery of
//!    whoever has the message now, and is answered as if all were well.
//! 2. A nacked message goes before a new one, in the order of the Naks, and past `max_ack_pending`. An
//!    expired message goes in the order of the stream, behind what was nacked before.
//! 3. `max_deliver` above 1 is looked at only when a pull asks for the next message.
//! 4. Stored is when a message was published, and not when it was delivered. So a leader that comes,
//!    or comes back, hands out at once what is unsettled and older than its ack wait.
//! 5. A plain Nak lives in the leader's memory alone. Progress and delayed Naks are answered before they
//!    are replicated. Without copies, everything is answered before it is on the disk.
//!
//! Times are counted from the beginning of the world. The line comments name the part of nats-server
//! that was read or measured.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use fetch_proxy::broker::{
    AckKind, AckPolicy, ConsumerInfo, ConsumerName, Delivery, InfoError, Leader, PullEnd,
    PullRequest,
};

/// Since the beginning of the world.
pub type Time = Duration;

/// The time of day at the beginning of the world, by a clock that is right: the same as the clocks of
/// simulated machines.
pub const EPOCH: Duration = Duration::from_secs(1_767_225_600);

/// How much of the newest state may be forgotten: the disk is written at most every 100 ms
/// (`filestore.go`), and a majority has the newest proposals a moment later.
pub const LONGEST_FORGOTTEN: Duration = Duration::from_millis(250);

/// A connection of a client to the servers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connection(pub u64);

/// The inbox that a pull is answered to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InboxId {
    pub connection: Connection,
    pub inbox: u64,
}

/// How a consumer is configured. All of it may be changed while it is used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    pub ack_wait: Duration,
    /// The first is the ack wait, whatever that says.
    pub backoff: Vec<Duration>,
    pub max_deliver: Option<u64>,
    pub max_ack_pending: Option<u64>,
    pub max_batch: Option<u32>,
    pub max_expires: Option<Duration>,
    pub max_bytes: Option<u64>,
    /// Pulls that may wait, of all clients.
    pub max_waiting: usize,
    /// Copies of its state.
    pub replicas: u32,
    /// Its INFO says since when its leader leads.
    pub tells_since: bool,
}

impl Config {
    pub fn new(ack_wait: Duration) -> Self {
        Self {
            ack_wait,
            backoff: Vec::new(),
            max_deliver: None,
            max_ack_pending: Some(1000),
            max_batch: None,
            max_expires: None,
            max_bytes: None,
            max_waiting: 512,
            replicas: 1,
            tells_since: true,
        }
    }

    /// The ack wait as the server keeps it: `AckWait = BackOff[0]`.
    fn shown_wait(&self) -> Duration {
        self.backoff.first().copied().unwrap_or(self.ack_wait)
    }

    /// The ack wait of this attempt.
    fn wait(&self, attempt: u64) -> Duration {
        let place = usize::try_from(attempt.saturating_sub(1)).unwrap_or(usize::MAX);
        let last = self.backoff.len().saturating_sub(1);
        self.backoff.get(place.min(last)).copied().unwrap_or(self.ack_wait)
    }
}

/// Something that the servers send to an inbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Sent {
    Message { to: InboxId, delivery: Delivery, poison: bool },
    End { to: InboxId, no: u64, end: PullEnd },
}

/// The answer to something that was published to an ack subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answered {
    /// It was handled, whatever came of it.
    Ok,
    /// The consumer has not delivered that message yet: no answer comes.
    Nothing,
    /// Nobody listens there.
    NoResponders,
}

/// The effect of an ack, for an observer from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    pub stream_sequence: u64,
    pub kind: AckKind,
    /// The delivery that the ack subject is of.
    pub of: DeliveryId,
    /// The delivery that it had an effect on, if there was one out.
    pub settled: Option<DeliveryId>,
}

/// One delivery in the history of the world. It stands in the last digits of a delivery's time of
/// publication, so whoever sees the delivery can tell which one it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeliveryId(pub u64);

/// Messages are published at whole milliseconds, so these digits are free.
const DELIVERY_IDS: u64 = 1_000_000;

impl DeliveryId {
    /// The delivery with this time of publication, in nanoseconds.
    pub fn of(published: u64) -> Self {
        Self(published % DELIVERY_IDS)
    }
}

/// A stored message.
#[derive(Debug, Clone)]
struct Message {
    payload: Bytes,
    /// By the clock of the servers: since the Unix epoch.
    stored: Duration,
    /// It breaks every connection that brings it.
    poison: bool,
}

/// A delivery that is not settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pending {
    newest: DeliveryId,
    /// When its ack clock began, in the leader's memory.
    began: Time,
    /// The same as it is stored, when that was written, and what was stored before.
    stored: (Time, Time, Time),
}

/// The state of a consumer that is on the disk of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
struct State {
    /// The next stream sequence that was never delivered.
    next: u64,
    /// Deliveries so far.
    deliveries: u64,
    pending: BTreeMap<u64, Pending>,
    /// How often each was delivered, of what is not settled.
    counts: BTreeMap<u64, u64>,
}

impl State {
    fn new(next: u64) -> Self {
        Self { next, deliveries: 0, pending: BTreeMap::new(), counts: BTreeMap::new() }
    }

    fn count(&self, sequence: u64) -> u64 {
        self.counts.get(&sequence).copied().unwrap_or_default()
    }
}

/// A pull that waits.
#[derive(Debug, Clone)]
struct Pull {
    to: InboxId,
    asked: PullRequest,
    left: u32,
    bytes: Option<u64>,
    ends: Time,
}

struct Consumer {
    config: Config,
    created: Arc<str>,
    paused_until: Option<Time>,
    /// The leader, and since when it leads.
    leader: (String, u64),
    /// The leader is away: nothing is answered.
    leaderless: bool,
    state: State,
    /// The messages to deliver again.
    again: VecDeque<u64>,
    waiting: VecDeque<Pull>,
    /// Without copies: how the state was, each with its time. The newest may not be on the disk yet.
    history: VecDeque<(Time, State)>,
}

/// The parts of a delivery.
#[derive(Clone, Copy)]
struct HandOut<'o> {
    name: &'o ConsumerName,
    messages: &'o BTreeMap<u64, Message>,
    connected: &'o BTreeSet<Connection>,
    ahead: Duration,
}

struct Stream {
    messages: BTreeMap<u64, Message>,
    last: u64,
    consumers: BTreeMap<Arc<str>, Consumer>,
}

/// The servers.
pub struct JetStream {
    streams: BTreeMap<Arc<str>, Stream>,
    connected: BTreeSet<Connection>,
    sent: Vec<Sent>,
    applied: Vec<Applied>,
    /// How much the clock of the servers is ahead of the right time.
    ahead: Duration,
    /// Starts of servers, terms of leaders, and consumers that were made.
    terms: u64,
    /// Deliveries so far, of all consumers in all their lives.
    delivered: u64,
}

impl JetStream {
    pub fn new() -> Self {
        Self {
            streams: BTreeMap::new(),
            connected: BTreeSet::new(),
            sent: Vec::new(),
            applied: Vec::new(),
            ahead: Duration::ZERO,
            terms: 0,
            delivered: 0,
        }
    }

    /// Takes the messages that were sent since the last call, in order.
    pub fn sent(&mut self) -> Vec<Sent> {
        std::mem::take(&mut self.sent)
    }

    /// Takes the effects of acks since the last call.
    pub fn applied(&mut self) -> Vec<Applied> {
        std::mem::take(&mut self.applied)
    }

    // The operator.

    pub fn add_stream(&mut self, stream: &str) {
        let empty = Stream { messages: BTreeMap::new(), last: 0, consumers: BTreeMap::new() };
        self.streams.insert(stream.into(), empty);
    }

    pub fn delete_stream(&mut self, stream: &str) {
        if let Some(stream) = self.streams.remove(stream) {
            for consumer in stream.consumers.into_values() {
                self.end_all(consumer.waiting, &PullEnd::ConsumerGone);
            }
        }
    }

    /// Makes a consumer that begins with the first message of its stream. One of that name is replaced.
    pub fn add_consumer(&mut self, name: &ConsumerName, config: Config) {
        self.delete_consumer(name);
        self.terms += 1;
        let term = self.terms;
        let Some(stream) = self.streams.get_mut(&name.stream) else { return };
        let first = stream.messages.keys().next().copied().unwrap_or(stream.last + 1);
        let consumer = Consumer {
            config,
            created: format!("made {term}").into(),
            paused_until: None,
            leader: ("n1".to_owned(), term),
            leaderless: false,
            state: State::new(first),
            again: VecDeque::new(),
            waiting: VecDeque::new(),
            history: VecDeque::new(),
        };
        stream.consumers.insert(name.consumer.clone(), consumer);
    }

    pub fn delete_consumer(&mut self, name: &ConsumerName) {
        let stream = self.streams.get_mut(&name.stream);
        if let Some(gone) = stream.and_then(|stream| stream.consumers.remove(&name.consumer)) {
            self.end_all(gone.waiting, &PullEnd::ConsumerGone);
        }
    }

    /// Changes its configuration live. Deliveries that are out are measured by the new one.
    pub fn update(&mut self, name: &ConsumerName, change: impl FnOnce(&mut Config), now: Time) {
        if let Some(consumer) = self.consumer(name) {
            change(&mut consumer.config);
        }
        self.advance(now);
    }

    /// Begins anew at this stream sequence, under its old name and `created` (nats-server 2.14).
    pub fn reset(&mut self, name: &ConsumerName, to: u64, now: Time) {
        if let Some(consumer) = self.consumer(name) {
            consumer.state = State::new(to);
            consumer.again.clear();
            consumer.history.clear();
        }
        self.advance(now);
    }

    /// Hands nothing out until then.
    pub fn pause(&mut self, name: &ConsumerName, until: Option<Time>, now: Time) {
        if let Some(consumer) = self.consumer(name) {
            consumer.paused_until = until.filter(|until| *until > now);
        }
        self.advance(now);
    }

    /// Stores a message; returns its stream sequence.
    ///
    /// # Panics
    /// If there is no such stream.
    pub fn publish(&mut self, stream: &str, payload: Bytes, poison: bool, now: Time) -> u64 {
        let stored = EPOCH + now + self.ahead;
        let stream = self.streams.get_mut(stream).expect("a stream");
        stream.last += 1;
        let sequence = stream.last;
        stream.messages.insert(sequence, Message { payload, stored, poison });
        self.advance(now);
        sequence
    }

    /// Removes a message from its stream: deleted, purged or aged.
    pub fn remove(&mut self, stream: &str, sequence: u64) {
        let Some(stream) = self.streams.get_mut(stream) else { return };
        stream.messages.remove(&sequence);
        for consumer in stream.consumers.values_mut() {
            consumer.settle(sequence);
        }
    }

    /// Another server leads. A consumer with copies keeps what a majority has: of progress and delayed
    /// Naks not the newest, of plain Naks nothing.
    pub fn change_leader(&mut self, name: &ConsumerName, forgets: Duration, now: Time) {
        self.terms += 1;
        let term = self.terms;
        let Some(consumer) = self.consumer(name) else { return };
        consumer.leader = (format!("n{}", 1 + term % 3), term);
        consumer.leaderless = false;
        let waiting = std::mem::take(&mut consumer.waiting);
        consumer.again.clear();
        let kept = now.saturating_sub(forgets.min(LONGEST_FORGOTTEN));
        for pending in consumer.state.pending.values_mut() {
            let (stored, at, before) = pending.stored;
            pending.began = if at > kept { before } else { stored };
            pending.stored = (pending.began, now, pending.began);
        }
        self.end_all(waiting, &PullEnd::LeaderGone);
        self.advance(now);
    }

    /// The leader of a consumer with copies is lost; there is none until [`JetStream::change_leader`].
    pub fn lose_leader(&mut self, name: &ConsumerName) {
        if let Some(consumer) = self.consumer(name) {
            consumer.leaderless = true;
            consumer.waiting.clear();
        }
    }

    /// The one server starts anew, after a crash. All connections are lost with it. Consumers without copies
    /// keep what was on the disk so long ago; `memory` is false where there is no disk.
    pub fn restart(&mut self, forgets: Duration, memory: bool, now: Time) {
        self.terms += 1;
        let term = self.terms;
        self.connected.clear();
        let ahead = self.ahead;
        for stream in self.streams.values_mut() {
            let first = stream.messages.keys().next().copied().unwrap_or(stream.last + 1);
            for consumer in stream.consumers.values_mut() {
                consumer.restart(forgets, memory.then_some(now), first);
                consumer.leader.1 = term;
                let messages = &stream.messages;
                consumer.state.pending.retain(|sequence, pending| {
                    let Some(message) = messages.get(sequence) else { return false };
                    let published = message.stored.saturating_sub(EPOCH + ahead);
                    pending.began = pending.stored.0.min(now);
                    pending.stored = (pending.began, now, published);
                    true
                });
                consumer.history = VecDeque::from([(now, consumer.state.clone())]);
            }
        }
        self.advance(now);
    }

    // Clients.

    pub fn connect(&mut self, connection: Connection) {
        self.connected.insert(connection);
    }

    /// The servers have noticed that a connection is gone. Nothing else happens: its pulls are found
    /// when their turn comes.
    pub fn disconnect(&mut self, connection: Connection) {
        self.connected.remove(&connection);
    }

    /// CONSUMER.INFO. `None`: there is no answer, because nobody leads it.
    pub fn info(&self, name: &ConsumerName, now: Time) -> Option<Result<ConsumerInfo, InfoError>> {
        let Some(stream) = self.streams.get(&name.stream) else {
            return Some(Err(InfoError::NoStream));
        };
        let Some(consumer) = stream.consumers.get(&name.consumer) else {
            return Some(Err(InfoError::NoConsumer));
        };
        if consumer.leaderless {
            return None;
        }
        let config = &consumer.config;
        let (leader, since) = &consumer.leader;
        let since = if config.tells_since { since.to_string() } else { String::new() };
        Some(Ok(ConsumerInfo {
            created: consumer.created.clone(),
            ack_policy: AckPolicy::Explicit,
            push: false,
            priority_groups: false,
            paused: consumer.paused(now),
            ack_wait: config.shown_wait(),
            backoff: config.backoff.clone(),
            max_deliver: config.max_deliver,
            max_ack_pending: config.max_ack_pending,
            max_batch: config.max_batch,
            max_expires: config.max_expires,
            max_request_bytes: config.max_bytes,
            replicas: config.replicas,
            leader: Leader::new(leader, &since),
            leader_shows: config.tells_since,
            pending: stream.messages.range(consumer.state.next..).count() as u64,
            ack_pending: consumer.state.pending.len() as u64,
            delivered: consumer.state.deliveries,
            delivered_stream: consumer.state.next - 1,
        }))
    }

    /// A pull request. `false`: nobody listens there.
    pub fn pull(
        &mut self,
        name: &ConsumerName,
        to: InboxId,
        asked: PullRequest,
        now: Time,
    ) -> bool {
        self.advance(now);
        let Some(stream) = self.streams.get_mut(&name.stream) else { return false };
        let pending = |consumer: &Consumer| stream.messages.range(consumer.state.next..).count();
        let Some(consumer) = stream.consumers.get(&name.consumer) else { return false };
        let available = pending(consumer) + consumer.again.len();
        let Some(consumer) = stream.consumers.get_mut(&name.consumer) else { return false };
        if consumer.leaderless {
            return true;
        }
        if let Some(end) = consumer.refuses(&asked, available) {
            self.sent.push(Sent::End { to, no: asked.no, end });
            return true;
        }
        let (left, bytes, ends) = (asked.batch, asked.max_bytes, now + asked.expires);
        consumer.waiting.push_back(Pull { to, asked, left, bytes, ends });
        self.advance(now);
        true
    }

    /// Something is published to an ack subject.
    pub fn ack(&mut self, subject: &str, kind: &AckKind, now: Time) -> Answered {
        self.advance(now);
        let Some(parsed) = parse(subject) else { return Answered::Nothing };
        let AckedDelivery { name, stream_sequence, of, .. } = parsed;
        let Some(consumer) = self.consumer(&name) else { return Answered::NoResponders };
        if consumer.leaderless || stream_sequence >= consumer.state.next {
            return Answered::Nothing;
        }
        let settled = consumer.apply(stream_sequence, kind, now);
        self.applied.push(Applied { stream_sequence, kind: kind.clone(), of, settled });
        self.advance(now);
        Answered::Ok
    }

    /// Messages of the stream that no Ack or Term has ended at this consumer, and its attempts have not run
    /// out.
    pub fn unsettled(&self, name: &ConsumerName) -> Vec<u64> {
        let Some(stream) = self.streams.get(&name.stream) else { return Vec::new() };
        let Some(consumer) = stream.consumers.get(&name.consumer) else { return Vec::new() };
        let new = stream.messages.range(consumer.state.next..).map(|(sequence, _)| *sequence);
        consumer.state.pending.keys().copied().chain(new).collect()
    }

    /// Unsettled deliveries that break connections, from this stream sequence on or before it.
    pub fn unreadable(&self, name: &ConsumerName) -> Vec<(u64, String)> {
        let Some(stream) = self.streams.get(&name.stream) else { return Vec::new() };
        let Some(consumer) = stream.consumers.get(&name.consumer) else { return Vec::new() };
        let poison = |sequence: &&u64| stream.messages.get(sequence).is_some_and(|one| one.poison);
        let found = consumer.state.pending.keys().filter(poison);
        found.map(|sequence| (*sequence, subject_of(name, (1, *sequence, 1), 1, 0))).collect()
    }

    // Time.

    /// When time alone makes something happen next.
    pub fn next_due(&self) -> Option<Time> {
        let consumers = self.streams.values().flat_map(|stream| stream.consumers.values());
        consumers.filter_map(Consumer::next_due).min()
    }

    /// Lets time pass until `now`, and hands out what can be handed out.
    pub fn advance(&mut self, now: Time) {
        let Self { streams, connected, sent, ahead, delivered, .. } = self;
        for (stream_name, stream) in streams {
            for (consumer_name, consumer) in &mut stream.consumers {
                let name =
                    ConsumerName { stream: stream_name.clone(), consumer: consumer_name.clone() };
                consumer.paused_until = consumer.paused_until.filter(|until| now < *until);
                consumer.expire(now);
                consumer.note(now);
                consumer.end_pulls(connected, false, sent, now);
                if !consumer.leaderless && !consumer.paused(now) {
                    let messages = &stream.messages;
                    let out = HandOut { name: &name, messages, connected, ahead: *ahead };
                    consumer.hand_out(&out, delivered, sent, now);
                }
                let dry = consumer.dry(&stream.messages);
                consumer.end_pulls(connected, dry, sent, now);
                consumer.note(now);
            }
        }
    }

    fn consumer(&mut self, name: &ConsumerName) -> Option<&mut Consumer> {
        self.streams.get_mut(&name.stream)?.consumers.get_mut(&name.consumer)
    }

    fn end_all(&mut self, waiting: impl IntoIterator<Item = Pull>, end: &PullEnd) {
        for pull in waiting {
            if self.connected.contains(&pull.to.connection) {
                let (to, no, end) = (pull.to, pull.asked.no, end.clone());
                self.sent.push(Sent::End { to, no, end });
            }
        }
    }
}

impl Consumer {
    fn paused(&self, now: Time) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }

    /// Why a pull is not even put in line. `available`: what could be handed out.
    fn refuses(&self, asked: &PullRequest, available: usize) -> Option<PullEnd> {
        let Config { max_batch, max_expires, max_bytes, max_waiting, .. } = &self.config;
        // consumer.go:4692: the limits of one request.
        if let Some(most) = max_batch.filter(|most| asked.batch > *most) {
            return Some(PullEnd::Busy(format!("Exceeded MaxRequestBatch of {most}")));
        }
        if let Some(most) = max_expires.filter(|most| asked.expires > *most) {
            return Some(PullEnd::Busy(format!("Exceeded MaxRequestExpires of {most:?}")));
        }
        if let (Some(most), Some(bytes)) = (*max_bytes, asked.max_bytes)
            && bytes > most
        {
            return Some(PullEnd::Busy(format!("Exceeded MaxRequestMaxBytes of {most}")));
        }
        if self.waiting.len() >= *max_waiting {
            return Some(PullEnd::Busy("Exceeded MaxWaiting".to_owned()));
        }
        // consumer.go:4759: others wait for what is pending.
        let wanted: usize = self.waiting.iter().map(|pull| pull.left as usize).sum();
        let taken = asked.no_wait && available > 0 && available < wanted;
        taken.then_some(PullEnd::RequestsPending)
    }

    fn full(&self) -> bool {
        let pending = self.state.pending.len() as u64;
        self.config.max_ack_pending.is_some_and(|most| pending >= most)
    }

    /// Whether nothing is left to hand out, as opposed to: not now.
    fn dry(&self, messages: &BTreeMap<u64, Message>) -> bool {
        self.again.is_empty() && messages.range(self.state.next..).next().is_none()
    }

    /// Moves what has expired behind what is to be delivered again.
    fn expire(&mut self, now: Time) {
        if self.leaderless {
            return;
        }
        let Self { config, state, again, .. } = self;
        let due: Vec<u64> = state
            .pending
            .iter()
            .filter(|(sequence, pending)| {
                let wait = config.wait(state.count(**sequence).max(1));
                now >= pending.began + wait && !again.contains(sequence)
            })
            .map(|(sequence, _)| *sequence)
            .collect();
        for sequence in due {
            // consumer.go:2426: at once for a limit of one, and otherwise when a pull asks.
            if config.max_deliver == Some(1) {
                state.pending.remove(&sequence);
            } else {
                again.push_back(sequence);
            }
        }
    }

    /// Without copies: keeps how the state was, for as long as it may not be on the disk.
    fn note(&mut self, now: Time) {
        if self.config.replicas > 1 {
            return;
        }
        if self.history.back().is_none_or(|(_, newest)| *newest != self.state) {
            self.history.push_back((now, self.state.clone()));
        }
        let old = now.saturating_sub(LONGEST_FORGOTTEN);
        while self.history.get(1).is_some_and(|(at, _)| *at <= old) {
            self.history.pop_front();
        }
    }

    fn restart(&mut self, forgets: Duration, now: Option<Time>, first: u64) {
        self.waiting.clear();
        self.again.clear();
        let Some(now) = now else {
            self.state = State::new(first);
            return;
        };
        if self.config.replicas > 1 {
            return;
        }
        let kept = now.saturating_sub(forgets.min(LONGEST_FORGOTTEN));
        let on_disk = self.history.iter().rev().find(|(at, _)| *at <= kept);
        self.state = match on_disk.or(self.history.front()) {
            Some((_, state)) => state.clone(),
            None => State::new(first),
        };
    }

    /// The next message, if one may be handed out now; `true`: it was delivered before.
    fn next(&mut self, messages: &BTreeMap<u64, Message>) -> Option<(u64, bool)> {
        while let Some(sequence) = self.again.pop_front() {
            let over = |most: u64| self.state.count(sequence) >= most;
            // A message that has left its stream, or is settled, or has had all its attempts.
            let there = messages.contains_key(&sequence);
            if !there || !self.state.pending.contains_key(&sequence) {
                self.state.pending.remove(&sequence);
                continue;
            }
            if self.config.max_deliver.is_some_and(over) {
                self.state.pending.remove(&sequence);
                continue;
            }
            return Some((sequence, true));
        }
        if self.full() {
            return None;
        }
        let (sequence, _) = messages.range(self.state.next..).next()?;
        Some((*sequence, false))
    }

    /// Serves the pulls round robin, one message each.
    fn hand_out(
        &mut self,
        out: &HandOut<'_>,
        delivered: &mut u64,
        sent: &mut Vec<Sent>,
        now: Time,
    ) {
        let HandOut { messages, connected, .. } = *out;
        loop {
            // A connection that is gone is found when its turn comes.
            self.waiting.retain(|pull| connected.contains(&pull.to.connection));
            if self.waiting.is_empty() {
                return;
            }
            let Some((sequence, again)) = self.next(messages) else { return };
            let message = &messages[&sequence];
            // consumer.go:4498: one that is too large ends the pull, and the next pull is asked.
            let size = message.payload.len() as u64 + 100;
            let large = |pull: &Pull| pull.bytes.is_some_and(|bytes| size > bytes);
            while let Some(pull) = self.waiting.pop_front_if(|pull| large(pull)) {
                let end = PullEnd::TooLarge;
                sent.push(Sent::End { to: pull.to, no: pull.asked.no, end });
            }
            let Some(mut pull) = self.waiting.pop_front() else {
                if again {
                    self.again.push_front(sequence);
                }
                return;
            };
            *delivered += 1;
            let delivery = self.deliver(out, sequence, DeliveryId(*delivered % DELIVERY_IDS), now);
            let poison = message.poison;
            sent.push(Sent::Message { to: pull.to, delivery, poison });
            pull.left -= 1;
            pull.bytes = pull.bytes.map(|bytes| bytes - size);
            if pull.left == 0 {
                continue;
            }
            if pull.bytes == Some(0) {
                sent.push(Sent::End { to: pull.to, no: pull.asked.no, end: PullEnd::Spent });
                continue;
            }
            self.waiting.push_back(pull);
        }
    }

    fn deliver(&mut self, out: &HandOut<'_>, sequence: u64, id: DeliveryId, now: Time) -> Delivery {
        let HandOut { name, messages, ahead, .. } = *out;
        let state = &mut self.state;
        let message = &messages[&sequence];
        state.next = state.next.max(sequence + 1);
        state.deliveries += 1;
        let count = state.counts.entry(sequence).or_default();
        *count += 1;
        let (count, place) = (*count, state.deliveries);
        // Stored is when it was published (updateDelivered).
        let published = message.stored.saturating_sub(EPOCH + ahead);
        let before = state.pending.get(&sequence).map_or(published, |pending| pending.stored.0);
        let stored = (published, now, before);
        state.pending.insert(sequence, Pending { newest: id, began: now, stored });
        let left = messages.range(state.next..).count() as u64;
        let stored = u64::try_from(message.stored.as_nanos()).unwrap_or(u64::MAX) + id.0;
        let ack = subject_of(name, (count, sequence, place), stored, left);
        Delivery {
            ack: fetch_proxy::broker::AckSubject(ack.into()),
            subject: format!("{}.x", name.stream),
            payload: message.payload.clone(),
            headers: Vec::new(),
            stream_sequence: sequence,
            consumer_sequence: place,
            delivery_count: count,
            pending: left,
            published: stored,
        }
    }

    /// Ends what has had its time, and what was to bring what there is.
    /// At `max_ack_pending` nothing ends a pull of the second kind but its time.
    fn end_pulls(
        &mut self,
        connected: &BTreeSet<Connection>,
        dry: bool,
        sent: &mut Vec<Sent>,
        now: Time,
    ) {
        self.waiting.retain(|pull| {
            let one_shot = dry && pull.asked.no_wait && pull.left < pull.asked.batch;
            let ended = now >= pull.ends || one_shot;
            if ended && connected.contains(&pull.to.connection) {
                sent.push(Sent::End { to: pull.to, no: pull.asked.no, end: PullEnd::Done });
            }
            !ended
        });
    }

    /// The effect of an ack: the delivery that it was for, whoever holds it.
    fn apply(&mut self, sequence: u64, kind: &AckKind, now: Time) -> Option<DeliveryId> {
        let shown = self.config.shown_wait();
        let pending = self.state.pending.get_mut(&sequence)?;
        let newest = pending.newest;
        match kind {
            AckKind::Ack | AckKind::Term(_) => self.settle(sequence),
            AckKind::Nak(None) => {
                if !self.again.contains(&sequence) {
                    self.again.push_back(sequence);
                }
            }
            // consumer.go:3301: what is kept is when the clock would have had to begin.
            AckKind::Nak(Some(delay)) => {
                pending.began = (now + *delay).saturating_sub(shown);
                pending.stored = (pending.began, now, pending.stored.0);
                self.again.retain(|other| *other != sequence);
            }
            // It does not take the message back that waits to be delivered again.
            AckKind::Progress => {
                pending.began = now;
                pending.stored = (now, now, pending.stored.0);
            }
        }
        Some(newest)
    }

    fn settle(&mut self, sequence: u64) {
        self.state.pending.remove(&sequence);
        self.state.counts.remove(&sequence);
        self.again.retain(|other| *other != sequence);
    }

    fn next_due(&self) -> Option<Time> {
        if self.leaderless {
            return None;
        }
        let pending = self.state.pending.iter();
        let pending = pending.filter(|(sequence, _)| !self.again.contains(sequence));
        let expiry = pending.map(|(sequence, pending)| {
            pending.began + self.config.wait(self.state.count(*sequence).max(1))
        });
        let pulls = self.waiting.iter().map(|pull| pull.ends);
        expiry.chain(pulls).chain(self.paused_until).min()
    }
}

/// The content of an ack subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AckedDelivery {
    pub name: ConsumerName,
    pub delivery_count: u64,
    pub stream_sequence: u64,
    pub consumer_sequence: u64,
    pub of: DeliveryId,
}

/// Reads an ack subject of nine tokens.
pub fn parse(subject: &str) -> Option<AckedDelivery> {
    let tokens: Vec<&str> = subject.split('.').collect();
    let [_, _, stream, consumer, count, sequence, deliveries, published, _] = tokens[..] else {
        return None;
    };
    Some(AckedDelivery {
        name: ConsumerName { stream: stream.into(), consumer: consumer.into() },
        delivery_count: count.parse().ok()?,
        stream_sequence: sequence.parse().ok()?,
        consumer_sequence: deliveries.parse().ok()?,
        of: DeliveryId::of(published.parse().ok()?),
    })
}

fn subject_of(
    name: &ConsumerName,
    (count, sequence, deliveries): (u64, u64, u64),
    stored: u64,
    left: u64,
) -> String {
    let ConsumerName { stream, consumer } = name;
    format!("$JS.ACK.{stream}.{consumer}.{count}.{sequence}.{deliveries}.{stored}.{left}")
}
