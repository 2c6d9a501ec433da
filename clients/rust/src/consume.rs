//! The loop with Consume: the messages in hand, and the streams that carry them, one after the other.

use std::{collections::BTreeMap, pin::pin, sync::Arc, time::Duration};

use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::JoinSet,
    time::{self, Instant, MissedTickBehavior},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Request, Status};

use crate::{
    Code, Error, Event, Stop,
    connection::Connection,
    error::to_duration,
    hand::{Done, Hand, Held},
    job::Job,
    outcome::extend_action,
    pb::{
        ConsumeCredit, ConsumeKeep, ConsumeRequest, ConsumeResponse, ConsumeStart, Settlement,
        consume_start::Holding,
    },
    stream::{Say, Stream},
};

/// A stream without a frame for so many heartbeats is dead. So is a worker.
const MISSED_BEATS: u32 = 3;
/// The shortest heartbeat and the shortest lease that the proxy allows.
const SHORTEST: Duration = Duration::from_secs(1);

pub(crate) struct Options {
    /// The name of the worker in the logs of the proxy.
    pub name: String,
    pub grace: Duration,
    /// The most bytes of messages in hand.
    pub max_bytes: u32,
    /// The most bytes of a frame.
    pub max_frame_bytes: u32,
    pub stop_timeout: Option<Duration>,
}

/// What happens on a stream.
enum Happened {
    Frame(Box<ConsumeResponse>),
    /// It is time to repeat these settlements.
    Again(Vec<u64>),
    /// `None`: an orderly end.
    End(Option<Error>),
}

/// How a message is carried.
struct Carried {
    /// The stream that settles it.
    stream: u64,
    /// Its number on this stream. 0: it came by an earlier stream.
    number: u64,
    /// The end of the lease, if no stream keeps it.
    ends: Option<Instant>,
}

pub(crate) struct ConsumeLoop {
    connection: Arc<Connection>,
    options: Options,
    hand: Hand<Carried>,
    beat: Duration,
    /// How long a lease lives without a stream.
    keep: Duration,
    /// The streams that are open.
    streams: BTreeMap<u64, Stream>,
    /// The stream that is open, or will be next.
    current: u64,
    /// When to open the current stream, if it is not open yet.
    open_at: Option<Instant>,
    /// The number of streams in a row that were not served.
    tries: u32,
    is_stopping: bool,
    /// Why no other stream is opened.
    refusal: Option<Error>,
    tell: UnboundedSender<(u64, Happened)>,
    /// Readers of streams, and waits before repeats.
    tasks: JoinSet<()>,
}

/// Ends when `stop` was asked for and every message is gone.
///
/// # Errors
/// The proxy refuses the stream, and would refuse a repeat, too.
pub(crate) async fn consume(
    connection: Arc<Connection>,
    job: Job,
    options: Options,
    stop: Stop,
) -> Result<(), Error> {
    let (tell, happened) = unbounded_channel();
    let beat = (options.grace / MISSED_BEATS).max(SHORTEST);
    let consume = ConsumeLoop {
        connection,
        hand: Hand::new(job),
        beat,
        keep: options.grace.max(beat * MISSED_BEATS),
        options,
        streams: BTreeMap::new(),
        current: 0,
        open_at: Some(Instant::now()),
        tries: 0,
        is_stopping: false,
        refusal: None,
        tell,
        tasks: JoinSet::new(),
    };
    consume.run(happened, stop).await
}

