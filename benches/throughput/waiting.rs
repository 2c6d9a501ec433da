//! The time from a publish to the message, for callers that wait already.

use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::PullConsumer;
use fetch_proxy::pb::Confirmation;
use futures_util::StreamExt as _;
use testkit::{
    backlog::Backlog,
    measure::{Spread, short},
    pairs::Pairs,
};

use crate::{
    consumed::{self, Stream},
    proxied::{Client, connect, fetch},
    setup::Setup,
};

/// Messages of each kind in a round.
const MESSAGES: usize = 50;
/// So long a caller waits before the publish.
const PAUSE: Duration = Duration::from_millis(5);

/// Callers with a consumer each, all on one stream.
struct Callers {
    client: Client,
    backlog: Backlog,
}

/// Prints the times of the four kinds of callers.
pub async fn table(pairs: &Pairs, setup: &Setup) {
    if !pairs.want("publish to message") {
        return;
    }
    let callers = Callers {
        client: connect(&setup.grpc, 1).await.remove(0),
        backlog: Backlog::fill(&setup.jetstream, "QUIET", 0, 0).await,
    };
    let mut rounds = Vec::new();
    for round in 0..=pairs.count {
        let times = [
            callers.fetch(setup, round).await,
            callers.native_fetch(setup, round).await,
            callers.consume(setup, round).await,
            callers.native_stream(setup, round).await,
        ];
        // The first round is a warm-up.
        if round > 0 {
            rounds.push(times);
        }
    }
    println!(
        "\n**From a publish to the message**, for callers that wait, in µs\n\n| proxy / async-nats \
         | p50 | p99 | async-nats p50 | p99 | p50 A/B | spread |\n\
         | --- | --- | --- | --- | --- | --- | --- |"
    );
    for (name, a, b) in
        [("waiting Fetch / waiting fetch", 0, 1), ("idle Consume / idle stream", 2, 3)]
    {
        let at = |kind: usize, share: usize| {
            let of_round = |round: &[Vec<Duration>; 4]| percentile(&round[kind], share);
            Spread::of(rounds.iter().map(of_round)).median
        };
        let ratio =
            rounds.iter().map(|round| percentile(&round[a], 50) / percentile(&round[b], 50));
        let ratio = Spread::of(ratio);
        let all = |kind: usize| {
            let all: Vec<_> = rounds.iter().flat_map(|round| round[kind].clone()).collect();
            short(percentile(&all, 99))
        };
        println!(
            "| {name} | {} | {} | {} | {} | {:.2} | {} |",
            short(at(a, 50)),
            all(a),
            short(at(b, 50)),
            all(b),
            ratio.median,
            ratio.range()
        );
    }
    callers.backlog.delete().await;
}

impl Callers {
    async fn fetch(&self, setup: &Setup, round: usize) -> Vec<Duration> {
        let subject = format!("QUIET.fetch{round}");
        let consumer = self.backlog.consumer_of(&subject).await;
        timed(setup, &subject, async || {
            let mut client = self.client.clone();
            let answer = client.fetch(fetch(&consumer, 1)).await.unwrap().into_inner();
            assert_eq!(answer.messages.len(), 1);
        })
        .await
    }

    async fn native_fetch(&self, setup: &Setup, round: usize) -> Vec<Duration> {
        let subject = format!("QUIET.batch{round}");
        let consumer = self.handle(&subject).await;
        timed(setup, &subject, async || {
            let batch = consumer.batch().max_messages(1).expires(Duration::from_secs(5));
            batch.messages().await.unwrap().next().await.unwrap().unwrap();
        })
        .await
    }

    async fn consume(&self, setup: &Setup, round: usize) -> Vec<Duration> {
        let subject = format!("QUIET.consume{round}");
        let start = consumed::start(&self.backlog.consumer_of(&subject).await, 2);
        let mut stream = Stream::open(&mut self.client.clone(), start).await;
        let mut times = Vec::new();
        for _ in 0..MESSAGES {
            let wait = async || {
                loop {
                    let frame = stream.frames.message().await.unwrap().expect("it has ended");
                    if !frame.messages.is_empty() {
                        break frame.messages;
                    }
                }
            };
            let (took, messages) = published(setup, &subject, wait).await;
            times.push(took);
            stream.ack(messages, Confirmation::Confirmed);
        }
        times
    }

    async fn native_stream(&self, setup: &Setup, round: usize) -> Vec<Duration> {
        let subject = format!("QUIET.stream{round}");
        let mut messages = self.handle(&subject).await.messages().await.unwrap();
        let mut times = Vec::new();
        for _ in 0..MESSAGES {
            let wait = async || messages.next().await.unwrap().unwrap();
            let (took, message) = published(setup, &subject, wait).await;
            times.push(took);
            message.double_ack().await.unwrap();
        }
        times
    }

    async fn handle(&self, subject: &str) -> PullConsumer {
        self.backlog.handle(&self.backlog.consumer_of(subject).await).await
    }
}

async fn timed(setup: &Setup, subject: &str, wait: impl AsyncFn()) -> Vec<Duration> {
    let mut times = Vec::new();
    for _ in 0..MESSAGES {
        times.push(published(setup, subject, &wait).await.0);
    }
    times
}

/// Publishes while the caller waits. Returns the time from the publish to the end of the wait.
async fn published<T>(
    setup: &Setup,
    subject: &str,
    wait: impl AsyncFnOnce() -> T,
) -> (Duration, T) {
    let waited = async {
        let message = wait().await;
        (Instant::now(), message)
    };
    let publish = async {
        tokio::time::sleep(PAUSE).await;
        let began = Instant::now();
        let sent = setup.jetstream.publish(subject.to_owned(), "now".into()).await.unwrap();
        sent.await.unwrap();
        began
    };
    let ((ended, message), began) = tokio::join!(waited, publish);
    (ended.duration_since(began), message)
}

/// Microseconds.
fn percentile(times: &[Duration], share: usize) -> f64 {
    let mut times = times.to_vec();
    times.sort();
    times[times.len() * share / 100].as_secs_f64() * 1e6
}
