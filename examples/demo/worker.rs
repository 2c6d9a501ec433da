//! The worker loop of a pull consumer over gRPC, in one page: fetch a batch, work at your own pace,
//! settle every message.
//!
//! - success → `Ack`
//! - a temporary failure → `Nak` with a delay: the message comes back after the delay
//! - a permanent failure → `Term` with a reason: the message never comes back
//!
//! The worker knows the sample messages of `fetch-proxy dev`. It ends when no message has come for
//! a while. The exit code is 0 if every message had the outcome that its sample expects.
//!
//! ```text
//! cargo run --example worker -- --addr http://127.0.0.1:50051
//! ```

use std::{
    collections::{BTreeMap, HashMap},
    error::Error,
    process::ExitCode,
};

use clap::Parser;
use fetch_proxy::pb::{
    self, AckRequest, Codec, FetchRequest, NakRequest, TermRequest, delivery::Payload,
    fetch_service_client::FetchServiceClient,
};
use serde::Deserialize;
use tonic::transport::Channel;

#[derive(Parser)]
struct Args {
    /// The address of fetch-proxy.
    #[arg(long, default_value = "http://127.0.0.1:50051")]
    addr: String,
    /// The stream.
    #[arg(long, default_value = "TASKS")]
    stream: String,
    /// The durable consumer.
    #[arg(long, default_value = "batch-worker")]
    consumer: String,
    /// The most messages of one batch.
    #[arg(long, default_value_t = 4)]
    batch: u32,
    /// End when no message has come for so many seconds. Longer than every delay of a Nak below.
    #[arg(long, default_value_t = 4)]
    idle_secs: i64,
}

/// The task of a sample.
#[derive(Deserialize)]
struct Task {
    id: u32,
    /// `ok`, `flaky` (fails until its second attempt) or `broken` (never succeeds).
    kind: String,
}

/// The outcome of this attempt.
enum Fate {
    Done,
    Later(&'static str),
    Never(String),
}

#[tokio::main]
async fn main() -> Result<ExitCode, Box<dyn Error>> {
    let args = Args::parse();
    let mut client = FetchServiceClient::connect(args.addr.clone()).await?;
    let mut book = Book::default();
    loop {
        let request = FetchRequest {
            stream: args.stream.clone(),
            consumer: args.consumer.clone(),
            n: args.batch,
            max_wait: Some(seconds(args.idle_secs)),
            // The proxy terminates a payload that is not JSON, and returns it in `rejected`.
            codec: Codec::Json.into(),
            worker: "examples/demo".to_owned(),
            ..FetchRequest::default()
        };
        let batch = client.fetch(request).await?.into_inner();
        if batch.messages.is_empty() && batch.rejected.is_empty() {
            break;
        }
        for rejected in &batch.rejected {
            let attempt = rejected.delivery_count;
            book.note(rejected.stream_sequence, attempt, "rejected", &rejected.detail);
            book.expect(rejected.stream_sequence, &rejected.headers);
        }
        for message in batch.messages {
            settle(&mut client, message, &mut book).await?;
        }
    }
    Ok(book.close())
}

/// Does the work of one message and settles the message.
async fn settle(
    client: &mut FetchServiceClient<Channel>,
    message: pb::Delivery,
    book: &mut Book,
) -> Result<(), tonic::Status> {
    let (sequence, attempt) = (message.stream_sequence, message.delivery_count);
    let token = message.token.clone();
    book.expect(sequence, &message.headers);
    match work(&message) {
        Fate::Done => {
            client.ack(AckRequest { token, ..AckRequest::default() }).await?;
            book.note(sequence, attempt, "acked", &message.subject);
        }
        Fate::Later(why) => {
            let delay = Some(seconds(1));
            client.nak(NakRequest { token, delay, ..NakRequest::default() }).await?;
            book.note(sequence, attempt, "nacked", &format!("{why}; again in 1 s"));
        }
        Fate::Never(reason) => {
            book.note(sequence, attempt, "terminated", &reason);
            client.term(TermRequest { token, reason, ..TermRequest::default() }).await?;
        }
    }
    Ok(())
}

/// The work itself.
fn work(message: &pb::Delivery) -> Fate {
    let Some(Payload::Text(text)) = &message.payload else {
        return Fate::Never("not text".to_owned());
    };
    match serde_json::from_str::<Task>(text) {
        // A tombstone or a consumer of headers only: nothing to do.
        Err(_) if text.is_empty() => Fate::Done,
        Err(error) => Fate::Never(format!("not a task: {error}")),
        Ok(task) => match task.kind.as_str() {
            "flaky" if message.delivery_count < 2 => Fate::Later("the database is busy"),
            "broken" => Fate::Never(format!("task {} can never be done", task.id)),
            _ => Fate::Done,
        },
    }
}

fn seconds(seconds: i64) -> prost_types::Duration {
    prost_types::Duration { seconds, nanos: 0 }
}

/// The outcomes by stream sequence. Only the last outcome of each message counts.
#[derive(Default)]
struct Book {
    last: BTreeMap<u64, &'static str>,
    /// The outcome that each sample expects.
    expected: BTreeMap<u64, String>,
    attempts: usize,
}

impl Book {
    fn note(&mut self, sequence: u64, attempt: u32, fate: &'static str, detail: &str) {
        println!("  message {sequence:>3}  attempt {attempt}  {fate:<11} {detail}");
        self.last.insert(sequence, fate);
        self.attempts += 1;
    }

    fn expect(&mut self, sequence: u64, headers: &HashMap<String, pb::HeaderValues>) {
        if let Some(expected) = headers.get("Expect").and_then(|header| header.values.first()) {
            self.expected.insert(sequence, expected.clone());
        }
    }

    /// Prints the summary. Success if every message had the outcome that it expects.
    fn close(self) -> ExitCode {
        let count = |fate| self.last.values().filter(|last| **last == fate).count();
        let (acked, terminated, rejected) =
            (count("acked"), count("terminated"), count("rejected"));
        let open = count("nacked");
        println!("\n  {} messages in {} attempts:", self.last.len(), self.attempts);
        println!("  {acked:>3} acked       done: never delivered again");
        println!("  {terminated:>3} terminated  by us, with a reason: never delivered again");
        println!(
            "  {rejected:>3} rejected    not JSON: terminated by the proxy, and returned to us"
        );
        println!("  {open:>3} open        nacked, and not delivered again yet");
        let wrong: Vec<_> =
            self.expected.iter().filter(|(at, fate)| self.last[at] != **fate).collect();
        for (sequence, fate) in &wrong {
            println!("\n  message {sequence} should have been {fate}");
        }
        if self.last.is_empty() || open > 0 || !wrong.is_empty() {
            println!("\n  NOT every message is settled as it should be");
            return ExitCode::FAILURE;
        }
        println!("\n  every message is settled as it should be");
        ExitCode::SUCCESS
    }
}
