//! What was sent to settle a delivery arrives before the delivery is over, or never, as far as it is
//! ours: what the kernel has taken from us it sends as soon as the wire moves.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::{
    self, Confirmation, FetchRequest, NakAction, Outcome, Settlement, TermAction,
    settlement::Action,
};
use futures_util::future::join_all;
use tonic::Request;

use super::books::measured;
use crate::support::{
    eventually,
    jetstream::{Fixture, ack_wait, config},
    millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch, nak, reason},
    relay::{Flow, Relay},
};

const ACK_WAIT: u64 = 3000;
/// The lease ends a tenth before.
const LEASE: Duration = Duration::from_millis(ACK_WAIT * 9 / 10);
const GIVEN_UP: &str = "does not arrive: the connection for settling is replaced";

fn server() -> String {
    NatsServer::shared().url().trim_start_matches("nats://").to_owned()
}

async fn take_all(client: &mut Client, fixture: &Fixture, count: usize) -> Vec<pb::Delivery> {
    let mut all = Vec::new();
    while all.len() < count {
        let n = u32::try_from((count - all.len()).min(1000)).unwrap();
        let request = FetchRequest { linger: millis(500), ..fetch(fixture, n, 10_000) };
        all.extend(client.fetch(request).await.unwrap().into_inner().messages);
    }
    all
}

/// A proxy, and a wire to NATS that can be stalled.
struct Stage {
    fixture: Fixture,
    wire: Relay,
    proxy: Proxy,
    client: Client,
}

impl Stage {
    async fn set() -> Self {
        let fixture = Fixture::new(ack_wait(ACK_WAIT)).await;
        let wire = Relay::to(&server()).await;
        let proxy = Proxy::start_at(&wire.nats_url(), &[]);
        let client = proxy.client().await;
        Self { fixture, wire, proxy, client }
    }
}

/// When the proxy has given its connection up, counted from `since`.
async fn given_up(proxy: &Proxy, since: Instant) -> Duration {
    eventually("the connection to be given up", || async {
        proxy.log().contains(GIVEN_UP).then_some(())
    })
    .await;
    since.elapsed()
}

#[tokio::test]
async fn a_nak_that_is_not_answered_costs_the_connection_when_its_delivery_is_over() {
    let Stage { fixture, wire, proxy, mut client } = Stage::set().await;
    fixture.publish("n", "x").await;
    let held = take_all(&mut client, &fixture, 1).await;
    let since = Instant::now();
    tokio::time::sleep(Duration::from_secs(1)).await;
    wire.flow(Flow::Stall, Flow::Pass);
    // By itself it would wait for longer than its delivery lasts.
    let status = client.nak(nak(&held[0].token, 0)).await.unwrap_err();
    let took = since.elapsed();
    measured("unanswered Nak: given up, after the Fetch", took);
    assert_eq!(reason(&status).1, "SETTLE_UNCONFIRMED");
    let wait = Duration::from_millis(ACK_WAIT);
    assert!(took > LEASE - Duration::from_millis(300) && took < wait, "{took:?}");
    assert!(proxy.log().contains(GIVEN_UP));
}

#[tokio::test]
async fn what_is_sent_and_not_waited_for_costs_a_silent_connection_in_time() {
    tokio::join!(sent_nak(), release());
}

async fn sent_nak() {
    let Stage { fixture, wire, proxy, mut client } = Stage::set().await;
    fixture.publish("n", "x").await;
    let held = take_all(&mut client, &fixture, 1).await;
    let since = Instant::now();
    wire.flow(Flow::Stall, Flow::Pass);
    let sent = pb::NakRequest { confirmation: Confirmation::Sent.into(), ..nak(&held[0].token, 0) };
    let outcome = client.nak(sent).await.unwrap().into_inner().outcome();
    assert_eq!(outcome, Outcome::Sent);
    let took = given_up(&proxy, since).await;
    measured("Nak that was only sent: given up, after the Fetch", took);
    assert!(took < Duration::from_millis(ACK_WAIT), "{took:?}");
}

