//! A Consume at a replica that leaves: its leases go to the replica that stays, and nothing is delivered twice.

use fetch_proxy::pb::{self, ConsumeDrainCause, Outcome, settlement::Action};
use testkit::{
    BOUND,
    jetstream::{Fixture, ack_wait},
    proxy::ack,
};
use tokio::{sync::mpsc, time::timeout};

use super::pair::Pair;

#[tokio::test]
async fn stream_of_a_leaving_replica_ends_and_its_tokens_work_at_the_other() {
    let fixture = Fixture::new(ack_wait(60_000)).await;
    fixture.publish_many(30).await;
    let mut pair = Pair::start().await;
    let (send, mut receive) = mpsc::unbounded_channel();
    let requests = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
    let mut frames = pair.at_owner.consume(requests).await.unwrap().into_inner();
    let credit = pb::ConsumeCredit { max_leases: Some(20), ..Default::default() };
    let start = pb::ConsumeStart {
        stream: fixture.stream.clone(),
        consumer: fixture.consumer.clone(),
        credit: Some(credit),
        ..Default::default()
    };
    send.send(pb::ConsumeRequest { start: Some(start), ..Default::default() }).unwrap();
    let (mut held, mut draining, mut results) = (Vec::new(), None, Vec::new());
    let mut signalled = false;
    // The stream ends by itself once its leases are at the other replica.
    while let Some(frame) = timeout(BOUND, frames.message()).await.expect("no end").unwrap() {
        held.extend(frame.messages);
        draining = draining.or(frame.draining);
        results.extend(frame.results);
        if held.len() >= 20 && !std::mem::replace(&mut signalled, true) {
            let number = held[0].number;
            let action = Some(Action::Ack(pb::AckAction {}));
            let settlements = vec![pb::Settlement { number, action, token: String::new() }];
            let settle = Some(pb::ConsumeSettle { id: 7, settlements, confirmation: 0 });
            send.send(pb::ConsumeRequest { settle, ..Default::default() }).unwrap();
        }
        if !results.is_empty() && draining.is_none() {
            pair.owner.signal("TERM");
        }
    }
    assert_eq!(draining.unwrap().cause(), ConsumeDrainCause::Replica);
    assert_eq!(results[0].results[0].outcome(), Outcome::Confirmed);
    pair.owner.wait().await;
    for message in &held[1..] {
        let acked = pair.at_other.ack(ack(&message.token)).await.unwrap().into_inner();
        assert_eq!(acked.outcome(), Outcome::Confirmed, "number {}", message.number);
    }
    let info = fixture.info().await;
    assert_eq!((info.num_redelivered, info.num_ack_pending), (0, 0), "{info:?}");
}
