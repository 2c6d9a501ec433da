//! One scenario, acted: its stream and consumer, its proxy, its workers, step by step. Says what
//! went wrong, and decides nothing about what is printed of it.

use std::{
    collections::BTreeMap,
    net::TcpListener,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::HeaderMap;
use futures_util::StreamExt as _;

use crate::{
    books::{Books, Tally},
    language::Language,
    scenario::{Publish, Scenario, Step, Turn},
    support::{
        jetstream::{Fixture, ack_wait},
        nats_server::NatsServer,
        proxy::Proxy,
    },
    worker::Worker,
};

/// For what should happen at once.
const SOON: Duration = Duration::from_secs(20);
/// For a worker to end when all is done.
const LAST: Duration = Duration::from_secs(10);

pub struct Stage<'a> {
    scenario: &'a Scenario,
    languages: &'a [Language],
    keys: &'a Path,
    nats: &'a mut NatsServer,
    proxy: Option<Proxy>,
    listen: String,
    fixture: Fixture,
    advisories: async_nats::Subscriber,
    books: Arc<Books>,
    workers: Vec<Worker>,
    ids: u64,
    sequence: u64,
}

/// What was done, or what went wrong.
pub type Verdict = Result<Tally, String>;

impl<'a> Stage<'a> {
    pub async fn set(
        scenario: &'a Scenario,
        languages: &'a [Language],
        keys: &'a Path,
        nats: &'a mut NatsServer,
    ) -> Self {
        let consumer = ack_wait((scenario.ack_wait * 1000.0) as u64);
        let fixture = Fixture::on(nats, consumer).await;
        let client = async_nats::connect(nats.url()).await.unwrap();
        let of_consumer = format!("{}.{}", fixture.stream, fixture.consumer);
        let subject = format!("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{of_consumer}");
        let advisories = client.subscribe(subject).await.unwrap();
        client.flush().await.unwrap();
        let listen = free_address();
        let (books, workers) = (Arc::default(), Vec::new());
        let mut stage = Self {
            scenario,
            languages,
            keys,
            nats,
            proxy: None,
            listen,
            fixture,
            advisories,
            books,
            workers,
            ids: 0,
            sequence: 0,
        };
        stage.start_proxy();
        stage
    }

    pub async fn act(mut self) -> Verdict {
        let acted = self.steps().await;
        let acted = match acted {
            Ok(()) => self.leave().await,
            wrong => wrong,
        };
        let mut wrong: Vec<_> = acted.err().into_iter().collect();
        wrong.extend(self.books.complaints(self.scenario.forgetful));
        if wrong.is_empty() {
            return Ok(self.books.tally());
        }
        for worker in &self.workers {
            wrong.push(format!("{} said at last:\n{}", worker.name, worker.errors()));
        }
        Err(wrong.join("\n"))
    }

    async fn steps(&mut self) -> Result<(), String> {
        for (number, step) in (1..).zip(&self.scenario.steps) {
            let done = self.step(step).await;
            done.map_err(|wrong| format!("step {number}: {wrong}"))?;
        }
        Ok(())
    }

