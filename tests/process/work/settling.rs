//! The message as its command has it, and the settlement by the end of the command.

use std::{collections::BTreeSet, fs, os::unix::fs::PermissionsExt as _, process::Command};

use async_nats::{HeaderMap, jetstream::consumer::pull};
use futures_util::StreamExt as _;
use testkit::{
    BOUND,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::Proxy,
};
use tokio::time::timeout;

use super::{Worker, outcomes, stage};

const DRAINED: [&str; 1] = ["--until-empty"];

#[tokio::test]
async fn each_exit_code_settles_its_message() {
    let (fixture, proxy) = stage().await;
    let advisory = format!(
        "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.{}.{}",
        fixture.stream, fixture.consumer
    );
    let client = async_nats::connect(NatsServer::shared().url()).await.unwrap();
    let mut terminated = client.subscribe(advisory).await.unwrap();
    client.flush().await.unwrap();
    for script in [
        "exit 0",
        "exit 75",
        "echo first >&2; echo no such customer >&2; exit 65",
        "exit 1",
        "kill -9 $$",
        "echo 1h; exit 75",
        "exit 127",
    ] {
        fixture.publish("task", script).await;
    }
    let flags = ["--max", "7", "-j", "3", "--retry-delay", "1h", "--max-retry-delay", "1h"];
    let flags = [&flags[..], &["--delay-from-output"]].concat();
    let mut worker = Worker::start(&proxy, &fixture, &flags, "eval \"$(cat)\"");
    let said = worker.ended().await;
    assert_eq!(
        outcomes(&said),
        [
            (1, "acked"),
            (2, "nacked"),
            (3, "terminated"),
            (4, "nacked"),
            (5, "nacked"),
            (6, "nacked"),
            (7, "nacked")
        ]
    );
    let why = |sequence: u64| {
        let line = said.iter().find(|line| line["sequence"] == sequence).unwrap();
        line["why"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(why(1), "");
    assert!(why(2).starts_with("exit code 75; again in "), "{}", why(2));
    assert_eq!(why(3), "no such customer");
    assert!(why(4).starts_with("exit code 1; again in "), "{}", why(4));
    assert!(why(5).starts_with("ended by signal 9; again in "), "{}", why(5));
    assert_eq!(why(6), "exit code 75; again in 1h");
    let info = fixture.info().await;
    assert_eq!((info.num_ack_pending, info.delivered.consumer_sequence), (5, 7));
    let told = timeout(BOUND, terminated.next()).await.expect("no advisory").unwrap();
    let told: serde_json::Value = serde_json::from_slice(&told.payload).unwrap();
    assert_eq!((&told["stream_seq"], &told["reason"]), (&3.into(), &"no such customer".into()));
}

#[tokio::test]
async fn command_has_its_message_on_its_input_and_in_its_environment() {
    let (fixture, proxy) = stage().await;
    let mut headers = HeaderMap::new();
    headers.append("Trace-Id", "one");
    headers.append("Trace-Id", "two");
    let payload = b"a\0b\0\xff\n\0".to_vec();
    fixture.publish_with("new", headers, payload.clone()).await;
    fixture.publish("empty", "").await;
    let script = "cat > $FETCH_PROXY_SEQUENCE; env > env-$FETCH_PROXY_SEQUENCE";
    let mut worker = Worker::start(&proxy, &fixture, &DRAINED, script);
    assert_eq!(outcomes(&worker.ended().await), [(1, "acked"), (2, "acked")]);
    assert_eq!(fs::read(worker.path("1")).unwrap(), payload);
    assert_eq!(fs::read(worker.path("2")).unwrap(), b"");
    let variables = worker.read("env-1");
    let lines: BTreeSet<&str> = variables.lines().collect();
    let Fixture { stream, consumer, .. } = &fixture;
    for (name, value) in [
        ("STREAM", &**stream),
        ("CONSUMER", consumer),
        ("SUBJECT", &format!("{stream}.new")),
        ("SEQUENCE", "1"),
        ("ATTEMPT", "1"),
        ("MAX_ATTEMPTS", "0"),
        ("HEADER_TRACE_ID", "one"),
        ("HEADERS", r#"{"Trace-Id":["one","two"]}"#),
    ] {
        let line = format!("FETCH_PROXY_{name}={value}");
        assert!(lines.contains(&*line), "{line} is not in:\n{variables}");
    }
    assert!(!variables.contains("FETCH_PROXY_HEADER_OUTER"), "{variables}");
    assert!(worker.read("env-2").lines().any(|line| line == "FETCH_PROXY_HEADERS={}"));
}

#[tokio::test]
async fn ten_jobs_run_at_once_and_never_more() {
    let (fixture, proxy) = stage().await;
    fixture.publish_many(20).await;
    // A job ends when all ten of its round have begun. So one at a time would never end.
    let script = "echo begin >> log; round=$(( (FETCH_PROXY_SEQUENCE + 9) / 10 * 10 ))
        while test $(grep -c begin log) -lt $round; do sleep 0.02; done; echo end >> log";
    let flags = [&DRAINED[..], &["-j", "10"]].concat();
    let mut worker = Worker::start(&proxy, &fixture, &flags, script);
    let said = worker.ended().await;
    assert_eq!(outcomes(&said), (1..=20).map(|sequence| (sequence, "acked")).collect::<Vec<_>>());
    let (mut running, mut most) = (0_usize, 0);
    for line in worker.read("log").lines() {
        running = if line == "begin" { running + 1 } else { running - 1 };
        most = most.max(running);
    }
    assert_eq!((running, most), (0, 10));

    fixture.publish_many(3).await;
    let script = "echo begin >> log; sleep 0.1; echo end >> log";
    let mut worker = Worker::start(&proxy, &fixture, &DRAINED, script);
    worker.ended().await;
    assert_eq!(worker.read("log"), "begin\nend\n".repeat(3), "one at a time by default");
}

#[tokio::test]
async fn command_that_does_not_read_a_large_payload_is_no_failure() {
    let (fixture, proxy) = stage().await;
    for _ in 0..3 {
        fixture.publish("large", vec![b'x'; 900_000]).await;
    }
    let mut worker = Worker::start(&proxy, &fixture, &DRAINED, "exec < /dev/null; echo done");
    assert_eq!(outcomes(&worker.ended().await), [(1, "acked"), (2, "acked"), (3, "acked")]);
    fixture.publish("large", vec![b'x'; 900_000]).await;
    let mut worker = Worker::start(&proxy, &fixture, &DRAINED, "wc -c");
    let said = worker.ended().await;
    assert_eq!(said[0]["stdout"].as_str().unwrap().trim(), "900000");
}

#[tokio::test]
async fn output_is_capped_and_its_end_is_kept() {
    let (fixture, proxy) = stage().await;
    fixture.publish_many(1).await;
    let script = "head -c 3000000 /dev/zero | tr '\\0' x; echo; echo end
        head -c 3000000 /dev/zero | tr '\\0' y >&2; echo no such customer >&2; exit 65";
    let flags = [&DRAINED[..], &["--output-bytes", "1024"]].concat();
    let mut worker = Worker::start(&proxy, &fixture, &flags, script);
    let said = worker.ended().await;
    let line = &said[0];
    assert_eq!(outcomes(&said), [(1, "terminated")]);
    assert!(line["stdout"].as_str().unwrap().ends_with("x\nend"), "{line}");
    assert_eq!(line["stdout"].as_str().unwrap().len(), 1023);
    assert_eq!(line["stdout_left_out_bytes"], 3_000_005 - 1024);
    // The end of the last line, because it is longer than all that is kept.
    assert!(line["why"].as_str().unwrap().ends_with("yno such customer"), "{line}");
}

#[tokio::test]
async fn process_that_a_command_leaves_behind_does_not_hold_its_message() {
    let (fixture, proxy) = stage().await;
    fixture.publish_many(1).await;
    let script = "sleep 300 & echo $! > left; echo said";
    let mut worker = Worker::start(&proxy, &fixture, &DRAINED, script);
    let said = worker.ended().await;
    assert_eq!((outcomes(&said), &said[0]["stdout"]), (vec![(1, "acked")], &"said".into()));
    let left = worker.read("left");
    assert!(Command::new("kill").arg(left.trim()).status().unwrap().success(), "it still runs");
}

#[tokio::test]
async fn command_that_cannot_run_costs_no_attempt() {
    let (fixture, proxy) = stage().await;
    fixture.publish_many(3).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("not-a-program");
    fs::write(&file, "#!/bin/sh\n").unwrap();
    for (command, why) in [
        ("no-such-program-at-all", "there is no such program on the PATH"),
        ("/no/such/program", "there is no such file"),
        (file.to_str().unwrap(), "it is not a program that may be run"),
    ] {
        let mut worker = Worker::start_command(&proxy, &fixture, &DRAINED, &[command]);
        assert_eq!(worker.wait().await.code(), Some(2), "{command}");
        assert!(worker.read("err").contains(why), "{}", worker.read("err"));
    }
    assert_eq!(fixture.info().await.delivered.consumer_sequence, 0);
}

#[tokio::test]
async fn command_that_is_gone_later_ends_the_worker_and_costs_one_attempt() {
    let (fixture, proxy) = stage().await;
    fixture.publish_many(5).await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("once");
    fs::write(&file, "#!/bin/sh\nrm \"$0\"\n").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    let mut worker = Worker::start_command(&proxy, &fixture, &[], &[file.to_str().unwrap()]);
    assert_eq!(worker.wait().await.code(), Some(1));
    assert!(worker.read("err").contains("error: the command cannot be started: No such file"));
    assert_eq!(outcomes(&worker.said()), [(1, "acked"), (2, "given-back")]);
    assert_eq!(fixture.info().await.delivered.consumer_sequence, 2);
}

#[tokio::test]
async fn last_attempt_is_named() {
    let fixture = Fixture::new(pull::Config { max_deliver: 2, ..config() }).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    fixture.publish_many(1).await;
    let flags = ["--max", "2", "--retry-delay", "0s"];
    let mut worker = Worker::start(&proxy, &fixture, &flags, "exit 1");
    let said = worker.ended().await;
    let why = |place: usize| said[place]["why"].as_str().unwrap();
    assert!(why(0).starts_with("exit code 1; again in "), "{}", why(0));
    assert_eq!(why(1), "exit code 1; it was the last attempt");
}
