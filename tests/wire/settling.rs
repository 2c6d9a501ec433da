//! Ack, Nak, Term and Settle: their effect in JetStream, and the answer to a repeat.

use std::time::{Duration, SystemTime};

use fetch_proxy::pb::{
    self, AckAction, Confirmation, ExtendAction, NakAction, Outcome, Settlement, TermAction,
    settlement::Action,
};
use futures_util::StreamExt as _;
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait, config},
    millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, extend, fetch, nak, reason, term},
};
use tonic::Code;

async fn leased(fixture: &Fixture, count: usize) -> (Proxy, Client, Vec<pb::Delivery>) {
    fixture.publish_many(count).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut client = proxy.client().await;
    let n = u32::try_from(count).unwrap();
    // Without a linger an answer may have fewer: it goes out when nothing has come for 5 ms.
    let all = pb::FetchRequest { linger: millis(5000), ..fetch(fixture, n, 10_000) };
    let answer = client.fetch(all).await.unwrap().into_inner();
    assert_eq!(answer.messages.len(), count);
    (proxy, client, answer.messages)
}

fn settlement(token: &str, action: Action) -> Settlement {
    Settlement { number: 0, token: token.to_owned(), action: Some(action) }
}

#[tokio::test]
async fn ack_is_confirmed_by_jetstream_and_its_repeat_is_a_duplicate() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client, messages) = leased(&fixture, 1).await;
    let first = client.ack(ack(&messages[0].token)).await.unwrap().into_inner();
    assert_eq!(first.outcome(), Outcome::Confirmed);
    assert_eq!(fixture.info().await.num_ack_pending, 0);
    let again = client.ack(ack(&messages[0].token)).await.unwrap().into_inner();
    assert_eq!(again.outcome(), Outcome::Duplicate);
}

#[tokio::test]
async fn nak_returns_the_message_at_once_and_its_repeat_does_nothing() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client, messages) = leased(&fixture, 1).await;
    let answer = client.nak(nak(&messages[0].token, 0)).await.unwrap().into_inner();
    assert_eq!(answer.outcome(), Outcome::Confirmed);
    assert!(answer.redeliver_time.is_some());
    let second = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    assert_eq!(second.messages[0].delivery_count, 2);
    // A second Nak of the first delivery must not touch the second's.
    let again = client.nak(nak(&messages[0].token, 0)).await.unwrap().into_inner();
    assert_eq!(again.outcome(), Outcome::Duplicate);
    let nothing = client.fetch(fetch(&fixture, 1, 300)).await.unwrap().into_inner();
    assert!(nothing.messages.is_empty(), "the retried Nak evicted the next holder");
    client.ack(ack(&second.messages[0].token)).await.unwrap();
}

/// Two clocks of one machine may differ by this much.
const SKEW: Duration = Duration::from_millis(100);

/// Gives a message back with this delay, and waits for its next delivery. Returns the delivery and
/// three durations: from the call to the delivery, from the answer to the delivery, and from the
/// delivery to the announced time. The time of the next delivery is the server's own.
async fn delayed(
    client: &mut Client,
    fixture: &Fixture,
    token: &str,
    delay: i64,
) -> (pb::Delivery, [SystemTime; 4]) {
    let called = SystemTime::now();
    let answer = client.nak(nak(token, delay)).await.unwrap().into_inner();
    let answered = SystemTime::now();
    let told = SystemTime::try_from(answer.redeliver_time.unwrap()).unwrap();
    let mut next = client.fetch(fetch(fixture, 1, 20_000)).await.unwrap().into_inner().messages;
    let delivered = fixture.delivered_at().await;
    (next.remove(0), [called, answered, told, delivered])
}

