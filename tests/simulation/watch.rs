//! The view from outside: every delivery, every settlement and its effect, every answer to a client. Owns the
//! order in which facts and checks come: a fact stands in the ledger before a check sees it. It knows nothing
//! of the inside of a replica.
//!
//! ```text
//!  net, clients, world ──▶ Watch ──▶ ledger (facts) ──▶ delivery, holders, leases, promises, calls, darkness
//!                                                                  └──▶ report: findings, coverage
//! ```
//! Each check is a room: its `//!` says the promise. Each is pure, and has tests that must fail and tests that
//! must pass.

mod answers;
mod attempts;
mod calls;
mod causes;
mod coverage;
mod darkness;
mod delivery;
mod exercised;
mod expired;
mod give_backs;
mod holders;
mod keep;
#[cfg(test)]
mod lab;
mod leases;
mod ledger;
mod looks;
mod one_call;
mod places;
mod promises;
mod repeats;
mod report;
mod rights;
mod streams;
mod troubles;
mod unheard;
mod windows;

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::Duration,
};

use fetch_proxy::{
    broker::{AckKind, ConsumerInfo, ConsumerName},
    lease::margin,
    pb::{self, settlement::Action},
};

pub use self::{
    answers::Reading,
    calls::{FetchEnd, FetchId, Served},
    coverage::Coverage,
    darkness::{Look, Place},
    exercised::{DEMANDED, DEMANDED_OF_ATTEMPTS, DEMANDED_OF_KEEP, DEMANDED_OF_STREAMS},
    give_backs::BackEnd,
    ledger::{CallId, Fate, Kind, Told},
    places::Room,
    report::Finding,
    troubles::Trouble,
};
use self::{
    calls::OpenFetch,
    darkness::Looked,
    ledger::{Delivered, Effect, Hold, Ledger, SettleCall, Stored, wait_of},
    places::Pulled,
    report::Report,
    streams::Stream,
    troubles::TroubleSpan,
};
use super::{
    jetstream::{self, Applied, Config, DeliveryId, Sent, Time},
    net::{Watcher, Way},
};

/// All checks over one run.
#[derive(Debug)]
pub struct Watch {
    ledger: Ledger,
    fetches: BTreeMap<FetchId, OpenFetch>,
    next_fetch: FetchId,
    /// Settlements that are under way.
    settling: usize,
    looked: BTreeMap<ConsumerName, Looked>,
    last_look: Time,
    pulled: Pulled,
    report: Report,
}

/// A wire is there again after so long, and what waited for it is done.
const RECONNECT: Duration = Duration::from_millis(1_500);
/// Between a replica and NATS, to and fro, at most, in good weather.
const ROUND_TRIP: Duration = Duration::from_millis(10);

impl Default for Watch {
    fn default() -> Self {
        Self {
            ledger: Ledger { round_trip: ROUND_TRIP, ..Ledger::default() },
            fetches: BTreeMap::new(),
            next_fetch: 0,
            settling: 0,
            looked: BTreeMap::new(),
            last_look: Time::ZERO,
            pulled: Pulled::default(),
            report: Report::default(),
        }
    }
}

impl Watch {
    pub fn coverage(&self) -> &Coverage {
        &self.report.coverage
    }

    pub fn findings(&self) -> &[Finding] {
        &self.report.findings
    }

    pub fn count(&mut self, what: impl Into<String>) {
        self.report.coverage.count(what);
    }

    /// The world itself has found something.
    pub fn fail(&mut self, now: Time, why: String) {
        self.report.fail("world", now, why);
    }

    /// A run has panicked, which comes first.
    pub fn panicked(&mut self, panics: Vec<String>) {
        let panics = panics.into_iter().map(|why| Finding { check: "panic", at: Time::ZERO, why });
        self.report.findings.splice(0..0, panics);
    }

    // The operator.

    pub fn configured(&mut self, name: &ConsumerName, config: &Config, now: Time) {
        let all = self.ledger.configs.entry(name.clone()).or_default();
        all.push((now, config.clone()));
        if all.len() > 1 {
            self.trouble(Trouble::Configured, Some(name), now, now);
        }
    }

