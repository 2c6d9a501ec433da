//! The time of a single call, by one worker that makes one call after the other.

use std::time::{Duration, Instant};

use fetch_proxy::pb;
use futures_util::StreamExt as _;
use testkit::{
    measure::{Spread, short},
    pairs::Pairs,
};

use crate::{
    noop,
    proxied::{Client, connect, fetch},
    setup::Setup,
};

/// Calls of each kind in a round.
const CALLS: usize = 200;

/// Times of one kind of fetch and of its ack.
#[derive(Default)]
struct Times {
    fetch: Vec<Duration>,
    ack: Vec<Duration>,
}

impl Times {
    /// Microseconds: the middle fetch and the middle ack.
    fn p50(self) -> [f64; 2] {
        [self.fetch, self.ack].map(|times| testkit::median(times).as_secs_f64() * 1e6)
    }
}

/// Prints the time of a Fetch and of an Ack: through the proxy, at a service that does nothing, and by
/// async-nats itself.
pub async fn table(pairs: &Pairs, setup: &Setup) {
    if !pairs.want("calls of one worker") {
        return;
    }
    let mut proxy = connect(&setup.grpc, 1).await.remove(0);
    let mut service = connect(&setup.noop, 1).await.remove(0);
    let mut rounds = Vec::new();
    for round in 0..=pairs.count {
        let request = fetch(&setup.backlog.consumer().await, 1);
        let through = timed(&mut proxy, &request).await.p50();
        let floor = timed(&mut service, &noop::request(1)).await.p50();
        let native = native(setup).await.p50();
        // The first round is a warm-up.
        if round > 0 {
            rounds.push([through, floor, native]);
        }
    }
    println!(
        "\n**Calls of one worker**, p50 in µs\n\n| call | proxy | no-op gRPC | async-nats \
         | (proxy - no-op) / async-nats | spread |\n| --- | --- | --- | --- | --- | --- |"
    );
    for (at, name) in ["fetch of 1", "confirmed ack"].into_iter().enumerate() {
        let of = |kind: usize| Spread::of(rounds.iter().map(|round| round[kind][at])).median;
        let added = rounds.iter().map(|[proxy, noop, native]| (proxy[at] - noop[at]) / native[at]);
        let added = Spread::of(added);
        println!(
            "| {name} | {} | {} | {} | {:.2} | {} |",
            short(of(0)),
            short(of(1)),
            short(of(2)),
            added.median,
            added.range()
        );
    }
}

async fn timed(client: &mut Client, request: &pb::FetchRequest) -> Times {
    let mut times = Times::default();
    for _ in 0..CALLS {
        let began = Instant::now();
        let answer = client.fetch(request.clone()).await.unwrap().into_inner();
        times.fetch.push(began.elapsed());
        for message in answer.messages {
            let ack = pb::AckRequest { token: message.token, ..Default::default() };
            let began = Instant::now();
            client.ack(ack).await.unwrap();
            times.ack.push(began.elapsed());
        }
    }
    times
}

async fn native(setup: &Setup) -> Times {
    let consumer = setup.backlog.handle(&setup.backlog.consumer().await).await;
    let mut times = Times::default();
    for _ in 0..CALLS {
        let began = Instant::now();
        let fetch = consumer.fetch().max_messages(1).expires(Duration::from_millis(500));
        let batch: Vec<_> = fetch.messages().await.unwrap().collect().await;
        times.fetch.push(began.elapsed());
        for message in batch.into_iter().flatten() {
            let began = Instant::now();
            message.double_ack().await.unwrap();
            times.ack.push(began.elapsed());
        }
    }
    times
}
