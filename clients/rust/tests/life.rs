//! A worker runs handlers at once, keeps their leases, cancels them, and repeats what failed.

mod support;

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use fetchproxy::{Client, Credentials, Mode, testing::Settled};
use serde_json::json;
use support::{Crowd, Events, MODES, SECOND, done, fake, fake_with, in_time, worker};
use tokio::time;

#[tokio::test]
async fn as_many_handlers_run_at_once_as_wanted() {
    for (mode, concurrency) in MODES.into_iter().flat_map(|mode| [(mode, 1), (mode, 4)]) {
        let (fake, crowd, events) = (fake(), Crowd::new(), Events::new());
        (0..10).for_each(|number| drop(fake.publish(number)));
        let one = worker(fake.client(), mode, &events, crowd.handler()).concurrency(concurrency);
        let running = fake.run(one);
        let word = async {
            crowd.begun(concurrency).await;
            crowd.end();
        };
        let (result, ()) = tokio::join!(running, word);
        result.unwrap();
        assert_eq!(crowd.counts().most, concurrency, "{mode:?}");
        assert!(fake.messages().iter().all(|record| record.settlements() == [Settled::Ack]));
    }
}

#[tokio::test]
async fn handler_is_dropped_when_its_lease_is_lost_and_its_message_comes_back() {
    for mode in MODES {
        let (fake, crowd, events) = (fake_with(0, 6 * SECOND), Crowd::new(), Events::new());
        let record = fake.publish(json!({}));
        let running = fake.run(worker(fake.client(), mode, &events, crowd.handler()));
        let word = async {
            crowd.begun(1).await;
            fake.expire(&record);
            events.until("lost", 1).await;
            crowd.end();
        };
        let (result, ()) = tokio::join!(running, word);
        result.unwrap();
        assert_eq!(crowd.dropped().await, [1], "{mode:?}");
        assert_eq!(record.settlements(), [Settled::Ack]);
        assert_eq!(events.attempts(), [("lost", 1), ("acked", 2)]);
    }
}

#[tokio::test]
async fn handler_that_hangs_loses_its_message_after_the_longest_time() {
    for mode in MODES {
        let (fake, events) = (fake_with(0, SECOND), Events::new());
        let record = fake.publish(json!({}));
        let one = worker(fake.client(), mode, &events, |message| async move {
            if message.delivery_count == 1 {
                std::future::pending::<()>().await;
            }
            Ok(())
        });
        // Longer than the first lease, so that an extension must not pass it.
        fake.run(one.at_most(2 * SECOND)).await.unwrap();
        assert_eq!(record.settlements(), [Settled::Ack]);
        assert_eq!(events.attempts()[0], ("lost", 1));
    }
}

#[tokio::test]
async fn lease_is_kept_while_the_handler_runs() {
    for mode in MODES {
        let (fake, events) = (fake_with(0, 3 * SECOND), Events::new());
        let record = fake.publish(json!({}));
        let one = worker(fake.client(), mode, &events, |_| async {
            time::sleep(SECOND * 7 / 2).await;
            Ok(())
        });
        fake.run(one).await.unwrap();
        assert_eq!((record.attempts(), record.settlements()), (1, vec![Settled::Ack]));
    }
}

#[tokio::test]
async fn call_that_fails_is_repeated() {
    for mode in MODES {
        let (fake, events) = (fake(), Events::new());
        let record = fake.publish(json!({}));
        let method = if mode == Mode::Consume { "Consume" } else { "Fetch" };
        fake.fail(method, "NATS_UNAVAILABLE");
        fake.fail(method, "DRAINING");
        fake.run(worker(fake.client(), mode, &events, done)).await.unwrap();
        assert_eq!(record.settlements(), [Settled::Ack]);
        assert_eq!(events.retries(), ["NATS_UNAVAILABLE", "DRAINING"]);
    }
}

#[tokio::test]
async fn settlement_that_fails_for_now_is_repeated() {
    for mode in MODES {
        let (fake, events) = (fake(), Events::new());
        let record = fake.publish(json!({}));
        fake.fail_settlement("SETTLE_UNCONFIRMED");
        fake.fail_settlement("LEASE_BUSY");
        fake.run(worker(fake.client(), mode, &events, done)).await.unwrap();
        assert_eq!((record.attempts(), record.settlements()), (1, vec![Settled::Ack]));
        assert_eq!(events.retries(), ["SETTLE_UNCONFIRMED", "LEASE_BUSY"]);
        assert_eq!(events.attempts(), [("acked", 1)]);
    }
}