#[tokio::test]
async fn nak_with_a_delay_redelivers_at_the_announced_time() {
    const DELAY: Duration = Duration::from_secs(1);
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client, messages) = leased(&fixture, 1).await;
    let (second, [called, answered, told, delivered]) =
        delayed(&mut client, &fixture, &messages[0].token, 1000).await;
    assert_eq!(second.delivery_count, 2);
    assert!((called + DELAY..=answered + DELAY).contains(&told), "{called:?} {told:?}");
    assert!(delivered + SKEW > called + DELAY, "early: {called:?} {delivered:?}");
    // By itself JetStream would wait for 30 s.
    assert!(delivered < told + Duration::from_secs(10), "late: {told:?} {delivered:?}");
}

#[tokio::test]
async fn nak_delay_is_kept_on_a_consumer_with_backoff() {
    const DELAY: Duration = Duration::from_secs(4);
    let seconds = |n| Duration::from_secs(n);
    let backoff = vec![seconds(1), seconds(11)];
    let fixture = Fixture::new(async_nats::jetstream::consumer::pull::Config {
        backoff,
        max_deliver: 5,
        ..config()
    })
    .await;
    let (_proxy, mut client, messages) = leased(&fixture, 1).await;
    client.nak(nak(&messages[0].token, 0)).await.unwrap();
    let second = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    // By itself JetStream would add 10 s to a delay in this attempt: BackOff[1] − BackOff[0].
    let (third, [called, answered, _, delivered]) =
        delayed(&mut client, &fixture, &second.messages[0].token, 4000).await;
    assert_eq!(third.delivery_count, 3);
    assert!(delivered + SKEW > called + DELAY, "early: {called:?} {delivered:?}");
    assert!(delivered < answered + DELAY + seconds(8), "late: {answered:?} {delivered:?}");
}

#[tokio::test]
async fn nak_of_the_last_attempt_promises_no_redelivery() {
    let fixture =
        Fixture::new(async_nats::jetstream::consumer::pull::Config { max_deliver: 1, ..config() })
            .await;
    let (_proxy, mut client, messages) = leased(&fixture, 1).await;
    let answer = client.nak(nak(&messages[0].token, 0)).await.unwrap().into_inner();
    assert_eq!((answer.outcome(), answer.redeliver_time), (Outcome::Confirmed, None));
}

#[tokio::test]
async fn term_carries_its_reason_to_jetstream() {
    let fixture = Fixture::new(config()).await;
    let client = async_nats::connect(NatsServer::shared().url()).await.unwrap();
    let subject = format!("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{}.worker", fixture.stream);
    let mut advisories = client.subscribe(subject).await.unwrap();
    client.flush().await.unwrap();
    let (_proxy, mut client, messages) = leased(&fixture, 1).await;
    let answer = client.term(term(&messages[0].token, "cannot be done")).await.unwrap();
    assert_eq!(answer.into_inner().outcome(), Outcome::Confirmed);
    let advisory = advisories.next().await.unwrap().payload;
    let advisory: serde_json::Value = serde_json::from_slice(&advisory).unwrap();
    assert_eq!(advisory["reason"], "cannot be done");
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn settled_message_refuses_other_kinds_and_names_the_first() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client, messages) = leased(&fixture, 1).await;
    let token = &messages[0].token;
    client.term(term(token, "no")).await.unwrap();
    for refused in [
        client.ack(ack(token)).await.unwrap_err(),
        client.nak(nak(token, 0)).await.unwrap_err(),
        client.extend(extend(token, 5000)).await.unwrap_err(),
    ] {
        assert_eq!(reason(&refused), (Code::FailedPrecondition, "LEASE_SETTLED".to_owned()));
        let info = tonic_types::StatusExt::get_details_error_info(&refused).unwrap();
        assert_eq!(info.metadata["settled_as"], "TERM");
    }
}

