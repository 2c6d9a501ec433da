//! Attempts whose calls reach several replicas: a repeat finds its messages, and a give-back too.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use fetch_proxy::{
    broker::ConsumerInfo,
    clock,
    cluster::{AttemptElsewhere, NamedAttempt},
    lessor::{AttemptBegun, Codec, FetchCaller, FetchParams},
    pb::{self, EmptyReason, Outcome},
};
use testkit::{
    eventually,
    fake_broker::{FakeBroker, info},
    jetstream::{Fixture, config},
    proxy::{Client, ack, fetch, reason, waiting},
};
use tonic::Request;

use super::{
    linked::{Member, Net},
    pair::{Pair, new_key},
};

fn named(attempt: &str, again: bool, request: pb::FetchRequest) -> pb::FetchRequest {
    pb::FetchRequest { attempt_id: attempt.to_owned(), attempt_again: again, ..request }
}

/// Repeats an attempt until it has messages: the others may be too slow to answer in time.
async fn repeated(client: &Client, fixture: &Fixture, attempt: &str) -> Vec<pb::Delivery> {
    eventually("the messages of the attempt", || async {
        let request = named(attempt, true, fetch(fixture, 10, 0));
        let answer = client.clone().fetch(request).await.unwrap().into_inner();
        (!answer.messages.is_empty()).then_some(answer.messages)
    })
    .await
}

fn sequences(messages: &[pb::Delivery]) -> Vec<(u64, u32)> {
    messages.iter().map(|message| (message.stream_sequence, message.delivery_count)).collect()
}

async fn leased(pair: &mut Pair, fixture: &Fixture, count: usize) -> Vec<pb::Delivery> {
    fixture.publish_many(count).await;
    let request = pb::FetchRequest {
        linger: testkit::millis(20_000),
        ..fetch(fixture, u32::try_from(count).unwrap(), 10_000)
    };
    let answer = pair.at_owner.fetch(named("a", false, request)).await.unwrap().into_inner();
    assert_eq!(answer.messages.len(), count);
    answer.messages
}

#[tokio::test]
async fn repeat_at_another_replica_has_the_same_messages_under_the_same_leases() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let first = leased(&mut pair, &fixture, 3).await;
    let again = repeated(&pair.at_other, &fixture, "a").await;
    assert_eq!(sequences(&again), [(1, 1), (2, 1), (3, 1)]);
    assert_eq!(again[0].payload, first[0].payload);
    // The tokens of both answers are good at both replicas, and each message is settled once.
    let done = pair.at_other.ack(ack(&again[0].token)).await.unwrap().into_inner();
    assert_eq!(done.outcome(), Outcome::Confirmed);
    let done = pair.at_owner.ack(ack(&first[0].token)).await.unwrap().into_inner();
    assert_eq!(done.outcome(), Outcome::Duplicate);
    let done = pair.at_owner.ack(ack(&again[1].token)).await.unwrap().into_inner();
    assert_eq!(done.outcome(), Outcome::Confirmed);
    // Its answer has arrived.
    let late = eventually("the answer of the owner", || async {
        let late = named("a", true, fetch(&fixture, 1, 0));
        let late = pair.at_other.clone().fetch(late).await.unwrap().into_inner();
        (late.empty_reason() == EmptyReason::AttemptOver).then_some(late)
    })
    .await;
    assert!(late.messages.is_empty());
    assert_eq!(fixture.info().await.num_redelivered, 0);
}

#[tokio::test]
async fn repeat_by_a_grpc_library_is_known_by_its_metadata() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    leased(&mut pair, &fixture, 1).await;
    let request = |attempts: Option<&'static str>| {
        let mut request = Request::new(named("a", false, fetch(&fixture, 1, 0)));
        attempts.map(|attempts| {
            request.metadata_mut().insert("grpc-previous-rpc-attempts", attempts.parse().unwrap())
        });
        request
    };
    for first in [None, Some("0"), Some("none")] {
        let answer = pair.at_other.fetch(request(first)).await.unwrap().into_inner();
        assert_eq!(answer.empty_reason(), EmptyReason::NoMessages, "{first:?}");
    }
    let answer = eventually("the message of the attempt", || async {
        let answer = pair.at_other.clone().fetch(request(Some("1"))).await.unwrap().into_inner();
        (!answer.messages.is_empty()).then_some(answer)
    })
    .await;
    assert_eq!(sequences(&answer.messages), [(1, 1)]);
}

