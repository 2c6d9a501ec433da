//! Tokens whose owner does not answer: dead, stopped, or living and cut off from NATS. Whatever is
//! done without it, no message reaches a second worker before JetStream alone would give it away.

use std::time::{Duration, Instant, SystemTime};

use fetch_proxy::{
    broker::ConsumerInfo,
    clock,
    cluster::OpenedToken,
    lessor::{Action, Settled},
    pb::Outcome,
    token::{Claims, InstanceId, new_key_line},
};
use testkit::{
    BOUND,
    cluster::Cluster,
    eventually,
    fake_broker::{FakeBroker, info},
    jetstream::{Fixture, ack_wait, config},
    nats_server::NatsServer,
    proxy::{Client, ack, extend, fetch, nak, reason, term},
    relay::Relay,
    scrape::Scrape,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::{
    linked::{Member, Net},
    pair::Pair,
};

fn applied(status: &Status) -> String {
    assert_eq!(reason(status), (Code::Unavailable, "OWNER_UNREACHABLE".to_owned()));
    assert!(status.get_details_retry_info().is_some());
    status.get_details_error_info().unwrap().metadata["applied"].clone()
}

/// Repeats what is answered with OWNER_UNREACHABLE, as its promise says.
async fn acked(client: &mut Client, token: &str) -> Outcome {
    let began = Instant::now();
    loop {
        match client.ack(ack(token)).await {
            Ok(answer) => return answer.into_inner().outcome(),
            Err(status) => assert_eq!(reason(&status).1, "OWNER_UNREACHABLE", "{status:?}"),
        }
        assert!(began.elapsed() < BOUND);
    }
}

#[tokio::test]
async fn dead_owner_s_leases_accept_ack_and_term_and_delay_nak() {
    let fixture = Fixture::new(ack_wait(12_000)).await;
    let mut pair = Pair::start().await;
    let asked_at = Instant::now();
    let leased = pair.leased(&fixture, 4).await;
    let leased_at = Instant::now();
    let token = |place: usize| leased[place].token.as_str();
    pair.owner.signal("KILL");
    pair.owner.wait().await;

    assert_eq!(acked(&mut pair.at_other, token(0)).await, Outcome::Confirmed);
    println!("measured: ack of a dead owner's token: {:?} after its death", leased_at.elapsed());
    let termed = pair.at_other.term(term(token(1), "x")).await.unwrap().into_inner();
    assert_eq!(termed.outcome(), Outcome::Confirmed);
    let naked = pair.at_other.nak(nak(token(2), 0)).await.unwrap().into_inner();
    assert_eq!(naked.outcome(), Outcome::Sent);
    // It has to be back when the ack wait is over; its lease ends a tenth of that earlier. The owner
    // told the one, and the other replica the other.
    let told = SystemTime::try_from(naked.redeliver_time.unwrap()).unwrap();
    let over = SystemTime::try_from(leased[2].lease_expire_time.unwrap()).unwrap();
    let after = told.duration_since(over).unwrap();
    assert!((1100..3500).contains(&after.as_millis()), "{after:?}");
    assert_eq!(applied(&pair.at_other.extend(extend(token(3), 60_000)).await.unwrap_err()), "no");
    assert_eq!(fixture.info().await.num_ack_pending, 2);

    let mut again = Vec::new();
    while again.len() < 2 {
        let answer = pair.at_other.fetch(fetch(&fixture, 2, 20_000)).await.unwrap().into_inner();
        again.extend(answer.messages);
    }
    let took = asked_at.elapsed();
    println!("measured: a dead owner's messages are back after (ack wait 12 s): {took:?}");
    assert!(took >= Duration::from_secs(12), "earlier than JetStream alone: {took:?}");
    let refused = pair.at_other.ack(ack(token(2))).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::FailedPrecondition, "LEASE_EXPIRED".to_owned()));
    for message in &again {
        pair.at_other.ack(ack(&message.token)).await.unwrap();
    }
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn stopped_owner_s_leases_accept_ack_and_term() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 2).await;
    pair.owner.signal("STOP");
    assert_eq!(acked(&mut pair.at_other, &leased[0].token).await, Outcome::Confirmed);
    let refused = pair.at_other.extend(extend(&leased[1].token, 60_000)).await.unwrap_err();
    assert_eq!(applied(&refused), "unknown");
    let refused = pair.at_other.nak(nak(&leased[1].token, 0)).await.unwrap_err();
    assert_eq!(applied(&refused), "unknown");
    let failures = Scrape::of(&pair.other.ops);
    let silent = "fetchproxy_forward_failures_total{why=\"silent\"}";
    assert!(failures.value(silent) >= 3.0, "{}", failures.value(silent));
    pair.owner.signal("CONT");
    // The replica now hears an old request, and a repeat of the request gets its result.
    let began = Instant::now();
    let outcome = loop {
        match pair.at_other.nak(nak(&leased[1].token, 0)).await {
            Ok(answer) => break answer.into_inner().outcome(),
            Err(status) => assert_ne!(reason(&status).1, "LEASE_EXPIRED", "{status:?}"),
        }
        assert!(began.elapsed() < BOUND);
    };
    assert!(matches!(outcome, Outcome::Confirmed | Outcome::Duplicate), "{outcome:?}");
    let again = pair.at_owner.ack(ack(&leased[0].token)).await.unwrap().into_inner();
    assert!(matches!(again.outcome(), Outcome::Confirmed | Outcome::Duplicate), "{again:?}");
}

