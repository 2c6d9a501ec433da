//! The log is no part of the service: a log that nobody reads, or that cannot be written, holds nothing
//! up and ends nothing. A line that is lost is counted.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::Path,
    process::Command,
    time::Duration,
};

use async_nats::jetstream::consumer::pull;
use serde_json::Value;
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch},
    scrape::Scrape,
};
use tokio::{net::unix::pipe, time::timeout};

use crate::dev::Dev;

/// A pipe whose writer has to wait.
async fn full_pipe() -> (io::PipeReader, OwnedFd) {
    let (reader, writer) = io::pipe().unwrap();
    let sender = pipe::Sender::from_owned_fd_unchecked(nonblocking(writer.into())).unwrap();
    sender.writable().await.unwrap();
    let mut written = 0;
    while let Ok(more) = sender.try_write(&[b'\n'; 512]) {
        written += more;
    }
    assert!(written > 0);
    (reader, sender.into_blocking_fd().unwrap())
}

/// The same end, which answers "would block" in place of waiting, in each process that shares it.
fn nonblocking(end: OwnedFd) -> OwnedFd {
    pipe::Sender::from_file(File::from(end)).unwrap().into_nonblocking_fd().unwrap()
}

/// Fetches and acks at debug level, so that each call is worth a line.
async fn works(proxy: &Proxy, fixture: &Fixture, calls: usize) {
    let mut client = proxy.client().await;
    for number in 0..calls {
        fixture.publish("n", number.to_string()).await;
        let call = async {
            let answer = client.fetch(fetch(fixture, 1, 10_000)).await.unwrap().into_inner();
            client.ack(ack(&answer.messages[0].token)).await.unwrap();
        };
        timeout(BOUND, call).await.unwrap_or_else(|_| panic!("call {number} hangs"));
    }
    let alive = fetch_proxy::client::probe(&proxy.ops, "liveness", BOUND).await.unwrap();
    assert!(alive.1, "{alive:?}");
}

async fn ends_well(proxy: &mut Proxy) {
    proxy.signal("TERM");
    let status = proxy.wait().await;
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn unread_log_delays_no_call_no_probe_and_no_end() {
    let fixture = Fixture::new(config()).await;
    let (mut reader, log) = full_pipe().await;
    let nats = NatsServer::shared().url();
    let mut proxy = Proxy::start_logging_to(log.into(), &nats, &["--log-level", "debug"]);
    works(&proxy, &fixture, 20).await;
    ends_well(&mut proxy).await;
    // Lines that it had no time to write are lost.
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
}

#[tokio::test]
async fn slow_reader_of_the_log_receives_all_lines() {
    let (mut reader, log) = full_pipe().await;
    let mut proxy = Proxy::start_logging_to(log.into(), &NatsServer::shared().url(), &[]);
    proxy.client().await;
    let read = std::thread::spawn(move || {
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        said
    });
    ends_well(&mut proxy).await;
    let said = read.join().unwrap();
    for line in ["\"listening\"", "\"draining\"", "\"drained\""] {
        assert!(said.contains(line), "{line} is not in {said}");
    }
}

/// Some supervisors share a pipe that does not block.
#[tokio::test]
async fn full_pipe_without_blocking_is_waited_for() {
    let (mut reader, log) = full_pipe().await;
    let log = nonblocking(log);
    let mut proxy = Proxy::start_logging_to(log.into(), &NatsServer::shared().url(), &[]);
    proxy.client().await;
    let read = std::thread::spawn(move || {
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        said
    });
    ends_well(&mut proxy).await;
    assert!(read.join().unwrap().contains("\"drained\""));
}

#[tokio::test]
async fn full_disk_ends_nothing() {
    if !Path::new("/dev/full").exists() {
        return;
    }
    let fixture = Fixture::new(config()).await;
    let full = File::options().write(true).open("/dev/full").unwrap();
    let nats = NatsServer::shared().url();
    let mut proxy = Proxy::start_logging_to(full.into(), &nats, &["--log-level", "debug"]);
    works(&proxy, &fixture, 3).await;
    ends_well(&mut proxy).await;
}

/// The log collector goes, and comes back.
#[tokio::test]
async fn dropped_log_lines_are_counted_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let fifo = folder.path().join("log");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    // Read and write at once never waits for the other side.
    let both = File::options().read(true).write(true).open(&fifo).unwrap();
    let reader = File::open(&fifo).unwrap();
    let writer = File::options().write(true).open(&fifo).unwrap();
    drop(both);
    let fixture = Fixture::new(config()).await;
    let nats = NatsServer::shared().url();
    let mut proxy = Proxy::start_logging_to(writer.into(), &nats, &["--log-level", "debug"]);
    works(&proxy, &fixture, 1).await;

    let lost = || Scrape::of(&proxy.ops).value("fetchproxy_log_lines_dropped_total");
    assert_eq!(lost(), 0.0);
    drop(reader);
    works(&proxy, &fixture, 3).await;
    assert!(lost() >= 3.0, "{}", lost());
    // Does not wait for the proxy, which has its end open.
    let mut reader = File::open(&fifo).unwrap();
    let read = std::thread::spawn(move || {
        let mut said = String::new();
        reader.read_to_string(&mut said).unwrap();
        said
    });
    works(&proxy, &fixture, 1).await;
    ends_well(&mut proxy).await;
    let said = read.join().unwrap();
    let lines: Vec<Value> = said.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let lost = lines.iter().find(|line| line["message"] == "lines of the log were lost");
    let lost = lost.unwrap_or_else(|| panic!("{said}"));
    assert!(lost["lines"].as_u64().unwrap() >= 3, "{lost}");
    assert_eq!(lines.last().unwrap()["message"], "drained");
}

