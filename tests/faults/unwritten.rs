//! Answers that never reach their client: what was not written is given back at once, what was
//! waits for its lease.

use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb;
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch},
    relay::{Flow, Relay},
    scrape::{Scrape, balanced},
    usual,
};

/// More than the window of a client's stream: what is beyond it stays with the server.
const LARGE: usize = 800 * 1024;
const COUNT: usize = 4;

struct FarClient {
    fixture: Fixture,
    proxy: Proxy,
    relay: Relay,
    /// Through the relay.
    far: Client,
}

async fn stage(consumer: pull::Config) -> FarClient {
    let fixture = Fixture::new(consumer).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--log-level", "debug"]);
    let relay = Relay::to(&proxy.grpc).await;
    let far = relay.client().await;
    FarClient { fixture, proxy, relay, far }
}

fn all(fixture: &Fixture) -> pb::FetchRequest {
    let n = u32::try_from(COUNT).unwrap();
    pb::FetchRequest { linger: testkit::millis(5000), ..fetch(fixture, n, 10_000) }
}

impl FarClient {
    /// A Fetch by the far client whose answer is on its way, and cannot pass.
    async fn stuck(
        &self,
        size: usize,
    ) -> tokio::task::JoinHandle<Result<tonic::Response<pb::FetchResponse>, tonic::Status>> {
        self.relay.flow(Flow::Pass, Flow::Stall);
        let (mut far, request) = (self.far.clone(), all(&self.fixture));
        let call = tokio::spawn(async move { far.fetch(request).await });
        for _ in 0..COUNT {
            self.fixture.publish("large", vec![b'x'; size]).await;
        }
        eventually("the answer", || async { self.proxy.log().contains("fetched").then_some(()) })
            .await;
        call
    }

    /// A near client gets everything, on its first attempt still.
    async fn all_come_back(&self, what: &str) {
        let began = Instant::now();
        let mut near = self.proxy.client().await;
        let answer = near.fetch(all(&self.fixture)).await.unwrap().into_inner();
        let took = began.elapsed();
        println!("measured: {what}: {took:?}");
        assert_eq!(answer.messages.len(), COUNT);
        // The leases of the answer that was not written went to this one.
        let books = balanced(&self.proxy.ops).await;
        assert_eq!((books.began, books.held), (COUNT as u64, COUNT as u64));
        let unwritten = Scrape::of(&self.proxy.ops).sum("fetchproxy_messages_unwritten_total", &[]);
        assert_eq!(unwritten, COUNT as f64);
        // The same where nothing has happened to it before.
        let fresh = Fixture::new(config()).await;
        let usual = usual(async || {
            for _ in 0..COUNT {
                fresh.publish("large", vec![b'x'; LARGE]).await;
            }
            let began = Instant::now();
            let answer = near.fetch(all(&fresh)).await.unwrap().into_inner();
            assert_eq!(answer.messages.len(), COUNT);
            began.elapsed()
        })
        .await;
        let bound = usual * 10 + Duration::from_secs(2);
        assert!(took < bound, "{took:?} is a wait for something, it is usually {usual:?}");
        for message in &answer.messages {
            assert_eq!(message.delivery_count, 1, "it cost an attempt");
            near.ack(ack(&message.token)).await.unwrap();
        }
        assert_eq!(self.fixture.info().await.num_ack_pending, 0);
    }
}

#[tokio::test]
async fn answer_unwritten_by_a_cut_is_given_back_at_once() {
    for consumer in [config(), pull::Config { max_deliver: 1, ..config() }] {
        let stage = stage(consumer).await;
        let call = stage.stuck(LARGE).await;
        stage.relay.cut();
        call.await.unwrap().unwrap_err();
        stage.all_come_back("unwritten answer given back after a cut").await;
    }
}

#[tokio::test]
async fn answer_unwritten_by_a_cancel_is_given_back_at_once() {
    let stage = stage(config()).await;
    let call = stage.stuck(LARGE).await;
    call.abort();
    stage.all_come_back("unwritten answer given back after a cancel").await;
}

#[tokio::test]
async fn slow_answer_belongs_to_its_client() {
    let stage = stage(config()).await;
    let call = stage.stuck(LARGE).await;
    stage.relay.flow(Flow::Pass, Flow::Delay(Duration::from_millis(20)));
    let answer = call.await.unwrap().unwrap().into_inner();
    assert_eq!(answer.messages.len(), COUNT);
    for message in &answer.messages {
        stage.far.clone().ack(ack(&message.token)).await.unwrap();
    }
    assert_eq!(stage.fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn small_written_answer_waits_for_its_lease() {
    let stage = stage(ack_wait(3000)).await;
    let call = stage.stuck(10).await;
    let written = || async { stage.proxy.log().contains("written to the client").then_some(()) };
    eventually("all of it to be in the kernel", written).await;
    stage.relay.cut();
    call.await.unwrap().unwrap_err();
    let mut near = stage.proxy.client().await;
    let began = Instant::now();
    let answer = near.fetch(all(&stage.fixture)).await.unwrap().into_inner();
    println!("measured: small written answer back after (ack wait 3 s): {:?}", began.elapsed());
    assert_eq!(answer.messages.len(), COUNT);
    assert!(answer.messages.iter().all(|message| message.delivery_count == 2));
}
