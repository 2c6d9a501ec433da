//! Attempts: a Fetch that is repeated has the same messages, and one that is given back has none.

use std::{sync::Arc, time::Duration};

use fetch_proxy::{
    broker::AckKind,
    clock,
    lease::LeaseId,
    lessor::{
        Action, AttemptBegun, AttemptKey, Codec, Empty, Error, FetchParams, Fetched, Lessor,
        RejectedCause,
    },
};
use testkit::{
    eventually,
    fake_broker::{FakeBroker, SearchScope, info, limits},
};

use super::faults::{ask, confirmed, settle};

const LONG: Duration = Duration::from_secs(30);
const WAIT: Duration = Duration::from_secs(10);
const OVER: Error = Error::LeaseExpired { forgotten: false };

struct Stage {
    broker: FakeBroker,
    lessor: Lessor<FakeBroker>,
}

impl Stage {
    fn new() -> Self {
        Self::of(None)
    }

    fn of(max_deliver: Option<u64>) -> Self {
        let info = fetch_proxy::broker::ConsumerInfo { max_deliver, ..info(LONG) };
        let broker = FakeBroker::new(info);
        Self { broker: broker.clone(), lessor: Lessor::start(broker, limits()) }
    }

    fn key(&self, attempt: &str) -> AttemptKey {
        AttemptKey::new("anonymous", &self.broker.name(), attempt)
    }

    fn publish(&self, count: usize) {
        (0..count).for_each(|number| self.broker.publish(number.to_string()));
    }

    async fn call(&self, attempt: &str, ask: FetchParams) -> Result<Fetched, Error> {
        let Self { lessor, .. } = self;
        match lessor.begin_attempt(self.key(attempt), true) {
            AttemptBegun::Waits(call) => lessor.fetch_for(ask, call).await,
            AttemptBegun::Over => Ok(lessor.attempt_over(&ask)),
            AttemptBegun::Again(lent) => {
                let lent = lessor.lend_again(&lent, ask.lease, &ask.caller)?;
                lessor.read_lent(lent, &ask).await
            }
        }
    }

    async fn fetch(&self, attempt: &str) -> Fetched {
        self.call(attempt, ask(&self.broker, WAIT)).await.unwrap()
    }

    async fn give_back(&self, attempt: &str) -> Result<usize, Error> {
        let name = self.broker.name();
        let until = clock::now() + Duration::from_secs(5);
        let given = self.lessor.give_back_attempt(&name, self.key(attempt), until).await;
        given.map(Option::unwrap_or_default)
    }

    async fn ack(&self, lease: LeaseId) -> Result<(), Error> {
        settle(&self.lessor, lease, Action::Ack).await.map(drop)
    }
}

fn leases(fetched: &Fetched) -> Vec<LeaseId> {
    fetched.messages().iter().map(|leased| leased.id).collect()
}

fn payloads(fetched: &Fetched) -> Vec<String> {
    let text = |payload: &bytes::Bytes| String::from_utf8(payload.to_vec()).unwrap();
    fetched.messages().iter().map(|leased| text(&leased.delivery().payload)).collect()
}

fn is_over(fetched: &Fetched) -> bool {
    fetched.messages().is_empty() && fetched.empty() == Some(Empty::AttemptOver)
}

#[tokio::test(start_paused = true)]
async fn repeat_has_the_same_messages_under_the_same_leases_for_longer() {
    let stage = Stage::new();
    stage.publish(3);
    let first = stage.fetch("a").await;
    let (ids, deadline) = (leases(&first), first.messages()[0].deadline);
    first.delivered();
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(5)).await;
        let long = FetchParams { lease: Some(LONG), ..ask(&stage.broker, WAIT) };
        let again = stage.call("a", long).await.unwrap();
        assert_eq!(
            (leases(&again), payloads(&again)),
            (ids.clone(), vec!["0".into(), "1".into(), "2".into()])
        );
        assert_eq!(again.messages()[0].deadline, clock::now() + LONG);
        assert!(again.messages()[0].deadline > deadline);
        assert!(again.messages().iter().all(|leased| leased.delivery().delivery_count == 1));
        again.delivered();
    }
    assert!(confirmed(&settle(&stage.lessor, ids[0], Action::Ack).await));
    assert_eq!(stage.broker.published(), [AckKind::Ack], "nothing else was said to JetStream");
}

#[tokio::test(start_paused = true)]
async fn late_duplicate_of_a_call_whose_answer_arrived_leases_nothing() {
    for action in [Action::Ack, Action::Extend(None), Action::Nak(Duration::from_secs(60))] {
        let stage = Stage::new();
        stage.publish(20);
        let first = stage.fetch("a").await;
        let ids = leases(&first);
        first.delivered();
        settle(&stage.lessor, ids[3], action).await.unwrap();
        let held = stage.lessor.held();
        assert!(is_over(&stage.fetch("a").await));
        assert_eq!(stage.lessor.held(), held);
    }
}

