//! Works on a stream: takes messages as far as its credit goes, settles them on the stream or elsewhere, changes its
//! credit, and sometimes does not read. What has no result when the stream ends is said again elsewhere.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::Duration,
};

use fetch_proxy::pb;
use tokio::time::timeout_at;

use super::{
    Client, Errand, PATIENCE, answers,
    fetching::{Work, work_of},
    settling::{self, Said, said},
    stream_wire::{ClientStream, Down, Ended},
};
use crate::{
    jetstream::Time,
    replica::Replica,
    watch::{CallId, FetchEnd, Reading},
};

/// The heartbeat of a stream.
const HEARTBEAT: Duration = Duration::from_secs(2);
/// A client that keeps its leases says something this often.
const SIGN_OF_LIFE: Duration = Duration::from_millis(1_200);
/// A client looks at its stream this often, at least.
const LOOK: Duration = Duration::from_millis(400);

/// One stream as its client knows it.
struct Session {
    stream: ClientStream,
    /// When the client has had enough of it.
    until: Time,
    queue: VecDeque<(u64, Work)>,
    /// The message that it works on, and until when.
    current: Option<(u64, Work, Time)>,
    /// Settlements without a result, by the id of their frame.
    open: BTreeMap<u64, OpenSettle>,
    last_id: u64,
    closing: Option<Time>,
    unread_until: Option<Time>,
    /// The next sign of life. `None`: nobody asks for it.
    alive_at: Option<Time>,
    /// The client hangs: it does nothing until then.
    hangs_until: Time,
}

struct OpenSettle {
    errand: Errand,
    said: Said,
    call: Vec<Option<CallId>>,
    began: Time,
}

impl Client {
    /// Works on one stream, until it ends or the client has had enough of it.
    pub(super) async fn work_on_stream(&mut self, replica: &Arc<Replica>) {
        let first = self.first_frame();
        let who = (&self.world, self.plan.number);
        let Some(stream) = ClientStream::open(who, replica, first, &mut self.dice).await else {
            return;
        };
        self.world.count("stream: opened");
        let until = self.world.net.now() + self.dice.millis(500..15_000);
        let mut session = Session {
            stream,
            until,
            queue: VecDeque::new(),
            current: None,
            open: BTreeMap::new(),
            last_id: 0,
            closing: None,
            unread_until: None,
            alive_at: self.plan.keeps.then_some(Time::ZERO),
            hangs_until: Time::ZERO,
        };
        let ended = self.serve(&mut session).await;
        self.leave(session, ended).await;
    }

    fn first_frame(&mut self) -> pb::ConsumeRequest {
        let name = self.world.name(self.plan.consumer);
        let lease = self.plan.lease.map(|most| self.dice.within(1_000..most.max(1_001)) as i64);
        let lease = lease.and_then(testkit::millis);
        let keep = self.plan.keeps.then(|| {
            let grace = testkit::millis(self.dice.within(0..5_000) as i64);
            let at_most = self.dice.percent(30).then(|| self.dice.within(5_000..40_000) as i64);
            let at_most = at_most.and_then(testkit::millis);
            pb::consume_start::Holding::Keep(pb::ConsumeKeep { grace, at_most })
        });
        let codec = if self.plan.json { pb::Codec::Json } else { pb::Codec::Unspecified };
        let start = pb::ConsumeStart {
            stream: name.stream.to_string(),
            consumer: name.consumer.to_string(),
            credit: Some(pb::ConsumeCredit {
                id: 1,
                max_leases: Some(self.plan.n),
                max_bytes: None,
            }),
            holding: keep.or(lease.map(pb::consume_start::Holding::Lease)),
            codec: codec.into(),
            max_frame_bytes: self.plan.max_bytes,
            heartbeat: HEARTBEAT.try_into().ok(),
            worker: format!("client-{}", self.plan.number),
        };
        pb::ConsumeRequest { start: Some(start), ..Default::default() }
    }

    async fn serve(&mut self, session: &mut Session) -> Option<Ended> {
        loop {
            let now = self.world.net.now();
            let done = session.current.as_ref().map(|(.., until)| *until);
            let done = done.filter(|_| session.hangs_until <= now);
            let wake = [Some(now + LOOK), done].into_iter().flatten().min().unwrap_or(now);
            match timeout_at(self.world.at(wake), session.stream.next()).await {
                Ok(Down::Frame(frame, made)) => self.read(session, *frame, made),
                Ok(Down::End(ended)) => return Some(ended),
                Err(_) => {}
            }
            let now = self.world.net.now();
            let overdue = session.open.values().any(|open| open.began + PATIENCE < now);
            let closed_for_long = session.closing.is_some_and(|since| since + PATIENCE < now);
            if self.world.calm() || overdue || closed_for_long {
                return None;
            }
            if session.unread_until.is_some_and(|until| until <= now) {
                session.unread_until = None;
                session.stream.read(true);
            }
            if now < session.hangs_until {
                continue;
            }
            self.show_life(session, now);
            self.work(session, now).await;
            if now >= session.until && session.closing.is_none() {
                if self.dice.percent(40) {
                    self.world.count("stream: hung up");
                    return None;
                }
                self.world.count("stream: half-closed");
                session.stream.half_close();
                session.closing = Some(now);
            }
        }
    }

    /// Says that it lives, if its leases need that. Sometimes it hangs instead.
    fn show_life(&mut self, session: &mut Session, now: Time) {
        if session.alive_at.is_some_and(|at| at <= now) && session.closing.is_none() {
            session.alive_at = Some(now + SIGN_OF_LIFE);
            session.stream.send(pb::ConsumeRequest::default());
            if self.dice.percent(3) {
                self.world.count("stream: its client hangs");
                session.hangs_until = now + self.dice.millis(500..12_000);
            }
        }
    }

