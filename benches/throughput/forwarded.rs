//! The cost of settling at a replica that did not grant the lease.

use std::time::{Duration, Instant};

use fetch_proxy::pb;
use futures_util::{StreamExt as _, future::join_all};
use prost_types::Duration as PbDuration;
use testkit::measure::{Half, Run, half};

use crate::{
    proxied::{Client, acked, connect, fetch},
    setup::Setup,
};

const BATCH: usize = 100;
const CLIENTS: usize = 8;
/// Acks of each kind whose latency is taken.
const ACKS: usize = 500;

/// Leases messages at the first replica, and settles them in batches there or at the other; only the
/// settling counts.
pub async fn settles(setup: &Setup, elsewhere: bool, run: Run) -> Half {
    let tokens = leased(setup, run.messages).await;
    let at = if elsewhere { &setup.other_grpc } else { &setup.grpc };
    let clients = connect(at, CLIENTS).await;
    let share = tokens.len().div_ceil(CLIENTS);
    half(&setup.replicated(), run, async {
        let shares = tokens.chunks(share).zip(clients);
        join_all(shares.map(async |(tokens, mut client): (&[String], Client)| {
            for batch in tokens.chunks(BATCH) {
                let settlements = batch.iter().cloned().map(acked).collect();
                let request = pb::SettleRequest { settlements, ..Default::default() };
                assert_eq!(client.settle(request).await.unwrap().into_inner().failed, 0);
            }
        }))
        .await;
        tokens.len()
    })
    .await
}

/// Acks one after the other: at the owner, at the other replica, and as many bare NATS requests.
pub async fn latency(setup: &Setup, only: &str) {
    if !"forwarded latency".contains(only) {
        return;
    }
    let tokens = leased(setup, 2 * ACKS).await;
    let mut here = connect(&setup.grpc, 1).await.remove(0);
    let mut there = connect(&setup.other_grpc, 1).await.remove(0);
    let mut questions = setup.nats.subscribe("bench.echo").await.unwrap();
    let echo = setup.nats.clone();
    let answering = tokio::spawn(async move {
        while let Some(question) = questions.next().await {
            echo.publish(question.reply.unwrap(), question.payload).await.unwrap();
        }
    });
    let asker = setup.another_nats().await;
    let (mut local, mut forwarded, mut bare) = (Vec::new(), Vec::new(), Vec::new());
    for pair in tokens.chunks_exact(2) {
        let ack = |token: &String| pb::AckRequest { token: token.clone(), ..Default::default() };
        local.push(timed(async { here.ack(ack(&pair[0])).await.map(drop).unwrap() }).await);
        forwarded.push(timed(async { there.ack(ack(&pair[1])).await.map(drop).unwrap() }).await);
        let request = asker.request("bench.echo", "x".into());
        bare.push(timed(async { request.await.map(drop).unwrap() }).await);
    }
    answering.abort();
    let (local, forwarded, bare) = (median(local), median(forwarded), median(bare));
    let added = forwarded.saturating_sub(local);
    println!(
        "forwarded latency of an ack: p50 {} µs, at its owner {} µs, a bare NATS request {} µs: \
         added {:.2} × bare",
        forwarded.as_micros(),
        local.as_micros(),
        bare.as_micros(),
        added.as_secs_f64() / bare.as_secs_f64()
    );
}

async fn leased(setup: &Setup, messages: usize) -> Vec<String> {
    let consumer = setup.backlog.consumer().await;
    let mut client = connect(&setup.grpc, 1).await.remove(0);
    let mut tokens = Vec::new();
    while tokens.len() < messages {
        let n = u32::try_from((messages - tokens.len()).min(1000)).unwrap();
        let lease = Some(PbDuration { seconds: 300, nanos: 0 });
        let request = pb::FetchRequest { lease, ..fetch(&consumer, n) };
        let answer = client.fetch(request).await.unwrap().into_inner();
        tokens.extend(answer.messages.into_iter().map(|message| message.token));
    }
    tokens
}

async fn timed(run: impl Future<Output = ()>) -> Duration {
    let began = Instant::now();
    run.await;
    began.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
