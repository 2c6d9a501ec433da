//! Settlements on a Fetch: the loop of a worker is one call. What is settled, what is fetched then, and what the
//! answer says if one of both fails.

use std::time::{Duration, Instant};

use fetch_proxy::{
    pb::{self, EmptyReason, Outcome, Settlement, settlement::Action},
    reason::Reason,
};
use prost::Message as _;
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch, reason, take, take_one, waiting},
    signal,
    stage::served_with,
};
use tonic_types::StatusExt as _;

use super::fetching::cancel;

fn settlement(token: &str, action: Action) -> Settlement {
    Settlement { number: 0, token: token.to_owned(), action: Some(action) }
}

fn acked(token: &str) -> Settlement {
    settlement(token, Action::Ack(pb::AckAction {}))
}

/// A Fetch of one message, which settles first.
fn next(fixture: &Fixture, settlements: Vec<Settlement>, wait: i64) -> pb::FetchRequest {
    pb::FetchRequest { settlements, ..fetch(fixture, 1, wait) }
}

async fn answered(client: &Client, request: pb::FetchRequest) -> pb::FetchResponse {
    client.clone().fetch(request).await.unwrap().into_inner()
}

fn outcomes(answer: &pb::FetchResponse) -> Vec<Outcome> {
    answer.results.iter().map(pb::SettleResult::outcome).collect()
}

/// The Fetch has failed for this reason after it has settled one message.
fn assert_failed_after_settling(answer: &pb::FetchResponse, expected: Reason) {
    assert_eq!(answer.empty_reason(), EmptyReason::FetchFailed, "{answer:?}");
    assert_eq!((answer.results.len(), answer.failed, answer.messages.len()), (1, 0, 0));
    let error = answer.error.as_ref().unwrap();
    assert_eq!(error.reason, expected.name());
    let delay = expected.retry_after().map(|delay| delay.try_into().unwrap());
    assert_eq!(error.retry_delay, delay);
}

#[tokio::test]
async fn worker_loops_with_one_call_a_message() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(5).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut settlements = Vec::new();
    for sequence in 1..=5 {
        let answer = answered(&client, next(&fixture, settlements, 10_000)).await;
        let [message] = &answer.messages[..] else { panic!("{answer:?}") };
        assert_eq!((message.stream_sequence, message.delivery_count), (sequence, 1));
        assert_eq!(outcomes(&answer), vec![Outcome::Confirmed; usize::from(sequence > 1)]);
        assert_eq!(fixture.info().await.num_ack_pending, 1, "the one of this answer");
        settlements = vec![acked(&message.token)];
    }
    let last = answered(&client, next(&fixture, settlements, 0)).await;
    assert_eq!(
        (last.empty_reason(), outcomes(&last)),
        (EmptyReason::NoMessages, vec![Outcome::Confirmed])
    );
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn each_settlement_has_its_result_in_order_and_messages_follow() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(6).await;
    let (_proxy, client) = served_with(&[]).await;
    let taken = take(&client, fetch(&fixture, 5, 10_000)).await;
    let token = |place: usize| taken[place].token.as_str();
    let settlements = vec![
        settlement(token(0), Action::Extend(pb::ExtendAction { lease: millis(60_000) })),
        settlement(token(1), Action::Nak(pb::NakAction { delay: millis(60_000) })),
        acked(token(2)),
        settlement(token(3), Action::Term(pb::TermAction { reason: "no".to_owned() })),
        acked(token(4)),
        acked(token(4)),
    ];
    let answer = answered(&client, next(&fixture, settlements, 10_000)).await;
    let done = Outcome::Confirmed;
    assert_eq!(outcomes(&answer), [Outcome::Extended, done, done, done, done, Outcome::Duplicate]);
    assert!(answer.results[0].lease_expire_time.is_some());
    assert!(answer.results[1].redeliver_time.is_some());
    assert_eq!((answer.failed, answer.messages[0].stream_sequence), (0, 6));
    // The extended one, the delayed one, and the one of this answer.
    assert_eq!(fixture.info().await.num_ack_pending, 3);
}

