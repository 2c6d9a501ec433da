//! A consumer or its stream is created again, or its deliveries are counted from one again.
//! Meanwhile a replica holds leases of the consumer and does not fetch. The old tokens settle
//! nothing that another replica has now.

use fetch_proxy::pb;
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait},
    proxy::{Client, ack, fetch, nak, reason, take, term},
};
use tonic::Code;

use super::pair::Pair;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    ConsumerMade,
    StreamMade,
    ConsumerReset,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum By {
    Ack,
    Nak,
    Term,
}

/// How much the next holder's replica knows of the consumer before the change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Knows {
    Nothing,
    /// It was asked before anything was delivered.
    ThatItIsThere,
    /// It has had deliveries of it.
    Deliveries,
}

impl Change {
    async fn make(self, fixture: &Fixture) {
        let (jetstream, stream, consumer) =
            (&fixture.jetstream, &fixture.stream, &fixture.consumer);
        match self {
            Self::ConsumerMade => {
                jetstream.delete_consumer_from_stream(consumer, stream).await.unwrap();
                jetstream.create_consumer_on_stream(ack_wait(30_000), stream).await.unwrap();
            }
            Self::StreamMade => {
                let config =
                    jetstream.get_stream(stream).await.unwrap().cached_info().config.clone();
                jetstream.delete_stream(stream).await.unwrap();
                jetstream.create_stream(config).await.unwrap();
                jetstream.create_consumer_on_stream(ack_wait(30_000), stream).await.unwrap();
                fixture.publish_many(6).await;
            }
            Self::ConsumerReset => {
                let subject = format!("$JS.API.CONSUMER.RESET.{stream}.{consumer}");
                let answer =
                    jetstream.client().request(subject, r#"{"seq":1}"#.into()).await.unwrap();
                let answer = std::str::from_utf8(&answer.payload).unwrap();
                assert!(!answer.contains("error"), "{answer}");
            }
        }
    }
}

async fn settle(client: &mut Client, by: By, token: &str) -> Result<pb::Outcome, tonic::Status> {
    match by {
        By::Ack => client.ack(ack(token)).await.map(|answer| answer.into_inner().outcome()),
        By::Nak => client.nak(nak(token, 0)).await.map(|answer| answer.into_inner().outcome()),
        By::Term => {
            client.term(term(token, "old")).await.map(|answer| answer.into_inner().outcome())
        }
    }
}

/// Takes so many messages of a consumer that has them.
async fn old_tokens_settle_nothing(change: Change, by: By, knows: Knows) {
    let what = format!("{change:?}, {by:?}, {knows:?}");
    let fixture = Fixture::new(ack_wait(30_000)).await;
    let Pair { owner: _owner, other: _other, mut at_owner, mut at_other, keys: _keys } =
        Pair::start().await;
    if knows == Knows::ThatItIsThere {
        let nothing = at_other.fetch(fetch(&fixture, 1, 0)).await.unwrap().into_inner();
        assert!(nothing.messages.is_empty());
    }
    fixture.publish_many(6).await;
    let old = take(&at_owner, fetch(&fixture, 3, 10_000)).await;
    if knows == Knows::Deliveries {
        take(&at_other, fetch(&fixture, 1, 10_000)).await;
    }

    change.make(&fixture).await;
    let new = take(&at_other, fetch(&fixture, 3, 10_000)).await;
    let pending = fixture.info().await.num_ack_pending;
    for message in &old {
        // Until it is known what the consumer is, the owner may ask for patience.
        let told = eventually("the end of a lease", || {
            let (mut client, token) = (at_owner.clone(), message.token.clone());
            async move {
                let told = settle(&mut client, by, &token).await;
                told.map_or_else(
                    |status| (status.code() != Code::Unavailable).then_some(Err(status)),
                    |outcome| Some(Ok(outcome)),
                )
            }
        })
        .await;
        let status = told.expect_err(&format!("{what}: an old token settles"));
        assert_eq!(reason(&status), (Code::FailedPrecondition, "LEASE_EXPIRED".into()), "{what}");
    }
    assert_eq!(fixture.info().await.num_ack_pending, pending, "{what}: something was settled");
    for message in &new {
        let outcome = settle(&mut at_other, By::Ack, &message.token).await.unwrap();
        assert_eq!(outcome, pb::Outcome::Confirmed, "{what}");
    }
    let _ = &mut at_owner;
}

async fn after(change: Change) {
    for by in [By::Ack, By::Nak, By::Term] {
        for knows in [Knows::Nothing, Knows::ThatItIsThere, Knows::Deliveries] {
            old_tokens_settle_nothing(change, by, knows).await;
        }
    }
}

#[tokio::test]
async fn old_tokens_settle_nothing_of_a_recreated_consumer() {
    after(Change::ConsumerMade).await;
}

#[tokio::test]
async fn old_tokens_settle_nothing_of_a_recreated_stream() {
    after(Change::StreamMade).await;
}

#[tokio::test]
async fn old_tokens_settle_nothing_of_a_reset_consumer() {
    after(Change::ConsumerReset).await;
}

/// Two replicas that begin to fetch from a new consumer at once take no lease from each other.
#[tokio::test]
async fn first_use_of_a_consumer_loses_no_lease() {
    let fixture = Fixture::new(ack_wait(30_000)).await;
    let Pair { owner, other, at_owner, at_other, keys: _keys } = Pair::start().await;
    let (one, two, ()) = tokio::join!(
        take(&at_owner, fetch(&fixture, 50, 10_000)),
        take(&at_other, fetch(&fixture, 50, 10_000)),
        fixture.publish_many(100)
    );
    for (mut client, messages) in [(at_owner, one), (at_other, two)] {
        for message in messages {
            let outcome = settle(&mut client, By::Ack, &message.token).await.unwrap();
            assert_eq!(outcome, pb::Outcome::Confirmed);
        }
    }
    for proxy in [owner, other] {
        assert!(!proxy.log().contains("counted from 1 again"), "{}", proxy.log());
    }
}
