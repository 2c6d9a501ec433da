//! One principal that opens as many Fetch calls as it may does not make another principal slow.
//!
//! Two proxies run side by side, and only one of them has the calls. The other principal uses both in turn, so a
//! busy machine slows both. No time is compared with a number, only with a time of the same moment.

use std::{
    fs,
    time::{Duration, Instant},
};

use fetch_proxy::access::NewApiKey;
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch, reason, with_key},
};
use tokio::{sync::mpsc, task::JoinSet};

/// Fetch calls that the greedy principal may have, and calls that it opens beyond that.
const CALLS: usize = 10_000;
const BEYOND: usize = 50;
/// A connection has at most 1000 calls, and answers a ping within 5 s.
const CALLS_OF_CONNECTION: usize = 900;
const BATCH: usize = 100;
const ROUNDS: usize = 5;
/// Messages of a round. The p99 is the third longest time of them.
const MESSAGES: usize = 200;

/// A proxy in front of a consumer of the modest principal, which has messages.
struct Side {
    fixture: Fixture,
    proxy: Proxy,
    client: Client,
}

impl Side {
    async fn start(policy: &str) -> Self {
        let fixture = Fixture::new(config()).await;
        for _ in 0..ROUNDS * MESSAGES {
            fixture.publish("n", "x").await;
        }
        let limits = ["--max-waiters", "12000", "--max-calls", "24000"];
        let flags = [&["--policy-file", policy][..], &limits].concat();
        let proxy = Proxy::start(NatsServer::shared(), &flags);
        proxy.ready().await;
        let client = proxy.client().await;
        Self { fixture, proxy, client }
    }

    /// The time to take one message and to settle it.
    async fn once(&mut self, key: &str) -> Duration {
        let began = Instant::now();
        let answer =
            self.client.fetch(with_key(key, fetch(&self.fixture, 1, 10_000))).await.unwrap();
        let token = &answer.into_inner().messages[0].token;
        self.client.ack(with_key(key, ack(token))).await.unwrap();
        began.elapsed()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_open_calls_of_a_principal_do_not_double_the_p99_of_another() {
    let folder = tempfile::tempdir().unwrap();
    let [greedy, modest] =
        ["greedy", "modest"].map(|name| NewApiKey::random(name).unwrap().unwrap());
    fs::write(folder.path().join("keys"), [greedy.line, modest.line].join("\n")).unwrap();
    let policy = folder.path().join("policy");
    let text = format!(
        "version: 1\n\
         authenticate: {{api_keys: {{file: keys}}}}\n\
         principals:\n\
         - {{name: greedy, match: ['key:greedy'], limits: {{max_waiters: {CALLS}}}}}\n\
         - {{name: modest, match: ['key:modest']}}\n\
         rules:\n\
         - {{principals: ['*'], streams: ['*'], consumers: ['*'], verbs: [work]}}\n"
    );
    fs::write(&policy, text).unwrap();
    let policy = policy.to_str().unwrap();
    let (mut flooded, mut quiet) = (Side::start(policy).await, Side::start(policy).await);

    let empty = Fixture::new(config()).await;
    let mut open = JoinSet::new();
    let (refusals, mut refused) = mpsc::unbounded_channel();
    let mut left = CALLS + BEYOND;
    while left > 0 {
        let connection = flooded.proxy.client().await;
        for place in 0..left.min(CALLS_OF_CONNECTION) {
            let mut client = connection.clone();
            if place % BATCH == 0 {
                // Everything that was sent on this connection has been read then.
                let read = client.ack(with_key(&greedy.secret, ack("x"))).await.unwrap_err();
                assert_eq!(reason(&read).1, "TOKEN_INVALID");
            }
            let request = with_key(&greedy.secret, fetch(&empty, 1, 300_000));
            let refusals = refusals.clone();
            open.spawn(async move {
                let answer = client.fetch(request).await;
                let _ = refusals.send(answer.map(drop));
            });
        }
        left -= left.min(CALLS_OF_CONNECTION);
    }
    // All other calls wait then.
    for _ in 0..BEYOND {
        let answer = eventually("a refusal", || std::future::ready(refused.try_recv().ok())).await;
        assert_eq!(reason(&answer.unwrap_err()).1, "WAITER_LIMIT");
    }

    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..MESSAGES {
            with.push(flooded.once(&modest.secret).await);
            without.push(quiet.once(&modest.secret).await);
        }
        ratios.push(p99(with).div_duration_f64(p99(without)));
    }
    assert!(refused.try_recv().is_err(), "a call of the greedy principal has ended");
    assert_eq!(open.len(), CALLS + BEYOND, "{:?}", flooded.proxy.log());
    // A single round may meet a moment at which the machine was busy.
    let mut sorted = ratios.clone();
    sorted.sort_by(f64::total_cmp);
    println!("p99 with {CALLS} calls of another principal, as ratios: {ratios:.2?}");
    assert!(sorted[ROUNDS / 2] < 2.0, "{ratios:?}");
}

fn p99(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() - 1 - times.len() / 100]
}