async fn release() {
    let Stage { fixture, wire, proxy, mut client } = Stage::set().await;
    fixture.publish("n", "x").await;
    let short = FetchRequest { lease: millis(1000), ..fetch(&fixture, 1, 10_000) };
    client.fetch(short).await.unwrap();
    let since = Instant::now();
    wire.flow(Flow::Stall, Flow::Pass);
    let took = given_up(&proxy, since).await;
    measured("release that nobody waits for: given up, after the Fetch", took);
    assert!(took > Duration::from_secs(1), "{took:?}");
    assert!(took < Duration::from_millis(ACK_WAIT), "{took:?}");
}

#[tokio::test]
async fn a_wire_that_moves_is_kept_however_short_the_time() {
    let fixture = Fixture::new(ack_wait(600)).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut client = proxy.client().await;
    fixture.publish_many(20).await;
    let mut settled = 0;
    for confirmation in [Confirmation::Sent, Confirmation::Confirmed] {
        for message in take_all(&mut client, &fixture, 10).await {
            let request =
                pb::NakRequest { confirmation: confirmation.into(), ..nak(&message.token, 60_000) };
            // On a loaded machine the last are too late.
            match client.nak(request).await {
                Ok(_) => settled += 1,
                Err(status) => assert_eq!(reason(&status).1, "LEASE_EXPIRED"),
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
    assert!(settled > 5, "{settled} of 20");
    // Longer than anything of it may take to arrive.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!proxy.log().contains(GIVEN_UP), "{}", proxy.log());
}

/// Naks, each behind so many Terms that are large.
const TERMS: usize = 250;
const NAKS: usize = 40;
/// Of the Naks that the connection took last, so many are in its queue for certain, which has 2048
/// places.
const OURS: usize = 2048 / (TERMS + 1) - 1;

#[tokio::test]
async fn what_has_not_left_us_when_its_delivery_is_over_never_leaves() {
    let many = pull::Config { max_ack_pending: -1, ..config() };
    let (filler, fixture) = (Fixture::new(many).await, Fixture::new(ack_wait(ACK_WAIT)).await);
    filler.publish_many(NAKS * TERMS).await;
    fixture.publish_many(NAKS).await;
    let wire = Relay::narrow_to(&server());
    let stalled = Proxy::start_at(&wire.nats_url(), &[]);
    let whole = Proxy::start(NatsServer::shared(), &[]);
    let (mut first, mut second) = (stalled.client().await, whole.client().await);
    let fillers = take_all(&mut first, &filler, NAKS * TERMS).await;
    let held = take_all(&mut first, &fixture, NAKS).await;
    let since = Instant::now();
    wire.flow(Flow::Stall, Flow::Pass);
    let mut sent = Vec::new();
    for (message, fillers) in held.iter().zip(fillers.chunks(TERMS)) {
        if !send(&mut first, fillers, message).await {
            break;
        }
        sent.push(message.stream_sequence);
    }
    assert!(since.elapsed() < LEASE, "too slow to tell anything: {:?}", since.elapsed());
    assert!(sent.len() < NAKS && sent.len() > OURS, "{} Naks were taken", sent.len());
    let next = take_all(&mut second, &fixture, NAKS).await;
    wire.flow(Flow::Pass, Flow::Pass);
    let (mut late, moving) = (Vec::new(), Instant::now());
    while moving.elapsed() < LEASE * 8 / 10 {
        let answer = second.fetch(fetch(&fixture, 1000, 300)).await.unwrap().into_inner();
        late.extend(answer.messages.iter().map(|message| message.stream_sequence));
    }
    measured("stale Naks: taken", sent.len());
    measured("stale Naks: sent late by the kernel", late.len());
    let ours = &sent[sent.len() - OURS..];
    assert!(!ours.iter().any(|ours| late.contains(ours)), "{ours:?} left us, of {late:?}");
    for message in next.iter().filter(|message| ours.contains(&message.stream_sequence)) {
        second.ack(ack(&message.token)).await.expect("it was taken from its holder");
    }
}

/// Whether the connection has taken all of these Terms, and the Nak behind them.
async fn send(client: &mut Client, terms: &[pb::Delivery], nak: &pb::Delivery) -> bool {
    let nak = Settlement {
        token: nak.token.clone(),
        action: Some(Action::Nak(NakAction { delay: None })),
    };
    let settlements = terms.iter().map(large_term).chain([nak]).collect();
    let confirmation = Confirmation::Sent.into();
    let mut request = Request::new(pb::SettleRequest { settlements, confirmation });
    request.set_timeout(Duration::from_millis(500));
    client.settle(request).await.is_ok_and(|answer| answer.into_inner().failed == 0)
}

fn large_term(message: &pb::Delivery) -> Settlement {
    let reason = "x".repeat(1000);
    Settlement { token: message.token.clone(), action: Some(Action::Term(TermAction { reason })) }
}

#[tokio::test]
async fn a_full_queue_holds_up_nobody_for_longer_than_their_deadline() {
    const COUNT: usize = 10_000;
    let many = pull::Config { max_ack_pending: -1, ..config() };
    let fixture = Fixture::new(many).await;
    fixture.publish_many(COUNT + 1).await;
    let wire = Relay::narrow_to(&server());
    let proxy = Proxy::start_at(&wire.nats_url(), &[]);
    let mut client = proxy.client().await;
    let held = take_all(&mut client, &fixture, COUNT + 1).await;
    let settle = |some: &[pb::Delivery]| {
        let settlements = some.iter().map(large_term).collect();
        let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
        let (mut client, mut request) = (client.clone(), Request::new(request));
        // Long enough to leave time for answering thousands at once.
        request.set_timeout(Duration::from_secs(4));
        async move { client.settle(request).await }
    };
    wire.flow(Flow::Stall, Flow::Pass);
    let (first, rest) = held.split_first().unwrap();
    let answers = join_all(rest.chunks(500).map(settle)).await;
    // One that comes when all places are taken, and one that is not about settling.
    let (mut one, mut other) = (client.clone(), client.clone());
    let mut late = Request::new(ack(&first.token));
    late.set_timeout(Duration::from_secs(1));
    let (late, fetched) = tokio::join!(one.ack(late), other.fetch(fetch(&fixture, 1, 1000)));
    let late = reason(&late.unwrap_err());
    assert!(["NATS_UNAVAILABLE", "SETTLE_UNCONFIRMED"].contains(&&*late.1), "{late:?}");
    assert_eq!(reason(&fetched.unwrap_err()).1, "NATS_UNAVAILABLE");
    let (mut told, mut cut_off) = (BTreeMap::<String, usize>::new(), 0);
    for answer in answers {
        let Ok(answer) = answer else {
            cut_off += 1;
            continue;
        };
        for error in answer.into_inner().results.into_iter().filter_map(|result| result.error) {
            *told.entry(error.reason).or_default() += 1;
        }
    }
    // A loaded machine may be late with a few.
    assert!(cut_off <= 5, "{cut_off} of 20 were held up");
    measured("a full queue: settlements were told", &told);
    assert!(told["NATS_UNAVAILABLE"] > 0 && told["SETTLE_UNCONFIRMED"] > 2048, "{told:?}");
    wire.flow(Flow::Pass, Flow::Pass);
    for some in held.chunks(500) {
        eventually("the repeat", || async {
            settle(some).await.ok().filter(|answer| answer.get_ref().failed == 0)
        })
        .await;
    }
    let info = fixture.info().await;
    assert_eq!((info.num_ack_pending, info.delivered.consumer_sequence), (0, COUNT as u64 + 1));
}

/// The library's own pings rest while anything comes, and other replicas' beats come each second.
#[tokio::test]
async fn a_connection_that_only_brings_and_takes_nothing_is_noticed_without_a_settlement() {
    let wire = Relay::to(&server()).await;
    let cluster = ["--cluster", "one-way"];
    let proxy = Proxy::start_at(&wire.nats_url(), &cluster);
    let other = Proxy::start(NatsServer::shared(), &cluster);
    for proxy in [&proxy, &other] {
        eventually("its connection", || async {
            proxy.log().contains("connected to NATS").then_some(())
        })
        .await;
    }
    let since = Instant::now();
    wire.flow(Flow::Stall, Flow::Pass);
    let took = given_up(&proxy, since).await;
    measured("a wire that takes nothing and brings beats: noticed after", took);
    assert!(took < Duration::from_secs(14), "{took:?}");
    wire.flow(Flow::Pass, Flow::Pass);
    eventually("the next connection", || async {
        let connected =
            |line: &&str| line.contains("connected to NATS") && line.contains("settling");
        (proxy.log().lines().filter(connected).count() > 1).then_some(())
    })
    .await;
}