    async fn step(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::Publish(what) => self.publish(what).await,
            Step::Start(name) => self.start(name),
            Step::Ready {} => self.ready().await?,
            Step::Stop { worker, within } => {
                let named = |one: &Worker| one.name.ends_with(&format!("/{worker}"));
                let place = self.workers.iter().position(named).ok_or("no such worker")?;
                self.workers[place].stop();
                self.end(place, Duration::from_secs_f64(*within)).await?;
            }
            Step::Pulled {} => {
                let pulled = |info: &Info| info.num_waiting > 0;
                self.until_server_says(SOON, "a pull", pulled).await?;
            }
            Step::Held(count) => {
                let held = |info: &Info| info.num_ack_pending == *count;
                self.until_server_says(SOON, "messages in hand", held).await?;
            }
            Step::Pause(seconds) => tokio::time::sleep(Duration::from_secs_f64(*seconds)).await,
            Step::Seen { event, count } => {
                let books = self.books.clone();
                until(SOON, || async { (books.count(event) >= *count).then_some(()) })
                    .await
                    .ok_or(format!("{event} said {} times only", books.count(event)))?;
            }
            Step::Settled { within } => self.settled(Duration::from_secs_f64(*within)).await?,
            Step::Delivered(count) => {
                let delivered = self.fixture.info().await.delivered.consumer_sequence;
                (delivered == *count)
                    .then_some(())
                    .ok_or(format!("{delivered} deliveries instead of {count}"))?;
            }
            Step::Terminated(count) => self.terminated(*count).await?,
            Step::Proxy(Turn::Start) => self.start_proxy(),
            Step::Proxy(Turn::Kill | Turn::Stop) => self.proxy = None,
            Step::Nats(Turn::Start) => self.nats.restart(),
            Step::Nats(Turn::Kill) => self.nats.kill(),
            Step::Nats(Turn::Stop) => self.nats.stop(),
        }
        Ok(())
    }

    fn start_proxy(&mut self) {
        let keys = self.keys.to_str().unwrap();
        // The one that comes after it is to know its tokens.
        let flags = ["--token-key-file", keys, "--cluster", "clients"];
        self.proxy = Some(Proxy::start_on(&self.listen, &self.nats.url(), &flags));
    }

    async fn publish(&mut self, what: &Publish) {
        let mut headers = HeaderMap::new();
        for (name, values) in &what.headers {
            values.iter().for_each(|value| headers.append(&**name, &**value));
        }
        for _ in 0..what.count {
            let (mut id, mut text) = (None, what.text.clone().unwrap_or_default());
            if let Some(payload) = &what.payload {
                self.ids += 1;
                id = Some(self.ids);
                let mut payload = payload.clone();
                payload.insert("id".to_owned(), self.ids.into());
                if what.pad > 0 {
                    payload.insert("pad".to_owned(), "x".repeat(what.pad).into());
                }
                text = serde_json::to_string(&payload).unwrap();
            }
            self.sequence += 1;
            self.books.published(self.sequence, id, what);
            let sequence = self.fixture.publish_with("task", headers.clone(), text).await;
            assert_eq!(sequence, self.sequence, "nobody else publishes");
        }
    }

    fn start(&mut self, name: &str) {
        let mut env = BTreeMap::from([
            ("FETCH_PROXY_ADDR".to_owned(), self.listen.clone()),
            ("STREAM".to_owned(), self.fixture.stream.clone()),
            ("CONSUMER".to_owned(), self.fixture.consumer.clone()),
        ]);
        env.extend(self.scenario.env.clone());
        for language in self.languages {
            self.workers.push(Worker::start(name, language, &env, &self.books));
        }
    }

    async fn ready(&self) -> Result<(), String> {
        for worker in &self.workers {
            let spoken = || async { self.books.last_word(&worker.name).map(|_| ()) };
            until(SOON, spoken).await.ok_or(format!("{} says nothing", worker.name))?;
        }
        Ok(())
    }

    /// Until nothing is left at the server, and the workers have told of all of it.
    async fn settled(&mut self, within: Duration) -> Result<(), String> {
        let began = Instant::now();
        let nothing_left = |info: &Info| info.num_pending == 0 && info.num_ack_pending == 0;
        self.until_server_says(within, "everything to be settled", nothing_left).await?;
        let left = within.saturating_sub(began.elapsed()).max(Duration::from_secs(2));
        until(left, || async { self.books.all_told().then_some(()) })
            .await
            .ok_or("nothing was said of some messages, which the server has as settled".to_owned())
    }

    async fn until_server_says(
        &mut self,
        within: Duration,
        what: &str,
        mut is_so: impl FnMut(&Info) -> bool,
    ) -> Result<(), String> {
        let (fixture, mut last) = (&self.fixture, None);
        let began = Instant::now();
        loop {
            if let Some(info) = fixture.try_info().await {
                if is_so(&info) {
                    return Ok(());
                }
                last = Some(info);
            }
            let ended = self.workers.iter_mut().any(Worker::has_failed);
            if ended || began.elapsed() > within {
                let said = last.map(|info| {
                    format!("{} to deliver, {} in hand", info.num_pending, info.num_ack_pending)
                });
                let why =
                    if ended { "a worker has ended".to_owned() } else { format!("{within:?}") };
                return Err(format!("waited for {what}: {why}; server: {said:?}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn terminated(&mut self, count: usize) -> Result<(), String> {
        for number in 0..count {
            let next = tokio::time::timeout(SOON, self.advisories.next()).await.ok().flatten();
            let next = next.ok_or(format!("{number} terminations instead of {count}"))?;
            let said: serde_json::Value = serde_json::from_slice(&next.payload).unwrap();
            if said["reason"].as_str().is_none_or(str::is_empty) {
                return Err(format!("terminated without a reason: {said}"));
            }
        }
        Ok(())
    }

    /// Ends all workers as a cluster would.
    async fn leave(&mut self) -> Result<(), String> {
        self.workers.iter().for_each(Worker::stop);
        for place in 0..self.workers.len() {
            self.end(place, LAST).await?;
        }
        Ok(())
    }

    async fn end(&mut self, place: usize, within: Duration) -> Result<(), String> {
        let worker = &mut self.workers[place];
        let status = worker.ended(within).await;
        let status = status.ok_or(format!("{} did not stop in {within:?}", worker.name))?;
        if !status.success() {
            return Err(format!("{} stopped with {status}", worker.name));
        }
        let (name, books) = (&worker.name, &self.books);
        let told = || async { (books.last_word(name)? == "stopped").then_some(()) };
        until(SOON, told).await.ok_or(format!("{name} did not say that it stopped"))
    }
}

type Info = async_nats::jetstream::consumer::Info;

async fn until<T, F: Future<Output = Option<T>>>(
    within: Duration,
    mut ask: impl FnMut() -> F,
) -> Option<T> {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return Some(answer);
        }
        if began.elapsed() > within {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Below those that the system gives out by itself, so that nobody takes it while its proxy is away.
fn free_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed) as u32 + std::process::id() * 61;
        let address = format!("127.0.0.1:{}", 20_000 + offset % 12_000);
        if TcpListener::bind(&address).is_ok() {
            return address;
        }
    }
}
