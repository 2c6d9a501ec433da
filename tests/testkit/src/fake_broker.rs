//! A broker in memory: one stream, one consumer, JetStream's rules as the contract suite holds them,
//! and faults on demand.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard},
    time::{Duration, Instant},
};

use fetch_proxy::{
    broker::{
        AckKind, AckPolicy, AckPublish, AckSubject, Arrival, Broker, BrokerError, Confirmation,
        ConnectionKind, ConsumerInfo, ConsumerName, Delivery, Denial, Inbox, InboxEvent, InfoError,
        JetStream, Leader, Link, PullEnd, PullRequest, Search, Server, Unreadable,
    },
    clock,
    lessor::LeaseLimits,
};
use tokio::sync::{Notify, watch};

/// The fate of a settlement, in order of use. Without a script the broker works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It never leaves.
    Unsent,
    /// The consumer has no leader.
    Leaderless,
    /// The proxy has no right to it.
    Denied,
    /// It is applied, and its answer is lost.
    AnswerLost,
    /// It is lost, and nobody knows.
    Lost,
    /// It works, after this long.
    Slow(Duration),
    /// It is applied at once, and answered after this long.
    AnsweredAfter(Duration),
}

/// The limits of a lessor, for a test that does not care.
pub fn limits() -> LeaseLimits {
    LeaseLimits {
        max_leases: 100,
        max_leases_per_consumer: usize::MAX,
        max_lease: Duration::from_secs(3600),
        max_waiters: 10,
        max_pull_bytes: 16 << 20,
        settle_timeout: Duration::from_secs(5),
    }
}

/// The right that a settlement lacks which is denied.
pub const RIGHT: &str = "$JS.ACK.>";

/// Names of consumers begin like this that have no messages.
pub const IDLE: &str = "idle";

/// How much a look for unreadable messages sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SearchScope {
    All,
    Nothing,
    /// Nothing, and not everywhere.
    Part,
    NotAllowed,
}

#[derive(Clone)]
pub struct FakeBroker(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    changed: Notify,
    link: watch::Sender<Link>,
}

struct State {
    info: Option<ConsumerInfo>,
    name: ConsumerName,
    messages: Vec<bytes::Bytes>,
    next: usize,
    /// Unsettled, by stream sequence.
    pending: BTreeMap<u64, Pending>,
    again: VecDeque<u64>,
    deliveries: u64,
    /// How long ago messages were published when they are delivered; `None`: since ever.
    age: Option<Duration>,
    counts: BTreeMap<u64, u64>,
    faults: VecDeque<Fault>,
    published: Vec<AckKind>,
    /// INFO is not answered.
    silent: bool,
    info_delay: Duration,
    refusal: Option<PullEnd>,
    lose_pulls: bool,
    told: Option<u64>,
    /// Stream sequences of messages that break every connection.
    poison: BTreeSet<u64>,
    /// Stream sequences of messages that are stored no longer.
    removed: BTreeSet<u64>,
    scope: SearchScope,
    looks: usize,
    opened: Vec<ConnectionKind>,
    spent: usize,
    /// The shared connection, and the last one that is broken.
    epoch: u64,
    broken: u64,
}

struct Pending {
    due: Instant,
}

pub fn info(ack_wait: Duration) -> ConsumerInfo {
    ConsumerInfo {
        created: "first".into(),
        ack_policy: AckPolicy::Explicit,
        push: false,
        priority_groups: false,
        paused: false,
        ack_wait,
        backoff: Vec::new(),
        max_deliver: None,
        max_ack_pending: Some(1000),
        max_batch: None,
        max_expires: None,
        max_request_bytes: None,
        replicas: 1,
        pending: 0,
        ack_pending: 0,
        waiting: 0,
        redelivered: 0,
        filter_subjects: Vec::new(),
        delivered: 0,
        delivered_stream: 0,
        leader: Leader(1),
        leader_shows: true,
    }
}

pub fn up(epoch: u64) -> Link {
    up_again(epoch, 1)
}

/// The same, where other replicas may have said something unheard.
pub fn up_again(epoch: u64, bus_epoch: u64) -> Link {
    let (id, name, version) = ("fake".into(), "fake-0".into(), "2.15.1".into());
    Link::Up(Arc::new(Server { epoch, bus_epoch, id, name, version, max_payload: 1 << 20 }))
}

