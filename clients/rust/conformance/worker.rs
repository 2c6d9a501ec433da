//! The worker of the conformance suite: examples/conformance.json says what a task may ask for. It prints a line of JSON
//! for each event. With CONCURRENCY, it works by Consume on so many messages at once. Otherwise, it works by Fetch on one
//! message after the other.

use std::{env, error::Error, process::ExitCode, time::Duration};

use fetchproxy::{Client, Envelope, Event, Failure, Message, Mode, Nak, Term, Worker};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::sleep;

/// The task of a message.
#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Task {
    Ok,
    Headers,
    Poison,
    Fail { times: u32, delay: f64 },
    Slow { seconds: f64 },
}

async fn handle(message: Message<Option<Task>>) -> Result<(), Failure> {
    match &message.data {
        // A tombstone, or a consumer of headers only. There is nothing to do.
        None if !message.has_payload() => Ok(()),
        None => Err(Term::new("not a task"))?,
        Some(Task::Ok | Task::Headers) => Ok(()),
        Some(Task::Poison) => Err(Term::new("the task says so"))?,
        Some(Task::Fail { times, delay }) if message.delivery_count <= *times => {
            Err(Nak { delay: duration(*delay) })?
        }
        Some(Task::Fail { .. }) => Ok(()),
        Some(Task::Slow { seconds }) => {
            sleep(duration(*seconds)).await;
            Ok(())
        }
    }
}

fn tell(event: &Event) {
    let name = event.name();
    match event {
        Event::Ready | Event::Stopped => say(json!({ "event": name })),
        Event::Retry { error, wait } => {
            eprintln!("again in {wait:?}: {error}");
            let (reason, message, wait) = (&error.reason, &error.message, wait.as_secs_f64());
            say(json!({ "event": name, "reason": reason, "message": message, "in": wait }));
        }
        Event::Rejected { rejected } => {
            let (sequence, deliveries) = (rejected.stream_sequence, rejected.delivery_count);
            eprintln!("message {sequence} is rejected: {}", rejected.detail);
            say(
                json!({ "event": name, "sequence": sequence, "deliveries": deliveries, "id": null }),
            );
        }
        // The line of the Nak follows.
        Event::HandlerError { message, error } => {
            eprintln!("message {}: {error}", message.stream_sequence);
        }
        event => {
            if let Event::Lost { message, error } = event {
                eprintln!("message {} is lost: {error}", message.stream_sequence);
            }
            event.message().into_iter().for_each(|message| say_of(name, message));
        }
    }
}

fn say_of(event: &str, message: &Envelope) {
    let task: Value = serde_json::from_slice(&message.payload).unwrap_or_default();
    let mut line = json!({
        "event": event,
        "sequence": message.stream_sequence,
        "deliveries": message.delivery_count,
        "id": task["id"],
    });
    if task["do"] == "headers" {
        line["headers"] = json!(message.headers);
    }
    say(line);
}

fn say(line: Value) {
    println!("{line}");
}

#[tokio::main]
async fn main() -> ExitCode {
    match work().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("worker: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn work() -> Result<(), Box<dyn Error>> {
    let set = |name: &str, default: &str| env::var(name).unwrap_or_else(|_| default.to_owned());
    let stream = env::var("STREAM").map_err(|_| "STREAM is not set")?;
    let consumer = env::var("CONSUMER").map_err(|_| "CONSUMER is not set")?;
    let worker = Worker::new(Client::from_env()?, &stream, &consumer, handle);
    let worker = worker.name("clients/rust").on_event(tell);
    let worker = if let Ok(concurrency) = env::var("CONCURRENCY") {
        let grace = duration(set("GRACE", "10").parse()?);
        worker.concurrency(concurrency.parse()?).grace(grace)
    } else {
        let max_wait = duration(set("MAX_WAIT", "10").parse()?);
        let worker = worker.mode(Mode::Fetch).concurrency(1).max_wait(max_wait);
        worker.batch(set("BATCH", "10").parse()?)
    };
    Ok(worker.run_until_signal().await?)
}

/// A negative number becomes zero, and a number that is too large becomes the longest duration.
fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}
