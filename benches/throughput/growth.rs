//! How the cost of a message grows with its size, with the number of consumers and with the number of
//! connections. The columns run in turn, and each is compared with the first of the same round.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use testkit::{
    backlog::{Backlog, Consumer},
    measure::{Half, Run, Spread, grouped, half, short},
    pairs::Pairs,
};

use crate::{
    direct, noop,
    proxied::{Batches, Work, connect, fetch},
    setup::Setup,
};

/// Workers that share the consumers or the connections.
const WORKERS: usize = 64;
/// Bytes and messages of each half, and their column.
const SIZES: [(usize, usize, &str); 4] = [
    (100, 20_000, "100 B"),
    (1 << 10, 20_000, "1 KiB"),
    (64 << 10, 1_000, "64 KiB"),
    (1 << 20, 120, "1 MiB"),
];
const CONSUMERS: [usize; 3] = [1, 10, 1000];
const CONNECTIONS: [usize; 3] = [1, 100, 5000];
/// Open files that the connections need at their end here: those of the proxy, those of the service
/// that does nothing, and the rest.
const FILES: u64 = 2 * 5000 + 500;

/// Allows this process and its children as many open files as the connections need. Call before any
/// server starts.
pub fn raise_files() {
    let limit = getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map_or(FILES, |most| most.min(FILES));
    if limit.current.is_some_and(|now| now < wanted) {
        let limit = Rlimit { current: Some(wanted), maximum: limit.maximum };
        setrlimit(Resource::Nofile, limit).unwrap();
    }
}

/// Prints one table for each kind of growth.
pub async fn tables(pairs: &Pairs, setup: &Setup, messages: usize) {
    if pairs.want("growth with messages") {
        sizes(pairs, setup, messages).await;
    }
    if pairs.want("growth with consumers") {
        consumers(pairs, setup, messages).await;
    }
    if pairs.want("growth with connections") {
        connections(pairs, setup, messages).await;
    }
}

async fn sizes(pairs: &Pairs, setup: &Setup, messages: usize) {
    let batches = Batches { clients: 8, n: 10, confirmed: true };
    let most = batches.clients * batches.n as usize;
    let mut streams = Vec::new();
    for (size, of_half, _) in SIZES {
        let of_half = of_half.min(messages);
        let name = format!("SIZE{size}");
        // More than a half takes, so that nobody waits for a message at its end.
        let backlog = Backlog::fill(&setup.jetstream, &name, size, of_half + 2 * most).await;
        streams.push((backlog, Run { messages: of_half, counts_calls: false }));
    }
    let clients = connect(&setup.grpc, batches.clients).await;
    let title = "messages, n=10 confirmed, 8 clients";
    table(pairs, title, "double_ack", &SIZES.map(|(_, _, name)| name.to_owned()), async |at| {
        let (backlog, run) = &streams[at];
        let request = fetch(&backlog.consumer().await, batches.n);
        let work = Work::new(clients.clone(), request).batches(true, run.messages);
        let proxy = half(&setup.proxied(), *run, work).await;
        (proxy, Some(direct::batches_from(setup, backlog, batches, *run).await))
    })
    .await;
    for (backlog, _) in streams {
        backlog.delete().await;
    }
}

async fn consumers(pairs: &Pairs, setup: &Setup, messages: usize) {
    let run = Run { messages: messages / 4, counts_calls: false };
    let clients = connect(&setup.grpc, WORKERS).await;
    // A half takes some messages of each of the many consumers, which therefore last for all halves.
    // A few consumers would come to an end, so each half has new ones.
    let lasting = some_consumers(setup, CONSUMERS[2]).await;
    let title = "consumers, n=10 confirmed, 64 clients";
    table(pairs, title, "", &CONSUMERS.map(|count| count.to_string()), async |at| {
        let new = if at < 2 { some_consumers(setup, CONSUMERS[at]).await } else { Vec::new() };
        let all = if at < 2 { &new } else { &lasting };
        let requests = all.iter().map(|consumer| fetch(consumer, 10)).collect();
        let work = Work { clients: clients.clone(), workers: WORKERS, requests };
        (half(&setup.proxied(), run, work.batches(true, run.messages)).await, None)
    })
    .await;
}