impl FakeBroker {
    pub fn new(info: ConsumerInfo) -> Self {
        let state = State {
            info: Some(info),
            name: ConsumerName { stream: "S".into(), consumer: "worker".into() },
            messages: Vec::new(),
            next: 0,
            pending: BTreeMap::new(),
            again: VecDeque::new(),
            deliveries: 0,
            age: None,
            counts: BTreeMap::new(),
            faults: VecDeque::new(),
            published: Vec::new(),
            silent: false,
            info_delay: Duration::ZERO,
            refusal: None,
            lose_pulls: false,
            told: None,
            poison: BTreeSet::new(),
            removed: BTreeSet::new(),
            scope: SearchScope::All,
            looks: 0,
            opened: Vec::new(),
            spent: 0,
            epoch: 1,
            broken: 0,
        };
        let link = watch::channel(up(1)).0;
        Self(Arc::new(Shared { state: Mutex::new(state), changed: Notify::new(), link }))
    }

    pub fn name(&self) -> ConsumerName {
        self.state().name.clone()
    }

    pub fn publish(&self, payload: impl Into<bytes::Bytes>) {
        self.state().messages.push(payload.into());
        self.0.changed.notify_waiters();
    }

    /// The message leaves the stream. A delivery of it stays unsettled.
    pub fn remove(&self, sequence: u64) {
        self.state().removed.insert(sequence);
    }

    /// A message that breaks every connection that brings it.
    pub fn publish_poison(&self) {
        let mut state = self.state();
        state.messages.push("poison".into());
        let sequence = state.messages.len() as u64;
        state.poison.insert(sequence);
        drop(state);
        self.0.changed.notify_waiters();
    }

    /// Breaks the shared connection by what it brought to somebody else.
    pub fn break_shared(&self) {
        self.state().break_shared(&self.0.link);
        self.0.changed.notify_waiters();
    }

    /// Replaces the shared connection by another one, while it continues serving.
    pub fn replace_shared(&self) {
        self.state().replace_shared(&self.0.link);
    }

    /// Has another connection in place of the one over which replicas talk.
    pub fn hear_anew(&self) {
        self.0.link.send_replace(up_again(self.state().epoch, 2));
    }

    pub fn see(&self, scope: SearchScope) {
        self.state().scope = scope;
    }

    /// How often it was looked for unreadable messages.
    pub fn looks(&self) -> usize {
        self.state().looks
    }

    /// The connections of the inboxes that were opened so far.
    pub fn opened(&self) -> Vec<ConnectionKind> {
        self.state().opened.clone()
    }

    /// Pulls whose bytes were used up exactly.
    pub fn spent(&self) -> usize {
        self.state().spent
    }

    /// The next settlements meet these.
    pub fn script(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state().faults.extend(faults);
    }

    /// Changes what INFO says; `None` is a consumer that is gone.
    pub fn change(&self, change: impl FnOnce(&mut Option<ConsumerInfo>)) {
        change(&mut self.state().info);
        self.0.changed.notify_waiters();
    }

    /// The publications to ack subjects so far.
    pub fn published(&self) -> Vec<AckKind> {
        self.state().published.clone()
    }

    /// From now on INFO is not answered, as on a connection that stands still.
    pub fn silence(&self, silent: bool) {
        self.state().silent = silent;
    }

    /// The next pull ends like this and brings nothing.
    pub fn refuse_a_pull(&self, end: PullEnd) {
        self.state().refusal = Some(end);
        self.0.changed.notify_waiters();
    }

    /// From now on no pull reaches the server, and no one notices.
    pub fn lose_pulls(&self, lost: bool) {
        self.state().lose_pulls = lost;
    }

    /// The open pull ends like this now.
    pub fn tell_end_of(&self, no: u64) {
        self.state().told = Some(no);
        self.0.changed.notify_waiters();
    }

    /// Deliveries from now on were published so long before.
    pub fn age(&self, age: Duration) {
        self.state().age = Some(age);
    }

    /// From now on INFO says what was true this long ago.
    pub fn delay_info(&self, delay: Duration) {
        self.state().info_delay = delay;
    }

    /// Forgets all deliveries, like a server that has restarted without its memory. No connection
    /// is lost.
    pub fn forget(&self) {
        let mut state = self.state();
        (state.next, state.deliveries) = (0, 0);
        (state.pending, state.counts) = (BTreeMap::new(), BTreeMap::new());
        state.again.clear();
        drop(state);
        self.0.changed.notify_waiters();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap()
    }
}

impl State {
    fn break_shared(&mut self, link: &watch::Sender<Link>) {
        self.broken = self.epoch;
        self.replace_shared(link);
    }

