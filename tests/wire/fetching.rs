//! Fetch: what comes, when it comes, and what is said when nothing does.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant, SystemTime},
};

use async_nats::HeaderMap;
use fetch_proxy::pb::{self, EmptyReason, RejectedCause, delivery::Payload};
use prost::Message as _;
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait, config},
    millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch, nak, reason, waiting},
};

async fn proxy() -> (Proxy, Client) {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let client = proxy.client().await;
    (proxy, client)
}

fn data(delivery: &pb::Delivery) -> &[u8] {
    match delivery.payload.as_ref().unwrap() {
        Payload::Data(data) => data,
        Payload::Text(text) => text.as_bytes(),
    }
}

#[tokio::test]
async fn fetch_returns_messages_with_all_their_fields() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    let mut headers = HeaderMap::new();
    headers.append("Tag", "one");
    headers.append("Tag", "two");
    headers.insert("Other", "three");
    fixture.publish_with("a.b", headers, "hello").await;
    fixture.publish("c", "").await;

    // Without a linger an answer may have fewer.
    let all = pb::FetchRequest { linger: millis(20_000), ..fetch(&fixture, 2, 5000) };
    let answer = client.fetch(all).await.unwrap().into_inner();

    assert_eq!(answer.empty_reason(), EmptyReason::Unspecified);
    assert_eq!((answer.messages.len(), answer.rejected.len(), answer.pending), (2, 0, 0));
    let first = &answer.messages[0];
    assert_eq!(first.subject, format!("{}.a.b", fixture.stream));
    assert_eq!(first.payload, Some(Payload::Data("hello".into())));
    assert_eq!(first.headers["Tag"].values, ["one", "two"]);
    assert_eq!(first.headers["Other"].values, ["three"]);
    assert_eq!((first.stream_sequence, first.consumer_sequence, first.delivery_count), (1, 1, 1));
    assert_eq!((first.max_deliver, first.pending), (0, 1));
    let lease = first.lease.unwrap();
    assert!(lease.seconds <= 28, "ack wait 30 s less its margin: {lease:?}");
    let (published, expires) = (first.publish_time.unwrap(), first.lease_expire_time.unwrap());
    assert!(expires.seconds - published.seconds >= 27, "{published:?} {expires:?}");
    let longest = SystemTime::now() + Duration::from_secs(28);
    assert!(SystemTime::try_from(expires).unwrap() <= longest, "{expires:?}");
    // An empty payload is there, and empty.
    assert_eq!(answer.messages[1].payload, Some(Payload::Data("".into())));
}

#[tokio::test]
async fn fetch_waits_for_the_first_message_only() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    let began = Instant::now();
    let open = client.fetch(fetch(&fixture, 10, 60_000));
    let publish = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        fixture.publish("x", "late").await
    };
    let (answer, _) = tokio::join!(open, publish);
    assert_eq!(answer.unwrap().into_inner().messages.len(), 1);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(300) && took < Duration::from_secs(50), "{took:?}");
}

#[tokio::test]
async fn linger_fills_the_batch_after_the_first_message() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    let mut request = fetch(&fixture, 3, 10_000);
    request.linger = millis(20_000);
    let publish = async {
        for number in 0..3 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            fixture.publish("x", number.to_string()).await;
        }
    };
    let (answer, ()) = tokio::join!(client.fetch(request), publish);
    assert_eq!(answer.unwrap().into_inner().messages.len(), 3);
}

#[tokio::test]
async fn empty_fetch_is_ok_and_says_why() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    for wait in [0, 300] {
        let answer = client.fetch(fetch(&fixture, 1, wait)).await.unwrap().into_inner();
        assert_eq!(answer.empty_reason(), EmptyReason::NoMessages);
        assert!(answer.messages.is_empty());
        assert_eq!((answer.pending, answer.ack_pending), (0, 0));
    }
}