#[tokio::test]
async fn final_error_is_not_delayed_by_its_reader() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let (reader, log) = full_pipe().await;
    let mut child = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
        .args(["serve", "--listen", &address, "--ops-listen", "127.0.0.1:0"])
        .stderr(log)
        .spawn()
        .unwrap();
    let (ended, end) = std::sync::mpsc::channel();
    let pid = child.id().to_string();
    let waiting = std::thread::spawn(move || {
        let _ = ended.send(child.wait().unwrap());
    });
    let status = end.recv_timeout(BOUND);
    if status.is_err() {
        Command::new("kill").args(["-9", &pid]).status().unwrap();
    }
    waiting.join().unwrap();
    drop(reader);
    assert_eq!(status.expect("it hangs").code(), Some(1));
}

/// Nobody has to read the hints.
#[tokio::test]
async fn dev_serves_and_ends_without_a_reader() {
    let (reader, full) = full_pipe().await;
    let mut dev = Dev::start_printing_to(full.into(), &[]);
    dev.client().await;
    dev.signal("INT");
    eventually("the end", || std::future::ready(dev.ended().then_some(()))).await;
    drop(reader);
}

#[test]
fn command_without_a_reader_does_not_panic() {
    for arguments in [&["keygen"][..], &["--help"], &["--version"], &["serve", "--help"]] {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let output = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
            .args(arguments)
            .stdout(writer)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!said.contains("panicked"), "{arguments:?}: {said}");
        let code = output.status.code();
        assert!(matches!(code, Some(0 | 1)), "{arguments:?}: {}", output.status);
    }
}

/// The lines with this message, once there is one.
async fn lines(proxy: &Proxy, message: &str) -> Vec<Value> {
    eventually(message, || async {
        let log = proxy.log();
        let lines = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let lines: Vec<Value> = lines.filter(|line| line["message"] == message).collect();
        (!lines.is_empty()).then_some(lines)
    })
    .await
}

