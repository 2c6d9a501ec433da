//! The steps of a drain after a SIGTERM, and a second SIGTERM.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::{self, Confirmation, settlement::Action};
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch, reason, waiting},
    relay::{Flow, Relay},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, Request};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

/// Well within these, each test shows that something else than the deadline ended the drain.
const PATIENT: [&str; 2] = ["--drain-timeout", "300s"];

async fn draining(proxy: &Proxy) {
    proxy.signal("TERM");
    eventually("the drain", || async { proxy.log().contains("draining").then_some(()) }).await;
}

/// Whether this process was started with SIGHUP switched off.
fn ignores_hang_up() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // The lowest bit is signal 1.
    mask.is_some_and(|mask| u64::from_str_radix(mask.trim(), 16).unwrap() & 1 == 1)
}

#[tokio::test]
async fn idle_proxy_ends_with_code_0() {
    for signal in ["TERM", "INT", "HUP"] {
        if signal == "HUP" && ignores_hang_up() {
            println!(
                "SIGHUP is not tried: this test runs under nohup, and the proxy inherits that"
            );
            continue;
        }
        let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
        proxy.signal(signal);
        assert!(proxy.wait().await.success(), "{}", proxy.log());
        assert!(proxy.log().contains("drained"));
    }
}

#[tokio::test]
async fn step_1_health_says_not_serving_and_calls_are_served() {
    let fixture = Fixture::new(config()).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-delay", "10s"]);
    fixture.publish_many(2).await;
    let mut early = proxy.client().await;
    let answer = early.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    early.ack(ack(&answer.messages[0].token)).await.unwrap();
    proxy.signal("TERM");
    eventually("NOT_SERVING", || async {
        let (status, serving) =
            fetch_proxy::client::probe(&proxy.ops, "", Duration::from_secs(1)).await.ok()?;
        (!serving && status == "NOT_SERVING").then_some(())
    })
    .await;
    // A client that has not heard of the drain connects again, and fetches.
    let mut late = proxy.client().await;
    let answer = late.fetch(fetch(&fixture, 1, 1000)).await.unwrap().into_inner();
    assert_eq!(answer.messages.len(), 1);
    late.ack(ack(&answer.messages[0].token)).await.unwrap();
    drop((early, late));
    assert!(proxy.wait().await.success(), "{}", proxy.log());
}

#[tokio::test]
async fn step_2_fetches_return_and_settling_continues() {
    // The open pull lasts for 5 s at most. On a busy machine the late message can miss it.
    for _ in 0..5 {
        if open_fetch_brings_a_late_message().await {
            return;
        }
    }
    panic!("no open Fetch brought the late message");
}

/// Whether the pull of an open Fetch, which a drain leaves open, brought a message.
async fn open_fetch_brings_a_late_message() -> bool {
    let fixture = Fixture::new(config()).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let mut client = proxy.client().await;
    fixture.publish("n", "x").await;
    let held = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    let open = waiting(&client, &fixture, fetch(&fixture, 1, 120_000)).await;
    draining(&proxy).await;
    let began = Instant::now();
    let refused = eventually("a refusal", || {
        let (mut client, now) = (client.clone(), fetch(&fixture, 1, 0));
        async move { client.fetch(now).await.err() }
    })
    .await;
    assert_eq!(reason(&refused), (Code::Unavailable, "DRAINING".to_owned()));
    client.ack(ack(&held.messages[0].token)).await.unwrap();
    fixture.publish("n", "late").await;
    let last = open.await.unwrap().unwrap().into_inner();
    println!("measured: open Fetch answered {:?} after the drain began", began.elapsed());
    match last.messages.first() {
        Some(message) => drop(client.ack(ack(&message.token)).await.unwrap()),
        None => assert_eq!(last.empty_reason(), pb::EmptyReason::Draining),
    }
    drop(client);
    assert!(proxy.wait().await.success(), "{}", proxy.log());
    assert_eq!(fixture.info().await.num_ack_pending, 0);
    !last.messages.is_empty()
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
    assert!(!proxy.log().contains("drain timeout"), "{}", proxy.log());
}

