//! Leases and time: shorter and longer than the ack wait, lapsed, lost, superseded.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, SystemTime},
};

use async_nats::jetstream::{self, consumer::pull};
use fetch_proxy::pb::{self, Outcome, settlement};
use testkit::{
    eventually,
    jetstream::{Fixture, SHORTEST_KEPT, ack_wait, config},
    millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, extend, fetch, nak, reason, term},
};
use tonic::Code;
use tonic_types::StatusExt as _;

async fn setup(consumer: pull::Config) -> (Fixture, Proxy, Client) {
    let fixture = Fixture::new(consumer).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let client = proxy.client().await;
    (fixture, proxy, client)
}

async fn take(client: &mut Client, fixture: &Fixture, lease: Option<i64>) -> pb::Delivery {
    let mut request = fetch(fixture, 1, 10_000);
    request.lease = lease.and_then(millis);
    let mut answer = client.fetch(request).await.unwrap().into_inner();
    answer.messages.pop().unwrap_or_else(|| panic!("{answer:?}"))
}

fn expired() -> (Code, String) {
    (Code::FailedPrecondition, "LEASE_EXPIRED".to_owned())
}

#[tokio::test]
async fn lease_longer_than_the_ack_wait_is_kept_alive() {
    let (fixture, _proxy, mut client) = setup(ack_wait(SHORTEST_KEPT)).await;
    fixture.publish("x", "1").await;
    let message = take(&mut client, &fixture, Some(60_000)).await;
    let nothing = client.fetch(fetch(&fixture, 1, 8000)).await.unwrap().into_inner();
    assert!(nothing.messages.is_empty(), "delivered to somebody else after two ack waits");
    let answer = client.ack(ack(&message.token)).await.unwrap().into_inner();
    assert_eq!(answer.outcome(), Outcome::Confirmed);
    assert_eq!(fixture.info().await.num_redelivered, 0);
}

#[tokio::test]
async fn short_lease_returns_the_message_at_its_end() {
    let (fixture, _proxy, mut client) = setup(config()).await;
    fixture.publish("x", "1").await;
    let message = take(&mut client, &fixture, Some(1000)).await;
    let second = take(&mut client, &fixture, None).await;
    assert_eq!(second.delivery_count, 2);
    // The time of a delivery is the server's own; by itself JetStream would wait for 30 s.
    let (over, delivered) = (message.lease_expire_time.unwrap(), fixture.delivered_at().await);
    let over = SystemTime::try_from(over).unwrap();
    assert!(delivered + Duration::from_millis(100) > over, "early: {over:?} {delivered:?}");
    assert!(delivered < over + Duration::from_secs(10), "late: {over:?} {delivered:?}");
    let refused = client.ack(ack(&message.token)).await.unwrap_err();
    assert_eq!(reason(&refused), expired());
    client.ack(ack(&second.token)).await.unwrap();
}

#[tokio::test]
async fn unset_lease_ends_before_jetstream_redelivers() {
    let (fixture, _proxy, mut client) = setup(ack_wait(SHORTEST_KEPT)).await;
    fixture.publish("x", "1").await;
    let first = take(&mut client, &fixture, None).await;
    let second = take(&mut client, &fixture, Some(60_000)).await;
    assert_eq!(second.delivery_count, 2);
    // The fence: nothing that the first holder says reaches the second's delivery.
    for refused in [
        client.ack(ack(&first.token)).await.unwrap_err(),
        client.nak(nak(&first.token, 0)).await.unwrap_err(),
        client.term(term(&first.token, "no")).await.unwrap_err(),
        client.extend(extend(&first.token, 5000)).await.unwrap_err(),
    ] {
        assert_eq!(reason(&refused), expired());
    }
    let nothing = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    assert!(nothing.messages.is_empty());
    assert_eq!(fixture.info().await.num_ack_pending, 1);
    client.ack(ack(&second.token)).await.unwrap();
}

