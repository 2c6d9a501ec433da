//! Consume with `max_ack_pending` 1: the order of the stream.

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::{self, settlement::Action};
use testkit::{
    consume::{ConsumeClient, acked, by_number, start},
    dice::Dice,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::Proxy,
};

/// Each message is settled or given back at random, with or without a delay.
#[tokio::test]
async fn one_message_at_a_time_keeps_the_order_of_the_stream() {
    let fixture = Fixture::new(pull::Config { max_ack_pending: 1, ..config() }).await;
    fixture.publish_many(60).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let client = proxy.client().await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        streams.push(ConsumeClient::open(&client, start(&fixture, 4)).await);
    }
    let mut dice = Dice::new(7, 1);
    let (mut first_acks, mut naks, mut id) = (Vec::new(), 0, 0);
    while first_acks.len() < 60 {
        let [a, b, c] = &mut streams[..] else { unreachable!() };
        tokio::select! {
            next = a.next() => drop(next.unwrap()),
            next = b.next() => drop(next.unwrap()),
            next = c.next() => drop(next.unwrap()),
        }
        for stream in &mut streams {
            for message in std::mem::take(&mut stream.messages) {
                id += 1;
                if dice.percent(30) {
                    naks += 1;
                    let delay = prost_types::Duration { seconds: 0, nanos: 50_000_000 };
                    let delay = Some(delay).filter(|_| dice.percent(30));
                    stream.settle(
                        id,
                        vec![by_number(message.number, Action::Nak(pb::NakAction { delay }))],
                    );
                } else {
                    first_acks.push(message.stream_sequence);
                    stream.settle(id, vec![acked(&message)]);
                }
            }
        }
    }
    assert!(first_acks.is_sorted(), "{first_acks:?}");
    assert!(naks > 5, "{naks} given back");
    for stream in streams {
        let stream = stream.close().await;
        assert!(stream.results.iter().all(|result| result.failed == 0), "{:?}", stream.results);
    }
}
