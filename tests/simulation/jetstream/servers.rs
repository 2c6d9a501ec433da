//! The servers: streams, connections, and everything that an operator or a client can do to them.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use fetch_proxy::broker::{
    AckKind, AckSubject, ConsumerInfo, ConsumerName, Delivery, InfoError, PullEnd, PullRequest,
};

use super::{
    ack_subject::{AckedDelivery, parse, subject_of},
    config::Config,
    consumer::Consumer,
    leadership::Reached,
    pulls::Pull,
    stream::{Message, Stream},
    surroundings::Surroundings,
    types::{Answered, Applied, Connection, DeliveryId, EPOCH, InboxId, Sent, Time},
};

pub struct JetStream {
    streams: BTreeMap<Arc<str>, Stream>,
    connected: BTreeSet<Connection>,
    sent: Vec<Sent>,
    applied: Vec<Applied>,
    /// The time by which the clock of the servers is ahead, in whole milliseconds.
    ahead: Duration,
    /// The number of starts of servers, terms of leaders, and consumers so far.
    terms: u64,
    /// The term of the last start of the servers.
    started: u64,
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
            started: 0,
            delivered: 0,
        }
    }

    /// Takes everything that was sent since the last call, in order.
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
            consumer.end_pulls(&PullEnd::ConsumerGone, &self.connected, &mut self.sent);
        }
    }

    /// Creates a consumer that starts with the first message of its stream. A consumer of that name is
    /// replaced.
    pub fn add_consumer(&mut self, name: &ConsumerName, config: Config) {
        self.delete_consumer(name);
        self.terms += 1;
        let Some(stream) = self.streams.get_mut(&name.stream) else { return };
        let (term, first) = (self.terms, stream.messages.first());
        // Without copies, INFO names the start of the server (src/nats/info.rs).
        let since = if config.replicas > 1 { term } else { self.started };
        let consumer = Consumer::new(config, format!("made {term}").into(), since, first);
        stream.consumers.insert(name.consumer.clone(), consumer);
    }

    pub fn delete_consumer(&mut self, name: &ConsumerName) {
        let stream = self.streams.get_mut(&name.stream);
        let gone = stream.and_then(|stream| stream.consumers.remove(&name.consumer));
        if let Some(mut gone) = gone {
            gone.end_pulls(&PullEnd::ConsumerGone, &self.connected, &mut self.sent);
        }
    }

    /// Changes the configuration live. It also holds for deliveries that are not settled.
    pub fn update(&mut self, name: &ConsumerName, change: impl FnOnce(&mut Config), now: Time) {
        self.act(name, now, |consumer, _| consumer.update(change, now));
    }

    /// Starts again at this stream sequence, under its old name and `created` (nats-server 2.14).
    pub fn reset(&mut self, name: &ConsumerName, to: u64, now: Time) {
        self.act(name, now, |consumer, _| consumer.reset(to, now));
    }

    /// Hands nothing out until then.
    pub fn pause(&mut self, name: &ConsumerName, until: Option<Time>, now: Time) {
        self.act(name, now, |consumer, _| consumer.pause(until, now));
    }

    /// Stores a message with the subject `STREAM.x`, and returns its stream sequence.
    ///
    /// # Panics
    /// If there is no such stream.
    pub fn publish(&mut self, stream: &str, payload: Bytes, poison: bool, now: Time) -> u64 {
        self.publish_to(stream, "x", payload, poison, now)
    }

    /// The same with the subject `STREAM.subject`.
    ///
    /// # Panics
    /// If there is no such stream.
    pub fn publish_to(
        &mut self,
        stream: &str,
        subject: &str,
        payload: Bytes,
        poison: bool,
        now: Time,
    ) -> u64 {
        let (stored, subject) = (EPOCH + now + self.ahead, format!("{stream}.{subject}"));
        let stream = self.streams.get_mut(stream).expect("a stream");
        let sequence = stream.messages.push(Message { subject, payload, stored, poison });
        self.advance(now);
        sequence
    }

    /// Removes a message from its stream.
    pub fn remove(&mut self, stream: &str, sequence: u64, now: Time) {
        if let Some(stream) = self.streams.get_mut(stream) {
            stream.remove(sequence, now);
        }
        self.advance(now);
    }

    /// Removes all messages before the stream sequence `first`. More than all: `u64::MAX`.
    pub fn purge(&mut self, stream: &str, first: u64, now: Time) {
        let Some(stream) = self.streams.get_mut(stream) else { return };
        let gone = stream.messages.purge(first);
        for consumer in stream.consumers.values_mut() {
            consumer.purge(&gone, now);
        }
        self.advance(now);
    }

    /// From now on, messages of this age leave the stream.
    pub fn set_max_age(&mut self, stream: &str, max_age: Option<Duration>, now: Time) {
        if let Some(stream) = self.streams.get_mut(stream) {
            stream.max_age = max_age;
        }
        self.advance(now);
    }

    // Leaders, of consumers with copies or of consumers whose server is one of several.

    /// The time until a majority has a change. Deliveries, and answers to Acks and Terms, wait for it.
    pub fn lag(&mut self, name: &ConsumerName, lag: Duration) {
        if let Some(consumer) = self.consumer(name) {
            consumer.lag = lag;
        }
    }

    /// The leader has crashed. Nobody listens until [`JetStream::change_leader`].
    pub fn lose_leader(&mut self, name: &ConsumerName, now: Time) {
        self.act(name, now, |consumer, _| consumer.lose_leader(now));
    }

    /// The leader leaves in order, and no change is lost. Nobody listens until
    /// [`JetStream::change_leader`].
    pub fn step_down(&mut self, name: &ConsumerName, now: Time) {
        self.act(name, now, |consumer, _| consumer.step_down(now));
    }

    /// The leader is cut off from the other servers, together with these connections. It answers them for
    /// some time: CONSUMER.INFO, Naks and progress, and nothing that waits for a majority. Other connections
    /// receive no answer until [`JetStream::change_leader`]. Then the two sides have a leader each.
    pub fn isolate_leader(&mut self, name: &ConsumerName, side: BTreeSet<Connection>, now: Time) {
        self.act(name, now, |consumer, _| consumer.leadership.cut_off(side, now));
    }

    /// The leader is no longer cut off. It continues, if no other has come.
    pub fn heal(&mut self, name: &ConsumerName, now: Time) {
        self.act(name, now, |consumer, _| consumer.leadership.heal());
    }

    /// A leader comes: another server for a consumer with copies, and otherwise the server itself. A plain
    /// Nak is lost. After a crash, the newest changes of the time `forgets` are lost, too. With copies only
    /// changes are lost that nobody was answered about, apart from progress and delayed Naks.
    pub fn change_leader(&mut self, name: &ConsumerName, forgets: Duration, now: Time) {
        self.terms += 1;
        let term = self.terms;
        self.act(name, now, |consumer, around| consumer.elect(term, forgets, around, now));
    }

    /// JetStream leaves in lame duck mode. Nobody listens, and nothing ends the pulls that wait. The
    /// connections stay, for minutes by default, until [`JetStream::restart`] (measured).
    pub fn leave_in_lame_duck_mode(&mut self, now: Time) {
        let consumers = self.streams.values_mut().flat_map(|stream| stream.consumers.values_mut());
        consumers.for_each(|consumer| consumer.step_down(now));
    }

    /// All servers stop in order, as after a SIGTERM. Pulls are ended.
    /// [`JetStream::restart`] follows. Without copies the newest changes may be lost all the same. Measured:
    /// 5 of 40 Acks that were confirmed up to 20 ms before a SIGTERM.
    pub fn shut_down(&mut self, now: Time) {
        let Self { streams, connected, sent, .. } = self;
        for consumer in streams.values_mut().flat_map(|stream| stream.consumers.values_mut()) {
            consumer.end_pulls(&PullEnd::LeaderGone, connected, sent);
            consumer.lose_leader(now);
        }
    }

    /// The servers start again. All connections are lost. Consumers without copies have the state that was
    /// on the disk `forgets` ago. `memory` is false if the disk has no state at all: nothing makes the system
    /// write it before a loss of power. A consumer in memory does not come back (measured), so delete it.
    pub fn restart(&mut self, forgets: Duration, memory: bool, now: Time) {
        self.terms += 1;
        self.started = self.terms;
        let term = self.terms;
        self.connected.clear();
        let forgets = memory.then_some(forgets);
        self.each(|consumer, around| consumer.restart(term, forgets, around, now));
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
    pub fn info(
        &self,
        from: Connection,
        name: &ConsumerName,
        now: Time,
    ) -> Option<Result<ConsumerInfo, InfoError>> {
        let Some(stream) = self.streams.get(&name.stream) else {
            return Some(Err(InfoError::NoStream));
        };
        let Some(consumer) = stream.consumers.get(&name.consumer) else {
            return Some(Err(InfoError::NoConsumer));
        };
        match consumer.leadership.reach(from, now) {
            Reached::Leader => Some(Ok(consumer.info(&stream.messages, now))),
            Reached::Replaced(old) => Some(Ok(old.info.clone())),
            Reached::Silence | Reached::Nobody => None,
        }
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
        let Some((_, consumer)) = self.find(name) else { return false };
        match consumer.leadership.reach(to.connection, now) {
            Reached::Leader => {}
            Reached::Nobody => return false,
            // A leader that was replaced puts the pull in line, and nothing ever comes.
            Reached::Replaced(_) | Reached::Silence => return true,
        }
        self.act(name, now, |consumer, around| {
            if let Some(end) = consumer.pull(Pull::new(to, asked, now), around) {
                around.sent.push(Sent::End { to, no: asked.no, end });
            }
        });
        true
    }

    /// Something is published to an ack subject. The answer is sent if the publish has a number for it.
    pub fn ack(
        &mut self,
        from: Connection,
        subject: &str,
        kind: &AckKind,
        reply: Option<u64>,
        now: Time,
    ) {
        self.advance(now);
        let Some(of) = parse(subject) else { return };
        let answer = |answered| reply.map(|no| Sent::Answer { to: from, no, answered });
        let reached = self.find(&of.name).map(|(_, consumer)| consumer.leadership.reach(from, now));
        match reached {
            Some(Reached::Leader) => {}
            Some(Reached::Silence) => return,
            Some(Reached::Nobody) | None => {
                return self.sent.extend(answer(Answered::NoResponders));
            }
            Some(Reached::Replaced(old)) => {
                // It answers before it asks the others, if it asks them at all.
                let hears = !matches!(kind, AckKind::Ack | AckKind::Term(_));
                let answers = hears && of.stream_sequence < old.next;
                return self.sent.extend(answer(Answered::Ok).filter(|_| answers));
            }
        }
        let mut applied = None;
        self.act(&of.name, now, |consumer, around| {
            let Some(settled) = consumer.ack(&of, kind, now) else { return };
            let AckedDelivery { stream_sequence, of, .. } = of;
            if let Some(answer) = answer(Answered::Ok) {
                consumer.answer((stream_sequence, kind), answer, around.sent, now);
            }
            applied = Some(Applied { stream_sequence, kind: kind.clone(), of, settled });
        });
        self.applied.extend(applied);
    }

    /// The messages that this consumer still has to deliver or to hear about. No Ack or Term has ended
    /// them, and they have attempts left.
    pub fn unsettled(&self, name: &ConsumerName) -> Vec<u64> {
        self.find(name)
            .map_or_else(Vec::new, |(stream, consumer)| consumer.unsettled(&stream.messages))
    }

    /// The first stream sequence that a consumer has not delivered, as far as its leader knows.
    pub fn next(&self, name: &ConsumerName) -> u64 {
        self.find(name).map_or(0, |(_, consumer)| consumer.next_new())
    }

    /// The unsettled messages of a consumer. `None`: there is no such consumer.
    pub fn left(&self, name: &ConsumerName) -> Option<Vec<u64>> {
        self.find(name).map(|(stream, consumer)| consumer.unsettled(&stream.messages))
    }

    /// The attempts of a consumer that were lost with a leader, before they were sent.
    pub fn unsent(&self, name: &ConsumerName) -> Vec<(u64, u64)> {
        self.find(name).map_or(Vec::new(), |(_, consumer)| consumer.unsent().to_vec())
    }

    /// The number of messages that a pull would bring now, and whether `max_ack_pending` is reached.
    pub fn available(&self, name: &ConsumerName, now: Time) -> (usize, bool) {
        let found = self.find(name).filter(|(_, consumer)| consumer.leadership.acts(now));
        found.map_or((0, false), |(stream, consumer)| consumer.available(&stream.messages, now))
    }

    /// Unsettled deliveries that break connections, each with a subject that settles it.
    pub fn unreadable(&self, name: &ConsumerName) -> Vec<(u64, String)> {
        let Some((stream, consumer)) = self.find(name) else { return Vec::new() };
        let pending = consumer.pending();
        let poison = |sequence: u64| stream.messages.get(sequence).is_some_and(|one| one.poison);
        let subject = |(sequence, newest): (u64, DeliveryId)| {
            // The proxy makes this subject up. It names the newest delivery for observers alone.
            poison(sequence).then(|| (sequence, subject_of(name, (1, sequence, 1), newest.0, 0)))
        };
        pending.filter_map(subject).collect()
    }

    /// A delivery with its message as it is stored. `None`: the message is stored no longer.
    pub fn stored(&self, ack: &AckSubject) -> Option<Delivery> {
        let AckedDelivery { name, delivery_count, stream_sequence, consumer_sequence, .. } =
            parse(&ack.0)?;
        let message = self.streams.get(&name.stream)?.messages.get(stream_sequence)?;
        let mut tokens = ack.0.rsplit('.').map(str::parse);
        let (pending, published) = (tokens.next()?.ok()?, tokens.next()?.ok()?);
        Some(Delivery {
            ack: ack.clone(),
            subject: message.subject.clone(),
            payload: message.payload.clone(),
            headers: Vec::new(),
            stream_sequence,
            consumer_sequence,
            delivery_count,
            pending,
            published,
        })
    }

    // Time.

    /// The next time at which time alone changes something.
    pub fn next_due(&self, now: Time) -> Option<Time> {
        let aged = self.streams.values().filter_map(Stream::next_aged);
        let aged = aged.map(|at| at.saturating_sub(EPOCH + self.ahead));
        let consumers = self.streams.values().flat_map(|stream| stream.consumers.values());
        consumers.filter_map(|consumer| consumer.next_due(now)).chain(aged).min()
    }

    /// Lets time pass until `now`, and hands out every message that can be handed out.
    pub fn advance(&mut self, now: Time) {
        let clock = EPOCH + now + self.ahead;
        self.streams.values_mut().for_each(|stream| stream.age(clock, now));
        self.each(|consumer, around| consumer.advance(around, now));
    }

    fn each(&mut self, mut act: impl FnMut(&mut Consumer, &mut Surroundings<'_>)) {
        let Self { streams, connected, sent, ahead, delivered, .. } = self;
        let ahead = *ahead;
        for (stream_name, Stream { messages, consumers, .. }) in streams {
            for (consumer_name, consumer) in consumers {
                let name =
                    &ConsumerName { stream: stream_name.clone(), consumer: consumer_name.clone() };
                act(
                    consumer,
                    &mut Surroundings { name, messages, connected, ahead, delivered, sent },
                );
            }
        }
    }

    /// Does something to one consumer, and lets everything that follows happen.
    fn act(
        &mut self,
        name: &ConsumerName,
        now: Time,
        act: impl FnOnce(&mut Consumer, &mut Surroundings<'_>),
    ) {
        let Self { streams, connected, sent, ahead, delivered, .. } = self;
        let Some(Stream { messages, consumers, .. }) = streams.get_mut(&name.stream) else {
            return;
        };
        let Some(consumer) = consumers.get_mut(&name.consumer) else { return };
        let ahead = *ahead;
        act(consumer, &mut Surroundings { name, messages, connected, ahead, delivered, sent });
        self.advance(now);
    }

    fn find(&self, name: &ConsumerName) -> Option<(&Stream, &Consumer)> {
        let stream = self.streams.get(&name.stream)?;
        Some((stream, stream.consumers.get(&name.consumer)?))
    }

    fn consumer(&mut self, name: &ConsumerName) -> Option<&mut Consumer> {
        self.streams.get_mut(&name.stream)?.consumers.get_mut(&name.consumer)
    }
}
