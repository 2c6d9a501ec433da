//! Workers that consume a stream, one connection a worker.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use fetch_proxy::pb::{
    self, Confirmation, ConsumeCredit, ConsumeRequest, ConsumeSettle, ConsumeStart, Settlement,
    settlement::Action,
};
use testkit::{
    backlog::Consumer,
    measure::{Half, Processes, Run, half},
};
use tokio::sync::mpsc;
use tonic::Streaming;

use crate::{
    proxied::{Client, connect},
    setup::Setup,
};

/// Streams with this credit, which ack each message by its number.
#[derive(Clone, Copy)]
pub struct Streams {
    /// Each has a connection of its own.
    pub count: usize,
    pub credit: u32,
    pub confirmed: bool,
}

impl Streams {
    /// Through the proxy.
    pub async fn acked(self, setup: &Setup, run: Run) -> Half {
        let clients = connect(&setup.grpc, self.count).await;
        self.acked_of(setup, clients, &setup.proxied(), run).await
    }

    /// The same frames against the service that does nothing.
    pub async fn echoed(self, setup: &Setup, run: Run) -> Half {
        let clients = connect(&setup.noop, self.count).await;
        self.acked_of(setup, clients, &setup.unproxied(), run).await
    }

    /// The same with these clients, and with the cost of these processes.
    pub async fn acked_of(
        self,
        setup: &Setup,
        clients: Vec<Client>,
        processes: &Processes,
        run: Run,
    ) -> Half {
        let start = start(&setup.backlog.consumer().await, self.credit);
        let confirmation =
            if self.confirmed { Confirmation::Confirmed } else { Confirmation::Sent };
        let done = Arc::new(AtomicUsize::new(0));
        half(processes, run, async {
            let mut tasks = tokio::task::JoinSet::new();
            for mut client in clients {
                let (start, done) = (start.clone(), done.clone());
                tasks.spawn(async move {
                    let mut stream = Stream::open(&mut client, start).await;
                    while done.load(Ordering::Relaxed) < run.messages {
                        let frame = stream.frames.message().await.unwrap().expect("it has ended");
                        done.fetch_add(succeeded(&frame), Ordering::Relaxed);
                        stream.ack(frame.messages, confirmation);
                    }
                    done.fetch_add(stream.close().await, Ordering::Relaxed);
                });
            }
            while let Some(ended) = tasks.join_next().await {
                ended.unwrap();
            }
            done.load(Ordering::Relaxed)
        })
        .await
    }
}

pub fn start(consumer: &Consumer, credit: u32) -> ConsumeStart {
    ConsumeStart {
        stream: consumer.stream.clone(),
        consumer: consumer.name.clone(),
        credit: Some(ConsumeCredit { max_leases: Some(credit), ..Default::default() }),
        ..Default::default()
    }
}

/// A stream and both of its directions.
pub struct Stream {
    send: mpsc::UnboundedSender<ConsumeRequest>,
    pub frames: Streaming<pb::ConsumeResponse>,
}

impl Stream {
    pub async fn open(client: &mut Client, start: ConsumeStart) -> Self {
        let (send, mut receive) = mpsc::unbounded_channel();
        send.send(ConsumeRequest { start: Some(start), ..Default::default() }).unwrap();
        let requests = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
        Self { send, frames: client.consume(requests).await.unwrap().into_inner() }
    }

    pub fn ack(&self, messages: Vec<pb::Delivery>, confirmation: Confirmation) {
        if messages.is_empty() {
            return;
        }
        let acked = |message: pb::Delivery| Settlement {
            number: message.number,
            action: Some(Action::Ack(pb::AckAction {})),
            ..Default::default()
        };
        let settlements = messages.into_iter().map(acked).collect();
        let settle =
            ConsumeSettle { settlements, confirmation: confirmation.into(), ..Default::default() };
        self.send.send(ConsumeRequest { settle: Some(settle), ..Default::default() }).unwrap();
    }

    /// Ends the stream, and returns how many settlements had no result until then.
    async fn close(mut self) -> usize {
        drop(self.send);
        let mut last = 0;
        while let Some(frame) = self.frames.message().await.unwrap() {
            last += succeeded(&frame);
        }
        last
    }
}

/// How many settlements succeeded. All must.
fn succeeded(frame: &pb::ConsumeResponse) -> usize {
    for result in &frame.results {
        assert_eq!((result.failed, &result.error), (0, &None));
    }
    frame.results.iter().map(|result| result.results.len()).sum()
}
