//! A Consume beside another replica: its leases are settled there, and go there when the replica of the stream leaves.

use fetch_proxy::{
    pb::{self, ConsumeDrainCause, Outcome},
    reason::Reason,
};
use testkit::{
    consume::{ConsumeClient, acked, keep, outcomes, start},
    jetstream::{Fixture, ack_wait},
    proxy::ack,
};

use super::pair::Pair;

#[tokio::test]
async fn stream_of_a_leaving_replica_ends_and_its_tokens_work_at_the_other() {
    let fixture = Fixture::new(ack_wait(60_000)).await;
    fixture.publish_many(30).await;
    let mut pair = Pair::start().await;
    let mut stream = ConsumeClient::open(&pair.at_owner, start(&fixture, 20)).await;
    let held = stream.messages(20).await;
    stream.settle(7, vec![acked(&held[0])]);
    assert_eq!(outcomes(&stream.result(7).await), [Outcome::Confirmed]);
    pair.owner.signal("TERM");
    // The stream ends by itself once its leases are at the other replica.
    while stream.next().await.unwrap().is_some() {}
    assert_eq!(stream.draining.unwrap().cause(), ConsumeDrainCause::Replica);
    assert_eq!(stream.ended, [], "a lease that has moved has not ended");
    pair.owner.wait().await;
    for message in held[1..].iter().chain(&stream.messages) {
        let acked = pair.at_other.ack(ack(&message.token)).await.unwrap().into_inner();
        assert_eq!(acked.outcome(), Outcome::Confirmed, "number {}", message.number);
    }
    let info = fixture.info().await;
    assert_eq!((info.num_redelivered, info.num_ack_pending), (0, 0), "{info:?}");
}

#[tokio::test]
async fn kept_leases_live_for_half_a_minute_after_their_stream_has_moved() {
    let fixture = Fixture::new(ack_wait(600_000)).await;
    fixture.publish_many(5).await;
    let mut pair = Pair::start().await;
    let mut stream = ConsumeClient::open(&pair.at_owner, keep(&fixture, 5, 0, None)).await;
    let held = stream.messages(5).await;
    pair.owner.signal("TERM");
    while stream.next().await.unwrap().is_some() {}
    assert_eq!(stream.ended, []);
    pair.owner.wait().await;
    let mut next = ConsumeClient::open(&pair.at_other, start(&fixture, 5)).await;
    next.listen(5000).await;
    assert_eq!(next.messages.len(), 0, "the grace of the stream was nothing");
    let acked = pair.at_other.ack(ack(&held[0].token)).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed);
    let extend = testkit::proxy::extend(&held[1].token, 60_000);
    pair.at_other.extend(extend).await.unwrap();
    // The others come back at last, and the extended lease does not.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while next.messages.len() < 3 && std::time::Instant::now() < deadline {
        next.listen(500).await;
    }
    let mut back: Vec<u64> = next.messages.iter().map(|message| message.stream_sequence).collect();
    back.sort_unstable();
    assert_eq!(back, [3, 4, 5]);
    next.close().await;
}

#[tokio::test]
async fn settlement_at_another_replica_ends_a_lease_and_brings_the_next_message() {
    let fixture = Fixture::new(ack_wait(60_000)).await;
    fixture.publish_many(2).await;
    let mut pair = Pair::start().await;
    let mut stream = ConsumeClient::open(&pair.at_owner, keep(&fixture, 1, 10, None)).await;
    let first = stream.messages(1).await.remove(0);
    let settlement = pb::Settlement { number: 0, token: first.token.clone(), ..acked(&first) };
    let settle = pb::SettleRequest { settlements: vec![settlement], confirmation: 0 };
    let results = pair.at_other.settle(settle).await.unwrap().into_inner().results;
    assert_eq!(results[0].outcome(), Outcome::Confirmed);
    let second = stream.messages(1).await.remove(0);
    let ended = stream.ended.remove(0);
    let why = ended.why.unwrap();
    let known = (ended.number, &*why.reason, &*why.metadata["settled_as"]);
    assert_eq!(known, (1, Reason::LeaseSettled.name(), "ACK"));
    stream.settle(1, vec![acked(&second)]);
    assert_eq!(stream.close().await.ended, []);
}