async fn some_consumers(setup: &Setup, count: usize) -> Vec<Consumer> {
    let mut consumers = Vec::new();
    for _ in 0..count {
        consumers.push(setup.backlog.consumer().await);
    }
    consumers
}

async fn connections(pairs: &Pairs, setup: &Setup, messages: usize) {
    let limit = getrlimit(Resource::Nofile).current;
    let fits = limit.is_none_or(|limit| limit >= FILES);
    let counts = if fits { &CONNECTIONS[..] } else { &CONNECTIONS[..2] };
    if !fits {
        println!("\nNOT MEASURED: 5000 connections need a limit of {FILES} open files.");
    }
    let run = Run { messages: messages / 8, counts_calls: false };
    let mut ends = Vec::new();
    for count in counts {
        ends.push((connect(&setup.grpc, *count).await, connect(&setup.noop, *count).await));
    }
    let names: Vec<String> = counts.iter().map(usize::to_string).collect();
    let title = "connections, n=1 confirmed, 64 workers";
    table(pairs, title, "no-op gRPC", &names, async |at| {
        let (proxy, service) = &ends[at];
        let work = |clients: &Vec<_>, request| {
            let work = Work { clients: clients.clone(), workers: WORKERS, requests: vec![request] };
            work.singles(run.messages)
        };
        let request = fetch(&setup.backlog.consumer().await, 1);
        let through = half(&setup.proxied(), run, work(proxy, request)).await;
        let floor = half(&setup.unproxied(), run, work(service, noop::request(1))).await;
        (through, Some(floor))
    })
    .await;
}

/// The proxy, and perhaps something to compare with.
type Column = (Half, Option<Half>);
/// A figure of a column, if there is one.
type Cost = fn(&Column) -> Option<f64>;

/// Runs the columns in turn, and prints what each costs, with its ratio to the first.
async fn table(
    pairs: &Pairs,
    title: &str,
    other: &str,
    columns: &[String],
    run: impl AsyncFn(usize) -> Column,
) {
    let mut rounds: Vec<Vec<Column>> = Vec::new();
    for round in 0..=pairs.count {
        let mut halves = Vec::new();
        for column in 0..columns.len() {
            halves.push(run(column).await);
        }
        // The first round is a warm-up.
        if round > 0 {
            rounds.push(halves);
        }
    }
    println!("\n**Growth with {title}**, in parentheses relative to the first column\n");
    println!("| | {} |\n|{}", columns.join(" | "), " --- |".repeat(columns.len() + 1));
    let lines: [(&str, Cost); 5] = [
        ("proxy, msg/s", |(a, _)| Some(a.rate)),
        ("CPU of the proxy, µs/msg", |(a, _)| a.proxy_cpu),
        ("CPU of all processes, µs/msg", |(a, _)| Some(a.cpu)),
        ("msg/s", |(_, b)| Some(b.as_ref()?.rate)),
        ("CPU, µs/msg", |(_, b)| Some(b.as_ref()?.cpu)),
    ];
    for (at, (name, of)) in lines.into_iter().enumerate() {
        let figures = rounds.iter().map(|round| round.iter().map(of).collect::<Option<Vec<f64>>>());
        let Some(rounds) = figures.collect::<Option<Vec<_>>>() else { continue };
        let cells = (0..columns.len()).map(|column| {
            let value = Spread::of(rounds.iter().map(|round| round[column])).median;
            let ratio = Spread::of(rounds.iter().map(|round| round[column] / round[0])).median;
            let value = if name.ends_with("msg/s") { grouped(value) } else { short(value) };
            if column == 0 { value } else { format!("{value} ({ratio:.2})") }
        });
        let cells: Vec<String> = cells.collect();
        let name = if at < 3 { name.to_owned() } else { format!("{other}, {name}") };
        println!("| {name} | {} |", cells.join(" | "));
    }
}