#[tokio::test]
async fn give_back_at_another_replica_ends_the_leases_of_the_owner() {
    for max_deliver in [-1, 1] {
        let consumer = async_nats::jetstream::consumer::pull::Config { max_deliver, ..config() };
        let fixture = Fixture::new(consumer).await;
        let mut pair = Pair::start().await;
        let first = leased(&mut pair, &fixture, 2).await;
        let (stream, consumer) = (fixture.stream.clone(), fixture.consumer.clone());
        let back = pb::GiveBackRequest { stream, consumer, attempt_id: "a".to_owned() };
        let began = Instant::now();
        pair.at_other.give_back(back).await.unwrap();
        let next = eventually("the messages", || async {
            let next = pair.at_owner.clone().fetch(fetch(&fixture, 2, 0)).await.unwrap();
            let messages = next.into_inner().messages;
            (messages.len() == 2).then_some(messages)
        })
        .await;
        println!("measured: from a give-back to a worker at the owner: {:?}", began.elapsed());
        assert_eq!(sequences(&next), [(1, 1), (2, 1)]);
        let refused = pair.at_other.ack(ack(&first[0].token)).await.unwrap_err();
        assert_eq!(reason(&refused).1, "LEASE_EXPIRED");
        for message in &next {
            pair.at_owner.ack(ack(&message.token)).await.unwrap();
        }
        assert_eq!(fixture.info().await.num_ack_pending, 0);
    }
}

#[tokio::test]
async fn message_given_back_reaches_a_worker_that_waits_at_another_replica() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    leased(&mut pair, &fixture, 1).await;
    let call = waiting(&pair.at_other, &fixture, fetch(&fixture, 1, 60_000)).await;
    let (stream, consumer) = (fixture.stream.clone(), fixture.consumer.clone());
    let back = pb::GiveBackRequest { stream, consumer, attempt_id: "a".to_owned() };
    let began = Instant::now();
    assert_eq!(pair.at_owner.give_back(back).await.unwrap().into_inner().messages, 1);
    let answer = call.await.unwrap().unwrap().into_inner();
    println!("measured: from a give-back to a worker at another replica: {:?}", began.elapsed());
    assert_eq!(answer.messages[0].stream_sequence, 1);
}

#[tokio::test]
async fn repeat_at_another_replica_ends_a_call_that_waits() {
    let fixture = Fixture::new(config()).await;
    let pair = Pair::start().await;
    let request = named("a", false, fetch(&fixture, 1, 60_000));
    let first = waiting(&pair.at_owner, &fixture, request).await;
    let (other, request) = (pair.at_other.clone(), named("a", true, fetch(&fixture, 1, 60_000)));
    let second = tokio::spawn(async move { other.clone().fetch(request).await });
    let answer = first.await.unwrap().unwrap().into_inner();
    assert_eq!((answer.messages.len(), answer.empty_reason()), (0, EmptyReason::AttemptOver));
    fixture.publish_many(1).await;
    let answer = second.await.unwrap().unwrap().into_inner();
    // The open pull of the first call may bring the message to its replica first.
    assert_eq!(answer.messages[0].stream_sequence, 1);
}

/// Nobody knows the attempt of a dead replica.
#[tokio::test]
async fn repeat_without_its_owner_is_an_ordinary_fetch() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    leased(&mut pair, &fixture, 1).await;
    pair.owner.signal("KILL");
    pair.owner.wait().await;
    fixture.publish_many(1).await;
    let request = named("a", true, fetch(&fixture, 1, 10_000));
    let answer = pair.at_other.fetch(request).await.unwrap().into_inner();
    assert_eq!(sequences(&answer.messages), [(2, 1)]);
}

/// The scripted replicas of one cluster.
struct Linked {
    broker: FakeBroker,
    owner: Member,
    other: Member,
}

impl Linked {
    async fn new() -> Self {
        let (net, keys) = Net::new(&new_key());
        let info = ConsumerInfo { max_deliver: Some(1), ..info(Duration::from_secs(30)) };
        let broker = FakeBroker::new(info);
        let replica = || Member::new(&net, &keys, &broker, 100);
        let (owner, other) = (replica(), replica());
        tokio::join!(owner.cluster.announce(), other.cluster.announce());
        Self { broker, owner, other }
    }