impl ConsumeLoop {
    async fn run(
        mut self,
        mut happened: UnboundedReceiver<(u64, Happened)>,
        stop: Stop,
    ) -> Result<(), Error> {
        let mut beats = time::interval_at(Instant::now() + self.beat, self.beat);
        beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut forced = pin!(stop.forced(self.options.stop_timeout));
        let mut is_forced = false;
        while !self.is_over() {
            let open_at = self.open_at;
            let mut is_beat = false;
            tokio::select! {
                () = stop.asked(), if !self.is_stopping => self.stopping(),
                () = &mut forced, if !is_forced => {
                    is_forced = true;
                    self.forced();
                }
                Some((id, event)) = happened.recv() => self.note(id, event),
                Some(done) = self.hand.join() => self.finished(done),
                _ = beats.tick() => {
                    self.beat();
                    is_beat = true;
                }
                () = time::sleep_until(open_at.unwrap_or_else(Instant::now)), if open_at.is_some() => {
                    self.open();
                }
            }
            // All that has happened by now goes into the same frame.
            while let Ok((id, event)) = happened.try_recv() {
                self.note(id, event);
            }
            while let Some(done) = self.hand.try_join() {
                self.finished(done);
            }
            while self.tasks.try_join_next().is_some() {}
            self.hand.begin();
            self.write(is_beat);
        }
        let Some(refusal) = self.refusal else { return Ok(()) };
        let left: Vec<u64> = self.hand.iter().map(|(key, _)| key).collect();
        left.into_iter().for_each(|key| self.hand.lose(key, refusal.clone()));
        Err(refusal)
    }

    /// After a refusal, streams that drain still settle what they have.
    fn is_over(&self) -> bool {
        let is_done = self.is_stopping && self.hand.is_empty();
        self.streams.is_empty() && (is_done || self.refusal.is_some())
    }

    fn open(&mut self) {
        self.open_at = None;
        let (send, receive) = unbounded_channel();
        let (connection, id, tell) = (self.connection.clone(), self.current, self.tell.clone());
        let reader = self.tasks.spawn(async move {
            let end = read(&connection, receive, |frame| {
                drop(tell.send((id, Happened::Frame(Box::new(frame)))));
            });
            let error = end.await.err();
            drop(tell.send((id, Happened::End(error))));
        });
        let left = self.hand.iter().filter(|(_, held)| held.link.stream == id);
        let left = left.filter(|(_, held)| self.has_something_to_say(held)).map(|(key, _)| key);
        let ready = left.collect();
        let start = Some(self.start());
        let first = ConsumeRequest { start, ..ConsumeRequest::default() };
        self.streams.insert(id, Stream::new(send, reader, first, ready));
    }

    fn start(&self) -> ConsumeStart {
        let Job { source, codec, at_most, .. } = &self.hand.job;
        let keep = ConsumeKeep {
            grace: Some(to_duration(self.options.grace)),
            at_most: Some(to_duration(*at_most)),
        };
        let (max_leases, max_bytes) = (Some(self.credit(0)), Some(self.options.max_bytes.into()));
        ConsumeStart {
            stream: source.stream.clone(),
            consumer: source.consumer.clone(),
            credit: Some(ConsumeCredit { id: 0, max_leases, max_bytes }),
            codec: (*codec).into(),
            max_frame_bytes: self.options.max_frame_bytes,
            heartbeat: Some(to_duration(self.beat)),
            worker: self.options.name.clone(),
            holding: Some(Holding::Keep(keep)),
        }
    }

    /// The leases that a stream may hold which has delivered so many that are in hand.
    fn credit(&self, delivered: usize) -> u32 {
        if self.is_stopping {
            return 0;
        }
        let elsewhere = (self.hand.len() + self.hand.strays()).saturating_sub(delivered);
        self.hand.job.concurrency.saturating_sub(elsewhere).try_into().unwrap_or(u32::MAX)
    }

    fn note(&mut self, id: u64, event: Happened) {
        match event {
            Happened::Frame(frame) => self.take(id, *frame),
            Happened::Again(keys) => keys.into_iter().for_each(|key| self.send(key)),
            Happened::End(error) => self.end(id, error),
        }
    }

