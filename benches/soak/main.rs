//! `make soak`: workers, publishers and faults for as long as asked, and a log of all that
//! happened. Nothing may be lost, no message may have two holders, and none may wait long.
//! Afterwards the proxy must be as small as before.
//!
//! ```text
//! cargo bench --bench soak -- --for 2m --seed 1
//!
//!  publishers ──▶ nats-server ◀── wire that breaks ──▶ fetch-proxy ◀── wire that breaks ── workers
//!  witness ────▶ (also killed)                                    ◀────────────────────── workers
//! ```
//! The last twenty seconds are without faults; then publishers stop, and workers take what is left.

#![allow(clippy::disallowed_methods, reason = "a soak lives in real time")]

mod excuses;
mod faults;
mod judge;
mod process;
mod publishers;
mod report;
mod settling;
mod streams;
mod waiting;
mod witness;
mod workers;

use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use faults::Faults;
use process::Footprint;
use testkit::{
    delivery_log::{DeliveryLog, Terms, now},
    dice::Dice,
    nats_server::NatsServer,
    proxy::Proxy,
    relay::Relay,
    scrape::{Books, Scrape},
};
use tokio::{sync::watch, task::JoinSet, time::sleep};
use workers::{Phase, Worker};

#[derive(Parser)]
struct Args {
    /// How long to publish.
    #[arg(long = "for", default_value = "2m", value_parser = humantime::parse_duration)]
    length: Duration,
    /// For the same faults again; made up when there is none.
    #[arg(long)]
    seed: Option<u64>,
    /// Messages published a second.
    #[arg(long, default_value_t = 200)]
    rate: u32,
    /// Tell also of leases that faults broke, which is nothing wrong.
    #[arg(long)]
    excuses: bool,
    /// Passed by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Without faults at the beginning, until the proxy is weighed.
const WARM_UP: Duration = Duration::from_secs(6);
/// Without faults at the end, before publishers stop.
const SETTLING_DOWN: Duration = Duration::from_secs(20);
/// After the last Fetch, before the proxy is weighed again.
const QUIET: Duration = Duration::from_secs(3);
/// Workers of each consumer. Every other worker has a wire that breaks, and half of each kind consume a stream.
const WORKERS: usize = 4;

fn main() -> ExitCode {
    let args = Args::parse();
    let seed = args.seed.unwrap_or_else(|| now().unsigned_abs() % 1_000_000);
    println!("seed {seed}, for {:?}", args.length);
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(run(&args, seed))
}

fn consumers() -> Vec<Terms> {
    let secs = Duration::from_secs;
    let terms = |name, wait, backoff, max_deliver| {
        let ack_wait = secs(wait);
        Terms { name, ack_wait, backoff, max_deliver }
    };
    vec![
        terms("brief", 2, Vec::new(), Some(6)),
        terms("backing-off", 5, vec![secs(5), secs(2), secs(8)], None),
        terms("patient", 30, Vec::new(), None),
    ]
}

async fn run(args: &Args, seed: u64) -> ExitCode {
    let (began, consumers) = (Instant::now(), consumers());
    let log = Arc::new(DeliveryLog::open(&consumers));
    let nats = NatsServer::start();
    let nats_wire = Relay::to(&nats.url()).await;
    let proxy = Proxy::start_at(&nats_wire.nats_url(), &[]);
    let worker_wire = Relay::to(&proxy.grpc).await;
    let jetstream = witness::prepare(&nats.url(), &consumers).await;
    let witness = witness::listen(&nats.url(), log.clone()).await;

    let (phase, phases) = watch::channel(Phase::WarmingUp);
    let mut workers = JoinSet::new();
    for number in 0..WORKERS * consumers.len() {
        let (consumer, direct) = (number / WORKERS, number % 2 == 0);
        let worker = Worker {
            number,
            consumer,
            terms: consumers[consumer].clone(),
            address: if direct { proxy.grpc.clone() } else { worker_wire.address() },
            direct,
            consumes: number / 2 % 2 == 1,
            log: log.clone(),
            dice: Dice::new(seed, 100 + number as u64),
            phase: phases.clone(),
        };
        workers.spawn(worker.run());
    }
    let (stop, stopped) = watch::channel(false);
    let publishing =
        tokio::spawn(publishers::publish(jetstream.clone(), args.rate, log.clone(), stopped));
    let progress = tokio::spawn(report::progress(log.clone(), began));

    sleep(WARM_UP).await;
    let before = Footprint::of(proxy.pid());
    phase.send_replace(Phase::Working);
    let mut faults =
        Faults { nats, nats_wire, worker_wire, log: log.clone(), dice: Dice::new(seed, 1) };
    faults.run(args.length.saturating_sub(WARM_UP + SETTLING_DOWN)).await;
    sleep(SETTLING_DOWN).await;
    stop.send_replace(true);
    publishing.await.unwrap();
    phase.send_replace(Phase::Draining);
    if let Err(left) = witness::drained(&jetstream, &consumers).await {
        log.wrong(left);
    }
    phase.send_replace(Phase::Idle);
    progress.abort();
    let stored = witness::stored(&jetstream).await;
    sleep(QUIET).await;
    let mut after = Footprint::of(proxy.pid());
    // Connections that were just closed take a moment.
    for _ in 0..50 {
        if before.grown(&after).is_empty() {
            break;
        }
        sleep(Duration::from_millis(200)).await;
        after = Footprint::of(proxy.pid());
    }
    phase.send_replace(Phase::Over);
    workers.join_all().await;
    witness.abort();
    match Scrape::of(&proxy.ops).books() {
        Ok(Books { began, ended, held }) => {
            println!("\nleases by the metrics: {began} began, {ended} ended, {held} are held");
        }
        Err(why) => log.wrong(format!("the metrics of the leases do not balance: {why}")),
    }

    let mut records = log.read();
    records.stored = stored;
    let wrong = before.grown(&after);
    records.wrong.extend(wrong);
    let verdict = judge::judge(&records);
    if args.excuses {
        report::excuses(&records, &verdict);
    }
    if report::table(&records, &verdict, before, after) {
        return ExitCode::SUCCESS;
    }
    println!("seed {seed}; the proxy's log: {}", report::keep_log(seed, &proxy.log()));
    ExitCode::FAILURE
}
