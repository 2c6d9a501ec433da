//! What a SIGTERM does, step by step, and a second one.

use std::time::{Duration, Instant};

use fetch_proxy::pb::{self, Confirmation};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::support::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch, reason},
};

/// Well within these, each test shows that something else than the deadline ended the drain.
const PATIENT: [&str; 2] = ["--drain-timeout", "300s"];

async fn draining(proxy: &Proxy) {
    proxy.signal("TERM");
    eventually("the drain", || async { proxy.log().contains("draining").then_some(()) }).await;
}

#[tokio::test]
async fn an_idle_proxy_ends_with_code_0() {
    for signal in ["TERM", "INT"] {
        let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
        proxy.signal(signal);
        assert!(proxy.wait().await.success(), "{}", proxy.log());
        assert!(proxy.log().contains("drained"));
    }
}

#[tokio::test]
async fn step_1_health_says_not_serving_and_everything_is_served_for_the_delay() {
    let fixture = Fixture::new(config()).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-delay", "3s"]);
    fixture.publish_many(2).await;
    let mut early = proxy.client().await;
    let answer = early.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    early.ack(ack(&answer.messages[0].token)).await.unwrap();
    proxy.signal("TERM");
    eventually("NOT_SERVING", || async {
        let (status, serving) =
            fetch_proxy::grpc::probe(&proxy.ops, "", Duration::from_secs(1)).await.ok()?;
        (!serving && status == "NOT_SERVING").then_some(())
    })
    .await;
    // Whoever has not heard of it yet connects anew, and fetches.
    let mut late = proxy.client().await;
    let answer = late.fetch(fetch(&fixture, 1, 1000)).await.unwrap().into_inner();
    assert_eq!(answer.messages.len(), 1);
    late.ack(ack(&answer.messages[0].token)).await.unwrap();
    drop((early, late));
    assert!(proxy.wait().await.success(), "{}", proxy.log());
}

