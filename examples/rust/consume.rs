//! The loop with Consume: messages come and outcomes go on one stream, and many handlers run at
//! once. Copy it without changes. It must know nothing of the work.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use serde_json::Value;
use tokio::{
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::{AbortHandle, JoinSet},
    time::{self, MissedTickBehavior},
};
use tokio_stream::wrappers::UnboundedReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Status};

use super::fetchproxy::{
    self, Client, Failure, Lease,
    pb::{
        ConsumeCredit, ConsumeKeep, ConsumeRequest, ConsumeResponse, ConsumeResult, ConsumeSettle,
        ConsumeStart, Delivery, ExtendAction, Outcome, SettleError, SettleResult, Settlement,
        consume_start::Holding, settlement::Action,
    },
};

/// A stream without a frame for so many heartbeats is dead. So is a worker.
const MISSED_BEATS: u32 = 3;
/// The shortest heartbeat and the shortest lease that the proxy allows.
const SHORTEST: Duration = Duration::from_secs(1);
/// A frame with more settlements is refused.
const MOST_SETTLEMENTS: usize = 1000;

/// Works on as many messages at once as `start` has credit for. Returns when the worker must stop
/// and every message is settled. If the worker dies, others get its messages after `grace`. The
/// token that the work receives is cancelled if the lease is lost.
///
/// # Errors
/// An error that a person must look at.
pub async fn consume<W, F>(
    client: Client,
    start: ConsumeStart,
    grace: Duration,
    stop: &CancellationToken,
    work: W,
) -> Result<(), String>
where
    W: Fn(Delivery, CancellationToken) -> F,
    F: Future<Output = Result<Value, Failure>> + Send + 'static,
{
    let grace = grace.max(SHORTEST);
    let beat = (grace / MISSED_BEATS).max(SHORTEST);
    let keep = ConsumeKeep { grace: Some(fetchproxy::to(grace)), at_most: None };
    let start = ConsumeStart {
        holding: Some(Holding::Keep(keep)),
        heartbeat: Some(fetchproxy::to(beat)),
        ..start
    };
    let (events, mut happened) = unbounded_channel();
    let mut worker = Worker {
        client,
        start,
        grace,
        beat,
        is_stopping: false,
        events,
        streams: BTreeMap::new(),
        current: 0,
        open_at: Some(Instant::now()),
        tries: 0,
        held: BTreeMap::new(),
        last_key: 0,
        ready: BTreeSet::new(),
    };
    let mut at_work = JoinSet::new();
    let mut beats = time::interval(beat);
    beats.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !(worker.is_stopping && worker.streams.is_empty() && worker.held.is_empty()) {
        let open_at = worker.open_at;
        let opening = time::sleep_until(open_at.unwrap_or_else(Instant::now).into());
        let mut is_beat = false;
        tokio::select! {
            Some((id, event)) = happened.recv() => match event {
                Event::Frame(frame) => {
                    for (key, message, lost) in worker.take(id, frame) {
                        let done = tokio::spawn(work(message, lost));
                        // So that a panic of the work ends only its task.
                        at_work.spawn(async move {
                            (key, done.await.unwrap_or_else(|panic| Err(panic.into())))
                        });
                    }
                }
                Event::Again(keys) => keys.into_iter().for_each(|key| worker.send(key)),
                Event::End(error) => worker.end(id, error)?,
            },
            Some(Ok((key, done))) = at_work.join_next() => worker.decide(key, done),
            _ = beats.tick() => {
                worker.beat()?;
                is_beat = true;
            }
            () = opening, if open_at.is_some() => worker.open(),
            () = stop.cancelled(), if !worker.is_stopping => worker.stop()?,
        }
        // What is done by now goes into the same frame.
        while let Some(Ok((key, done))) = at_work.try_join_next() {
            worker.decide(key, done);
        }
        worker.write(is_beat);
    }
    Ok(())
}