#[tokio::test]
async fn settled_message_of_another_consumer_is_accepted() {
    let (fixture, other) = (Fixture::new(config()).await, Fixture::new(config()).await);
    fixture.publish_many(1).await;
    other.publish_many(1).await;
    let (_proxy, client) = served_with(&[]).await;
    let token = take_one(&client, &other).await.token;
    let answer = answered(&client, next(&fixture, vec![acked(&token)], 10_000)).await;
    assert_eq!((outcomes(&answer), answer.messages.len()), (vec![Outcome::Confirmed], 1));
    assert_eq!(other.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn failed_settlement_answers_at_once_and_nothing_is_fetched() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(2).await;
    let (_proxy, client) = served_with(&[]).await;
    let token = take_one(&client, &fixture).await.token;
    // Nothing waits for sixty seconds, although the queue of this consumer is empty at the end.
    let settlements = vec![acked(&token), acked("nonsense")];
    let answer = answered(&client, next(&fixture, settlements, 60_000)).await;
    assert_eq!((answer.empty_reason(), answer.failed), (EmptyReason::Settle, 1));
    assert_eq!((answer.messages.len(), answer.error.is_none()), (0, true));
    assert_eq!(answer.results[0].outcome(), Outcome::Confirmed);
    assert_eq!(answer.results[1].error.as_ref().unwrap().reason, "TOKEN_INVALID");
    let info = fixture.info().await;
    assert_eq!((info.num_ack_pending, info.num_pending), (0, 1), "something was fetched");
    // The repeat of the good one settles nothing, and fetches.
    let again = answered(&client, next(&fixture, vec![acked(&token)], 10_000)).await;
    assert_eq!(outcomes(&again), [Outcome::Duplicate]);
    assert_eq!((again.messages[0].stream_sequence, again.messages[0].delivery_count), (2, 1));
}

#[tokio::test]
async fn wrong_field_settles_nothing_and_fetches_nothing() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(2).await;
    let (_proxy, client) = served_with(&[]).await;
    let token = take_one(&client, &fixture).await.token;
    let good = acked(&token);
    let with = |wrong: Settlement| next(&fixture, vec![good.clone(), wrong], 0);
    let nak = |delay| settlement(&token, Action::Nak(pb::NakAction { delay: millis(delay) }));
    let base = || next(&fixture, vec![good.clone()], 0);
    for (request, field) in [
        (next(&fixture, vec![good.clone(); 1001], 0), "settlements"),
        (
            with(Settlement { number: 0, token: token.clone(), action: None }),
            "settlements[1].action",
        ),
        (with(acked("")), "settlements[1].token"),
        (with(nak(-1)), "settlements[1].nak.delay"),
        (with(nak(90_000_000)), "settlements[1].nak.delay"),
        (pb::FetchRequest { confirmation: 9, ..base() }, "confirmation"),
        (pb::FetchRequest { confirmation: 9, ..fetch(&fixture, 1, 0) }, "confirmation"),
        (pb::FetchRequest { lease: millis(10), ..base() }, "lease"),
        (pb::FetchRequest { stream: "a.b".into(), ..base() }, "stream"),
    ] {
        let refused = client.clone().fetch(request).await.unwrap_err();
        assert_eq!(reason(&refused).1, "INVALID_FIELD", "{field}");
        let named = &refused.get_details_bad_request().unwrap().field_violations[0].field;
        assert_eq!(named, field);
    }
    let info = fixture.info().await;
    assert_eq!((info.num_ack_pending, info.num_pending), (1, 1), "something happened after all");
}

