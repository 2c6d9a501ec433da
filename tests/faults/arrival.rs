//! A settlement arrives before its delivery is over, or never, as far as the proxy decides it. The
//! kernel sends its buffers as soon as the wire moves.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant, SystemTime},
};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::{
    self, Confirmation, FetchRequest, NakAction, Outcome, Settlement, TermAction,
    settlement::Action,
};
use futures_util::{StreamExt as _, future::join_all};
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, ack_wait},
    millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch, nak, reason, take, timed},
    relay::{Flow, Relay},
    stage::{Stage, served},
    until,
};

use super::run::measured;

/// Its margin of a tenth, 1 s, is time enough for a busy machine.
const ACK_WAIT: u64 = 10_000;
/// Two clocks of one machine may differ by this much.
const SKEW: Duration = Duration::from_millis(100);
const GIVEN_UP: &str = "do not arrive at NATS: the connection for settling is replaced";

/// When the proxy has given its connection up, by its own clock.
async fn given_up(proxy: &Proxy) -> SystemTime {
    let given_up = until(3 * BOUND, || async { proxy.logged_at(GIVEN_UP) }).await;
    given_up.unwrap_or_else(|| panic!("the connection is not given up:\n{}", proxy.log()))
}

/// When JetStream delivers the fixture's message again, by the server's clock.
async fn redelivered(fixture: &Fixture) -> SystemTime {
    let consumer = fixture.handle().await;
    let next = consumer.fetch().max_messages(1).expires(3 * BOUND);
    next.messages().await.unwrap().next().await.expect("no delivery").unwrap();
    fixture.delivered_at().await
}

/// The connection is given up when the lease is over, and before JetStream delivers the message again.
async fn given_up_in_time(what: &str, stage: &Stage, lease: &pb::Delivery) {
    let (given_up, redelivered) = tokio::join!(given_up(&stage.proxy), redelivered(&stage.fixture));
    let over = SystemTime::try_from(lease.lease_expire_time.unwrap()).unwrap();
    measured(&format!("{what}: given up, after its lease"), given_up.duration_since(over));
    let left = redelivered.duration_since(given_up);
    measured(&format!("{what}: given up, before the next delivery"), &left);
    assert!(given_up + SKEW > over, "the lease was not over yet");
    assert!(left.is_ok(), "JetStream was faster: {left:?}");
}

#[tokio::test]
async fn unanswered_nak_closes_the_connection_when_its_lease_ends() {
    let stage = Stage::new(ack_wait(ACK_WAIT)).await;
    let mut client = stage.client.clone();
    stage.fixture.publish("n", "x").await;
    let held = take(&client, fetch(&stage.fixture, 1, 10_000)).await;
    tokio::time::sleep(Duration::from_secs(1)).await;
    stage.wire.flow(Flow::Stall, Flow::Pass);
    // By itself it would wait for longer than its delivery lasts.
    let (told, ()) = tokio::join!(
        client.nak(nak(&held[0].token, 0)),
        given_up_in_time("unanswered Nak", &stage, &held[0])
    );
    assert_eq!(reason(&told.unwrap_err()).1, "SETTLE_UNCONFIRMED");
}

#[tokio::test]
async fn sent_settlement_closes_a_silent_connection_in_time() {
    tokio::join!(sent_nak(), release());
}

async fn sent_nak() {
    let stage = Stage::new(ack_wait(ACK_WAIT)).await;
    let mut client = stage.client.clone();
    stage.fixture.publish("n", "x").await;
    let held = take(&client, fetch(&stage.fixture, 1, 10_000)).await;
    stage.wire.flow(Flow::Stall, Flow::Pass);
    let sent = pb::NakRequest { confirmation: Confirmation::Sent.into(), ..nak(&held[0].token, 0) };
    let outcome = client.nak(sent).await.unwrap().into_inner().outcome();
    assert_eq!(outcome, Outcome::Sent);
    given_up_in_time("Nak that was only sent", &stage, &held[0]).await;
}

async fn release() {
    let stage = Stage::new(ack_wait(ACK_WAIT)).await;
    stage.fixture.publish("n", "x").await;
    let short = FetchRequest { lease: millis(1000), ..fetch(&stage.fixture, 1, 10_000) };
    let held = stage.client.clone().fetch(short).await.unwrap().into_inner().messages;
    stage.wire.flow(Flow::Stall, Flow::Pass);
    given_up_in_time("release that nobody waits for", &stage, &held[0]).await;
}

