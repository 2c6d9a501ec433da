//! A worker on the samples of `fetch-proxy dev`.

use std::time::Duration;

use fetchproxy::{Client, Error, Failure, Message, Nak, Term, Worker};
use serde::Deserialize;

#[derive(Deserialize)]
struct Task {
    id: u32,
    kind: String,
}

async fn handle(message: Message<Task>) -> Result<(), Failure> {
    let Task { id, kind } = &message.data;
    match kind.as_str() {
        "broken" => return Err(Term::new("the task is broken").into()),
        "flaky" if message.delivery_count == 1 => {
            return Err(Nak { delay: Duration::from_secs(1) }.into());
        }
        _ => println!("task {id} is done"),
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Error> {
    let worker = Worker::new(Client::from_env()?, "TASKS", "batch-worker", handle);
    worker.concurrency(16).run_until_signal().await
}