/// What happens on a stream.
enum Event {
    Frame(ConsumeResponse),
    /// It is time to repeat these settlements.
    Again(Vec<u64>),
    /// `None`: an orderly end.
    End(Option<SettleError>),
}

/// The messages in hand, and the streams that carry them.
struct Worker {
    client: Client,
    start: ConsumeStart,
    grace: Duration,
    beat: Duration,
    is_stopping: bool,
    events: UnboundedSender<(u64, Event)>,
    /// The streams that are open.
    streams: BTreeMap<u64, Stream>,
    /// The stream that is open, or will be next.
    current: u64,
    /// When to open the current stream, if it is not open yet.
    open_at: Option<Instant>,
    tries: u32,
    held: BTreeMap<u64, Held>,
    last_key: u64,
    /// What is to be settled or extended in the next frame: the stream, and the key of the message.
    ready: BTreeSet<(u64, u64)>,
}

/// A message in hand.
struct Held {
    lease: Lease,
    /// Carries the settlement.
    stream: u64,
    /// The name of the message on this stream. 0: it came by an earlier stream.
    number: u64,
}

/// One call of Consume. A task reads always.
struct Stream {
    /// `None`: it is half-closed.
    send: Option<UnboundedSender<ConsumeRequest>>,
    reader: AbortHandle,
    /// When the last frame came.
    heard: Instant,
    /// Without a result yet, by the id of the frame.
    sent: BTreeMap<u64, Vec<u64>>,
    last_id: u64,
    /// The number of frames in a row that must be repeated.
    tries: u32,
    is_started: bool,
    /// The proxy has answered.
    is_served: bool,
    /// The credit was set to 0. Then no message comes any more.
    is_pausing: bool,
    is_paused: bool,
}

impl Worker {
    fn open(&mut self) {
        self.open_at = None;
        let (send, receive) = unbounded_channel();
        let (client, id, events) = (self.client.clone(), self.current, self.events.clone());
        let reader = tokio::spawn(async move {
            let end = read(client, receive, |frame| drop(events.send((id, Event::Frame(frame)))));
            let error = end.await.err().map(|status| fetchproxy::refusal(&status));
            drop(events.send((id, Event::End(error))));
        });
        let stream = Stream {
            send: Some(send),
            reader: reader.abort_handle(),
            heard: Instant::now(),
            sent: BTreeMap::new(),
            last_id: 0,
            tries: 0,
            is_started: false,
            is_served: false,
            is_pausing: false,
            is_paused: false,
        };
        self.streams.insert(id, stream);
    }

    /// Gives up a stream that is not served yet, if nothing is to be settled.
    fn stop(&mut self) -> Result<(), String> {
        self.is_stopping = true;
        let is_waiting = |stream: &Stream| !stream.is_served && self.held.is_empty();
        let waiting: Vec<_> = self
            .streams
            .iter()
            .filter(|(_, stream)| is_waiting(stream))
            .map(|(id, _)| *id)
            .collect();
        waiting.into_iter().try_for_each(|id| self.end(id, None))
    }

    /// Ends streams that are dead, and renews leases that have outlived theirs. The proxy keeps the
    /// others.
    fn beat(&mut self) -> Result<(), String> {
        let silence = self.beat * MISSED_BEATS;
        let is_dead = |stream: &Stream| stream.heard.elapsed() > silence;
        let dead: Vec<_> =
            self.streams.iter().filter(|(_, stream)| is_dead(stream)).map(|(id, _)| *id).collect();
        for id in dead {
            let error = Status::unavailable(format!("no frame for {silence:?}"));
            self.end(id, Some(fetchproxy::refusal(&error)))?;
        }
        let orphans = self.held.iter().filter(|(_, held)| held.number == 0);
        let orphans = orphans.filter(|(_, held)| held.lease.outcome.is_none());
        self.ready.extend(orphans.map(|(key, held)| (held.stream, *key)));
        Ok(())
    }