    /// A delivery of this consumer leaves so much later, when its copies have the change.
    pub fn lags(&mut self, name: &ConsumerName, lag: Duration) {
        self.ledger.lags.insert(name.clone(), lag);
    }

    pub fn published(&mut self, stream: &str, sequence: u64, fate: Fate, now: Time) {
        self.count("message: published");
        let stored = Stored { at: now, fate, removed: None };
        self.ledger.stored.insert((stream.into(), sequence), stored);
    }

    pub fn removed(&mut self, stream: &str, sequence: u64, now: Time) {
        self.count("message: removed");
        if let Some(stored) = self.ledger.stored.get_mut(&(stream.into(), sequence)) {
            stored.removed = Some(now);
        }
    }

    /// All messages of a stream are removed.
    pub fn purged(&mut self, stream: &str, now: Time) {
        self.count("message: stream purged");
        for ((of, _), stored) in &mut self.ledger.stored {
            if **of == *stream {
                stored.removed.get_or_insert(now);
            }
        }
    }

    /// From now on, messages of this age leave the stream. Those of the age before have left.
    pub fn ages(&mut self, stream: &str, age: Duration, now: Time) {
        self.count("message: stream ages");
        self.ledger.ages(stream, age, now);
    }

    /// An accident begins, and will end at `until`. `None`: it concerns all consumers.
    pub fn trouble(
        &mut self,
        trouble: Trouble,
        consumer: Option<&ConsumerName>,
        from: Time,
        until: Time,
    ) {
        let consumer = consumer.cloned();
        let span = TroubleSpan { trouble, consumer, from, until };
        exercised::trouble(&self.ledger, &span, self.settling, &mut self.report);
        if let Trouble::Draining { side } = trouble {
            self.ledger.shorten_leases(side, from);
        }
        if trouble == Trouble::MadeAgain {
            self.ledger.forget_refusals(span.consumer.as_ref());
        }
        self.ledger.troubles.add(span);
    }

    /// The user of NATS has a right again. A replica that could not read a consumer meanwhile starts anew.
    pub fn right_is_back(&mut self) {
        self.ledger.forget_refusals(None);
    }

    /// The time of the world jumps while timers stand still.
    pub fn jumps(&mut self, length: Duration, now: Time) {
        self.ledger.troubles.lengthen(length, now);
    }

    /// All accidents of this kind are over.
    pub fn over(&mut self, trouble: Trouble, now: Time) {
        self.ledger.troubles.end(trouble, now);
    }

    /// The first accident of this kind that concerns a consumer is over.
    pub fn first_is_over(&mut self, trouble: Trouble, consumer: &ConsumerName, now: Time) {
        self.ledger.troubles.end_first(trouble, consumer, now);
    }

    /// A replica has drained, and its process is gone. `left`: it had leases that it did not hand over.
    pub fn drained(&mut self, side: usize, handed_over: bool, left: bool, now: Time) {
        exercised::drained(&self.ledger, side, handed_over, now, &mut self.report);
        self.ledger.troubles.end(Trouble::Draining { side }, now);
        if !handed_over {
            self.ledger.alone.insert(side);
        }
        if left {
            self.ledger.ended.insert(side);
        }
    }

    /// A look at all consumers and replicas, at one time.
    pub fn look(&mut self, looks: &[Look], places: &[Place], now: Time) {
        let passed = now.saturating_sub(self.last_look);
        self.last_look = now;
        for look in looks {
            let looked = self.looked.entry(look.consumer.clone()).or_default();
            let (ledger, fetches) = (&self.ledger, &self.fetches);
            let (look, time) = ((look, places), (now, passed));
            darkness::look(ledger, looked, fetches, look, time, &mut self.report);
        }
    }

    /// A look at the places of the replicas that serve.
    pub fn look_at_rooms(&mut self, rooms: &[Room], now: Time) {
        self.ledger.places.extend(rooms.iter().map(|room| (room.side, room.most)));
        let fetches = self.fetches.values();
        places::look(&self.ledger, &mut self.pulled, fetches, (rooms, now), &mut self.report);
    }