    fn replace_shared(&mut self, link: &watch::Sender<Link>) {
        self.epoch += 1;
        link.send_replace(up(self.epoch));
    }

    fn tell(&self, name: &ConsumerName) -> Result<ConsumerInfo, InfoError> {
        match &self.info {
            _ if name.stream != self.name.stream => Err(InfoError::NoStream),
            // Other consumers are there, and nothing is for them.
            Some(info) if name.consumer.starts_with(IDLE) => Ok(info.clone()),
            Some(info) if name.consumer == self.name.consumer => Ok(ConsumerInfo {
                pending: (self.messages.len() - self.next) as u64,
                ack_pending: self.pending.len() as u64,
                delivered: self.deliveries,
                delivered_stream: self.next as u64,
                ..info.clone()
            }),
            Some(_) | None => Err(InfoError::NoConsumer),
        }
    }

    /// Puts expired messages in the line of messages to deliver again, in the order of their ends.
    fn expire(&mut self, now: Instant) {
        let due = self.pending.iter().filter(|(_, pending)| now >= pending.due);
        let due = due.filter(|(sequence, _)| !self.again.contains(sequence));
        let mut due: Vec<_> = due.map(|(sequence, pending)| (pending.due, *sequence)).collect();
        due.sort_unstable();
        self.again.extend(due.into_iter().map(|(_, sequence)| sequence));
    }

    /// The next message for a pull: expired and nacked ones first.
    fn deliver(&mut self, now: Instant) -> Option<Delivery> {
        self.expire(now);
        let sequence = match self.again.pop_front() {
            Some(sequence) => sequence,
            None if self.next < self.messages.len() => {
                self.next += 1;
                self.next as u64
            }
            None => return None,
        };
        let info = self.info.as_ref()?;
        let count = self.counts.entry(sequence).or_default();
        *count += 1;
        self.deliveries += 1;
        self.pending.insert(sequence, Pending { due: now + info.ack_wait });
        let (stream, consumer) = (&self.name.stream, &self.name.consumer);
        let (deliveries, left) = (self.deliveries, self.messages.len() - self.next);
        let ack = format!("$JS.ACK.{stream}.{consumer}.{count}.{sequence}.{deliveries}.1.{left}");
        Some(Delivery {
            ack: AckSubject(ack.into()),
            subject: "s".into(),
            payload: self.messages[sequence as usize - 1].clone(),
            headers: Vec::new(),
            stream_sequence: sequence,
            consumer_sequence: self.deliveries,
            delivery_count: *count,
            pending: left as u64,
            published: self.published_at(),
        })
    }

    fn published_at(&self) -> u64 {
        self.age.map_or(1, |age| {
            u64::try_from(clock::unix_time().saturating_sub(age).as_nanos()).unwrap()
        })
    }

    /// A delivery with its message as it is stored. `None`: it is stored no longer.
    fn stored(&self, ack: &AckSubject) -> Option<Delivery> {
        let tokens: Vec<u64> =
            ack.0.split('.').skip(4).map(|token| token.parse().unwrap()).collect();
        let [delivery_count, stream_sequence, consumer_sequence, _, pending] = tokens[..] else {
            panic!("no ack subject: {}", ack.0)
        };
        let gone = self.removed.contains(&stream_sequence);
        let payload = self.messages.get(stream_sequence as usize - 1).filter(|_| !gone)?.clone();
        Some(Delivery {
            ack: ack.clone(),
            subject: "s".into(),
            payload,
            headers: Vec::new(),
            stream_sequence,
            consumer_sequence,
            delivery_count,
            pending,
            published: self.published_at(),
        })
    }

    /// The effect of an order, and its answer.
    fn meet(&mut self, order: &AckPublish, fault: Option<Fault>) -> Result<(), BrokerError> {
        let gone = self.info.is_none();
        if !matches!(fault, Some(Fault::Unsent | Fault::Leaderless)) {
            self.published.push(order.kind.clone());
        }
        match fault {
            Some(Fault::Unsent) => return Err(BrokerError::Unsent("scripted".into())),
            Some(Fault::Leaderless) => return Err(BrokerError::Leaderless("scripted".into())),
            Some(Fault::Denied) => return Err(Denial::Permission(RIGHT.to_owned()).into()),
            Some(Fault::Lost) => return Err(BrokerError::Unconfirmed),
            _ if gone => return Err(Denial::Gone.into()),
            _ => self.apply(order, clock::now()),
        }
        if fault == Some(Fault::AnswerLost) { Err(BrokerError::Unconfirmed) } else { Ok(()) }
    }

