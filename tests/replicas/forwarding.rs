//! A token works at every replica as it does at its owner.

use fetch_proxy::pb::{self, Outcome, settlement::Action};
use testkit::{
    eventually,
    jetstream::{Fixture, SHORTEST_KEPT, ack_wait, config},
    millis,
    proxy::{ack, extend, fetch, nak, reason, term},
};
use tonic::Code;

use super::pair::{Pair, Replicas};

fn settlement(token: &str, action: Action) -> pb::Settlement {
    pb::Settlement { number: 0, token: token.to_owned(), action: Some(action) }
}

#[tokio::test]
async fn every_forwarded_call_is_answered_like_by_the_owner() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 4).await;
    let token = |place: usize| leased[place].token.as_str();

    let acked = pair.at_other.ack(ack(token(0))).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed);
    let termed = pair.at_other.term(term(token(1), "poison")).await.unwrap().into_inner();
    assert_eq!(termed.outcome(), Outcome::Confirmed);
    let naked = pair.at_other.nak(nak(token(2), 60_000)).await.unwrap().into_inner();
    assert_eq!(naked.outcome(), Outcome::Confirmed);
    assert!(naked.redeliver_time.is_some());
    let extended = pair.at_other.extend(extend(token(3), 120_000)).await.unwrap().into_inner();
    let left = extended.lease.unwrap().seconds;
    assert!((115..=120).contains(&left), "{left}");
    let unset = pb::ExtendRequest { token: token(3).to_owned(), lease: None };
    let extended = pair.at_other.extend(unset).await.unwrap().into_inner();
    assert_eq!(extended.lease.unwrap().seconds, 27, "as long as it was granted");

    // The table is one: retries, other ways, and either replica.
    for client in [&mut pair.at_owner, &mut pair.at_other] {
        let again = client.ack(ack(token(0))).await.unwrap().into_inner();
        assert_eq!(again.outcome(), Outcome::Duplicate);
        let refused = client.nak(nak(token(1), 0)).await.unwrap_err();
        assert_eq!(reason(&refused), (Code::FailedPrecondition, "LEASE_SETTLED".to_owned()));
        let again = client.nak(nak(token(2), 0)).await.unwrap().into_inner();
        assert_eq!(again.outcome(), Outcome::Duplicate);
    }
    pair.at_owner.ack(ack(token(3))).await.unwrap();
    assert_eq!(fixture.info().await.num_ack_pending, 1, "the delayed one");
}

#[tokio::test]
async fn settle_with_tokens_of_both_replicas_keeps_its_order() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let theirs = pair.leased(&fixture, 100).await;
    fixture.publish_many(100).await;
    let mut ours = Vec::new();
    while ours.len() < 100 {
        let answer = pair.at_other.fetch(fetch(&fixture, 100, 5000)).await.unwrap().into_inner();
        ours.extend(answer.messages);
    }
    let mut settlements = Vec::new();
    for (a, b) in theirs.iter().zip(&ours) {
        settlements.push(settlement(&a.token, Action::Ack(pb::AckAction {})));
        let reason = "x".repeat(1024);
        settlements.push(settlement(&b.token, Action::Term(pb::TermAction { reason })));
        // Each once more, and something that is no token.
        settlements.push(settlement(&a.token, Action::Ack(pb::AckAction {})));
        settlements.push(settlement("nonsense", Action::Ack(pb::AckAction {})));
    }
    let request = pb::SettleRequest { settlements, confirmation: 0 };
    let answer = pair.at_other.settle(request).await.unwrap().into_inner();
    for four in answer.results.chunks(4) {
        assert_eq!(four[0].outcome(), Outcome::Confirmed, "{four:?}");
        assert_eq!(four[1].outcome(), Outcome::Confirmed, "{four:?}");
        // As a later call would be answered, be it in the same question to the owner or the next.
        assert_eq!(four[2].outcome(), Outcome::Duplicate, "{four:?}");
        assert_eq!(four[3].error.as_ref().unwrap().reason, "TOKEN_INVALID", "{four:?}");
    }
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn settle_with_tokens_of_three_owners_keeps_its_order() {
    let fixture = Fixture::new(ack_wait(20_000)).await;
    let mut replicas = Replicas::start(4).await;
    let mut leased = Vec::new();
    for owner in 0..4 {
        leased.push(replicas.leased(owner, &fixture, 10).await);
    }
    replicas.all[2].proxy.signal("KILL");
    replicas.all[2].proxy.wait().await;
    let (mut settlements, mut wanted) = (Vec::new(), Vec::new());
    for place in 0..10 {
        for (owner, leased) in leased.iter().enumerate() {
            let again = Action::Nak(pb::NakAction { delay: millis(60_000) });
            let (action, outcome) = match (owner, place % 2) {
                (2, 0) => (again, Outcome::Sent),
                (_, 0) => (again, Outcome::Confirmed),
                _ => (Action::Ack(pb::AckAction {}), Outcome::Confirmed),
            };
            settlements.push(settlement(&leased[place].token, action));
            wanted.push(outcome);
        }
    }
    let request = pb::SettleRequest { settlements, confirmation: 0 };
    let answer = replicas.all[3].client.settle(request).await.unwrap().into_inner();
    let told: Vec<_> = answer.results.iter().map(pb::SettleResult::outcome).collect();
    assert_eq!(told, wanted, "{answer:?}");
}