    /// Takes a frame of the proxy. Returns the messages to work on.
    fn take(&mut self, id: u64, frame: ConsumeResponse) -> Vec<(u64, Delivery, CancellationToken)> {
        let Some(stream) = self.streams.get_mut(&id) else { return Vec::new() };
        (stream.heard, stream.is_served) = (Instant::now(), true);
        stream.is_paused |= frame.credit_id != 0;
        for rejected in frame.rejected {
            let lease = Lease::of_rejected(&rejected);
            if !rejected.token.is_empty() {
                let key = self.hold(id, rejected.number, lease);
                self.send(key);
            }
        }
        for result in frame.results {
            self.note(id, result);
        }
        for ended in frame.ended {
            let is_it = |held: &Held| held.stream == id && held.number == ended.number;
            let key = self.held.iter().find(|(_, held)| is_it(held)).map(|(key, _)| *key);
            if let (Some(key), Some(why)) = (key, ended.why) {
                self.lose(key, &why);
            }
        }
        if frame.draining.is_some() {
            self.next();
        }
        let messages = frame.messages.into_iter().map(|message| {
            let lease = Lease::of(&message);
            let lost = lease.gone.clone();
            (self.hold(id, message.number, lease), message, lost)
        });
        messages.collect()
    }

    fn hold(&mut self, stream: u64, number: u64, lease: Lease) -> u64 {
        self.last_key += 1;
        self.held.insert(self.last_key, Held { lease, stream, number });
        self.last_key
    }

    fn decide(&mut self, key: u64, done: Result<Value, Failure>) {
        if let Some(held) = self.held.get_mut(&key) {
            held.lease.decide_by(done);
            self.send(key);
        }
    }

    /// Puts a message into the next frame, if it is still in hand.
    fn send(&mut self, key: u64) {
        self.ready.extend(self.held.get(&key).map(|held| (held.stream, key)));
    }