#[tokio::test]
async fn sent_confirmation_answers_at_once_and_reaches_jetstream() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client, messages) = leased(&fixture, 1).await;
    let mut request = ack(&messages[0].token);
    request.confirmation = Confirmation::Sent.into();
    let answer = client.ack(request).await.unwrap().into_inner();
    assert_eq!(answer.outcome(), Outcome::Sent);
    eventually("the ack to arrive", || async {
        (fixture.info().await.num_ack_pending == 0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn settle_of_a_thousand_tokens_answers_each_in_order() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client, messages) = leased(&fixture, 1000).await;
    let settlements = messages.iter().enumerate().map(|(place, message)| {
        let action = match place % 4 {
            0 => Action::Ack(AckAction {}),
            1 => Action::Nak(NakAction { delay: millis(60_000) }),
            2 => Action::Term(TermAction { reason: "no".to_owned() }),
            _ => Action::Extend(ExtendAction { lease: millis(60_000) }),
        };
        settlement(&message.token, action)
    });
    let request =
        pb::SettleRequest { settlements: settlements.collect(), ..pb::SettleRequest::default() };
    let answer = client.settle(request).await.unwrap().into_inner();
    assert_eq!((answer.results.len(), answer.failed), (1000, 0));
    for (place, result) in answer.results.iter().enumerate() {
        let expected = if place % 4 == 3 { Outcome::Extended } else { Outcome::Confirmed };
        assert_eq!(result.outcome(), expected, "{place}: {result:?}");
        assert_eq!(result.redeliver_time.is_some(), place % 4 == 1);
        assert_eq!(result.lease_expire_time.is_some(), place % 4 == 3);
    }
    // Extended and delayed ones are still pending; a quarter each was acked and terminated.
    assert_eq!(fixture.info().await.num_ack_pending, 500);
}

#[tokio::test]
async fn repeated_token_in_a_settle_counts_once() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client, messages) = leased(&fixture, 1).await;
    let token = &messages[0].token;
    let request = pb::SettleRequest {
        settlements: vec![
            settlement(token, Action::Ack(AckAction {})),
            settlement(token, Action::Ack(AckAction {})),
            settlement(token, Action::Term(TermAction::default())),
            settlement("garbage", Action::Ack(AckAction {})),
            settlement(token, Action::Extend(ExtendAction::default())),
        ],
        ..pb::SettleRequest::default()
    };
    let answer = client.settle(request).await.unwrap().into_inner();
    assert_eq!(answer.results[0].outcome(), Outcome::Confirmed);
    assert_eq!(answer.results[1].outcome(), Outcome::Duplicate);
    let refused = |place: usize| answer.results[place].error.as_ref().unwrap().reason.as_str();
    let reasons = [2, 3, 4].map(refused);
    assert_eq!(reasons, ["LEASE_SETTLED", "TOKEN_INVALID", "LEASE_SETTLED"]);
}

#[tokio::test]
async fn two_workers_with_one_token_settle_it_once() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, client, messages) = leased(&fixture, 20).await;
    for message in messages {
        let (mut one, mut two) = (client.clone(), client.clone());
        let (acked, termed) =
            tokio::join!(one.ack(ack(&message.token)), two.term(term(&message.token, "no")));
        let refused = match (acked, termed) {
            (Ok(_), Err(refused)) | (Err(refused), Ok(_)) => refused,
            both => panic!("exactly one must win: {both:?}"),
        };
        assert!(["LEASE_BUSY", "LEASE_SETTLED"].contains(&reason(&refused).1.as_str()));
    }
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn settle_continues_when_its_caller_leaves() {
    let fixture = Fixture::new(ack_wait(30_000)).await;
    let (_proxy, client, messages) = leased(&fixture, 200).await;
    let acked = |token: &str| settlement(token, Action::Ack(AckAction {}));
    let settlements = messages.iter().map(|message| acked(&message.token)).collect();
    let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
    let mut leaving = client.clone();
    let call = tokio::spawn(async move { leaving.settle(request).await });
    // Once JetStream has seen one, the call is under way, and may be dropped.
    eventually("the first settlement", || async {
        (fixture.info().await.num_ack_pending < 200).then_some(())
    })
    .await;
    call.abort();
    eventually("all settlements", || async {
        (fixture.info().await.num_ack_pending == 0).then_some(())
    })
    .await;
}
