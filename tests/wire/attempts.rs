//! Attempts: a Fetch that may be repeated, and given back. By a real client and a real server.

use std::time::Instant;

use async_nats::{HeaderMap, jetstream::consumer::pull};
use fetch_proxy::pb::{self, EmptyReason, Outcome};
use testkit::{
    jetstream::{Fixture, config},
    millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, extend, fetch, reason, waiting},
    stage::served_with,
};
use tonic_types::StatusExt as _;

fn named(attempt: &str, request: pb::FetchRequest) -> pb::FetchRequest {
    pb::FetchRequest { attempt_id: attempt.to_owned(), ..request }
}

async fn answered(client: &Client, request: pb::FetchRequest) -> pb::FetchResponse {
    client.clone().fetch(request).await.unwrap().into_inner()
}

fn give_back(fixture: &Fixture, attempt: &str) -> pb::GiveBackRequest {
    let (stream, consumer) = (fixture.stream.clone(), fixture.consumer.clone());
    pb::GiveBackRequest { stream, consumer, attempt_id: attempt.to_owned() }
}

async fn given_back(client: &Client, fixture: &Fixture, attempt: &str) -> u32 {
    client.clone().give_back(give_back(fixture, attempt)).await.unwrap().into_inner().messages
}

/// All that a message has, but for its token and the time that its lease has left.
fn lasting(messages: &[pb::Delivery]) -> Vec<pb::Delivery> {
    let lasting = |message: &pb::Delivery| pb::Delivery {
        token: String::new(),
        lease_expire_time: None,
        lease: None,
        ..message.clone()
    };
    messages.iter().map(lasting).collect()
}

#[tokio::test]
async fn repeat_has_the_same_messages_with_all_their_fields() {
    let headers_only = pull::Config { headers_only: true, ..config() };
    for consumer in [config(), headers_only] {
        let fixture = Fixture::new(consumer).await;
        let (_proxy, client) = served_with(&[]).await;
        let mut headers = HeaderMap::new();
        headers.append("Tag", "one");
        headers.append("Tag", "two");
        headers.insert("Other", " three ");
        fixture.publish_with("a.b", headers, "hello").await;
        fixture.publish("c", "").await;
        fixture.publish("d", vec![b'x'; 100_000]).await;
        let request = pb::FetchRequest { linger: millis(20_000), ..fetch(&fixture, 3, 5000) };
        let first = answered(&client, named("a", request.clone())).await;
        assert_eq!(first.messages.len(), 3);
        let again = answered(&client, named("a", request)).await;
        assert_eq!(lasting(&again.messages), lasting(&first.messages));
        assert_eq!(fixture.info().await.num_ack_pending, 3, "nothing was delivered again");
        // Each of the two tokens is that of the lease.
        for (place, one) in first.messages.iter().enumerate() {
            let outcome = client.clone().ack(ack(&one.token)).await.unwrap().into_inner();
            assert_eq!(outcome.outcome(), Outcome::Confirmed);
            let other = &again.messages[place].token;
            let outcome = client.clone().ack(ack(other)).await.unwrap().into_inner();
            assert_eq!(outcome.outcome(), Outcome::Duplicate);
        }
    }
}

#[tokio::test]
async fn repeat_leases_for_its_own_time_and_never_ends_a_lease_earlier() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let (_proxy, client) = served_with(&[]).await;
    let leased = |seconds: i64| {
        named("a", pb::FetchRequest { lease: millis(seconds * 1000), ..fetch(&fixture, 1, 5000) })
    };
    let left = |answer: &pb::FetchResponse| answer.messages[0].lease.unwrap().seconds;
    assert!(left(&answered(&client, leased(60)).await) >= 58);
    assert!(left(&answered(&client, leased(2)).await) >= 50);
    assert!(left(&answered(&client, leased(600)).await) >= 598);
}

#[tokio::test]
async fn attempt_whose_answer_arrived_is_over_and_leases_nothing() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(4).await;
    let (_proxy, client) = served_with(&[]).await;
    let first = answered(&client, named("acked", fetch(&fixture, 1, 5000))).await;
    client.clone().ack(ack(&first.messages[0].token)).await.unwrap();
    let other = answered(&client, named("extended", fetch(&fixture, 1, 5000))).await;
    client.clone().extend(extend(&other.messages[0].token, 60_000)).await.unwrap();
    for attempt in ["acked", "extended"] {
        let late = answered(&client, named(attempt, fetch(&fixture, 1, 60_000))).await;
        assert_eq!((late.messages.len(), late.empty_reason()), (0, EmptyReason::AttemptOver));
    }
    let info = fixture.info().await;
    assert_eq!((info.num_ack_pending, info.num_pending), (1, 2), "a late call leased something");
}

#[tokio::test]
async fn messages_given_back_are_at_another_worker_at_once_on_their_first_attempt() {
    for max_deliver in [-1, 1] {
        let fixture = Fixture::new(pull::Config { max_deliver, ..config() }).await;
        fixture.publish_many(3).await;
        let (proxy, client) = served_with(&[]).await;
        let other = proxy.client().await;
        let all = pb::FetchRequest { linger: millis(20_000), ..fetch(&fixture, 3, 5000) };
        let first = answered(&client, named("a", all.clone())).await;
        let began = Instant::now();
        assert_eq!(given_back(&client, &fixture, "a").await, 3);
        let next = answered(&other, all).await;
        println!("measured: from a give-back to the next worker: {:?}", began.elapsed());
        assert_eq!(lasting(&next.messages), lasting(&first.messages));
        for message in &first.messages {
            let refused = client.clone().ack(ack(&message.token)).await.unwrap_err();
            assert_eq!(reason(&refused).1, "LEASE_EXPIRED");
        }
        for message in &next.messages {
            other.clone().ack(ack(&message.token)).await.unwrap();
        }
        assert_eq!(given_back(&client, &fixture, "a").await, 0, "all of it is settled");
        let info = fixture.info().await;
        assert_eq!((info.num_ack_pending, info.num_redelivered), (0, 0));
    }
}

