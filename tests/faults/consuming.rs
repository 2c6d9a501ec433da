//! A Consume while NATS is away: it fails with a reason, its leases live on, and the next stream goes on.

use fetch_proxy::pb::{self, Outcome};
use testkit::{
    BOUND,
    consume::{ConsumeClient, acked, keep, leases},
    eventually,
    jetstream::{Fixture, ack_wait},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, reason},
    signal,
};
use tokio::{sync::mpsc, time::timeout};
use tonic::{Code, Streaming};

type Frames = Streaming<pb::ConsumeResponse>;
type Frame = pb::ConsumeRequest;

async fn open(client: &Client, fixture: &Fixture) -> (mpsc::UnboundedSender<Frame>, Frames) {
    let (send, mut receive) = mpsc::unbounded_channel();
    let requests = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
    let frames = client.clone().consume(requests).await.unwrap().into_inner();
    let start = pb::ConsumeStart {
        stream: fixture.stream.clone(),
        consumer: fixture.consumer.clone(),
        ..Default::default()
    };
    send.send(Frame { start: Some(start), ..Default::default() }).unwrap();
    (send, frames)
}

async fn message(frames: &mut Frames) -> pb::Delivery {
    loop {
        let frame = timeout(BOUND, frames.message()).await.expect("no message").unwrap();
        if let Some(message) = frame.expect("it has ended").messages.pop() {
            return message;
        }
    }
}

#[tokio::test]
async fn stream_fails_while_nats_is_silent_and_its_lease_outlives_it() {
    let server = NatsServer::start();
    let fixture = Fixture::on(&server, ack_wait(60_000)).await;
    fixture.publish_many(2).await;
    let proxy = Proxy::start(&server, &[]);
    let client = proxy.client().await;
    let (send, mut frames) = open(&client, &fixture).await;
    let held = message(&mut frames).await;
    signal(server.pid(), "STOP");
    let status = loop {
        match timeout(BOUND, frames.message()).await.expect("no status") {
            Ok(frame) => drop(frame.expect("it ended with OK")),
            Err(status) => break status,
        }
    };
    signal(server.pid(), "CONT");
    assert_eq!(reason(&status), (Code::Unavailable, "NATS_UNAVAILABLE".to_owned()));
    drop(send);
    let acked = eventually("the lease to be settled", || async {
        client.clone().ack(ack(&held.token)).await.ok()
    })
    .await;
    let outcome = acked.into_inner().outcome();
    assert!([Outcome::Confirmed, Outcome::Duplicate].contains(&outcome), "{outcome:?}");
    let next = eventually("the next stream", || async {
        let (_send, mut frames) = open(&client, &fixture).await;
        while let Ok(Some(mut frame)) = timeout(BOUND, frames.message()).await.ok()? {
            if let Some(message) = frame.messages.pop() {
                return Some(message);
            }
        }
        None
    })
    .await;
    assert_eq!((next.stream_sequence, next.delivery_count), (2, 1));
}

/// The client would lose what the stream keeps by opening another stream.
#[tokio::test]
async fn stream_and_what_it_keeps_outlive_a_short_silence_of_nats() {
    let server = NatsServer::start();
    let fixture = Fixture::on(&server, ack_wait(60_000)).await;
    fixture.publish_many(2).await;
    let proxy = Proxy::start(&server, &[]);
    let client = proxy.client().await;
    let mut stream = ConsumeClient::open(&client, keep(&fixture, 2, 0, None)).await;
    let held = stream.messages(2).await;
    stream.credit(leases(1, 10));
    stream.until(|stream| stream.credit_id == 1).await;
    signal(server.pid(), "STOP");
    let away = |idle: &pb::ConsumeIdle| idle.reason() == pb::EmptyReason::NatsUnavailable;
    stream.until(|stream| stream.idle.iter().any(away)).await;
    signal(server.pid(), "CONT");
    fixture.publish_many(1).await;
    assert_eq!(stream.messages(1).await[0].number, 3);
    stream.settle(1, held.iter().map(acked).collect());
    assert_eq!(stream.result(1).await.failed, 0);
    assert_eq!((fixture.info().await.num_redelivered, &*stream.ended), (0, &[][..]));
    stream.close().await;
}
