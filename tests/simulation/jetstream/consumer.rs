//! A consumer as its leader sees it: the state, and how it is handed out and settled.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use fetch_proxy::broker::{AckKind, AckPolicy, AckSubject, ConsumerInfo, Delivery, PullEnd};

use super::{
    ack_subject::{AckedDelivery, subject_of},
    again::Again,
    config::Config,
    journal::{Journal, LONGEST_FORGOTTEN},
    leadership::{Leadership, Replaced},
    outbox::Outbox,
    pulls::{Pull, Pulls},
    state::{Entry, State},
    stream::Messages,
    surroundings::Surroundings,
    types::{BEFORE, Connection, DeliveryId, EPOCH, InboxId, Sent, Time},
};

pub struct Consumer {
    config: Config,
    created: Arc<str>,
    paused_until: Option<Time>,
    pub leadership: Leadership,
    state: State,
    again: Again,
    waiting: Pulls,
    journal: Journal,
    outbox: Outbox,
    /// Attempts that no leader has sent, by sequence. They were counted, if they were not forgotten.
    unsent: Vec<(u64, u64)>,
    /// With copies: the time until a majority has a change.
    pub lag: Duration,
}

impl Consumer {
    /// A consumer that starts at the stream sequence `first`. Its leader leads since the term `since`.
    pub fn new(config: Config, created: Arc<str>, since: u64, first: u64) -> Self {
        Self {
            config,
            created,
            paused_until: None,
            leadership: Leadership::new(since),
            state: State::new(first),
            again: Again::default(),
            waiting: Pulls::default(),
            journal: Journal::new(State::new(first)),
            outbox: Outbox::default(),
            unsent: Vec::new(),
            lag: Duration::ZERO,
        }
    }

    pub fn update(&mut self, change: impl FnOnce(&mut Config), now: Time) {
        let wait = self.config.shown_wait();
        change(&mut self.config);
        if self.config.shown_wait() != wait {
            self.again.wait_changed(now);
        }
    }

    /// Starts again at this stream sequence, under its old name and `created`. Pulls stay.
    pub fn reset(&mut self, next: u64, now: Time) {
        self.write(Entry::Reset { next }, now);
        self.again.clear();
        self.unsent.clear();
    }

    pub fn pause(&mut self, until: Option<Time>, now: Time) {
        self.paused_until = until.filter(|until| *until > now);
    }

    /// The consumer is deleted, or its server stops in order.
    pub fn end_pulls(
        &mut self,
        end: &PullEnd,
        connected: &BTreeSet<Connection>,
        sent: &mut Vec<Sent>,
    ) {
        self.waiting.end_all(end, connected, sent);
    }

