//! A consumer that is deleted and made again: whoever waits for it is not told that it is gone.

use std::time::Duration;

use fetch_proxy::{
    broker::ConsumerInfo,
    clock,
    lessor::{Action, Error, Lessor},
};
use testkit::fake_broker::{FakeBroker, info, limits};

use super::faults::{ask, one, settle};

const LONG: Duration = Duration::from_secs(30);

fn start() -> (FakeBroker, Lessor<FakeBroker>) {
    let broker = FakeBroker::new(info(LONG));
    (broker.clone(), Lessor::start(broker, limits()))
}

fn again() -> ConsumerInfo {
    ConsumerInfo { created: "second".into(), ..info(LONG) }
}

#[tokio::test(start_paused = true)]
async fn consumer_created_again_at_once_ends_no_fetch() {
    for away in [10, 300].map(Duration::from_millis) {
        let (broker, lessor) = start();
        let old = one(&broker, &lessor).await;
        let making = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            broker.change(|info| *info = None);
            tokio::time::sleep(away).await;
            broker.change(|info| *info = Some(again()));
            tokio::time::sleep(Duration::from_secs(1)).await;
            broker.publish("x");
        };
        let (told, ()) = tokio::join!(lessor.fetch(ask(&broker, LONG)), making);
        assert_eq!(told.expect("a message of the new consumer").messages().len(), 1, "{away:?}");
        assert!(settle(&lessor, old, Action::Ack).await.is_err(), "{away:?}");
    }
}

/// The Fetch asks for itself why there is nothing.
#[tokio::test(start_paused = true)]
async fn fetch_that_ends_during_a_recreation_is_empty() {
    let (broker, lessor) = start();
    let making = async {
        tokio::time::sleep(Duration::from_millis(4990)).await;
        broker.change(|info| *info = None);
        tokio::time::sleep(Duration::from_millis(20)).await;
        broker.change(|info| *info = Some(again()));
    };
    let (told, ()) = tokio::join!(lessor.fetch(ask(&broker, Duration::from_secs(5))), making);
    assert!(told.expect("no messages").messages().is_empty());
}

#[tokio::test(start_paused = true)]
async fn missing_consumer_is_reported_within_a_second() {
    let (broker, lessor) = start();
    let gone = async {
        tokio::time::sleep(Duration::from_secs(2)).await;
        broker.change(|info| *info = None);
        clock::now()
    };
    let waiting = async { (lessor.fetch(ask(&broker, LONG)).await, clock::now()) };
    let ((told, at), gone) = tokio::join!(waiting, gone);
    assert_eq!(told.unwrap_err(), Error::ConsumerNotFound(broker.name()));
    assert!(at - gone <= Duration::from_secs(1), "{:?}", at - gone);
}

#[tokio::test(start_paused = true)]
async fn unknown_consumer_is_reported_at_once() {
    let (broker, lessor) = start();
    broker.change(|info| *info = None);
    let began = clock::now();
    let told = lessor.fetch(ask(&broker, LONG)).await;
    assert_eq!(told.unwrap_err(), Error::ConsumerNotFound(broker.name()));
    assert_eq!(clock::now(), began);
}

/// NATS answers half a second late that there is no consumer.
#[tokio::test(start_paused = true)]
async fn consumer_that_is_made_before_a_fetch_is_found_in_spite_of_an_older_answer() {
    let (broker, lessor) = start();
    broker.change(|info| *info = None);
    broker.delay_info(Duration::from_millis(500));
    let early = async { (lessor.fetch(ask(&broker, LONG)).await, clock::now()) };
    let later = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        broker.change(|info| *info = Some(again()));
        broker.publish("x");
        lessor.fetch(ask(&broker, LONG)).await
    };
    let began = clock::now();
    let ((told, at), found) = tokio::join!(early, later);
    assert_eq!(told.unwrap_err(), Error::ConsumerNotFound(broker.name()));
    assert_eq!(at - began, Duration::from_millis(500));
    assert_eq!(found.expect("a message").messages().len(), 1);
}
