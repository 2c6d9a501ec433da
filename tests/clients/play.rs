//! One scenario, acted: its proxy and its workers, step by step. Says what went wrong, and decides
//! nothing about what is printed of it.

use std::{
    collections::BTreeMap,
    fs,
    net::TcpStream,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use async_nats::HeaderMap;
use testkit::{
    nats_server::NatsServer,
    proxy::Proxy,
    relay::{Flow, Relay},
};

use testkit::{
    examples::{
        language::Language,
        reports::{Reports, Tally},
        scenario::{Credential, Publish, Quota, Scenario, Seen, Step, Turn, Wire},
        worker::Worker,
    },
    until,
};
use tokio::task::JoinSet;

use crate::{
    door::Door,
    server::{Info, Server},
};

/// For what should happen at once, on a busy machine.
const SOON: Duration = Duration::from_secs(60);
/// For a worker to end when all is done.
const LAST: f64 = 10.0;

pub struct Play<'a> {
    scenario: &'a Scenario,
    languages: &'a [Language],
    keys: &'a Path,
    nats: &'a mut NatsServer,
    proxy: Option<Proxy>,
    listen: String,
    /// Between the workers and the proxies, if the scenario needs it.
    relay: Option<Relay>,
    server: Server,
    door: Option<Door>,
    /// Calls of the limited principal that are not those of a worker.
    spending: JoinSet<()>,
    reports: Arc<Reports>,
    workers: Vec<Worker>,
    ids: u64,
    sequence: u64,
    /// When the last step began that acts.
    acted: Instant,
}

/// The totals, or the errors.
pub type Verdict = Result<Tally, String>;

impl<'a> Play<'a> {
    pub async fn set(
        scenario: &'a Scenario,
        languages: &'a [Language],
        keys: &'a Path,
        nats: &'a mut NatsServer,
    ) -> Self {
        let server = Server::set(nats, scenario).await;
        let door = scenario.door.map(|ways| Door::new(ways, &server.fixture, &free_address()));
        let listen = free_address();
        let relay = match scenario.needs_relay() {
            true => Some(Relay::to(&listen).await),
            false => None,
        };
        let (reports, workers) = (Arc::default(), Vec::new());
        let mut stage = Self {
            scenario,
            languages,
            keys,
            nats,
            proxy: None,
            listen,
            relay,
            server,
            door,
            spending: JoinSet::new(),
            reports,
            workers,
            ids: 0,
            sequence: 0,
            acted: Instant::now(),
        };
        stage.start_proxy().ready().await;
        stage
    }

