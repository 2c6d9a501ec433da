//! The brokers that keep the contract, each with a consumer that nothing was published to.

use std::{
    sync::Mutex,
    time::{Duration, SystemTime},
};

use async_nats::jetstream::{consumer::pull, stream::Stream};
use fetch_proxy::{
    broker::{Broker, ConsumerName, Link},
    nats::{Auth, Nats, Settings},
};
use testkit::{
    eventually,
    fake_broker::{FakeBroker, info},
    jetstream::{Fixture, config},
    nats_server::NatsServer,
};
use tokio_util::task::TaskTracker;

use super::super::simulation::{
    history::History,
    jetstream::Config,
    net::{Net, SimBroker},
};

/// The ack wait of the consumer, until a promise changes it.
pub const ACK_WAIT: Duration = Duration::from_millis(1000);

/// A broker with a consumer, and what its clients can see.
pub trait World {
    type Broker: Broker;
    fn broker(&self) -> &Self::Broker;
    fn name(&self) -> ConsumerName;
    /// A time that an answer may be late, on a busy machine.
    fn slack(&self) -> Duration;
    async fn publish(&self, payload: Vec<u8>);
    /// A message that breaks every connection that brings it.
    async fn publish_poison(&self);
    async fn delete_consumer(&self);
    async fn set_ack_wait(&self, ack_wait: Duration);
}

/// A broker with all that an operator can do to JetStream.
pub trait Operated: World {
    async fn publish_to(&self, subject: &str, payload: Vec<u8>);
    /// Changes the consumer live.
    async fn update(&self, change: impl FnOnce(&mut Config));
    /// The limit of pulls that wait, for a consumer that is created from now on. It cannot change live.
    fn set_max_waiting(&self, most: usize);
    /// Creates the consumer again under its name, after it was deleted.
    async fn create_again(&self);
    /// `false`: there is no such API.
    async fn reset(&self, next: u64) -> bool;
    async fn pause(&self, time: Duration);
    async fn remove(&self, sequence: u64);
    /// Removes all messages before this stream sequence.
    async fn purge(&self, first: u64);
    async fn set_max_age(&self, max_age: Duration);
    /// Waits until so many pulls wait at the server.
    async fn pulled(&self, pulls: usize);
}

pub struct Fake(FakeBroker);

impl World for Fake {
    type Broker = FakeBroker;
    fn broker(&self) -> &FakeBroker {
        &self.0
    }
    fn name(&self) -> ConsumerName {
        self.0.name()
    }
    fn slack(&self) -> Duration {
        testkit::BOUND
    }
    async fn publish(&self, payload: Vec<u8>) {
        self.0.publish(payload);
    }
    async fn publish_poison(&self) {
        self.0.publish_poison();
    }
    async fn delete_consumer(&self) {
        self.0.change(|info| *info = None);
    }
    async fn set_ack_wait(&self, ack_wait: Duration) {
        self.0.change(|info| info.as_mut().unwrap().ack_wait = ack_wait);
    }
}

pub async fn fake() -> Fake {
    Fake(FakeBroker::new(info(ACK_WAIT)))
}

/// The broker of the simulation, on a network where everything arrives at once.
pub struct Modelled {
    pub net: Net,
    broker: SimBroker,
    config: Mutex<Config>,
}

impl World for Modelled {
    type Broker = SimBroker;
    fn broker(&self) -> &SimBroker {
        &self.broker
    }
    fn name(&self) -> ConsumerName {
        ConsumerName { stream: "S".into(), consumer: "worker".into() }
    }
    fn slack(&self) -> Duration {
        Duration::from_millis(50)
    }
    async fn publish(&self, payload: Vec<u8>) {
        self.publish_to("x", payload).await;
    }
    async fn publish_poison(&self) {
        self.net.with(|state, now| state.model.publish("S", "poison".into(), true, now));
    }
    async fn delete_consumer(&self) {
        self.net.with(|state, _| state.model.delete_consumer(&self.name()));
    }
    async fn set_ack_wait(&self, ack_wait: Duration) {
        self.update(|config| config.ack_wait = ack_wait).await;
    }
}