#[tokio::test(start_paused = true)]
async fn other_principals_and_consumers_have_attempts_of_their_own() {
    let stage = Stage::new();
    let name = stage.broker.name();
    let other = fetch_proxy::broker::ConsumerName { consumer: "other".into(), ..name.clone() };
    let keys = [
        AttemptKey::new("p", &name, "a"),
        AttemptKey::new("q", &name, "a"),
        AttemptKey::new("p", &other, "a"),
        AttemptKey::new("p", &name, "b"),
        AttemptKey::new("pS", &name, "a"),
    ];
    for (place, key) in keys.iter().enumerate() {
        assert!(!keys[..place].contains(key), "{place}");
    }
}

#[tokio::test(start_paused = true)]
async fn repeat_takes_the_place_of_a_call_that_waits() {
    let stage = Arc::new(Stage::new());
    let first = tokio::spawn({
        let stage = stage.clone();
        async move { stage.fetch("a").await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    let second = tokio::spawn({
        let stage = stage.clone();
        async move { stage.fetch("a").await }
    });
    assert!(is_over(&first.await.unwrap()));
    stage.publish(1);
    assert_eq!(payloads(&second.await.unwrap()), ["0"]);
}

#[tokio::test(start_paused = true)]
async fn unwritten_first_answer_goes_back_and_its_repeat_is_a_fetch() {
    let stage = Stage::new();
    stage.publish(2);
    drop(stage.fetch("a").await);
    let again = stage.fetch("a").await;
    assert_eq!(payloads(&again), ["0", "1"]);
    again.delivered();
    assert_eq!(stage.broker.published(), [], "nothing went back to JetStream");
}

/// Its first answer may have been read.
#[tokio::test(start_paused = true)]
async fn unwritten_repeat_leaves_the_leases_to_the_attempt() {
    let stage = Stage::new();
    stage.publish(2);
    // The first answer is not written yet when the repeat comes.
    let first = stage.fetch("a").await;
    let ids = leases(&first);
    drop(stage.fetch("a").await);
    drop(first);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!((leases(&stage.fetch("a").await), stage.broker.published()), (ids.clone(), vec![]));
    stage.ack(ids[1]).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn lease_that_has_ended_is_left_out_and_without_any_the_attempt_is_over() {
    let stage = Stage::new();
    stage.publish(2);
    let short = FetchParams { lease: Some(Duration::from_secs(5)), ..ask(&stage.broker, WAIT) };
    stage.call("a", short).await.unwrap().delivered();
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(is_over(&stage.fetch("a").await));
}

#[tokio::test(start_paused = true)]
async fn message_that_left_its_stream_is_left_out() {
    let stage = Stage::new();
    stage.publish(3);
    stage.fetch("a").await.delivered();
    stage.broker.remove(2);
    assert_eq!(payloads(&stage.fetch("a").await), ["0", "2"]);
}

#[tokio::test(start_paused = true)]
async fn repeat_that_cannot_be_read_keeps_its_leases() {
    let stage = Stage::new();
    stage.publish(1);
    stage.fetch("a").await.delivered();
    stage.broker.see(SearchScope::NotAllowed);
    let refused = stage.call("a", ask(&stage.broker, WAIT)).await.unwrap_err();
    assert_eq!(refused, Error::Permission("MSG.GET".into()));
    stage.broker.see(SearchScope::All);
    assert_eq!(payloads(&stage.fetch("a").await), ["0"]);
}

#[tokio::test(start_paused = true)]
async fn fields_of_the_repeat_count_and_no_message_disappears() {
    let stage = Stage::new();
    stage.broker.publish("1");
    stage.broker.publish("no json");
    stage.broker.publish(vec![b'7'; 2000]);
    stage.fetch("a").await.delivered();
    let narrow = FetchParams { max_bytes: 2000, codec: Codec::Json, ..ask(&stage.broker, WAIT) };
    let again = stage.call("a", narrow).await.unwrap();
    assert_eq!(payloads(&again), ["1"]);
    let [misfit, large] = again.rejected() else { panic!("{:?}", again.rejected()) };
    assert!(matches!(misfit.cause, RejectedCause::Codec(_)) && misfit.held);
    assert!(large.cause == RejectedCause::TooLarge && large.held);
    stage.ack(large.leased.id).await.unwrap();
    assert_eq!(stage.broker.published(), [AckKind::Ack], "nothing was terminated");
}

#[tokio::test(start_paused = true)]
async fn attempt_given_back_is_at_the_next_caller_at_once_and_costs_no_attempt() {
    for max_deliver in [None, Some(1)] {
        let stage = Stage::of(max_deliver);
        stage.publish(2);
        let first = stage.fetch("a").await;
        let ids = leases(&first);
        first.delivered();
        let began = clock::now();
        assert_eq!(stage.give_back("a").await, Ok(2));
        assert_eq!(stage.lessor.held_for("anonymous"), 0, "they count for nobody");
        for id in &ids {
            assert_eq!(stage.ack(*id).await, Err(OVER), "its token is good no more");
        }
        let next = stage.fetch("b").await;
        assert_eq!((clock::now(), payloads(&next)), (began, vec!["0".into(), "1".into()]));
        assert!(next.messages().iter().all(|leased| leased.delivery().delivery_count == 1));
        assert!(next.messages().iter().all(|leased| !ids.contains(&leased.id)));
        next.delivered();
        for late in ["a", "a"] {
            assert!(is_over(&stage.fetch(late).await));
            assert_eq!(stage.give_back(late).await, Ok(0));
        }
        assert_eq!(stage.broker.published(), []);
    }
}

#[tokio::test(start_paused = true)]
async fn attempt_given_back_that_nobody_takes_returns_to_jetstream_unless_that_would_end_it() {
    for (max_deliver, count) in [(None, 2), (Some(1), 1)] {
        let stage = Stage::of(max_deliver);
        stage.publish(1);
        stage.fetch("a").await.delivered();
        assert_eq!(stage.give_back("a").await, Ok(1));
        // A caller at another replica may wait for it.
        tokio::time::sleep(Duration::from_millis(260)).await;
        assert_eq!(stage.broker.published().len(), usize::from(max_deliver.is_none()));
        tokio::time::sleep(LONG * 3).await;
        let next = stage.fetch("b").await;
        assert_eq!(next.messages()[0].delivery().delivery_count, count);
        next.delivered();
    }
}

#[tokio::test(start_paused = true)]
async fn give_back_before_the_answer_ends_the_call_and_its_messages_go_to_another() {
    let stage = Arc::new(Stage::new());
    let waiting = tokio::spawn({
        let stage = stage.clone();
        async move { stage.fetch("a").await }
    });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(stage.give_back("a").await, Ok(0));
    assert!(is_over(&waiting.await.unwrap()));
    // One that comes before its Fetch.
    assert_eq!(stage.give_back("b").await, Ok(0));
    stage.publish(1);
    assert!(is_over(&stage.fetch("b").await));
    assert_eq!(payloads(&stage.fetch("c").await), ["0"]);
}

#[tokio::test(start_paused = true)]
async fn settled_messages_stay_settled_when_the_rest_is_given_back() {
    let stage = Stage::new();
    stage.publish(3);
    let first = stage.fetch("a").await;
    let ids = leases(&first);
    first.delivered();
    stage.ack(ids[1]).await.unwrap();
    assert_eq!(stage.give_back("a").await, Ok(2));
    assert_eq!(payloads(&stage.fetch("b").await), ["0", "2"]);
}

#[tokio::test(start_paused = true)]
async fn without_the_right_to_read_only_a_last_attempt_stays() {
    let stage = Stage::new();
    stage.publish(1);
    stage.fetch("a").await.delivered();
    stage.broker.see(SearchScope::NotAllowed);
    assert_eq!(stage.give_back("a").await, Ok(1));
    eventually("the Nak", || async { (!stage.broker.published().is_empty()).then_some(()) }).await;
    assert_eq!(stage.broker.published(), [AckKind::Nak(None)]);

    let stage = Stage::of(Some(1));
    stage.publish(1);
    let first = stage.fetch("a").await;
    let id = leases(&first)[0];
    first.delivered();
    stage.broker.see(SearchScope::NotAllowed);
    for _ in 0..2 {
        assert_eq!(stage.give_back("a").await, Err(Error::Permission("MSG.GET".into())));
    }
    assert!(is_over(&stage.fetch("a").await));
    stage.broker.see(SearchScope::All);
    assert_eq!(stage.give_back("a").await, Ok(1));
    assert_eq!((stage.ack(id).await, stage.broker.published()), (Err(OVER), vec![]));
}

/// A client that runs wild with names.
#[tokio::test(start_paused = true)]
async fn a_thousand_names_hold_no_more_leases_than_there_may_be() {
    let stage = Stage::new();
    for number in 0..1000 {
        stage.publish(1);
        let name = number.to_string();
        stage.fetch(&name).await.delivered();
        if number % 2 == 0 {
            assert!(stage.give_back(&name).await.unwrap() > 0);
        }
        let next = stage.fetch(&format!("{name} taken")).await;
        for leased in next.messages() {
            stage.ack(leased.id).await.unwrap();
        }
        next.delivered();
        if number % 50 == 0 {
            tokio::time::sleep(LONG * 2).await;
        }
        assert!(stage.lessor.held() <= limits().max_leases);
    }
}
