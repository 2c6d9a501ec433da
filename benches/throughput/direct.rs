//! The same work by async-nats itself, without a proxy: the library's own fetch and acks.

use std::{
    future::Future,
    sync::Arc,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use async_nats::jetstream::consumer::PullConsumer;
use futures_util::{StreamExt as _, future::join_all};
use testkit::{
    backlog::Backlog,
    measure::{Half, Run, half},
};

use crate::{proxied::Batches, setup::Setup};

/// Most bytes of a batch. The answers of the proxy have a similar limit.
const MAX_BYTES: usize = 4 << 20;

/// `clients` tasks that fetch one and ack it, confirmed.
pub async fn singles(setup: &Setup, clients: usize, run: Run) -> Half {
    by_tasks(setup, &setup.backlog, clients, run, move |consumer, done| async move {
        while done.load(Ordering::Relaxed) < run.messages {
            done.fetch_add(single(&consumer).await, Ordering::Relaxed);
        }
    })
    .await
}

/// One fetch of a message, and its ack. Returns how many messages there were.
pub async fn single(consumer: &PullConsumer) -> usize {
    let fetch = consumer.fetch().max_messages(1).expires(Duration::from_millis(500));
    let one: Vec<_> = fetch.messages().await.unwrap().collect().await;
    for message in one.iter().flatten() {
        message.double_ack().await.unwrap();
    }
    one.len()
}

/// Tasks that fetch a batch and ack each message: all at once and confirmed, or only sent.
pub async fn batches(setup: &Setup, batches: Batches, run: Run) -> Half {
    batches_from(setup, &setup.backlog, batches, run).await
}

/// The same from this stream.
pub async fn batches_from(setup: &Setup, backlog: &Backlog, batches: Batches, run: Run) -> Half {
    let n = batches.n as usize;
    by_tasks(setup, backlog, batches.clients, run, move |consumer, done| async move {
        while done.load(Ordering::Relaxed) < run.messages {
            let fetch = consumer.fetch().max_messages(n).max_bytes(MAX_BYTES);
            let batch = fetch.expires(Duration::from_millis(500)).messages().await.unwrap();
            let batch: Vec<_> = batch.filter_map(|message| async { message.ok() }).collect().await;
            if batches.confirmed {
                let acked = join_all(batch.iter().map(|message| message.double_ack())).await;
                assert!(acked.iter().all(Result::is_ok));
            } else {
                for message in &batch {
                    message.ack().await.unwrap();
                }
            }
            done.fetch_add(batch.len(), Ordering::Relaxed);
        }
    })
    .await
}

/// `clients` tasks that ack each message of the library's own endless stream, without confirmation.
pub async fn streamed(setup: &Setup, clients: usize, run: Run) -> Half {
    by_tasks(setup, &setup.backlog, clients, run, move |consumer, done| async move {
        let batch = consumer.stream().max_messages_per_batch(1000).messages();
        let mut received = batch.await.unwrap();
        while done.load(Ordering::Relaxed) < run.messages {
            let message = received.next().await.unwrap().unwrap();
            message.ack().await.unwrap();
            done.fetch_add(1, Ordering::Relaxed);
        }
    })
    .await
}

/// So many tasks that do this, each with the consumer and the count of all messages that are done.
async fn by_tasks<W, F>(setup: &Setup, backlog: &Backlog, clients: usize, run: Run, work: W) -> Half
where
    W: Fn(PullConsumer, Arc<AtomicUsize>) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let consumer = backlog.handle(&backlog.consumer().await).await;
    let done = Arc::new(AtomicUsize::new(0));
    half(&setup.direct(), run, async {
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..clients {
            tasks.spawn(work(consumer.clone(), done.clone()));
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
        // Acks that are only sent have left.
        setup.nats.flush().await.unwrap();
        done.load(Ordering::Relaxed)
    })
    .await
}
