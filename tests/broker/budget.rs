//! Places for leases: what a pull keeps for what it may bring is free again when that is over.

use std::time::Duration;

use fetch_proxy::{
    broker::ConsumerName,
    lessor::{Error, FetchParams, Fetched, LeaseLimits, Lessor},
};
use testkit::fake_broker::{FakeBroker, IDLE, info, limits};

use super::faults::ask;

const MOST: u32 = 5;
const SECOND: Duration = Duration::from_secs(1);

fn start() -> (FakeBroker, Lessor<FakeBroker>) {
    let broker = FakeBroker::new(info(SECOND * 30));
    let max_leases = MOST as usize;
    let limits = LeaseLimits { max_leases, settle_timeout: SECOND, ..limits() };
    (broker.clone(), Lessor::start(broker, limits))
}

async fn fetch(
    broker: &FakeBroker,
    lessor: &Lessor<FakeBroker>,
    n: u32,
    max_wait: Duration,
) -> Result<Fetched, Error> {
    lessor.fetch(FetchParams { n, ..ask(broker, max_wait) }).await
}

#[tokio::test(start_paused = true)]
async fn lost_pull_keeps_no_budget() {
    let (broker, lessor) = start();
    broker.lose_pulls(true);
    let waiting = fetch(&broker, &lessor, MOST, SECOND * 10);
    let lost = async {
        tokio::time::sleep(SECOND).await;
        assert!(lessor.room() < MOST, "a pull is out");
    };
    let (fetched, ()) = tokio::join!(waiting, lost);
    assert!(fetched.unwrap().messages().is_empty());
    tokio::time::sleep(SECOND * 2).await;
    assert_eq!(lessor.room(), MOST);
    broker.lose_pulls(false);
    broker.publish("x");
    assert_eq!(fetch(&broker, &lessor, MOST, SECOND).await.unwrap().messages().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn late_end_of_a_pull_leaves_the_budget_of_the_next() {
    let (broker, lessor) = start();
    broker.lose_pulls(true);
    let waiting = fetch(&broker, &lessor, 2, SECOND * 20);
    let course = async {
        // The first is taken to have ended unheard a second after its 5 s.
        tokio::time::sleep(SECOND * 7).await;
        broker.tell_end_of(1);
        tokio::time::sleep(SECOND).await;
        assert_eq!(lessor.room(), MOST - 1, "the second is out");
        broker.tell_end_of(2);
        broker.lose_pulls(false);
        broker.publish("x");
    };
    let (fetched, ()) = tokio::join!(waiting, course);
    assert_eq!(fetched.unwrap().messages().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn bytes_of_a_pull_that_never_ended_leave_room_to_find_out() {
    let broker = FakeBroker::new(info(SECOND * 30));
    let limits = LeaseLimits { max_pull_bytes: 64 << 10, ..limits() };
    let lessor = Lessor::start(broker.clone(), limits);
    for _ in 0..2 {
        broker.publish("x");
    }
    let first = fetch(&broker, &lessor, 2, SECOND).await.expect("a full batch");
    assert_eq!(first.messages().len(), 2, "more may be there");
    first.delivered();
    broker.lose_pulls(true);
    let course = async {
        tokio::time::sleep(SECOND).await;
        broker.lose_pulls(false);
        tokio::time::sleep(SECOND).await;
        broker.publish("x");
    };
    let (found, ()) = tokio::join!(fetch(&broker, &lessor, 100, SECOND * 8), course);
    assert_eq!(found.expect("a message").messages().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn idle_pulls_hold_little_budget() {
    let broker = FakeBroker::new(info(SECOND * 30));
    let limits = LeaseLimits { max_leases: 1000, ..limits() };
    let lessor = Lessor::start(broker.clone(), limits);
    let waiting = fetch(&broker, &lessor, 1000, SECOND * 5);
    let look = async {
        tokio::time::sleep(SECOND).await;
        assert!(lessor.room() > 900, "{} are free while nothing is there", lessor.room());
    };
    let (fetched, ()) = tokio::join!(waiting, look);
    fetched.unwrap();
}

#[tokio::test(start_paused = true)]
async fn idle_consumers_leave_messages_to_busy_consumers() {
    // With 100 places, idle consumers alone are more than there are places.
    for (max_leases, patience) in [(1000, SECOND / 2), (100, SECOND * 6)] {
        let broker = FakeBroker::new(info(SECOND * 30));
        let limits = LeaseLimits { max_leases, max_waiters: 200, ..limits() };
        let lessor = Lessor::start(broker.clone(), limits);
        for number in 0..110 {
            let (broker, lessor) = (broker.clone(), lessor.clone());
            tokio::spawn(async move {
                let consumer = format!("{IDLE}-{number}").into();
                let name = ConsumerName { consumer, ..broker.name() };
                lessor
                    .fetch(FetchParams { name, n: 1000, ..ask(&broker, SECOND * 30) })
                    .await
                    .unwrap()
            });
        }
        tokio::time::sleep(SECOND).await;
        (0..20).for_each(|_| broker.publish("x"));
        let mut got = 0;
        while got < 20 {
            let fetched = fetch(&broker, &lessor, 20, patience).await.unwrap();
            assert!(!fetched.messages().is_empty(), "{max_leases}: nothing after {got}");
            got += fetched.messages().len();
            fetched.delivered();
        }
    }
}

#[tokio::test(start_paused = true)]
async fn consumer_that_never_settles_is_limited_and_leaves_leases_to_others() {
    for (most, limit) in [(usize::MAX, 90), (20, 20)] {
        let broker = FakeBroker::new(info(SECOND * 30));
        let limits = LeaseLimits { max_leases_per_consumer: most, ..limits() };
        let lessor = Lessor::start(broker.clone(), limits);
        (0..200).for_each(|_| broker.publish("x"));
        let mut held = 0;
        let refused = loop {
            match fetch(&broker, &lessor, 1000, Duration::ZERO).await {
                Ok(fetched) => {
                    held += fetched.messages().len();
                    fetched.delivered();
                }
                Err(error) => break error,
            }
        };
        assert_eq!(refused, Error::ConsumerLeaseLimit(limit));
        assert_eq!((held, lessor.room()), (limit, 100 - u32::try_from(limit).unwrap()));
    }
}
