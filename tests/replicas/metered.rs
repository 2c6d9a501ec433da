//! What replicas count of each other: tokens on their way, and leases that move.

use testkit::{
    eventually,
    jetstream::{Fixture, config},
    proxy::ack,
    scrape::Scrape,
};

use super::pair::Pair;

#[tokio::test]
async fn forwarded_tokens_and_moved_leases_are_in_the_books_of_both_replicas() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 4).await;
    pair.at_other.ack(ack(&leased[0].token)).await.unwrap();
    pair.at_owner.ack(ack(&leased[1].token)).await.unwrap();
    let (owner, other) = (Scrape::of(&pair.owner.ops), Scrape::of(&pair.other.ops));
    let routed = |scrape: &Scrape| {
        ["here", "forwarded", "orphan"].map(|route| {
            scrape.value(&format!("fetchproxy_settlements_routed_total{{route=\"{route}\"}}"))
        })
    };
    assert_eq!(routed(&owner), [1.0, 0.0, 0.0]);
    assert_eq!(routed(&other), [0.0, 1.0, 0.0]);
    assert_eq!(other.value("fetchproxy_forward_seconds_count"), 1.0);
    let confirmed = ["kind=\"ack\"", "outcome=\"confirmed\""];
    assert_eq!(owner.sum("fetchproxy_settlements_total", &confirmed), 2.0);
    assert_eq!(other.sum("fetchproxy_settlements_total", &confirmed), 0.0);
    assert_eq!(owner.value("fetchproxy_replicas"), 2.0);
    assert_eq!(owner.sum("fetchproxy_replicas_differing", &[]), 0.0);
    let books = owner.books().unwrap();
    assert_eq!((books.began, books.ended, books.held), (4, 2, 2));

    pair.owner.signal("TERM");
    // A page in the middle of a move does not add up.
    let moved = eventually("the hand-over", || async {
        Scrape::of(&pair.other.ops).books().ok().filter(|books| books.began == 2)
    });
    let books = moved.await;
    assert_eq!((books.began, books.ended, books.held), (2, 0, 2));
    for lease in &leased[2..] {
        pair.at_other.ack(ack(&lease.token)).await.unwrap();
    }
    let after = Scrape::of(&pair.other.ops);
    assert_eq!(routed(&after), [2.0, 1.0, 0.0]);
    let books = after.books().unwrap();
    assert_eq!((books.began, books.ended, books.held), (2, 2, 0));
}
