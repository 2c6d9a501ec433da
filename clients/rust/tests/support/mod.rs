//! What several tests share: events are kept, handlers are counted, and each test is run in both modes.

#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use fetchproxy::{
    Client, Event, Failure, Message, Mode, Worker,
    testing::{FakeOptions, FakeProxy},
};
use serde_json::Value;
use tokio::{
    sync::{Semaphore, watch},
    time,
};

pub const MODES: [Mode; 2] = [Mode::Consume, Mode::Fetch];
pub const SECOND: Duration = Duration::from_secs(1);
/// Longer than any test takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

pub fn fake() -> FakeProxy {
    FakeProxy::start(FakeOptions::default())
}

pub fn fake_with(max_deliver: u32, ack_wait: Duration) -> FakeProxy {
    FakeProxy::start(FakeOptions { max_deliver, ack_wait })
}

pub async fn in_time<T>(future: impl Future<Output = T>) -> T {
    time::timeout(LIMIT, future).await.expect("the test takes too long")
}

/// The events of a worker, in order.
#[derive(Clone)]
pub struct Events(Arc<watch::Sender<Vec<Event>>>);

impl Events {
    pub fn new() -> Self {
        Self(Arc::new(watch::Sender::new(Vec::new())))
    }

    pub fn hear(&self) -> impl Fn(&Event) + Send + Sync + 'static {
        let all = self.0.clone();
        move |event| all.send_modify(|all| all.push(event.clone()))
    }

    pub fn all(&self) -> Vec<Event> {
        self.0.borrow().clone()
    }

    pub fn names(&self) -> Vec<&'static str> {
        self.all().iter().map(Event::name).collect()
    }

    /// Each event about a message, with the number of the attempt.
    pub fn attempts(&self) -> Vec<(&'static str, u32)> {
        let all = self.all();
        let about = all.iter().filter_map(|event| Some((event.name(), event.message()?)));
        about.map(|(name, message)| (name, message.delivery_count)).collect()
    }

    /// The reasons of the repeats.
    pub fn retries(&self) -> Vec<String> {
        let all = self.all().into_iter().filter_map(|event| match event {
            Event::Retry { error, .. } => Some(error.reason),
            _ => None,
        });
        all.collect()
    }

    /// Waits for so many events of this name.
    pub async fn until(&self, name: &str, count: usize) {
        let is_there =
            |all: &Vec<Event>| all.iter().filter(|event| event.name() == name).count() >= count;
        in_time(self.0.subscribe().wait_for(is_there)).await.unwrap();
    }
}

/// Handlers that count how many of them run at once, and wait for the word to end.
#[derive(Clone)]
pub struct Crowd {
    counts: Arc<watch::Sender<Counts>>,
    may_end: Arc<Semaphore>,
    dropped: Arc<Mutex<Vec<u32>>>,
}

#[derive(Clone, Copy, Default)]
pub struct Counts {
    pub now: usize,
    pub most: usize,
    pub begun: usize,
}

impl Crowd {
    pub fn new() -> Self {
        let counts = Arc::new(watch::Sender::new(Counts::default()));
        Self { counts, may_end: Arc::new(Semaphore::new(0)), dropped: Arc::default() }
    }

    pub fn handler(&self) -> impl Fn(Message<Value>) -> Handling + Send + Sync + 'static {
        let crowd = self.clone();
        move |message| {
            let crowd = crowd.clone();
            Box::pin(async move {
                let place = Place::take(&crowd, message.delivery_count);
                let _may_end = crowd.may_end.acquire().await;
                place.leave();
                Ok(())
            })
        }
    }

    pub async fn begun(&self, count: usize) {
        in_time(self.counts.subscribe().wait_for(|counts| counts.begun >= count)).await.unwrap();
    }

    pub fn end(&self) {
        self.may_end.add_permits(Semaphore::MAX_PERMITS / 2);
    }

    pub fn counts(&self) -> Counts {
        *self.counts.borrow()
    }

    /// The attempts whose handlers were dropped before their end, when no handler is left.
    pub async fn dropped(&self) -> Vec<u32> {
        in_time(self.counts.subscribe().wait_for(|counts| counts.now == 0)).await.unwrap();
        self.dropped.lock().unwrap().clone()
    }
}

pub type Handling = std::pin::Pin<Box<dyn Future<Output = Result<(), Failure>> + Send>>;

/// The place of a handler that runs.
struct Place {
    crowd: Crowd,
    attempt: u32,
    has_ended: bool,
}

impl Place {
    fn take(crowd: &Crowd, attempt: u32) -> Self {
        crowd.counts.send_modify(|counts| {
            counts.now += 1;
            counts.begun += 1;
            counts.most = counts.most.max(counts.now);
        });
        Self { crowd: crowd.clone(), attempt, has_ended: false }
    }

    fn leave(mut self) {
        self.has_ended = true;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if !self.has_ended {
            self.crowd.dropped.lock().unwrap().push(self.attempt);
        }
        self.crowd.counts.send_modify(|counts| counts.now -= 1);
    }
}

/// A worker of the fake whose handler never sees JSON that it does not expect.
pub fn worker<H, F>(client: Client, mode: Mode, events: &Events, handler: H) -> Worker
where
    H: Fn(Message<Value>) -> F + Send + Sync + 'static,
    F: Future<Output = Result<(), Failure>> + Send + 'static,
{
    let worker = Worker::new(client, "TASKS", "workers", handler);
    worker.mode(mode).grace(SECOND).on_event(events.hear())
}

pub async fn done(_: Message<Value>) -> Result<(), Failure> {
    Ok(())
}
