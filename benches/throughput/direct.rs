//! The same work by async-nats itself, without a proxy: the library's own fetch and acks.

use std::{
    future::Future,
    sync::Arc,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use async_nats::jetstream::consumer::PullConsumer;
use futures_util::{StreamExt as _, future::join_all};

use crate::{
    Half, half,
    setup::{STREAM, Setup},
};

/// `clients` tasks that fetch one and ack it, confirmed.
pub async fn singles(setup: &Setup, clients: usize, messages: usize) -> Half {
    by_tasks(setup, clients, move |consumer, done| async move {
        while done.load(Ordering::Relaxed) < messages {
            let expires = Duration::from_millis(500);
            let one = consumer.fetch().max_messages(1).expires(expires).messages();
            let one: Vec<_> = one.await.unwrap().collect().await;
            for message in one.iter().flatten() {
                message.double_ack().await.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            }
        }
    })
    .await
}

/// `clients` tasks that fetch a hundred and ack each: all at once and confirmed, or only sent.
pub async fn batches(setup: &Setup, clients: usize, messages: usize, confirmed: bool) -> Half {
    by_tasks(setup, clients, move |consumer, done| async move {
        while done.load(Ordering::Relaxed) < messages {
            let expires = Duration::from_millis(500);
            let batch = consumer.fetch().max_messages(100).expires(expires).messages();
            let batch: Vec<_> = batch.await.unwrap().collect().await;
            let acks = batch.iter().flatten();
            if confirmed {
                let acked = join_all(acks.map(|message| message.double_ack())).await;
                assert!(acked.iter().all(Result::is_ok));
            } else {
                for message in acks {
                    message.ack().await.unwrap();
                }
            }
            done.fetch_add(batch.len(), Ordering::Relaxed);
        }
    })
    .await
}

/// `clients` tasks that ack each message of the library's own endless stream, without confirmation.
pub async fn streamed(setup: &Setup, clients: usize, messages: usize) -> Half {
    by_tasks(setup, clients, move |consumer, done| async move {
        let batch = consumer.stream().max_messages_per_batch(1000).messages();
        let mut received = batch.await.unwrap();
        while done.load(Ordering::Relaxed) < messages {
            let message = received.next().await.unwrap().unwrap();
            message.ack().await.unwrap();
            done.fetch_add(1, Ordering::Relaxed);
        }
    })
    .await
}

/// So many tasks that do this, each with the consumer and the count of all messages that are done.
async fn by_tasks<W, F>(setup: &Setup, clients: usize, work: W) -> Half
where
    W: Fn(PullConsumer, Arc<AtomicUsize>) -> F,
    F: Future<Output = ()> + Send + 'static,
{
    let name = setup.consumer().await;
    let stream = setup.jetstream.get_stream_no_info(STREAM).await.unwrap();
    let consumer: PullConsumer = stream.get_consumer(&name).await.unwrap();
    let done = Arc::new(AtomicUsize::new(0));
    half(&setup.cpu_direct(), async {
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