#[tokio::test]
async fn stopped_owner_neither_releases_early_nor_settles_late() {
    let fixture = Fixture::new(ack_wait(6000)).await;
    let mut pair = Pair::start().await;
    let asked_at = Instant::now();
    let leased = pair.leased(&fixture, 2).await;
    pair.owner.signal("STOP");
    for message in &leased {
        let refused = pair.at_other.nak(nak(&message.token, 0)).await.unwrap_err();
        assert_eq!(applied(&refused), "unknown");
    }
    let answer = pair.at_other.fetch(fetch(&fixture, 2, 15_000)).await.unwrap().into_inner();
    let took = asked_at.elapsed();
    assert!(took >= Duration::from_secs(6), "earlier than JetStream alone: {took:?}");
    assert!(!answer.messages.is_empty());
    // It may still have done what it was asked, or have extended it: nobody knows.
    let refused = pair.at_other.ack(ack(&leased[0].token)).await.unwrap_err();
    assert_eq!(applied(&refused), "unknown");
    // Once the replica continues, the old request finds that the leases are over.
    pair.owner.signal("CONT");
    let refused = pair.at_owner.ack(ack(&leased[0].token)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::FailedPrecondition, "LEASE_EXPIRED".to_owned()));
    for message in answer.messages {
        let acked = pair.at_other.ack(ack(&message.token)).await.unwrap().into_inner();
        assert_eq!(acked.outcome(), Outcome::Confirmed, "an earlier holder affected the delivery");
    }
}

#[tokio::test]
async fn owner_cut_off_from_nats_releases_nothing_early() {
    let fixture = Fixture::new(ack_wait(12_000)).await;
    let server = NatsServer::shared().url();
    let relay = Relay::to(&server).await;
    let mut pair = Pair::start_at(&relay.nats_url(), &server).await;
    let asked_at = Instant::now();
    let leased = pair.leased(&fixture, 3).await;
    relay.close();
    assert_eq!(acked(&mut pair.at_other, &leased[0].token).await, Outcome::Confirmed);
    let naked = pair.at_other.nak(nak(&leased[1].token, 0)).await.unwrap().into_inner();
    assert_eq!(naked.outcome(), Outcome::Sent);
    // The owner itself says the truth to its own clients.
    let refused = pair.at_owner.ack(ack(&leased[2].token)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::Unavailable, "NATS_UNAVAILABLE".to_owned()));
    relay.open();
    let answer = pair.at_other.fetch(fetch(&fixture, 1, 30_000)).await.unwrap().into_inner();
    assert_eq!(answer.messages.len(), 1);
    let took = asked_at.elapsed();
    assert!(took >= Duration::from_secs(12), "earlier than JetStream alone: {took:?}");
}

