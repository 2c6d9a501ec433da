//! The time of a Fetch and its Ack under a given load. The starts are planned, and do not wait for
//! earlier calls. The time counts from the planned start, so a stall shows in all calls that it delays.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use async_nats::jetstream::consumer::PullConsumer;
use fetch_proxy::pb;
use testkit::{
    measure::{Processes, Run, Spread, grouped, half, short},
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

/// p50 and p99, in microseconds, and how many cores all processes kept busy.
type Figures = [f64; 3];

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
         | busy cores | no-op gRPC p50 | p99 | busy cores | async-nats p50 | p99 | busy cores \
         | p50 proxy / async-nats | spread |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        grouped(carried)
    );
    let proxy = connect(&setup.grpc, CLIENTS).await;
    let service = connect(&setup.noop, CLIENTS).await;
    let [proxied, unproxied, direct] = [setup.proxied(), setup.unproxied(), setup.direct()];
    for load in LOADS {
        let rate = carried * load as f64 / 100.0;
        let mut rounds: Vec<[Figures; 3]> = Vec::new();
        for _ in 0..pairs.count {
            let request = fetch(&setup.backlog.consumer().await, 1);
            let work = |at: usize| one(proxy[at % CLIENTS].clone(), request.clone());
            let through = planned(rate, &proxied, work).await;
            let work = |at: usize| one(service[at % CLIENTS].clone(), noop::request(1));
            let floor = planned(rate, &unproxied, work).await;
            let consumer = setup.backlog.handle(&setup.backlog.consumer().await).await;
            let native = planned(rate, &direct, |_| native(consumer.clone())).await;
            rounds.push([through, floor, native]);
        }
        let median = |kind: usize, figure: usize| {
            Spread::of(rounds.iter().map(|round| round[kind][figure])).median
        };
        let of = |kind: usize| {
            let [p50, p99] = [0, 1].map(|figure| short(median(kind, figure)));
            format!("{p50} | {p99} | {:.1}", median(kind, 2))
        };
        let ratio = Spread::of(rounds.iter().map(|[proxy, _, native]| proxy[0] / native[0]));
        println!(
            "| {load} % | {} | {} | {} | {} | {:.2} | {} |",
            grouped(rate),
            of(0),
            of(1),
            of(2),
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
async fn planned<F>(rate: f64, processes: &Processes, work: impl Fn(usize) -> F) -> Figures
where
    F: Future<Output = ()> + Send + 'static,
{
    let count = ((rate * ROUND.as_secs_f64()) as usize).max(20);
    let all: Vec<F> = (0..count).map(work).collect();
    let runtime = Handle::current();
    let starts = move || {
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
    };
    let mut times = Vec::new();
    let run = Run { messages: count, counts_calls: false };
    let cost = half(processes, run, async {
        times = tokio::task::spawn_blocking(starts).await.unwrap().join_all().await;
        count
    });
    let cost = cost.await;
    times.sort();
    let [p50, p99] = [50, 99].map(|share| times[times.len() * share / 100].as_secs_f64() * 1e6);
    [p50, p99, cost.rate * cost.cpu / 1e6]
}