#[tokio::test]
async fn moving_wire_is_kept_with_a_short_ack_wait() {
    let fixture = Fixture::new(ack_wait(600)).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut client = proxy.client().await;
    let (mut settled, began) = (0, Instant::now());
    // On a loaded machine some are too late, and come again.
    while settled < 20 {
        assert!(began.elapsed() < BOUND, "{settled} of 20");
        fixture.publish_many(2).await;
        for confirmation in [Confirmation::Sent, Confirmation::Confirmed] {
            let confirmation = confirmation.into();
            for message in take(&client, fetch(&fixture, 1, 10_000)).await {
                let request = pb::NakRequest { confirmation, ..nak(&message.token, 60_000) };
                match client.nak(request).await {
                    Ok(_) => settled += 1,
                    Err(status) => assert_eq!(reason(&status).1, "LEASE_EXPIRED"),
                }
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
        }
    }
    // Longer than anything of it may take to arrive.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!proxy.log().contains(GIVEN_UP), "{}", proxy.log());
}

/// Large Terms of one call, and how many such calls fill a wire that takes nothing.
const TERMS: usize = 15;
const CALLS: usize = 640;
/// Naks behind all that the wire and the connection have taken.
const NAKS: usize = 10;
/// Tries to put Naks behind a full wire before the proxy gives the connection up, which it does in 12 s at most.
const ROUNDS: usize = 6;

#[tokio::test]
async fn settlement_that_has_not_left_by_its_lease_end_never_leaves() {
    for _ in 0..ROUNDS {
        if let Some(late) = late_naks().await {
            assert!(late.is_empty(), "{late:?} left us late");
            return;
        }
    }
    panic!("the machine is too slow: in none of {ROUNDS} rounds did Naks wait behind a full wire");
}

/// Leaves Naks behind a wire that takes nothing, lets their leases end, and lets the wire flow again. Returns
/// the messages of Naks that left then. `None`: the proxy gave the connection up before the Naks were there.
async fn late_naks() -> Option<Vec<u64>> {
    let many = pull::Config { max_ack_pending: -1, ..ack_wait(120_000) };
    let Stage { fixture: filler, wire, proxy: stalled, client: mut first } =
        Stage::narrow(many).await;
    filler.publish_many((CALLS + 1) * TERMS).await;
    let (_whole, mut second) = served(&NatsServer::shared().url()).await;
    let fillers = take(&first, fetch(&filler, ((CALLS + 1) * TERMS) as u32, 10_000)).await;
    let (spare, fillers) = fillers.split_at(TERMS);
    let began = Instant::now();
    assert!(send(&mut first, spare, None, BOUND).await, "the wire takes nothing");
    let usual = began.elapsed();
    let patience = (usual * 8).max(Duration::from_secs(2));
    // Time enough to fill the wire at the present speed of the machine.
    let wait = Duration::from_secs(10) + usual * u32::try_from(2 * CALLS).unwrap();
    let wait = u64::try_from(wait.as_millis()).unwrap();
    let fixture = Fixture::new(ack_wait(wait)).await;
    fixture.publish_many(NAKS).await;
    let held = take(&first, fetch(&fixture, NAKS as u32, 10_000)).await;
    wire.flow(Flow::Stall, Flow::Pass);
    let mut full = false;
    for fillers in fillers.chunks(TERMS) {
        full = !send(&mut first, fillers, None, patience).await;
        if full {
            break;
        }
    }
    full.then_some(())?;
    // The connection has no place for these, so they wait for one.
    let waiting = held.iter().map(|nak| {
        let mut client = first.clone();
        async move { send(&mut client, &[], Some(nak), patience).await }
    });
    join_all(waiting).await;
    (!stalled.log().contains(GIVEN_UP)).then_some(())?;
    // These leases last until the end of the test, so that only a Nak ends them.
    let long = FetchRequest {
        lease: millis(120_000),
        ..fetch(&fixture, NAKS as u32, wait.cast_signed() + 20_000)
    };
    let next = take(&second, long).await;
    wire.flow(Flow::Pass, Flow::Pass);
    let (mut late, moving) = (Vec::new(), Instant::now());
    while moving.elapsed() < Duration::from_secs(3) {
        let answer = second.fetch(fetch(&fixture, 1000, 300)).await.unwrap().into_inner();
        late.extend(answer.messages.iter().map(|message| message.stream_sequence));
    }
    for message in &next {
        second.ack(ack(&message.token)).await.expect("it was taken from its holder");
    }
    Some(late)
}

/// Whether the connection has taken all of these Terms within this time, and the Nak behind them.
async fn send(
    client: &mut Client,
    terms: &[pb::Delivery],
    nak: Option<&pb::Delivery>,
    patience: Duration,
) -> bool {
    let nak = nak.map(|nak| Settlement {
        number: 0,
        token: nak.token.clone(),
        action: Some(Action::Nak(NakAction { delay: None })),
    });
    let settlements = terms.iter().map(large_term).chain(nak).collect();
    let confirmation = Confirmation::Sent.into();
    let request = timed(pb::SettleRequest { settlements, confirmation }, patience);
    client.settle(request).await.is_ok_and(|answer| answer.into_inner().failed == 0)
}

fn large_term(message: &pb::Delivery) -> Settlement {
    let reason = "x".repeat(1000);
    Settlement {
        number: 0,
        token: message.token.clone(),
        action: Some(Action::Term(TermAction { reason })),
    }
}

#[tokio::test]
async fn full_queue_delays_no_call_beyond_its_deadline() {
    const FILLING: usize = 10_000;
    const LATE: usize = 20;
    const COUNT: usize = FILLING + LATE + 50;
    let many = pull::Config { max_ack_pending: -1, ..ack_wait(120_000) };
    let Stage { fixture, wire, proxy, client } = Stage::narrow(many).await;
    fixture.publish_many(COUNT).await;
    let held = take(&client, fetch(&fixture, COUNT as u32, 10_000)).await;
    let settle = |some: &[pb::Delivery], deadline| {
        let settlements = some.iter().map(large_term).collect();
        let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
        let (mut client, request) = (client.clone(), timed(request, deadline));
        async move { client.settle(request).await }
    };
    wire.flow(Flow::Stall, Flow::Pass);
    let (filling, rest) = held.split_at(FILLING);
    let (late, probes) = rest.split_at(LATE);
    // So many at once take a busy machine a while; nobody hurries them.
    let filling = join_all(filling.chunks(500).map(|some| settle(some, 3 * BOUND)));
    let after = async {
        // A token of which a try was sent is not told any more that nothing was.
        let (mut probes, mut held_up) = (probes.iter(), 0);
        loop {
            let probe = std::slice::from_ref(probes.next().expect("the wire takes everything"));
            match settle(probe, Duration::from_secs(1)).await {
                Ok(told) if is(&told.get_ref().results[0], "NATS_UNAVAILABLE") => break,
                Ok(_) => {}
                // A busy machine is late with some while it takes so many others. Without a bound the
                // connection's own end would be the first to answer, after some ten of these.
                Err(_) => held_up += 1,
            }
            assert!(held_up <= 7, "{held_up} were held up");
        }
        assert!(!proxy.log().contains(GIVEN_UP), "too slow to tell anything");
        // All places are taken now. Each of these has a deadline of its own.
        let late = late.iter().map(std::slice::from_ref);
        let late = join_all(late.map(|one| settle(one, Duration::from_secs(4))));
        // And one that is not about settling.
        let (mut other, request) = (client.clone(), fetch(&fixture, 1, 1000));
        tokio::join!(late, other.fetch(request))
    };
    let (filling, (late, fetched)) = tokio::join!(filling, after);
    let mut in_time = 0;
    // A busy machine may bring some of the answers after their deadline. A queue would delay all.
    for told in late.into_iter().flatten() {
        let open = ["NATS_UNAVAILABLE", "SETTLE_UNCONFIRMED"];
        assert!(open.iter().any(|open| is(&told.get_ref().results[0], open)), "{told:?}");
        in_time += 1;
    }
    assert!(in_time > LATE / 2, "only {in_time} of {LATE} were answered before their deadline");
    assert_eq!(reason(&fetched.unwrap_err()).1, "NATS_UNAVAILABLE");
    let mut told = BTreeMap::<String, usize>::new();
    for answer in filling {
        for error in answer.unwrap().into_inner().results.into_iter().filter_map(|told| told.error)
        {
            *told.entry(error.reason).or_default() += 1;
        }
    }
    measured("a full queue: settlements were told", &told);
    assert!(told["NATS_UNAVAILABLE"] > 0 && told["SETTLE_UNCONFIRMED"] > 2048, "{told:?}");
    wire.flow(Flow::Pass, Flow::Pass);
    for some in held.chunks(500) {
        eventually("the repeat", || async {
            settle(some, BOUND).await.ok().filter(|answer| answer.get_ref().failed == 0)
        })
        .await;
    }
    let info = fixture.info().await;
    assert_eq!((info.num_ack_pending, info.delivered.consumer_sequence), (0, COUNT as u64));
}

fn is(told: &pb::SettleResult, reason: &str) -> bool {
    told.error.as_ref().is_some_and(|error| error.reason == reason)
}

/// A wire that brings something every second, such as the beats of other replicas, is no sign of arrival.
#[tokio::test]
async fn one_way_connection_is_noticed_without_a_settlement() {
    let wire = Relay::to(&NatsServer::shared().url()).await;
    let cluster = ["--cluster", "one-way"];
    let proxy = Proxy::start_at(&wire.nats_url(), &cluster);
    let other = Proxy::start(NatsServer::shared(), &cluster);
    let connections = |proxy: &Proxy| {
        let connected =
            |line: &&str| line.contains("connected to NATS") && line.contains("settling");
        proxy.log().lines().filter(connected).count()
    };
    for proxy in [&proxy, &other] {
        eventually("its connection", || async { (connections(proxy) > 0).then_some(()) }).await;
    }
    let since = Instant::now();
    wire.flow(Flow::Stall, Flow::Pass);
    given_up(&proxy).await;
    measured("a wire that takes nothing and brings beats: noticed after", since.elapsed());
    wire.flow(Flow::Pass, Flow::Pass);
    eventually("the next connection", || async { (connections(&proxy) > 1).then_some(()) }).await;
}
