//! A client that cancels its Fetch around the moment at which its answer is written, and names its attempt. It then
//! repeats the attempt, or gives it back. No message is dark, and no last attempt is destroyed.

use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::{FetchRequest, GiveBackRequest};
use futures_util::future::join_all;
use testkit::{
    dice::Dice,
    jetstream::{Fixture, ack_wait, config},
    median,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch},
    relay::Relay,
    usual,
};

use super::{
    cancelled::{ANSWER, Call, precisely},
    run::{all_settled, measured},
};

const RACERS: usize = 4;
/// A cancel comes within this time after its publish.
const WINDOW: Duration = Duration::from_millis(4);
/// No message may be in nobody's hands for longer.
const DARK: Duration = Duration::from_secs(1);

/// The reaction of the client to its own cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Repeats,
    GivesBack,
    /// It has named no attempt, and another worker fetches.
    Nothing,
}

struct Racer {
    fixture: Fixture,
    relay: Relay,
    client: Client,
    other: Client,
    dice: Dice,
}

#[derive(Debug, Default)]
struct Tally {
    /// The answer was there before the cancel.
    seen: usize,
    /// The answer was written, and the client had left. It is not counted if the client repeats its call.
    unseen: usize,
    /// From the later of each cancel and its publish, until somebody has the message.
    dark: Vec<Duration>,
    /// Nobody ever has it.
    destroyed: usize,
}

impl Racer {
    async fn new(proxy: &Proxy, consumer: pull::Config, number: usize) -> Self {
        let fixture = Fixture::new(consumer).await;
        let relay = Relay::to(&proxy.grpc).await;
        let client = relay.client().await;
        let mut racer = Self {
            fixture,
            relay,
            client,
            other: proxy.client().await,
            dice: Dice::new(1, number as u64),
        };
        racer.client.fetch(fetch(&racer.fixture, 1, 0)).await.unwrap();
        racer
    }

    async fn race(mut self, then: Then, races: usize) -> Tally {
        let mut tally = Tally::default();
        for race in 0..races {
            let attempt = format!("{race}");
            let named = then != Then::Nothing;
            let request = FetchRequest {
                attempt_id: if named { attempt.clone() } else { String::new() },
                ..fetch(&self.fixture, 1, 10_000)
            };
            let before = self.relay.answered();
            let call = Call::start(&self.client, request.clone());
            self.fixture.pulled().await;
            let micros = self.dice.within(0..WINDOW.as_micros() as u64);
            let began = Instant::now();
            let publish = async { (self.fixture.publish("n", "x").await, Instant::now()) };
            let ((sequence, published), (answer, cancelled)) = tokio::join!(publish, async {
                precisely(began + Duration::from_micros(micros)).await;
                (call.cancel().await, Instant::now())
            });
            if let Some(answer) = answer {
                tally.seen += 1;
                self.settle(&answer.messages[0].token).await;
                continue;
            }
            let token = match then {
                Then::Repeats => self.next(&self.client.clone(), request, sequence).await,
                Then::GivesBack => {
                    let (stream, consumer) = (request.stream.clone(), request.consumer.clone());
                    let back = GiveBackRequest { stream, consumer, attempt_id: attempt };
                    self.client.give_back(back).await.unwrap();
                    let any = FetchRequest { attempt_id: String::new(), ..request };
                    self.next(&self.other.clone(), any, sequence).await
                }
                Then::Nothing => self.next(&self.other.clone(), request, sequence).await,
            };
            tally.dark.push(cancelled.max(published).elapsed());
            let written = then != Then::Repeats && self.relay.answered() - before > ANSWER;
            tally.unseen += usize::from(written);
            match token {
                Some(token) => self.settle(&token).await,
                None => tally.destroyed += 1,
            }
        }
        if tally.destroyed == 0 {
            all_settled(&self.fixture).await;
        }
        tally
    }

