//! A handler decides how its message is settled: with Consume and with Fetch.

mod support;

use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};

use bytes::Bytes;
use fetchproxy::{Event, Failure, Headers, Message, Nak, Term, Worker, testing::Settled};
use serde::Deserialize;
use serde_json::{Value, json};
use support::{Events, MODES, SECOND, done, fake, fake_with, worker};

#[tokio::test]
async fn message_is_acked_if_the_handler_returns() {
    for mode in MODES {
        let (fake, events) = (fake(), Events::new());
        let headers =
            Headers::from([("Colour".to_owned(), vec!["red".to_owned(), "green".to_owned()])]);
        let record = fake.publish_bytes(r#"{"order": 7}"#, "orders.new", headers.clone());
        let seen = Arc::new(Mutex::new(None));
        let told = seen.clone();
        let one = worker(fake.client(), mode, &events, move |message| {
            *told.lock().unwrap() = Some(message);
            async { Ok(()) }
        });
        fake.run(one).await.unwrap();
        assert_eq!(record.settlements(), [Settled::Ack]);
        assert_eq!(events.names(), ["ready", "acked", "stopped"]);
        let message = seen.lock().unwrap().take().unwrap();
        assert_eq!(message.data, json!({ "order": 7 }));
        assert_eq!(&message.payload[..], br#"{"order": 7}"#);
        assert_eq!((message.subject.as_str(), &message.headers), ("orders.new", &headers));
        let counts = (message.stream_sequence, message.delivery_count, message.max_deliver);
        assert_eq!(counts, (1, 1, 0));
        assert_eq!(message.timestamp, record.timestamp());
    }
}

#[tokio::test]
async fn message_comes_back_after_a_nak() {
    for mode in MODES {
        let (fake, events) = (fake(), Events::new());
        let record = fake.publish(json!({}));
        let one = worker(fake.client(), mode, &events, |message| async move {
            if message.delivery_count < 3 {
                let delay = message.delivery_count * Duration::from_millis(1500);
                return Err(Nak { delay }.into());
            }
            Ok(())
        });
        fake.run(one).await.unwrap();
        let delays = [Duration::from_millis(1500), 3 * SECOND];
        assert_eq!(
            record.settlements(),
            [Settled::Nak(delays[0]), Settled::Nak(delays[1]), Settled::Ack]
        );
        assert_eq!(events.attempts(), [("nacked", 1), ("nacked", 2), ("acked", 3)]);
    }
}

#[tokio::test]
async fn message_is_terminated_with_a_reason() {
    for mode in MODES {
        let (fake, events) = (fake(), Events::new());
        let record = fake.publish(json!({}));
        let one =
            worker(fake.client(), mode, &events, |_| async { Err(Term::new("no such customer"))? });
        fake.run(one).await.unwrap();
        assert_eq!(record.settlements(), [Settled::Term("no such customer".to_owned())]);
        assert_eq!(events.attempts(), [("termed", 1)]);
    }
}

#[tokio::test]
async fn error_of_a_handler_is_a_nak_whose_delay_grows() {
    for mode in MODES {
        let (fake, events) = (fake_with(8, 30 * SECOND), Events::new());
        let record = fake.publish(json!({}));
        let one =
            worker(fake.client(), mode, &events, |_| async { Err(io::Error::other("no disk"))? });
        fake.run(one).await.unwrap();
        let delays = [5, 10, 20, 40, 80, 160, 300, 300];
        assert_eq!(record.settlements(), delays.map(|delay| Settled::Nak(delay * SECOND)));
        let errors = events.all().into_iter().filter_map(|event| match event {
            Event::HandlerError { error, .. } => Some(error.to_string()),
            _ => None,
        });
        assert_eq!(errors.collect::<Vec<_>>(), ["no disk"; 8]);
    }
}

#[tokio::test]
async fn panic_of_a_handler_is_an_error_of_its_message_alone() {
    for mode in MODES {
        let (fake, events) = (fake(), Events::new());
        let (wrong, right) = (fake.publish(1), fake.publish(2));
        let one = worker(fake.client(), mode, &events, |message| async move {
            assert!(message.data != 1 || message.delivery_count > 1, "the handler panics");
            Ok(())
        });
        fake.run(one).await.unwrap();
        assert_eq!(wrong.settlements(), [Settled::Nak(5 * SECOND), Settled::Ack]);
        assert_eq!(right.settlements(), [Settled::Ack]);
        assert!(events.names().contains(&"handler_error"));
    }
}

#[derive(Debug, Deserialize, PartialEq)]
struct Order {
    number: u32,
}

#[tokio::test]
async fn payload_that_is_not_of_the_type_is_terminated_and_never_handled() {
    for mode in MODES {
        let fake = fake();
        let wrong = [fake.publish(json!({ "note": "no number" })), fake.publish("seven")];
        let right = fake.publish(json!({ "number": 7, "unknown": true }));
        let one =
            Worker::new(fake.client(), "TASKS", "workers", |message: Message<Order>| async move {
                assert_eq!(message.data, Order { number: 7 });
                Ok(())
            });
        fake.run(one.mode(mode)).await.unwrap();
        let [Settled::Term(reason)] = &wrong[0].settlements()[..] else { panic!("{wrong:?}") };
        assert!(reason.contains("cannot be decoded: missing field `number`"), "{reason}");
        assert!(matches!(wrong[1].settlements()[..], [Settled::Term(_)]), "{wrong:?}");
        assert_eq!(right.settlements(), [Settled::Ack]);
    }
}

#[tokio::test]
async fn function_decodes_a_payload() {
    for mode in MODES {
        let fake = fake();
        let publish = |text: &str| fake.publish_bytes(text.to_owned(), "tasks", Headers::new());
        let (wrong, right) = (publish("seven"), publish("7"));
        let decode = |envelope: &fetchproxy::Envelope| {
            String::from_utf8_lossy(&envelope.payload).parse::<u32>()
        };
        let handle = |message: Message<u32>| async move {
            assert_eq!(message.data, 7);
            Ok(())
        };
        let one = Worker::decoded(fake.client(), "TASKS", "workers", decode, handle);
        fake.run(one.mode(mode)).await.unwrap();
        assert!(matches!(wrong.settlements()[..], [Settled::Term(_)]), "{wrong:?}");
        assert_eq!(right.settlements(), [Settled::Ack]);
    }
}

#[tokio::test]
async fn text_and_bytes_are_what_was_published() {
    for mode in MODES {
        let fake = fake();
        fake.publish_bytes("grün", "tasks", Headers::new());
        let handle = |message: Message<String>| async move {
            assert_eq!(message.data, "grün");
            Ok(())
        };
        fake.run(Worker::text(fake.client(), "TASKS", "workers", handle).mode(mode)).await.unwrap();
        fake.publish_bytes(&b"\xff\x00"[..], "tasks", Headers::new());
        let handle = |message: Message<Bytes>| async move {
            assert_eq!(&message.data[..], b"\xff\x00");
            Ok(())
        };
        fake.run(Worker::bytes(fake.client(), "TASKS", "workers", handle).mode(mode))
            .await
            .unwrap();
        let settlements =
            fake.messages().iter().map(|record| record.settlements()).collect::<Vec<_>>();
        assert_eq!(settlements, [[Settled::Ack], [Settled::Ack]]);
    }
}

#[tokio::test]
async fn proxy_terminates_what_is_not_json() {
    for mode in MODES {
        let (fake, events) = (fake(), Events::new());
        let record = fake.publish_bytes("{", "orders.new", Headers::new());
        // When this message is acked, the worker has heard of the other.
        fake.publish(json!({}));
        fake.run(worker(fake.client(), mode, &events, done)).await.unwrap();
        assert!(matches!(record.settlements()[..], [Settled::Term(_)]), "{record:?}");
        let all = events.all();
        let Event::Rejected { rejected } = &all[1] else { panic!("{all:?}") };
        assert_eq!((&rejected.payload[..], rejected.subject.as_str()), (&b"{"[..], "orders.new"));
        assert_eq!(rejected.cause, fetchproxy::RejectedCause::Codec);
    }
}

#[tokio::test]
async fn message_without_payload_is_null() {
    for mode in MODES {
        let fake = fake();
        let tombstone = Headers::from([("KV-Operation".to_owned(), vec!["DEL".to_owned()])]);
        let record = fake.publish_bytes("", "tasks", tombstone);
        let handle = |message: Message<Option<Order>>| async move {
            assert!(message.data.is_none() && !message.has_payload());
            Ok(())
        };
        let one = Worker::new(fake.client(), "TASKS", "workers", handle);
        fake.run(one.mode(mode)).await.unwrap();
        assert_eq!(record.settlements(), [Settled::Ack]);
    }
}

#[tokio::test]
async fn message_that_is_too_large_goes_to_another_worker() {
    for mode in MODES {
        let (fake, events) = (fake_with(1, 30 * SECOND), Events::new());
        let record = fake.publish("x".repeat(5000));
        let one = worker(fake.client(), mode, &events, done).max_bytes(2048);
        fake.run(one).await.unwrap();
        assert_eq!(record.settlements(), [Settled::Nak(60 * SECOND)]);
        assert_eq!(events.names(), ["ready", "rejected", "stopped"]);
    }
}

#[tokio::test]
async fn panic_of_the_hook_does_not_end_the_worker() {
    for mode in MODES {
        let fake = fake();
        let record = fake.publish(json!({}));
        let one = Worker::new(fake.client(), "TASKS", "workers", done).mode(mode);
        fake.run(one.on_event(|event| panic!("no disk at {}", event.name()))).await.unwrap();
        assert_eq!(record.settlements(), [Settled::Ack]);
    }
}

#[tokio::test]
async fn option_out_of_range_is_refused_before_any_call() {
    let fake = fake();
    let record = fake.publish(json!({}));
    let new = || Worker::new(fake.client(), "TASKS", "workers", done);
    for (wrong, name) in [
        (new().concurrency(0), "concurrency"),
        (new().batch(1001), "batch"),
        (new().max_wait(301 * SECOND), "max_wait"),
        (new().lease(Duration::from_millis(999)), "lease"),
        (new().grace(Duration::ZERO), "grace"),
        (new().max_bytes(1023), "max_bytes"),
        (new().at_most(Duration::ZERO), "at_most"),
        (new().name("x".repeat(1025)), "name"),
        (Worker::new(fake.client(), "", "workers", done), "stream"),
    ] {
        let error = wrong.run().await.unwrap_err();
        assert_eq!(error.reason, "INVALID_ARGUMENT");
        assert!(error.message.contains(name), "{error}");
    }
    assert_eq!(record.attempts(), 0);
}

/// A closure may leave the type of its error to the worker.
#[tokio::test]
async fn any_error_fits_into_the_result_of_a_handler() {
    let fake = fake_with(1, 30 * SECOND);
    let record = fake.publish(json!("seven"));
    let one =
        Worker::new(fake.client(), "TASKS", "workers", |message: Message<Value>| async move {
            let text = message.data.as_str().ok_or_else(|| Failure::new("no text"))?;
            text.parse::<u32>()?;
            Ok(())
        });
    fake.run(one.on_event(|_| {})).await.unwrap();
    assert_eq!(record.settlements(), [Settled::Nak(5 * SECOND)]);
}
