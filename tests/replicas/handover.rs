//! A replica that leaves hands its leases over. Old tokens still work, long leases are kept alive,
//! and nothing is delivered twice.

use std::time::{Duration, Instant};

use fetch_proxy::pb::{self, Outcome};
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait, config},
    millis,
    nats_server::{NatsServer, binary},
    proxy::{ack, extend, fetch, nak, reason, term},
    relay::{Flow, Relay},
};
use tonic::Code;

use super::pair::{Replica, Replicas};

/// Sends it away, and waits until it is gone; how long that took.
async fn drained(replica: &mut Replica) -> Duration {
    let began = Instant::now();
    replica.proxy.signal("TERM");
    assert!(replica.proxy.wait().await.success(), "{}", replica.proxy.log());
    began.elapsed()
}

#[tokio::test]
async fn drain_hands_every_lease_to_a_replica_that_stays() {
    let fixture = Fixture::new(ack_wait(4000)).await;
    let mut replicas = Replicas::start(2).await;
    let leased = replicas.leased(0, &fixture, 5).await;
    let token = |place: usize| leased[place].token.as_str();
    let [sender, receiver] = &mut replicas.all[..] else { panic!() };
    for place in 1..4 {
        sender.client.extend(extend(token(place), 60_000)).await.unwrap();
    }
    sender.client.ack(ack(token(0))).await.unwrap();
    sender.client.term(term(token(4), "x")).await.unwrap();

    let took = drained(sender).await;
    println!("measured: drain with 3 leases handed over: {took:?}");
    assert!(took < Duration::from_secs(30), "it waited for the leases: {took:?}");
    // Long after JetStream would have given them away by itself.
    tokio::time::sleep(Duration::from_secs(6)).await;
    let at = &mut receiver.client;
    assert_eq!(at.ack(ack(token(1))).await.unwrap().into_inner().outcome(), Outcome::Confirmed);
    assert_eq!(at.ack(ack(token(1))).await.unwrap().into_inner().outcome(), Outcome::Duplicate);
    let extended = at.extend(extend(token(2), 90_000)).await.unwrap().into_inner();
    assert!(extended.lease.unwrap().seconds > 85);
    let unset = pb::ExtendRequest { token: token(2).to_owned(), lease: None };
    let extended = at.extend(unset).await.unwrap().into_inner();
    assert_eq!(extended.lease.unwrap().seconds, 3, "as long as the sender has granted it");
    assert_eq!(at.ack(ack(token(2))).await.unwrap().into_inner().outcome(), Outcome::Confirmed);
    assert_eq!(at.nak(nak(token(3), 0)).await.unwrap().into_inner().outcome(), Outcome::Confirmed);
    // How leases ended at the one that left is known too.
    assert_eq!(at.ack(ack(token(0))).await.unwrap().into_inner().outcome(), Outcome::Duplicate);
    let refused = at.ack(ack(token(4))).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::FailedPrecondition, "LEASE_SETTLED".to_owned()));
    let again = at.fetch(fetch(&fixture, 5, 3000)).await.unwrap().into_inner().messages;
    assert_eq!(again.len(), 1, "only the nacked message");
    assert_eq!((again[0].stream_sequence, again[0].delivery_count), (leased[3].stream_sequence, 2));
    at.ack(ack(&again[0].token)).await.unwrap();
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn leases_move_from_receiver_to_receiver() {
    let fixture = Fixture::new(config()).await;
    let mut replicas = Replicas::start(3).await;
    let leased = replicas.leased(0, &fixture, 3).await;
    replicas.all[0].client.ack(ack(&leased[0].token)).await.unwrap();
    drained(&mut replicas.all[0]).await;
    // The replica that has the leases now is asked by the other.
    replicas.all[1].client.ack(ack(&leased[1].token)).await.unwrap();
    drained(&mut replicas.all[1]).await;
    let at = &mut replicas.all[2].client;
    for message in &leased[..2] {
        let again = at.ack(ack(&message.token)).await.unwrap().into_inner();
        assert_eq!(again.outcome(), Outcome::Duplicate);
    }
    let acked = at.ack(ack(&leased[2].token)).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed);
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn thousands_of_leases_move_in_parts() {
    let consumer =
        async_nats::jetstream::consumer::pull::Config { max_ack_pending: 5000, ..config() };
    // Less than NATS takes by itself: a message that has all of it would end the connection.
    let server = NatsServer::start_with(binary(), Some("max_payload: 64KB".to_owned()));
    let fixture = Fixture::on(&server, consumer).await;
    let mut replicas = Replicas::start_at(&[&server.url(), &server.url()]).await;
    let mut leased = Vec::new();
    for _ in 0..3 {
        leased.extend(replicas.leased(0, &fixture, 1000).await);
    }
    let took = drained(&mut replicas.all[0]).await;
    println!("measured: drain with 3000 leases handed over: {took:?}");
    // Nor do a thousand long reasons go in one question.
    replicas.add(&server.url()).await;
    let at = &mut replicas.all[2].client;
    for thousand in leased.chunks(1000) {
        let reason = "x".repeat(1024);
        let settlement = |message: &pb::Delivery| pb::Settlement {
            number: 0,
            token: message.token.clone(),
            action: Some(pb::settlement::Action::Term(pb::TermAction { reason: reason.clone() })),
        };
        let settlements = thousand.iter().map(settlement).collect();
        let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
        let answer = at.settle(request).await.unwrap().into_inner();
        assert_eq!(answer.failed, 0, "{:?}", answer.results.iter().find(|one| one.error.is_some()));
    }
    for replica in &replicas.all {
        assert!(!replica.proxy.log().contains("NATS cannot be reached"), "{}", replica.proxy.log());
    }
    assert_eq!(fixture.info().await.num_ack_pending, 0);
    assert_eq!(fixture.info().await.num_redelivered, 0);
}

