//! Consume: credit, results, numbers, and the ends of a stream.

use std::time::{Duration, Instant};

use fetch_proxy::{
    pb::{
        self, ConsumeCredit, ConsumeRequest, ConsumeStart, Outcome, Settlement, settlement::Action,
    },
    reason::Reason,
};
use futures_util::StreamExt as _;
use testkit::{
    BOUND,
    consume::{ConsumeClient as Stream, acked, by_number, leases, outcomes, seconds, start},
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch, take_one},
    scrape::Scrape,
    stage::served_with,
};
use tokio::{sync::mpsc, time::timeout};
use tonic::{Code, Status};

#[tokio::test]
async fn stream_holds_as_many_leases_as_its_credit_and_each_end_brings_one_more() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(70).await;
    let (_proxy, client) = served_with(&[]).await;
    for credit in [1, 7] {
        let mut stream = Stream::open(&client, start(&fixture, credit)).await;
        let mut held = stream.messages(credit as usize).await;
        stream.listen(500).await;
        assert_eq!(stream.messages.len(), 0, "more than {credit}");
        assert_eq!(stream.opened.as_ref().unwrap().max_leases, credit);
        for id in 1..=10 {
            let done = held.remove(0);
            stream.settle(id, vec![acked(&done)]);
            assert_eq!(outcomes(&stream.result(id).await), [Outcome::Confirmed]);
            held.extend(stream.messages(1).await);
            assert_eq!(held.len(), credit as usize);
        }
        let numbers: Vec<u64> = held.iter().map(|message| message.number).collect();
        assert!(numbers.is_sorted(), "{numbers:?}");
        stream.settle(11, held.iter().map(acked).collect());
        let stream = stream.close().await;
        assert_eq!(stream.results.len(), 1, "what was received is answered");
        for message in &stream.messages {
            client.clone().ack(ack(&message.token)).await.unwrap();
        }
    }
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn credit_is_free_again_however_a_lease_ends() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(6).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = Stream::open(
        &client,
        ConsumeStart {
            holding: Some(pb::consume_start::Holding::Lease(seconds(1))),
            ..start(&fixture, 1)
        },
    )
    .await;
    let first = stream.messages(1).await.remove(0);
    client.clone().ack(ack(&first.token)).await.unwrap();
    let second = stream.messages(1).await.remove(0);
    assert_eq!(second.number, 2, "a call has settled the first");
    let third = stream.messages(1).await.remove(0);
    assert_eq!(third.number, 3, "the second has lapsed");
    stream.settle(1, vec![by_number(3, Action::Nak(pb::NakAction { delay: Some(seconds(60)) }))]);
    assert_eq!(outcomes(&stream.result(1).await), [Outcome::Confirmed]);
    assert_eq!(stream.messages(1).await[0].number, 4, "the third was given back");
    let stream_of = fixture.jetstream.get_stream(&fixture.stream).await.unwrap();
    stream_of.delete_consumer(&fixture.consumer).await.unwrap();
    let status = stream.status().await;
    assert_eq!(reason(&status), Reason::ConsumerNotFound.name());
}

/// The reason of a status.
fn reason(status: &Status) -> String {
    testkit::proxy::reason(status).1
}

#[tokio::test]
async fn each_settle_frame_has_one_result_and_a_bad_one_fails_alone() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(3).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = Stream::open(&client, start(&fixture, 3)).await;
    let held = stream.messages(3).await;
    let too_long = Action::Nak(pb::NakAction { delay: Some(seconds(100_000)) });
    stream.settle(1, vec![acked(&held[0])]);
    stream.settle(2, vec![acked(&held[1]), by_number(held[2].number, too_long)]);
    stream.settle(3, Vec::new());
    assert_eq!(outcomes(&stream.result(1).await), [Outcome::Confirmed]);
    stream.settle(4, vec![acked(&held[0])]);
    for (id, field) in [(2, "settlements[1].nak.delay"), (3, "settlements")] {
        let refused = stream.result(id).await;
        let error = refused.error.unwrap();
        assert_eq!((refused.results.len(), &*error.reason), (0, Reason::InvalidField.name()));
        assert!(error.message.contains(field), "{}", error.message);
    }
    assert_eq!(outcomes(&stream.result(4).await), [Outcome::Duplicate]);
    stream.settle(5, held[1..].iter().map(acked).collect());
    assert_eq!(outcomes(&stream.result(5).await), [Outcome::Confirmed; 2]);
    stream.close().await;
}

