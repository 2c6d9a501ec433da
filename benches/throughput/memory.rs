//! The memory of a lease, of a waiter and of a stream.

use std::{fs, time::Duration};

use testkit::backlog::Consumer;

use crate::{
    consumed::{self, Stream},
    proxied::{self, Client},
    setup::Setup,
};

/// Takes all that the consumer has.
async fn empty(client: &mut Client, consumer: &Consumer) -> usize {
    let mut held = 0;
    loop {
        let mut request = proxied::fetch(consumer, 1000);
        request.lease = Some(prost_types::Duration { seconds: 600, nanos: 0 });
        let count = client.fetch(request).await.unwrap().into_inner().messages.len();
        if count == 0 {
            return held;
        }
        held += count;
    }
}

/// Resident memory of the proxy before and after a stream has leases.
pub async fn stream_leases(setup: &Setup, only: &str) {
    if !"memory".contains(only) {
        return;
    }
    let clients = proxied::connect(&setup.grpc, 1).await;
    const LEASES: usize = 10_000;
    let name = setup.backlog.consumer().await;
    let before = resident(setup.proxy_pid());
    let mut stream = Stream::open(&mut clients[0].clone(), consumed::start(&name, 10_000)).await;
    let mut held = 0;
    while held < LEASES {
        held += stream.frames.message().await.unwrap().unwrap().messages.len();
    }
    let grown = resident(setup.proxy_pid()).saturating_sub(before);
    println!("memory: {held} leases of a stream, {} bytes each in the whole process", grown / held);
}

/// Resident memory of the proxy before and after it has streams.
pub async fn streams(setup: &Setup, only: &str) {
    if !"memory".contains(only) {
        return;
    }
    const STREAMS: usize = 10_000;
    const CONNECTIONS: usize = 50;
    let name = setup.backlog.consumer().await;
    let clients = proxied::connect(&setup.grpc, CONNECTIONS).await;
    empty(&mut clients[0].clone(), &name).await;
    let before = resident(setup.proxy_pid());
    let mut streams = Vec::new();
    for at in 0..STREAMS {
        let mut client = clients[at % CONNECTIONS].clone();
        let mut stream = Stream::open(&mut client, consumed::start(&name, 1)).await;
        assert!(stream.frames.message().await.unwrap().unwrap().opened.is_some());
        streams.push(stream);
    }
    let grown = resident(setup.proxy_pid()).saturating_sub(before);
    println!("memory: {STREAMS} idle streams, {} bytes each in the whole process", grown / STREAMS);
}

/// Resident memory of the proxy before and after it holds leases and waiters.
pub async fn leases(setup: &Setup, only: &str) {
    if !"memory".contains(only) {
        return;
    }
    let name = setup.backlog.consumer().await;
    let mut client = proxied::connect(&setup.grpc, 1).await.remove(0);
    let before = resident(setup.proxy_pid());
    let held = empty(&mut client, &name).await;
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
    println!("memory: {WAITERS} waiters, {} bytes each in the whole process", grown / WAITERS);
    waiting.join_all().await;
}

fn resident(pid: u32) -> usize {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
