//! NATS is away, in every possible way. No answer is wrong, no call waits without end, and
//! afterwards everything works again by itself.

use std::{
    future::Future,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::{self, FetchRequest};
use futures_util::future::join_all;
use testkit::{
    delivery_log::{At, Outcome, now},
    eventually,
    jetstream::{Fixture, ack_wait, config},
    median, millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch, nak, reason, take, take_one, term, timed},
    relay::{Flow, Relay},
    scrape::balanced,
    stage::Stage,
};
use tokio::sync::watch;

use super::run::{Run, all_settled, measured, refused};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The server is killed, and started again.
    Killed,
    /// The server is stopped, and continues later. Its connections are never lost.
    Stopped,
    /// The wire is cut, and nobody listens at its end.
    Closed,
    /// Nothing passes the wire, in neither direction.
    Stalled,
}

impl Fault {
    const ALL: [Self; 4] = [Self::Killed, Self::Stopped, Self::Closed, Self::Stalled];
}

/// A server, and a proxy whose way to it can be broken.
struct BreakableNats {
    server: NatsServer,
    wire: Relay,
    proxy: Proxy,
}

impl BreakableNats {
    async fn new(consumer: pull::Config) -> (Self, Fixture) {
        let server = NatsServer::start();
        let Stage { fixture, wire, proxy, .. } = Stage::on(&server, consumer).await;
        (Self { server, wire, proxy }, fixture)
    }

    fn begin(&mut self, fault: Fault) {
        match fault {
            Fault::Killed => self.server.kill(),
            Fault::Stopped => self.server.signal("STOP"),
            Fault::Closed => self.wire.close(),
            Fault::Stalled => self.wire.flow(Flow::Stall, Flow::Stall),
        }
    }

    fn end(&mut self, fault: Fault) {
        match fault {
            Fault::Killed => self.server.restart(),
            Fault::Stopped => self.server.signal("CONT"),
            Fault::Closed => self.wire.open(),
            Fault::Stalled => self.wire.flow(Flow::Pass, Flow::Pass),
        }
    }
}

impl Drop for BreakableNats {
    fn drop(&mut self) {
        // One that is stopped would not hear that it is to end.
        self.server.signal("CONT");
    }
}

/// An outage, and what its workers share.
struct Outage {
    fixture: Fixture,
    run: Run,
    away: watch::Sender<bool>,
    over: watch::Sender<bool>,
}

impl Outage {
    fn new(fixture: Fixture, deadline: Duration) -> Self {
        let (away, over) = (watch::channel(false).0, watch::channel(false).0);
        Self { fixture, run: Run::new(deadline), away, over }
    }

