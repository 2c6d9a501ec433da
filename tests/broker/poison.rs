//! The lessor and messages that break every connection that brings them: who is hurt, and for how
//! long.

use std::time::Duration;

use fetch_proxy::{
    broker::{AckKind, ConnectionKind},
    lessor::{Error, Lessor, Unsuitable},
};
use testkit::{
    eventually,
    fake_broker::{FakeBroker, Fault, SearchScope, info, limits},
};

use super::faults::ask;

const ACK_WAIT: Duration = Duration::from_secs(10);
const SECOND: Duration = Duration::from_secs(1);

fn start() -> (FakeBroker, Lessor<FakeBroker>) {
    let broker = FakeBroker::new(info(ACK_WAIT));
    (broker.clone(), Lessor::start(broker, limits()))
}

/// How many messages were handed over.
async fn fetch(
    broker: &FakeBroker,
    lessor: &Lessor<FakeBroker>,
    max_wait: Duration,
) -> Result<usize, Error> {
    lessor.fetch(ask(broker, max_wait)).await.map(|fetched| {
        let count = fetched.messages().len();
        fetched.delivered();
        count
    })
}

/// Fetches so many messages one after the other, and leaves them unsettled.
async fn fetch_all(broker: &FakeBroker, lessor: &Lessor<FakeBroker>, count: usize) {
    let mut found = 0;
    while found < count {
        found += fetch(broker, lessor, SECOND * 2).await.unwrap();
    }
}

fn terminated(broker: &FakeBroker) -> usize {
    let published = broker.published();
    published.iter().filter(|verdict| matches!(verdict, AckKind::Term(_))).count()
}

fn unreadable(result: &Result<usize, Error>) -> bool {
    let Err(Error::ConsumerUnsuitable { property, .. }) = result else { return false };
    matches!(property, Unsuitable::Unreadable { .. })
}

fn suspected(result: &Result<usize, Error>) -> bool {
    matches!(result, Err(Error::ConsumerSuspected { .. }))
}

#[tokio::test(start_paused = true)]
async fn unreadable_message_is_terminated_and_others_are_delivered() {
    let (broker, lessor) = start();
    for _ in 0..3 {
        broker.publish("good");
        broker.publish_poison();
    }
    fetch_all(&broker, &lessor, 3).await;
    eventually("all three to be terminated", || async {
        let _ = fetch(&broker, &lessor, Duration::ZERO).await;
        (terminated(&broker) == 3).then_some(())
    })
    .await;
    let reason = AckKind::Term("fetch-proxy: unreadable headers: poison".into());
    assert!(broker.published().contains(&reason), "{:?}", broker.published());
    assert_eq!(
        broker.opened()[..2],
        [ConnectionKind::Shared, ConnectionKind::Dedicated],
        "the guilty go on by themselves"
    );
}

#[tokio::test(start_paused = true)]
async fn suspect_returns_to_the_shared_connection_after_a_quiet_time() {
    let (broker, lessor) = start();
    broker.publish_poison();
    let empty = fetch(&broker, &lessor, SECOND * 5).await.unwrap();
    assert_eq!(empty, 0);
    assert_eq!(broker.opened(), [ConnectionKind::Shared, ConnectionKind::Dedicated]);
    for _ in 0..10 {
        fetch(&broker, &lessor, SECOND * 3).await.unwrap();
    }
    assert_eq!(
        broker.opened(),
        [ConnectionKind::Shared, ConnectionKind::Dedicated, ConnectionKind::Shared]
    );
}

#[tokio::test(start_paused = true)]
async fn break_without_deliveries_clears_a_consumer() {
    let (broker, lessor) = start();
    let waiting = fetch(&broker, &lessor, SECOND * 20);
    let breaking = async {
        for _ in 0..5 {
            tokio::time::sleep(SECOND).await;
            broker.break_shared();
        }
        tokio::time::sleep(SECOND).await;
        broker.publish("good");
    };
    let (fetched, ()) = tokio::join!(waiting, breaking);
    assert_eq!(fetched.unwrap(), 1);
    assert_eq!((broker.looks(), broker.opened()), (0, vec![ConnectionKind::Shared; 6]));
}

/// Nothing of it is ever refused: others would not be served better by that.
#[tokio::test(start_paused = true)]
async fn unexplained_break_is_forgiven_once_then_isolates_its_consumer() {
    // Whether the loss or the new link is heard of first is chance.
    for _ in 0..50 {
        let (broker, lessor) = start();
        broker.see(SearchScope::Nothing);
        broker.publish_poison();
        while broker.opened().len() < 5 {
            fetch(&broker, &lessor, SECOND * 5).await.unwrap();
        }
        let apart = ConnectionKind::Dedicated;
        assert_eq!(
            broker.opened(),
            [ConnectionKind::Shared, ConnectionKind::Shared, apart, apart, apart]
        );
        broker.publish("good");
        fetch_all(&broker, &lessor, 1).await;
    }
}

#[tokio::test(start_paused = true)]
async fn forbidden_search_leaves_the_consumer_suspected_and_served() {
    for scope in [SearchScope::NotAllowed, SearchScope::Part] {
        let (broker, lessor) = start();
        broker.see(scope);
        broker.publish_poison();
        let refused = loop {
            let result = fetch(&broker, &lessor, SECOND * 5).await;
            if result.is_err() {
                break result;
            }
        };
        assert!(suspected(&refused), "{refused:?}");
        if scope == SearchScope::NotAllowed {
            let said = refused.unwrap_err().to_string();
            assert!(said.contains("`MSG.GET`"), "{said}");
        }
        // The client repeats the call at once, as the refusal asks, and receives the good messages
        // each time.
        for _ in 0..5 {
            broker.publish("good");
            eventually("the next good one", || async {
                fetch(&broker, &lessor, SECOND).await.ok().filter(|count| *count > 0)
            })
            .await;
        }
        assert!(broker.opened()[2..].iter().all(|place| *place == ConnectionKind::Dedicated));
        // An operator gives the right: it is found.
        broker.see(SearchScope::All);
        eventually("its end", || async {
            let _ = fetch(&broker, &lessor, SECOND * 2).await;
            (terminated(&broker) == 1).then_some(())
        })
        .await;
    }
}

#[tokio::test(start_paused = true)]
async fn unreadable_message_that_stays_suspends_its_consumer_for_doubling_times() {
    let (broker, lessor) = start();
    broker.publish_poison();
    // On the shared connection, then on its own, where it meets the message an ack wait later.
    broker.script([Fault::Lost, Fault::Lost]);
    let refused = fetch(&broker, &lessor, SECOND * 30).await;
    assert!(unreadable(&refused), "{refused:?}");
    assert_eq!(broker.opened(), [ConnectionKind::Shared, ConnectionKind::Dedicated]);
    // Others would find it on the shared connection: it is refused at once, and not tried.
    for fence in [30, 60] {
        broker.script([Fault::Lost]);
        tokio::time::sleep(SECOND * (fence - 1)).await;
        assert!(unreadable(&fetch(&broker, &lessor, SECOND * 30).await));
        tokio::time::sleep(SECOND * 2).await;
        assert!(unreadable(&fetch(&broker, &lessor, SECOND * 30).await));
    }
    assert_eq!(
        broker.opened(),
        [
            ConnectionKind::Shared,
            ConnectionKind::Dedicated,
            ConnectionKind::Dedicated,
            ConnectionKind::Dedicated
        ]
    );
    tokio::time::sleep(SECOND * 121).await;
    broker.publish("good");
    fetch_all(&broker, &lessor, 1).await;
}