    /// The end of a run: JetStream still has these messages of a consumer, and has never sent these attempts.
    pub fn finished(
        &mut self,
        name: &ConsumerName,
        (unsettled, unsent): (&[u64], &[(u64, u64)]),
        now: Time,
    ) {
        delivery::finished(&self.ledger, name, (unsettled, unsent), now, &mut self.report);
    }

    // Streams.

    /// A client opens a stream at a process.
    pub fn stream_called(&mut self, side: usize, start: &pb::ConsumeStart, now: Time) -> FetchId {
        let id = self.fetch_called(side, &streams::as_fetch(start), None, now);
        let stream = Some(Stream::new(start, now));
        self.fetches.entry(id).and_modify(|fetch| fetch.stream = stream);
        id
    }

    fn stream(&mut self, id: FetchId) -> Option<&mut Stream> {
        self.fetches.get_mut(&id)?.stream.as_mut()
    }

    /// The client of a stream sends another credit, with its id.
    pub fn stream_credit(&mut self, id: FetchId, (credit, most): (u64, u32)) {
        self.stream(id).into_iter().for_each(|stream| stream.credit(credit, most));
    }

    /// The client reads its stream from now on, or does not.
    pub fn stream_reads(&mut self, id: FetchId, reads: bool, now: Time) {
        self.stream(id).into_iter().for_each(|stream| stream.reads(reads, now));
    }

    /// A frame of the client has come to the replica.
    pub fn stream_heard(&mut self, id: FetchId, now: Time) {
        self.stream(id).into_iter().for_each(|stream| stream.heard(now));
    }

    /// A stream has ended at its replica.
    pub fn stream_ended(&mut self, id: FetchId, now: Time) {
        let Some(fetch) = self.fetches.get_mut(&id) else { return };
        if fetch.stream.as_mut().is_some_and(|stream| stream.has_ended(now)) {
            keep::ended(&mut self.ledger, fetch, now);
        }
    }

    /// The client of a stream takes nothing more.
    pub fn stream_closes(&mut self, id: FetchId) {
        self.stream(id).into_iter().for_each(Stream::closes);
    }

    /// A frame of a stream is written. It was made at the first of the two times.
    pub fn frame_written(
        &mut self,
        id: FetchId,
        frame: &pb::ConsumeResponse,
        (made, now): (Time, Time),
    ) {
        let Some(fetch) = self.fetches.get(&id).cloned() else { return };
        let Some(mut stream) = fetch.stream.clone() else { return };
        let (ledger, report) = (&self.ledger, &mut self.report);
        streams::written(ledger, &self.fetches, (&fetch, &mut stream), frame, now, report);
        self.fetches.entry(id).and_modify(|fetch| fetch.stream = Some(stream));
        let (messages, rejected) = (frame.messages.clone(), frame.rejected.clone());
        let answer = pb::FetchResponse { messages, rejected, ..pb::FetchResponse::default() };
        if !answer.messages.is_empty() {
            rights::fetched(&self.ledger, &fetch, &answer, (made, now), &mut self.report);
        }
        for message in &answer.messages {
            self.lend(message, (id, fetch.lease), (made, false), now);
        }
        for rejected in answer.rejected.iter().filter(|one| !one.token.is_empty()) {
            self.hold_rejected((&fetch.consumer, id), rejected, (made, now));
        }
    }

    /// The client of a stream has a frame, which was made at the first of the two times.
    pub fn frame_received(
        &mut self,
        id: FetchId,
        frame: &pb::ConsumeResponse,
        (made, now): (Time, Time),
    ) {
        let lease = self.fetches.get(&id).and_then(|fetch| fetch.lease);
        for message in &frame.messages {
            let of = delivery_of(message);
            delivery::received(&self.ledger, of, message, now, &mut self.report);
            self.lend(message, (id, lease), (made, true), now);
        }
        if let Some(stream) = self.fetches.get(&id).and_then(|fetch| fetch.stream.as_ref()) {
            keep::received(&mut self.ledger, stream, frame, made);
        }
    }

    // Clients.

    /// A Fetch leaves its client, which may have a deadline.
    pub fn fetch_called(
        &mut self,
        side: usize,
        request: &pb::FetchRequest,
        deadline: Option<Duration>,
        now: Time,
    ) -> FetchId {
        self.next_fetch += 1;
        let fetch = OpenFetch::new(side, request, deadline, now);
        attempts::called(&mut self.ledger, &fetch, self.next_fetch);
        self.fetches.insert(self.next_fetch, fetch);
        self.next_fetch
    }