#[tokio::test]
async fn number_or_token_names_a_lease_and_an_unknown_number_fails_alone() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(3).await;
    let (_proxy, client) = served_with(&[]).await;
    let foreign = take_one(&client, &fixture).await;
    let mut stream = Stream::open(&client, start(&fixture, 2)).await;
    let held = stream.messages(2).await;
    let action = || Some(Action::Ack(pb::AckAction {}));
    let by_token =
        |token: &str| Settlement { token: token.to_owned(), action: action(), number: 0 };
    stream.settle(
        1,
        vec![
            by_number(99, Action::Ack(pb::AckAction {})),
            acked(&held[0]),
            by_token(&foreign.token),
            by_token(&held[1].token),
            by_number(held[1].number, Action::Term(pb::TermAction::default())),
        ],
    );
    let result = stream.result(1).await;
    assert_eq!(result.failed, 2);
    let confirmed = Outcome::Confirmed;
    assert_eq!(outcomes(&result)[1..4], [confirmed; 3]);
    let reasons = [0, 4].map(|at: usize| result.results[at].error.clone().unwrap().reason);
    assert_eq!(reasons, [Reason::TokenInvalid.name(), Reason::LeaseSettled.name()]);
    let both = Settlement { number: 1, ..by_token(&foreign.token) };
    stream.settle(2, vec![both]);
    assert_eq!(stream.result(2).await.error.unwrap().reason, Reason::InvalidField.name());
    let mut call = client.clone();
    let settle = pb::SettleRequest { settlements: vec![acked(&held[0])], confirmation: 0 };
    let status = call.settle(settle).await.unwrap_err();
    assert_eq!(reason(&status), Reason::InvalidField.name());
    stream.close().await;
}

#[tokio::test]
async fn nothing_comes_after_a_pause_is_in_force_until_credit_returns() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = Stream::open(&client, start(&fixture, 1000)).await;
    for round in 1..=100 {
        let id = 2 * round;
        stream.credit(leases(id, 0));
        fixture.publish_many(1).await;
        stream.until(|stream| stream.credit_id == id).await;
        let before = stream.messages.len();
        stream.listen(5).await;
        assert_eq!(stream.messages.len(), before, "late in round {round}");
        stream.credit(leases(id + 1, 1000));
        stream.until(|stream| stream.messages.len() == usize::try_from(round).unwrap()).await;
    }
    stream.close().await;
}

#[tokio::test]
async fn lower_credit_takes_nothing_away_and_adds_nothing() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(10).await;
    let (_proxy, client) = served_with(&[]).await;
    let mut stream = Stream::open(&client, start(&fixture, 5)).await;
    let held = stream.messages(5).await;
    stream.credit(leases(1, 2));
    stream.until(|stream| stream.credit_id == 1).await;
    stream.settle(1, held[..3].iter().map(acked).collect());
    stream.result(1).await;
    stream.listen(300).await;
    assert_eq!(stream.messages.len(), 0);
    stream.settle(2, vec![acked(&held[3])]);
    stream.result(2).await;
    assert_eq!(stream.messages(1).await.len(), 1);
    stream.close().await;
}

#[tokio::test]
async fn bytes_bound_what_a_stream_holds_and_the_last_message_may_pass_them() {
    let fixture = Fixture::new(config()).await;
    for _ in 0..10 {
        fixture.publish("x", vec![b'x'; 10_000]).await;
    }
    let (_proxy, client) = served_with(&[]).await;
    let credit = ConsumeCredit { max_bytes: Some(25_000), ..leases(0, 100) };
    let start = ConsumeStart { credit: Some(credit), ..start(&fixture, 100) };
    let mut stream = Stream::open(&client, start).await;
    let held = stream.messages(3).await;
    stream.listen(300).await;
    assert_eq!((held.len(), stream.messages.len()), (3, 0));
    stream.settle(1, vec![acked(&held[0])]);
    assert_eq!(stream.messages(1).await.len(), 1);
    stream.close().await;
}

#[tokio::test]
async fn messages_of_a_stream_that_is_dropped_go_to_the_next_caller() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, client) = served_with(&[]).await;
    for _ in 0..20 {
        fixture.publish_many(5).await;
        let stream = Stream::open(&client, start(&fixture, 5)).await;
        drop(stream);
    }
    let mut seen = std::collections::BTreeSet::new();
    let mut stream = Stream::open(&client, start(&fixture, 100)).await;
    // Some went back before their streams had them.
    stream.until(|stream| !stream.messages.is_empty()).await;
    stream.listen(300).await;
    seen.extend(stream.messages.iter().map(|message| message.stream_sequence));
    let unseen = 100 - seen.len();
    let pending = fixture.info().await.num_pending;
    assert_eq!(pending, 0, "everything was delivered to somebody");
    assert!(unseen < 100, "all of them went to streams that had gone");
    stream.close().await;
}