#[tokio::test]
async fn step_4_connections_are_closed_when_no_lease_is_left() {
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let mut socket = TcpStream::connect(&proxy.grpc).await.unwrap();
    socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    socket.write_all(&frame(SETTINGS, 0, &[])).await.unwrap();
    let (mut told, mut asked) = (Vec::new(), false);
    while let Some((kind, flags, payload)) = next_frame(&mut socket).await {
        match kind {
            SETTINGS | PING if flags & ANSWER == 0 => {
                let payload = if kind == PING { &payload[..] } else { &[] };
                socket.write_all(&frame(kind, ANSWER, payload)).await.unwrap();
                // It serves us, and is not to begin to after the signal.
                if !std::mem::replace(&mut asked, true) {
                    proxy.signal("TERM");
                }
            }
            GOAWAY => told.push(payload),
            _ => {}
        }
    }
    // First that no stream is lost yet, then that there will be no more; both without an error.
    let number = |bytes: &[u8]| u32::from_be_bytes(bytes.try_into().unwrap());
    let told: Vec<_> = told.iter().map(|it| (number(&it[..4]), number(&it[4..8]))).collect();
    assert_eq!(told, [(u32::MAX >> 1, 0), (0, 0)]);
    assert!(proxy.wait().await.success(), "{}", proxy.log());
}

/// HTTP/2 as it is on the wire: a library does not tell how a connection was closed.
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const ANSWER: u8 = 1;

fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
    let length = u8::try_from(payload.len()).unwrap();
    [&[0, 0, length, kind, flags, 0, 0, 0, 0], payload].concat()
}

/// The next frame's kind, flags and payload; `None` at the end.
async fn next_frame(socket: &mut TcpStream) -> Option<(u8, u8, Vec<u8>)> {
    let mut head = [0; 9];
    timeout(BOUND, socket.read_exact(&mut head)).await.expect("it stays open").ok()?;
    let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
    socket.read_exact(&mut payload).await.ok()?;
    Some((head[3], head[4], payload))
}

#[tokio::test]
async fn step_5_settlements_that_were_only_sent_are_flushed() {
    drain_with_a_full_wire(true).await;
}

#[tokio::test]
async fn step_5_settlements_that_nats_does_not_take_are_logged() {
    drain_with_a_full_wire(false).await;
}

async fn drain_with_a_full_wire(passes: bool) {
    // The proxy gives a wire up that stands still for 9 s, and ends a flush after 2 s. A busy machine can need longer, and
    // such an attempt shows nothing.
    for _ in 0..5 {
        if wire_lasts_through_a_drain(passes).await {
            return;
        }
    }
    panic!("this machine was too slow five times");
}

/// Sends more than fits into the wire, which stands still until nothing is left to do but to flush: what the kernel has
/// not taken by then goes nowhere without it. Then the wire goes on if it `passes`. `false`: the machine was too slow.
async fn wire_lasts_through_a_drain(passes: bool) -> bool {
    const MESSAGES: usize = 10_000;
    let many = pull::Config { max_ack_pending: -1, ..config() };
    let fixture = Fixture::new(many).await;
    let wire = Relay::narrow_to(&NatsServer::shared().url());
    let mut proxy = Proxy::start_at(&wire.nats_url(), &["--drain-timeout", "1s"]);
    let mut client = proxy.client().await;
    fixture.publish_many(MESSAGES).await;
    let mut held = Vec::new();
    while held.len() < MESSAGES {
        let answer = client.fetch(fetch(&fixture, 1000, 5000)).await.unwrap();
        held.extend(answer.into_inner().messages);
    }
    wire.flow(Flow::Stall, Flow::Pass);
    let (mut sent, mut unknown) = (0, 0);
    for some in held.chunks(100) {
        let term = |message: &pb::Delivery| pb::Settlement {
            number: 0,
            token: message.token.clone(),
            action: Some(Action::Term(pb::TermAction { reason: "x".repeat(1000) })),
        };
        let settlements = some.iter().map(term).collect();
        let confirmation = Confirmation::Sent.into();
        let mut request = Request::new(pb::SettleRequest { settlements, confirmation });
        request.set_timeout(Duration::from_secs(2));
        let Ok(answer) = client.settle(request).await else {
            // On a busy machine its answer can be late: any part of it may have been sent.
            unknown = some.len();
            break;
        };
        let answer = answer.into_inner();
        sent += answer.results.len() - answer.failed as usize;
        if answer.failed > 0 {
            break;
        }
    }
    assert!(sent < MESSAGES, "the wire takes everything");
    drop(client);
    draining(&proxy).await;
    // After the leases come the farewell to other replicas and the flush, which waits for two seconds.
    eventually("the end of the wait for leases", || async {
        proxy.log().contains("leases were still held").then_some(())
    })
    .await;
    if passes {
        wire.flow(Flow::Pass, Flow::Pass);
    }
    assert!(proxy.wait().await.success(), "{}", proxy.log());
    let is_given_up = proxy.log().contains("settlements do not arrive at NATS");
    let is_told = proxy.log().contains("settlements were not written to NATS");
    if is_given_up {
        return false;
    }
    assert!(passes || is_told, "{}", proxy.log());
    if is_told {
        return !passes;
    }
    eventually("all that was sent", || async {
        let left = MESSAGES - sent;
        (left - unknown..=left).contains(&fixture.info().await.num_ack_pending).then_some(())
    })
    .await;
    true
}

