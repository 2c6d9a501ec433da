//! Consume with `keep`: leases live as long as their stream, and a moment longer.

use std::time::{Duration, Instant};

use fetch_proxy::{
    pb::{self, ConsumeStart, Outcome, consume_start::Holding, settlement::Action},
    reason::Reason,
};
use testkit::{
    consume::{ConsumeClient, acked, by_number, keep, outcomes, seconds, start},
    jetstream::{Fixture, SHORTEST_KEPT, ack_wait, config},
    proxy::{ack, reason},
    scrape::balanced,
    stage::served_with,
};

#[tokio::test]
async fn work_that_is_longer_than_the_ack_wait_is_not_delivered_again() {
    let fixture = Fixture::new(ack_wait(SHORTEST_KEPT)).await;
    fixture.publish_many(2).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = ConsumeClient::open(&client, keep(&fixture, 2, 10, None)).await;
    let held = stream.messages(2).await;
    stream.listen(SHORTEST_KEPT * 5 / 2).await;
    stream.settle(1, held.iter().map(acked).collect());
    assert_eq!(outcomes(&stream.result(1).await), [Outcome::Confirmed; 2]);
    assert_eq!(stream.messages.len(), 0);
    assert_eq!(fixture.info().await.num_redelivered, 0);
    stream.close().await;
}

#[tokio::test]
async fn longest_time_of_a_kept_lease_ends_it() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = ConsumeClient::open(&client, keep(&fixture, 1, 10, Some(2))).await;
    let first = stream.messages(1).await.remove(0);
    let lease = first.lease.unwrap();
    assert!(lease.seconds <= 2, "{lease:?}");
    let again = stream.messages(1).await.remove(0);
    let known = (again.number, again.stream_sequence, again.delivery_count);
    assert_eq!(known, (2, first.stream_sequence, 2));
    stream.close().await;
}

#[tokio::test]
async fn times_of_keep_are_lowered_to_the_longest_lease_and_told() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let (_proxy, client) = served_with(&["--max-lease", "60s"]).await;
    let opened = |keep| {
        let start = ConsumeStart { holding: Some(Holding::Keep(keep)), ..start(&fixture, 1) };
        let client = client.clone();
        async move {
            let mut stream = ConsumeClient::open(&client, start).await;
            stream.until(|stream| stream.opened.is_some()).await;
            stream
        }
    };
    let stream = opened(pb::ConsumeKeep::default()).await;
    assert_eq!(stream.opened.as_ref().unwrap().grace, Some(seconds(10)));
    stream.close().await;
    let long = pb::ConsumeKeep { grace: Some(seconds(100)), at_most: Some(seconds(100)) };
    let mut stream = opened(long).await;
    assert_eq!(stream.opened.as_ref().unwrap().grace, Some(seconds(60)));
    let held = stream.messages(1).await.remove(0);
    let lease = held.lease.unwrap();
    assert!((55..=60).contains(&lease.seconds), "{lease:?}");
    stream.settle(1, vec![acked(&held)]);
    stream.close().await;
    let short = pb::ConsumeKeep { at_most: Some(seconds(0)), ..pb::ConsumeKeep::default() };
    let start = ConsumeStart { holding: Some(Holding::Keep(short)), ..start(&fixture, 1) };
    let status = ConsumeClient::open(&client, start).await.status().await;
    assert_eq!(reason(&status).1, Reason::InvalidField.name());
    assert!(status.message().starts_with("start.keep.at_most"), "{}", status.message());
}

/// The messages of a stream come back when a lease of the same length does, that ends by itself.
#[tokio::test]
async fn messages_of_a_cut_connection_come_back_after_the_grace() {
    const GRACE: i64 = 2;
    let [kept, leased] =
        [Fixture::new(ack_wait(600_000)).await, Fixture::new(ack_wait(600_000)).await];
    let (proxy, other) = served_with(&[]).await;
    for fixture in [&kept, &leased] {
        fixture.publish_many(10).await;
    }
    let by_itself =
        ConsumeStart { holding: Some(Holding::Lease(seconds(GRACE))), ..start(&leased, 10) };
    let worker = proxy.client().await;
    let mut first = ConsumeClient::open(&worker, keep(&kept, 10, GRACE, None)).await;
    let held = first.messages(10).await;
    let mut second = ConsumeClient::open(&other, by_itself).await;
    second.messages(10).await;
    let leased_at = Instant::now();
    let cut_at = Instant::now();
    drop((first, worker));
    let mut heir = ConsumeClient::open(&other, start(&kept, 20)).await;
    let (found, took) =
        tokio::join!(async { (heir.messages(10).await, cut_at.elapsed()) }, async {
            second.messages(10).await;
            leased_at.elapsed()
        },);
    let (found, back) = found;
    println!("back after {back:?}, and after {took:?} by itself");
    assert!(
        back + Duration::from_millis(100) >= Duration::from_secs(GRACE.unsigned_abs()),
        "too soon"
    );
    assert!(back <= took + Duration::from_secs(1), "{back:?}, and {took:?} by itself");
    let counts: Vec<u32> = found.iter().map(|message| message.delivery_count).collect();
    assert_eq!(counts, [2; 10]);
    let late = other.clone().ack(ack(&held[0].token)).await.unwrap_err();
    assert_eq!(reason(&late).1, Reason::LeaseExpired.name());
    heir.settle(1, found.iter().map(acked).collect());
    assert_eq!(heir.result(1).await.failed, 0);
}

#[tokio::test]
async fn leases_end_at_once_after_a_half_close_without_grace() {
    let fixture = Fixture::new(ack_wait(600_000)).await;
    fixture.publish_many(3).await;
    let (proxy, client) = served_with(&[]).await;
    let mut stream = ConsumeClient::open(&client, keep(&fixture, 3, 0, None)).await;
    let held = stream.messages(3).await;
    let extend = Action::Extend(pb::ExtendAction { lease: Some(seconds(600)) });
    stream.settle(1, vec![by_number(held[0].number, extend)]);
    assert_eq!(outcomes(&stream.result(1).await), [Outcome::Extended]);
    stream.close().await;
    let mut next = ConsumeClient::open(&client, start(&fixture, 3)).await;
    let found = next.messages(2).await;
    let mut sequences: Vec<u64> = found.iter().map(|message| message.stream_sequence).collect();
    sequences.sort_unstable();
    assert_eq!(sequences, [2, 3], "the lease that was extended does not end with the stream");
    next.settle(1, found.iter().map(acked).collect());
    assert_eq!(next.result(1).await.failed, 0);
    let settled = client.clone().ack(ack(&held[0].token)).await.unwrap();
    assert_eq!(settled.into_inner().outcome(), Outcome::Confirmed);
    next.close().await;
    let books = balanced(&proxy.ops).await;
    assert_eq!((books.began, books.ended, books.held), (5, 5, 0));
}