    pub fn info(&self, messages: &Messages, now: Time) -> ConsumerInfo {
        let Self { config, state, .. } = self;
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
            leader: self.leadership.shown(config),
            leader_shows: config.leader_shows(),
            pending: self.new_messages(messages).count() as u64,
            ack_pending: state.pending.len() as u64,
            waiting: 0,
            redelivered: 0,
            filter_subjects: config.filter.iter().cloned().collect(),
            delivered: state.deliveries,
            delivered_stream: state.last,
        }
    }

    /// The messages that were never delivered and match the filter.
    fn new_messages<'m>(&'m self, messages: &'m Messages) -> impl Iterator<Item = u64> {
        messages.from(self.state.next, self.config.filter.as_deref())
    }

    /// The sequences of the messages that still are to be delivered or settled.
    pub fn unsettled(&self, messages: &Messages) -> Vec<u64> {
        let pending = self.state.pending.keys().copied();
        pending.chain(self.new_messages(messages)).collect()
    }

    /// The newest delivery of each message that is out, by stream sequence.
    pub fn pending(&self) -> impl Iterator<Item = (u64, DeliveryId)> {
        self.state.pending.iter().map(|(sequence, pending)| (*sequence, pending.newest))
    }

    pub fn next_new(&self) -> u64 {
        self.state.next
    }

    /// Attempts that were lost with a leader: the sequence of the message, and the number of the attempt.
    pub fn unsent(&self) -> &[(u64, u64)] {
        &self.unsent
    }

    fn paused(&self, now: Time) -> bool {
        self.paused_until.is_some_and(|until| now < until)
    }

    /// The number of messages that a pull would bring now, and whether `max_ack_pending` is reached.
    pub fn available(&self, messages: &Messages, now: Time) -> (usize, bool) {
        let full = self.full();
        let new = if full { 0 } else { self.new_messages(messages).count() };
        (if self.paused(now) { 0 } else { self.again.len() + new }, full)
    }

    fn full(&self) -> bool {
        let pending = self.state.pending.len() as u64;
        self.config.max_ack_pending.is_some_and(|most| pending >= most)
    }

    fn write(&mut self, entry: Entry, now: Time) {
        self.state.record(&entry);
        self.journal.write(entry, now);
    }

    /// The leader has crashed.
    pub fn lose_leader(&mut self, now: Time) {
        self.leadership.lose(now);
        self.unsent.extend(self.outbox.clear());
        // Without copies nobody else knows the pulls. With copies the next leader does.
        if self.config.replicas == 1 {
            self.waiting.forget(|_| true);
        }
    }

    /// The leader leaves in order: all changes are replicated, or on the disk.
    pub fn step_down(&mut self, now: Time) {
        self.journal.keep(now);
        self.lose_leader(now);
    }

    /// A leader comes. It does not have the changes of the time `forgets` before the loss of the last
    /// leader that a majority had not either, and no plain Nak.
    pub fn elect(
        &mut self,
        term: u64,
        forgets: Duration,
        around: &mut Surroundings<'_>,
        now: Time,
    ) {
        let old = Replaced { info: self.info(around.messages, now), next: self.state.next };
        let last = self.leadership.elect(term, &self.config, old, now);
        self.recover(last.saturating_sub(forgets.min(LONGEST_FORGOTTEN)), around, now);
        self.waiting.forget(|connection| self.leadership.is_on_its_side(connection));
        // consumer.go:3213: pulls of the dead leader end with "Leadership Change".
        self.waiting.end_all(&PullEnd::LeaderGone, around.connected, around.sent);
    }

    /// The server starts again. `memory`: it has the state that was on its disk `forgets` ago.
    pub fn restart(
        &mut self,
        term: u64,
        forgets: Option<Duration>,
        around: &mut Surroundings<'_>,
        now: Time,
    ) {
        self.leadership = Leadership::new(term);
        self.waiting.forget(|_| true);
        match forgets {
            Some(_) if self.config.replicas > 1 => self.recover(now, around, now),
            Some(forgets) => {
                let forgets = forgets.min(LONGEST_FORGOTTEN);
                self.journal.read_from_disk(now.saturating_sub(forgets), EPOCH + around.ahead);
                self.recover(now, around, now);
            }
            None => {
                self.journal = Journal::new(State::new(around.messages.first()));
                self.recover(now, around, now);
            }
        }
    }

    /// Continues with the stored state of this time.
    fn recover(&mut self, at: Time, around: &Surroundings<'_>, now: Time) {
        self.state = self.journal.recover(at);
        self.unsent.extend(self.outbox.clear());
        self.again.start(now);
        let pending = self.state.pending.keys().copied();
        let gone = pending.filter(|sequence| around.messages.get(*sequence).is_none());
        let gone: Vec<u64> = gone.collect();
        for sequence in gone {
            self.settle(sequence, now);
        }
    }

    /// A pull request, and the reason if it is refused.
    pub fn pull(&mut self, pull: Pull, around: &Surroundings<'_>) -> Option<PullEnd> {
        self.waiting.forget(|connection| !around.connected.contains(&connection));
        let available = self.new_messages(around.messages).count() + self.again.len();
        self.waiting.add(pull, &self.config, available)
    }

    /// An ack, and the delivery that it had an effect on. The holder of that delivery may be somebody else.
    /// `None`: the consumer has not delivered the message yet, so there is no answer.
    pub fn ack(
        &mut self,
        of: &AckedDelivery,
        kind: &AckKind,
        now: Time,
    ) -> Option<Option<DeliveryId>> {
        let sequence = of.stream_sequence;
        if sequence >= self.state.next {
            return None;
        }
        let pending = self.state.pending.get(&sequence).map(|pending| pending.newest);
        let nak = matches!(kind, AckKind::Nak(_));
        if pending.is_none() || nak && self.state.ignores_nak(of.consumer_sequence) {
            return Some(None);
        }
        match kind {
            AckKind::Ack | AckKind::Term(_) => self.settle(sequence, now),
            AckKind::Nak(None) => self.again.push(sequence),
            // consumer.go:3301: the stored value is the time at which the clock would have started.
            AckKind::Nak(Some(delay)) => {
                self.again.remove(sequence);
                let began = (now + BEFORE + *delay).saturating_sub(self.config.shown_wait());
                self.write(Entry::Moved { sequence, began }, now);
                self.again.nacked_with_delay(now);
            }
            // A message that waits to be delivered again stays in that line.
            AckKind::Progress => self.write(Entry::Moved { sequence, began: now + BEFORE }, now),
        }
        Some(pending)
    }

    /// Sends the answer to an ack. The answer to an Ack or Term waits until a majority has the change.
    pub fn answer(
        &mut self,
        (sequence, kind): (u64, &AckKind),
        answer: Sent,
        sent: &mut Vec<Sent>,
        now: Time,
    ) {
        let replicated = matches!(kind, AckKind::Ack | AckKind::Term(_));
        if replicated && self.config.replicas > 1 {
            self.outbox.hold_answer(sequence, answer, now);
        } else {
            sent.push(answer);
        }
    }

    /// The message is settled, or has left its stream.
    pub fn settle(&mut self, sequence: u64, now: Time) {
        self.write(Entry::Settled { sequence }, now);
        self.again.remove(sequence);
    }

    /// Messages have left the stream all at once. The line of messages to deliver again is empty then:
    /// the purge looks for newer messages than there can be in it (consumer.go:6617).
    pub fn purge(&mut self, gone: &[u64], now: Time) {
        for sequence in gone {
            self.settle(*sequence, now);
        }
        self.again.clear();
    }

    /// The next time at which time alone changes something.
    pub fn next_due(&self, now: Time) -> Option<Time> {
        if !self.leadership.acts(now) {
            return None;
        }
        // A leader without a majority sends nothing that waits for one.
        let had = self.leadership.majority_until(now) == Some(now);
        let held = self.outbox.first().filter(|_| had).map(|at| at + self.lag);
        let due = [self.again.next_due(), self.waiting.next_due(), self.paused_until, held];
        due.into_iter().flatten().min()
    }

    /// Lets time pass until `now`, and hands out every message that can be handed out.
    pub fn advance(&mut self, around: &mut Surroundings<'_>, now: Time) {
        self.paused_until = self.paused_until.filter(|until| now < *until);
        if !self.leadership.acts(now) {
            return;
        }
        for sequence in self.again.check(&mut self.state, &self.config, now) {
            self.write(Entry::Exhausted { sequence }, now);
        }
        let mut ends = Vec::new();
        self.waiting.forget(|connection| !around.connected.contains(&connection));
        self.waiting.expire(&mut ends, now);
        // consumer.go:5566: only at `max_ack_pending` do pulls with `no_wait` stay open.
        if self.paused(now) || self.hand_out(around, &mut ends, now) {
            self.waiting.end_served(&mut ends);
        }
        for end in ends {
            self.outbox.end(end, around.sent);
        }
        self.replicate(around.sent, now);
    }

    /// The changes of the last time have become permanent.
    fn replicate(&mut self, sent: &mut Vec<Sent>, now: Time) {
        let Some(now) = self.leadership.majority_until(now) else { return };
        if self.config.replicas > 1
            && let Some(until) = now.checked_sub(self.lag)
        {
            self.journal.keep_answered(until);
            self.outbox.release(until, sent);
        }
        if let Some(until) = now.checked_sub(LONGEST_FORGOTTEN.max(self.lag)) {
            self.journal.keep(until);
        }
    }

    /// Serves the pulls round robin, one message each. `false`: it has stopped at `max_ack_pending`.
    fn hand_out(&mut self, around: &mut Surroundings<'_>, ends: &mut Vec<Sent>, now: Time) -> bool {
        while !self.waiting.is_empty() {
            let Some((sequence, again)) = self.next(around.messages, now) else {
                return !self.full();
            };
            let delivery = self.attempt(around, sequence);
            let size = delivery.subject.len() + delivery.ack.0.len() + delivery.payload.len();
            let Some(pull) = self.waiting.next(size as u64, ends) else {
                // consumer.go:5480: at the end of the line, and not at its place.
                if again {
                    self.again.push(sequence);
                }
                return true;
            };
            self.deliver(pull.inbox(), delivery, around, now);
            self.waiting.requeue(pull, size as u64);
        }
        true
    }

    /// The next message, if it may be handed out now. `true`: it was delivered before.
    fn next(&mut self, messages: &Messages, now: Time) -> Option<(u64, bool)> {
        while let Some(sequence) = self.again.pop() {
            if !self.state.pending.contains_key(&sequence) {
                continue;
            }
            let over = |most: u64| self.state.attempts(sequence) >= most;
            if messages.get(sequence).is_none() {
                self.settle(sequence, now);
            } else if self.config.max_deliver.is_some_and(over) {
                self.write(Entry::Exhausted { sequence }, now);
            } else {
                return Some((sequence, true));
            }
        }
        if self.full() {
            return None;
        }
        let next = self.new_messages(messages).next();
        if next.is_none() && self.state.next <= messages.last() {
            // Messages that do not match are passed for good, also if the filter changes later.
            self.write(Entry::Skipped { next: messages.last() + 1 }, now);
        }
        next.map(|sequence| (sequence, false))
    }

    /// The next attempt to deliver this message, as it is sent.
    fn attempt(&self, around: &Surroundings<'_>, sequence: u64) -> Delivery {
        let message = around.messages.get(sequence).expect("a stored message");
        let attempt = self.state.attempts(sequence) + 1;
        let place = self.state.deliveries + 1;
        let after = self.state.next.max(sequence + 1);
        let filter = self.config.filter.as_deref();
        let left = around.messages.from(after, filter).count() as u64;
        let stored = u64::try_from(message.stored.as_nanos()).unwrap_or(u64::MAX);
        let published = stored + DeliveryId::at(*around.delivered + 1).0;
        let ack = subject_of(around.name, (attempt, sequence, place), published, left);
        Delivery {
            ack: AckSubject(ack.into()),
            subject: message.subject.clone(),
            payload: message.payload.clone(),
            headers: Vec::new(),
            stream_sequence: sequence,
            consumer_sequence: place,
            delivery_count: attempt,
            pending: left,
            published,
        }
    }

    fn deliver(
        &mut self,
        to: InboxId,
        delivery: Delivery,
        around: &mut Surroundings<'_>,
        now: Time,
    ) {
        *around.delivered += 1;
        let sequence = delivery.stream_sequence;
        let message = around.messages.get(sequence).expect("a stored message");
        let (attempt, newest) = (delivery.delivery_count, DeliveryId::of(delivery.published));
        let published = BEFORE + message.stored.saturating_sub(EPOCH + around.ahead);
        self.write(Entry::Delivered { sequence, attempt, newest, published }, now);
        if let Some(pending) = self.state.pending.get_mut(&sequence) {
            pending.began = now + BEFORE;
        }
        self.again.delivered(self.config.wait(attempt), now);
        let sent = Sent::Message { to, delivery, poison: message.poison };
        if self.config.replicas > 1 {
            self.outbox.hold(sent, now);
        } else {
            around.sent.push(sent);
        }
    }
}