    /// Fetches and acks until all is over. Returns how many calls were refused.
    async fn work(&self, worker: usize, mut client: Client) -> usize {
        let mut refused = 0;
        // Some waits end by their own bound, others by the call's deadline.
        let wait = if worker.is_multiple_of(2) { 1200 } else { 30_000 };
        while !*self.over.borrow() {
            let began_away = *self.away.borrow();
            match client.fetch(self.run.timed(fetch(&self.fixture, 3, wait))).await {
                Ok(answer) => {
                    let messages = answer.into_inner().messages;
                    let lie = messages.is_empty() && began_away && *self.away.borrow();
                    assert!(!lie, "an empty OK while NATS is away");
                    for message in messages {
                        let holding = self.run.handed(worker, &message);
                        self.run.ack(holding, &mut client, &message).await;
                    }
                }
                Err(status) => match self.run.refused(&status) {
                    Outcome::Unknown => {}
                    refusal => {
                        refused += 1;
                        assert!(refusal.is("NATS_UNAVAILABLE"), "{refusal:?}");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                },
            }
        }
        refused
    }
}

/// How long an Ack usually takes on this machine, while NATS is there.
async fn usual_ack(server: &NatsServer, mut client: Client) -> Duration {
    let fixture = Fixture::on(server, config()).await;
    let mut took = Vec::new();
    for _ in 0..7 {
        fixture.publish("n", "x").await;
        let held = take_one(&client, &fixture).await;
        let began = Instant::now();
        client.ack(ack(&held.token)).await.unwrap();
        took.push(began.elapsed());
    }
    median(took)
}

/// Workers go through an outage of this kind and length, and the books are right afterwards.
async fn outage(fault: Fault, length: u64) {
    // Short, so that what an outage leaves open comes back soon.
    let (mut away, fixture) = BreakableNats::new(ack_wait(3000)).await;
    let client = away.proxy.client().await;
    // The proxy keeps a tenth of a call's deadline for its answer, so this is ten usual answers.
    let deadline = usual_ack(&away.server, client.clone()).await * 100;
    let deadline = deadline.clamp(Duration::from_secs(5), Duration::from_secs(10));
    let outage = Outage::new(fixture, deadline);
    let workers = join_all((0..4).map(|worker| outage.work(worker, client.clone())));
    let course = async {
        outage.fixture.publish_many(20).await;
        eventually("some work", || async { (outage.run.confirmed() >= 10).then_some(()) }).await;
        away.begin(fault);
        outage.away.send_replace(true);
        tokio::time::sleep(Duration::from_secs(length)).await;
        outage.away.send_replace(false);
        let (began, back) = (Instant::now(), now());
        away.end(fault);
        eventually("NATS", || outage.fixture.try_info()).await;
        outage.fixture.publish_many(20).await;
        all_settled(&outage.fixture).await;
        outage.over.send_replace(true);
        (began.elapsed(), back)
    };
    let (told, (recovered, back)) = tokio::join!(workers, course);
    let summary = outage.run.close(&outage.fixture, 40).await;
    let what = format!("NATS {fault:?} for {length} s");
    measured(&format!("{what}: until all is acked"), recovered);
    measured(&format!("{what}: calls that were told"), told.iter().sum::<usize>());
    measured(&format!("{what}: handed out again"), summary.duplicates);
    let cut_off = summary.cut_off;
    measured(&format!("{what}: calls not answered before their deadline"), cut_off);
    // A call whose wait its deadline ends has a tenth of that for its answer: one may be late.
    assert!(cut_off <= 1, "{cut_off} calls hung");
    // A server that is killed may forget what it has confirmed just before; nothing else undoes an
    // Ack, and nothing undoes one that was confirmed by the next server.
    let forgotten = |told: &At| fault == Fault::Killed && *told < back;
    measured(&format!("{what}: confirmed, and forgotten"), summary.twice.len());
    assert!(summary.twice.iter().all(forgotten), "{summary:?}");
}

/// Runs all at the same time: they mostly wait.
async fn at_once(runs: impl IntoIterator<Item = impl Future<Output = ()> + Send + 'static>) {
    let runs: Vec<_> = runs.into_iter().map(tokio::spawn).collect();
    for run in runs {
        run.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_survive_a_second_without_nats() {
    at_once(Fault::ALL.map(|fault| outage(fault, 1))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_survive_a_minute_without_nats() {
    at_once(Fault::ALL.map(|fault| outage(fault, 60))).await;
}

/// The answer to a settlement while NATS is away is still true afterwards.
async fn settlements_are_told_the_truth(fault: Fault) {
    let (mut away, fixture) = BreakableNats::new(config()).await;
    let client = away.proxy.client().await;
    fixture.publish_many(30).await;
    let held = take(&client, fetch(&fixture, 30, 5000)).await;
    away.begin(fault);
    let (mut unavailable, mut unconfirmed) = (Vec::new(), Vec::new());
    // The first at once, the others when the loss is known, if it can be.
    for round in 0..5 {
        let places = round * 6..(round + 1) * 6;
        let calls = places.clone().map(|place| settle(&client, place, &held[place].token, SECOND));
        for (place, told) in places.zip(join_all(calls).await) {
            if told.is("NATS_UNAVAILABLE") {
                unavailable.push(place);
            } else {
                let open = told == Outcome::Unknown || told.is("SETTLE_UNCONFIRMED");
                assert!(open, "{told:?} while NATS was away");
                unconfirmed.push(place);
            }
        }
    }
    away.end(fault);
    let what = format!("settling while {fault:?}");
    measured(&format!("{what}: not applied, unconfirmed"), (unavailable.len(), unconfirmed.len()));
    let info = eventually("NATS", || fixture.try_info()).await;
    assert!(info.num_ack_pending >= unavailable.len(), "a settlement that was refused was applied");
    let began = Instant::now();
    for place in unavailable.iter().chain(&unconfirmed).copied() {
        // A repeat may also be too slow for its answer, and may have settled the message.
        let unclear = AtomicBool::new(false);
        let outcome = eventually("a repeat", || async {
            let repeat = settle(&client, place, &held[place].token, Duration::from_secs(2)).await;
            let settled = matches!(repeat, Outcome::Confirmed | Outcome::Duplicate | Outcome::Sent);
            if !settled && !repeat.is("NATS_UNAVAILABLE") {
                unclear.store(true, Ordering::Relaxed);
            }
            settled.then_some(repeat)
        })
        .await;
        // A Nak that may have been sent is not sent again, and nobody knows whether it was applied.
        let once = place % 3 == NAK && unconfirmed.contains(&place);
        let expected = if once { Outcome::Sent } else { Outcome::Confirmed };
        let settled = unclear.into_inner() && outcome == Outcome::Duplicate;
        assert!(settled || outcome == expected, "{place}: {outcome:?}, not {expected:?}");
    }
    measured(&format!("{what}: all repeated within"), began.elapsed());
}

/// Every third is acked, terminated, or given back.
const NAK: usize = 2;

async fn settle(client: &Client, place: usize, token: &str, deadline: Duration) -> Outcome {
    let mut client = client.clone();
    let outcome = match place % 3 {
        0 => client.ack(timed(ack(token), deadline)).await.map(|told| told.get_ref().outcome()),
        1 => client
            .term(timed(term(token, "no"), deadline))
            .await
            .map(|told| told.get_ref().outcome()),
        _ => client.nak(timed(nak(token, 0), deadline)).await.map(|told| told.get_ref().outcome()),
    };
    outcome.map_or_else(|status| refused(&status), |outcome| Outcome::of(Ok(outcome)))
}

#[tokio::test(flavor = "multi_thread")]
async fn settlement_while_nats_is_away_has_a_true_answer() {
    let faults = [Fault::Stopped, Fault::Closed, Fault::Stalled];
    at_once(faults.map(settlements_are_told_the_truth)).await;
}

/// A long lease over a short ack wait cannot be kept alive while the wire is broken.
async fn a_long_lease_ends_with_its_ack_wait(fault: Fault) {
    let (mut away, fixture) = BreakableNats::new(ack_wait(2000)).await;
    let direct = Proxy::start(&away.server, &[]);
    let (mut first, mut second) = (away.proxy.client().await, direct.client().await);
    fixture.publish("n", "x").await;
    let long = FetchRequest { lease: millis(60_000), ..fetch(&fixture, 1, 5000) };
    let held = first.fetch(long).await.unwrap().into_inner().messages.remove(0);
    away.begin(fault);
    let began = Instant::now();
    let answer = second.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
    let next = &answer.messages[0];
    measured(&format!("long lease, wire {fault:?}: until the next worker"), began.elapsed());
    let told = first.ack(timed(ack(&held.token), SECOND)).await.unwrap_err();
    assert_eq!(reason(&told).1, "LEASE_EXPIRED");
    away.end(fault);
    let done = second.ack(ack(&next.token)).await.unwrap().into_inner();
    assert_eq!(done.outcome(), pb::Outcome::Confirmed);
    let told = first.ack(ack(&held.token)).await.unwrap_err();
    assert_eq!(reason(&told).1, "LEASE_EXPIRED");
    all_settled(&fixture).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn long_lease_without_progress_ends_in_time() {
    at_once([Fault::Closed, Fault::Stalled].map(a_long_lease_ends_with_its_ack_wait)).await;
}

#[tokio::test]
async fn half_open_connection_is_noticed() {
    let (away, fixture) = BreakableNats::new(config()).await;
    let mut client = away.proxy.client().await;
    fixture.publish("n", "held").await;
    let held = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner().messages;
    // Both connections hang permanently. New connections are served.
    away.wire.freeze();
    fixture.publish("n", "next").await;
    let began = Instant::now();
    let (fetched, acked) = tokio::join!(
        eventually("a message", || {
            let (mut client, request) = (client.clone(), fetch(&fixture, 1, 1000));
            async move { client.fetch(request).await.ok()?.into_inner().messages.pop() }
        }),
        eventually("a confirmation", || {
            let (mut client, request) = (client.clone(), timed(ack(&held[0].token), SECOND));
            async move { client.ack(request).await.ok() }
        }),
    );
    // Both waits have a bound of 20 s.
    measured("half-open connections: until all works again", began.elapsed());
    assert_eq!(acked.into_inner().outcome(), pb::Outcome::Confirmed);
    client.ack(ack(&fetched.token)).await.unwrap();
    all_settled(&fixture).await;
    let books = balanced(&away.proxy.ops).await;
    assert!(books.began >= 2 && books.held == 0, "{books:?}");
}

const SECOND: Duration = Duration::from_secs(1);
