//! The view of NATS, over a connection of its own: it makes streams and consumers, and reads
//! advisories, pending messages and the stream.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::jetstream::{
    self,
    consumer::{AckPolicy, DeliverPolicy, PullConsumer, pull},
    context::Context,
    stream,
};
use futures_util::StreamExt as _;
use testkit::delivery_log::{At, DeliveryLog, Terms};
use tokio::{task::JoinHandle, time::sleep};

use crate::publishers::{ID, STREAM};

/// Emptying consumers takes as long as leases that nobody has, and messages that a delay keeps.
const PATIENCE: Duration = Duration::from_secs(100);

/// Makes the stream and its consumers.
pub async fn prepare(url: &str, consumers: &[Terms]) -> Context {
    let jetstream = jetstream::new(async_nats::connect(url).await.unwrap());
    let subjects = vec!["soak.>".to_owned()];
    let config = stream::Config { name: STREAM.into(), subjects, ..stream::Config::default() };
    jetstream.create_stream(config).await.unwrap();
    for terms in consumers {
        let config = pull::Config {
            durable_name: Some(terms.name.to_owned()),
            ack_policy: AckPolicy::Explicit,
            ack_wait: terms.ack_wait,
            backoff: terms.backoff.clone(),
            max_deliver: terms.max_deliver.map_or(-1, i64::from),
            max_ack_pending: 10_000,
            ..pull::Config::default()
        };
        jetstream.create_consumer_on_stream(config, STREAM).await.unwrap();
    }
    jetstream
}

/// Hears which messages JetStream gives up, and which the proxy terminates.
pub async fn listen(url: &str, log: Arc<DeliveryLog>) -> JoinHandle<()> {
    let client = async_nats::connect(url).await.unwrap();
    let mut advisories = client.subscribe("$JS.EVENT.ADVISORY.CONSUMER.>").await.unwrap();
    client.flush().await.unwrap();
    tokio::spawn(async move {
        while let Some(advisory) = advisories.next().await {
            let told: serde_json::Value = serde_json::from_slice(&advisory.payload).unwrap();
            let mut records = log.read();
            let mut consumers = records.consumers.iter_mut();
            let consumer = consumers.find(|consumer| told["consumer"] == consumer.terms.name);
            let (Some(consumer), Some(sequence)) = (consumer, told["stream_seq"].as_u64()) else {
                continue;
            };
            if advisory.subject.contains(".MAX_DELIVERIES.") {
                consumer.given_up.insert(sequence);
            } else if advisory.subject.contains(".MSG_TERMINATED.") {
                consumer.terminated.insert(sequence);
            }
        }
    })
}

/// Waits until there is nothing left for any consumer.
pub async fn drained(jetstream: &Context, consumers: &[Terms]) -> Result<(), String> {
    let began = Instant::now();
    loop {
        let mut left = Vec::new();
        for terms in consumers {
            let stream = jetstream.get_stream_no_info(STREAM).await.unwrap();
            let mut consumer: PullConsumer = stream.get_consumer(terms.name).await.unwrap();
            let info = consumer.info().await.unwrap();
            if info.num_pending > 0 || info.num_ack_pending > 0 {
                let (name, new, out) = (terms.name, info.num_pending, info.num_ack_pending);
                left.push(format!("{name} still has {new} new and {out} unsettled"));
            }
        }
        if left.is_empty() {
            return Ok(());
        }
        if began.elapsed() > PATIENCE {
            return Err(format!("after {PATIENCE:?}: {}", left.join(", ")));
        }
        sleep(Duration::from_millis(500)).await;
    }
}

/// Everything in the stream: when it was stored, and the id of the message.
pub async fn stored(jetstream: &Context) -> BTreeMap<u64, (At, u64)> {
    let mut stream = jetstream.get_stream(STREAM).await.unwrap();
    let state = stream.info().await.unwrap().state.clone();
    let config = pull::Config {
        ack_policy: AckPolicy::None,
        deliver_policy: DeliverPolicy::All,
        headers_only: true,
        ..pull::Config::default()
    };
    let consumer = stream.create_consumer(config).await.unwrap();
    let mut messages = consumer.messages().await.unwrap();
    let mut stored = BTreeMap::new();
    while (stored.len() as u64) < state.messages {
        let message = messages.next().await.unwrap().unwrap();
        let info = message.info().unwrap();
        let published = i64::try_from(info.published.unix_timestamp_nanos() / 1000).unwrap();
        let id = message.headers.as_ref().and_then(|headers| headers.get(ID));
        let id = id.and_then(|id| id.as_str().parse().ok()).unwrap_or(0);
        stored.insert(info.stream_sequence, (published, id));
    }
    stored
}
