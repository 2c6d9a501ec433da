//! Workers that consume a stream, one connection a worker.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use fetch_proxy::pb::{
    self, Confirmation, ConsumeCredit, ConsumeRequest, ConsumeSettle, ConsumeStart, Settlement,
    settlement::Action,
};
use tokio::sync::mpsc;
use tonic::Streaming;

use crate::{
    Half, half,
    proxied::{Client, connect},
    setup::{Cpu, STREAM, Setup},
};

/// `streams` streams with this credit, which ack each message by its number.
pub async fn acked(
    setup: &Setup,
    streams: usize,
    credit: u32,
    messages: usize,
    confirmed: bool,
) -> Half {
    let clients = connect(&setup.grpc, streams).await;
    let confirmation = if confirmed { Confirmation::Confirmed } else { Confirmation::Sent };
    acked_of(setup, clients, &setup.cpu_proxied(), credit, messages, confirmation).await
}

/// The same frames against the service that does nothing.
pub async fn echoed(setup: &Setup, streams: usize, messages: usize) -> Half {
    let clients = connect(&setup.noop, streams).await;
    acked_of(setup, clients, &setup.cpu_noop(), 1, messages, Confirmation::Confirmed).await
}

async fn acked_of(
    setup: &Setup,
    clients: Vec<Client>,
    cpu: &Cpu,
    credit: u32,
    messages: usize,
    confirmation: Confirmation,
) -> Half {
    let start = start(&setup.consumer().await, credit);
    let done = Arc::new(AtomicUsize::new(0));
    half(cpu, async {
        let mut tasks = tokio::task::JoinSet::new();
        for mut client in clients {
            let (start, done) = (start.clone(), done.clone());
            tasks.spawn(async move {
                let mut stream = Stream::open(&mut client, start).await;
                while done.load(Ordering::Relaxed) < messages {
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

pub fn start(consumer: &str, credit: u32) -> ConsumeStart {
    ConsumeStart {
        stream: STREAM.into(),
        consumer: consumer.into(),
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