    fn take(&mut self, id: u64, frame: ConsumeResponse) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let is_draining = stream.hear(&frame);
        for message in frame.messages {
            let (stream, number) = (id, message.number);
            let link = Carried { stream, number, ends: None };
            let key = self.hand.take(message, link, self.is_stopping);
            self.deliver(id, number, key);
        }
        for rejected in frame.rejected {
            let (stream, number) = (id, rejected.number);
            let link = Carried { stream, number, ends: None };
            if let Some(key) = self.hand.take_rejected(rejected, link) {
                self.deliver(id, number, key);
            }
        }
        for result in frame.results {
            let Some(stream) = self.streams.get_mut(&id) else { continue };
            let noted = stream.note(result);
            let now = Instant::now();
            for key in noted.extended {
                if let Some(held) = self.hand.get_mut(key) {
                    held.link.ends = Some((now + self.keep).min(held.latest));
                }
            }
            for key in noted.settled {
                self.forget(key);
                self.hand.settled(key);
            }
            for (key, error) in noted.lost {
                self.lose(key, error);
            }
            if let Some((keys, error, wait)) = noted.again {
                self.hand.job.hook.tell(Event::Retry { error, wait });
                let tell = self.tell.clone();
                self.tasks.spawn(async move {
                    time::sleep(wait).await;
                    drop(tell.send((id, Happened::Again(keys))));
                });
            }
        }
        for ended in frame.ended {
            let key = self.streams.get(&id).and_then(|stream| stream.key_of(ended.number));
            if let (Some(key), Some(why)) = (key, ended.why) {
                self.lose(key, Error::of_part(&why));
            }
        }
        if is_draining && id == self.current {
            self.next();
        }
    }

    fn deliver(&mut self, id: u64, number: u64, key: u64) {
        let is_decided = self.hand.get(key).is_some_and(|held| held.outcome.is_some());
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.deliver(number, key);
            if is_decided {
                stream.send(key);
            }
        }
    }

    fn finished(&mut self, done: Done) {
        if let Some(key) = self.hand.finished(done) {
            self.send(key);
        }
    }

    /// Puts a message into the next frame of its stream. A stream that is not open yet takes all at its opening.
    fn send(&mut self, key: u64) {
        let Some(held) = self.hand.get(key) else { return };
        if let Some(stream) = self.streams.get_mut(&held.link.stream) {
            stream.send(key);
        }
    }

    fn lose(&mut self, key: u64, error: Error) {
        self.forget(key);
        self.hand.lose(key, error);
    }

    fn forget(&mut self, key: u64) {
        let Some(held) = self.hand.get(key) else { return };
        if let Some(stream) = self.streams.get_mut(&held.link.stream) {
            stream.forget(held.link.number, key);
        }
    }

    /// Another stream takes over.
    fn next(&mut self) {
        self.current += 1;
        self.open_at = Some(Instant::now()).filter(|_| self.refusal.is_none());
    }

    /// Hands what is left to the next stream: it is settled there by token, or extended.
    fn end(&mut self, id: u64, error: Option<Error>) {
        let Some(stream) = self.streams.remove(&id) else { return };
        if id == self.current {
            self.next();
            self.tries = if stream.is_served { 0 } else { self.tries };
            // After UNAUTHENTICATED, the file may have a newer credential.
            let is_stale = |error: &Error| stream.is_served && error.reason == "UNAUTHENTICATED";
            match error.filter(|error| !is_stale(error)) {
                Some(error) if error.can_repeat() => {
                    let wait = error.backoff(&mut self.tries);
                    self.hand.job.hook.tell(Event::Retry { error, wait });
                    self.open_at = Some(Instant::now() + wait);
                }
                Some(error) => (self.refusal, self.open_at) = (Some(error), None),
                None => {}
            }
        }
        let without_a_stream = Instant::now() + self.keep;
        let mut left = Vec::new();
        for (key, held) in self.hand.iter_mut().filter(|(_, held)| held.link.stream == id) {
            let ends = without_a_stream.min(held.latest);
            let ends = held.link.ends.map_or(ends, |sooner| sooner.min(ends));
            held.link = Carried { stream: self.current, number: 0, ends: Some(ends) };
            left.push(key);
        }
        left.retain(|key| self.hand.get(*key).is_some_and(|held| self.has_something_to_say(held)));
        left.into_iter().for_each(|key| self.send(key));
    }

    /// Ends streams that are dead. Extends leases that have outlived theirs: the proxy keeps the others.
    fn beat(&mut self) {
        let silence = self.beat * MISSED_BEATS;
        let dead = self.streams.iter().filter(|(_, stream)| stream.is_silent_for(silence));
        let dead: Vec<u64> = dead.map(|(id, _)| *id).collect();
        for id in dead {
            let told = format!("no frame for {silence:?}");
            self.end(id, Some(Error::new("UNAVAILABLE", Code::Unavailable, told)));
        }
        let now = Instant::now();
        let orphans = self.hand.iter().filter_map(|(key, held)| Some((key, held.link.ends?, held)));
        let is_due = |held: &Held<_>| held.outcome.is_none() && self.has_something_to_say(held);
        let orphans = orphans.map(|(key, ends, held)| (key, ends <= now, is_due(held)));
        let orphans: Vec<_> = orphans.collect();
        for (key, is_over, is_due) in orphans {
            if is_over {
                self.lose(key, Error::lease_expired("no proxy has extended or settled it in time"));
            } else if is_due {
                self.send(key);
            }
        }
    }

    fn stopping(&mut self) {
        self.is_stopping = true;
        self.hand.give_back_waiting().into_iter().for_each(|key| self.send(key));
        if self.hand.is_empty() {
            // Streams that are not served yet have nothing to settle.
            self.streams.retain(|_, stream| stream.is_served);
        }
    }

    /// The second stop may come together with the first.
    fn forced(&mut self) {
        if !self.is_stopping {
            self.stopping();
        }
        let (returned, lost) = self.hand.give_back_by_force();
        returned.into_iter().for_each(|key| self.send(key));
        lost.into_iter().for_each(|key| self.lose(key, Error::stopped()));
    }

    /// An outcome, or an extension that the proxy accepts.
    fn has_something_to_say(&self, held: &Held<Carried>) -> bool {
        held.outcome.is_some() || held.latest.duration_since(Instant::now()) >= SHORTEST
    }

    fn write(&mut self, is_beat: bool) {
        let credits: Vec<u32> =
            self.streams.values().map(|stream| self.credit(stream.delivered())).collect();
        let (hand, keep, is_stopping) = (&self.hand, self.keep, self.is_stopping);
        for ((id, stream), credit) in self.streams.iter_mut().zip(credits) {
            let is_idle = is_stopping && !hand.iter().any(|(_, held)| held.link.stream == *id);
            let say = Say { credit, is_stopping, is_idle, is_beat };
            stream.write(say, |key| Some(settlement(hand.get(key)?, keep)));
        }
    }
}

/// The outcome, or an Extend if there is no outcome.
fn settlement(held: &Held<Carried>, keep: Duration) -> Settlement {
    let left = held.latest.duration_since(Instant::now()).max(SHORTEST);
    let extend = || extend_action(Some(keep.min(left)));
    let action = Some(held.outcome.as_ref().map_or_else(extend, |outcome| outcome.action()));
    let number = held.link.number;
    let token = if number == 0 { held.token.clone() } else { String::new() };
    Settlement { token, action, number }
}

async fn read(
    connection: &Connection,
    requests: UnboundedReceiver<ConsumeRequest>,
    take: impl Fn(ConsumeResponse),
) -> Result<(), Error> {
    let requests = Request::new(UnboundedReceiverStream::new(requests));
    let (mut client, requests) = connection.ready(requests)?;
    let refused = |status: Status| Error::of_status(&status);
    let mut frames = client.consume(requests).await.map_err(refused)?.into_inner();
    while let Some(frame) = frames.message().await.map_err(refused)? {
        take(frame);
    }
    Ok(())
}
