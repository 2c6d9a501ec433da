//! Settlements on a Fetch, of tokens of other replicas: of a replica that lives, of a dead one, and of one that leaves.

use fetch_proxy::pb::{self, EmptyReason, Outcome, settlement::Action};
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, ack_wait, config},
    millis,
    proxy::{ack, acking, fetch},
};
use tonic_types::StatusExt as _;

use super::pair::{Pair, Replicas};

#[tokio::test]
async fn token_of_another_replica_is_settled_before_the_fetch() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 1).await;
    let mut token = leased[0].token.clone();
    // A worker whose calls go to one replica, then to the other.
    for round in 0..6 {
        fixture.publish("n", "x").await;
        let client = if round % 2 == 0 { &mut pair.at_other } else { &mut pair.at_owner };
        let request = acking(&token, fetch(&fixture, 1, 10_000));
        let answer = client.fetch(request).await.unwrap().into_inner();
        assert_eq!(answer.results[0].outcome(), Outcome::Confirmed, "{answer:?}");
        assert_eq!((answer.messages.len(), answer.messages[0].delivery_count), (1, 1));
        token.clone_from(&answer.messages[0].token);
        assert_eq!(fixture.info().await.num_ack_pending, 1, "the one of this answer");
    }
    pair.at_owner.ack(ack(&token)).await.unwrap();
    assert_eq!(fixture.info().await.num_redelivered, 0);
}

#[tokio::test]
async fn token_of_a_dead_owner_is_settled_or_nothing_is_fetched() {
    let fixture = Fixture::new(ack_wait(60_000)).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 2).await;
    pair.owner.signal("KILL");
    pair.owner.wait().await;
    fixture.publish("n", "x").await;
    // Its first calls may be answered with OWNER_UNREACHABLE, and then nothing is fetched.
    let client = pair.at_other.clone();
    let answer = eventually("the token of the dead owner to be settled", || async {
        let request = acking(&leased[0].token, fetch(&fixture, 1, 10_000));
        let answer = client.clone().fetch(request).await.unwrap().into_inner();
        if answer.failed > 0 {
            assert_eq!(answer.results[0].error.as_ref().unwrap().reason, "OWNER_UNREACHABLE");
            assert_eq!(answer.empty_reason(), EmptyReason::Settle);
            return None;
        }
        Some(answer)
    })
    .await;
    assert!([Outcome::Confirmed, Outcome::Duplicate].contains(&answer.results[0].outcome()));
    assert_eq!(answer.messages[0].stream_sequence, 3);
    // Only the owner could extend it.
    let extend = pb::ExtendAction { lease: millis(60_000) };
    let token = leased[1].token.clone();
    let settlements =
        vec![pb::Settlement { number: 0, token, action: Some(Action::Extend(extend)) }];
    let request = pb::FetchRequest { settlements, ..fetch(&fixture, 1, 60_000) };
    let mut client = pair.at_other;
    let unreachable = client.fetch(request).await.unwrap().into_inner();
    assert_eq!((unreachable.empty_reason(), unreachable.failed), (EmptyReason::Settle, 1));
    let error = unreachable.results[0].error.as_ref().unwrap();
    assert_eq!((&*error.reason, &*error.metadata["applied"]), ("OWNER_UNREACHABLE", "no"));
}

#[tokio::test]
async fn worker_loops_on_while_its_replica_hands_over() {
    let fixture = Fixture::new(config()).await;
    let mut replicas = Replicas::start(2).await;
    let leased = replicas.leased(0, &fixture, 1).await;
    let mut token = leased[0].token.clone();
    let [first, second] = &mut replicas.all[..] else { panic!() };
    first.proxy.signal("TERM");
    let (mut settled, mut failed) = (1, 0);
    let (began, mut serves) = (std::time::Instant::now(), true);
    while serves {
        assert!(began.elapsed() < BOUND, "{}", first.proxy.log());
        fixture.publish("n", "x").await;
        let request = acking(&token, fetch(&fixture, 1, 10_000));
        let answer = match first.client.fetch(request.clone()).await {
            // Its connections are closed at the end, or it refuses calls before that.
            Err(status) => {
                let info = status.get_details_error_info();
                serves = info.is_some();
                assert!(info.is_none_or(|info| info.reason == "DRAINING"), "{status:?}");
                second.client.fetch(request).await.unwrap().into_inner()
            }
            Ok(answer) => answer.into_inner(),
        };
        if answer.failed > 0 {
            assert_eq!(answer.results[0].error.as_ref().unwrap().reason, "LEASE_BUSY");
            continue;
        }
        settled += 1;
        let outcome = answer.results[0].outcome();
        assert!([Outcome::Confirmed, Outcome::Duplicate].contains(&outcome), "{answer:?}");
        if let Some(error) = &answer.error {
            // It has settled, and leaves: the other replica has the next message.
            assert_eq!(error.reason, "DRAINING");
            failed += 1;
            let next = second.client.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
            token.clone_from(&next.messages[0].token);
        } else {
            token.clone_from(&answer.messages[0].token);
        }
    }
    println!(
        "measured: {settled} settled while a replica left, {failed} after it had stopped to fetch"
    );
    second.client.ack(ack(&token)).await.unwrap();
    assert_eq!(fixture.info().await.num_redelivered, 0);
}
