//! The wait of a message, and the memory of a lease and of a waiter.

use std::{
    fs,
    time::{Duration, Instant},
};

use crate::{
    proxied,
    setup::{STREAM, Setup},
};

/// From the publish to the answer of a Fetch that waits for it.
pub async fn latency(setup: &Setup, only: &str) {
    if !"latency".contains(only) {
        return;
    }
    let name = setup.consumer().await;
    let mut client = proxied::connect(&setup.grpc, 1).await.remove(0);
    loop {
        let batch = client.fetch(proxied::fetch(&name, 1000)).await.unwrap().into_inner();
        if batch.messages.is_empty() {
            break;
        }
    }
    let mut took = Vec::new();
    for _ in 0..300 {
        let mut waiter = client.clone();
        let request = proxied::fetch(&name, 1);
        let waiting = tokio::spawn(async move {
            let answer = waiter.fetch(request).await.unwrap().into_inner();
            (Instant::now(), answer)
        });
        tokio::time::sleep(Duration::from_millis(5)).await;
        let began = Instant::now();
        setup.jetstream.publish("bench.x", "now".into()).await.unwrap().await.unwrap();
        let (answered, answer) = waiting.await.unwrap();
        assert_eq!(answer.messages.len(), 1);
        took.push(answered.duration_since(began));
    }
    took.sort();
    let at = |share: usize| took[took.len() * share / 100].as_micros();
    println!(
        "\nlatency publish → Fetch answer: p50 {} µs, p90 {} µs, p99 {} µs",
        at(50),
        at(90),
        at(99)
    );
}

/// Resident memory of the proxy before and after it holds leases and waiters.
pub async fn leases(setup: &Setup, only: &str) {
    if !"memory".contains(only) {
        return;
    }
    let name = setup.consumer().await;
    let mut client = proxied::connect(&setup.grpc, 1).await.remove(0);
    let before = resident(setup.proxy_pid());
    let mut held = 0;
    loop {
        let mut request = proxied::fetch(&name, 1000);
        request.lease = Some(prost_types::Duration { seconds: 600, nanos: 0 });
        let count = client.fetch(request).await.unwrap().into_inner().messages.len();
        if count == 0 {
            break;
        }
        held += count;
    }
    let grown = resident(setup.proxy_pid()).saturating_sub(before);
    println!("memory: {held} leases held, {} bytes each in the whole process", grown / held.max(1));

    let before = resident(setup.proxy_pid());
    let mut waiting = tokio::task::JoinSet::new();
    const WAITERS: usize = 900;
    for _ in 0..WAITERS {
        let (mut client, mut request) = (client.clone(), proxied::fetch(&name, 1));
        request.max_wait = Some(prost_types::Duration { seconds: 3, nanos: 0 });
        waiting.spawn(async move { client.fetch(request).await.unwrap() });
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let grown = resident(setup.proxy_pid()).saturating_sub(before);
    println!(
        "memory: {WAITERS} waiters on {STREAM}, {} bytes each in the whole process",
        grown / WAITERS
    );
    waiting.join_all().await;
}

fn resident(pid: u32) -> usize {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
