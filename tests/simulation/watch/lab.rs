//! A small world for the tests of the checks: says what was seen, and asks which checks have found something.
//! One consumer with an ack wait of 4 s, on good wires. A message is sent on process 1 unless a test says so.

use std::time::Duration;

use fetch_proxy::{
    broker::{AckKind, AckSubject, ConsumerName, Delivery},
    pb::{self, settlement::Action},
};

use super::{
    super::{
        jetstream::{Applied, Config, Connection, DeliveryId, InboxId, Sent, Time},
        net::{Watcher as _, Way},
    },
    BackEnd, CallId, Fate, FetchEnd, FetchId, Look, Place, Reading, Room, Served, Shared, Trouble,
    Watch,
};

pub const ACK_WAIT: u64 = 4_000;

pub fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

pub fn name() -> ConsumerName {
    ConsumerName { stream: "S".into(), consumer: "c".into() }
}

pub fn ack() -> Action {
    Action::Ack(pb::AckAction {})
}

/// The end of a call for this reason.
pub fn refused(reason: &str) -> tonic::Status {
    let mut status = tonic::Status::unavailable("no");
    let reason = reason.parse().expect("a reason is ASCII");
    status.metadata_mut().insert(fetch_proxy::reason::REASON_TRAILER, reason);
    status
}

pub fn nak(delay: u64) -> Action {
    Action::Nak(pb::NakAction {
        delay: (delay > 0).then(|| testkit::millis(delay as i64)).flatten(),
    })
}

pub fn extend(lease: u64) -> Action {
    Action::Extend(pb::ExtendAction { lease: testkit::millis(lease as i64) })
}

/// The message as a client gets it, with a lease of this length.
pub fn message(id: DeliveryId, attempt: u32, lease: u64) -> pb::Delivery {
    let nanos = i32::try_from(id.0).unwrap();
    pb::Delivery {
        stream_sequence: 1,
        delivery_count: attempt,
        publish_time: Some(prost_types::Timestamp { seconds: 0, nanos }),
        lease: testkit::millis(lease as i64),
        ..pb::Delivery::default()
    }
}

fn answer(id: DeliveryId, attempt: u32, lease: u64) -> pb::FetchResponse {
    let messages = vec![message(id, attempt, lease)];
    pb::FetchResponse { messages, ..pb::FetchResponse::default() }
}

pub struct Lab {
    shared: Shared,
    pub now: Time,
    /// From this sequence on, the consumer has delivered nothing.
    pub next: u64,
    sent: u64,
}

impl Lab {
    pub fn new() -> Self {
        Self::with(Config::new(millis(ACK_WAIT)))
    }

    pub fn with(config: Config) -> Self {
        let watch = Watch::default();
        let shared = Shared(std::sync::Arc::new(std::sync::Mutex::new(watch)));
        let lab = Self { shared, now: Time::ZERO, next: 2, sent: 0 };
        lab.watch().configured(&name(), &config, lab.now);
        lab.watch().published("S", 1, Fate::Plain, lab.now);
        lab
    }