    /// An attempt is about to be given back at a process. Returns the number of the call.
    pub fn give_back_called(&mut self, attempt: &str, side: usize, now: Time) -> usize {
        give_backs::called(&mut self.ledger, attempt, side, now)
    }

    /// A give-back has ended for its client.
    pub fn give_back_ended(&mut self, back: (&str, usize), end: BackEnd<'_>, now: Time) {
        give_backs::ended(&mut self.ledger, back, end, now, &mut self.report);
    }

    /// Whether a replica has said that an attempt is given back, and that replica had its messages.
    pub fn is_given_back(&self, attempt: &str) -> bool {
        give_backs::is_given_back(&self.ledger, attempt)
    }

    /// The token of this settlement was given back.
    pub fn by_old_token(&mut self, call: Option<CallId>) {
        let Some(CallId(id, place)) = call else { return };
        let call = self.ledger.deliveries.get_mut(&id).and_then(|one| one.calls.get_mut(place));
        call.into_iter().for_each(|call| call.old_token = true);
    }

    /// A Fetch has arrived at its replica at that time. `None`: it does not wait there any more.
    pub fn fetch_waits(&mut self, id: FetchId, since: Option<Time>) {
        let Some(fetch) = self.fetches.get_mut(&id) else { return };
        fetch.waits_since = since;
        if let Some(since) = since {
            attempts::arrived(&mut self.ledger, fetch, id, since);
        }
    }

    /// A replica has written the answer to a Fetch. Its client may get it much later, or never.
    pub fn fetch_written(&mut self, id: FetchId, answer: &pb::FetchResponse, now: Time) {
        let fetch = self.fetches.get(&id);
        let lease = fetch.and_then(|fetch| fetch.lease);
        if let Some(fetch) = fetch {
            repeats::written(&mut self.ledger, (fetch, id), answer, now, &mut self.report);
        }
        for message in &answer.messages {
            self.lend(message, (id, lease), (now, false), now);
        }
    }

    /// The clock of a process is ahead by so many milliseconds from now on.
    pub fn clock_set(&mut self, side: usize, ahead: i64) {
        self.ledger.clocks.entry(side).or_default().push(ahead);
    }

    /// A replica obeys another policy from now on: one without rights at these consumers.
    pub fn denied(&mut self, side: usize, denied: &[ConsumerName], now: Time) {
        let all = &mut self.ledger.denied;
        for ((of, name), spans) in all.iter_mut() {
            if let Some((_, end @ None)) = spans.last_mut()
                && *of == side
                && !denied.contains(name)
            {
                *end = Some(now);
            }
        }
        for name in denied {
            let spans = all.entry((side, name.clone())).or_default();
            if spans.last().is_none_or(|(_, end)| end.is_some()) {
                spans.push((now, None));
            }
        }
    }

    /// A Fetch comes to a replica, which has these places at that moment.
    pub fn fetch_came(&mut self, id: FetchId, room: Room, now: Time) {
        self.fetches.entry(id).and_modify(|fetch| fetch.came_to = Some((now, room)));
    }

    /// A replica has refused a Fetch, and has these places at that moment.
    pub fn fetch_refused(&mut self, id: FetchId, room: Room, now: Time) {
        self.fetches.entry(id).and_modify(|fetch| fetch.refused_at = Some((now, room)));
    }

    /// A Fetch has ended for its client.
    pub fn fetch_ended(&mut self, id: FetchId, end: FetchEnd<'_>, now: Time) {
        self.stream_ended(id, now);
        let Some(fetch) = self.fetches.remove(&id) else { return };
        self.pulled.ended(&fetch, now);
        attempts::ended(&mut self.ledger, (&fetch, id), now);
        calls::ended(&self.ledger, &self.looked, &fetch, end, now, &mut self.report);
        let FetchEnd::Answer { answer, served, received } = end else { return };
        rights::fetched(&self.ledger, &fetch, answer, (served.written, now), &mut self.report);
        for message in &answer.messages {
            delivery::received(&self.ledger, delivery_of(message), message, now, &mut self.report);
            self.lend(message, (id, fetch.lease), (served.written, received), now);
        }
        for rejected in answer.rejected.iter().filter(|one| !one.token.is_empty()) {
            self.hold_rejected((&fetch.consumer, id), rejected, (served.written, now));
        }
    }

