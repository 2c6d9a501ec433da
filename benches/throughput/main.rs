//! `make bench`: what the proxy costs, as ratios taken in one run.
//!
//! Machines are shared and noisy, so no figure stands alone. Each row runs two things in turn, A B
//! A B …, at least seven times. It shows the median of the pairs' ratios with its spread, and the
//! CPU time of a message in all processes that worked on it.
//!
//! ```text
//! cargo bench --bench throughput [-- --pairs 7 --messages 40000]
//! cargo bench --bench throughput -- --against PATH    an older program of the proxy is B
//! ```

#![allow(clippy::disallowed_methods, reason = "a bench measures real time")]

mod against;
mod consumed;
mod direct;
mod forwarded;
mod guarded;
mod memory;
mod noop;
mod one_call;
mod other;
mod proxied;
mod setup;

use std::{future::Future, path::PathBuf, time::Instant};

use clap::Parser;
use guarded::Guarded;
use other::OtherProxy;
use setup::{Cpu, Setup};
use testkit::traces::TraceReceiver;

#[derive(Parser)]
struct Args {
    /// Pairs of each row.
    #[arg(long, default_value_t = 7)]
    pairs: usize,
    /// Messages of each half of a pair, for rows of n = 100; rows of n = 1 take a quarter.
    #[arg(long, default_value_t = 40_000)]
    messages: usize,
    /// Serve canned answers on a port that is printed; for the bench itself.
    #[arg(long, hide = true)]
    noop_server: bool,
    /// Only rows whose name holds this.
    #[arg(long, default_value = "")]
    only: String,
    /// Only compare with this program of the proxy. The CPU time is that of the proxy alone.
    #[arg(long, value_name = "PATH")]
    against: Option<PathBuf>,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One half of a pair, done: messages a second, and microseconds of CPU a message.
struct Half {
    rate: f64,
    cpu: f64,
}

async fn half<F: Future<Output = usize>>(cpu: &Cpu, run: F) -> Half {
    let (began, before) = (Instant::now(), cpu.micros());
    let messages = run.await as f64;
    let rate = messages / began.elapsed().as_secs_f64();
    Half { rate, cpu: (cpu.micros() - before) / messages }
}

fn main() {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    if args.noop_server {
        runtime.block_on(noop::serve());
    } else {
        runtime.block_on(run(args));
    }
}

async fn run(args: Args) {
    // More than any run takes, so that nobody waits for a message at its end.
    let setup = Setup::start(args.messages + 20_000).await;
    println!(
        "{} pairs a row, 1 KiB messages, file stream, one nats-server, {} cores\n",
        args.pairs,
        cores()
    );
    println!(
        "{:<44} {:>9} {:>9} {:>7} {:>15} {:>8} {:>8}",
        "row: A / B", "A msg/s", "B msg/s", "A/B", "spread", "A µs/msg", "B µs/msg"
    );
    let hundred = args.messages;
    let one = args.messages / 4;
    if let Some(program) = &args.against {
        return against::compare(&args, &setup, program).await;
    }
    for clients in [1, 8, 64] {
        let name = format!("n=100 confirmed, {clients} clients: proxy / double_ack");
        row(
            &args,
            &name,
            async || proxied::batches(&setup, clients, hundred, true).await,
            async || direct::batches(&setup, clients, hundred, true).await,
        )
        .await;
    }
    for clients in [1, 8, 64] {
        let name = format!("n=100 sent, {clients} clients: proxy / async-nats");
        row(
            &args,
            &name,
            async || proxied::batches(&setup, clients, hundred, false).await,
            async || direct::batches(&setup, clients, hundred, false).await,
        )
        .await;
    }
    for clients in [1, 64] {
        let name = format!("n=1 confirmed, {clients} clients: proxy / no-op gRPC");
        row(
            &args,
            &name,
            async || proxied::singles(&setup, clients, one).await,
            async || noop::singles(&setup, clients, one).await,
        )
        .await;
    }
    for clients in [8, 64] {
        let name = format!("n=1 in one call, {clients} clients: proxy / double_ack");
        row(
            &args,
            &name,
            async || one_call::singles(&setup, clients, one).await,
            async || direct::singles(&setup, clients, one).await,
        )
        .await;
        let name = format!("n=1, {clients} clients: one call / two calls");
        row(
            &args,
            &name,
            async || one_call::singles(&setup, clients, one).await,
            async || proxied::singles(&setup, clients, one).await,
        )
        .await;
    }
    for streams in [1, 8, 64] {
        let name = format!("Consume, credit 1, {streams} streams / double_ack");
        row(
            &args,
            &name,
            async || consumed::acked(&setup, streams, 1, one, true).await,
            async || direct::singles(&setup, streams, one).await,
        )
        .await;
        let name = format!("Consume, credit 1, {streams} streams / no-op echo");
        row(
            &args,
            &name,
            async || consumed::acked(&setup, streams, 1, one, true).await,
            async || consumed::echoed(&setup, streams, one).await,
        )
        .await;
    }
    for streams in [1, 8] {
        let name = format!("Consume, credit 1000, {streams} streams / double_ack");
        row(
            &args,
            &name,
            async || consumed::acked(&setup, streams, 1000, hundred, true).await,
            async || direct::batches(&setup, streams, hundred, true).await,
        )
        .await;
        let name = format!("Consume, credit 1000, {streams} streams, sent / ack");
        row(
            &args,
            &name,
            async || consumed::acked(&setup, streams, 1000, hundred, false).await,
            async || direct::streamed(&setup, streams, hundred).await,
        )
        .await;
    }
    let guarded = Guarded::start(&setup);
    row(
        &args,
        "n=100 confirmed, 8 clients: TLS, policy / plain",
        async || guarded.batches(&setup, 8, hundred).await,
        async || proxied::batches(&setup, 8, hundred, true).await,
    )
    .await;
    row(
        &args,
        "n=1 confirmed, 8 clients: TLS, policy / plain",
        async || guarded.singles(&setup, 8, one).await,
        async || proxied::singles(&setup, 8, one).await,
    )
    .await;
    let receiver = TraceReceiver::start().await;
    let traced = OtherProxy::traced(&setup, &receiver);
    row(
        &args,
        "n=100 confirmed, 8 clients: traces at 1 % / off",
        async || traced.batches(&setup, 8, hundred).await,
        async || proxied::batches(&setup, 8, hundred, true).await,
    )
    .await;
    row(
        &args,
        "n=1 confirmed, 8 clients: traces at 1 % / off",
        async || traced.singles(&setup, 8, one).await,
        async || proxied::singles(&setup, 8, one).await,
    )
    .await;
    if "traces".contains(&args.only) {
        println!("  {} spans were received", receiver.spans().len());
    }
    let unmetered = OtherProxy::without_metrics(&setup);
    row(
        &args,
        "n=100 confirmed, 8 clients: metrics on / off",
        async || proxied::batches(&setup, 8, hundred, true).await,
        async || unmetered.batches(&setup, 8, hundred).await,
    )
    .await;
    row(
        &args,
        "n=1 confirmed, 8 clients: metrics on / off",
        async || proxied::singles(&setup, 8, one).await,
        async || unmetered.singles(&setup, 8, one).await,
    )
    .await;
    row(
        &args,
        "settles of 100: forwarded / at the owner",
        async || forwarded::settles(&setup, true, hundred).await,
        async || forwarded::settles(&setup, false, hundred).await,
    )
    .await;
    forwarded::latency(&setup, &args.only).await;
    memory::latency(&setup, &args.only).await;
    memory::leases(&setup, &args.only).await;
    memory::stream_leases(&setup, &args.only).await;
    memory::streams(&setup, &args.only).await;
}

async fn row<A: Future<Output = Half>, B: Future<Output = Half>>(
    args: &Args,
    name: &str,
    a: impl Fn() -> A,
    b: impl Fn() -> B,
) -> Vec<(Half, Half)> {
    if !name.contains(&args.only) {
        return Vec::new();
    }
    // One of each that does not count: connections, caches, the consumer's first look.
    a().await;
    b().await;
    let mut pairs = Vec::new();
    for _ in 0..args.pairs {
        pairs.push((a().await, b().await));
    }
    let median = |of: &dyn Fn(&(Half, Half)) -> f64| median(&pairs, of);
    let (ratio, least, most) = median(&|(a, b)| a.rate / b.rate);
    println!(
        "{name:<44} {:>9.0} {:>9.0} {ratio:>7.2} {:>15} {:>8.1} {:>8.1}",
        median(&|(a, _)| a.rate).0,
        median(&|(_, b)| b.rate).0,
        format!("{least:.2} to {most:.2}"),
        median(&|(a, _)| a.cpu).0,
        median(&|(_, b)| b.cpu).0,
    );
    pairs
}

/// The median of the pairs, the least and the most.
fn median(pairs: &[(Half, Half)], of: &dyn Fn(&(Half, Half)) -> f64) -> (f64, f64, f64) {
    let mut values: Vec<f64> = pairs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[0], values[values.len() - 1])
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
