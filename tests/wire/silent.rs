//! Consume with a client that is silent, and a stream on which nothing comes.

use async_nats::jetstream::consumer::pull;
use fetch_proxy::{
    pb::{ConsumeStart, EmptyReason, consume_start::Holding},
    reason::Reason,
};
use testkit::{
    consume::{ConsumeClient, acked, keep, leases, seconds, start},
    eventually,
    jetstream::{Fixture, ack_wait, config},
    nats_server::NatsServer,
    proxy::reason,
    scrape::Scrape,
    stage::served_with,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

fn assert_silent(status: &Status, direction: &str) {
    let name = Reason::StreamSilent.name().to_owned();
    assert_eq!(reason(status), (Code::DeadlineExceeded, name));
    let info = status.get_details_error_info().unwrap();
    assert_eq!(info.metadata["direction"], direction);
}

#[tokio::test]
async fn client_without_signs_of_life_loses_what_its_stream_keeps() {
    let fixture = Fixture::new(ack_wait(600_000)).await;
    fixture.publish_many(2).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = ConsumeClient::open(&client, keep(&fixture, 2, 1, None)).await;
    let held = stream.messages(2).await;
    stream.listen(4000).await;
    stream.settle(1, vec![acked(&held[0])]);
    assert_eq!(stream.result(1).await.failed, 0, "its signs of life were enough");
    stream.fall_silent();
    assert_silent(&stream.status().await, "sending");
    let mut next = ConsumeClient::open(&client, start(&fixture, 2)).await;
    let found = next.messages(1).await.remove(0);
    assert_eq!((found.stream_sequence, found.delivery_count), (held[1].stream_sequence, 2));
    next.settle(1, vec![acked(&found)]);
    next.close().await;
}

#[tokio::test]
async fn client_that_does_not_read_loses_its_stream() {
    let lease =
        ConsumeStart { holding: Some(Holding::Lease(seconds(3))), ..ConsumeStart::default() };
    for keeps in [true, false] {
        let fixture = Fixture::new(ack_wait(600_000)).await;
        for _ in 0..40 {
            fixture.publish("x", vec![b'x'; 64 * 1024]).await;
        }
        let (proxy, client) = served_with(&[]).await;
        let kept = keep(&fixture, 40, 1, None);
        let holding = if keeps { kept.holding } else { lease.holding };
        let stream = ConsumeClient::open(&client, ConsumeStart { holding, ..kept }).await;
        eventually("the end of the stream", || async {
            let began = fixture.info().await.num_ack_pending > 0;
            let waiters = Scrape::of(&proxy.ops).sum("fetchproxy_waiters", &[]);
            (began && waiters == 0.0).then_some(())
        })
        .await;
        // It still reads what was on its way.
        assert_silent(&stream.status().await, "reading");
        let mut other = ConsumeClient::open(&proxy.client().await, start(&fixture, 40)).await;
        let mut found = other.messages(40).await;
        found.dedup_by_key(|message| message.stream_sequence);
        assert_eq!(found.len(), 40, "all of them are free");
        other.close().await;
    }
}

/// The reason of the next heartbeat without a message.
async fn idle(stream: &mut ConsumeClient) -> (EmptyReason, u64) {
    stream.idle.clear();
    stream.until(|stream| !stream.idle.is_empty()).await;
    (stream.idle[0].reason(), stream.idle[0].pending)
}

fn each_second(fixture: &Fixture, leases: u32) -> ConsumeStart {
    ConsumeStart { heartbeat: Some(seconds(1)), ..start(fixture, leases) }
}

#[tokio::test]
async fn heartbeat_without_a_message_says_why_nothing_comes() {
    let fixture = Fixture::new(pull::Config { max_ack_pending: 3, ..config() }).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = ConsumeClient::open(&client, each_second(&fixture, 2)).await;
    assert_eq!(idle(&mut stream).await, (EmptyReason::NoMessages, 0));
    fixture.publish_many(5).await;
    stream.messages(2).await;
    assert_eq!(idle(&mut stream).await, (EmptyReason::Credit, 0));
    stream.credit(leases(1, 10));
    stream.messages(1).await;
    assert_eq!(idle(&mut stream).await, (EmptyReason::MaxAckPending, 2));
    stream.credit(leases(2, 0));
    assert_eq!(idle(&mut stream).await, (EmptyReason::Credit, 0), "it is paused by its client");
    stream.close().await;
}

#[tokio::test]
async fn paused_consumer_is_told_of_at_a_heartbeat() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let nats = async_nats::connect(NatsServer::shared().url()).await.unwrap();
    let pause = format!("$JS.API.CONSUMER.PAUSE.{}.{}", fixture.stream, fixture.consumer);
    let until = r#"{"pause_until":"2199-01-01T00:00:00Z"}"#;
    nats.request(pause, until.into()).await.unwrap();
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = ConsumeClient::open(&client, each_second(&fixture, 2)).await;
    assert_eq!(idle(&mut stream).await, (EmptyReason::Paused, 1));
    stream.close().await;
}

#[tokio::test]
async fn limit_of_leases_is_told_of_at_a_heartbeat() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(5).await;
    let (_proxy, client) = served_with(&["--max-leases-per-consumer", "2"]).await;
    let mut stream = ConsumeClient::open(&client, each_second(&fixture, 5)).await;
    let held = stream.messages(2).await;
    assert_eq!(idle(&mut stream).await, (EmptyReason::LeaseLimit, 0));
    stream.settle(1, held.iter().map(acked).collect());
    assert_eq!(stream.messages(2).await.len(), 2);
    stream.close().await;
}

#[tokio::test]
async fn message_since_the_last_heartbeat_needs_no_reason() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = ConsumeClient::open(&client, each_second(&fixture, 100)).await;
    for round in 1..=12 {
        fixture.publish_many(1).await;
        stream.messages(1).await;
        stream.listen(250).await;
        if round > 1 {
            assert_eq!(stream.idle, [], "in round {round}");
        }
    }
    assert_eq!(idle(&mut stream).await.0, EmptyReason::NoMessages);
    stream.close().await;
}
