//! Fetch and settle through the proxy.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use fetch_proxy::pb::{
    self, Confirmation, fetch_service_client::FetchServiceClient, settlement::Action,
};
use prost_types::Duration as PbDuration;
use testkit::{
    backlog::Consumer,
    measure::{Half, Processes, Run, half},
};
use tonic::{
    Request, Status,
    metadata::AsciiMetadataValue,
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use crate::setup::Setup;

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

pub fn fetch(consumer: &Consumer, n: u32) -> pb::FetchRequest {
    pb::FetchRequest {
        stream: consumer.stream.clone(),
        consumer: consumer.name.clone(),
        n,
        max_wait: Some(PbDuration { seconds: 0, nanos: 500_000_000 }),
        ..Default::default()
    }
}

/// An ack of the message with this token.
pub fn acked(token: String) -> pb::Settlement {
    pb::Settlement { number: 0, token, action: Some(Action::Ack(pb::AckAction {})) }
}

/// How batches are fetched and settled.
#[derive(Clone, Copy)]
pub struct Batches {
    /// Workers, each with a connection of its own to the proxy.
    pub clients: usize,
    pub n: u32,
    pub confirmed: bool,
}

/// Workers that fetch a batch and settle the batch in one call.
pub async fn batches(setup: &Setup, batches: Batches, run: Run) -> Half {
    let clients = connect(&setup.grpc, batches.clients).await;
    batches_of(setup, clients, &setup.proxied(), batches, run).await
}

/// The same with these clients, and with the cost of these processes.
pub async fn batches_of(
    setup: &Setup,
    clients: Vec<Client>,
    processes: &Processes,
    batches: Batches,
    run: Run,
) -> Half {
    let request = fetch(&setup.backlog.consumer().await, batches.n);
    let work = Work::new(clients, request);
    half(processes, run, work.batches(batches.confirmed, run.messages)).await
}

/// `clients` workers that fetch one and ack it.
pub async fn singles(setup: &Setup, clients: usize, run: Run) -> Half {
    let clients = connect(&setup.grpc, clients).await;
    singles_of(setup, clients, &setup.proxied(), run).await
}

/// The same with these clients, and with the cost of these processes.
pub async fn singles_of(
    setup: &Setup,
    clients: Vec<Client>,
    processes: &Processes,
    run: Run,
) -> Half {
    let request = fetch(&setup.backlog.consumer().await, 1);
    half(processes, run, Work::new(clients, request).singles(run.messages)).await
}

/// Workers that share connections and consumers.
pub struct Work {
    pub clients: Vec<Client>,
    pub workers: usize,
    /// The workers take these in turn, all together.
    pub requests: Vec<pb::FetchRequest>,
}

/// How a worker settles.
#[derive(Clone, Copy)]
enum Settling {
    /// Each message by an Ack.
    One,
    /// All messages of an answer by a Settle.
    All(Confirmation),
}

impl Work {
    /// A worker for each connection, all with this request.
    pub fn new(clients: Vec<Client>, request: pb::FetchRequest) -> Self {
        Self { workers: clients.len(), clients, requests: vec![request] }
    }

    /// Fetch and Ack in turn until so many messages are done.
    pub async fn singles(self, messages: usize) -> usize {
        self.run(Settling::One, messages).await
    }

    /// Fetch and Settle in turn until so many messages are done.
    pub async fn batches(self, confirmed: bool, messages: usize) -> usize {
        let confirmation = if confirmed { Confirmation::Confirmed } else { Confirmation::Sent };
        self.run(Settling::All(confirmation), messages).await
    }

    async fn run(self, settling: Settling, messages: usize) -> usize {
        let requests: Arc<[pb::FetchRequest]> = self.requests.into();
        let (done, turn) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut tasks = tokio::task::JoinSet::new();
        for worker in 0..self.workers {
            let (requests, done, turn) = (requests.clone(), done.clone(), turn.clone());
            let all = self.clients.iter().cycle().skip(worker).step_by(self.workers);
            let own = self.clients.len().div_ceil(self.workers);
            let mut clients: Vec<Client> = all.take(own).cloned().collect();
            tasks.spawn(async move {
                for at in (0..own).cycle() {
                    if done.load(Ordering::Relaxed) >= messages {
                        break;
                    }
                    let turn = turn.fetch_add(1, Ordering::Relaxed);
                    let request = requests[turn % requests.len()].clone();
                    let count = round(&mut clients[at], request, settling).await;
                    done.fetch_add(count, Ordering::Relaxed);
                }
            });
        }
        while let Some(ended) = tasks.join_next().await {
            ended.unwrap();
        }
        done.load(Ordering::Relaxed)
    }
}

/// One Fetch, and the settling of its messages. Returns how many messages there were.
async fn round(client: &mut Client, request: pb::FetchRequest, settling: Settling) -> usize {
    let batch = client.fetch(request).await.unwrap().into_inner().messages;
    let count = batch.len();
    match settling {
        Settling::One => {
            for message in batch {
                let ack = pb::AckRequest { token: message.token, ..Default::default() };
                client.ack(ack).await.unwrap();
            }
        }
        Settling::All(confirmation) if count > 0 => {
            let settlements = batch.into_iter().map(|message| acked(message.token)).collect();
            let request = pb::SettleRequest { settlements, confirmation: confirmation.into() };
            assert_eq!(client.settle(request).await.unwrap().into_inner().failed, 0);
        }
        Settling::All(_) => {}
    }
    count
}
