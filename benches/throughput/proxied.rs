//! Fetch and settle through the proxy, one connection a client.

use std::{
    sync::Arc,
    sync::atomic::{AtomicUsize, Ordering},
};

use fetch_proxy::pb::{
    self, Confirmation, fetch_service_client::FetchServiceClient, settlement::Action,
};
use prost_types::Duration as PbDuration;
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::{
    Half, half,
    setup::{Cpu, STREAM, Setup},
};

pub type Client = FetchServiceClient<InterceptedService<Channel, Bearer>>;

/// The credential of each call, if there is one.
#[derive(Clone, Default)]
pub struct Bearer(Option<AsciiMetadataValue>);

impl Bearer {
    pub fn of(key: &str) -> Self {
        Self(Some(format!("Bearer {key}").parse().unwrap()))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(bearer) = &self.0 {
            request.metadata_mut().insert("authorization", bearer.clone());
        }
        Ok(request)
    }
}

pub async fn connect(url: &str, count: usize) -> Vec<Client> {
    let mut clients = Vec::new();
    for _ in 0..count {
        let channel = Endpoint::from_shared(url.to_owned()).unwrap().connect().await.unwrap();
        clients.push(FetchServiceClient::with_interceptor(channel, Bearer::default()));
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
    let clients = connect(&setup.grpc, clients).await;
    batches_of(setup, clients, &setup.cpu_proxied(), messages, confirmed).await
}

/// The same with these clients, and the CPU of these processes.
pub async fn batches_of(
    setup: &Setup,
    clients: Vec<Client>,
    cpu: &Cpu,
    messages: usize,
    confirmed: bool,
) -> Half {
    let name = setup.consumer().await;
    let done = Arc::new(AtomicUsize::new(0));
    let confirmation = if confirmed { Confirmation::Confirmed } else { Confirmation::Sent };
    half(cpu, async {
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
                        number: 0,
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
    let clients = connect(&setup.grpc, clients).await;
    singles_of(setup, clients, &setup.cpu_proxied(), messages).await
}

/// The same with these clients, and the CPU of these processes.
pub async fn singles_of(setup: &Setup, clients: Vec<Client>, cpu: &Cpu, messages: usize) -> Half {
    let name = setup.consumer().await;
    half(cpu, rounds(clients, fetch(&name, 1), messages)).await
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
