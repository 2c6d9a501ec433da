//! A stream that is filled with messages of one size, which every run reads from its beginning.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use async_nats::jetstream::{
    self,
    consumer::{PullConsumer, pull},
    stream,
};
use bytes::Bytes;
use futures_util::future::join_all;

/// Some servers allow 1000 consumers for each stream unless the stream says more.
const MAX_CONSUMERS: i32 = 100_000;
/// Bytes that are published before their confirmations are awaited.
const WINDOW: usize = 1 << 20;

pub struct Backlog {
    pub stream: String,
    jetstream: jetstream::Context,
}

/// A durable consumer by its name.
#[derive(Clone)]
pub struct Consumer {
    pub stream: String,
    pub name: String,
}

impl Backlog {
    /// Creates the stream, and publishes so many messages of `size` bytes.
    pub async fn fill(
        jetstream: &jetstream::Context,
        stream: &str,
        size: usize,
        messages: usize,
    ) -> Self {
        let config = stream::Config {
            name: stream.into(),
            subjects: vec![format!("{stream}.>")],
            max_consumers: MAX_CONSUMERS,
            ..Default::default()
        };
        jetstream.create_stream(config).await.unwrap();
        let backlog = Self { stream: stream.into(), jetstream: jetstream.clone() };
        let payload = Bytes::from(vec![b'x'; size]);
        let at_once = (WINDOW / size.max(1)).clamp(1, 1000);
        for first in (0..messages).step_by(at_once) {
            let count = at_once.min(messages - first);
            let sent = (0..count).map(|_| jetstream.publish(backlog.subject(), payload.clone()));
            for sent in join_all(sent).await {
                sent.unwrap().await.unwrap();
            }
        }
        backlog
    }

    /// The subject of its messages.
    pub fn subject(&self) -> String {
        format!("{}.x", self.stream)
    }

    /// A new durable consumer over the whole stream.
    pub async fn consumer(&self) -> Consumer {
        self.consumer_of("").await
    }

    /// A new durable consumer over this subject. An empty subject means all.
    pub async fn consumer_of(&self, subject: &str) -> Consumer {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("c{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let config = pull::Config {
            durable_name: Some(name.clone()),
            filter_subject: subject.into(),
            max_ack_pending: 1_000_000,
            ack_wait: Duration::from_secs(60),
            ..Default::default()
        };
        self.jetstream.create_consumer_on_stream(config, &self.stream).await.unwrap();
        Consumer { stream: self.stream.clone(), name }
    }

    /// The handle of async-nats for this consumer.
    pub async fn handle(&self, consumer: &Consumer) -> PullConsumer {
        let stream = self.jetstream.get_stream_no_info(&self.stream).await.unwrap();
        stream.get_consumer(&consumer.name).await.unwrap()
    }

    /// Deletes the stream and its consumers.
    pub async fn delete(self) {
        self.jetstream.delete_stream(&self.stream).await.unwrap();
    }
}