#[tokio::test]
async fn recreated_consumer_accepts_no_old_token() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 1).await;
    pair.owner.signal("KILL");
    pair.owner.wait().await;
    fixture
        .jetstream
        .delete_consumer_from_stream(&fixture.consumer, &fixture.stream)
        .await
        .unwrap();
    fixture.jetstream.create_consumer_on_stream(config(), &fixture.stream).await.unwrap();
    // The message is somebody else's now.
    let held = pair.at_other.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    let refused = pair.at_other.ack(ack(&leased[0].token)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::FailedPrecondition, "LEASE_EXPIRED".to_owned()));
    assert_eq!(fixture.info().await.num_ack_pending, 1);
    pair.at_other.ack(ack(&held.messages[0].token)).await.unwrap();
}

/// Long enough for a busy machine to restart a server and to fetch before the lease is over.
const ACK_WAIT: u64 = 15_000;

/// A restarted server and a new leader deliver a message at once if it is older than the ack wait.
/// So `settle_by` alone does not say that no other worker has it.
async fn gives_away(fixture: &Fixture, pair: &mut Pair, lose: impl AsyncFnOnce()) {
    fixture.publish("n", "1").await;
    tokio::time::sleep(Duration::from_millis(ACK_WAIT)).await;
    let first = pair.at_owner.fetch(fetch(fixture, 1, 10_000)).await.unwrap().into_inner();
    let first = &first.messages[0];
    pair.owner.signal("KILL");
    pair.owner.wait().await;
    lose().await;

    let second = eventually("the next holder", || async {
        let answer = pair.at_other.clone().fetch(fetch(fixture, 1, 10_000)).await.ok()?;
        answer.into_inner().messages.pop()
    })
    .await;
    assert_eq!(second.delivery_count, 2);
    let refused = pair.at_other.ack(ack(&first.token)).await.unwrap_err();
    assert_eq!(applied(&refused), "no");
    let over = SystemTime::try_from(first.lease_expire_time.unwrap()).unwrap();
    assert!(
        SystemTime::now() < over,
        "too slow to tell anything: the first lease is over by itself"
    );
    assert_eq!(fixture.info().await.num_ack_pending, 1);
    let acked = pair.at_other.ack(ack(&second.token)).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed);
}

#[tokio::test]
async fn redelivery_by_a_restarted_server_is_not_settled_for_a_dead_owner() {
    let mut server = NatsServer::start();
    let fixture = Fixture::on(&server, ack_wait(ACK_WAIT)).await;
    let mut pair = Pair::start_at(&server.url(), &server.url()).await;
    gives_away(&fixture, &mut pair, async || {
        server.kill();
        server.restart();
    })
    .await;
}

#[tokio::test]
async fn redelivery_by_a_new_leader_is_not_settled_for_a_dead_owner() {
    let cluster = Cluster::start().await;
    let fixture = cluster.fixture(ack_wait(ACK_WAIT)).await;
    let mut pair = Pair::start_at(&cluster.url(), &cluster.url()).await;
    gives_away(&fixture, &mut pair, async || cluster.step_down(&fixture).await).await;
}

#[tokio::test(start_paused = true)]
async fn unseen_return_of_a_leader_blocks_settling_for_a_dead_owner() {
    let (net, keys) = Net::new(&new_key_line().unwrap());
    for (replicas, leader_shows, settled) in
        [(1, true, true), (3, true, true), (3, false, true), (1, false, false)]
    {
        let info = ConsumerInfo { replicas, leader_shows, ..info(Duration::from_secs(60)) };
        let broker = FakeBroker::new(info);
        let member = Member::join(&net, &keys, &broker, 10).await;
        let settle_by = (clock::unix_time() + Duration::from_secs(30)).as_millis();
        let claims = Claims {
            owner: InstanceId::random().unwrap(),
            lease: 1,
            settle_by: u64::try_from(settle_by).unwrap(),
            leader: 1,
            created: "first".into(),
            ack_subject: "$JS.ACK.S.worker.1.1.1.1.0".into(),
            principal: "anonymous".into(),
            span: None,
        };
        let tokens = vec![OpenedToken { claims, action: Action::Ack, by: None }];
        let told = member.cluster.settle_ownerless(tokens, clock::now() + BOUND).await;
        let done = matches!(told[0], Some(Ok(Settled::Done { .. })));
        assert_eq!((done, told[0].is_none()), (settled, !settled), "{told:?}");
        assert_eq!(broker.published().len(), usize::from(settled));
    }
}