impl Operated for Modelled {
    async fn publish_to(&self, subject: &str, payload: Vec<u8>) {
        self.net.with(|state, now| {
            state.model.publish_to("S", subject, payload.into(), false, now);
        });
    }
    async fn update(&self, change: impl FnOnce(&mut Config)) {
        let mut config = self.config.lock().unwrap();
        change(&mut config);
        let new = config.clone();
        self.net.with(|state, now| {
            state.model.update(&self.name(), |config| *config = new, now);
        });
    }
    fn set_max_waiting(&self, most: usize) {
        self.config.lock().unwrap().max_waiting = most;
    }
    async fn create_again(&self) {
        let config = self.config.lock().unwrap().clone();
        self.net.with(|state, _| state.model.add_consumer(&self.name(), config));
    }
    async fn reset(&self, next: u64) -> bool {
        self.net.with(|state, now| state.model.reset(&self.name(), next, now));
        true
    }
    async fn pause(&self, time: Duration) {
        self.net.with(|state, now| state.model.pause(&self.name(), Some(now + time), now));
    }
    async fn remove(&self, sequence: u64) {
        self.net.with(|state, now| state.model.remove("S", sequence, now));
    }
    async fn purge(&self, first: u64) {
        self.net.with(|state, now| state.model.purge("S", first, now));
    }
    async fn set_max_age(&self, max_age: Duration) {
        self.net.with(|state, now| state.model.set_max_age("S", Some(max_age), now));
    }
    async fn pulled(&self, _: usize) {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

pub async fn modelled() -> Modelled {
    modelled_as(Config::new(ACK_WAIT)).await
}

/// The configuration of a consumer with three copies.
pub fn replicated(ack_wait: Duration) -> Config {
    Config { replicas: 3, ..Config::new(ack_wait) }
}

pub async fn modelled_as(config: Config) -> Modelled {
    let net = Net::new(1, History::new(false), 1);
    let world = Modelled { broker: SimBroker::join(&net), net, config: Mutex::new(config.clone()) };
    world.net.with(|state, _| {
        state.model.add_stream("S");
        state.model.add_consumer(&world.name(), config);
    });
    let net = world.net.clone();
    tokio::spawn(async move { net.drive().await });
    up(&world.broker).await;
    world
}

pub struct Real {
    pub fixture: Fixture,
    broker: Nats,
    pub tasks: TaskTracker,
    config: Mutex<Config>,
}

impl Real {
    /// The consumer of this fixture, over a connection to these servers.
    pub async fn with(fixture: Fixture, urls: &str) -> Self {
        let settings = Settings {
            servers: urls.split(',').map(|url| url.parse().unwrap()).collect(),
            auth: Auth::None,
            ca: None,
            identity: None,
            domain: None,
            tls_first: false,
            inbox_prefix: "_INBOX".into(),
        };
        let tasks = TaskTracker::new();
        let broker = Nats::start(settings, &tasks);
        up(&broker).await;
        Self { fixture, broker, tasks, config: Mutex::new(Config::new(ACK_WAIT)) }
    }

    async fn stream(&self) -> Stream {
        self.fixture.jetstream.get_stream(&self.fixture.stream).await.unwrap()
    }

    /// Calls an API that the client has no function for. `None`: there is no such API.
    async fn call(&self, api: &str, body: serde_json::Value) -> Option<serde_json::Value> {
        let Fixture { jetstream, stream, consumer } = &self.fixture;
        let subject = format!("$JS.API.CONSUMER.{api}.{stream}.{consumer}");
        let answer = jetstream.client().request(subject, body.to_string().into()).await.ok()?;
        Some(serde_json::from_slice(&answer.payload).unwrap())
    }
}

impl World for Real {
    type Broker = Nats;
    fn broker(&self) -> &Nats {
        &self.broker
    }
    fn name(&self) -> ConsumerName {
        let (stream, consumer) = (&*self.fixture.stream, &*self.fixture.consumer);
        ConsumerName { stream: stream.into(), consumer: consumer.into() }
    }
    fn slack(&self) -> Duration {
        testkit::BOUND
    }
    async fn publish(&self, payload: Vec<u8>) {
        self.fixture.publish("x", payload).await;
    }
    async fn publish_poison(&self) {
        let headers = b"NATS/1.0\r\nA: a lone\rCR\r\n\r\n";
        self.fixture.publish_raw(&NatsServer::shared().url(), headers).await;
    }
    async fn delete_consumer(&self) {
        self.stream().await.delete_consumer(&self.fixture.consumer).await.unwrap();
    }
    async fn set_ack_wait(&self, ack_wait: Duration) {
        self.update(|config| config.ack_wait = ack_wait).await;
    }
}

impl Operated for Real {
    async fn publish_to(&self, subject: &str, payload: Vec<u8>) {
        self.fixture.publish(subject, payload).await;
    }
    async fn update(&self, change: impl FnOnce(&mut Config)) {
        let config = {
            let mut config = self.config.lock().unwrap();
            change(&mut config);
            written(&config)
        };
        self.stream().await.update_consumer(config).await.unwrap();
    }
    fn set_max_waiting(&self, most: usize) {
        self.config.lock().unwrap().max_waiting = most;
    }
    async fn create_again(&self) {
        let config = written(&self.config.lock().unwrap());
        self.stream().await.create_consumer(config).await.unwrap();
    }
    async fn reset(&self, next: u64) -> bool {
        let answer = self.call("RESET", serde_json::json!({ "seq": next })).await;
        if answer.is_none() {
            eprintln!(
                "NOT TESTED: this nats-server cannot reset a consumer (it is older than 2.14)"
            );
        }
        answer.inspect(|answer| assert_eq!(answer.get("error"), None, "{answer}")).is_some()
    }
    async fn pause(&self, time: Duration) {
        let until = humantime::format_rfc3339_nanos(SystemTime::now() + time).to_string();
        let answer = self.call("PAUSE", serde_json::json!({ "pause_until": until })).await.unwrap();
        assert_eq!(answer["paused"], true, "{answer}");
    }
    async fn remove(&self, sequence: u64) {
        assert!(self.stream().await.delete_message(sequence).await.unwrap());
    }
    async fn purge(&self, first: u64) {
        self.stream().await.purge().sequence(first).await.unwrap();
    }
    async fn set_max_age(&self, max_age: Duration) {
        let mut config = self.stream().await.cached_info().config.clone();
        // The server wants both to fit together.
        (config.max_age, config.duplicate_window) = (max_age, max_age);
        self.fixture.jetstream.update_stream(config).await.unwrap();
    }
    async fn pulled(&self, pulls: usize) {
        eventually("pulls that wait", || async {
            (self.fixture.info().await.num_waiting == pulls).then_some(())
        })
        .await;
    }
}

/// The configuration as the real server reads it.
fn written(asked: &Config) -> pull::Config {
    let limit = |limit: Option<u64>| limit.map_or(-1, |limit| i64::try_from(limit).unwrap());
    pull::Config {
        ack_wait: asked.ack_wait,
        backoff: asked.backoff.clone(),
        max_deliver: limit(asked.max_deliver),
        max_ack_pending: limit(asked.max_ack_pending),
        max_batch: asked.max_batch.map_or(0, i64::from),
        max_expires: asked.max_expires.unwrap_or_default(),
        max_bytes: asked.max_bytes.map_or(0, |limit| i64::try_from(limit).unwrap()),
        max_waiting: i64::try_from(asked.max_waiting).unwrap(),
        filter_subject: asked.filter.clone().unwrap_or_default(),
        ..config()
    }
}

pub async fn real() -> Real {
    let fixture = Fixture::new(written(&Config::new(ACK_WAIT))).await;
    Real::with(fixture, &NatsServer::shared().url()).await
}

pub async fn up(broker: &impl Broker) {
    let mut link = broker.link();
    while !matches!(link, Link::Up(_)) {
        link = broker.link_change(&link).await;
    }
}

/// A world around the field `real`, which does all of it.
macro_rules! delegate {
    ($world:ident) => {
        impl World for $world {
            type Broker = <Real as World>::Broker;
            fn broker(&self) -> &Self::Broker {
                self.real.broker()
            }
            fn name(&self) -> fetch_proxy::broker::ConsumerName {
                self.real.name()
            }
            fn slack(&self) -> std::time::Duration {
                self.real.slack()
            }
            async fn publish(&self, payload: Vec<u8>) {
                self.real.publish(payload).await;
            }
            async fn publish_poison(&self) {
                self.real.publish_poison().await;
            }
            async fn delete_consumer(&self) {
                self.real.delete_consumer().await;
            }
            async fn set_ack_wait(&self, ack_wait: std::time::Duration) {
                self.real.set_ack_wait(ack_wait).await;
            }
        }
    };
}

pub(super) use delegate;
