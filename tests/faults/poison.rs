//! Stored messages that no NATS client of ours can read: each breaks the connection that brings it.
//! The proxy lives, terminates them, and serves everybody else meanwhile.

use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::pull;
use futures_util::StreamExt as _;
use testkit::{
    BOUND,
    cluster::Cluster,
    eventually,
    jetstream::{Fixture, ack_wait, config},
    nats_server::{NatsServer, binary},
    proxy::{Client, Proxy, ack, fetch, reason},
    raw_nats,
    scrape::Scrape,
    usual,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

const LONE_CR: &[u8] = b"NATS/1.0\r\nA: a lone\rCR\r\n\r\n";
/// One of each kind.
const POISON: &[&[u8]] = &[
    LONE_CR,
    b"NATS/1.0\r\nA: \xff\xfe\r\n\r\n",
    b"NATS/1.0\r\nno token: a\r\n\r\n",
    b"NATS/1.0\r\nno colon\r\n\r\n",
    b"no version\r\n\r\n",
    // Servers from 2.11.15 on take the status line out; then it can be read.
    b"NATS/1.0 evil status\r\n\r\n",
];

/// Fetches what is there and acks all of it; how many good ones that were.
async fn work(client: &mut Client, fixture: &Fixture) -> usize {
    let fetched = client.fetch(fetch(fixture, 100, 500)).await;
    // A call that waits while its connection breaks may have to be repeated.
    let Ok(fetched) = fetched else { return 0 };
    let messages = fetched.into_inner().messages;
    for message in &messages {
        client.ack(ack(&message.token)).await.unwrap();
    }
    messages.iter().filter(|message| message.subject.ends_with(".good")).count()
}

/// How long the other consumer may wait while a connection is made again, where it is usually served in
/// that time. Its ack wait is 30 s, and so is a fence.
fn patience(usual: Duration) -> Duration {
    Duration::from_secs(5) + usual * 20
}

/// Publishes until a message is fetched: one that was under way on a connection when that broke
/// comes back after its ack wait only. How long it took.
async fn served(client: &mut Client, fixture: &Fixture) -> Duration {
    let began = Instant::now();
    loop {
        fixture.publish("good", "good").await;
        if work(client, fixture).await > 0 {
            return began.elapsed();
        }
    }
}

#[tokio::test]
async fn unreadable_messages_are_terminated_and_starve_no_consumer() {
    let server = NatsServer::shared();
    // Messages under way behind an unreadable message come back after their ack wait.
    let (hurt, other) = (Fixture::new(ack_wait(1500)).await, Fixture::new(config()).await);
    let advisories = format!("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{}.*", hurt.stream);
    let mut advisories = hurt.jetstream.client().subscribe(advisories).await.unwrap();
    let mut proxy = Proxy::start(server, &[]);
    let mut client = proxy.client().await;
    let patience = patience(usual(async || served(&mut client, &other).await).await);
    for headers in POISON {
        hurt.publish("good", "good").await;
        hurt.publish_raw(&server.url(), headers).await;
    }
    hurt.publish("good", "good").await;

    let serving_the_other = async {
        let mut client = proxy.client().await;
        let mut slowest = Duration::ZERO;
        for _ in 0..20 {
            slowest = slowest.max(served(&mut client, &other).await);
        }
        slowest
    };
    let serving_the_hurt = async {
        let (mut client, mut good, began) = (client.clone(), 0, Instant::now());
        while good <= POISON.len() {
            good += work(&mut client, &hurt).await;
            assert!(began.elapsed() < BOUND, "{good} of {}:\n{}", POISON.len() + 1, proxy.log());
        }
        good
    };
    let (slowest, good) = tokio::join!(serving_the_other, serving_the_hurt);
    assert_eq!(good, POISON.len() + 1, "a message was delivered twice");
    assert!(slowest < patience, "the other waited {slowest:?}:\n{}", proxy.log());
    // Also what the library says when its task panics.
    for line in proxy.log().lines() {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "not JSON: {line}");
    }
    eventually("all to be settled", || async {
        let _ = client.clone().fetch(fetch(&hurt, 1, 100)).await;
        let info = hurt.info().await;
        (info.num_ack_pending == 0 && info.num_pending == 0).then_some(())
    })
    .await;
    for _ in 0..POISON.len() - 1 {
        let advisory = tokio::time::timeout(BOUND, advisories.next()).await.unwrap().unwrap();
        let advisory: serde_json::Value = serde_json::from_slice(&advisory.payload).unwrap();
        let reason = advisory["reason"].as_str().unwrap();
        assert!(reason.starts_with("fetch-proxy: unreadable headers: "), "{reason}");
    }
    let terminated = "fetchproxy_unreadable_terminated_total";
    let terminated =
        Scrape::of(&proxy.ops).sum(terminated, &[&format!("stream=\"{}\"", hurt.stream)]);
    assert!(terminated >= (POISON.len() - 1) as f64, "{terminated}");
    proxy.signal("TERM");
    assert!(proxy.wait().await.success());
}

