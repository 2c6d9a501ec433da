//! A client that cancels its Fetch, at every step of it. Its connection stays: the call is reset.
//!
//! A message is then in one of three places. The caller has it; or it was written to the client's
//! connection, unseen, and waits for its lease; or the proxy has it. The proxy must hand it to the
//! next caller at once, without an ack wait and without destroying it.

use std::time::{Duration, Instant};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::{Codec, FetchRequest, Outcome};
use futures_util::future::join_all;
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait, config},
    median, millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch},
    relay::{Flow, Relay},
    usual,
};
use tokio::sync::oneshot;

use super::run::{all_settled, measured};

/// An answer with one message is larger than this: its token alone is. All else that a client is
/// sent in the time of a race is smaller.
pub(super) const ANSWER: u64 = 200;
/// Within this, a message that the proxy has must be in somebody's hands again: half the ack wait, after
/// which JetStream alone would deliver it.
const DARK: Duration = Duration::from_secs(15);

/// One racer: a consumer of its own, and a client whose wire counts.
struct Racer {
    fixture: Fixture,
    relay: Relay,
    client: Client,
    next: Client,
}

#[derive(Debug, Default)]
struct Tally {
    seen: usize,
    written_unseen: usize,
    /// How long the next caller waited for each that was handed on, from the cancel.
    handed_on: Vec<Duration>,
    /// How long a waiting Fetch takes to answer, from just before the publish.
    usual: Duration,
}

impl Racer {
    async fn new(proxy: &Proxy, consumer: pull::Config) -> Self {
        let fixture = Fixture::new(consumer).await;
        let relay = Relay::to(&proxy.grpc).await;
        let client = relay.client().await;
        let mut racer = Self { fixture, relay, client, next: proxy.client().await };
        racer.client.fetch(fetch(&racer.fixture, 1, 0)).await.unwrap();
        racer
    }

    /// Races cancels against publishes, from just before the publish until well after an answer
    /// takes to arrive.
    async fn race(mut self, races: usize) -> Tally {
        let mut tally = Tally::default();
        let usual = self.usual_answer().await;
        tally.usual = usual;
        for race in 0..races {
            // Spread evenly, and differently on each racer.
            let at = usual.mul_f64(2.5 * (race as f64 * 0.618_034 + 0.1).fract());
            self.one_race(usual / 2, at, &mut tally).await;
        }
        tally
    }

    /// How long a waiting Fetch takes to answer, from just before the publish.
    async fn usual_answer(&mut self) -> Duration {
        usual(async || {
            let call = self.waiting(fetch(&self.fixture, 1, 10_000)).await;
            let began = Instant::now();
            self.fixture.publish("n", "x").await;
            let answer = call.answer().await.unwrap();
            let took = began.elapsed();
            self.settle(&answer.messages[0].token).await;
            took
        })
        .await
    }

    async fn one_race(&mut self, publish: Duration, cancel: Duration, tally: &mut Tally) {
        let before = self.relay.answered();
        let call = self.waiting(fetch(&self.fixture, 1, 10_000)).await;
        let began = Instant::now();
        let (sequence, (answer, cancelled)) = tokio::join!(
            async {
                precisely(began + publish).await;
                self.fixture.publish("n", "x").await
            },
            async {
                precisely(began + cancel).await;
                (call.cancel().await, Instant::now())
            },
        );
        if let Some(answer) = answer {
            tally.seen += 1;
            return self.settle(&answer.messages[0].token).await;
        }
        match self.handed_on(sequence, before).await {
            Some(token) => {
                tally.handed_on.push(cancelled.elapsed());
                self.settle(&token).await;
            }
            None => tally.written_unseen += 1,
        }
    }

    /// The token of this message, when another caller is given it; `None` when it was written to the
    /// racer's connection instead.
    async fn handed_on(&mut self, sequence: u64, before: u64) -> Option<String> {
        let began = Instant::now();
        // An answer may still be on its way to the relay, so the test looks several times.
        while !self.written_since(before) {
            assert!(began.elapsed() < DARK, "{sequence} is in nobody's hands");
            if let Some(token) = self.next_has(sequence, millisecond(500)).await {
                return Some(token);
            }
        }
        None
    }

    fn written_since(&self, before: u64) -> bool {
        self.relay.answered() - before > ANSWER
    }

    /// The token of this message, if another caller is given it within `time`.
    async fn next_has(&mut self, sequence: u64, time: Duration) -> Option<String> {
        let until = Instant::now() + time;
        loop {
            let left = until.saturating_duration_since(Instant::now()).as_millis();
            let request = fetch(&self.fixture, 1, i64::try_from(left).unwrap());
            let answer = self.next.fetch(request).await.unwrap().into_inner();
            let message = answer.messages.into_iter().next()?;
            if message.stream_sequence == sequence {
                return Some(message.token);
            }
            // One that was written and not seen, and whose lease is over.
            self.settle(&message.token).await;
        }
    }

    async fn settle(&mut self, token: &str) {
        let answer = self.next.ack(ack(token)).await.unwrap().into_inner();
        assert_eq!(answer.outcome(), Outcome::Confirmed);
    }

