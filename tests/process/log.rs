//! The log is no part of the service: a log that nobody reads, or that cannot be written, holds nothing
//! up and ends nothing. A line that is lost is counted.

use std::{
    fs::File,
    io::{self, Read as _},
    os::fd::OwnedFd,
    path::Path,
    process::Command,
};

use serde_json::Value;
use tokio::{net::unix::pipe, time::timeout};

use crate::{
    dev::Dev,
    support::{
        BOUND, eventually,
        jetstream::{Fixture, config},
        nats_server::NatsServer,
        proxy::{Proxy, ack, fetch},
    },
};

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
    let alive = fetch_proxy::grpc::probe(&proxy.ops, "liveness", BOUND).await.unwrap();
    assert!(alive.1, "{alive:?}");
}

async fn ends_well(proxy: &mut Proxy) {
    proxy.signal("TERM");
    let status = proxy.wait().await;
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn a_log_that_nobody_reads_holds_up_no_call_no_probe_and_no_end() {
    let fixture = Fixture::new(config()).await;
    let (mut reader, log) = full_pipe().await;
    let nats = NatsServer::shared().url();
    let mut proxy = Proxy::start_logging_to(log.into(), &nats, &["--log-level", "debug"]);
    works(&proxy, &fixture, 20).await;
    ends_well(&mut proxy).await;
    // What it had no time to write is lost; nobody could have it.
    let mut said = String::new();
    reader.read_to_string(&mut said).unwrap();
}

#[tokio::test]
async fn what_a_slow_reader_left_in_the_pipe_is_followed_by_all_lines() {
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
async fn a_pipe_that_would_block_is_waited_for() {
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
async fn a_disk_that_is_full_ends_nothing() {
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

/// Whoever collects the log goes, and comes back.
#[tokio::test]
async fn lines_that_nobody_took_are_counted_and_the_count_is_said_afterwards() {
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

    drop(reader);
    works(&proxy, &fixture, 3).await;
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
async fn an_error_at_the_end_is_not_held_up_by_its_reader() {
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
async fn dev_serves_and_ends_when_nobody_reads_what_it_prints() {
    let (reader, full) = full_pipe().await;
    let mut dev = Dev::start_printing_to(full.into(), &[]);
    dev.client().await;
    dev.signal("INT");
    eventually("the end", || std::future::ready(dev.ended().then_some(()))).await;
    drop(reader);
}

#[test]
fn a_command_whose_reader_has_gone_says_so_and_does_not_panic() {
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