#[tokio::test]
async fn step_2_open_fetches_return_new_ones_are_refused_and_settling_goes_on() {
    let fixture = Fixture::new(config()).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let mut client = proxy.client().await;
    fixture.publish("n", "x").await;
    let held = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    let open = tokio::spawn({
        let (mut client, long) = (client.clone(), fetch(&fixture, 1, 120_000));
        async move { client.fetch(long).await }
    });
    eventually("the pull", || async { (fixture.info().await.num_waiting > 0).then_some(()) }).await;
    draining(&proxy).await;
    let began = Instant::now();
    let refused = eventually("a refusal", || {
        let (mut client, now) = (client.clone(), fetch(&fixture, 1, 0));
        async move { client.fetch(now).await.err() }
    })
    .await;
    assert_eq!(reason(&refused), (Code::Unavailable, "DRAINING".to_owned()));
    // The pull is out for 5 s at most; what it still brings is handed over.
    client.ack(ack(&held.messages[0].token)).await.unwrap();
    fixture.publish("n", "late").await;
    let last = open.await.unwrap().unwrap().into_inner();
    assert_eq!(last.messages.len(), 1, "{last:?}");
    println!("measured: open Fetch answered {:?} after the drain began", began.elapsed());
    client.ack(ack(&last.messages[0].token)).await.unwrap();
    drop(client);
    assert!(proxy.wait().await.success(), "{}", proxy.log());
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn step_3_leases_are_waited_for() {
    let fixture = Fixture::new(config()).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let mut client = proxy.client().await;
    fixture.publish("n", "x").await;
    let held = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    draining(&proxy).await;
    // A worker at work; its own connection stays, and so does the proxy.
    tokio::time::sleep(Duration::from_secs(1)).await;
    client.ack(ack(&held.messages[0].token)).await.unwrap();
    assert!(proxy.wait().await.success(), "{}", proxy.log());
    assert!(!proxy.log().contains("timeout"), "{}", proxy.log());
}

#[tokio::test]
async fn step_4_connections_are_told_to_go_when_nothing_is_held() {
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let socket = tokio::net::TcpStream::connect(&proxy.grpc).await.unwrap();
    let (send, connection) = h2::client::handshake(socket).await.unwrap();
    let connection = tokio::spawn(connection);
    // Answered once, so it is not in the listener's backlog any more.
    let mut send = send.ready().await.unwrap();
    let request = http::Request::get(format!("http://{}/x", proxy.grpc)).body(()).unwrap();
    send.send_request(request, true).unwrap().0.await.unwrap();
    proxy.signal("TERM");
    // Closed politely: a connection that is cut off would end in an error.
    connection.await.unwrap().unwrap();
    assert!(proxy.wait().await.success(), "{}", proxy.log());
}

#[tokio::test]
async fn step_5_what_was_only_sent_to_nats_is_flushed() {
    let fixture = Fixture::new(config()).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let mut client = proxy.client().await;
    fixture.publish_many(200).await;
    let mut left = 200;
    while left > 0 {
        let answer = client.fetch(fetch(&fixture, 200, 5000)).await.unwrap().into_inner();
        left -= answer.messages.len();
        for message in &answer.messages {
            let sent = Confirmation::Sent.into();
            let ack = pb::AckRequest { token: message.token.clone(), confirmation: sent };
            client.ack(ack).await.unwrap();
        }
    }
    drop(client);
    proxy.signal("TERM");
    assert!(proxy.wait().await.success(), "{}", proxy.log());
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn an_open_health_watch_does_not_hold_up_the_end() {
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", proxy.grpc));
    let mut health = HealthClient::new(channel.unwrap().connect().await.unwrap());
    let mut watch = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    // It may have been opened before NATS was there.
    while watch.message().await.unwrap().unwrap().status != 1 {}
    proxy.signal("TERM");
    // It hears of the drain before it is cut off.
    assert_eq!(watch.message().await.unwrap().unwrap().status, 2, "NOT_SERVING");
    ended_soon(&mut proxy, "open watch").await;
}

#[tokio::test]
async fn a_connection_that_has_said_nothing_does_not_hold_up_the_end() {
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let _silent = std::net::TcpStream::connect(&proxy.grpc).unwrap();
    let _silent = std::net::TcpStream::connect(&proxy.ops).unwrap();
    proxy.signal("TERM");
    ended_soon(&mut proxy, "idle socket").await;
}

#[tokio::test]
async fn a_peer_that_has_fallen_silent_does_not_hold_up_the_end() {
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let socket = tokio::net::TcpStream::connect(&proxy.grpc).await.unwrap();
    let (_send, mut connection) = h2::client::handshake(socket).await.unwrap();
    // Settings are exchanged, and then nobody drives it any more: GOAWAY's ping is not answered.
    let _ = tokio::time::timeout(Duration::from_millis(300), &mut connection).await;
    proxy.signal("TERM");
    ended_soon(&mut proxy, "silent peer").await;
}

async fn ended_soon(proxy: &mut Proxy, holding: &str) {
    let began = Instant::now();
    assert!(proxy.wait().await.success(), "{}", proxy.log());
    println!("measured: drain with {holding}: {:?}", began.elapsed());
    assert!(
        !proxy.log().contains("timeout") && !proxy.log().contains("cut off"),
        "{}",
        proxy.log()
    );
}

#[tokio::test]
async fn calls_that_do_not_end_are_cut_off_by_the_drain_timeout() {
    let fixture = Fixture::new(config()).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-timeout", "1s"]);
    let mut client = proxy.client().await;
    // The pull is out for longer than the timeout.
    let open = tokio::spawn({
        let (mut client, long) = (client.clone(), fetch(&fixture, 1, 120_000));
        async move { client.fetch(long).await }
    });
    eventually("the pull", || async { (fixture.info().await.num_waiting > 0).then_some(()) }).await;
    proxy.signal("TERM");
    assert!(proxy.wait().await.success(), "{}", proxy.log());
    assert!(proxy.log().contains("Fetch calls were still open"), "{}", proxy.log());
    open.await.unwrap().unwrap_err();
    client.fetch(fetch(&fixture, 1, 0)).await.unwrap_err();
}

/// One case of the bound in docs/operations.md, by which the grace period of a pod is chosen.
#[tokio::test]
async fn while_nats_hangs_a_drain_ends_within_ten_seconds_after_its_timeout() {
    let server = NatsServer::start();
    let fixture = Fixture::on(&server, config()).await;
    let mut proxy = Proxy::start(&server, &["--drain-timeout", "2s"]);
    let mut client = proxy.client().await;
    fixture.publish_many(2).await;
    let held = client.fetch(fetch(&fixture, 2, 5000)).await.unwrap().into_inner().messages;
    let open = tokio::spawn({
        let (mut client, long) = (client.clone(), fetch(&fixture, 1, 120_000));
        async move { client.fetch(long).await }
    });
    eventually("the pull", || async { (fixture.info().await.num_waiting > 0).then_some(()) }).await;
    server.signal("STOP");
    let settling = tokio::spawn(async move { client.ack(ack(&held[0].token)).await });
    let began = Instant::now();
    proxy.signal("TERM");
    let ended = proxy.wait().await;
    let took = began.elapsed();
    // One that is stopped would not hear that it is to end.
    server.signal("CONT");
    println!("measured: drain with a timeout of 2 s while NATS hangs: {took:?}");
    assert!(ended.success() && took < Duration::from_secs(2 + 10), "{took:?}: {}", proxy.log());
    open.await.unwrap().unwrap_err();
    settling.await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-delay", "60s"]);
    draining(&proxy).await;
    proxy.signal("TERM");
    // Within the bound of `wait`, far below the delay.
    proxy.wait().await;
    assert!(proxy.log().contains("second signal"));
}

/// Fetches and acks until told how many there are; goes to the other replica when one refuses.
async fn work(replicas: Vec<Client>, fixture: &Fixture, count: usize) -> Vec<u64> {
    let mut seen = Vec::new();
    let (mut at, began) = (0, Instant::now());
    while seen.len() < count {
        assert!(
            began.elapsed() < 3 * BOUND,
            "{} of {count} after {:?}",
            seen.len(),
            began.elapsed()
        );
        let mut client = replicas[at % replicas.len()].clone();
        let Ok(answer) = client.fetch(fetch(fixture, 10, 1000)).await else {
            at += 1;
            continue;
        };
        for message in answer.into_inner().messages {
            if client.ack(ack(&message.token)).await.is_ok() {
                seen.push(message.stream_sequence);
            }
        }
    }
    seen
}

#[tokio::test]
async fn a_worker_that_runs_through_a_drain_loses_nothing() {
    let fixture = Fixture::new(config()).await;
    let mut leaving = Proxy::start(NatsServer::shared(), &PATIENT);
    let staying = Proxy::start(NatsServer::shared(), &[]);
    let replicas = vec![leaving.client().await, staying.client().await];
    let publishing = async {
        for number in 0..300 {
            if number == 100 {
                leaving.signal("TERM");
            }
            fixture.publish("n", number.to_string()).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let (mut seen, ()) = tokio::join!(work(replicas, &fixture, 300), publishing);
    assert!(leaving.wait().await.success(), "{}", leaving.log());
    seen.sort_unstable();
    assert_eq!(seen, (1..=300).collect::<Vec<u64>>(), "lost, or twice");
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}
