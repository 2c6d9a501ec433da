//! The floor: a tonic service with the same messages and calls that does nothing, in a process of
//! its own. It shows the cost of gRPC itself.

use fetch_proxy::pb::{
    self,
    delivery::Payload,
    fetch_service_server::{FetchService, FetchServiceServer},
};
use futures_util::{StreamExt as _, TryStreamExt as _, stream::BoxStream};
use prost_types::{Duration, Timestamp};
use testkit::{
    backlog::Consumer,
    measure::{Half, Run, half},
};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Server, server::TcpIncoming},
};

use crate::{
    proxied::{Batches, Work, connect, fetch},
    setup::Setup,
};

/// A request of `n` messages. The service ignores its consumer.
pub fn request(n: u32) -> pb::FetchRequest {
    fetch(&Consumer { stream: "none".into(), name: "none".into() }, n)
}

/// Fetch and Ack against canned answers.
pub async fn singles(setup: &Setup, clients: usize, run: Run) -> Half {
    let work = Work::new(connect(&setup.noop, clients).await, request(1));
    half(&setup.unproxied(), run, work.singles(run.messages)).await
}

/// Fetch and Settle against canned answers.
pub async fn batches(setup: &Setup, batches: Batches, run: Run) -> Half {
    let work = Work::new(connect(&setup.noop, batches.clients).await, request(batches.n));
    half(&setup.unproxied(), run, work.batches(batches.confirmed, run.messages)).await
}

pub async fn serve() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    println!("{}", listener.local_addr().unwrap());
    Server::builder()
        .add_service(FetchServiceServer::new(Noop))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await
        .unwrap();
}

struct Noop;

fn message(number: u64) -> pb::Delivery {
    pb::Delivery {
        token: "t".repeat(280),
        subject: "bench.x".into(),
        payload: Some(Payload::Data(vec![b'x'; 1024].into())),
        stream_sequence: 1,
        consumer_sequence: 1,
        delivery_count: 1,
        publish_time: Some(Timestamp { seconds: 1, nanos: 1 }),
        lease_expire_time: Some(Timestamp { seconds: 1, nanos: 1 }),
        lease: Some(Duration { seconds: 54, nanos: 1 }),
        number,
        ..Default::default()
    }
}

fn done() -> pb::SettleResult {
    pb::SettleResult { outcome: pb::Outcome::Confirmed.into(), ..Default::default() }
}

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl FetchService for Noop {
    async fn fetch(&self, request: Request<pb::FetchRequest>) -> Answer<pb::FetchResponse> {
        let messages = vec![message(0); request.get_ref().n as usize];
        Ok(Response::new(pb::FetchResponse { messages, ..Default::default() }))
    }

    type ConsumeStream = BoxStream<'static, Result<pb::ConsumeResponse, Status>>;

    /// As many messages for the start as its credit says, and a result with a message for each settlement.
    async fn consume(
        &self,
        request: Request<Streaming<pb::ConsumeRequest>>,
    ) -> Answer<Self::ConsumeStream> {
        let frames = request.into_inner().map_ok(|frame| {
            let credit = frame.start.and_then(|start| start.credit?.max_leases).unwrap_or_default();
            let settle = frame.settle.unwrap_or_default();
            let count = settle.settlements.len();
            let results = vec![done(); count];
            let result = pb::ConsumeResult { id: settle.id, results, ..Default::default() };
            let messages = vec![message(1); count + credit as usize];
            pb::ConsumeResponse { messages, results: vec![result], ..Default::default() }
        });
        Ok(Response::new(frames.boxed()))
    }

    async fn give_back(&self, _: Request<pb::GiveBackRequest>) -> Answer<pb::GiveBackResponse> {
        Err(Status::unimplemented(""))
    }

    async fn ack(&self, _: Request<pb::AckRequest>) -> Answer<pb::AckResponse> {
        Ok(Response::new(pb::AckResponse { outcome: pb::Outcome::Confirmed.into() }))
    }

    async fn nak(&self, _: Request<pb::NakRequest>) -> Answer<pb::NakResponse> {
        Err(Status::unimplemented(""))
    }

    async fn term(&self, _: Request<pb::TermRequest>) -> Answer<pb::TermResponse> {
        Err(Status::unimplemented(""))
    }

    async fn extend(&self, _: Request<pb::ExtendRequest>) -> Answer<pb::ExtendResponse> {
        Err(Status::unimplemented(""))
    }

    async fn get_consumer(
        &self,
        _: Request<pb::GetConsumerRequest>,
    ) -> Answer<pb::GetConsumerResponse> {
        Err(Status::unimplemented(""))
    }

    async fn settle(&self, request: Request<pb::SettleRequest>) -> Answer<pb::SettleResponse> {
        let results = vec![done(); request.get_ref().settlements.len()];
        Ok(Response::new(pb::SettleResponse { results, failed: 0 }))
    }
}
