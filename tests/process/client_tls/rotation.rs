//! Certificates that are replaced under load.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use testkit::{
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{ack, fetch},
    until,
};
use tokio::task::JoinSet;

use super::*;

/// Calls of one worker: each worker has a connection that stays, and makes a new one for each round.
async fn work(
    proxy: &Proxy,
    fixture: &Fixture,
    ca: &str,
    identity: &Signed,
    stop: &AtomicBool,
) -> u32 {
    let mut calls = 0;
    let mut stays = client(proxy, ca, Some(identity)).await.unwrap();
    while !stop.load(Ordering::Relaxed) {
        let mut new = client(proxy, ca, Some(identity)).await.expect("a new connection");
        for caller in [&mut stays, &mut new] {
            fixture.publish("n", "x").await;
            let answer = caller.fetch(fetch(fixture, 1, 10_000)).await.expect("a Fetch");
            for message in answer.into_inner().messages {
                caller.ack(ack(&message.token)).await.expect("an Ack");
                calls += 1;
            }
            calls += 1;
        }
    }
    calls
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_rotations_by_symlink_fail_no_call() {
    let ca = Authority::new("ca");
    let mut files = Mounted::new(&ca.server(), ca.pem());
    let fixture = Arc::new(Fixture::new(config()).await);
    let proxy = Arc::new(start(&NatsServer::shared().url(), &files.client_flags(), &[]));
    proxy.ready().await;
    let identity = ca.client("worker");
    let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let mut workers = JoinSet::new();
    for _ in 0..4 {
        let (proxy, fixture, stop, calls) =
            (proxy.clone(), fixture.clone(), stop.clone(), calls.clone());
        let (pem, identity) = (ca.pem().to_owned(), identity.clone());
        workers.spawn(async move {
            let made = work(&proxy, &fixture, &pem, &identity, &stop).await;
            calls.fetch_add(made, Ordering::Relaxed);
        });
    }
    let raw = h2(&ca, Some(&identity));
    let mut last = ca.server();
    // The looks are two seconds apart: some of the fifty are seen, and all are made under load.
    for rotation in 0..50 {
        last = ca.server();
        files.swap(&last.cert, &last.key, ca.pem());
        let pause = if rotation % 10 == 9 { 2500 } else { 200 };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        assert!(workers.try_join_next().is_none(), "a worker has failed: {}", proxy.log());
    }
    let new = || async { (leaf(&proxy, &raw).await == last.der).then_some(()) };
    assert!(until(SEEN, new).await.is_some(), "{}", proxy.log());
    stop.store(true, Ordering::Relaxed);
    while let Some(worker) = workers.join_next().await {
        worker.expect("a worker whose every call succeeds");
    }
    let (calls, seen) =
        (calls.load(Ordering::Relaxed), said(&proxy, "the TLS files were read again"));
    println!("{calls} calls, 0 failed, {seen} of 50 rotations used");
    assert!(calls > 100 && seen >= 5, "{calls} calls, {seen} rotations");
    assert_eq!(said(&proxy, "the TLS files cannot be used"), 0, "{}", proxy.log());
}