#[tokio::test]
async fn buffer_of_a_stream_takes_nothing_from_a_fetch() {
    let fixture = Fixture::new(config()).await;
    let (proxy, client) = served_with(&[]).await;
    let mut stream = Stream::open(&client, start(&fixture, 1000)).await;
    fixture.publish_many(1).await;
    let held = stream.messages(1).await;
    for _ in 0..30 {
        let (mut fetching, ask) = (client.clone(), fetch(&fixture, 1, 10_000));
        let fetched = tokio::spawn(async move { fetching.fetch(ask).await });
        eventually("the Fetch to wait", || async {
            let waiters = Scrape::of(&proxy.ops).sum("fetchproxy_waiters", &[]);
            (waiters == 2.0).then_some(())
        })
        .await;
        fixture.publish_many(1).await;
        let answer = fetched.await.unwrap().unwrap().into_inner();
        assert_eq!(answer.messages.len(), 1);
    }
    assert_eq!((held.len(), stream.messages.len()), (1, 0));
    stream.close().await;
}

#[tokio::test]
async fn quiet_stream_has_a_sign_of_life_at_each_heartbeat() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, client) = served_with(&[]).await;
    let start = ConsumeStart { heartbeat: Some(seconds(1)), ..start(&fixture, 1) };
    let mut stream = Stream::open(&client, start).await;
    for _ in 0..3 {
        stream.next().await.unwrap().expect("the stream has ended");
    }
    assert_eq!(stream.messages.len(), 0);
    stream.close().await;
}

/// Ten streams cost no more than one.
#[tokio::test]
async fn idle_streams_of_a_consumer_cost_one_pull_in_five_seconds() {
    let server = NatsServer::shared();
    let fixture = Fixture::new(config()).await;
    let (_proxy, client) = served_with(&[]).await;
    let nats = async_nats::connect(server.url()).await.unwrap();
    let api = "$JS.API.CONSUMER.MSG.NEXT";
    let pulls = format!("{api}.{}.{}", fixture.stream, fixture.consumer);
    let mut pulls = nats.subscribe(pulls).await.unwrap();
    nats.flush().await.unwrap();
    let mut streams = Vec::new();
    for _ in 0..10 {
        streams.push(Stream::open(&client, start(&fixture, 10)).await);
    }
    timeout(BOUND, pulls.next()).await.expect("no pull").unwrap();
    let began = Instant::now();
    for count in 1..=2 {
        timeout(BOUND, pulls.next()).await.expect("no pull").unwrap();
        let took = began.elapsed();
        assert!(took >= Duration::from_secs(4) * count, "pull {count} came after {took:?}");
    }
    fixture.publish("a", "one").await;
    futures_util::future::select_all(streams.iter_mut().map(|stream| Box::pin(stream.messages(1))))
        .await;
}

#[tokio::test]
async fn stream_is_refused_as_a_fetch_is() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, client) = served_with(&[]).await;
    let wrong = |start: ConsumeStart| {
        let client = client.clone();
        async move { Stream::open(&client, start).await.status().await }
    };
    let nobody = ConsumeStart { consumer: "nobody".into(), ..start(&fixture, 1) };
    assert_eq!(reason(&wrong(nobody).await), Reason::ConsumerNotFound.name());
    let unnamed = ConsumeStart { stream: String::new(), ..start(&fixture, 1) };
    let status = wrong(unnamed).await;
    assert_eq!(reason(&status), Reason::InvalidField.name());
    assert!(status.message().starts_with("start.stream"), "{}", status.message());
    let small = ConsumeStart { max_frame_bytes: 5, ..start(&fixture, 1) };
    assert!(wrong(small).await.message().starts_with("start.max_frame_bytes"));
    let often = ConsumeStart { heartbeat: Some(seconds(0)), ..start(&fixture, 1) };
    assert!(wrong(often).await.message().starts_with("start.heartbeat"));
    let twice = Stream::open(&client, start(&fixture, 1)).await;
    twice.send(ConsumeRequest { start: Some(start(&fixture, 1)), ..Default::default() });
    let status = twice.status().await;
    assert_eq!(
        (status.code(), reason(&status)),
        (Code::InvalidArgument, Reason::InvalidField.name().to_owned())
    );
    let large = Stream::open(&client, start(&fixture, 1)).await;
    let token = "t".repeat(600_000);
    large.settle(1, vec![Settlement { token, action: None, number: 0 }]);
    assert_eq!(reason(&large.status().await), Reason::RequestTooLarge.name());
}

