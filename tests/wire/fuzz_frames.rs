//! Every field of every frame of a Consume, in any order. The stream ends with OK or with a status of our table, in
//! time, and the service continues.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use fetch_proxy::pb::{
    self, ConsumeCredit, ConsumeKeep, ConsumeRequest, ConsumeSettle, ConsumeStart,
    consume_start::Holding,
};
use proptest::{collection::vec, option, prelude::*, test_runner::TestRunner};
use testkit::{
    BOUND,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, fetch},
    scrape::Scrape,
};
use tokio::sync::mpsc;
use tonic::Status;

use crate::fuzz::{
    action, choice, duration, each_has_one_meaning, is_of_the_contract, name, token,
};

fn credit() -> impl Strategy<Value = ConsumeCredit> {
    let leases = option::of(prop_oneof![0..4_u32, Just(10_000), any::<u32>()]);
    let bytes = option::of(prop_oneof![0..3_u64, Just(5_000), any::<u64>()]);
    (any::<u64>(), leases, bytes).prop_map(|(id, max_leases, max_bytes)| ConsumeCredit {
        id,
        max_leases,
        max_bytes,
    })
}

fn start(stream: &str, consumer: &str) -> impl Strategy<Value = ConsumeStart> + use<> {
    let keep = (duration(), duration());
    let holding = prop_oneof![
        2 => Just(None),
        1 => duration().prop_map(|lease| lease.map(Holding::Lease)),
        1 => keep.prop_map(|(grace, at_most)| Some(Holding::Keep(ConsumeKeep { grace, at_most }))),
    ];
    // A wrong value here ends the stream, and hides all that follows.
    let seldom_wrong = (
        prop_oneof![8 => Just(0), 1 => any::<u32>()],
        prop_oneof![8 => Just(None), 1 => duration()],
        prop_oneof![8 => Just(0), 1 => choice()],
    );
    let fields = (name(stream), name(consumer), option::of(credit()), holding);
    (fields, seldom_wrong, ".{0,80}").prop_map(
        |((stream, consumer, credit, holding), (max_frame_bytes, heartbeat, codec), worker)| {
            ConsumeStart {
                stream,
                consumer,
                credit,
                holding,
                codec,
                max_frame_bytes,
                heartbeat,
                worker,
            }
        },
    )
}

fn settle(known: &str) -> impl Strategy<Value = ConsumeSettle> + use<> {
    let number = prop_oneof![4 => 1..12_u64, 1 => any::<u64>()];
    let by_number = (number, action()).prop_map(|(number, action)| pb::Settlement {
        number,
        action,
        ..Default::default()
    });
    let either = (0..3_u64, token(known), action());
    let either =
        either.prop_map(|(number, token, action)| pb::Settlement { number, token, action });
    let settlements = vec(prop_oneof![3 => by_number, 1 => either], 0..6);
    (any::<u64>(), settlements, choice())
        .prop_map(|(id, settlements, confirmation)| ConsumeSettle { id, settlements, confirmation })
}

/// Most begin as they should: with a start, and with no other one.
fn frames(
    stream: &str,
    consumer: &str,
    known: &str,
) -> impl Strategy<Value = Vec<ConsumeRequest>> + use<> {
    let (start, settle) = (start(stream, consumer).boxed(), settle(known).boxed());
    let first = option::weighted(0.95, start.clone());
    let later = option::weighted(0.03, start);
    let rest = (later, option::weighted(0.3, credit()), option::of(settle.clone()));
    let frame = |(start, credit, settle)| ConsumeRequest { start, credit, settle };
    let first = (first, Just(None), option::of(settle)).prop_map(frame);
    (first, vec(rest.prop_map(frame), 0..8)).prop_map(|(first, rest)| {
        let mut frames = vec![first];
        frames.extend(rest);
        frames
    })
}

/// Sends the first frame and reads for a moment, so that there are leases. Then sends the others without waiting, ends
/// its side, and reads to the end. Returns how many messages came.
async fn consume(mut client: Client, frames: Vec<ConsumeRequest>) -> Result<usize, Status> {
    let settled = frames.iter().filter(|frame| frame.settle.is_some()).count();
    let (send, mut receive) = mpsc::unbounded_channel();
    let requests = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
    let mut frames = frames.into_iter();
    frames.next().into_iter().for_each(|first| send.send(first).unwrap());
    let mut answers = client.consume(requests).await?.into_inner();
    let mut send = Some(send);
    let (mut results, mut messages) = (0, 0);
    loop {
        let frame = match tokio::time::timeout(Duration::from_millis(5), answers.message()).await {
            Ok(frame) => frame?,
            Err(_) => {
                let rest = send.take();
                rest.iter().for_each(|send| frames.by_ref().for_each(|it| drop(send.send(it))));
                continue;
            }
        };
        let Some(frame) = frame else { break };
        messages += frame.messages.len();
        for result in frame.results {
            results += 1;
            each_has_one_meaning(&result.results);
        }
    }
    assert_eq!(results, settled, "one result for each frame of settlements");
    Ok(messages)
}

#[test]
fn every_stream_of_frames_has_an_end_of_the_contract() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (proxy, mut client, fixture, token) = runtime.block_on(async {
        let fixture = Fixture::new(config()).await;
        fixture.publish_many(2000).await;
        let proxy = Proxy::start(NatsServer::shared(), &[]);
        let mut client = proxy.client().await;
        let answer = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
        let token = answer.messages[0].token.clone();
        (proxy, client, fixture, token)
    });
    let mut runner = TestRunner::new(ProptestConfig::with_cases(400));
    let received = AtomicUsize::new(0);
    runner
        .run(&frames(&fixture.stream, &fixture.consumer, &token), |frames| {
            let consumed = consume(client.clone(), frames);
            let ended = runtime.block_on(async { tokio::time::timeout(BOUND, consumed).await });
            match ended.map_err(|_| TestCaseError::fail("it hangs"))? {
                Ok(messages) => {
                    received.fetch_add(messages, Ordering::Relaxed);
                    Ok(())
                }
                Err(status) => is_of_the_contract(&status),
            }
        })
        .unwrap();
    assert!(received.into_inner() > 100, "some streams have leases");
    let last = runtime.block_on(client.fetch(fetch(&fixture, 1, 0)));
    assert!(last.is_ok(), "{last:?}");
    let books = Scrape::of(&proxy.ops).books();
    assert!(books.is_ok(), "{books:?}");
}
