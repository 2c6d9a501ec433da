//! A proxy process is stopped for longer than an ack wait in the middle of a large Settle, and
//! continues later. It still writes little, and claims nothing that another worker has by then.

use std::time::Duration;

use fetch_proxy::pb::{self, Outcome, Settlement, TermAction, settlement::Action};
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait},
    nats_server::NatsServer,
    proxy::{Client, Proxy, fetch, take},
};

use super::run::measured;

const COUNT: usize = 1000;
const ACK_WAIT: u64 = 3000;
/// The messages that are not written yet, and those under way in both
/// directions.
const UNDER_WAY: usize = 64;

/// Terminates all of them, and counts what was confirmed.
async fn terminate(mut client: Client, messages: Vec<pb::Delivery>) -> usize {
    let term = |message: pb::Delivery| Settlement {
        number: 0,
        token: message.token,
        action: Some(Action::Term(TermAction { reason: "late".into() })),
    };
    let settlements = messages.into_iter().map(term).collect();
    let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
    let results = client.settle(request).await.unwrap().into_inner().results;
    results.iter().filter(|result| result.outcome() == Outcome::Confirmed).count()
}

async fn pending(fixture: &Fixture) -> usize {
    fixture.info().await.num_ack_pending
}

#[tokio::test]
async fn process_stopped_during_a_settle_claims_nothing_of_the_next_holder() {
    let config =
        async_nats::jetstream::consumer::pull::Config { max_ack_pending: -1, ..ack_wait(ACK_WAIT) };
    let fixture = Fixture::new(config).await;
    let (owner, other) =
        (Proxy::start(NatsServer::shared(), &[]), Proxy::start(NatsServer::shared(), &[]));
    let (at_owner, at_other) = (owner.client().await, other.client().await);
    for settled_before in [1, 1, 1, 50, 100] {
        fixture.publish_many(COUNT).await;
        let messages =
            take(&at_owner, fetch(&fixture, u32::try_from(COUNT).unwrap(), 10_000)).await;
        let settling = tokio::spawn(terminate(at_owner.clone(), messages));
        while pending(&fixture).await > COUNT - settled_before {}
        owner.signal("STOP");
        // The server has read what was written.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let left = pending(&fixture).await;
        let next = take(&at_other, fetch(&fixture, u32::try_from(left).unwrap(), 10_000)).await;
        owner.signal("CONT");
        let confirmed = settling.await.unwrap();
        // The server has read what came late.
        tokio::time::sleep(Duration::from_millis(200)).await;
        let hit = left - pending(&fixture).await;
        measured("a stopped process: left, confirmed, hit late", (left, confirmed, hit));
        assert!(confirmed <= COUNT - left, "{confirmed} confirmed, {left} were another's");
        assert!(hit <= UNDER_WAY, "{hit} of {left} hit");
        if !next.is_empty() {
            terminate(at_other.clone(), next).await;
        }
        eventually("the end of a round", || async { (pending(&fixture).await == 0).then_some(()) })
            .await;
    }
}