    /// A client has a message by this Fetch, which asked for a length of its leases or not. `received`: otherwise the
    /// answer was lost.
    fn lend(
        &mut self,
        message: &pb::Delivery,
        (fetch, lease): (FetchId, Option<Duration>),
        (written, received): (Time, bool),
        now: Time,
    ) {
        let of = delivery_of(message);
        self.hold(of, written + lease_of(message), (fetch, received), now);
        let stream = self.fetches.get(&fetch).and_then(|fetch| fetch.stream.as_ref());
        let kept = stream.and_then(Stream::grace);
        if let Some(one) = self.ledger.deliveries.get_mut(&of) {
            (one.own_end, one.granted) = (lease.is_some() || kept.is_some(), lease);
            keep::lent(one, kept, (written, received));
        }
    }

    /// A client that cannot use a message has its lease, and lets it end.
    fn hold_rejected(
        &mut self,
        (consumer, fetch): (&ConsumerName, FetchId),
        rejected: &pb::Rejected,
        end: (Time, Time),
    ) {
        let message = (consumer.clone(), rejected.stream_sequence);
        let ids = self.ledger.of.get(&message).map(Vec::as_slice).unwrap_or_default();
        let attempt = u64::from(rejected.delivery_count);
        let of = |id: &&DeliveryId| {
            self.ledger.deliveries.get(id).is_some_and(|one| one.attempt == attempt)
        };
        let Some(id) = ids.iter().rev().find(of).copied() else { return };
        let lease = rejected.lease.and_then(|lease| Duration::try_from(lease).ok());
        let (written, now) = end;
        self.hold(id, written + lease.unwrap_or_default(), (fetch, false), now);
    }

    /// A client has a message until then by this Fetch, or an answer with it was lost.
    fn hold(
        &mut self,
        id: DeliveryId,
        longest: Time,
        (fetch, received): (FetchId, bool),
        now: Time,
    ) {
        let earlier = attempts::earlier(&self.ledger, fetch, id);
        if let Some(one) = self.ledger.deliveries.get_mut(&id) {
            // A hand-over has cost a part of the lease.
            let drained = Trouble::Draining { side: one.side };
            let moved = self.ledger.troubles.happened(drained, &one.message.0, one.sent, now);
            let less = if moved { 2 * self.ledger.round_trip } else { Duration::ZERO };
            let until = if received { longest.saturating_sub(less) } else { now };
            let new = Hold { from: now, until, longest };
            attempts::hold(earlier, one, fetch, new);
        }
    }

    /// A client does not care about a message any more.
    pub fn dropped(&mut self, id: DeliveryId, now: Time) {
        let one = self.ledger.deliveries.get_mut(&id);
        if let Some(hold) = one.and_then(|one| one.hold.as_mut()) {
            hold.until = hold.until.min(now);
        }
    }

    /// A settlement leaves its client. `sent_only`: no confirmation is asked for. `hurried`: the client has a
    /// deadline. `None`: nobody knows that delivery.
    pub fn settle_called(
        &mut self,
        side: usize,
        id: DeliveryId,
        action: &Action,
        (sent_only, hurried): (bool, bool),
        now: Time,
    ) -> Option<CallId> {
        let length = |wire: &Option<prost_types::Duration>| {
            wire.and_then(|wire| Duration::try_from(wire).ok())
        };
        let (kind, length) = match action {
            Action::Ack(_) => (Kind::Ack, None),
            Action::Nak(nak) => (Kind::Nak, length(&nak.delay)),
            Action::Term(_) => (Kind::Term, None),
            Action::Extend(extend) => (Kind::Extend, length(&extend.lease)),
        };
        let one = self.ledger.deliveries.get_mut(&id)?;
        // "Extend takes a lease out of this".
        one.kept = one.kept.filter(|_| kind != Kind::Extend);
        one.calls.push(SettleCall {
            kind,
            side,
            began: now,
            length,
            sent_only,
            hurried,
            old_token: false,
            ended: None,
        });
        self.settling += 1;
        Some(CallId(id, one.calls.len() - 1))
    }