#[tokio::test]
async fn extend_moves_the_end_from_now_and_may_shorten() {
    let (fixture, _proxy, mut client) = setup(ack_wait(SHORTEST_KEPT)).await;
    fixture.publish("x", "1").await;
    let message = take(&mut client, &fixture, None).await;
    let longer = client.extend(extend(&message.token, 60_000)).await.unwrap().into_inner();
    assert!((59..=60).contains(&longer.lease.unwrap().seconds));
    assert!(longer.lease_expire_time.is_some());
    let nothing = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    assert!(nothing.messages.is_empty(), "the extended lease was not kept alive");
    client.extend(extend(&message.token, 1000)).await.unwrap();
    let second = take(&mut client, &fixture, None).await;
    assert_eq!(second.delivery_count, 2);
    let refused = client.ack(ack(&message.token)).await.unwrap_err();
    assert_eq!(reason(&refused), expired());
}

#[tokio::test]
async fn extend_without_a_length_lasts_the_granted_length() {
    let (fixture, _proxy, mut client) = setup(ack_wait(10_000)).await;
    let unset = |token: &str| pb::ExtendRequest { token: token.to_owned(), lease: None };
    for (granted, expected) in [(None, 7..=9), (Some(40_000), 39..=40)] {
        fixture.publish("x", "1").await;
        let message = take(&mut client, &fixture, granted).await;
        for longer in [None, Some(60_000), Some(1000)] {
            if let Some(longer) = longer {
                client.extend(extend(&message.token, longer)).await.unwrap();
            }
            let extended = client.extend(unset(&message.token)).await.unwrap().into_inner();
            let lease = extended.lease.unwrap();
            assert!(expected.contains(&lease.seconds), "{granted:?}, {longer:?}: {lease:?}");
        }
        let extend = settlement::Action::Extend(pb::ExtendAction { lease: None });
        let (token, action) = (message.token.clone(), Some(extend));
        let settlements = vec![pb::Settlement { number: 0, token, action }];
        let request = pb::SettleRequest { settlements, confirmation: 0 };
        let result = client.settle(request).await.unwrap().into_inner().results.remove(0);
        assert_eq!(result.outcome(), Outcome::Extended, "{result:?}");
        assert!(expected.contains(&result.lease.unwrap().seconds), "{granted:?}: {result:?}");
        client.ack(ack(&message.token)).await.unwrap();
    }
}

#[tokio::test]
async fn too_long_lease_is_lowered_and_the_answer_says_so() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--max-lease", "3s"]);
    let mut client = proxy.client().await;
    let lowered = |lease: Option<prost_types::Duration>| {
        let lease = Duration::try_from(lease.unwrap()).unwrap();
        assert!((Duration::from_secs(2)..=Duration::from_secs(3)).contains(&lease), "{lease:?}");
    };
    // The lease of a Fetch that names none, the ack wait of 30 s, is lowered like any other.
    for asked in [None, Some(27_000), Some(3_600_000), Some(i64::MAX / 1_000_000)] {
        fixture.publish("x", "1").await;
        let message = take(&mut client, &fixture, asked).await;
        lowered(message.lease);
        let extended = client.extend(extend(&message.token, 27_000)).await.unwrap().into_inner();
        lowered(extended.lease);
        let longer = settlement::Action::Extend(pb::ExtendAction { lease: millis(3_600_000) });
        let (token, action) = (message.token.clone(), Some(longer));
        let settlements = vec![pb::Settlement { number: 0, token, action }];
        let request = pb::SettleRequest { settlements, confirmation: 0 };
        let result = client.settle(request).await.unwrap().into_inner().results.remove(0);
        assert_eq!(result.outcome(), Outcome::Extended, "{result:?}");
        lowered(result.lease);
        client.ack(ack(&message.token)).await.unwrap();
    }
    // Nobody holds it for longer: it comes back long before the ack wait of 30 s.
    fixture.publish("x", "1").await;
    take(&mut client, &fixture, None).await;
    let again = take(&mut client, &fixture, None).await;
    assert_eq!(again.delivery_count, 2);
}