    pub fn watch(&self) -> std::sync::MutexGuard<'_, Watch> {
        self.shared.0.lock().unwrap()
    }

    pub fn wait(&mut self, time: u64) {
        self.now += millis(time);
    }

    pub fn trouble(&self, trouble: Trouble, lasts: u64) {
        self.watch().trouble(trouble, None, self.now, self.now + millis(lasts));
    }

    /// JetStream sends message 1, and it arrives `way` later.
    pub fn send_slowly(&mut self, side: usize, attempt: u64, way: u64) -> DeliveryId {
        self.send_of(1, (side, attempt), way)
    }

    /// The same, of another message.
    pub fn send_of(
        &mut self,
        sequence: u64,
        (side, attempt): (usize, u64),
        way: u64,
    ) -> DeliveryId {
        self.sent += 1;
        let id = DeliveryId(self.sent);
        let ack = format!("$JS.ACK.S.c.{attempt}.{sequence}.{}.{}.0", self.sent, self.sent);
        let delivery = Delivery {
            ack: AckSubject(ack.into()),
            subject: "S.x".to_owned(),
            payload: "x".into(),
            headers: Vec::new(),
            stream_sequence: sequence,
            consumer_sequence: self.sent,
            delivery_count: attempt,
            pending: 0,
            published: self.sent,
        };
        let to = InboxId { connection: Connection(1), inbox: 1 };
        self.shared.sent(self.now, side, &Sent::Message { to, delivery, poison: false });
        self.wait(way);
        self.shared.arrived(self.now, id);
        id
    }

    /// It arrives later than was said.
    pub fn arrive(&mut self, id: DeliveryId) {
        self.shared.arrived(self.now, id);
    }

    pub fn send(&mut self, side: usize, attempt: u64) -> DeliveryId {
        self.send_slowly(side, attempt, 1)
    }

    pub fn fetch(&self, side: usize, max_wait: u64) -> FetchId {
        self.fetch_for(side, max_wait, None)
    }

    fn fetch_for(&self, side: usize, max_wait: u64, lease: Option<u64>) -> FetchId {
        let request = pb::FetchRequest {
            stream: "S".to_owned(),
            consumer: "c".to_owned(),
            n: 1,
            max_wait: testkit::millis(max_wait as i64),
            lease: lease.and_then(|lease| testkit::millis(lease as i64)),
            ..pb::FetchRequest::default()
        };
        let mut watch = self.watch();
        let fetch = watch.fetch_called(side, &request, None, self.now);
        watch.fetch_waits(fetch, Some(self.now));
        fetch
    }

    /// A Fetch with a name has arrived at a replica that remembers attempts.
    pub fn fetch_named(&self, side: usize, attempt: &str) -> FetchId {
        let request = pb::FetchRequest {
            stream: "S".to_owned(),
            consumer: "c".to_owned(),
            n: 1,
            max_wait: testkit::millis(1_000),
            attempt_id: attempt.to_owned(),
            ..pb::FetchRequest::default()
        };
        let mut watch = self.watch();
        watch.look_at_rooms(&[Room { side, most: 200, held: 0, free: 200 }], self.now);
        let fetch = watch.fetch_called(side, &request, None, self.now);
        watch.fetch_waits(fetch, Some(self.now));
        fetch
    }

    /// Attempt `a` has the message until `lease` is over, and its client does not know it.
    pub fn lent(&mut self, lease: u64) -> DeliveryId {
        self.wait(20_000);
        let id = self.send(1, 1);
        let first = self.fetch_named(1, "a");
        self.write_to(first, Some((id, lease)), pb::EmptyReason::Unspecified);
        self.end(first, FetchEnd::Gone);
        self.wait(10);
        id
    }

    /// The answer to this Fetch is written, with the message or with this reason.
    pub fn write_to(
        &self,
        fetch: FetchId,
        message: Option<(DeliveryId, u64)>,
        empty: pb::EmptyReason,
    ) {
        let none = || pb::FetchResponse { empty_reason: empty.into(), ..Default::default() };
        let answer = message.map_or_else(none, |(id, lease)| answer(id, 1, lease));
        self.watch().fetch_written(fetch, &answer, self.now);
    }

    /// An attempt is given back at a process, which has the message.
    pub fn give_back(&self, side: usize, attempt: &str) {
        let mut watch = self.watch();
        let back = watch.give_back_called(attempt, side, self.now);
        watch.give_back_ended((attempt, back), BackEnd::Done(1), self.now);
    }

    /// A client has opened a stream with this credit at a process.
    pub fn open_stream(&self, side: usize, credit: u32) -> FetchId {
        self.open_stream_with(side, credit, None)
    }

    /// The same, with this kind of leases.
    pub fn open_stream_with(
        &self,
        side: usize,
        credit: u32,
        holding: Option<pb::consume_start::Holding>,
    ) -> FetchId {
        let credit = pb::ConsumeCredit { id: 1, max_leases: Some(credit), max_bytes: None };
        let start = pb::ConsumeStart {
            stream: "S".to_owned(),
            consumer: "c".to_owned(),
            credit: Some(credit),
            holding,
            ..Default::default()
        };
        let stream = self.watch().stream_called(side, &start, self.now);
        let opened = Some(pb::ConsumeOpened::default());
        let frame = pb::ConsumeResponse { opened, credit_id: 1, ..Default::default() };
        self.watch().frame_written(stream, &frame, (self.now, self.now));
        stream
    }

    /// A client on a stream with `keep` at a process has message 1.
    pub fn kept(&mut self, side: usize, grace: u64) -> (FetchId, DeliveryId) {
        let keep = pb::ConsumeKeep { grace: testkit::millis(grace as i64), at_most: None };
        let holding = Some(pb::consume_start::Holding::Keep(keep));
        let stream = self.open_stream_with(side, 5, holding);
        let id = self.send(side, 1);
        let messages = vec![message(id, 1, 60_000)];
        let frame = pb::ConsumeResponse { messages, ..Default::default() };
        self.watch().frame_written(stream, &frame, (self.now, self.now));
        self.watch().frame_received(stream, &frame, (self.now, self.now));
        (stream, id)
    }

    pub fn end(&self, fetch: FetchId, end: FetchEnd<'_>) {
        self.watch().fetch_ended(fetch, end, self.now);
    }

    /// An answer with the message is written, with a lease of this length, and is on its way.
    pub fn write(&self, id: DeliveryId, lease: u64) {
        self.watch().fetch_written(0, &answer(id, 1, lease), self.now);
    }

    /// A client has the message, with a lease of this length.
    pub fn hand(&self, side: usize, id: DeliveryId, attempt: u32, lease: u64) {
        let fetch = self.fetch_for(side, 1_000, Some(lease));
        self.answer(fetch, id, attempt, lease);
    }

    fn answer(&self, fetch: FetchId, id: DeliveryId, attempt: u32, lease: u64) {
        let answer = answer(id, attempt, lease);
        let served = Served { arrived: self.now, written: self.now };
        self.end(fetch, FetchEnd::Answer { answer: &answer, served, received: true });
    }

    /// A client that asked for no length has the message.
    pub fn hand_until_redelivery(&self, side: usize, id: DeliveryId) {
        self.hand_for(side, id, ACK_WAIT - ACK_WAIT / 10);
    }

    /// The same, and so much of its lease is left.
    pub fn hand_for(&self, side: usize, id: DeliveryId, left: u64) {
        let fetch = self.fetch(side, 1_000);
        self.answer(fetch, id, 1, left);
    }

    /// A message that a client has: sent to process 1, with a lease for the ack wait.
    pub fn held(&mut self) -> DeliveryId {
        let id = self.send(1, 1);
        self.hand_until_redelivery(1, id);
        id
    }

    pub fn ask(&self, side: usize, id: DeliveryId, action: &Action) -> Option<CallId> {
        self.watch().settle_called(side, id, action, (false, false), self.now)
    }

    pub fn succeed(&self, call: Option<CallId>, outcome: pb::Outcome, lease: u64) {
        let lease = (lease > 0).then(|| testkit::millis(lease as i64)).flatten();
        let outcome = outcome.into();
        let result = pb::SettleResult { outcome, lease, ..pb::SettleResult::default() };
        self.watch().settle_ended(call, &Reading::of_result(&result), self.now);
    }

    pub fn confirm(&self, call: Option<CallId>) {
        self.succeed(call, pb::Outcome::Confirmed, 0);
    }

    pub fn refuse(&self, call: Option<CallId>, reason: &str) {
        self.refuse_with(call, reason, ("", ""));
    }

    pub fn refuse_with(&self, call: Option<CallId>, reason: &str, (key, value): (&str, &str)) {
        let metadata = [(key.to_owned(), value.to_owned())].into();
        let (reason, message, retry_delay) = (reason.to_owned(), String::new(), None);
        let error = Some(pb::SettleError { reason, message, metadata, retry_delay });
        let result = pb::SettleResult { error, ..pb::SettleResult::default() };
        self.watch().settle_ended(call, &Reading::of_result(&result), self.now);
    }

    /// JetStream handles an ack of `of`, which settles `settled`. It left its replica 2 ms ago.
    pub fn apply(&mut self, side: usize, kind: AckKind, of: DeliveryId, settled: DeliveryId) {
        self.apply_late(side, kind, (of, settled), 2, false);
    }

    pub fn apply_late(
        &mut self,
        side: usize,
        kind: AckKind,
        (of, settled): (DeliveryId, DeliveryId),
        way: u64,
        late: bool,
    ) {
        let left = self.now.saturating_sub(millis(way));
        let applied = Applied { stream_sequence: 1, kind, of, settled: Some(settled) };
        self.shared.applied(self.now, side, &applied, Way { left, late });
    }

    /// A leader that leads no more confirms progress.
    pub fn progress_that_nobody_keeps(&mut self, of: DeliveryId) {
        self.shared.unkept(self.now, of, &AckKind::Progress);
    }

    /// INFO is answered.
    pub fn tell(&mut self, full: bool, paused: bool) {
        let mut model = super::super::jetstream::JetStream::new();
        model.add_stream("S");
        model.add_consumer(&name(), Config::new(millis(ACK_WAIT)));
        let Some(Ok(mut info)) = model.info(Connection(1), &name(), self.now) else { return };
        info.ack_pending = if full { info.max_ack_pending.unwrap() } else { 0 };
        info.paused = paused;
        self.shared.told(self.now, &name(), &info);
    }

    /// A replica is told that it may not ack.
    pub fn refuse_acks(&mut self, side: usize) {
        self.shared.refused(self.now, side, &name());
    }

    /// A replica obeys a policy without rights at the consumer, or with rights.
    pub fn deny(&mut self, side: usize, denied: bool) {
        let names = if denied { vec![name()] } else { Vec::new() };
        self.watch().denied(side, &names, self.now);
    }

    /// A question of a replica about the consumer is over.
    pub fn look_up(&mut self, side: usize, answered: bool) {
        self.shared.looked((self.now, self.now), side, &name(), answered.then_some(100));
    }

    /// The same, and the answer says how many deliveries the leader knows.
    pub fn look_up_knowing(&mut self, side: usize, delivered: u64) {
        self.shared.looked((self.now, self.now), side, &name(), Some(delivered));
    }

    /// A replica has all its connections again.
    pub fn learn(&mut self, side: usize) {
        self.learn_by_info(side);
        self.shared.linked(self.now, side);
    }

    pub fn learn_by_info(&mut self, side: usize) {
        self.shared.learned(self.now, side);
    }

    /// Looks every 250 ms for a time. Message 1 is not settled, and JetStream has so many for a pull.
    pub fn look_on(&mut self, time: u64, available: usize, full: bool) {
        let until = self.now + millis(time);
        while self.now < until {
            self.wait(250);
            let next = self.next;
            let look = Look { consumer: name(), unsettled: vec![1], next, available, full };
            let places = [1, 2].map(|side| Place { side, serves: true });
            self.watch().look(&[look], &places, self.now);
        }
    }

    /// The checks that have found something.
    pub fn found(&self) -> Vec<&'static str> {
        self.watch().findings().iter().map(|finding| finding.check).collect()
    }

    pub fn count(&self, what: &str) -> u64 {
        self.watch().coverage().of(what)
    }
}
