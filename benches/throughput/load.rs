//! The time of a Fetch and its Ack under a given load. The starts are planned, and do not wait for
//! earlier calls. The time counts from the planned start, so a stall shows in all calls that it delays.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use async_nats::jetstream::consumer::PullConsumer;
use fetch_proxy::pb;
use testkit::{
    measure::{Run, Spread, grouped, short},
    pairs::Pairs,
};
use tokio::{runtime::Handle, task::JoinSet};

use crate::{
    direct, noop,
    proxied::{self, Client, connect, fetch},
    setup::Setup,
};

const CLIENTS: usize = 64;
/// Parts of the rate that is carried, in percent.
const LOADS: [usize; 3] = [10, 50, 90];
/// How long each load lasts in a round.
const ROUND: Duration = Duration::from_secs(1);

/// p50 and p99, in microseconds.
type Percentiles = [f64; 2];

/// Prints the times at parts of the rate that 64 workers carry.
pub async fn table(pairs: &Pairs, setup: &Setup, messages: usize) {
    if !pairs.want("latency at load") {
        return;
    }
    let run = Run { messages, counts_calls: false };
    let mut rates = Vec::new();
    for _ in 0..4 {
        rates.push(proxied::singles(setup, CLIENTS, run).await.rate);
    }
    // The first is a warm-up.
    let carried = Spread::of(rates.into_iter().skip(1)).median;
    println!(
        "\n**Latency at load**: Fetch and Ack of one message from their planned start, in µs. \
         {CLIENTS} workers carry {} msg/s through the proxy.\n\n| load | msg/s | proxy p50 | p99 \
         | no-op gRPC p50 | p99 | async-nats p50 | p99 | p50 proxy / async-nats | spread |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        grouped(carried)
    );
    let proxy = connect(&setup.grpc, CLIENTS).await;
    let service = connect(&setup.noop, CLIENTS).await;
    for load in LOADS {
        let rate = carried * load as f64 / 100.0;
        let mut rounds: Vec<[Percentiles; 3]> = Vec::new();
        for _ in 0..pairs.count {
            let request = fetch(&setup.backlog.consumer().await, 1);
            let through = planned(rate, |at| one(proxy[at % CLIENTS].clone(), request.clone()));
            let through = through.await;
            let floor = planned(rate, |at| one(service[at % CLIENTS].clone(), noop::request()));
            let floor = floor.await;
            let consumer = setup.backlog.handle(&setup.backlog.consumer().await).await;
            let native = planned(rate, |_| native(consumer.clone())).await;
            rounds.push([through, floor, native]);
        }
        let of = |kind: usize, percentile: usize| {
            short(Spread::of(rounds.iter().map(|round| round[kind][percentile])).median)
        };
        let ratio = Spread::of(rounds.iter().map(|[proxy, _, native]| proxy[0] / native[0]));
        println!(
            "| {load} % | {} | {} | {} | {} | {} | {} | {} | {:.2} | {} |",
            grouped(rate),
            of(0, 0),
            of(0, 1),
            of(1, 0),
            of(1, 1),
            of(2, 0),
            of(2, 1),
            ratio.median,
            ratio.range()
        );
    }
}

async fn one(mut client: Client, request: pb::FetchRequest) {
    loop {
        let answer = client.fetch(request.clone()).await.unwrap().into_inner();
        if let Some(message) = answer.messages.into_iter().next() {
            let ack = pb::AckRequest { token: message.token, ..Default::default() };
            client.ack(ack).await.unwrap();
            return;
        }
    }
}

async fn native(consumer: PullConsumer) {
    while direct::single(&consumer).await == 0 {}
}

/// Starts work at this rate for the time of a round. A thread of its own starts the work, because the
/// timers of the runtime count in milliseconds.
async fn planned<F>(rate: f64, work: impl Fn(usize) -> F) -> Percentiles
where
    F: Future<Output = ()> + Send + 'static,
{
    let count = ((rate * ROUND.as_secs_f64()) as usize).max(20);
    let all: Vec<F> = (0..count).map(work).collect();
    let runtime = Handle::current();
    let starts = tokio::task::spawn_blocking(move || {
        let (began, mut tasks) = (Instant::now(), JoinSet::new());
        for (at, work) in all.into_iter().enumerate() {
            let planned = began + Duration::from_secs_f64(at as f64 / rate);
            std::thread::sleep(planned.saturating_duration_since(Instant::now()));
            let timed = async move {
                work.await;
                planned.elapsed()
            };
            tasks.spawn_on(timed, &runtime);
        }
        tasks
    });
    let mut times = starts.await.unwrap().join_all().await;
    times.sort();
    [50, 99].map(|share| times[times.len() * share / 100].as_secs_f64() * 1e6)
}
