//! A worker stops: politely, by force, and with messages that are on their way.

mod support;

use std::time::Duration;

use fetchproxy::{Mode, Worker, testing::Settled};
use serde_json::json;
use support::{Crowd, Events, MODES, SECOND, done, fake, fake_with, in_time, worker};

#[tokio::test]
async fn stop_waits_for_the_handlers_that_run() {
    for mode in MODES {
        let (fake, crowd, events) = (fake(), Crowd::new(), Events::new());
        let first = fake.publish(1);
        let one = worker(fake.client(), mode, &events, crowd.handler()).concurrency(1);
        let stop = one.stop_handle();
        let word = async {
            crowd.begun(1).await;
            let later = fake.publish(2);
            stop.stop();
            crowd.end();
            later
        };
        let (result, later) = in_time(async { tokio::join!(one.run(), word) }).await;
        result.unwrap();
        assert_eq!(first.settlements(), [Settled::Ack]);
        assert_eq!(later.settlements(), []);
        assert_eq!(events.names(), ["ready", "acked", "stopped"]);
    }
}

#[tokio::test]
async fn worker_that_waits_stops_at_once() {
    for mode in MODES {
        let (fake, events) = (fake(), Events::new());
        let one = worker(fake.client(), mode, &events, done).max_wait(300 * SECOND);
        let stop = one.stop_handle();
        let word = async {
            events.until("ready", 1).await;
            stop.stop();
        };
        let (result, ()) = in_time(async { tokio::join!(one.run(), word) }).await;
        result.unwrap();
        assert_eq!(events.names(), ["ready", "stopped"]);
    }
}

#[tokio::test]
async fn messages_that_wait_go_back_at_a_stop() {
    let (fake, crowd, events) = (fake(), Crowd::new(), Events::new());
    let records = [1, 2, 3].map(|number| fake.publish(number));
    let one = worker(fake.client(), Mode::Fetch, &events, crowd.handler());
    let one = one.concurrency(1).batch(3);
    let stop = one.stop_handle();
    let word = async {
        crowd.begun(1).await;
        stop.stop();
        // While the first handler runs.
        events.until("returned", 2).await;
        crowd.end();
    };
    let (result, ()) = in_time(async { tokio::join!(one.run(), word) }).await;
    result.unwrap();
    let returned = Settled::Nak(Duration::ZERO);
    let settlements = records.map(|record| record.settlements().remove(0));
    assert_eq!(settlements, [Settled::Ack, returned.clone(), returned]);
}

#[tokio::test]
async fn message_that_waits_on_its_last_attempt_is_handled_at_a_stop() {
    let (fake, crowd, events) = (fake_with(1, 30 * SECOND), Crowd::new(), Events::new());
    let records = [1, 2, 3].map(|number| fake.publish(number));
    let one = worker(fake.client(), Mode::Fetch, &events, crowd.handler());
    let one = one.concurrency(1).batch(3);
    let stop = one.stop_handle();
    let word = async {
        crowd.begun(1).await;
        stop.stop();
        crowd.end();
    };
    let (result, ()) = in_time(async { tokio::join!(one.run(), word) }).await;
    result.unwrap();
    assert!(records.iter().all(|record| record.settlements() == [Settled::Ack]), "{records:?}");
}

/// Runs a worker, and stops it so many times when its first handler has begun.
async fn run_until_stopped(one: Worker, crowd: &Crowd, stops: usize) {
    let stop = one.stop_handle();
    let word = async {
        crowd.begun(1).await;
        (0..stops).for_each(|_| stop.stop());
    };
    let (result, ()) = in_time(async { tokio::join!(one.run(), word) }).await;
    result.unwrap();
}

#[tokio::test]
async fn second_stop_drops_the_handlers_and_gives_their_messages_back() {
    for mode in MODES {
        let (fake, crowd, events) = (fake(), Crowd::new(), Events::new());
        let record = fake.publish(json!({}));
        // With one handler, no Fetch waits that could take the message again.
        let one = worker(fake.client(), mode, &events, crowd.handler()).concurrency(1);
        run_until_stopped(one, &crowd, 2).await;
        assert_eq!(crowd.dropped().await, [1]);
        assert_eq!(record.settlements(), [Settled::Nak(Duration::ZERO)]);
        assert_eq!(events.names(), ["ready", "returned", "stopped"]);
    }
}

#[tokio::test]
async fn end_of_the_stop_timeout_gives_the_messages_back() {
    for mode in MODES {
        let (fake, crowd, events) = (fake(), Crowd::new(), Events::new());
        let record = fake.publish(json!({}));
        let one = worker(fake.client(), mode, &events, crowd.handler());
        let one = one.concurrency(1).stop_timeout(Duration::from_millis(100));
        run_until_stopped(one, &crowd, 1).await;
        assert_eq!(record.settlements(), [Settled::Nak(Duration::ZERO)]);
        assert_eq!(events.names(), ["ready", "returned", "stopped"]);
    }
}

#[tokio::test]
async fn second_stop_does_not_end_a_message_on_its_last_attempt() {
    for mode in MODES {
        let (fake, crowd, events) = (fake_with(1, 30 * SECOND), Crowd::new(), Events::new());
        let record = fake.publish(json!({}));
        // With one handler, no Fetch waits that could take the message again.
        let one = worker(fake.client(), mode, &events, crowd.handler()).concurrency(1);
        run_until_stopped(one, &crowd, 2).await;
        assert_eq!((record.settlements(), crowd.dropped().await), (vec![], vec![1]));
        assert_eq!(events.names(), ["ready", "lost", "stopped"]);
    }
}

#[tokio::test]
async fn fetch_under_way_is_given_back_at_a_stop() {
    let (fake, events) = (fake(), Events::new());
    let record = fake.publish(json!({}));
    // The messages are leased, and the worker does not know.
    (0..50).for_each(|_| fake.lose_answer("Fetch"));
    let one = worker(fake.client(), Mode::Fetch, &events, done);
    let stop = one.stop_handle();
    let word = async {
        events.until("retry", 1).await;
        assert_eq!(record.attempts(), 1);
        stop.stop();
    };
    let (result, ()) = in_time(async { tokio::join!(one.run(), word) }).await;
    result.unwrap();
    // The fake counts no attempt for a message that nobody has seen.
    assert_eq!((record.attempts(), record.settlements()), (0, vec![]));
}

#[tokio::test]
async fn run_that_is_dropped_drops_its_handlers() {
    for mode in MODES {
        let (fake, crowd, events) = (fake(), Crowd::new(), Events::new());
        fake.publish(json!({}));
        let one = worker(fake.client(), mode, &events, crowd.handler());
        tokio::select! {
            result = one.run() => panic!("{result:?}"),
            () = crowd.begun(1) => {}
        }
        assert_eq!(crowd.dropped().await, [1]);
        assert_eq!(events.names(), ["ready"]);
    }
}
