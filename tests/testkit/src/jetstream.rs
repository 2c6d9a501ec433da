//! Streams and consumers for tests, straight through the NATS client.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime},
};

use async_nats::{
    HeaderMap,
    jetstream::{
        self,
        consumer::{AckPolicy, Info, PullConsumer, pull},
        context::{Context, PublishErrorKind},
        stream,
    },
};

use crate::{eventually, eventually_ok, nats_server::NatsServer, raw_nats};

/// A stream of a test's own, with one durable consumer.
pub struct Fixture {
    pub jetstream: Context,
    pub stream: String,
    pub consumer: String,
}

/// A consumer with the ack wait of the default, 30 s.
pub fn config() -> pull::Config {
    pull::Config {
        durable_name: Some("worker".to_owned()),
        ack_policy: AckPolicy::Explicit,
        ..pull::Config::default()
    }
}

/// The shortest ack wait, in milliseconds, with which a test may ask for a longer lease. A proxy on
/// a busy machine then has more than a second to see its progress confirmed.
pub const SHORTEST_KEPT: u64 = 3000;

/// The consumer of [`config`] with another ack wait.
pub fn ack_wait(millis: u64) -> pull::Config {
    pull::Config { ack_wait: Duration::from_millis(millis), ..config() }
}

impl Fixture {
    /// A new stream in the shared server, with this consumer.
    pub async fn new(consumer: pull::Config) -> Self {
        Self::on(NatsServer::shared(), consumer).await
    }

    pub async fn on(server: &NatsServer, consumer: pull::Config) -> Self {
        Self::at(&server.url(), consumer).await
    }

    /// The same by a URL, which may name a user.
    pub async fn at(url: &str, consumer: pull::Config) -> Self {
        Self::replicated(url, consumer, 1).await
    }

    /// The same with so many copies of all of it; `urls` are separated by commas.
    pub async fn replicated(urls: &str, consumer: pull::Config, copies: usize) -> Self {
        let config = stream::Config { num_replicas: copies, ..stream::Config::default() };
        Self::with(urls, consumer, config).await
    }

    /// The same without copies, on a server that has this tag.
    pub async fn placed(urls: &str, consumer: pull::Config, tag: &str) -> Self {
        let placement = stream::Placement { cluster: None, tags: vec![tag.to_owned()] };
        let placement = Some(placement);
        Self::with(urls, consumer, stream::Config { placement, ..stream::Config::default() }).await
    }

    async fn with(urls: &str, consumer: pull::Config, config: stream::Config) -> Self {
        let servers: Vec<async_nats::ServerAddr> =
            urls.split(',').map(|url| url.parse().unwrap()).collect();
        let mut options = async_nats::ConnectOptions::new();
        if let (Some(user), Some(password)) = (servers[0].username(), servers[0].password()) {
            options = options.user_and_password(user.to_owned(), password.to_owned());
        }
        Self::made(options.connect(servers).await.unwrap(), consumer, config).await
    }

    /// The same by a client that is connected already.
    pub async fn of(client: async_nats::Client, consumer: pull::Config) -> Self {
        Self::made(client, consumer, stream::Config::default()).await
    }

    async fn made(
        client: async_nats::Client,
        consumer: pull::Config,
        config: stream::Config,
    ) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let stream = format!("S{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let jetstream = jetstream::new(client);
        let config = stream::Config {
            name: stream.clone(),
            subjects: vec![format!("{stream}.>")],
            ..config
        };
        // A new cluster can be slow. A request without an answer may have had its effect, so the same request is
        // made again.
        eventually_ok("a stream", || jetstream.get_or_create_stream(&config)).await;
        let name = consumer.durable_name.clone().unwrap();
        let create = || jetstream.create_consumer_on_stream(consumer.clone(), &stream);
        eventually_ok("a consumer", create).await;
        Self { jetstream, stream, consumer: name }
    }

    /// Publishes and waits until it is stored; returns the stream sequence.
    pub async fn publish(&self, subject: &str, payload: impl Into<bytes::Bytes>) -> u64 {
        self.publish_with(subject, HeaderMap::new(), payload).await
    }

    pub async fn publish_with(
        &self,
        subject: &str,
        headers: HeaderMap,
        payload: impl Into<bytes::Bytes>,
    ) -> u64 {
        let subject = format!("{}.{subject}", self.stream);
        let payload = payload.into();
        // A server of a new cluster may not know yet who stores the stream. It says so, and nothing is stored.
        eventually_ok("a stream for the message", || async {
            let (subject, headers) = (subject.clone(), headers.clone());
            let sent = self.jetstream.publish_with_headers(subject, headers, payload.clone()).await;
            match sent.unwrap().await {
                Err(error) if error.kind() == PublishErrorKind::StreamNotFound => Err(error),
                stored => Ok(stored.unwrap().sequence),
            }
        })
        .await
    }

    /// Publishes so many messages, `0` to `count - 1`.
    pub async fn publish_many(&self, count: usize) {
        for number in 0..count {
            self.publish("n", number.to_string()).await;
        }
    }

    /// Publishes a message with headers that no client library would write, and waits until it is
    /// stored; `url` may name a user.
    pub async fn publish_raw(&self, url: &str, headers: &[u8]) -> u64 {
        let before = self.last_sequence().await;
        raw_nats::publish(url, format!("{}.raw", self.stream).as_bytes(), headers, b"raw");
        eventually("a raw message to be stored", || async {
            let last = self.last_sequence().await;
            (last > before).then_some(last)
        })
        .await
    }

    async fn last_sequence(&self) -> u64 {
        let stream = self.jetstream.get_stream(&self.stream).await.unwrap();
        stream.cached_info().state.last_sequence
    }

    pub async fn handle(&self) -> PullConsumer {
        let stream = self.jetstream.get_stream_no_info(&self.stream).await.unwrap();
        stream.get_consumer(&self.consumer).await.unwrap()
    }

    /// The server's view of the consumer now.
    pub async fn info(&self) -> Info {
        self.handle().await.info().await.unwrap().clone()
    }

    /// Waits until a pull waits at the server.
    pub async fn pulled(&self) {
        eventually("a pull", || async { (self.info().await.num_waiting > 0).then_some(()) }).await;
    }

    /// The server's time of the consumer's last delivery, whoever received it.
    ///
    /// # Panics
    /// When the consumer has delivered nothing.
    pub async fn delivered_at(&self) -> SystemTime {
        self.info().await.delivered.last_active.expect("no delivery yet").into()
    }

    /// The same as [`Fixture::info`], where there may be no answer for a while.
    pub async fn try_info(&self) -> Option<Info> {
        let stream = self.jetstream.get_stream_no_info(&self.stream).await.ok()?;
        let mut consumer: PullConsumer = stream.get_consumer(&self.consumer).await.ok()?;
        consumer.info().await.ok().cloned()
    }
}