#[tokio::test]
async fn start_line_names_the_replica_and_no_secret() {
    let url = NatsServer::shared().url().replace("//", "//somebody:hunter2@");
    let proxy = Proxy::start_at(&url, &["--max-leases", "123", "--replica-name", "pod-7"]);
    let first = &lines(&proxy, "starting").await[0];
    assert_eq!(first["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!((&first["name"], &first["max_leases"]), (&"pod-7".into(), &123.into()));
    assert_eq!(first["process"], proxy.pid());
    assert_eq!(first["id"].as_str().unwrap().len(), 16);
    assert_eq!(first["nats"], NatsServer::shared().url());
    let log = proxy.log();
    assert!(log.lines().next().unwrap().contains("no --token-key-file"), "{log}");
    assert!(!log.contains("hunter2") && !log.contains("somebody"), "{log}");
    let proxy = Proxy::start_with(
        &NatsServer::shared().url(),
        &[],
        &[("NATS_USER", "somebody"), ("NATS_PASSWORD", "hunter2")],
    );
    assert_eq!(lines(&proxy, "starting").await[0]["nats_user"], "User(***)");
    assert!(!proxy.log().contains("hunter2"), "{}", proxy.log());
}

#[tokio::test]
async fn worker_whose_leases_end_unsettled_is_named() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let mut client = proxy.client().await;
    let second = prost_types::Duration { seconds: 1, nanos: 0 };
    // A lease without a length ends with the ack wait of its consumer.
    for lease in [Some(second), None] {
        let ack_wait = Duration::from_secs(if lease.is_some() { 30 } else { 3 });
        let fixture = Fixture::new(pull::Config { ack_wait, ..config() }).await;
        fixture.publish("one", "x").await;
        fixture.publish("two", "x").await;
        let mut request = fetch(&fixture, 2, 10_000);
        (request.worker, request.lease) = (format!("billing-7{}", "-".repeat(100)), lease);
        let messages = client.fetch(request).await.unwrap().into_inner().messages;
        client.ack(ack(&messages[0].token)).await.unwrap();
        let line = eventually("the line about its worker", async || {
            let mut lines = lines(&proxy, "leases ended unsettled").await.into_iter();
            lines.find(|line| line["stream"].as_str() == Some(&*fixture.stream))
        })
        .await;
        let worker = line["worker"].as_str().unwrap();
        assert!(worker.starts_with("billing-7-") && worker.len() == 64, "{line}");
        assert_eq!(line["count"], messages.len() - 1, "{line}");
    }
}

#[tokio::test]
async fn first_refusal_of_each_reason_and_consumer_is_logged() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--request-log", "off"]);
    proxy.ready().await;
    let mut client = proxy.client().await;
    for _ in 0..3 {
        for consumer in ["nobody", "another"] {
            let mut request = fetch(&fixture, 1, 100);
            (request.consumer, request.worker) = (consumer.into(), "billing-7".into());
            client.fetch(request).await.unwrap_err();
        }
        client.ack(ack("nonsense")).await.unwrap_err();
    }
    fixture.publish("n", "x").await;
    let held = client.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner().messages;
    client.ack(ack(&held[0].token)).await.unwrap();
    client.term(testkit::proxy::term(&held[0].token, "")).await.unwrap_err();
    let refused = eventually("all lines", || async {
        let refused = lines(&proxy, "a call was refused").await;
        (refused.len() >= 4).then_some(refused)
    })
    .await;
    let name = |consumer: &str| Value::from(format!("{}/{consumer}", fixture.stream));
    let told =
        |line: &Value| (line["call"].clone(), line["reason"].clone(), line["consumer"].clone());
    let told: Vec<_> = refused.iter().map(told).collect();
    let not_found: Value = "CONSUMER_NOT_FOUND".into();
    let expected = [
        ("Fetch".into(), not_found.clone(), name("nobody")),
        ("Fetch".into(), not_found, name("another")),
        ("Ack".into(), "TOKEN_INVALID".into(), Value::Null),
        ("Term".into(), "LEASE_SETTLED".into(), name(&fixture.consumer)),
    ];
    assert_eq!(told, expected, "{refused:#?}");
    assert_eq!(refused[0]["worker"], "billing-7");
}

/// A client that asks for forbidden streams cannot fill the log.
#[tokio::test]
async fn refused_subjects_are_logged_and_not_each_time() {
    let rights = "publish: { allow: [\">\"], deny: [\"$JS.ACK.>\"] }";
    let user = format!("{{ user: a, password: a, permissions: {{ {rights} }} }}");
    let config = format!("authorization {{ users: [ {{ user: b, password: b }}, {user} ] }}");
    let server = NatsServer::start_with(testkit::nats_server::binary(), Some(config));
    let as_user = |user: &str| server.url().replace("//", &format!("//{user}:{user}@"));
    let fixture = Fixture::at(&as_user("b"), self::config()).await;
    fixture.publish_many(30).await;
    let proxy = Proxy::start_at(&as_user("a"), &[]);
    proxy.ready().await;
    let mut client = proxy.client().await;
    let held = client.fetch(fetch(&fixture, 30, 10_000)).await.unwrap().into_inner().messages;
    for message in &held {
        client.ack(ack(&message.token)).await.unwrap_err();
    }
    let refused = lines(&proxy, "NATS refuses this subject to the proxy's user").await;
    assert_eq!(refused.len(), 1, "{refused:#?}");
    assert!(refused[0]["subject"].as_str().unwrap().starts_with("$JS.ACK."), "{refused:#?}");
    let denied = "fetchproxy_nats_permission_denied_total{kind=\"publish\"}";
    assert_eq!(Scrape::of(&proxy.ops).value(denied), 30.0, "each one is counted");
}