#[tokio::test]
async fn thousand_settlements_fit_a_fetch_and_its_answer_keeps_its_size() {
    const MOST: usize = 64 * 1024;
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(900).await;
    let (_proxy, client) = served_with(&[]).await;
    let taken = take(&client, fetch(&fixture, 900, 10_000)).await;
    let delayed = |message: &pb::Delivery| {
        settlement(&message.token, Action::Nak(pb::NakAction { delay: millis(60_000) }))
    };
    // Delayed messages count in the 1000 of max_ack_pending, so some are named twice.
    let settlements: Vec<_> = taken.iter().chain(&taken[..100]).map(delayed).collect();
    for number in 0..100 {
        fixture.publish("large", vec![b'x'; 1000 + number]).await;
    }
    let max_bytes = u32::try_from(MOST).unwrap();
    let linger = millis(2000);
    let request =
        pb::FetchRequest { n: 1000, max_bytes, linger, ..next(&fixture, settlements, 10_000) };
    let answer = answered(&client, request).await;
    assert_eq!((answer.results.len(), answer.failed), (1000, 0));
    let results = pb::FetchResponse { results: answer.results.clone(), ..Default::default() };
    assert!(results.encoded_len() > 10_000, "the test needs results of some size");
    assert!(
        !answer.messages.is_empty() && answer.encoded_len() <= MOST,
        "{}",
        answer.encoded_len()
    );
}

#[tokio::test]
async fn large_results_leave_room_for_a_message() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(201).await;
    let (_proxy, client) = served_with(&[]).await;
    let taken = take(&client, fetch(&fixture, 200, 10_000)).await;
    let settlements: Vec<_> = taken.iter().map(|message| acked(&message.token)).collect();
    // The results alone are larger than this.
    let request = pb::FetchRequest { max_bytes: 1024, ..next(&fixture, settlements, 10_000) };
    let answer = answered(&client, request).await;
    assert_eq!((answer.results.len(), answer.failed), (200, 0));
    assert_eq!(answer.messages.len(), 1, "{:?}", answer.rejected);
}

#[tokio::test]
async fn settlement_that_is_sent_is_not_waited_for() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(2).await;
    let (_proxy, client) = served_with(&[]).await;
    let token = take_one(&client, &fixture).await.token;
    let confirmation = pb::Confirmation::Sent.into();
    let request = pb::FetchRequest { confirmation, ..next(&fixture, vec![acked(&token)], 10_000) };
    let answer = answered(&client, request).await;
    assert_eq!((outcomes(&answer), answer.messages.len()), (vec![Outcome::Sent], 1));
    eventually("the ack to arrive", || async {
        (fixture.info().await.num_ack_pending == 1).then_some(())
    })
    .await;
}

#[tokio::test]
async fn worker_loops_although_only_one_lease_is_allowed() {
    let (fixture, other) = (Fixture::new(config()).await, Fixture::new(config()).await);
    fixture.publish_many(20).await;
    other.publish_many(1).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--max-leases", "1"]);
    let client = proxy.client().await;
    let mut token = take_one(&client, &fixture).await.token;
    for sequence in 2..=20 {
        let answer = answered(&client, next(&fixture, vec![acked(&token)], 10_000)).await;
        assert_eq!(outcomes(&answer), [Outcome::Confirmed]);
        assert_eq!(answer.messages.len(), 1, "{sequence}: {answer:?}");
        token.clone_from(&answer.messages[0].token);
    }
    // An Extend frees no place, so another consumer has none.
    let longer = settlement(&token, Action::Extend(pb::ExtendAction { lease: millis(60_000) }));
    let full = answered(&client, next(&other, vec![longer], 10_000)).await;
    assert_failed_after_settling(&full, Reason::LeaseLimit);
    assert_eq!(outcomes(&full), [Outcome::Extended]);
}

#[tokio::test]
async fn fetch_that_fails_after_settling_tells_both() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let (_proxy, client) = served_with(&[]).await;
    let token = take_one(&client, &fixture).await.token;
    let absent =
        pb::FetchRequest { consumer: "nobody".into(), ..next(&fixture, vec![acked(&token)], 0) };
    let answer = answered(&client, absent.clone()).await;
    assert_failed_after_settling(&answer, Reason::ConsumerNotFound);
    assert_eq!(outcomes(&answer), [Outcome::Confirmed]);
    assert_eq!(fixture.info().await.num_ack_pending, 0);
    // Without settlements there is nothing to hide, so it is a status.
    let bare = pb::FetchRequest { settlements: Vec::new(), ..absent };
    let refused = client.clone().fetch(bare).await.unwrap_err();
    assert_eq!(reason(&refused).1, "CONSUMER_NOT_FOUND");
}

