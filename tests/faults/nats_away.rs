//! NATS is away, in every way in which it can be: nobody is told what is not true, nobody waits for
//! ever, and afterwards all goes on by itself.

use std::{
    future::Future,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::{self, FetchRequest, Outcome};
use futures_util::future::join_all;
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait, config},
    median, millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch, nak, reason, term},
    relay::{Flow, Relay},
};
use tokio::sync::watch;
use tonic::{Code, Request, Response, Status};
use tonic_types::StatusExt as _;

use super::books::{Ack, Books, all_settled, measured};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    /// The server is killed, and started again.
    Killed,
    /// It is stopped, and goes on: its connections are never lost.
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
struct Away {
    server: NatsServer,
    wire: Relay,
    proxy: Proxy,
}

impl Away {
    async fn new(consumer: pull::Config) -> (Self, Fixture) {
        let server = NatsServer::start();
        let fixture = Fixture::on(&server, consumer).await;
        let wire = Relay::to(server.url().trim_start_matches("nats://")).await;
        let proxy = Proxy::start_at(&wire.nats_url(), &[]);
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

impl Drop for Away {
    fn drop(&mut self) {
        // One that is stopped would not hear that it is to end.
        self.server.signal("CONT");
    }
}

/// What came of a call: an answer, a refusal by us, or the caller's own deadline.
enum Told<T> {
    Ok(T),
    Reason(String),
    /// It should have been answered before; a loaded machine may be late with a few.
    CutOff,
}

async fn told<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Told<T> {
    match call.await {
        Ok(answer) => Told::Ok(answer.into_inner()),
        Err(status) if status.code() == Code::Cancelled => Told::CutOff,
        Err(status) => {
            let reason = reason(&status);
            // Whoever is to come again is told when.
            if reason.0 == Code::Unavailable {
                assert!(status.get_details_retry_info().is_some(), "{status:?}");
            }
            Told::Reason(reason.1)
        }
    }
}

fn timed<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// What the workers of one outage share.
struct Run {
    fixture: Fixture,
    books: Books,
    away: watch::Sender<bool>,
    over: watch::Sender<bool>,
    /// Calls that were not answered before their deadline.
    cut_off: AtomicUsize,
    /// Of each call.
    deadline: Duration,
}

impl Run {
    fn new(fixture: Fixture, deadline: Duration) -> Self {
        let (away, over) = (watch::channel(false).0, watch::channel(false).0);
        let (books, cut_off) = (Books::default(), AtomicUsize::new(0));
        Self { fixture, books, away, over, cut_off, deadline }
    }

    /// Fetches and acks until all is over. Returns how often it was told that NATS is away.
    async fn work(&self, worker: usize, mut client: Client) -> usize {
        let mut refused = 0;
        // Some waits end by their own bound, others by the call's deadline.
        let wait = if worker.is_multiple_of(2) { 1200 } else { 30_000 };
        while !*self.over.borrow() {
            let began_away = *self.away.borrow();
            let request = timed(fetch(&self.fixture, 3, wait), self.deadline);
            match told(client.fetch(request)).await {
                Told::Ok(answer) => {
                    let lie = answer.messages.is_empty() && began_away && *self.away.borrow();
                    assert!(!lie, "an empty OK while NATS is away: {answer:?}");
                    for message in answer.messages {
                        self.books.handed(worker, &message);
                        self.ack(worker, &mut client, &message).await;
                    }
                }
                Told::Reason(reason) => {
                    refused += 1;
                    assert_eq!(reason, "NATS_UNAVAILABLE");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Told::CutOff => {
                    self.cut_off.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        refused
    }

    /// Acks, and repeats it for as long as that may help.
    async fn ack(&self, worker: usize, client: &mut Client, message: &pb::Delivery) {
        loop {
            let call = client.ack(timed(ack(&message.token), self.deadline));
            match told(call).await {
                Told::Ok(_) => return self.books.acked(worker, message, Ack::Confirmed),
                Told::Reason(reason) => match &*reason {
                    "NATS_UNAVAILABLE" => {}
                    "SETTLE_UNCONFIRMED" => self.books.acked(worker, message, Ack::Unsure),
                    "LEASE_EXPIRED" => return,
                    other => panic!("{other}"),
                },
                Told::CutOff => {
                    self.books.acked(worker, message, Ack::Unsure);
                    self.cut_off.fetch_add(1, Ordering::Relaxed);
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// How long an Ack usually takes on this machine, while NATS is there.
async fn usual_ack(server: &NatsServer, mut client: Client) -> Duration {
    let fixture = Fixture::on(server, config()).await;
    let mut took = Vec::new();
    for _ in 0..7 {
        fixture.publish("n", "x").await;
        let held = client.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner().messages;
        let began = Instant::now();
        client.ack(ack(&held[0].token)).await.unwrap();
        took.push(began.elapsed());
    }
    median(took)
}

/// Workers go through an outage of this kind and length, and the books are right afterwards.
async fn outage(fault: Fault, length: u64) {
    // Short, so that what an outage leaves open comes back soon.
    let (mut away, fixture) = Away::new(ack_wait(3000)).await;
    let client = away.proxy.client().await;
    // Of a call's deadline the proxy leaves a tenth for its answer, so this is ten usual answers.
    let deadline = usual_ack(&away.server, client.clone()).await * 100;
    let deadline = deadline.clamp(Duration::from_secs(5), Duration::from_secs(10));
    let run = Run::new(fixture, deadline);
    let workers = join_all((0..4).map(|worker| run.work(worker, client.clone())));
    let course = async {
        run.fixture.publish_many(20).await;
        eventually("some work", || async { (run.books.confirmed() >= 10).then_some(()) }).await;
        away.begin(fault);
        run.away.send_replace(true);
        tokio::time::sleep(Duration::from_secs(length)).await;
        run.away.send_replace(false);
        let began = Instant::now();
        away.end(fault);
        eventually("NATS", || run.fixture.try_info()).await;
        run.fixture.publish_many(20).await;
        all_settled(&run.fixture).await;
        run.over.send_replace(true);
        (began.elapsed(), began)
    };
    let (told, (recovered, back)) = tokio::join!(workers, course);
    let account = run.books.close(&run.fixture, 40).await;
    let what = format!("NATS {fault:?} for {length} s");
    measured(&format!("{what}: until all is acked"), recovered);
    measured(&format!("{what}: calls that were told"), told.iter().sum::<usize>());
    measured(&format!("{what}: handed out again"), account.duplicates);
    let cut_off = run.cut_off.load(Ordering::Relaxed);
    measured(&format!("{what}: calls not answered before their deadline"), cut_off);
    // A call whose wait its deadline ends has a tenth of that for its answer: one may be late.
    assert!(cut_off <= 1, "{cut_off} calls hung");
    // A server that is killed may forget what it has confirmed just before; nothing else undoes an
    // Ack, and nothing undoes one that was confirmed by the next server.
    let forgotten = |told: &Instant| fault == Fault::Killed && *told < back;
    measured(&format!("{what}: confirmed, and forgotten"), account.twice.len());
    assert!(account.twice.iter().all(forgotten), "{account:?}");
}

/// Runs all at the same time: they mostly wait.
async fn at_once(runs: impl IntoIterator<Item = impl Future<Output = ()> + Send + 'static>) {
    let runs: Vec<_> = runs.into_iter().map(tokio::spawn).collect();
    for run in runs {
        run.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_without_nats() {
    at_once(Fault::ALL.map(|fault| outage(fault, 1))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_minute_without_nats() {
    at_once(Fault::ALL.map(|fault| outage(fault, 60))).await;
}

/// What a settlement is told while NATS is away holds afterwards.
async fn settlements_are_told_the_truth(fault: Fault) {
    let (mut away, fixture) = Away::new(config()).await;
    let mut client = away.proxy.client().await;
    fixture.publish_many(30).await;
    // Without a linger an answer may have fewer.
    let all = FetchRequest { linger: millis(5000), ..fetch(&fixture, 30, 5000) };
    let held = client.fetch(all).await.unwrap().into_inner().messages;
    assert_eq!(held.len(), 30);
    away.begin(fault);
    let (mut unavailable, mut unconfirmed) = (Vec::new(), Vec::new());
    // The first at once, the others when the loss is known, if it can be.
    for round in 0..5 {
        let places = round * 6..(round + 1) * 6;
        let calls =
            places.clone().map(|place| told(settle(&client, place, &held[place].token, SECOND)));
        for (place, told) in places.zip(join_all(calls).await) {
            match told {
                Told::Ok(outcome) => panic!("{outcome:?} while NATS was away"),
                Told::Reason(reason) if reason == "NATS_UNAVAILABLE" => unavailable.push(place),
                Told::Reason(reason) => {
                    assert_eq!(reason, "SETTLE_UNCONFIRMED");
                    unconfirmed.push(place);
                }
                Told::CutOff => unconfirmed.push(place),
            }
        }
    }
    away.end(fault);
    let what = format!("settling while {fault:?}");
    measured(&format!("{what}: not applied, unconfirmed"), (unavailable.len(), unconfirmed.len()));
    let info = eventually("NATS", || fixture.try_info()).await;
    assert!(info.num_ack_pending >= unavailable.len(), "what was not applied was");
    let began = Instant::now();
    for place in unavailable.iter().chain(&unconfirmed).copied() {
        // A repeat may itself be too slow to be answered, and have settled all the same.
        let unclear = AtomicBool::new(false);
        let outcome = eventually("a repeat", || async {
            let repeat = settle(&client, place, &held[place].token, Duration::from_secs(2));
            match told(repeat).await {
                Told::Ok(outcome) => return Some(outcome),
                Told::Reason(reason) if reason == "NATS_UNAVAILABLE" => {}
                Told::Reason(_) | Told::CutOff => unclear.store(true, Ordering::Relaxed),
            }
            None
        })
        .await;
        // A Nak that may have been sent is not sent again.
        let once = place % 3 == NAK && unconfirmed.contains(&place);
        let expected = if once { Outcome::Duplicate } else { Outcome::Confirmed };
        let settled = unclear.into_inner() && outcome == Outcome::Duplicate;
        assert!(settled || outcome == expected, "{place}: {outcome:?}, not {expected:?}");
    }
    measured(&format!("{what}: all repeated within"), began.elapsed());
}

/// Every third is acked, terminated, or given back.
const NAK: usize = 2;

async fn settle(
    client: &Client,
    place: usize,
    token: &str,
    deadline: Duration,
) -> Result<Response<Outcome>, Status> {
    let mut client = client.clone();
    let outcome = match place % 3 {
        0 => client.ack(timed(ack(token), deadline)).await?.into_inner().outcome(),
        1 => client.term(timed(term(token, "no"), deadline)).await?.into_inner().outcome(),
        _ => client.nak(timed(nak(token, 0), deadline)).await?.into_inner().outcome(),
    };
    Ok(Response::new(outcome))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_settlement_while_nats_is_away_is_told_the_truth() {
    let faults = [Fault::Stopped, Fault::Closed, Fault::Stalled];
    at_once(faults.map(settlements_are_told_the_truth)).await;
}

/// A long lease over a short ack wait cannot be kept alive while the wire is broken.
async fn a_long_lease_ends_with_its_ack_wait(fault: Fault) {
    let (mut away, fixture) = Away::new(ack_wait(2000)).await;
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
    assert_eq!(done.outcome(), Outcome::Confirmed);
    let told = first.ack(ack(&held.token)).await.unwrap_err();
    assert_eq!(reason(&told).1, "LEASE_EXPIRED");
    all_settled(&fixture).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_lease_that_cannot_be_kept_alive_ends_in_time() {
    at_once([Fault::Closed, Fault::Stalled].map(a_long_lease_ends_with_its_ack_wait)).await;
}

#[tokio::test]
async fn a_half_open_connection_is_noticed() {
    let (away, fixture) = Away::new(config()).await;
    let mut client = away.proxy.client().await;
    fixture.publish("n", "held").await;
    let held = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner().messages;
    // Both connections hang for ever; new ones are served.
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
    assert_eq!(acked.into_inner().outcome(), Outcome::Confirmed);
    client.ack(ack(&fetched.token)).await.unwrap();
    all_settled(&fixture).await;
}

const SECOND: Duration = Duration::from_secs(1);