    /// The token of this message, which this client is given. `None`: nobody is.
    async fn next(&self, client: &Client, request: FetchRequest, sequence: u64) -> Option<String> {
        let began = Instant::now();
        while began.elapsed() < DARK * 4 {
            let request = FetchRequest { max_wait: testkit::millis(1000), ..request.clone() };
            let answer = client.clone().fetch(request).await.unwrap().into_inner();
            for message in answer.messages {
                if message.stream_sequence == sequence {
                    return Some(message.token);
                }
            }
        }
        None
    }

    async fn settle(&mut self, token: &str) {
        self.other.ack(ack(token)).await.unwrap();
    }
}

/// How long a Fetch of a message that is there takes.
async fn usual_fetch(proxy: &Proxy) -> Duration {
    let (fixture, client) = (Fixture::new(config()).await, proxy.client().await);
    usual(async || {
        fixture.publish("n", "x").await;
        let began = Instant::now();
        let answer = client.clone().fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
        let took = began.elapsed();
        client.clone().ack(ack(&answer.messages[0].token)).await.unwrap();
        took
    })
    .await
}

async fn races(name: &str, consumer: pull::Config, then: Then, each: usize) -> Tally {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let usual = usual_fetch(&proxy).await;
    let racers = (0..RACERS).map(|number| Racer::new(&proxy, consumer.clone(), number));
    let racers = join_all(racers).await;
    let tallies = join_all(racers.into_iter().map(|racer| racer.race(then, each))).await;
    let sum = |of: fn(&Tally) -> usize| tallies.iter().map(of).sum::<usize>();
    let dark: Vec<Duration> = tallies.iter().flat_map(|tally| tally.dark.clone()).collect();
    let (seen, unseen) = (sum(|tally| tally.seen), sum(|tally| tally.unseen));
    let destroyed = sum(|tally| tally.destroyed);
    measured(&format!("{name}: races"), RACERS * each);
    measured(&format!("{name}: answered before the cancel"), seen);
    if then != Then::Repeats {
        measured(&format!("{name}: written, and the client had left"), unseen);
    }
    let longer = dark.iter().filter(|dark| **dark > DARK).count();
    measured(&format!("{name}: dark for longer than a second"), longer);
    measured(&format!("{name}: destroyed"), destroyed);
    measured(&format!("{name}: median until somebody has it"), median(dark.clone()));
    measured(&format!("{name}: longest"), dark.iter().max());
    assert!(!dark.is_empty(), "no cancel was early");
    if then != Then::Nothing {
        assert_eq!(destroyed, 0);
        // On a machine that stands still for a moment, everything takes longer.
        let most = DARK + usual * 20;
        assert!(dark.iter().all(|dark| *dark < most), "{dark:?}, and usually {usual:?}");
    }
    Tally { seen, unseen, dark, destroyed }
}

#[tokio::test]
async fn cancelled_attempt_that_is_repeated_has_its_message() {
    races("attempt repeated", config(), Then::Repeats, 100).await;
    let last = pull::Config { max_deliver: 1, ..ack_wait(3000) };
    races("attempt repeated, max_deliver 1", last, Then::Repeats, 100).await;
}

#[tokio::test]
async fn cancelled_attempt_that_is_given_back_is_at_another_worker() {
    races("attempt given back", config(), Then::GivesBack, 100).await;
    let last = pull::Config { max_deliver: 1, ..ack_wait(3000) };
    races("attempt given back, max_deliver 1", last, Then::GivesBack, 100).await;
}

/// The same without a name. It shows that the races above are races.
#[tokio::test]
async fn without_a_name_a_message_that_was_written_and_not_seen_waits_for_its_lease() {
    let tally = races("no attempt", ack_wait(3000), Then::Nothing, 12).await;
    let last = pull::Config { max_deliver: 1, ..ack_wait(2000) };
    let lost = races("no attempt, max_deliver 1", last, Then::Nothing, 12).await;
    let dark = tally.dark.iter().filter(|dark| **dark > DARK).count();
    assert!(tally.unseen + lost.unseen > 0, "{tally:?} {lost:?}");
    assert!(dark + lost.destroyed > 0, "nothing was dark: {tally:?} {lost:?}");
}