#[tokio::test]
async fn stream_ends_with_ok_before_its_deadline() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let (_proxy, client) = served_with(&[]).await;
    let (send, mut receive) = mpsc::unbounded_channel();
    let requests = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
    let mut request = tonic::Request::new(requests);
    request.set_timeout(Duration::from_secs(3));
    send.send(ConsumeRequest { start: Some(start(&fixture, 1)), ..Default::default() }).unwrap();
    let mut client = client.clone();
    let mut frames = client.consume(request).await.unwrap().into_inner();
    let (mut draining, mut messages) = (None, 0);
    while let Some(frame) = timeout(BOUND, frames.message()).await.unwrap().unwrap() {
        draining = draining.or(frame.draining);
        messages += frame.messages.len();
    }
    assert_eq!(messages, 1);
    assert_eq!(draining.unwrap().cause(), pb::ConsumeDrainCause::Deadline);
}

#[tokio::test]
async fn draining_replica_ends_a_stream_once_it_holds_nothing() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(2).await;
    let (proxy, client) = served_with(&[]).await;
    let mut stream = Stream::open(&client, start(&fixture, 1)).await;
    let held = stream.messages(1).await;
    proxy.signal("TERM");
    stream.until(|stream| stream.draining.is_some()).await;
    assert_eq!(stream.draining.as_ref().unwrap().cause(), pb::ConsumeDrainCause::Replica);
    stream.settle(1, held.iter().map(acked).collect());
    while stream.next().await.unwrap().is_some() {}
    assert_eq!(outcomes(&stream.results[0]), [Outcome::Confirmed]);
    assert_eq!(stream.messages.len(), 0, "a drain delivers nothing new");
}

#[tokio::test]
async fn old_connection_ends_its_streams() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--max-connection-age", "2s"]);
    let client = proxy.client().await;
    let mut stream = Stream::open(&client, start(&fixture, 1)).await;
    let held = stream.messages(1).await;
    stream.until(|stream| stream.draining.is_some()).await;
    assert_eq!(stream.draining.as_ref().unwrap().cause(), pb::ConsumeDrainCause::ConnectionAge);
    stream.settle(1, held.iter().map(acked).collect());
    while stream.next().await.unwrap().is_some() {}
    assert_eq!(outcomes(&stream.results[0]), [Outcome::Confirmed]);
    let mut next = Stream::open(&client, start(&fixture, 1)).await;
    fixture.publish_many(1).await;
    assert_eq!(next.messages(1).await.len(), 1);
    next.close().await;
}

/// Two holders of one lease are what this program exists to prevent. Frames are cut off at different places.
#[tokio::test]
async fn message_that_a_dropped_client_has_received_goes_to_nobody_else() {
    let fixture = Fixture::new(config()).await;
    let (proxy, client) = served_with(&[]).await;
    let mut received = std::collections::BTreeMap::new();
    for round in 0..12 {
        for _ in 0..12 {
            fixture.publish("x", vec![b'x'; 9_000 + round * 1000]).await;
        }
        let mut stream = Stream::open(&client, start(&fixture, 12)).await;
        stream.until(|stream| stream.messages.len() > round % 5).await;
        let messages = std::mem::take(&mut stream.messages);
        received.extend(messages.into_iter().map(|message| (message.stream_sequence, message)));
    }
    let mut other = Stream::open(&proxy.client().await, start(&fixture, 1000)).await;
    // What the client's library has received, and never showed to the client, is leased until it lapses.
    other.listen(1500).await;
    let twice = other.messages.iter().find(|one| received.contains_key(&one.stream_sequence));
    assert!(twice.is_none(), "{twice:?}");
    assert!(received.len() < 144, "nothing was given back");
    for message in received.values() {
        let settled = client.clone().ack(ack(&message.token)).await.unwrap();
        assert_eq!(settled.into_inner().outcome(), Outcome::Confirmed);
    }
    other.close().await;
}

#[tokio::test]
async fn messages_go_to_others_while_a_client_does_not_read() {
    let fixture = Fixture::new(config()).await;
    for _ in 0..40 {
        fixture.publish("x", vec![b'x'; 64 * 1024]).await;
    }
    let (proxy, client) = served_with(&[]).await;
    let silent = Stream::open(&client, start(&fixture, 40)).await;
    eventually("the first frames", || async {
        (fixture.info().await.num_ack_pending > 0).then_some(())
    })
    .await;
    let mut other = Stream::open(&proxy.client().await, start(&fixture, 40)).await;
    // A window of HTTP/2, and what is in its buffers, is with the silent client.
    let found = other.messages(25).await;
    for message in &found {
        assert!(message.payload.is_some());
    }
    drop(silent);
    other.close().await;
}