#[tokio::test]
async fn held_queue_is_distinguished_from_an_empty_one() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    fixture.publish_many(2).await;
    let both = pb::FetchRequest { linger: millis(20_000), ..fetch(&fixture, 2, 5000) };
    let taken = client.fetch(both).await.unwrap().into_inner();
    assert_eq!(
        (taken.messages.len(), taken.ack_pending),
        (2, 0),
        "counted only for an empty answer"
    );
    client.nak(nak(&taken.messages[0].token, 60_000)).await.unwrap();
    // One is held, and of the other the delay of a Nak runs.
    let empty = client.fetch(fetch(&fixture, 1, 300)).await.unwrap().into_inner();
    assert_eq!(empty.empty_reason(), EmptyReason::NoMessages);
    assert_eq!((empty.pending, empty.ack_pending), (0, 2));
}

#[tokio::test]
async fn available_messages_are_returned_without_waiting() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, client) = proxy().await;
    fixture.publish_many(3).await;
    // A proxy on a busy machine can take a slow delivery for none, and answer before it comes.
    let given = AtomicUsize::new(0);
    eventually("three messages that are there", || async {
        let answer = client.clone().fetch(fetch(&fixture, 10, 0)).await.unwrap().into_inner();
        let before = given.fetch_add(answer.messages.len(), Ordering::Relaxed);
        (before + answer.messages.len() == 3).then_some(())
    })
    .await;
}

#[tokio::test]
async fn full_consumer_is_distinguished_from_an_empty_one() {
    let fixture = Fixture::new(async_nats::jetstream::consumer::pull::Config {
        max_ack_pending: 2,
        ..config()
    })
    .await;
    let (_proxy, mut client) = proxy().await;
    fixture.publish_many(5).await;
    // Without a linger an answer may have fewer.
    let most = pb::FetchRequest { linger: millis(1000), ..fetch(&fixture, 10, 5000) };
    let first = client.fetch(most).await.unwrap().into_inner();
    assert_eq!(first.messages.len(), 2, "no more than max_ack_pending");
    let second = client.fetch(fetch(&fixture, 10, 300)).await.unwrap().into_inner();
    assert_eq!(second.empty_reason(), EmptyReason::MaxAckPending);
    assert_eq!((second.pending, second.ack_pending), (3, 2));
    client.ack(ack(&first.messages[0].token)).await.unwrap();
    let third = client.fetch(fetch(&fixture, 10, 5000)).await.unwrap().into_inner();
    assert_eq!(third.messages.len(), 1);
}

#[tokio::test]
async fn paused_consumer_is_distinguished_from_an_empty_one() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    fixture.publish("x", "1").await;
    let nats = async_nats::connect(NatsServer::shared().url()).await.unwrap();
    let pause = format!("$JS.API.CONSUMER.PAUSE.{}.{}", fixture.stream, fixture.consumer);
    let until = r#"{"pause_until":"2199-01-01T00:00:00Z"}"#;
    let answer = nats.request(pause, until.into()).await.unwrap().payload;
    let answer: serde_json::Value = serde_json::from_slice(&answer).unwrap();
    assert_eq!(answer["paused"], true, "{answer}");
    let answer = client.fetch(fetch(&fixture, 1, 200)).await.unwrap().into_inner();
    assert_eq!(answer.empty_reason(), EmptyReason::Paused);
}

#[tokio::test]
async fn answer_comes_before_the_deadline_of_its_caller() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    let mut request = tonic::Request::new(fetch(&fixture, 1, 60_000));
    // The proxy leaves a tenth of it for its answer.
    request.set_timeout(Duration::from_secs(5));
    let answer = client.fetch(request).await.unwrap().into_inner();
    assert_eq!(answer.empty_reason(), EmptyReason::NoMessages);
}