#[tokio::test]
async fn each_delivery_is_leased_by_its_own_backoff() {
    let backoff = vec![Duration::from_millis(600), Duration::from_secs(20)];
    let (fixture, _proxy, mut client) =
        setup(pull::Config { backoff, max_deliver: 4, ..config() }).await;
    fixture.publish("x", "1").await;
    let first = take(&mut client, &fixture, None).await;
    assert_eq!(first.lease.unwrap().seconds, 0);
    let second = take(&mut client, &fixture, None).await;
    assert!((17..=18).contains(&second.lease.unwrap().seconds), "{:?}", second.lease);
    client.ack(ack(&second.token)).await.unwrap();
}

#[tokio::test]
async fn last_attempt_of_two_is_kept_for_its_holder() {
    let (fixture, _proxy, mut client) =
        setup(pull::Config { max_deliver: 2, ..ack_wait(10_000) }).await;
    fixture.publish("x", "1").await;
    let first = take(&mut client, &fixture, None).await;
    client.nak(nak(&first.token, 0)).await.unwrap();
    let second = take(&mut client, &fixture, Some(1000)).await;
    assert_eq!((second.delivery_count, second.max_deliver), (2, 2));
    // Its short lease lapses; a Nak by us would destroy the message before its ack wait is over.
    let refused = eventually("the lease to lapse", || {
        let (mut client, request) = (client.clone(), extend(&second.token, 1000));
        async move {
            tokio::time::sleep(Duration::from_millis(1100)).await;
            client.extend(request).await.err()
        }
    })
    .await;
    assert_eq!(reason(&refused), expired());
    assert_eq!(fixture.info().await.num_ack_pending, 1, "JetStream still waits for it");
}

/// A work queue, from which only a settlement takes a message.
async fn work_queue(max_deliver: i64) -> Fixture {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let shared = Fixture::new(config()).await;
    let stream = format!("Q{}", COUNT.fetch_add(1, Ordering::Relaxed));
    let queue = jetstream::stream::Config {
        name: stream.clone(),
        subjects: vec![format!("{stream}.>")],
        retention: jetstream::stream::RetentionPolicy::WorkQueue,
        ..jetstream::stream::Config::default()
    };
    shared.jetstream.create_stream(queue).await.unwrap();
    let last = pull::Config { max_deliver, ..ack_wait(1000) };
    shared.jetstream.create_consumer_on_stream(last, &stream).await.unwrap();
    Fixture { stream, ..shared }
}

/// Waits until JetStream has given up what was delivered.
async fn given_up(client: &mut Client, fixture: &Fixture) {
    eventually("JetStream to give the message up", || {
        let mut client = client.clone();
        async move {
            // JetStream notices it when it is asked for a message.
            let empty = client.fetch(fetch(fixture, 1, 300)).await.unwrap().into_inner();
            assert!(empty.messages.is_empty(), "{empty:?}");
            (fixture.info().await.num_ack_pending == 0).then_some(())
        }
    })
    .await;
}

async fn stored(fixture: &Fixture) -> u64 {
    let stream = fixture.jetstream.get_stream(&fixture.stream).await.unwrap();
    stream.cached_info().state.messages
}

#[tokio::test]
async fn late_ack_or_term_of_a_free_last_attempt_is_applied() {
    for max_deliver in [1, 2] {
        let fixture = work_queue(max_deliver).await;
        let proxy = Proxy::start(NatsServer::shared(), &[]);
        let mut client = proxy.client().await;
        for terminates in [false, true] {
            fixture.publish("x", "1").await;
            let mut message = take(&mut client, &fixture, None).await;
            for _ in 1..max_deliver {
                message = take(&mut client, &fixture, None).await;
            }
            assert_eq!(i64::from(message.delivery_count), max_deliver);
            given_up(&mut client, &fixture).await;
            assert_eq!(stored(&fixture).await, 1, "it stays in the stream");
            let token = &message.token;
            for refused in [
                client.nak(nak(token, 0)).await.unwrap_err(),
                client.extend(extend(token, 5000)).await.unwrap_err(),
            ] {
                assert_eq!(reason(&refused), expired());
                let info = refused.get_details_error_info().unwrap();
                assert_eq!(info.metadata["detail"], "last_attempt");
            }
            let outcome = match terminates {
                false => client.ack(ack(token)).await.unwrap().into_inner().outcome,
                true => client.term(term(token, "late")).await.unwrap().into_inner().outcome,
            };
            assert_eq!(outcome, i32::from(Outcome::Confirmed));
            assert_eq!(stored(&fixture).await, 0, "the work that was done is settled");
        }
    }
}