    /// Works on the next message, and settles what it has worked on.
    async fn work(&mut self, session: &mut Session, now: Time) {
        if session.current.as_ref().is_some_and(|(.., until)| *until <= now)
            && let Some((number, work, _)) = session.current.take()
        {
            if self.dice.percent(self.plan.dies) {
                self.world.count("client died with a message");
            } else {
                self.settle_on_stream(session, (number, work), now).await;
            }
        }
        if session.current.is_none()
            && let Some((number, work)) = session.queue.pop_front()
        {
            let longest = u64::try_from(work.lease.as_millis()).unwrap_or(u64::MAX).min(4_000);
            // Some leases lapse.
            let takes = self.dice.millis(0..longest * 11 / 10 + 1);
            let takes = if self.dice.percent(70) { takes / 20 } else { takes };
            session.current = Some((number, work, now + takes));
            self.change_something(session, now);
        }
    }

    fn change_something(&mut self, session: &mut Session, now: Time) {
        if session.closing.is_some() {
            return;
        }
        if self.dice.percent(4) {
            let most = self.dice.within(0..2 * u64::from(self.plan.n) + 1) as u32;
            self.set_credit(session, most);
            // A pause ends.
            session.until = session.until.min(now + Duration::from_secs(4));
        }
        if self.dice.percent(2) {
            self.world.count("stream: not read for a time");
            session.stream.read(false);
            session.unread_until = Some(now + self.dice.millis(50..2_500));
        }
    }

    fn set_credit(&mut self, session: &mut Session, most: u32) {
        session.last_id += 1;
        let id = 1 + session.last_id;
        self.world.count(if most == 0 { "stream: paused" } else { "stream: another credit" });
        self.world.watch().stream_credit(session.stream.id, (id, most));
        let credit = pb::ConsumeCredit { id, max_leases: Some(most), max_bytes: None };
        session.stream.send(pb::ConsumeRequest { credit: Some(credit), ..Default::default() });
    }

    async fn settle_on_stream(
        &mut self,
        session: &mut Session,
        (number, work): (u64, Work),
        now: Time,
    ) {
        let action = self.action();
        let errand = Errand { work, action, done: false };
        if session.closing.is_some() || self.dice.percent(15) {
            let at = self.choose();
            return self.finish_now(vec![errand], at, None).await;
        }
        session.last_id += 1;
        let id = session.last_id;
        let mut said = said(errand.work.id, &errand.work.token, &errand.action);
        if self.dice.percent(80) {
            said = said.by_number(number);
        }
        let replica = session.stream.replica();
        let call = settling::called(&self.world, &[said.clone()], replica, (false, false));
        let settlements = settling::settlements(&[said.clone()]);
        let settle = pb::ConsumeSettle { id, settlements, confirmation: 0 };
        session.stream.send(pb::ConsumeRequest { settle: Some(settle), ..Default::default() });
        session.open.insert(id, OpenSettle { errand, said, call, began: now });
    }

    fn read(&mut self, session: &mut Session, frame: pb::ConsumeResponse, made: Time) {
        let now = self.world.net.now();
        self.world.watch().frame_received(session.stream.id, &frame, (made, now));
        for result in &frame.results {
            let Some(open) = session.open.remove(&result.id) else { continue };
            let heard = match (&result.error, result.results.first()) {
                (Some(error), _) => Reading::of_result(&pb::SettleResult {
                    error: Some(error.clone()),
                    ..Default::default()
                }),
                (None, Some(result)) => Reading::of_result(result),
                (None, None) => Reading::nothing(),
            };
            self.world.count("stream: settled on it");
            self.heard(session.stream.replica().clone(), open, &heard);
        }
        let place = session.stream.replica().place;
        let place = (self.world.as_ref(), &self.plan, place);
        for message in frame.messages {
            let number = message.number;
            session.queue.push_back((number, work_of(place, message, made)));
        }
        if frame.draining.is_some() {
            self.world.count("stream: draining");
            session.until = session.until.min(now + self.dice.millis(0..2_000));
        }
    }

    fn heard(
        &mut self,
        replica: Arc<Replica>,
        open: OpenSettle,
        heard: &Reading,
    ) -> Option<Errand> {
        let OpenSettle { mut errand, said, call, .. } = open;
        let heard = std::slice::from_ref(heard);
        settling::ended((&self.world, &self.plan), &[said], &replica, call, heard);
        errand.done = answers::is_final(&heard[0]);
        if errand.done {
            let now = self.world.net.now();
            self.world.watch().dropped(errand.work.id, now);
        }
        (!errand.done).then_some(errand)
    }

    /// The stream is over for the client. Its leases outlive it.
    async fn leave(&mut self, session: Session, ended: Option<Ended>) {
        let Session { stream, queue, current, open, .. } = session;
        let (id, replica, now) = (stream.id, stream.replica().clone(), self.world.net.now());
        let end = match &ended {
            Some(Ended::Failed(status)) => FetchEnd::Refused(status),
            Some(Ended::Done | Ended::Lost) | None => FetchEnd::Gone,
        };
        drop(stream);
        self.world.watch().fetch_ended(id, end, now);
        let mut left = Vec::new();
        for open in open.into_values() {
            left.extend(self.heard(replica.clone(), open, &Reading::nothing()));
        }
        let current = current.map(|(number, work, _)| (number, work));
        for (_, work) in current.into_iter().chain(queue) {
            if self.dice.percent(70) {
                let action = self.action();
                left.push(Errand { work, action, done: false });
            }
        }
        if !left.is_empty() {
            self.world.count("stream: settled after its end");
            let at = self.choose();
            self.finish_now(left, at, None).await;
        }
    }
}
