//! A consumer as its leader sees it: the stored state, and the leader's memory.

use std::{
    collections::{BTreeSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use fetch_proxy::broker::{
    AckKind, AckPolicy, AckSubject, ConsumerInfo, ConsumerName, Delivery, Leader,
};

use super::{
    ack_subject::subject_of,
    config::Config,
    pulls::Pulls,
    state::{Pending, State},
    stream::Messages,
    types::{Connection, DeliveryId, EPOCH, Sent, Time},
};

/// The most of the newest state that may be forgotten. A server writes its disk at most every 100 ms
/// (`filestore.go`), and a majority has the newest proposals a moment later.
pub const LONGEST_FORGOTTEN: Duration = Duration::from_millis(250);

/// The servers as a consumer sees them.
#[derive(Clone, Copy)]
pub struct Surroundings<'s> {
    pub name: &'s ConsumerName,
    pub messages: &'s Messages,
    pub connected: &'s BTreeSet<Connection>,
    /// The time by which the clock of the servers is ahead.
    pub ahead: Duration,
}

pub struct Consumer {
    pub config: Config,
    created: Arc<str>,
    paused_until: Option<Time>,
    /// The leader, and since when it leads.
    leader: (String, u64),
    /// The leader is away: nothing is answered.
    pub leaderless: bool,
    pub state: State,
    /// The messages to deliver again, in this order.
    again: VecDeque<u64>,
    pub waiting: Pulls,
    /// Without copies: earlier states, each with its time. The newest may not be on the disk yet.
    history: VecDeque<(Time, State)>,
}

impl Consumer {
    /// A consumer that starts at the stream sequence `first`.
    pub fn new(config: Config, term: u64, first: u64) -> Self {
        Self {
            config,
            created: format!("made {term}").into(),
            paused_until: None,
            leader: ("n1".to_owned(), term),
            leaderless: false,
            state: State::new(first),
            again: VecDeque::new(),
            waiting: Pulls::default(),
            history: VecDeque::new(),
        }
    }

    pub fn info(&self, messages: &Messages, now: Time) -> ConsumerInfo {
        let config = &self.config;
        let (leader, since) = &self.leader;
        let since = if config.tells_since { since.to_string() } else { String::new() };
        ConsumerInfo {
            created: self.created.clone(),
            ack_policy: AckPolicy::Explicit,
            push: false,
            priority_groups: false,
            paused: self.paused(now),
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
            pending: messages.from(self.state.next).count() as u64,
            ack_pending: self.state.pending.len() as u64,
            delivered: self.state.deliveries,
            delivered_stream: self.state.next - 1,
        }
    }

    /// Starts again at this stream sequence, under its old name and `created`.
    pub fn reset(&mut self, to: u64) {
        self.state = State::new(to);
        self.again.clear();
        self.history.clear();
    }

    pub fn pause(&mut self, until: Option<Time>, now: Time) {
        self.paused_until = until.filter(|until| *until > now);
    }

    fn paused(&self, now: Time) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }

    /// The number of messages that could be handed out.
    pub fn available(&self, messages: &Messages) -> usize {
        messages.from(self.state.next).count() + self.again.len()
    }

    fn full(&self) -> bool {
        let pending = self.state.pending.len() as u64;
        self.config.max_ack_pending.is_some_and(|most| pending >= most)
    }

    /// Whether no message is left. At `max_ack_pending` there may be some for later.
    fn dry(&self, messages: &Messages) -> bool {
        self.again.is_empty() && messages.from(self.state.next).next().is_none()
    }

    /// Lets time pass until `now`, and hands out every message that can be handed out.
    pub fn advance(
        &mut self,
        around: &Surroundings<'_>,
        delivered: &mut u64,
        sent: &mut Vec<Sent>,
        now: Time,
    ) {
        self.paused_until = self.paused_until.filter(|until| now < *until);
        self.expire(now);
        self.note(now);
        self.waiting.expire(false, around.connected, sent, now);
        if !self.leaderless && !self.paused(now) {
            self.hand_out(around, delivered, sent, now);
        }
        self.waiting.expire(self.dry(around.messages), around.connected, sent, now);
        self.note(now);
    }

    /// Moves expired messages to the end of the line of messages to deliver again.
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

    /// Without copies: keeps the state for as long as a newer state may not be on the disk.
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

    /// Another server leads. With copies it has the state of a majority: without the newest progress and
    /// delayed Naks, and without all plain Naks.
    pub fn change_leader(&mut self, term: u64, forgets: Duration, now: Time) {
        self.leader = (format!("n{}", 1 + term % 3), term);
        self.leaderless = false;
        self.again.clear();
        let kept = now.saturating_sub(forgets.min(LONGEST_FORGOTTEN));
        for pending in self.state.pending.values_mut() {
            let (stored, at, before) = pending.stored;
            pending.began = if at > kept { before } else { stored };
            pending.stored = (pending.began, now, pending.began);
        }
    }

    /// The server starts again. `memory`: it has the state that was on its disk `forgets` ago.
    pub fn restart(
        &mut self,
        term: u64,
        forgets: Duration,
        memory: bool,
        around: &Surroundings<'_>,
        now: Time,
    ) {
        self.leader.1 = term;
        self.waiting.clear();
        self.again.clear();
        let first = around.messages.first();
        if !memory {
            self.state = State::new(first);
        } else if self.config.replicas == 1 {
            let kept = now.saturating_sub(forgets.min(LONGEST_FORGOTTEN));
            let on_disk = self.history.iter().rev().find(|(at, _)| *at <= kept);
            self.state = match on_disk.or(self.history.front()) {
                Some((_, state)) => state.clone(),
                None => State::new(first),
            };
        }
        self.state.pending.retain(|sequence, pending| {
            let Some(message) = around.messages.get(*sequence) else { return false };
            let published = message.stored.saturating_sub(EPOCH + around.ahead);
            pending.began = pending.stored.0.min(now);
            pending.stored = (pending.began, now, published);
            true
        });
        self.history = VecDeque::from([(now, self.state.clone())]);
    }

    /// The next message, if it may be handed out now. `true`: it was delivered before.
    fn next(&mut self, messages: &Messages) -> Option<(u64, bool)> {
        while let Some(sequence) = self.again.pop_front() {
            let over = |most: u64| self.state.count(sequence) >= most;
            // The message has left its stream, or is settled, or has had all its attempts.
            let there = messages.get(sequence).is_some();
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
        let (sequence, _) = messages.from(self.state.next).next()?;
        Some((*sequence, false))
    }

    /// Serves the pulls round robin, one message each.
    fn hand_out(
        &mut self,
        around: &Surroundings<'_>,
        delivered: &mut u64,
        sent: &mut Vec<Sent>,
        now: Time,
    ) {
        let Surroundings { messages, connected, .. } = *around;
        while !self.waiting.is_empty(connected) {
            let Some((sequence, again)) = self.next(messages) else { return };
            let Some(message) = messages.get(sequence) else { return };
            let size = message.payload.len() as u64 + 100;
            let Some(pull) = self.waiting.next(size, sent) else {
                if again {
                    self.again.push_front(sequence);
                }
                return;
            };
            *delivered += 1;
            let delivery = self.deliver(around, sequence, DeliveryId::at(*delivered), now);
            sent.push(Sent::Message { to: pull.inbox(), delivery, poison: message.poison });
            self.waiting.requeue(pull, size, sent);
        }
    }

    fn deliver(
        &mut self,
        around: &Surroundings<'_>,
        sequence: u64,
        id: DeliveryId,
        now: Time,
    ) -> Delivery {
        let Surroundings { name, messages, ahead, .. } = *around;
        let state = &mut self.state;
        let message = messages.get(sequence).expect("a stored message");
        state.next = state.next.max(sequence + 1);
        state.deliveries += 1;
        let count = state.counts.entry(sequence).or_default();
        *count += 1;
        let (count, place) = (*count, state.deliveries);
        // consumer.go:5756: the stored time is the time of publication (updateDelivered).
        let published = message.stored.saturating_sub(EPOCH + ahead);
        let before = state.pending.get(&sequence).map_or(published, |pending| pending.stored.0);
        let stored = (published, now, before);
        state.pending.insert(sequence, Pending { newest: id, began: now, stored });
        let left = messages.from(state.next).count() as u64;
        let stored = u64::try_from(message.stored.as_nanos()).unwrap_or(u64::MAX) + id.0;
        let ack = subject_of(name, (count, sequence, place), stored, left);
        Delivery {
            ack: AckSubject(ack.into()),
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

    /// The effect of an ack on the delivery with its stream sequence. The holder of that delivery may be
    /// somebody else.
    pub fn apply(&mut self, sequence: u64, kind: &AckKind, now: Time) -> Option<DeliveryId> {
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
            // consumer.go:3301: the stored value is the time at which the clock would have started.
            AckKind::Nak(Some(delay)) => {
                pending.began = (now + *delay).saturating_sub(shown);
                pending.stored = (pending.began, now, pending.stored.0);
                self.again.retain(|other| *other != sequence);
            }
            // A message that waits to be delivered again stays in that line.
            AckKind::Progress => {
                pending.began = now;
                pending.stored = (now, now, pending.stored.0);
            }
        }
        Some(newest)
    }

    /// The message is settled, or has left its stream.
    pub fn settle(&mut self, sequence: u64) {
        self.state.settle(sequence);
        self.again.retain(|other| *other != sequence);
    }

    /// The next time at which time alone changes something.
    pub fn next_due(&self) -> Option<Time> {
        if self.leaderless {
            return None;
        }
        let pending = self.state.pending.iter();
        let pending = pending.filter(|(sequence, _)| !self.again.contains(sequence));
        let expiry = pending.map(|(sequence, pending)| {
            pending.began + self.config.wait(self.state.count(*sequence).max(1))
        });
        expiry.chain(self.waiting.next_due()).chain(self.paused_until).min()
    }
}
