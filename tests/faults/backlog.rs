//! A backlog of valid messages, when workers ask for more than NATS lets wait for one client. No
//! connection is cut, no message waits for its ack wait, and no call is refused.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use fetch_proxy::pb;
use testkit::{
    BOUND,
    jetstream::{Fixture, ack_wait},
    nats_server::{NatsServer, binary},
    proxy::{Client, Proxy, fetch, reason},
    relay::{Flow, Relay},
};

const KB: usize = 1 << 10;

/// How often each message was handed over, by stream and sequence, and what was refused.
#[derive(Default)]
struct Received {
    seen: BTreeMap<(String, u64), u32>,
    refused: Vec<String>,
}

impl Received {
    fn twice(&self) -> usize {
        self.seen.values().filter(|times| **times > 1).count()
    }
}

/// A server that cuts a client for which more than this waits.
fn server(max_pending: &str) -> NatsServer {
    let config = format!("max_pending: {max_pending}\nmax_payload: {max_pending}\n");
    let config = if max_pending.ends_with("MB") {
        config.replace(&format!("max_payload: {max_pending}"), "max_payload: 1MB")
    } else {
        config
    };
    NatsServer::start_with(binary(), Some(config))
}

async fn publish(fixture: &Fixture, count: usize, size: usize) {
    for _ in 0..count {
        fixture.publish("a", vec![b'x'; size]).await;
    }
}

/// Fetches and acks until all of them were seen, or the time is over.
async fn work(
    mut client: Client,
    request: pb::FetchRequest,
    received: Arc<Mutex<Received>>,
    all: usize,
    until: Instant,
) {
    while received.lock().unwrap().seen.len() < all && Instant::now() < until {
        match client.fetch(request.clone()).await {
            Ok(fetched) => {
                let messages = fetched.into_inner().messages;
                let settlements = messages.iter().map(|message| pb::Settlement {
                    number: 0,
                    token: message.token.clone(),
                    action: Some(pb::settlement::Action::Ack(pb::AckAction::default())),
                });
                let settlements = settlements.collect();
                let settle = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
                if !messages.is_empty() {
                    // An unconfirmed message comes again, and is counted.
                    let _ = client.settle(settle).await;
                }
                let mut received = received.lock().unwrap();
                for message in messages {
                    let name = (request.stream.clone(), message.stream_sequence);
                    *received.seen.entry(name).or_default() += 1;
                }
            }
            Err(status) => {
                received.lock().unwrap().refused.push(reason(&status).1);
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// So many workers for each of these, with all the defaults.
async fn drain(
    proxy: &Proxy,
    fixtures: &[Fixture],
    workers: usize,
    all: usize,
    within: Duration,
) -> Received {
    let (received, until) = (Arc::<Mutex<Received>>::default(), Instant::now() + within);
    let mut tasks = tokio::task::JoinSet::new();
    for fixture in fixtures {
        for _ in 0..workers {
            let client = proxy.client().await.max_decoding_message_size(64 << 20);
            tasks.spawn(work(client, fetch(fixture, 100, 2000), received.clone(), all, until));
        }
    }
    tasks.join_all().await;
    std::mem::take(&mut *received.lock().unwrap())
}

#[tokio::test]
async fn many_workers_on_a_slow_link_are_not_cut() {
    let server = server("24MB");
    let fixture = Fixture::at(&server.url(), ack_wait(20_000)).await;
    publish(&fixture, 400, 100 * KB).await;
    let relay = Relay::narrow_to(&server.url());
    relay.flow(Flow::Pass, Flow::Rate(20_000_000));
    let proxy = Proxy::start_at(&relay.nats_url(), &[]);
    proxy.ready().await;
    let received = drain(&proxy, &[fixture], 16, 400, 3 * BOUND).await;
    assert_eq!((received.seen.len(), received.twice()), (400, 0), "{}", proxy.log());
    assert!(received.refused.is_empty(), "{:?}\n{}", received.refused, proxy.log());
    assert!(!proxy.log().contains("connection broke"), "{}", proxy.log());
}

#[tokio::test]
async fn many_consumers_with_a_backlog_share_a_whole_connection() {
    let server = server("24MB");
    let mut fixtures = Vec::new();
    for _ in 0..10 {
        let fixture = Fixture::at(&server.url(), ack_wait(20_000)).await;
        publish(&fixture, 40, 100 * KB).await;
        fixtures.push(fixture);
    }
    let relay = Relay::narrow_to(&server.url());
    relay.flow(Flow::Pass, Flow::Rate(20_000_000));
    let proxy = Proxy::start_at(&relay.nats_url(), &[]);
    proxy.ready().await;
    let received = drain(&proxy, &fixtures, 1, 400, 3 * BOUND).await;
    assert_eq!((received.seen.len(), received.twice()), (400, 0), "{}", proxy.log());
    assert!(received.refused.is_empty(), "{:?}\n{}", received.refused, proxy.log());
    assert!(!proxy.log().contains("connection broke"), "{}", proxy.log());
}

#[tokio::test]
async fn proxy_adapts_to_a_server_with_a_tiny_pending_limit() {
    let server = server("64KB");
    let fixture = Fixture::at(&server.url(), ack_wait(1000)).await;
    publish(&fixture, 500, KB).await;
    let proxy = Proxy::start(&server, &[]);
    proxy.ready().await;
    let received = drain(&proxy, &[fixture], 4, 500, 3 * BOUND).await;
    assert_eq!(received.seen.len(), 500, "{}", proxy.log());
    // While it finds out how little, the connection is away for a moment.
    let refused = received.refused.iter().filter(|reason| *reason != "NATS_UNAVAILABLE");
    assert_eq!(refused.count(), 0, "{:?}\n{}", received.refused, proxy.log());
    let cut = proxy.log().contains("the connection broke");
    let named = proxy.log().contains("raise max_pending at the server");
    assert_eq!(cut, named, "{}", proxy.log());
}

/// Some box between the proxy and NATS ends the connection for deliveries again and again.
#[tokio::test]
async fn cuts_of_a_slow_connection_suspend_no_consumer() {
    let server = NatsServer::start();
    let fixture = Fixture::at(&server.url(), ack_wait(1000)).await;
    publish(&fixture, 300, 50 * KB).await;
    let relay = Relay::narrow_to(&server.url());
    relay.flow(Flow::Pass, Flow::Rate(4_000_000));
    let proxy = Proxy::start_at(&relay.nats_url(), &[]);
    proxy.ready().await;
    let fixtures = [fixture];
    let cutting = async {
        for _ in 0..6 {
            tokio::time::sleep(Duration::from_millis(700)).await;
            relay.cut_busiest();
        }
        std::future::pending::<()>().await;
    };
    let received = tokio::select! {
        received = drain(&proxy, &fixtures, 4, 300, 3 * BOUND) => received,
        () = cutting => unreachable!(),
    };
    assert_eq!(received.seen.len(), 300, "{}", proxy.log());
    let refused = |reason: &&String| !["NATS_UNAVAILABLE"].contains(&reason.as_str());
    let refused: Vec<_> = received.refused.iter().filter(refused).collect();
    assert!(refused.is_empty(), "{refused:?}\n{}", proxy.log());
    assert!(!proxy.log().contains("is suspended"), "{}", proxy.log());
}
