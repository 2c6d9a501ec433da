//! A worker: fetches a batch, handles one message after the other, settles what became of them.
//! Copy it, and put your work into `handle`.

mod fetchproxy;

use std::{env, error::Error, time::Duration};

use fetchproxy::{
    Batch, Client,
    Failure::{self, Poison, Transient},
    pb::{self, Codec, Delivery, EmptyReason, FetchRequest, FetchResponse, delivery::Payload},
};
use serde_json::{Value, json};
use tokio::{signal::unix::SignalKind, time::sleep};
use tokio_util::sync::CancellationToken;

/// The work. What it returns decides what becomes of the message, and is told with it.
async fn handle(message: &Delivery) -> Result<Value, Failure> {
    let task = task(message);
    let seconds = |name: &str| Duration::from_secs_f64(task[name].as_f64().unwrap_or_default());
    match task["do"].as_str() {
        Some("fail") if Some(u64::from(message.delivery_count)) <= task["times"].as_u64() => {
            return Err(Transient(seconds("delay")));
        }
        Some("poison") => return Err(Poison(format!("task {} can never be done", task["id"]))),
        Some("slow") => sleep(seconds("seconds")).await,
        Some("headers") => {
            let headers = message.headers.iter().map(|(name, h)| (name.clone(), json!(h.values)));
            return Ok(json!({ "headers": Value::Object(headers.collect()) }));
        }
        _ => {}
    }
    Ok(json!({}))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let stop = stop_on_signal()?;
    let set = |name: &str, default: &str| env::var(name).unwrap_or_else(|_| default.to_owned());
    let request = FetchRequest {
        stream: env::var("STREAM").map_err(|_| "STREAM is not set")?,
        consumer: env::var("CONSUMER").map_err(|_| "CONSUMER is not set")?,
        n: set("BATCH", "10").parse()?,
        max_wait: Some(fetchproxy::to(Duration::from_secs_f64(set("MAX_WAIT", "10").parse()?))),
        max_bytes: fetchproxy::MAX_BYTES,
        codec: Codec::Json.into(),
        worker: "examples/rust".to_owned(),
        ..FetchRequest::default()
    };
    let mut client = fetchproxy::connect(&set("FETCH_PROXY_ADDR", "127.0.0.1:50051"))?;
    say(&json!({ "event": "ready" }));
    while let Some(answer) = fetchproxy::fetch(&mut client, &request, &stop).await? {
        work(&client, answer, &stop).await;
    }
    say(&json!({ "event": "stopped" }));
    Ok(())
}

async fn work(client: &Client, answer: FetchResponse, stop: &CancellationToken) {
    use EmptyReason::{NoMessages, Rejected, Unspecified};
    if ![Unspecified, NoMessages, Rejected].contains(&answer.empty_reason()) {
        stop.run_until_cancelled(sleep(Duration::from_millis(500))).await;
    }
    for rejected in &answer.rejected {
        eprintln!("message {}: {}", rejected.stream_sequence, rejected.detail);
        let (sequence, deliveries) = (rejected.stream_sequence, rejected.delivery_count);
        let event = "rejected";
        say(&json!({ "event": event, "sequence": sequence, "deliveries": deliveries, "id": null }));
    }
    let mut batch = Batch::new(client, &answer.messages);
    for (place, message) in answer.messages.iter().enumerate() {
        if batch.is_over(place) {
            say(&line("lost", message));
        } else if stop.is_cancelled() {
            batch.nak(place, Duration::ZERO, line("returned", message));
        } else {
            match batch.alive_during(handle(message)).await {
                Ok(told) => batch.ack(place, with(line("acked", message), told)),
                Err(Transient(delay)) => batch.nak(place, delay, line("nacked", message)),
                Err(Poison(reason)) => batch.term(place, reason, line("termed", message)),
            }
        }
        if batch.is_due() {
            batch.settle().await;
        }
    }
    batch.settle().await;
}

fn task(message: &Delivery) -> Value {
    let Some(Payload::Text(text)) = &message.payload else { return Value::Null };
    serde_json::from_str(text).unwrap_or_default()
}

fn line(event: &str, message: &Delivery) -> Value {
    let pb::Delivery { stream_sequence, delivery_count, .. } = message;
    let id = &task(message)["id"];
    json!({ "event": event, "sequence": stream_sequence, "deliveries": delivery_count, "id": id })
}

fn with(mut line: Value, told: Value) -> Value {
    let told = told.as_object().cloned().unwrap_or_default();
    line.as_object_mut().expect("a line").extend(told);
    line
}

/// Standard output is flushed at each line.
fn say(line: &Value) {
    println!("{line}");
}

fn stop_on_signal() -> Result<CancellationToken, std::io::Error> {
    let stop = CancellationToken::new();
    for kind in [SignalKind::terminate(), SignalKind::interrupt()] {
        let (mut signal, told) = (tokio::signal::unix::signal(kind)?, stop.clone());
        tokio::spawn(async move {
            signal.recv().await;
            told.cancel();
        });
    }
    Ok(stop)
}