#[tokio::test]
async fn settlement_that_is_refused_loses_its_message() {
    for mode in MODES {
        let (fake, events) = (fake_with(0, 2 * SECOND), Events::new());
        let record = fake.publish(json!({}));
        fake.fail_settlement("LEASE_EXPIRED");
        let running = fake.run(worker(fake.client(), mode, &events, done));
        let word = async {
            events.until("lost", 1).await;
            // The worker must not settle it again, so another gets it.
            fake.expire(&record);
        };
        let (result, ()) = tokio::join!(running, word);
        result.unwrap();
        assert_eq!(record.settlements(), [Settled::Ack]);
        assert_eq!(events.attempts(), [("lost", 1), ("acked", 2)]);
    }
}

#[tokio::test]
async fn refusal_ends_the_worker_with_its_reason() {
    for mode in MODES {
        let (fake, events) = (fake(), Events::new());
        fake.fail(if mode == Mode::Consume { "Consume" } else { "Fetch" }, "NOT_ALLOWED");
        let one = worker(fake.client(), mode, &events, done);
        let error = in_time(one.run()).await.unwrap_err();
        assert_eq!(
            (error.reason.as_str(), error.code),
            ("NOT_ALLOWED", fetchproxy::Code::PermissionDenied)
        );
        assert_eq!(events.names(), ["ready"]);
    }
}

#[tokio::test]
async fn handler_continues_when_its_stream_breaks() {
    let (fake, crowd, events) = (fake(), Crowd::new(), Events::new());
    let records = [fake.publish(1), fake.publish(2)];
    let one = worker(fake.client(), Mode::Consume, &events, crowd.handler());
    let running = fake.run(one.concurrency(1).grace(3 * SECOND));
    let word = async {
        crowd.begun(1).await;
        fake.cut();
        events.until("retry", 1).await;
        // More than a lease that is extended once.
        time::sleep(SECOND * 7 / 2).await;
        assert_eq!(records.each_ref().map(|record| record.attempts()), [1, 0]);
        crowd.end();
    };
    let (result, ()) = tokio::join!(running, word);
    result.unwrap();
    assert!(records.iter().all(|record| record.settlements() == [Settled::Ack]), "{records:?}");
    assert_eq!((crowd.counts().most, crowd.dropped().await), (1, vec![]));
    assert_eq!(events.attempts(), [("acked", 1), ("acked", 1)]);
}

#[tokio::test]
async fn outcome_is_settled_on_the_next_stream_after_a_break() {
    let (fake, events) = (fake(), Events::new());
    let record = fake.publish(json!({}));
    fake.fail("Consume", "DRAINING");
    let crowd = Crowd::new();
    let running = fake.run(worker(fake.client(), Mode::Consume, &events, crowd.handler()));
    let word = async {
        crowd.begun(1).await;
        // The next stream is not there at once.
        fake.fail("Consume", "DRAINING");
        fake.cut();
        events.until("retry", 3).await;
        crowd.end();
    };
    let (result, ()) = tokio::join!(running, word);
    result.unwrap();
    assert_eq!((record.attempts(), record.settlements()), (1, vec![Settled::Ack]));
}

#[tokio::test]
async fn lease_ends_by_the_clock_of_the_worker_if_there_is_no_proxy() {
    for mode in MODES {
        let (crowd, events) = (Crowd::new(), Events::new());
        let fake = fake_with(0, 2 * SECOND);
        fake.publish(json!({}));
        let client = Client::new(fake.address(), Credentials::default()).unwrap();
        let one = worker(client, mode, &events, crowd.handler());
        let stop = one.stop_handle();
        let word = async {
            crowd.begun(1).await;
            drop(fake);
            events.until("lost", 1).await;
            stop.stop();
        };
        let (result, ()) = in_time(async { tokio::join!(one.run(), word) }).await;
        result.unwrap();
        assert_eq!(crowd.dropped().await, [1]);
    }
}

#[tokio::test]
async fn answers_that_are_lost_cost_nothing() {
    let (fake, events) = (fake(), Events::new());
    let record = fake.publish(json!({}));
    fake.lose_answer("Fetch");
    fake.lose_answer("Settle");
    fake.run(worker(fake.client(), Mode::Fetch, &events, done)).await.unwrap();
    assert_eq!((record.attempts(), record.settlements()), (1, vec![Settled::Ack]));
    assert_eq!(events.attempts(), [("acked", 1)]);
}

#[tokio::test]
async fn many_messages_are_each_done_once() {
    for mode in MODES {
        let (fake, events, count) = (fake(), Events::new(), Arc::new(AtomicUsize::new(0)));
        (0..500).for_each(|number| drop(fake.publish(number)));
        let handled = count.clone();
        let one = worker(fake.client(), mode, &events, move |_| {
            handled.fetch_add(1, Ordering::Relaxed);
            async { Ok(()) }
        });
        fake.run(one.concurrency(50)).await.unwrap();
        assert_eq!(count.load(Ordering::Relaxed), 500);
        assert!(fake.messages().iter().all(|record| record.settlements() == [Settled::Ack]));
    }
}
