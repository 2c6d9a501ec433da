//! A worker. With Fetch, it takes a batch, and works on one message after the other. With Consume, if
//! CONCURRENCY is set, it works on up to so many messages at once, as they come. It logs the outcome
//! of each. Copy it, and put your work into `handle`.

mod consume;
mod fetchproxy;

use std::{env, error::Error, time::Duration};

use fetchproxy::{
    Batch, Client,
    Failure::{self, Poison, Transient},
    pb::{Codec, ConsumeCredit, ConsumeStart, Delivery, FetchRequest, delivery::Payload},
};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

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

/// The work. `Ok` acks the message, and its value goes to the log line. An error also settles the
/// message: see `Failure`. `lost` is cancelled when another worker may have received the message.
async fn handle(message: Delivery, lost: CancellationToken) -> Result<Value, Failure> {
    let Some(Payload::Text(text)) = &message.payload else {
        return Err(Poison("not text".to_owned()));
    };
    if text.is_empty() {
        return Ok(Value::Null); // A tombstone or a consumer of headers only: nothing to do.
    }
    match serde_json::from_str(text).map_err(|error| Poison(format!("not a task: {error}")))? {
        Task::Fail { times, delay } if message.delivery_count <= times => {
            return Err(Transient(duration(delay)));
        }
        Task::Poison => return Err(Poison("the task says so".to_owned())),
        Task::Slow { seconds } => {
            lost.run_until_cancelled(sleep(duration(seconds))).await;
        }
        Task::Headers => {
            let headers = message.headers.into_iter().map(|(name, h)| (name, json!(h.values)));
            return Ok(json!({ "headers": Value::Object(headers.collect()) }));
        }
        Task::Ok | Task::Fail { .. } => {}
    }
    Ok(Value::Null)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let stop = stop_on_signal()?;
    let set = |name: &str, default: &str| env::var(name).unwrap_or_else(|_| default.to_owned());
    let stream = env::var("STREAM").map_err(|_| "STREAM is not set")?;
    let consumer = env::var("CONSUMER").map_err(|_| "CONSUMER is not set")?;
    let worker = "examples/rust".to_owned();
    let client = Client::new(&set("FETCH_PROXY_ADDR", "127.0.0.1:50051"))?;
    fetchproxy::say(&json!({ "event": "ready" }));
    if let Ok(concurrency) = env::var("CONCURRENCY") {
        let max_leases = Some(concurrency.parse()?);
        let start = ConsumeStart {
            stream,
            consumer,
            credit: Some(ConsumeCredit { max_leases, ..ConsumeCredit::default() }),
            max_frame_bytes: fetchproxy::MAX_BYTES,
            codec: Codec::Json.into(),
            worker,
            ..ConsumeStart::default()
        };
        let grace = duration(set("GRACE", "10").parse()?);
        consume::consume(client, start, grace, &stop, handle).await?;
    } else {
        let request = FetchRequest {
            stream,
            consumer,
            n: set("BATCH", "10").parse()?,
            max_wait: Some(fetchproxy::to(duration(set("MAX_WAIT", "10").parse()?))),
            max_bytes: fetchproxy::MAX_BYTES,
            codec: Codec::Json.into(),
            worker,
            ..FetchRequest::default()
        };
        fetch_loop(client, request, &stop).await?;
    }
    fetchproxy::say(&json!({ "event": "stopped" }));
    Ok(())
}

async fn fetch_loop(
    mut client: Client,
    request: FetchRequest,
    stop: &CancellationToken,
) -> Result<(), Box<dyn Error>> {
    while let Some(answer) = fetchproxy::fetch(&mut client, &request, stop).await? {
        let (batch, keeper) = Batch::keep(&client, &answer, stop);
        for (place, message) in answer.messages.into_iter().enumerate() {
            batch.work(place, |lost| handle(message, lost)).await;
        }
        keeper.await?;
    }
    Ok(())
}

fn stop_on_signal() -> Result<CancellationToken, std::io::Error> {
    let stop = CancellationToken::new();
    let told = stop.clone();
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
        told.cancel();
    });
    Ok(stop)
}

/// A negative number becomes zero, and a number that is too large becomes the longest duration.
fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}