    /// Everything is known by the stream sequence alone: JetStream does not fence.
    fn apply(&mut self, order: &AckPublish, now: Instant) {
        let tokens: Vec<&str> = order.ack.0.split('.').collect();
        let sequence: u64 = tokens[5].parse().unwrap();
        self.expire(now);
        let Some(info) = &self.info else { return };
        let Some(pending) = self.pending.get_mut(&sequence) else { return };
        let in_line = self.again.contains(&sequence);
        match &order.kind {
            AckKind::Ack | AckKind::Term(_) => {
                self.pending.remove(&sequence);
                self.again.retain(|other| *other != sequence);
            }
            AckKind::Nak(None) if in_line => {}
            AckKind::Nak(None) => self.again.push_back(sequence),
            AckKind::Nak(Some(delay)) => {
                pending.due = now + *delay;
                self.again.retain(|other| *other != sequence);
            }
            // A message that is in line stays there.
            AckKind::Progress => pending.due = now + info.ack_wait,
        }
    }
}

impl Broker for FakeBroker {
    type Inbox = FakeInbox;

    fn link(&self) -> Link {
        self.0.link.borrow().clone()
    }

    async fn link_change(&self, seen: &Link) -> Link {
        self.0.link.subscribe().wait_for(|link| link != seen).await.unwrap().clone()
    }

    fn jetstream(&self) -> JetStream {
        JetStream::There
    }

    async fn info(&self, name: &ConsumerName, until: Instant) -> Result<ConsumerInfo, InfoError> {
        if self.state().silent {
            clock::sleep_until(Some(until)).await;
            return Err(InfoError::Unavailable("silent".into()));
        }
        let (told, delay) = {
            let state = self.state();
            (state.tell(name), state.info_delay)
        };
        clock::sleep_until(Some(clock::now() + delay)).await;
        told
    }

    async fn open(
        &self,
        name: &ConsumerName,
        place: ConnectionKind,
    ) -> Result<FakeInbox, BrokerError> {
        let mut state = self.state();
        state.opened.push(place);
        let epoch = state.epoch;
        let idle = name.consumer.starts_with(IDLE);
        Ok(FakeInbox { broker: self.clone(), pull: None, place, epoch, broken: false, idle })
    }

    async fn unreadable(
        &self,
        name: &ConsumerName,
        _: u64,
        _: Instant,
    ) -> Result<Search, InfoError> {
        let mut state = self.state();
        state.looks += 1;
        let found = |sequence: &u64| Unreadable {
            ack: AckSubject(
                format!("$JS.ACK.{}.{}.1.{sequence}.1.1.0", name.stream, name.consumer).into(),
            ),
            stream_sequence: *sequence,
            why: "poison".into(),
        };
        let pending = |sequence: &&u64| state.pending.contains_key(sequence);
        match state.scope {
            SearchScope::All => {
                let found = state.poison.iter().filter(pending).map(found).collect();
                Ok(Search { found, complete: true })
            }
            SearchScope::Nothing => Ok(Search { found: Vec::new(), complete: true }),
            SearchScope::Part => Ok(Search { found: Vec::new(), complete: false }),
            SearchScope::NotAllowed => Err(InfoError::Permission("MSG.GET".into())),
        }
    }

    async fn read_again(
        &self,
        deliveries: &[AckSubject],
        until: Instant,
    ) -> Result<Vec<Option<Delivery>>, InfoError> {
        if self.state().silent {
            clock::sleep_until(Some(until)).await;
            return Err(InfoError::Unavailable("silent".into()));
        }
        let state = self.state();
        match state.scope {
            SearchScope::NotAllowed => Err(InfoError::Permission("MSG.GET".into())),
            SearchScope::All | SearchScope::Nothing | SearchScope::Part => {
                Ok(deliveries.iter().map(|ack| state.stored(ack)).collect())
            }
        }
    }