#[tokio::test]
async fn lost_nats_after_a_settlement_hides_no_result() {
    let mut server = NatsServer::start();
    let fixture = Fixture::on(&server, config()).await;
    fixture.publish_many(1).await;
    let proxy = Proxy::start(&server, &[]);
    let client = proxy.client().await;
    let token = take_one(&client, &fixture).await.token;
    server.kill();
    eventually("the loss to be noticed", || async {
        let refused = client.clone().fetch(fetch(&fixture, 1, 0)).await.err()?;
        (reason(&refused).1 == "NATS_UNAVAILABLE").then_some(())
    })
    .await;
    // The only settlement that needs no NATS.
    let longer = settlement(&token, Action::Extend(pb::ExtendAction { lease: millis(60_000) }));
    let answer = answered(&client, next(&fixture, vec![longer], 0)).await;
    assert_failed_after_settling(&answer, Reason::NatsUnavailable);
    // An Ack is not applied, so nothing is fetched, and the lease stays.
    let answer = answered(&client, next(&fixture, vec![acked(&token)], 60_000)).await;
    assert_eq!((answer.empty_reason(), answer.failed), (EmptyReason::Settle, 1));
    assert_eq!(answer.results[0].error.as_ref().unwrap().reason, "NATS_UNAVAILABLE");
    server.restart();
    eventually("the ack to go through", || async { client.clone().ack(ack(&token)).await.ok() })
        .await;
}

#[tokio::test]
async fn draining_proxy_settles_and_says_that_it_fetches_no_more() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-timeout", "15s"]);
    let client = proxy.client().await;
    let token = take_one(&client, &fixture).await.token;
    // One call that waits, so that the drain has something to wait for.
    let open = waiting(&client, &fixture, fetch(&fixture, 1, 60_000)).await;
    proxy.signal("TERM");
    eventually("the drain", || async { client.clone().fetch(fetch(&fixture, 1, 0)).await.err() })
        .await;
    let answer = answered(&client, next(&fixture, vec![acked(&token)], 60_000)).await;
    assert_failed_after_settling(&answer, Reason::Draining);
    assert_eq!(outcomes(&answer), [Outcome::Confirmed]);
    assert_eq!(open.await.unwrap().unwrap().into_inner().empty_reason(), EmptyReason::Draining);
    drop(client);
    assert!(proxy.wait().await.success(), "{}", proxy.log());
}

#[tokio::test]
async fn time_of_the_settlements_is_a_part_of_the_wait() {
    const STOPPED: Duration = Duration::from_secs(3);
    const WAIT: Duration = Duration::from_secs(4);
    let server = NatsServer::start();
    let fixture = Fixture::on(&server, config()).await;
    fixture.publish_many(1).await;
    let proxy = Proxy::start(&server, &[]);
    let client = proxy.client().await;
    let token = take_one(&client, &fixture).await.token;
    signal(server.pid(), "STOP");
    let began = Instant::now();
    let call = tokio::spawn({
        let (client, request) = (client.clone(), next(&fixture, vec![acked(&token)], 4000));
        async move { answered(&client, request).await }
    });
    tokio::time::sleep(STOPPED).await;
    signal(server.pid(), "CONT");
    let stopped = began.elapsed();
    let answer = call.await.unwrap();
    let took = began.elapsed();
    assert_eq!(
        (answer.empty_reason(), outcomes(&answer)),
        (EmptyReason::NoMessages, vec![Outcome::Confirmed])
    );
    assert!(took >= WAIT && took < stopped + WAIT, "{took:?}, of which NATS stood {stopped:?}");
}

#[tokio::test]
async fn cancelled_call_has_settled_and_loses_no_message() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let (_proxy, client) = served_with(&[]).await;
    let token = take_one(&client, &fixture).await.token;
    let call = waiting(&client, &fixture, next(&fixture, vec![acked(&token)], 60_000)).await;
    assert_eq!(fixture.info().await.num_ack_pending, 0, "settled before the wait");
    cancel(call, &client).await;
    fixture.publish_many(1).await;
    let message = take_one(&client, &fixture).await;
    assert_eq!(message.stream_sequence, 2);
    let again = client.clone().ack(ack(&token)).await.unwrap().into_inner();
    assert_eq!(again.outcome(), Outcome::Duplicate);
}