    pub async fn act(mut self) -> Verdict {
        let acted = self.steps().await;
        let acted = match acted {
            Ok(()) => self.leave().await,
            wrong => wrong,
        };
        let mut wrong: Vec<_> = acted.err().into_iter().collect();
        let forgetful = self.scenario.forgetful;
        wrong.extend(self.reports.complaints(forgetful));
        wrong.extend(self.server.disagreements(&self.reports, forgetful).await);
        if wrong.is_empty() {
            return Ok(self.reports.tally());
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
        if step.acts() {
            self.acted = Instant::now();
        }
        match step {
            Step::Publish(what) => self.publish(what).await,
            Step::Start(name) => self.start(name),
            Step::Ready {} => self.ready().await?,
            Step::Stop(worker) => self.workers[self.place(worker)?].stop(),
            Step::Ended { worker, within } => self.ended(self.place(worker)?, *within).await?,
            Step::Freeze(worker) => self.workers[self.place(worker)?].freeze(),
            Step::Thaw(worker) => self.workers[self.place(worker)?].thaw(),
            Step::Kill(worker) => drop(self.workers.remove(self.place(worker)?)),
            Step::Pulled {} => {
                let pulled = |info: &Info| info.num_waiting > 0;
                self.until_server_says(SOON, "a pull", pulled).await?;
            }
            Step::Taken(count) => {
                let taken = |info: &Info| info.delivered.consumer_sequence >= *count;
                self.until_server_says(SOON, "messages to be delivered", taken).await?;
            }
            Step::Pause(seconds) => tokio::time::sleep(Duration::from_secs_f64(*seconds)).await,
            Step::Seen(wanted) => self.seen(wanted).await?,
            Step::Settled { within } => self.settled(Duration::from_secs_f64(*within)).await?,
            Step::GivenBack(count) => self.server.given_back(*count, SOON).await?,
            Step::Accounted {} => {
                let has_failed = || self.workers.iter_mut().any(Worker::has_failed);
                self.server.accounted(&self.reports, SOON, has_failed).await?;
            }
            Step::Credential(credential) => self.door()?.hold(*credential),
            Step::Issuer(presence) => self.door()?.place_issuer(*presence)?,
            Step::Revoke(credential) => self.revoke(*credential).await?,
            Step::Quota(Quota::Spent) => {
                let listen = self.listen.clone();
                self.spending = self.door()?.spend(&listen);
            }
            Step::Quota(Quota::Left) => self.spending = JoinSet::new(),
            Step::Told { worker, reason } => self.told(self.place(worker)?, reason).await?,
            Step::Refused { worker, reason } => self.refused(self.place(worker)?, reason).await?,
            Step::Proxy(Turn::Start) => _ = self.start_proxy(),
            Step::Proxy(Turn::Kill) => self.proxy = None,
            Step::Proxy(Turn::Stop) => self.drain_proxy().await?,
            Step::Proxy(Turn::Replace) => self.replace_proxy().await?,
            Step::Proxy(Turn::Freeze) => self.freeze_proxy().await?,
            Step::Proxy(Turn::Thaw) => self.proxy()?.signal("CONT"),
            Step::Wire(wire) => self.wire(*wire)?,
            Step::Nats(Turn::Start) => self.nats.restart(),
            Step::Nats(Turn::Kill) => self.nats.kill(),
            Step::Nats(Turn::Stop) => self.nats.stop(),
            Step::Nats(Turn::Freeze) => self.nats.signal("STOP"),
            Step::Nats(Turn::Thaw) => self.nats.signal("CONT"),
            Step::Nats(Turn::Replace) => return Err("a NATS server is not replaced".to_owned()),
        }
        Ok(())
    }

    fn place(&self, worker: &str) -> Result<usize, String> {
        let named = |one: &Worker| one.name.ends_with(&format!("/{worker}"));
        self.workers.iter().position(named).ok_or(format!("no worker is called {worker}"))
    }

    fn proxy(&self) -> Result<&Proxy, String> {
        self.proxy.as_ref().ok_or("there is no proxy".to_owned())
    }

    /// The signal takes a moment, in which the proxy must not have what comes next.
    async fn freeze_proxy(&self) -> Result<(), String> {
        let proxy = self.proxy()?;
        proxy.signal("STOP");
        let is_frozen = || async { is_stopped(proxy.pid()).then_some(()) };
        until(SOON, is_frozen).await.ok_or("the proxy goes on".to_owned())
    }

    fn wire(&self, wire: Wire) -> Result<(), String> {
        let relay = self.relay.as_ref().ok_or("there is no relay")?;
        match wire {
            Wire::Stall => relay.flow(Flow::Pass, Flow::Delay(Duration::from_secs(600))),
            Wire::Cut => {
                relay.cut();
                relay.flow(Flow::Pass, Flow::Pass);
            }
        }
        Ok(())
    }

    async fn replace_proxy(&mut self) -> Result<(), String> {
        let leaving = self.proxy.take().ok_or("there is no proxy")?;
        self.listen = free_address();
        self.start_proxy().ready().await;
        self.relay.iter().for_each(|relay| relay.turn_to(&self.listen));
        drained(leaving).await
    }

    async fn drain_proxy(&mut self) -> Result<(), String> {
        drained(self.proxy.take().ok_or("there is no proxy")?).await
    }

    fn start_proxy(&mut self) -> &Proxy {
        let keys = self.keys.to_str().unwrap();
        // The one that comes after it is to know its tokens.
        let mut flags = vec!["--token-key-file", keys, "--cluster", "clients"];
        let of_the_door = self.door.as_ref().map(Door::flags).unwrap_or_default();
        flags.extend(of_the_door.iter().map(String::as_str));
        self.proxy.insert(Proxy::start_on(&self.listen, &self.nats.url(), &flags))
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
            } else if let Some(depth) = what.nested {
                text = "[".repeat(depth) + &"]".repeat(depth);
            }
            self.sequence += 1;
            self.reports.published(self.sequence, id, what);
            let sequence = self.server.fixture.publish_with("task", headers.clone(), text).await;
            assert_eq!(sequence, self.sequence, "nobody else publishes");
        }
    }

    fn start(&mut self, name: &str) {
        let address = self.relay.as_ref().map_or(self.listen.clone(), Relay::address);
        let mut env = BTreeMap::from([
            ("FETCH_PROXY_ADDR".to_owned(), address),
            ("STREAM".to_owned(), self.server.fixture.stream.clone()),
            ("CONSUMER".to_owned(), self.server.fixture.consumer.clone()),
        ]);
        env.extend(self.door.iter().flat_map(|door| door.env(&self.listen)));
        env.extend(self.scenario.env.clone());
        for language in self.languages {
            self.workers.push(Worker::start(name, language, &env, &self.reports));
        }
    }

    async fn ready(&self) -> Result<(), String> {
        for worker in &self.workers {
            let spoken = || async { self.reports.last_word(&worker.name).map(|_| ()) };
            until(SOON, spoken).await.ok_or(format!("{} says nothing", worker.name))?;
        }
        Ok(())
    }

    async fn seen(&self, wanted: &Seen) -> Result<(), String> {
        let count = || self.reports.count_seen(wanted, self.acted);
        until(Duration::from_secs_f64(wanted.within), || async {
            (count() >= wanted.count).then_some(())
        })
        .await
        .ok_or_else(|| {
            let Seen { event, count: least, reason, least_in, within, .. } = wanted;
            let reason = reason.as_ref().map_or(String::new(), |reason| format!(" for {reason}"));
            let of = if *least_in > 0.0 { format!(" of {least_in} s") } else { String::new() };
            let said = count();
            format!("{event}{reason}{of} said {said} times instead of {least}, in {within} s")
        })?;
        self.reports.too_soon(wanted, self.acted).map_or(Ok(()), Err)
    }

    fn door(&mut self) -> Result<&mut Door, String> {
        self.door.as_mut().ok_or("the scenario has no door".to_owned())
    }

    async fn revoke(&mut self, credential: Credential) -> Result<(), String> {
        let line = self.door()?.line_of_reading();
        let before = self.proxy()?.log().matches(line).count();
        self.door()?.revoke(credential);
        let proxy = self.proxy()?;
        let read = || async { (proxy.log().matches(line).count() > before).then_some(()) };
        until(SOON, read).await.ok_or("the proxy reads no file again".to_owned())
    }

    async fn told(&self, place: usize, reason: &str) -> Result<(), String> {
        let worker = &self.workers[place];
        let told = || async { worker.errors().contains(reason).then_some(()) };
        until(SOON, told).await.ok_or_else(|| format!("{} tells nobody of {reason}", worker.name))
    }

    async fn refused(&mut self, place: usize, reason: &str) -> Result<(), String> {
        let worker = &mut self.workers[place];
        let status = worker.ended(SOON).await;
        let status = status.ok_or_else(|| format!("{} goes on without rights", worker.name))?;
        if status.success() {
            return Err(format!("{} ended as if all were well", worker.name));
        }
        self.told(place, reason).await?;
        let worker = self.workers.remove(place);
        let repeated = self.reports.has_repeated(&worker.name, reason);
        if repeated {
            Err(format!("{} repeats a call that was refused", worker.name))
        } else {
            Ok(())
        }
    }

    /// Until nothing is left at the server, and the workers have told of all of it.
    async fn settled(&mut self, within: Duration) -> Result<(), String> {
        let (began, last) = (Instant::now(), self.sequence);
        let nothing_left = |info: &Info| {
            (info.num_pending, info.num_ack_pending) == (0, 0)
                && info.ack_floor.stream_sequence == last
        };
        self.until_server_says(within, "everything to be settled", nothing_left).await?;
        let left = within.saturating_sub(began.elapsed()).max(Duration::from_secs(2));
        until(left, || async { self.reports.all_told().then_some(()) })
            .await
            .ok_or("nothing was said of some messages, which the server has as settled".to_owned())
    }

    async fn until_server_says(
        &mut self,
        within: Duration,
        what: &str,
        is_so: impl FnMut(&Info) -> bool,
    ) -> Result<(), String> {
        let workers = &mut self.workers;
        let has_failed = || workers.iter_mut().any(Worker::has_failed);
        self.server.until(within, what, is_so, has_failed).await
    }

    /// Ends all workers as a cluster would.
    async fn leave(&mut self) -> Result<(), String> {
        self.workers.iter().for_each(Worker::stop);
        for place in 0..self.workers.len() {
            self.ended(place, LAST).await?;
        }
        Ok(())
    }

    async fn ended(&mut self, place: usize, within: f64) -> Result<(), String> {
        let worker = &mut self.workers[place];
        let status = worker.ended(Duration::from_secs_f64(within)).await;
        let status = status.ok_or(format!("{} did not stop in {within} s", worker.name))?;
        if !status.success() {
            return Err(format!("{} stopped with {status}", worker.name));
        }
        let (name, reports) = (&worker.name, &self.reports);
        let told = || async { (reports.last_word(name)? == "stopped").then_some(()) };
        until(SOON, told).await.ok_or(format!("{name} did not say that it stopped"))
    }
}

/// Ends a proxy as an operator does.
async fn drained(mut proxy: Proxy) -> Result<(), String> {
    proxy.signal("TERM");
    let status = proxy.wait().await;
    status.success().then_some(()).ok_or(format!("the proxy ended with {status}"))
}

/// Returns true if the system does not tell.
fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.map_or(true, |stat| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T')))
}

/// Below those that the system gives out by itself, so that nobody takes it while its proxy is away. The look makes no
/// listener: a process that is being started would hold a copy of it for a moment.
fn free_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    loop {
        let offset = NEXT.fetch_add(1, Ordering::Relaxed) as u32 + std::process::id() * 61;
        let address = format!("127.0.0.1:{}", 20_000 + offset % 12_000);
        if TcpStream::connect(&address).is_err() {
            return address;
        }
    }
}