    async fn settle(
        &self,
        orders: Vec<AckPublish>,
        _: Confirmation,
        until: Instant,
    ) -> Vec<Result<(), BrokerError>> {
        let mut results = Vec::new();
        for order in orders {
            let fault = self.state().faults.pop_front();
            if let Some(Fault::Slow(delay)) = fault {
                clock::sleep_until(Some(until.min(clock::now() + delay))).await;
            }
            let passed = || order.by.is_some_and(|by| by <= clock::now());
            let fault = if passed() { Some(Fault::Unsent) } else { fault };
            let result = self.state().meet(&order, fault);
            if matches!(fault, Some(Fault::AnswerLost | Fault::Lost)) {
                clock::sleep_until(Some(until)).await;
            }
            let mut unanswered = false;
            if let Some(Fault::AnsweredAfter(delay)) = fault {
                let answered = clock::now() + delay;
                unanswered = answered > until;
                clock::sleep_until(Some(until.min(answered))).await;
            }
            // A late answer may concern the delivery of another holder.
            results.push(match result {
                Ok(()) if unanswered => Err(BrokerError::Unconfirmed),
                Ok(()) if passed() => Err(BrokerError::Late),
                result => result,
            });
        }
        self.0.changed.notify_waiters();
        results
    }

    fn delivery_of(ack: &AckSubject) -> Option<(ConsumerName, u64)> {
        let tokens: Vec<&str> = ack.0.split('.').collect();
        let name = ConsumerName { stream: tokens[2].into(), consumer: tokens[3].into() };
        Some((name, tokens[4].parse().ok()?))
    }

    async fn close(&self, _: Instant) {}
}

pub struct FakeInbox {
    broker: FakeBroker,
    /// The open pull, what it has brought, and when it ends. The pull has the bytes that are left.
    pull: Option<(PullRequest, u32, Instant)>,
    place: ConnectionKind,
    epoch: u64,
    broken: bool,
    /// Nothing is for its consumer.
    idle: bool,
}

impl Inbox for FakeInbox {
    async fn pull(&mut self, pull: PullRequest) -> Result<(), BrokerError> {
        let lost = self.broker.state().lose_pulls;
        self.pull = (!lost).then(|| (pull, 0, clock::now() + pull.expires));
        Ok(())
    }

    async fn next(&mut self, into: &mut Vec<Arrival>) -> InboxEvent {
        let shared = self.broker.0.clone();
        loop {
            let changed = shared.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let wake = if self.gone() { None } else { self.look(into) };
            if !into.is_empty() {
                return InboxEvent::Arrived;
            }
            if self.gone() {
                return InboxEvent::Broken;
            }
            tokio::select! {
                () = changed => {}
                () = clock::sleep_until(wake) => {}
            }
        }
    }
}

impl FakeInbox {
    fn gone(&self) -> bool {
        let broken = self.broker.state().broken;
        self.broken || self.place == ConnectionKind::Shared && self.epoch <= broken
    }

    /// Takes what the open pull brings now; when to look again if nothing changes.
    fn look(&mut self, into: &mut Vec<Arrival>) -> Option<Instant> {
        if let Some(no) = self.broker.state().told.take() {
            into.push(Arrival::End { no, end: PullEnd::Done });
        }
        let (mut pull, mut got, ends) = self.pull.take()?;
        let now = clock::now();
        let mut state = self.broker.0.state.lock().unwrap();
        let gone = state.info.is_none().then_some(PullEnd::ConsumerGone);
        let mut end = state.refusal.take().or(gone);
        while end.is_none() && got < pull.batch && !self.idle {
            let size = state.messages.get(state.next).map_or(0, |message| message.len() as u64);
            if pull.max_bytes.is_some_and(|most| size > most) {
                end = Some(PullEnd::TooLarge);
            } else if let Some(delivery) = state.deliver(now) {
                if state.poison.contains(&delivery.stream_sequence) {
                    match self.place {
                        ConnectionKind::Dedicated => self.broken = true,
                        ConnectionKind::Shared => state.break_shared(&self.broker.0.link),
                    }
                    return None;
                }
                got += 1;
                let size = delivery.subject.len() + delivery.ack.0.len() + delivery.payload.len();
                pull.max_bytes = pull.max_bytes.and_then(|left| left.checked_sub(size as u64));
                into.push(Arrival::Message(Box::new(delivery)));
                if pull.max_bytes == Some(0) {
                    // Bytes that are used up exactly end without a word, too.
                    state.spent += 1;
                    return None;
                }
            } else {
                break;
            }
        }
        if got == pull.batch {
            // A full batch ends without a word.
            return None;
        }
        if now >= ends || got > 0 && pull.no_wait {
            end = end.or(Some(PullEnd::Done));
        }
        if let Some(end) = end {
            into.push(Arrival::End { no: pull.no, end });
            return None;
        }
        self.pull = Some((pull, got, ends));
        let due = state.pending.values().map(|pending| pending.due).min().filter(|_| !self.idle);
        Some(due.map_or(ends, |due| due.min(ends)))
    }
}
