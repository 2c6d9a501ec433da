//! Fetch and settle through the proxy, one connection a client.

use std::{
    sync::Arc,
    sync::atomic::{AtomicUsize, Ordering},
};

use fetch_proxy::pb::{
    self, Confirmation, fetch_service_client::FetchServiceClient, settlement::Action,
};
use prost_types::Duration as PbDuration;
use tonic::transport::Channel;

use crate::{
    Half, half,
    setup::{STREAM, Setup},
};

pub type Client = FetchServiceClient<Channel>;

pub async fn connect(url: &str, count: usize) -> Vec<Client> {
    let mut clients = Vec::new();
    for _ in 0..count {
        clients.push(FetchServiceClient::connect(url.to_owned()).await.unwrap());
    }
    clients
}

pub fn fetch(consumer: &str, n: u32) -> pb::FetchRequest {
    pb::FetchRequest {
        stream: STREAM.into(),
        consumer: consumer.into(),
        n,
        max_wait: Some(PbDuration { seconds: 0, nanos: 500_000_000 }),
        ..Default::default()
    }
}

/// `clients` workers that fetch a hundred and settle them in one call.
pub async fn batches(setup: &Setup, clients: usize, messages: usize, confirmed: bool) -> Half {
    let name = setup.consumer().await;
    let clients = connect(&setup.grpc, clients).await;
    let done = Arc::new(AtomicUsize::new(0));
    let confirmation = if confirmed { Confirmation::Confirmed } else { Confirmation::Sent };
    half(&setup.cpu_proxied(), async {
        let mut tasks = tokio::task::JoinSet::new();
        for mut client in clients {
            let (request, done) = (fetch(&name, 100), done.clone());
            tasks.spawn(async move {
                while done.load(Ordering::Relaxed) < messages {
                    let batch = client.fetch(request.clone()).await.unwrap().into_inner().messages;
                    let count = batch.len();
                    if count == 0 {
                        break;
                    }
                    let settlements = batch.into_iter().map(|message| pb::Settlement {
                        token: message.token,
                        action: Some(Action::Ack(pb::AckAction {})),
                    });
                    let request = pb::SettleRequest {
                        settlements: settlements.collect(),
                        confirmation: confirmation.into(),
                    };
                    assert_eq!(client.settle(request).await.unwrap().into_inner().failed, 0);
                    done.fetch_add(count, Ordering::Relaxed);
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
        done.load(Ordering::Relaxed)
    })
    .await
}

/// `clients` workers that fetch one and ack it.
pub async fn singles(setup: &Setup, clients: usize, messages: usize) -> Half {
    let name = setup.consumer().await;
    let clients = connect(&setup.grpc, clients).await;
    half(&setup.cpu_proxied(), rounds(clients, fetch(&name, 1), messages)).await
}

/// Fetch and Ack in turn until so many messages are done.
pub async fn rounds(clients: Vec<Client>, request: pb::FetchRequest, messages: usize) -> usize {
    let done = Arc::new(AtomicUsize::new(0));
    let mut tasks = tokio::task::JoinSet::new();
    for mut client in clients {
        let (request, done) = (request.clone(), done.clone());
        tasks.spawn(async move {
            while done.load(Ordering::Relaxed) < messages {
                let batch = client.fetch(request.clone()).await.unwrap().into_inner().messages;
                for message in batch {
                    let ack = pb::AckRequest { token: message.token, ..Default::default() };
                    client.ack(ack).await.unwrap();
                    done.fetch_add(1, Ordering::Relaxed);
                }
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.unwrap();
    }
    done.load(Ordering::Relaxed)
}