#[tokio::test]
async fn give_back_ends_a_call_that_waits_and_one_that_comes_later() {
    let fixture = Fixture::new(config()).await;
    let (proxy, client) = served_with(&[]).await;
    let call = waiting(&client, &fixture, named("a", fetch(&fixture, 1, 60_000))).await;
    assert_eq!(given_back(&client, &fixture, "a").await, 0);
    let answer = call.await.unwrap().unwrap().into_inner();
    assert_eq!((answer.messages.len(), answer.empty_reason()), (0, EmptyReason::AttemptOver));
    fixture.publish_many(1).await;
    let late = answered(&client, named("a", fetch(&fixture, 1, 60_000))).await;
    assert_eq!((late.messages.len(), late.empty_reason()), (0, EmptyReason::AttemptOver));
    let next = answered(&proxy.client().await, fetch(&fixture, 1, 60_000)).await;
    assert_eq!(next.messages[0].delivery_count, 1);
}

#[tokio::test]
async fn repeat_takes_the_place_of_a_call_that_waits() {
    let fixture = Fixture::new(config()).await;
    let (proxy, client) = served_with(&[]).await;
    let first = waiting(&client, &fixture, named("a", fetch(&fixture, 1, 60_000))).await;
    let (other, request) = (proxy.client().await, named("a", fetch(&fixture, 1, 60_000)));
    let second = tokio::spawn(async move { other.clone().fetch(request).await });
    let answer = first.await.unwrap().unwrap().into_inner();
    assert_eq!(answer.empty_reason(), EmptyReason::AttemptOver);
    fixture.publish_many(1).await;
    let answer = second.await.unwrap().unwrap().into_inner();
    assert_eq!(answer.messages[0].stream_sequence, 1);
}

#[tokio::test]
async fn repeat_after_settlements_has_the_messages_and_the_results() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(2).await;
    let (_proxy, client) = served_with(&[]).await;
    let first = answered(&client, named("a", fetch(&fixture, 1, 5000))).await;
    let request = testkit::proxy::acking(&first.messages[0].token, fetch(&fixture, 1, 5000));
    let second = answered(&client, named("b", request.clone())).await;
    let again = answered(&client, named("b", request)).await;
    assert_eq!(lasting(&again.messages), lasting(&second.messages));
    assert_eq!(second.results[0].outcome(), Outcome::Confirmed);
    assert_eq!(again.results[0].outcome(), Outcome::Duplicate);
}

#[tokio::test]
async fn repeat_is_served_at_the_limit_of_leases() {
    let proxy = Proxy::start(NatsServer::shared(), &["--max-leases", "1"]);
    let client = proxy.client().await;
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(2).await;
    let first = answered(&client, named("a", fetch(&fixture, 1, 5000))).await;
    let refused = client.clone().fetch(fetch(&fixture, 1, 0)).await.unwrap_err();
    assert_eq!(reason(&refused).1, "LEASE_LIMIT");
    let again = answered(&client, named("a", fetch(&fixture, 1, 0))).await;
    assert_eq!(lasting(&again.messages), lasting(&first.messages));
}

#[tokio::test]
async fn wrong_names_are_refused_with_their_field() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, client) = served_with(&[]).await;
    let long = "a".repeat(129);
    let refused = client.clone().fetch(named(&long, fetch(&fixture, 1, 0))).await.unwrap_err();
    let field = |refused: &tonic::Status| {
        assert_eq!(reason(refused).1, "INVALID_FIELD");
        refused.get_details_bad_request().unwrap().field_violations[0].field.clone()
    };
    assert_eq!(field(&refused), "attempt_id");
    for (request, wrong) in [
        (give_back(&fixture, ""), "attempt_id"),
        (give_back(&fixture, &long), "attempt_id"),
        (pb::GiveBackRequest { stream: "a.b".into(), ..give_back(&fixture, "a") }, "stream"),
        (pb::GiveBackRequest { consumer: String::new(), ..give_back(&fixture, "a") }, "consumer"),
    ] {
        assert_eq!(field(&client.clone().give_back(request).await.unwrap_err()), wrong);
    }
    let longest = "a".repeat(128);
    let empty = answered(&client, named(&longest, fetch(&fixture, 1, 0))).await;
    assert_eq!(empty.empty_reason(), EmptyReason::NoMessages);
}

#[tokio::test]
async fn message_that_left_its_stream_is_given_back_to_nobody() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let (_proxy, client) = served_with(&[]).await;
    let first = answered(&client, named("a", fetch(&fixture, 1, 5000))).await;
    fixture.jetstream.get_stream(&fixture.stream).await.unwrap().purge().await.unwrap();
    assert_eq!(given_back(&client, &fixture, "a").await, 1);
    let refused = client.clone().ack(ack(&first.messages[0].token)).await.unwrap_err();
    assert_eq!(reason(&refused).1, "LEASE_EXPIRED");
}