    /// A settlement has ended for its client.
    pub fn settle_ended(&mut self, call: Option<CallId>, reading: &Reading, now: Time) {
        let Some(call @ CallId(id, place)) = call else { return };
        self.settling = self.settling.saturating_sub(1);
        let Some(one) = self.ledger.deliveries.get(&id) else { return };
        let by_jetstream = self.ledger.longest_wait(&one.message.0, one.sent);
        let Some(one) = self.ledger.deliveries.get_mut(&id) else { return };
        let Some(open) = one.calls.get_mut(place) else { return };
        open.ended = Some((now, reading.told));
        let (kind, began, asked) = (open.kind, open.began, open.length);
        let old_token = open.old_token;
        one.own_end |= kind == Kind::Extend && reading.told != Told::NotApplied;
        if let Some(hold) = one.hold.as_mut().filter(|_| kind == Kind::Extend) {
            match (reading.lease, reading.told) {
                // "extended      -> the lease ends `lease` after the call was sent"
                (Some(lease), _) => {
                    hold.until = began + lease;
                    hold.longest = hold.longest.max(now + lease);
                }
                (None, Told::Unknown | Told::Applied) => {
                    // It may have been made longer, or shorter.
                    // "Unset: the length that Fetch granted, whatever extensions there were since. If the Fetch gave no
                    // length, this is the delivery's ack wait, less the margin".
                    let waits = by_jetstream - margin(by_jetstream);
                    let length = asked.or(one.granted).unwrap_or(waits);
                    let left = hold.longest.saturating_sub(hold.from);
                    hold.longest = hold.longest.max(now + length);
                    hold.until = hold.until.min(began + asked.unwrap_or(left.min(length)));
                }
                (None, Told::NotApplied) => {}
            }
        }
        give_backs::said(&self.ledger, call, reading.told, now, &mut self.report);
        if reading.name == "LEASE_EXPIRED" && !old_token {
            leases::refused(&self.ledger, id, began, now, &mut self.report);
        }
        rights::extended(&self.ledger, call, reading.told, now, &mut self.report);
        rights::settled(&self.ledger, call, reading.told, now, &mut self.report);
        exercised::settled(&self.ledger, call, reading, &mut self.report);
        promises::answered(&self.ledger, call, reading, now, &mut self.report);
    }
}

/// The delivery that a client has got.
fn delivery_of(message: &pb::Delivery) -> DeliveryId {
    let nanos = message.publish_time.map_or(0, |time| time.nanos);
    DeliveryId::of(u64::try_from(nanos).unwrap_or_default())
}

/// The length of its lease.
fn lease_of(message: &pb::Delivery) -> Duration {
    message.lease.and_then(|lease| lease.try_into().ok()).unwrap_or_default()
}

/// A watch that the network tells what it carries.
#[derive(Clone)]
pub struct Shared(pub Arc<Mutex<Watch>>);

impl Watcher for Shared {
    fn sent(&mut self, now: Time, side: usize, sent: &Sent) {
        self.0.lock().unwrap().sent(now, side, sent);
    }

    fn arrived(&mut self, now: Time, id: DeliveryId) {
        if let Some(one) = self.0.lock().unwrap().ledger.deliveries.get_mut(&id) {
            one.arrived = Some(now);
        }
    }

    fn learned(&mut self, now: Time, side: usize) {
        self.0.lock().unwrap().ledger.learned.insert(side, now);
    }

    fn linked(&mut self, now: Time, side: usize) {
        self.0.lock().unwrap().ledger.linked.insert(side, now);
    }

    fn broke(&mut self, now: Time, side: usize) {
        self.0.lock().unwrap().trouble(Trouble::Reconnects { side }, None, now, now + RECONNECT);
    }

    fn elected(&mut self, now: Time) {
        let mut watch = self.0.lock().unwrap();
        watch.trouble(Trouble::LeaderAway, None, now, now);
    }