#[tokio::test]
async fn flood_of_unreadable_messages_hurts_its_consumer_alone() {
    let server = NatsServer::shared();
    let (hurt, other) = (Fixture::new(ack_wait(1500)).await, Fixture::new(config()).await);
    let proxy = Proxy::start(server, &[]);
    let mut client = proxy.client().await;
    let patience = patience(usual(async || served(&mut client, &other).await).await);
    for _ in 0..30 {
        hurt.publish_raw(&server.url(), LONE_CR).await;
    }
    // One at a time, so that each of them breaks a connection.
    let flood = async {
        let mut client = client.clone();
        eventually("the flood to be over", || {
            let (mut client, hurt) = (client.clone(), &hurt);
            async move {
                let _ = client.fetch(fetch(hurt, 1, 200)).await;
                let info = hurt.info().await;
                (info.num_ack_pending == 0 && info.num_pending == 0).then_some(())
            }
        })
        .await;
        hurt.publish("good", "good").await;
        while work(&mut client, &hurt).await == 0 {}
    };
    let other_goes_on = async {
        let mut client = client.clone();
        for _ in 0..20 {
            let took = served(&mut client, &other).await;
            assert!(took < patience, "the other waited {took:?}:\n{}", proxy.log());
        }
    };
    tokio::join!(flood, other_goes_on);
    let lost = proxy.log().matches("connected to NATS").count();
    assert!(lost <= 4, "the shared connection broke more than once or twice:\n{}", proxy.log());
}

#[tokio::test]
async fn forbidden_search_suspects_one_consumer_and_serves_others() {
    let config = r#"authorization { users: [
        { user: admin, password: admin },
        { user: proxy, password: proxy, permissions: {
            publish: ["$JS.API.CONSUMER.>", "$JS.ACK.>"], subscribe: ["_INBOX.>"] } } ] }"#;
    let server = NatsServer::start_with(binary(), Some(config.into()));
    let admin = server.url().replace("//", "//admin:admin@");
    let hurt = Fixture::at(&admin, ack_wait(1000)).await;
    let other = Fixture::at(&admin, self::config()).await;
    let proxy = Proxy::start_at(&server.url().replace("//", "//proxy:proxy@"), &[]);
    let mut client = proxy.client().await;
    let patience = patience(usual(async || served(&mut client, &other).await).await);
    hurt.publish_raw(&admin, LONE_CR).await;

    let suspected = |status: Status| (reason(&status).1 == "CONSUMER_SUSPECTED").then_some(status);
    let refused = eventually("a refusal", || {
        let (mut client, hurt) = (client.clone(), &hurt);
        async move { client.fetch(fetch(hurt, 1, 5000)).await.err().and_then(suspected) }
    })
    .await;
    assert_eq!(refused.code(), Code::Unavailable, "it is worth repeating");
    let needs = format!("$JS.API.STREAM.MSG.GET.{}", hurt.stream);
    assert_eq!(refused.get_details_error_info().unwrap().metadata["subject"], needs);
    assert!(refused.message().contains(&needs), "{}", refused.message());

    for _ in 0..3 {
        let took = served(&mut client, &other).await;
        assert!(took < patience, "the other waited {took:?}:\n{}", proxy.log());
    }
    let own = Scrape::of(&proxy.ops).value("fetchproxy_nats_own_connections");
    assert_eq!(own, 1.0, "the suspect is set apart:\n{}", proxy.log());
    // Good messages are served between the breaks.
    served(&mut client, &hurt).await;
}