    fn attempt(&self) -> NamedAttempt {
        let (principal, name) = ("anonymous".into(), self.broker.name());
        NamedAttempt { principal, name, attempt: "a".into() }
    }

    fn ask(&self) -> FetchParams {
        FetchParams {
            name: self.broker.name(),
            n: 10,
            max_bytes: 4_000_000,
            max_wait: Duration::from_secs(5),
            linger: Duration::ZERO,
            lease: None,
            principal: "anonymous".into(),
            caller: Arc::default(),
            codec: Codec::Raw,
            patience: None,
        }
    }

    async fn lease(&self) {
        self.broker.publish("x");
        let AttemptBegun::Waits(call) =
            self.owner.lessor.begin_attempt(self.attempt().key(), false)
        else {
            panic!("it is known already")
        };
        self.owner.lessor.fetch_for(self.ask(), call).await.unwrap().delivered();
    }

    async fn found(&self) -> Option<AttemptElsewhere> {
        self.found_until(None).await
    }

    async fn found_until(&self, until: Option<Instant>) -> Option<AttemptElsewhere> {
        let caller = FetchCaller::default();
        self.other.cluster.find_attempt(&self.attempt(), None, &caller, until).await
    }
}

#[tokio::test(start_paused = true)]
async fn replica_of_an_older_version_answers_nothing_and_costs_a_fifth_of_a_second() {
    let linked = Linked::new().await;
    linked.lease().await;
    let began = clock::now();
    let Some(AttemptElsewhere::Lent(owner, lent)) = linked.found().await else { panic!("unknown") };
    assert_eq!((owner, lent.len(), clock::now()), (linked.owner.us, 1, began));
    let read = linked.other.lessor.read_lent(lent, &linked.ask()).await.unwrap();
    assert_eq!(&*read.messages()[0].delivery().payload, b"x");
    linked.owner.is_older();
    let began = clock::now();
    assert!(linked.found().await.is_none());
    assert_eq!(clock::now() - began, Duration::from_millis(200));
    let until = clock::now() + Duration::from_secs(5);
    assert_eq!(linked.other.cluster.give_back(linked.attempt(), until).await, Ok(0));
    assert_eq!(linked.owner.lessor.held(), 1, "its lease is as before");
}

#[tokio::test(start_paused = true)]
async fn question_about_an_attempt_ends_at_the_deadline_of_its_fetch() {
    let linked = Linked::new().await;
    linked.owner.is_older();
    for (left, takes) in [(0, 0), (50, 50), (199, 199), (5_000, 200)] {
        let began = clock::now();
        assert!(linked.found_until(Some(began + Duration::from_millis(left))).await.is_none());
        assert_eq!(clock::now() - began, Duration::from_millis(takes), "{left} ms are left");
    }
}

#[tokio::test(start_paused = true)]
async fn replica_alone_asks_nobody() {
    let linked = Linked::new().await;
    linked.owner.vanish().await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    let began = clock::now();
    assert!(linked.found().await.is_none());
    assert_eq!(clock::now(), began);
}

/// Its leases belong to another replica in a moment.
#[tokio::test(start_paused = true)]
async fn leases_that_are_being_handed_over_are_neither_lent_nor_given_back() {
    let linked = Linked::new().await;
    linked.lease().await;
    linked.owner.lessor.freeze();
    assert!(linked.found().await.is_none());
    let until = clock::now() + Duration::from_secs(5);
    assert!(linked.owner.cluster.give_back(linked.attempt(), until).await.is_err());
    linked.owner.lessor.thaw();
    assert_eq!(linked.owner.cluster.give_back(linked.attempt(), until).await, Ok(1));
}

#[tokio::test(start_paused = true)]
async fn give_back_is_told_to_all_replicas_also_if_it_comes_before_the_fetch() {
    let linked = Linked::new().await;
    let until = clock::now() + Duration::from_secs(5);
    assert_eq!(linked.other.cluster.give_back(linked.attempt(), until).await, Ok(0));
    let late = linked.owner.lessor.begin_attempt(linked.attempt().key(), true);
    assert!(matches!(late, AttemptBegun::Over), "{late:?}");
}
