//! The servers: streams, connections, and everything that an operator or a client can do to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use fetch_proxy::broker::{AckKind, ConsumerInfo, ConsumerName, InfoError, PullEnd, PullRequest};

use super::{
    ack_subject::{AckedDelivery, parse, subject_of},
    config::Config,
    consumer::{Consumer, Surroundings},
    pulls::Pull,
    stream::{Message, Stream},
    types::{Answered, Applied, Connection, EPOCH, InboxId, Sent, Time},
};

/// The servers.
pub struct JetStream {
    streams: BTreeMap<Arc<str>, Stream>,
    connected: BTreeSet<Connection>,
    sent: Vec<Sent>,
    applied: Vec<Applied>,
    /// The time by which the clock of the servers is ahead.
    ahead: Duration,
    /// The number of starts of servers, terms of leaders, and consumers so far.
    terms: u64,
    /// The number of deliveries so far, of all consumers in all their lives.
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
        self.streams.insert(stream.into(), Stream::default());
    }

    pub fn delete_stream(&mut self, stream: &str) {
        let Some(gone) = self.streams.remove(stream) else { return };
        for mut consumer in gone.consumers.into_values() {
            self.end_all(&mut consumer, &PullEnd::ConsumerGone);
        }
    }

    /// Creates a consumer that starts with the first message of its stream. A consumer of that name is
    /// replaced.
    pub fn add_consumer(&mut self, name: &ConsumerName, config: Config) {
        self.delete_consumer(name);
        self.terms += 1;
        let term = self.terms;
        let Some(stream) = self.streams.get_mut(&name.stream) else { return };
        let consumer = Consumer::new(config, term, stream.messages.first());
        stream.consumers.insert(name.consumer.clone(), consumer);
    }

    pub fn delete_consumer(&mut self, name: &ConsumerName) {
        let stream = self.streams.get_mut(&name.stream);
        let gone = stream.and_then(|stream| stream.consumers.remove(&name.consumer));
        if let Some(mut gone) = gone {
            self.end_all(&mut gone, &PullEnd::ConsumerGone);
        }
    }

    /// Changes the configuration live. It also holds for deliveries that are not settled.
    pub fn update(&mut self, name: &ConsumerName, change: impl FnOnce(&mut Config), now: Time) {
        if let Some(consumer) = self.consumer(name) {
            change(&mut consumer.config);
        }
        self.advance(now);
    }

    /// Starts again at this stream sequence, under its old name and `created` (nats-server 2.14).
    pub fn reset(&mut self, name: &ConsumerName, to: u64, now: Time) {
        if let Some(consumer) = self.consumer(name) {
            consumer.reset(to);
        }
        self.advance(now);
    }

    /// Hands nothing out until then.
    pub fn pause(&mut self, name: &ConsumerName, until: Option<Time>, now: Time) {
        if let Some(consumer) = self.consumer(name) {
            consumer.pause(until, now);
        }
        self.advance(now);
    }

    /// Stores a message, and returns its stream sequence.
    ///
    /// # Panics
    /// If there is no such stream.
    pub fn publish(&mut self, stream: &str, payload: Bytes, poison: bool, now: Time) -> u64 {
        let stored = EPOCH + now + self.ahead;
        let stream = self.streams.get_mut(stream).expect("a stream");
        let sequence = stream.messages.push(Message { payload, stored, poison });
        self.advance(now);
        sequence
    }

    /// Removes a message from its stream, as a deletion, a purge or its age would.
    pub fn remove(&mut self, stream: &str, sequence: u64) {
        let Some(stream) = self.streams.get_mut(stream) else { return };
        stream.messages.remove(sequence);
        for consumer in stream.consumers.values_mut() {
            consumer.settle(sequence);
        }
    }

    /// Another server leads. A consumer with copies keeps the state of a majority: without the progress
    /// and delayed Naks of the time `forgets`, and without all plain Naks.
    pub fn change_leader(&mut self, name: &ConsumerName, forgets: Duration, now: Time) {
        self.terms += 1;
        let Self { streams, connected, sent, terms, .. } = self;
        let stream = streams.get_mut(&name.stream);
        let Some(consumer) = stream.and_then(|stream| stream.consumers.get_mut(&name.consumer))
        else {
            return;
        };
        consumer.change_leader(*terms, forgets, now);
        consumer.waiting.end_all(&PullEnd::LeaderGone, connected, sent);
        self.advance(now);
    }

    /// The leader of a consumer with copies is lost; there is none until [`JetStream::change_leader`].
    pub fn lose_leader(&mut self, name: &ConsumerName) {
        if let Some(consumer) = self.consumer(name) {
            consumer.leaderless = true;
            consumer.waiting.clear();
        }
    }

    /// The one server starts again after a crash. All connections are lost. Consumers without copies
    /// keep the state that was on the disk `forgets` ago. `memory`: there is a disk.
    pub fn restart(&mut self, forgets: Duration, memory: bool, now: Time) {
        self.terms += 1;
        self.connected.clear();
        let Self { streams, connected, ahead, terms, .. } = self;
        for (stream_name, stream) in streams {
            let Stream { messages, consumers } = stream;
            for (consumer_name, consumer) in consumers {
                let name =
                    ConsumerName { stream: stream_name.clone(), consumer: consumer_name.clone() };
                let around = Surroundings { name: &name, messages, connected, ahead: *ahead };
                consumer.restart(*terms, forgets, memory, &around, now);
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

    /// CONSUMER.INFO. `None`: there is no answer, because nobody leads the consumer.
    pub fn info(&self, name: &ConsumerName, now: Time) -> Option<Result<ConsumerInfo, InfoError>> {
        let Some(stream) = self.streams.get(&name.stream) else {
            return Some(Err(InfoError::NoStream));
        };
        let Some(consumer) = stream.consumers.get(&name.consumer) else {
            return Some(Err(InfoError::NoConsumer));
        };
        (!consumer.leaderless).then(|| Ok(consumer.info(&stream.messages, now)))
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
        let Stream { messages, consumers } = stream;
        let Some(consumer) = consumers.get_mut(&name.consumer) else { return false };
        if consumer.leaderless {
            return true;
        }
        let available = consumer.available(messages);
        let pull = Pull::new(to, asked, now);
        if let Some(end) = consumer.waiting.add(pull, &consumer.config, available) {
            self.sent.push(Sent::End { to, no: asked.no, end });
            return true;
        }
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

    /// The messages that this consumer still has to deliver or to hear about. No Ack or Term has ended
    /// them, and they have attempts left.
    pub fn unsettled(&self, name: &ConsumerName) -> Vec<u64> {
        let Some((stream, consumer)) = self.find(name) else { return Vec::new() };
        let new = stream.messages.from(consumer.state.next).map(|(sequence, _)| *sequence);
        consumer.state.pending.keys().copied().chain(new).collect()
    }

    /// Unsettled deliveries that break connections, each with a subject that settles it.
    pub fn unreadable(&self, name: &ConsumerName) -> Vec<(u64, String)> {
        let Some((stream, consumer)) = self.find(name) else { return Vec::new() };
        let poison =
            |sequence: &&u64| stream.messages.get(**sequence).is_some_and(|one| one.poison);
        let found = consumer.state.pending.keys().filter(poison);
        found.map(|sequence| (*sequence, subject_of(name, (1, *sequence, 1), 1, 0))).collect()
    }

    // Time.

    /// The next time at which time alone changes something.
    pub fn next_due(&self) -> Option<Time> {
        let consumers = self.streams.values().flat_map(|stream| stream.consumers.values());
        consumers.filter_map(Consumer::next_due).min()
    }

    /// Lets time pass until `now`, and hands out every message that can be handed out.
    pub fn advance(&mut self, now: Time) {
        let Self { streams, connected, sent, ahead, delivered, .. } = self;
        for (stream_name, stream) in streams {
            let Stream { messages, consumers } = stream;
            for (consumer_name, consumer) in consumers {
                let name =
                    ConsumerName { stream: stream_name.clone(), consumer: consumer_name.clone() };
                let around = Surroundings { name: &name, messages, connected, ahead: *ahead };
                consumer.advance(&around, delivered, sent, now);
            }
        }
    }

    fn find(&self, name: &ConsumerName) -> Option<(&Stream, &Consumer)> {
        let stream = self.streams.get(&name.stream)?;
        Some((stream, stream.consumers.get(&name.consumer)?))
    }

    fn consumer(&mut self, name: &ConsumerName) -> Option<&mut Consumer> {
        self.streams.get_mut(&name.stream)?.consumers.get_mut(&name.consumer)
    }

    fn end_all(&mut self, consumer: &mut Consumer, end: &PullEnd) {
        consumer.waiting.end_all(end, &self.connected, &mut self.sent);
    }
}