/// JSON cannot say such a subject.
#[tokio::test]
async fn unreadable_subject_is_terminated_and_a_similar_one_is_not() {
    let server = NatsServer::shared();
    let (hurt, other) = (Fixture::new(ack_wait(1000)).await, Fixture::new(config()).await);
    let proxy = Proxy::start(server, &[]);
    let mut client = proxy.client().await;
    hurt.publish("\u{fffd}.good", "good").await;
    let subject = [hurt.stream.as_bytes(), b".\xff"].concat();
    raw_nats::publish(&server.url(), &subject, b"NATS/1.0\r\n\r\n", b"");
    eventually("all to be settled", || async {
        let _ = work(&mut client.clone(), &hurt).await;
        let info = hurt.info().await;
        (info.num_ack_pending == 0 && info.num_pending == 0).then_some(())
    })
    .await;
    let log = proxy.log();
    assert_eq!(log.matches("an unreadable message was terminated").count(), 1, "{log}");
    assert!(log.contains("a subject that is not UTF-8"), "{log}");
    served(&mut client, &other).await;
}

/// Between what this consumer takes there is more than can be looked through.
#[tokio::test]
async fn unreadable_message_is_found_for_a_narrow_consumer() {
    let server = NatsServer::shared();
    let mut hurt = Fixture::new(config()).await;
    let filters = ["raw", "nothing"].map(|subject| format!("{}.{subject}", hurt.stream));
    hurt.consumer = "sparse".to_owned();
    let consumer = pull::Config {
        durable_name: Some(hurt.consumer.clone()),
        filter_subjects: filters.to_vec(),
        ..ack_wait(1500)
    };
    hurt.jetstream.create_consumer_on_stream(consumer, &hurt.stream).await.unwrap();
    let proxy = Proxy::start(server, &[]);
    let mut client = proxy.client().await;
    hurt.publish("raw", "good").await;
    let first = client.fetch(fetch(&hurt, 1, 5000)).await.unwrap().into_inner();
    client.ack(ack(&first.messages[0].token)).await.unwrap();
    hurt.publish_many(3000).await;
    hurt.publish_raw(&server.url(), LONE_CR).await;
    hurt.publish("raw", "good").await;
    let next = eventually("the next good one", || {
        let (mut client, request) = (client.clone(), fetch(&hurt, 1, 2000));
        async move { client.fetch(request).await.ok()?.into_inner().messages.pop() }
    })
    .await;
    client.ack(ack(&next.token)).await.unwrap();
    eventually("all to be settled", || async {
        let info = hurt.info().await;
        (info.num_ack_pending == 0 && info.num_pending == 0).then_some(())
    })
    .await;
    let found = proxy.log().matches("an unreadable message was terminated").count();
    assert_eq!(found, 1, "{}", proxy.log());
}

#[tokio::test]
async fn unreadable_message_of_a_replicated_consumer_is_terminated() {
    let cluster = Cluster::start().await;
    let hurt = cluster.fixture(ack_wait(1500)).await;
    let proxy = Proxy::start_at(&cluster.url(), &[]);
    let mut client = proxy.client().await;
    for _ in 0..5 {
        hurt.publish("good", "good").await;
        hurt.publish_raw(&cluster.nodes[0].url(), LONE_CR).await;
    }
    // One at a time, so that each of them breaks a connection.
    let (mut good, began) = (0, Instant::now());
    while good < 5 {
        assert!(began.elapsed() < BOUND, "{good} of 5:\n{}", proxy.log());
        let Ok(fetched) = client.fetch(fetch(&hurt, 1, 500)).await else { continue };
        for message in fetched.into_inner().messages {
            client.ack(ack(&message.token)).await.unwrap();
            good += 1;
        }
    }
    eventually("all to be settled", || async {
        let _ = client.clone().fetch(fetch(&hurt, 1, 100)).await;
        let info = hurt.info().await;
        (info.num_ack_pending == 0 && info.num_pending == 0).then_some(())
    })
    .await;
    assert_eq!(
        proxy.log().matches("an unreadable message was terminated").count(),
        5,
        "{}",
        proxy.log()
    );
}