#[tokio::test]
async fn late_ack_of_a_last_attempt_is_refused_during_other_deliveries() {
    let fixture = work_queue(1).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut client = proxy.client().await;
    fixture.publish("x", "1").await;
    let late = take(&mut client, &fixture, None).await;
    given_up(&mut client, &fixture).await;
    fixture.publish("x", "2").await;
    let other = take(&mut client, &fixture, Some(60_000)).await;
    let refused = client.ack(ack(&late.token)).await.unwrap_err();
    assert_eq!(reason(&refused), expired());
    assert_eq!(refused.get_details_error_info().unwrap().metadata["detail"], "last_attempt");
    assert!(!refused.message().contains("will be"), "{}", refused.message());
    assert_eq!(stored(&fixture).await, 2);
    client.ack(ack(&other.token)).await.unwrap();
    client.ack(ack(&late.token)).await.unwrap();
    assert_eq!(stored(&fixture).await, 0);
}

/// The fence: what comes again after all is its new holder's.
#[tokio::test]
async fn late_ack_hits_no_holder_of_a_further_delivery() {
    let fixture = work_queue(2).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut client = proxy.client().await;
    fixture.publish("x", "1").await;
    take(&mut client, &fixture, None).await;
    let late = take(&mut client, &fixture, None).await;
    assert_eq!(late.delivery_count, 2);
    let set = |max_deliver| {
        let changed = pull::Config { max_deliver, ..ack_wait(1000) };
        fixture.jetstream.create_consumer_on_stream(changed, &fixture.stream)
    };
    set(3).await.unwrap();
    let next = take(&mut client, &fixture, Some(60_000)).await;
    assert_eq!(next.delivery_count, 3);
    // Also where it looks as if the old one had been the last.
    for max_deliver in [3, 2] {
        set(max_deliver).await.unwrap();
        assert_eq!(reason(&client.ack(ack(&late.token)).await.unwrap_err()), expired());
        assert_eq!(stored(&fixture).await, 1);
    }
    client.ack(ack(&next.token)).await.unwrap();
    assert_eq!(stored(&fixture).await, 0);
}

#[tokio::test]
async fn recreated_consumer_ends_the_leases_of_the_old_one() {
    let (fixture, _proxy, mut client) = setup(ack_wait(2000)).await;
    fixture.publish("x", "1").await;
    let message = take(&mut client, &fixture, Some(60_000)).await;
    let stream = fixture.jetstream.get_stream(&fixture.stream).await.unwrap();
    stream.delete_consumer(&fixture.consumer).await.unwrap();
    fixture.jetstream.create_consumer_on_stream(ack_wait(2000), &fixture.stream).await.unwrap();
    eventually("the old lease to end", || {
        let (mut client, request) = (client.clone(), extend(&message.token, 60_000));
        async move {
            client.extend(request).await.err().map(|status| assert_eq!(reason(&status), expired()))
        }
    })
    .await;
    let again = take(&mut client, &fixture, None).await;
    assert_eq!((again.stream_sequence, again.delivery_count), (1, 1));
    client.ack(ack(&again.token)).await.unwrap();
}

#[tokio::test]
async fn deleted_consumer_denies_a_settlement_with_a_reason() {
    let (fixture, _proxy, mut client) = setup(config()).await;
    fixture.publish("x", "1").await;
    let message = take(&mut client, &fixture, None).await;
    fixture.jetstream.delete_stream(&fixture.stream).await.unwrap();
    let refused = client.ack(ack(&message.token)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::FailedPrecondition, "JETSTREAM_DENIED".to_owned()));
}
