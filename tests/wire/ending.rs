//! Consume tells the ends of leases that it has not settled, and each end brings the next message.

use std::collections::HashMap;

use fetch_proxy::{
    pb::{self, ConsumeStart, Outcome, consume_start::Holding, settlement::Action},
    reason::Reason,
};
use testkit::{
    consume::{ConsumeClient, acked, by_number, keep, outcomes, start},
    jetstream::{Fixture, config},
    proxy::{ack, nak, reason},
    stage::served_with,
};

/// The ends that were told: each with its number, its reason, and the way in which it was settled.
async fn ends(stream: &mut ConsumeClient, count: usize) -> Vec<(u64, String, Option<String>)> {
    stream.until(|stream| stream.ended.len() >= count).await;
    let ended = std::mem::take(&mut stream.ended).into_iter();
    let told = |ended: pb::ConsumeEnded| {
        let why = ended.why.unwrap();
        let mut metadata: HashMap<String, String> = why.metadata;
        (ended.number, why.reason, metadata.remove("settled_as"))
    };
    ended.map(told).collect()
}

fn told(number: u64, reason: Reason, by: Option<&str>) -> Vec<(u64, String, Option<String>)> {
    vec![(number, reason.name().to_owned(), by.map(str::to_owned))]
}

#[tokio::test]
async fn end_by_another_way_is_told_once_and_brings_the_next_message() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(6).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = ConsumeClient::open(&client, keep(&fixture, 1, 10, Some(3))).await;
    let mut call = client.clone();
    let first = stream.messages(1).await.remove(0);
    call.ack(ack(&first.token)).await.unwrap();
    assert_eq!(ends(&mut stream, 1).await, told(1, Reason::LeaseSettled, Some("ACK")));
    let second = stream.messages(1).await.remove(0);
    call.nak(nak(&second.token, 60_000)).await.unwrap();
    assert_eq!(ends(&mut stream, 1).await, told(2, Reason::LeaseSettled, Some("NAK")));
    let third = stream.messages(1).await.remove(0);
    stream.settle(3, vec![acked(&third)]);
    assert_eq!(outcomes(&stream.result(3).await), [Outcome::Confirmed]);
    let fourth = stream.messages(1).await.remove(0);
    stream
        .settle(4, vec![acked(&fourth), by_number(fourth.number, Action::Nak(Default::default()))]);
    assert_eq!(stream.result(4).await.failed, 1);
    let fifth = stream.messages(1).await.remove(0);
    assert_eq!(fifth.number, 5);
    assert_eq!(ends(&mut stream, 1).await, told(5, Reason::LeaseExpired, None), "at_most");
    let again = stream.messages(1).await.remove(0);
    let late = by_number(5, Action::Ack(pb::AckAction {}));
    stream.settle(5, vec![late]);
    assert_eq!(stream.result(5).await.failed, 1);
    stream.settle(6, vec![acked(&again)]);
    let stream = stream.close().await;
    assert_eq!(stream.ended, [], "nothing else has ended");
}

#[tokio::test]
async fn token_of_the_same_stream_is_a_settlement_of_this_stream() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(2).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = ConsumeClient::open(&client, keep(&fixture, 1, 10, None)).await;
    let held = stream.messages(1).await.remove(0);
    let action = Some(Action::Ack(pb::AckAction {}));
    stream.settle(1, vec![pb::Settlement { token: held.token, action, number: 0 }]);
    assert_eq!(outcomes(&stream.result(1).await), [Outcome::Confirmed]);
    let next = stream.messages(1).await;
    stream.settle(2, next.iter().map(acked).collect());
    assert_eq!(stream.close().await.ended, []);
}

#[tokio::test]
async fn all_leases_of_a_deleted_consumer_have_ended() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(3).await;
    let (_proxy, client) = served_with(&[]).await;
    let plain = ConsumeStart {
        holding: Some(Holding::Lease(prost_types::Duration { seconds: 60, nanos: 0 })),
        ..start(&fixture, 5)
    };
    let mut stream = ConsumeClient::open(&client, plain).await;
    let held = stream.messages(3).await;
    stream.settle(1, vec![acked(&held[1])]);
    stream.result(1).await;
    let of = fixture.jetstream.get_stream(&fixture.stream).await.unwrap();
    of.delete_consumer(&fixture.consumer).await.unwrap();
    let mut found = ends(&mut stream, 2).await;
    found.sort();
    let gone = |number| told(number, Reason::JetstreamDenied, None);
    assert_eq!(found, [gone(1), gone(3)].concat());
    let status = stream.status().await;
    assert_eq!(reason(&status).1, Reason::ConsumerNotFound.name());
}