#[tokio::test]
async fn answer_never_exceeds_its_bytes_and_loses_nothing() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    for number in 0..30 {
        let mut headers = HeaderMap::new();
        headers.insert("Number", number.to_string().as_str());
        fixture.publish_with("big", headers, vec![b'x'; 1000 * (1 + number % 7)]).await;
    }
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 30 {
        let mut request = fetch(&fixture, 100, 5000);
        request.max_bytes = 10_000;
        let answer = client.fetch(request).await.unwrap().into_inner();
        assert!(answer.encoded_len() <= 10_000, "{}", answer.encoded_len());
        assert!(!answer.messages.is_empty());
        for message in &answer.messages {
            assert_eq!(message.delivery_count, 1, "nothing was given back");
            assert!(seen.insert(message.stream_sequence), "delivered twice");
            client.ack(ack(&message.token)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn unset_byte_limit_fits_a_stock_client() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    for _ in 0..8 {
        fixture.publish("big", vec![0; 1_000_000]).await;
    }
    let mut got = 0;
    while got < 8 {
        // The client's own limit is 4 MiB: a larger answer would fail here.
        let answer = client.fetch(fetch(&fixture, 100, 5000)).await.unwrap().into_inner();
        assert!(!answer.messages.is_empty());
        got += answer.messages.len();
        for message in &answer.messages {
            client.ack(ack(&message.token)).await.unwrap();
        }
    }
}

#[tokio::test]
async fn message_too_large_for_the_answer_is_rejected_with_a_token() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    fixture.publish("big", vec![0; 100_000]).await;
    fixture.publish("small", "s").await;
    let mut request = fetch(&fixture, 1, 5000);
    request.max_bytes = 2000;

    let answer = client.fetch(request.clone()).await.unwrap().into_inner();
    assert!(answer.messages.is_empty());
    assert_eq!(answer.empty_reason(), EmptyReason::Rejected);
    assert!(answer.encoded_len() <= 2000);
    let rejected = &answer.rejected[0];
    assert_eq!(rejected.cause(), RejectedCause::TooLarge);
    assert_eq!((rejected.size, rejected.stream_sequence), (100_000, 1));
    assert!(rejected.data.is_empty() && rejected.lease_expire_time.is_some());
    let left = rejected.lease.unwrap();
    assert!((20..=28).contains(&left.seconds), "the ack wait less its margin: {left:?}");

    // It blocks nobody, and whoever has the room can have it.
    let small = client.fetch(request).await.unwrap().into_inner();
    assert_eq!(small.messages[0].stream_sequence, 2);
    client.nak(nak(&rejected.token, 0)).await.unwrap();
    let big = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    assert_eq!(data(&big.messages[0]).len(), 100_000);
}

#[tokio::test]
async fn message_that_fails_its_codec_is_terminated_and_returned() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    fixture.publish("good", r#"{"a":1}"#).await;
    let mut headers = HeaderMap::new();
    headers.insert("Kept", "yes");
    fixture.publish_with("bad", headers, "{oops").await;
    fixture.publish("good", "2").await;
    let mut request = fetch(&fixture, 10, 5000);
    request.codec = pb::Codec::Json.into();

    let answer = client.fetch(request.clone()).await.unwrap().into_inner();

    let texts: Vec<_> = answer.messages.iter().map(|message| message.payload.clone()).collect();
    let text = |text: &str| Some(Payload::Text(text.to_owned()));
    assert_eq!(texts, [text(r#"{"a":1}"#), text("2")]);
    let rejected = &answer.rejected[0];
    assert_eq!(rejected.cause(), RejectedCause::Codec);
    assert_eq!((rejected.data.as_ref(), rejected.size), (b"{oops".as_ref(), 5));
    assert_eq!(rejected.headers["Kept"].values, ["yes"]);
    assert!(rejected.detail.starts_with("not JSON"), "{}", rejected.detail);
    assert!(rejected.token.is_empty() && rejected.lease.is_none(), "it is settled already");
    for message in &answer.messages {
        client.ack(ack(&message.token)).await.unwrap();
    }
    let info = fixture.info().await;
    assert_eq!((info.num_ack_pending, info.num_pending, info.ack_floor.stream_sequence), (0, 0, 3));

    fixture.publish("bad", "{oops").await;
    let only_bad = client.fetch(request).await.unwrap().into_inner();
    assert_eq!(only_bad.empty_reason(), EmptyReason::Rejected);
}

#[tokio::test]
async fn auto_returns_text_if_possible_and_terminates_nothing() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    fixture.publish("t", "text").await;
    fixture.publish("b", vec![0xff, 0]).await;
    let mut request = fetch(&fixture, 10, 5000);
    request.codec = pb::Codec::Auto.into();
    let answer = client.fetch(request).await.unwrap().into_inner();
    assert_eq!(answer.messages[0].payload, Some(Payload::Text("text".to_owned())));
    assert_eq!(answer.messages[1].payload, Some(Payload::Data(vec![0xff, 0].into())));
}

/// Cancels a call, and waits until the proxy has read that: frames of one connection are in order.
pub(super) async fn cancel<T>(call: tokio::task::JoinHandle<T>, client: &Client) {
    call.abort();
    assert!(call.await.is_err(), "it was to be cancelled while it waits");
    client.clone().ack(ack("not a token")).await.unwrap_err();
}

#[tokio::test]
async fn cancelled_fetch_leaves_its_messages_to_the_next() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = proxy().await;
    for round in 0..20 {
        let mut other = client.clone();
        let request = fetch(&fixture, 5, 20_000);
        let call = tokio::spawn(async move { other.fetch(request).await });
        tokio::time::sleep(Duration::from_millis(round % 7)).await;
        cancel(call, &client).await;
        fixture.publish("x", round.to_string()).await;
        // JetStream alone would deliver the message again after 30 s.
        let answer = client.fetch(fetch(&fixture, 1, 20_000)).await.unwrap().into_inner();
        assert_eq!(answer.messages.len(), 1, "round {round}: the message did not come back");
        client.ack(ack(&answer.messages[0].token)).await.unwrap();
    }
}

#[tokio::test]
async fn cancelled_fetch_never_uses_up_a_last_attempt() {
    let last = async_nats::jetstream::consumer::pull::Config { max_deliver: 1, ..ack_wait(2000) };
    let fixture = Fixture::new(last).await;
    let (_proxy, mut client) = proxy().await;
    for round in 0..8 {
        let call = waiting(&client, &fixture, fetch(&fixture, 5, 20_000)).await;
        cancel(call, &client).await;
        fixture.publish("x", round.to_string()).await;
        if round % 4 == 3 {
            // Kept alive beyond its ack wait, for lack of anybody to give it to.
            tokio::time::sleep(Duration::from_millis(3500)).await;
        }
        let answer = client.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
        assert_eq!(answer.messages.len(), 1, "round {round}");
        assert_eq!((answer.messages[0].delivery_count, answer.messages[0].max_deliver), (1, 1));
        client.ack(ack(&answer.messages[0].token)).await.unwrap();
    }
}

#[tokio::test]
async fn many_waiters_share_one_pull_and_each_gets_its_own() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, client) = proxy().await;
    let mut waiting = tokio::task::JoinSet::new();
    for _ in 0..50 {
        let (mut client, request) = (client.clone(), fetch(&fixture, 1, 20_000));
        waiting.spawn(async move { client.fetch(request).await.unwrap().into_inner() });
    }
    fixture.publish_many(50).await;
    let mut seen = std::collections::BTreeSet::new();
    while let Some(answer) = waiting.join_next().await {
        let answer = answer.unwrap();
        assert_eq!(answer.messages.len(), 1);
        assert!(seen.insert(answer.messages[0].stream_sequence));
    }
    assert_eq!(seen.len(), 50);
}

#[tokio::test]
async fn too_many_leases_or_waiters_are_refused_at_once() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--max-leases", "2", "--max-waiters", "1"]);
    let mut client = proxy.client().await;
    let open = waiting(&client, &fixture, fetch(&fixture, 1, 20_000)).await;
    let refused = client.fetch(fetch(&fixture, 1, 0)).await.unwrap_err();
    let exhausted = tonic::Code::ResourceExhausted;
    assert_eq!(reason(&refused), (exhausted, "WAITER_LIMIT".to_owned()));
    assert!(refused.metadata().contains_key("grpc-retry-pushback-ms"));
    fixture.publish_many(4).await;
    let first = open.await.unwrap().unwrap().into_inner();
    let second = client.fetch(fetch(&fixture, 5, 5000)).await.unwrap().into_inner();
    assert_eq!((first.messages.len(), second.messages.len()), (1, 1));
    let refused = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap_err();
    assert_eq!(reason(&refused), (exhausted, "LEASE_LIMIT".to_owned()));
    client.ack(ack(&first.messages[0].token)).await.unwrap();
    let again = client.fetch(fetch(&fixture, 5, 5000)).await.unwrap().into_inner();
    assert_eq!(again.messages.len(), 1);
}