    /// A call whose pull is out.
    async fn waiting(&mut self, request: FetchRequest) -> Call {
        let call = Call::start(&self.client, request);
        self.fixture.pulled().await;
        call
    }

    /// A call whose pull has brought so many.
    async fn holding(&mut self, request: FetchRequest, count: usize) -> Call {
        let call = self.waiting(request).await;
        self.fixture.publish_many(count).await;
        eventually("the deliveries", || async {
            (self.fixture.info().await.num_ack_pending == count).then_some(())
        })
        .await;
        call
    }
}

/// A Fetch that can be cancelled, as a client does that leaves its connection open.
pub(super) struct Call {
    cancel: oneshot::Sender<()>,
    task: tokio::task::JoinHandle<Option<fetch_proxy::pb::FetchResponse>>,
}

impl Call {
    pub(super) fn start(client: &Client, request: FetchRequest) -> Self {
        let mut client = client.clone();
        let (cancel, cancelled) = oneshot::channel::<()>();
        let task = tokio::spawn(async move {
            tokio::select! {
                biased;
                _ = cancelled => None,
                answer = client.fetch(request) => Some(answer.unwrap().into_inner()),
            }
        });
        Self { cancel, task }
    }

    async fn answer(self) -> Option<fetch_proxy::pb::FetchResponse> {
        let Self { cancel, task } = self;
        let answer = task.await.unwrap();
        drop(cancel);
        answer
    }

    /// The answer that the caller received before it left, if any.
    pub(super) async fn cancel(self) -> Option<fetch_proxy::pb::FetchResponse> {
        // A call that has been answered does not listen any more.
        let _ = self.cancel.send(());
        self.task.await.unwrap()
    }
}

/// Waits to the tenth of a millisecond, where the timer knows only whole ones.
pub(super) async fn precisely(until: Instant) {
    tokio::time::sleep(until.saturating_duration_since(Instant::now() + millisecond(2))).await;
    while Instant::now() < until {
        tokio::task::yield_now().await;
    }
}

const fn millisecond(count: u64) -> Duration {
    Duration::from_millis(count)
}

async fn races(name: &str, consumer: pull::Config, racers: usize, each: usize) {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let racers = join_all((0..racers).map(|_| Racer::new(&proxy, consumer.clone()))).await;
    let count = racers.len() * each;
    let tallies = join_all(racers.into_iter().map(|racer| racer.race(each))).await;
    let sum = |of: fn(&Tally) -> usize| tallies.iter().map(of).sum::<usize>();
    let seen = sum(|tally| tally.seen);
    let handed_on = tallies.iter().flat_map(|tally| tally.handed_on.clone()).collect::<Vec<_>>();
    let usual = median(tallies.iter().map(|tally| tally.usual).collect());
    measured(&format!("{name}: races"), count);
    measured(&format!("{name}: answered before the cancel"), seen);
    measured(&format!("{name}: written to the client and not seen"), sum(|t| t.written_unseen));
    measured(&format!("{name}: handed to the next caller"), handed_on.len());
    assert!(seen > 0 && !handed_on.is_empty(), "the races were one-sided: {tallies:?}");
    let longest = *handed_on.iter().max().unwrap();
    let middle = median(handed_on);
    measured(&format!("{name}: longest from the cancel to the next caller"), longest);
    measured(&format!("{name}: median from the cancel to the next caller"), middle);
    measured(&format!("{name}: usual time of an answer"), usual);
    // Nothing is waited for: neither the second of parking, nor a pull that is open still.
    assert!(middle < usual * 10 + millisecond(200), "{middle:?}, and usually {usual:?}");
    assert!(longest < usual * 50 + millisecond(2000), "{longest:?}, and usually {usual:?}");
}

#[tokio::test]
async fn message_that_races_a_cancel_reaches_a_caller() {
    races("cancel", config(), 4, 100).await;
}

#[tokio::test]
async fn cancel_destroys_no_last_attempt() {
    for max_deliver in [1, 2] {
        let name = format!("cancel with max_deliver {max_deliver}");
        races(&name, pull::Config { max_deliver, ..config() }, 4, 50).await;
    }
}

#[tokio::test]
async fn untaken_message_goes_to_another_replica_after_a_second() {
    let (here, there) =
        (Proxy::start(NatsServer::shared(), &[]), Proxy::start(NatsServer::shared(), &[]));
    let mut racer = Racer::new(&here, config()).await;
    racer.next = there.client().await;
    let linger = FetchRequest { linger: millis(5000), ..fetch(&racer.fixture, 10, 10_000) };
    racer.holding(linger, 1).await.cancel().await;
    let began = Instant::now();
    // A second of parking; where our own open pull takes it again, which is there for up to 5 s,
    // another.
    let token = racer.next_has(1, DARK).await.expect("no caller received the message");
    measured("cancel: longest until another replica has it", began.elapsed());
    racer.settle(&token).await;
}

#[tokio::test]
async fn last_attempt_is_kept_for_a_late_caller() {
    tokio::join!(late(1), late(2));
}