#[tokio::test]
async fn extended_lease_is_settled_at_another_replica_after_its_first_end() {
    let fixture = Fixture::new(ack_wait(SHORTEST_KEPT)).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 1).await;
    pair.at_other.extend(extend(&leased[0].token, 30_000)).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(7000)).await;
    let acked = pair.at_other.ack(ack(&leased[0].token)).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed);
    assert_eq!(fixture.info().await.num_redelivered, 0);
}

#[tokio::test]
async fn lapsed_lease_is_refused_everywhere() {
    let fixture = Fixture::new(ack_wait(60_000)).await;
    let mut pair = Pair::start().await;
    fixture.publish("n", "x").await;
    let short = pb::FetchRequest { lease: millis(1000), ..fetch(&fixture, 1, 5000) };
    let leased = pair.at_owner.fetch(short).await.unwrap().into_inner().messages;
    let again = pair.at_other.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
    assert_eq!(again.messages[0].delivery_count, 2, "released at the end of the lease");
    for client in [&mut pair.at_owner, &mut pair.at_other] {
        let refused = client.ack(ack(&leased[0].token)).await.unwrap_err();
        assert_eq!(reason(&refused), (Code::FailedPrecondition, "LEASE_EXPIRED".to_owned()));
    }
    pair.at_owner.ack(ack(&again.messages[0].token)).await.unwrap();
    eventually("the ack", || async { (fixture.info().await.num_ack_pending == 0).then_some(()) })
        .await;
}

/// The last attempt is over: any replica settles it by the token alone, also without its owner.
#[tokio::test]
async fn late_ack_of_the_last_attempt_is_applied_by_any_replica() {
    let last = async_nats::jetstream::consumer::pull::Config { max_deliver: 1, ..ack_wait(3000) };
    let fixture = Fixture::new(last).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 2).await;
    eventually("JetStream to give both up", || async {
        (fixture.info().await.num_ack_pending == 0).then_some(())
    })
    .await;
    let acked = pair.at_other.ack(ack(&leased[0].token)).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed);
    let settlements = vec![
        settlement(&leased[1].token, Action::Nak(pb::NakAction::default())),
        settlement(&leased[1].token, Action::Term(pb::TermAction::default())),
    ];
    let request = pb::SettleRequest { settlements, confirmation: 0 };
    let results = pair.at_other.settle(request).await.unwrap().into_inner().results;
    let refused = results[0].error.as_ref().unwrap();
    assert_eq!((&*refused.reason, &*refused.metadata["detail"]), ("LEASE_EXPIRED", "last_attempt"));
    assert_eq!(results[1].outcome(), Outcome::Confirmed);
}