    /// Takes the results of one frame.
    fn note(&mut self, id: u64, result: ConsumeResult) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let keys = stream.sent.remove(&result.id).unwrap_or_default();
        let failed = |error| SettleResult { error: Some(error), ..SettleResult::default() };
        let results = match result.error {
            Some(error) => vec![failed(error); keys.len()],
            None => result.results,
        };
        let again = results.iter().filter_map(|result| result.error.as_ref());
        let worst = again
            .filter(|error| fetchproxy::passes(error))
            .max_by_key(|error| fetchproxy::of(error.retry_delay));
        let wait = worst.map(|error| fetchproxy::wait(error, &mut stream.tries));
        stream.tries = wait.map_or(0, |_| stream.tries);
        let mut again = Vec::new();
        for (key, result) in keys.into_iter().zip(results) {
            let is_extended = result.outcome() == Outcome::Extended;
            match result.error {
                Some(error) if fetchproxy::passes(&error) => again.push(key),
                Some(error) => self.lose(key, &error),
                None if is_extended => {}
                None => {
                    if let Some(mut held) = self.remove(key) {
                        held.lease.end();
                    }
                }
            }
        }
        if let Some(wait) = wait {
            let events = self.events.clone();
            tokio::spawn(async move {
                time::sleep(wait).await;
                drop(events.send((id, Event::Again(again))));
            });
        }
    }

    fn lose(&mut self, key: u64, why: &SettleError) {
        if let Some(mut held) = self.remove(key) {
            held.lease.lose(&format!("{}: {}", why.reason, why.message));
        }
    }

    fn remove(&mut self, key: u64) -> Option<Held> {
        let held = self.held.remove(&key)?;
        self.ready.remove(&(held.stream, key));
        Some(held)
    }

    /// Another stream takes over.
    fn next(&mut self) {
        self.current += 1;
        self.open_at = Some(Instant::now());
    }

    /// Hands what is left to the next stream: it is settled there by token, or extended.
    fn end(&mut self, id: u64, error: Option<SettleError>) -> Result<(), String> {
        let Some(stream) = self.streams.remove(&id) else { return Ok(()) };
        stream.reader.abort();
        if id == self.current {
            self.next();
            self.tries = if stream.is_served { 0 } else { self.tries };
            // The file may have a newer credential.
            let is_stale =
                |error: &SettleError| stream.is_served && error.reason == "UNAUTHENTICATED";
            if let Some(error) = error.filter(|error| !is_stale(error)) {
                if !fetchproxy::passes(&error) {
                    let keys: Vec<_> = self.held.keys().copied().collect();
                    keys.into_iter().for_each(|key| self.lose(key, &error));
                    return Err(format!("{}: {}", error.reason, error.message));
                }
                self.open_at = Some(Instant::now() + fetchproxy::wait(&error, &mut self.tries));
            }
        }
        self.ready.retain(|(stream, _)| *stream != id);
        for (key, held) in self.held.iter_mut().filter(|(_, held)| held.stream == id) {
            (held.stream, held.number) = (self.current, 0);
            self.ready.insert((self.current, *key));
        }
        Ok(())
    }

    /// Sends all that is there to say: as many settlements as fit, or nothing, as a sign of life.
    fn write(&mut self, is_beat: bool) {
        // A message of an earlier stream is extended at each heartbeat, so its lease outlasts some.
        let extension = self.grace.max(self.beat * MISSED_BEATS);
        let Self { start, streams, held, ready, is_stopping, .. } = self;
        for (id, stream) in streams {
            let Some(send) = &stream.send else { continue };
            let mut is_silent = !is_beat;
            loop {
                let mut frame = ConsumeRequest::default();
                if !stream.is_started {
                    (stream.is_started, frame.start) = (true, Some(start.clone()));
                }
                if *is_stopping && !stream.is_pausing {
                    stream.is_pausing = true;
                    let credit = ConsumeCredit { id: 1, max_leases: Some(0), max_bytes: None };
                    frame.credit = Some(credit);
                }
                let mine = ready.range((*id, 0)..=(*id, u64::MAX)).take(MOST_SETTLEMENTS);
                let keys: Vec<_> = mine.map(|(_, key)| *key).collect();
                if !keys.is_empty() {
                    stream.last_id += 1;
                    let settlements = keys.iter().map(|key| held[key].settlement(extension));
                    frame.settle = Some(ConsumeSettle {
                        id: stream.last_id,
                        settlements: settlements.collect(),
                        ..ConsumeSettle::default()
                    });
                    keys.iter().for_each(|key| _ = ready.remove(&(*id, *key)));
                    stream.sent.insert(stream.last_id, keys);
                }
                if frame == ConsumeRequest::default() && is_silent {
                    break;
                }
                is_silent = true;
                drop(send.send(frame));
            }
            let is_empty = !held.values().any(|held| held.stream == *id);
            if stream.is_pausing && stream.is_paused && is_empty {
                stream.send = None;
            }
        }
    }
}

impl Held {
    /// The outcome, or an Extend if there is no outcome.
    fn settlement(&self, extension: Duration) -> Settlement {
        let extend = || Action::Extend(ExtendAction { lease: Some(fetchproxy::to(extension)) });
        let action = Some(self.lease.outcome.clone().unwrap_or_else(extend));
        let token = if self.number == 0 { self.lease.token.clone() } else { String::new() };
        Settlement { token, action, number: self.number }
    }
}

async fn read(
    mut client: Client,
    requests: UnboundedReceiver<ConsumeRequest>,
    take: impl Fn(ConsumeResponse),
) -> Result<(), Status> {
    let requests = Request::new(UnboundedReceiverStream::new(requests));
    let (mut client, requests) = client.ready(requests)?;
    let mut frames = client.consume(requests).await?.into_inner();
    while let Some(frame) = frames.message().await? {
        take(frame);
    }
    Ok(())
}