#[tokio::test]
async fn open_health_watch_does_not_delay_the_end() {
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
async fn silent_connection_does_not_delay_the_end() {
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let _silent = std::net::TcpStream::connect(&proxy.grpc).unwrap();
    let _silent = std::net::TcpStream::connect(&proxy.ops).unwrap();
    proxy.signal("TERM");
    ended_soon(&mut proxy, "idle socket").await;
}

#[tokio::test]
async fn stopped_peer_does_not_delay_the_end() {
    let mut proxy = Proxy::start(NatsServer::shared(), &PATIENT);
    let socket = TcpStream::connect(&proxy.grpc).await.unwrap();
    let (_send, mut connection) = h2::client::handshake(socket).await.unwrap();
    // Settings are exchanged, and then nobody drives it any more: GOAWAY's ping is not answered.
    let _ = timeout(Duration::from_millis(300), &mut connection).await;
    proxy.signal("TERM");
    ended_soon(&mut proxy, "silent peer").await;
}

async fn ended_soon(proxy: &mut Proxy, holding: &str) {
    let began = Instant::now();
    assert!(proxy.wait().await.success(), "{}", proxy.log());
    println!("measured: drain with {holding}: {:?}", began.elapsed());
    assert!(
        !proxy.log().contains("drain timeout") && !proxy.log().contains("cut off"),
        "{}",
        proxy.log()
    );
}

#[tokio::test]
async fn endless_calls_are_cut_off_by_the_drain_timeout() {
    let fixture = Fixture::new(config()).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-timeout", "1s"]);
    let mut client = proxy.client().await;
    // The pull is out for longer than the timeout.
    let open = waiting(&client, &fixture, fetch(&fixture, 1, 120_000)).await;
    proxy.signal("TERM");
    assert!(proxy.wait().await.success(), "{}", proxy.log());
    assert!(proxy.log().contains("Fetch calls were still open"), "{}", proxy.log());
    open.await.unwrap().unwrap_err();
    client.fetch(fetch(&fixture, 1, 0)).await.unwrap_err();
}

/// One case of the bound in docs/how-to/upgrade.md, by which the grace period of a pod is chosen. A busy machine makes
/// both drains longer.
#[tokio::test]
async fn drain_ends_ten_seconds_after_its_timeout_while_nats_hangs() {
    let server = NatsServer::start();
    let usual = drained_with_a_call(&server, false).await;
    let took = drained_with_a_call(&server, true).await;
    println!("measured: drain with a timeout of 2 s while NATS hangs: {took:?}, usually {usual:?}");
    assert!(took < usual + Duration::from_secs(10), "{took:?}, usually {usual:?}");
}

/// The time that a drain takes with a call that waits for longer than the drain timeout.
async fn drained_with_a_call(server: &NatsServer, nats_hangs: bool) -> Duration {
    let fixture = Fixture::on(server, config()).await;
    let mut proxy = Proxy::start(server, &["--drain-timeout", "2s"]);
    let mut client = proxy.client().await;
    fixture.publish_many(2).await;
    let held = client.fetch(fetch(&fixture, 2, 5000)).await.unwrap().into_inner().messages;
    let open = waiting(&client, &fixture, fetch(&fixture, 1, 120_000)).await;
    if nats_hangs {
        server.signal("STOP");
    }
    let settling = tokio::spawn(async move { client.ack(ack(&held[0].token)).await });
    let began = Instant::now();
    proxy.signal("TERM");
    let ended = proxy.wait().await;
    let took = began.elapsed();
    // A server that is stopped would not hear that it is to end.
    server.signal("CONT");
    assert!(ended.success(), "{}", proxy.log());
    // It is cut off, or the drain's last second is enough to tell it.
    if let Ok(answer) = open.await.unwrap() {
        assert_eq!(answer.into_inner().empty_reason(), pb::EmptyReason::Draining);
    }
    let settled = settling.await.unwrap();
    assert!(!(nats_hangs && settled.is_ok()), "{settled:?}");
    took
}

/// The leases take all of the drain's time; then there is nothing left that could be cut off.
#[tokio::test]
async fn drain_that_waits_for_leases_logs_no_calls() {
    for connected in [false, true, false, true] {
        let fixture = Fixture::new(config()).await;
        let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-timeout", "1s"]);
        let mut client = proxy.client().await;
        fixture.publish_many(1).await;
        let held = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
        assert_eq!(held.messages.len(), 1);
        let client = Some(client).filter(|_| connected);
        proxy.signal("TERM");
        assert!(proxy.wait().await.success(), "{}", proxy.log());
        assert!(proxy.log().contains("leases were still held"), "{}", proxy.log());
        assert!(!proxy.log().contains("cut off"), "{}", proxy.log());
        drop(client);
    }
}

#[tokio::test]
async fn second_signal_ends_at_once() {
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-delay", "60s"]);
    draining(&proxy).await;
    // Within a second of the first it is one with it.
    eventually("the end", || async {
        proxy.signal("TERM");
        tokio::time::sleep(Duration::from_millis(200)).await;
        proxy.log().contains("second signal").then_some(())
    })
    .await;
    // Within the bound of `wait`, far below the delay.
    proxy.wait().await;
}

/// Health is served until the end. A client that watches health on the ops port delays the end by a
/// second.
#[tokio::test]
async fn second_signal_ends_the_last_steps_at_once() {
    // A busy machine may sleep through that second.
    for _ in 0..5 {
        let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-delay", "2s"]);
        proxy.ready().await;
        let channel = tonic::transport::Endpoint::from_shared(format!("http://{}", proxy.ops));
        let mut health = HealthClient::new(channel.unwrap().connect().await.unwrap());
        let _watch = health.watch(HealthCheckRequest::default()).await.unwrap();
        proxy.signal("TERM");
        // The ops port is closed in the last step.
        eventually("the last step", || async {
            TcpStream::connect(&proxy.ops).await.is_err().then_some(())
        })
        .await;
        proxy.signal("TERM");
        proxy.wait().await;
        if proxy.log().contains("second signal") {
            return;
        }
    }
    panic!("the second signal was never heard");
}

/// As supervisors do that signal a process, and then its group.
#[tokio::test]
async fn simultaneous_signals_count_as_one() {
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-delay", "2s"]);
    proxy.ready().await;
    let pid = proxy.pid();
    let both =
        format!("kill -s TERM {pid}; kill -s INT {pid}; kill -s HUP {pid}; kill -s TERM {pid}");
    assert!(Command::new("sh").args(["-c", &both]).status().unwrap().success());
    assert!(proxy.wait().await.success(), "{}", proxy.log());
    assert!(proxy.log().contains("\"drained\""), "{}", proxy.log());
    assert!(!proxy.log().contains("second signal"), "{}", proxy.log());
}

/// `nohup` means that the end of a terminal is not the end of the process.
#[tokio::test]
async fn ignored_hangup_signal_stays_ignored() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let said = || std::fs::read_to_string(log.path()).unwrap();
    let mut child = Command::new("sh")
        .args(["-c", "trap '' HUP; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_fetch-proxy"), "serve"])
        .args(["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--drain-delay", "0s"])
        .args(["--nats-url", &NatsServer::shared().url(), "--cluster", "nohup"])
        .stderr(log.reopen().unwrap())
        .spawn()
        .unwrap();
    eventually("readiness", || async { said().contains("\"ready\"").then_some(()) }).await;
    let signal = |name: &str| {
        let sent = Command::new("kill").args(["-s", name, &child.id().to_string()]).status();
        assert!(sent.unwrap().success());
    };
    signal("HUP");
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert!(!said().contains("draining"), "{}", said());
    signal("TERM");
    assert!(child.wait().unwrap().success(), "{}", said());
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
async fn worker_loses_nothing_through_a_drain() {
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