#[tokio::test]
async fn two_leaving_replicas_receive_no_leases_of_each_other() {
    let fixture = Fixture::new(config()).await;
    let mut replicas = Replicas::start(3).await;
    let mut leased = replicas.leased(0, &fixture, 20).await;
    leased.extend(replicas.leased(1, &fixture, 20).await);
    for sender in &replicas.all[..2] {
        sender.proxy.signal("TERM");
    }
    for sender in &mut replicas.all[..2] {
        assert!(sender.proxy.wait().await.success(), "{}", sender.proxy.log());
    }
    for message in &leased {
        let acked = replicas.all[2].client.ack(ack(&message.token)).await.unwrap().into_inner();
        assert_eq!(acked.outcome(), Outcome::Confirmed);
    }
    assert_eq!(fixture.info().await.num_redelivered, 0);
}

#[tokio::test]
async fn silent_receiver_is_given_up_for_another() {
    let fixture = Fixture::new(config()).await;
    let mut replicas = Replicas::start(3).await;
    let leased = replicas.leased(0, &fixture, 5).await;
    replicas.all[1].proxy.signal("STOP");
    drained(&mut replicas.all[0]).await;
    for message in &leased {
        let acked = replicas.all[2].client.ack(ack(&message.token)).await.unwrap().into_inner();
        assert_eq!(acked.outcome(), Outcome::Confirmed);
    }
    // The hand-over that it missed is no longer for it.
    replicas.all[1].proxy.signal("CONT");
    let again = replicas.all[1].client.ack(ack(&leased[0].token)).await.unwrap().into_inner();
    assert_eq!(again.outcome(), Outcome::Duplicate);
    assert_eq!(fixture.info().await.num_redelivered, 0);
}

#[tokio::test]
async fn receiver_that_dies_before_commit_leaves_the_leases_at_the_sender() {
    // On a busy machine the receiver can be killed too late, and the leases have moved.
    for _ in 0..5 {
        if receiver_dies_after_prepare().await {
            return;
        }
    }
    panic!("no receiver died in time");
}