    fn unkept(&mut self, now: Time, of: DeliveryId, kind: &AckKind) {
        let (mut watch, kind) = (self.0.lock().unwrap(), Kind::of(kind));
        watch.count(format!("applied: {kind:?} by an old leader, and not kept"));
        if let Some(one) = watch.ledger.deliveries.get_mut(&of) {
            // JetStream has confirmed it, so the replica cannot know better.
            let (left, side) = (now, one.side);
            one.effects.push(Effect {
                kind,
                at: now,
                left,
                side,
                late: false,
                settled: None,
                delay: None,
                unkept: true,
            });
        }
    }

    fn looked(
        &mut self,
        when: (Time, Time),
        side: usize,
        name: &ConsumerName,
        delivered: Option<u64>,
    ) {
        self.0.lock().unwrap().ledger.looks.looked(when, side, name, delivered);
    }

    fn refused(&mut self, now: Time, side: usize, name: &ConsumerName) {
        let at = (side, name.clone());
        self.0.lock().unwrap().ledger.refused.entry(at).or_insert(now);
    }

    fn told(&mut self, now: Time, name: &ConsumerName, info: &ConsumerInfo) {
        let mut watch = self.0.lock().unwrap();
        let looked = watch.looked.entry(name.clone()).or_default();
        if info.max_ack_pending.is_some_and(|most| info.ack_pending >= most) {
            looked.full_at = Some(now);
        }
        if info.paused {
            looked.paused_at = Some(now);
        }
    }

    fn applied(&mut self, now: Time, side: usize, applied: &Applied, way: Way) {
        self.0.lock().unwrap().applied(now, side, applied, way);
    }
}

impl Watch {
    fn sent(&mut self, now: Time, side: usize, sent: &Sent) {
        let Sent::Message { delivery, poison, .. } = sent else { return };
        if *poison {
            // It may have waited behind others for long. It breaks the connection that brings it.
            let trouble = Trouble::Poisoned;
            let until = now + RECONNECT;
            self.ledger.troubles.add(TroubleSpan { trouble, consumer: None, from: now, until });
        }
        let id = DeliveryId::of(delivery.published);
        let Some(named) = jetstream::parse(&delivery.ack.0) else { return };
        let config = self.ledger.config(&named.name);
        let (attempt, message) =
            (delivery.delivery_count, (named.name.clone(), delivery.stream_sequence));
        let delivered = Delivered {
            side,
            attempt,
            number: named.consumer_sequence,
            ack_wait: config.map(|config| wait_of(config, attempt)).unwrap_or_default(),
            message: message.clone(),
            sent: now,
            arrived: None,
            hold: None,
            own_end: false,
            granted: None,
            kept: None,
            grace_ends: None,
            lent_again: Vec::new(),
            given_back: None,
            by: 0,
            calls: Vec::new(),
            effects: Vec::new(),
        };
        self.ledger.deliveries.insert(id, delivered);
        self.ledger.of.entry(message).or_default().push(id);
        delivery::sent(&self.ledger, id, now, &mut self.report);
        leases::sent(&self.ledger, id, now, &mut self.report);
        keep::sent(&self.ledger, id, now, &mut self.report);
    }

    fn applied(&mut self, now: Time, side: usize, applied: &Applied, way: Way) {
        let delay = match &applied.kind {
            AckKind::Nak(delay) => *delay,
            AckKind::Ack | AckKind::Term(_) | AckKind::Progress => None,
        };
        let effect = Effect {
            kind: Kind::of(&applied.kind),
            at: now,
            left: way.left,
            side,
            late: way.late,
            settled: applied.settled,
            delay,
            unkept: false,
        };
        let id = applied.of;
        if let Some(one) = self.ledger.deliveries.get_mut(&id) {
            one.effects.push(effect);
            // "if nothing was confirmed since"
            self.ledger.refused.remove(&(side, one.message.0.clone()));
        }
        let report = &mut self.report;
        promises::applied(&self.ledger, id, &effect, report);
        holders::applied(&self.ledger, id, &effect, report);
        expired::applied(&self.ledger, id, &effect, report);
        delivery::applied(&self.ledger, id, &effect, report);
    }
}