async fn late(max_deliver: i64) {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut racer = Racer::new(&proxy, pull::Config { max_deliver, ..ack_wait(1500) }).await;
    let linger = FetchRequest { linger: millis(5000), ..fetch(&racer.fixture, 10, 10_000) };
    racer.holding(linger, 1).await.cancel().await;
    // Two ack waits, in which nobody asks.
    tokio::time::sleep(millisecond(3200)).await;
    let token = racer.next_has(1, DARK).await.expect("it was destroyed");
    racer.settle(&token).await;
    all_settled(&racer.fixture).await;
}

#[tokio::test]
async fn call_cancelled_before_its_pull_takes_nothing() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    for micros in (0..3000).step_by(200) {
        // A consumer that the proxy does not know yet, so that INFO comes first.
        let mut racer = Racer::new(&proxy, config()).await;
        racer.fixture = Fixture::new(config()).await;
        racer.fixture.publish("n", "x").await;
        let before = racer.relay.answered();
        let call = Call::start(&racer.client, fetch(&racer.fixture, 1, 10_000));
        precisely(Instant::now() + Duration::from_micros(micros)).await;
        if call.cancel().await.is_some() {
            continue;
        }
        if let Some(token) = racer.handed_on(1, before).await {
            racer.settle(&token).await;
        }
    }
}

#[tokio::test]
async fn call_cancelled_during_its_linger_leaves_all_to_the_next() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut racer = Racer::new(&proxy, config()).await;
    let linger = FetchRequest { linger: millis(5000), ..fetch(&racer.fixture, 10, 10_000) };
    racer.holding(linger, 5).await.cancel().await;
    let began = Instant::now();
    let answer = racer.next.fetch(fetch(&racer.fixture, 10, 1000)).await.unwrap().into_inner();
    measured("cancel: from a cancelled linger to the next caller", began.elapsed());
    assert_eq!(answer.messages.len(), 5);
    for message in &answer.messages {
        assert_eq!(message.delivery_count, 1, "it came back through JetStream");
        racer.settle(&message.token).await;
    }
    all_settled(&racer.fixture).await;
}

/// A call with one message that fails its codec and one that does not, at the time when the Term of
/// the first is under way, and slowly.
async fn terminating(racer: &mut Racer, nats: &Relay, lease: Option<i64>) -> Call {
    let request = FetchRequest {
        codec: Codec::Json.into(),
        lease: lease.and_then(millis),
        ..fetch(&racer.fixture, 2, 10_000)
    };
    racer.fixture.publish("n", "no json").await;
    racer.fixture.publish("n", "1").await;
    nats.flow(Flow::Delay(millisecond(500)), Flow::Pass);
    let before = nats.heard();
    let call = Call::start(&racer.client, request);
    // Either is longer than all else that may be said meanwhile, and half a second under way.
    let longer = async |than: u64| (nats.heard() > than + 50).then(|| nats.heard());
    let pulled = eventually("the pull", || longer(before)).await;
    eventually("the Term", || longer(pulled)).await;
    call
}

#[tokio::test]
async fn call_cancelled_during_a_term_leaves_the_rest_to_the_next() {
    let server = NatsServer::shared();
    let nats = Relay::to(&server.url()).await;
    let proxy = Proxy::start_at(&nats.nats_url(), &[]);
    let mut racer = Racer::new(&proxy, config()).await;
    let call = terminating(&mut racer, &nats, None).await;
    assert!(call.cancel().await.is_none());
    let began = Instant::now();
    let token = racer.next_has(2, DARK).await.expect("no caller received the good message");
    measured("cancel: from a cancelled Term to the next caller", began.elapsed());
    nats.flow(Flow::Pass, Flow::Pass);
    racer.settle(&token).await;
    // The Term went its way without its caller.
    all_settled(&racer.fixture).await;
}

#[tokio::test]
async fn lost_term_of_a_cancelled_call_leaves_its_message_to_jetstream() {
    let server = NatsServer::shared();
    let nats = Relay::to(&server.url()).await;
    let proxy = Proxy::start_at(&nats.nats_url(), &[]);
    let mut racer = Racer::new(&proxy, ack_wait(2000)).await;
    // A lease that lasts far longer than JetStream waits.
    let call = terminating(&mut racer, &nats, Some(60_000)).await;
    assert!(call.cancel().await.is_none());
    nats.cut();
    nats.flow(Flow::Pass, Flow::Pass);
    let began = Instant::now();
    // The good one, too, but it does not have to wait for JetStream.
    for _ in 0..2 {
        let message = eventually("the message before its lease ends", || {
            let (mut next, request) = (racer.next.clone(), fetch(&racer.fixture, 1, 1000));
            async move { next.fetch(request).await.ok()?.into_inner().messages.pop() }
        })
        .await;
        eventually("the connection", || {
            let (mut next, request) = (racer.next.clone(), ack(&message.token));
            async move { next.ack(request).await.ok() }
        })
        .await;
    }
    measured("cancel: from a lost Term to the next caller (ack wait 2 s)", began.elapsed());
    all_settled(&racer.fixture).await;
}