/// Whether the receiver died before its answer to Prepare arrived.
async fn receiver_dies_after_prepare() -> bool {
    let fixture = Fixture::new(config()).await;
    let server = NatsServer::shared().url();
    let relay = Relay::to(&server).await;
    let mut replicas = Replicas::start_at(&[&server, &relay.nats_url()]).await;
    let leased = replicas.leased(0, &fixture, 3).await;
    // The receiver's answers are slow, so it dies after Prepare and before its answer. Its first answer
    // must arrive: before that, it gets no leases.
    relay.flow(Flow::Delay(Duration::from_millis(400)), Flow::Pass);
    replicas.all[0].proxy.signal("TERM");
    eventually("the receiver to be prepared", || async {
        replicas.all[1].proxy.log().contains("\"leases\":3").then_some(())
    })
    .await;
    relay.close();
    replicas.all[1].proxy.signal("KILL");
    replicas.all[1].proxy.wait().await;
    let in_time = eventually("the end of the hand-over", || async {
        let log = replicas.all[0].proxy.log();
        let moved = log.contains("leases handed over");
        (moved || log.contains("a replica did not take the leases over")).then_some(!moved)
    })
    .await;
    if !in_time {
        return false;
    }
    // It waits for the leases that it still has, and knows them.
    for message in &leased {
        let acked = replicas.all[0].client.ack(ack(&message.token)).await.unwrap().into_inner();
        assert_eq!(acked.outcome(), Outcome::Confirmed);
    }
    assert!(replicas.all[0].proxy.wait().await.success());
    assert_eq!(fixture.info().await.num_redelivered, 0);
    true
}

#[tokio::test]
async fn receiver_that_dies_after_commit_releases_nothing_early() {
    let fixture = Fixture::new(ack_wait(15_000)).await;
    let server = NatsServer::shared().url();
    let relay = Relay::to(&server).await;
    let mut replicas = Replicas::start_at(&[&server, &relay.nats_url()]).await;
    let asked_at = Instant::now();
    let leased = replicas.leased(0, &fixture, 3).await;
    // The receiver's answer is slow, so it dies after Commit and before its answer.
    relay.flow(Flow::Delay(Duration::from_millis(250)), Flow::Pass);
    replicas.all[0].proxy.signal("TERM");
    eventually("the receiver to have the leases", || async {
        replicas.all[1].proxy.log().contains("leases taken over").then_some(())
    })
    .await;
    relay.close();
    replicas.all[1].proxy.signal("KILL");
    replicas.all[1].proxy.wait().await;
    assert!(replicas.all[0].proxy.wait().await.success());
    println!("measured: sender gone {:?} after the first Fetch", asked_at.elapsed());

    let late = replicas.add(&server).await;
    // No other replica is there whose beat would show that this one is connected.
    late.proxy.ready().await;
    // Nobody has them, so final words are taken until their first end.
    let acked = late.client.clone().ack(ack(&leased[1].token)).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed);
    let answer = late.client.clone().fetch(fetch(&fixture, 3, 20_000)).await.unwrap().into_inner();
    assert!(!answer.messages.is_empty());
    let took = asked_at.elapsed();
    assert!(took >= Duration::from_secs(15), "earlier than JetStream alone: {took:?}");
    let refused = late.client.clone().ack(ack(&leased[0].token)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::FailedPrecondition, "LEASE_EXPIRED".to_owned()));
}

#[tokio::test]
async fn rolling_update_delivers_nothing_twice_to_random_callers() {
    let fixture = Fixture::new(ack_wait(6000)).await;
    let server = NatsServer::shared().url();
    let mut replicas = Replicas::start(3).await;
    fixture.publish_many(300).await;
    let mut leased = Vec::new();
    for _ in 0..3 {
        for place in 0..replicas.all.len() {
            let all = pb::FetchRequest { lease: millis(60_000), ..fetch(&fixture, 20, 2000) };
            let answer = replicas.all[place].client.fetch(all).await.unwrap().into_inner();
            leased.extend(answer.messages);
        }
        replicas.add(&server).await;
        drained(&mut replicas.all[0]).await;
        replicas.all.remove(0);
        let half = leased.len() / 2;
        for (place, message) in leased.drain(..half).enumerate() {
            let count = replicas.all.len();
            let at = &mut replicas.all[place % count].client;
            let acked = at.ack(ack(&message.token)).await.unwrap().into_inner();
            assert_eq!(acked.outcome(), Outcome::Confirmed, "{place}");
        }
    }
    let info = fixture.info().await;
    assert_eq!(info.num_redelivered, 0, "{info:?}");
}
