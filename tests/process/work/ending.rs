//! How a worker ends, and how it ends its commands.

use std::{fs, time::Duration};

use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait},
    nats_server::NatsServer,
    proxy::{Proxy, take_one},
};

use super::{Worker, outcomes, stage};

/// An ack wait that no test outlives: a message that comes back was given back.
const LONG: u64 = 600_000;
/// A command that ends by SIGKILL alone, with a child that does the same.
const STUBBORN: &str =
    "trap '' TERM; (trap '' TERM; echo child >> log; while :; do sleep 1; done) &
    echo $$ > group; echo begin >> log; while :; do sleep 1; done";

async fn patient_stage() -> (Fixture, Proxy) {
    (Fixture::new(ack_wait(LONG)).await, Proxy::start(NatsServer::shared(), &[]))
}

/// Waits until no process of the group of the command is left.
async fn group_is_gone(worker: &Worker) {
    let group: u32 = worker.read("group").trim().parse().unwrap();
    eventually("the end of the whole group", || async {
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let stats = processes.filter_map(|one| fs::read_to_string(one.path().join("stat")).ok());
        // After the name in parentheses: the state, the parent, the group.
        let of_group = |stat: &String| {
            let rest = stat.rsplit(") ").next().unwrap();
            let fields: Vec<&str> = rest.split(' ').collect();
            fields[0] != "Z" && fields[2] == group.to_string()
        };
        (!stats.into_iter().any(|stat| of_group(&stat))).then_some(())
    })
    .await;
}

#[tokio::test]
async fn worker_that_must_stop_finishes_its_work_and_takes_nothing_more() {
    let (fixture, proxy) = patient_stage().await;
    fixture.publish_many(5).await;
    let script = "echo begin >> log; while ! test -e go; do sleep 0.02; done; echo end >> log";
    let mut worker = Worker::start(&proxy, &fixture, &["-j", "2"], script);
    worker.lines("log", 2).await;
    worker.signal("TERM");
    eventually("the stop", || async {
        worker.read("err").contains("stopping: 2 at work").then_some(())
    })
    .await;
    worker.write("go");
    assert_eq!(outcomes(&worker.ended().await), [(1, "acked"), (2, "acked")]);
    assert_eq!(worker.read("log"), "begin\nbegin\nend\nend\n");
    let info = fixture.info().await;
    assert_eq!((info.num_pending, info.num_ack_pending), (3, 0));
}

#[tokio::test]
async fn command_that_ignores_sigterm_is_killed_with_its_group_and_its_message_goes_back() {
    let (fixture, proxy) = patient_stage().await;
    fixture.publish_many(1).await;
    let flags = ["--stop-timeout", "0s", "--kill-after", "1s"];
    let mut worker = Worker::start(&proxy, &fixture, &flags, STUBBORN);
    worker.lines("log", 2).await;
    worker.signal("INT");
    assert_eq!(outcomes(&worker.ended().await), [(1, "given-back")]);
    group_is_gone(&worker).await;
    let message = take_one(&proxy.client().await, &fixture).await;
    assert_eq!((message.stream_sequence, message.delivery_count), (1, 2));
}

#[tokio::test]
async fn second_signal_gives_back_at_once() {
    let (fixture, proxy) = patient_stage().await;
    fixture.publish_many(1).await;
    let flags = ["--stop-timeout", "1h", "--kill-after", "1h"];
    let mut worker = Worker::start(&proxy, &fixture, &flags, STUBBORN);
    worker.lines("log", 2).await;
    worker.signal("TERM");
    eventually("the stop", || async { worker.read("err").contains("stopping").then_some(()) })
        .await;
    // Signals within a second of the first count as the first.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    worker.signal("TERM");
    assert_eq!(outcomes(&worker.ended().await), [(1, "given-back")]);
    group_is_gone(&worker).await;
    assert_eq!(take_one(&proxy.client().await, &fixture).await.delivery_count, 2);
}

/// Many programs exit with 0 after a SIGTERM, whatever they have done.
#[tokio::test]
async fn success_after_sigterm_is_not_believed() {
    let (fixture, proxy) = patient_stage().await;
    fixture.publish_many(1).await;
    let script = "trap 'exit 0' TERM; echo begin >> log; while :; do sleep 0.02; done";
    let mut worker = Worker::start(&proxy, &fixture, &["--stop-timeout", "0s"], script);
    worker.lines("log", 1).await;
    worker.signal("TERM");
    assert_eq!(outcomes(&worker.ended().await), [(1, "given-back")]);
    assert_eq!(take_one(&proxy.client().await, &fixture).await.delivery_count, 2);
}

#[tokio::test]
async fn command_is_ended_when_its_lease_is_lost() {
    let (fixture, proxy) = patient_stage().await;
    fixture.publish_many(1).await;
    let script = "echo $$ > group; echo $FETCH_PROXY_ATTEMPT >> log
        test $FETCH_PROXY_ATTEMPT = 2 || sleep 300";
    let mut worker = Worker::start(&proxy, &fixture, &["--lease", "2s"], script);
    worker.lines("log", 1).await;
    group_is_gone(&worker).await;
    let said = worker.settled(2).await;
    assert_eq!(outcomes(&said), [(1, "acked"), (1, "lost")], "{said:?}");
    assert_eq!(worker.read("log"), "1\n2\n");
    worker.signal("TERM");
    worker.ended().await;
}

#[tokio::test]
async fn command_that_takes_too_long_is_ended_and_its_message_comes_again() {
    let (fixture, proxy) = patient_stage().await;
    fixture.publish_many(1).await;
    let script = "echo $$ > group; test $FETCH_PROXY_ATTEMPT = 2 || sleep 300";
    let flags = ["--timeout", "1s", "--retry-delay", "0s", "--max", "2"];
    let mut worker = Worker::start(&proxy, &fixture, &flags, script);
    let said = worker.ended().await;
    assert_eq!(outcomes(&said), [(1, "acked"), (1, "nacked")]);
    assert!(said[0]["why"].as_str().unwrap().starts_with("not done within 1s"), "{said:?}");
    group_is_gone(&worker).await;
}

#[tokio::test]
async fn messages_of_a_killed_worker_are_back_after_the_grace() {
    let (fixture, proxy) = patient_stage().await;
    fixture.publish_many(2).await;
    let script = "echo begin >> log; while test -e log; do sleep 0.05; done";
    let mut worker = Worker::start(&proxy, &fixture, &["-j", "2", "--grace", "3s"], script);
    worker.lines("log", 2).await;
    worker.signal("KILL");
    assert!(!worker.wait().await.success());
    let client = proxy.client().await;
    let mut back = [take_one(&client, &fixture).await, take_one(&client, &fixture).await]
        .map(|message| (message.stream_sequence, message.delivery_count));
    back.sort_unstable();
    assert_eq!(back, [(1, 2), (2, 2)], "long before the ack wait");
}

#[tokio::test]
async fn worker_ends_after_as_many_messages_as_it_was_told() {
    let (fixture, proxy) = patient_stage().await;
    fixture.publish_many(10).await;
    for (jobs, max, left) in [("1", "1", 9), ("4", "5", 4), ("10", "3", 1)] {
        let flags = ["-j", jobs, "--max", max];
        let mut worker = Worker::start(&proxy, &fixture, &flags, "exit 0");
        assert_eq!(worker.ended().await.len().to_string(), max);
        let info = fixture.info().await;
        assert_eq!((info.num_pending, info.num_ack_pending), (left, 0), "-j {jobs} --max {max}");
    }
}

#[tokio::test]
async fn dry_run_takes_nothing() {
    let (fixture, proxy) = stage().await;
    proxy.ready().await;
    fixture.publish_many(2).await;
    let mut worker = Worker::start(&proxy, &fixture, &["--dry-run", "-j", "3"], "exit 0");
    assert!(worker.wait().await.success());
    let text = worker.read("out");
    assert!(text.contains("pending       2\n"), "{text}");
    assert!(text.ends_with("would run sh -c exit 0, at most 3 at a time\n"), "{text}");
    assert_eq!(fixture.info().await.delivered.consumer_sequence, 0);
}

#[tokio::test]
async fn refusal_that_no_wait_cures_ends_the_worker_with_its_reason() {
    let (fixture, proxy) = stage().await;
    let nobody = Fixture { consumer: "nobody".to_owned(), ..fixture };
    let mut worker = Worker::start(&proxy, &nobody, &[], "exit 0");
    assert_eq!(worker.wait().await.code(), Some(1));
    let said = worker.read("err");
    assert!(said.contains("error: CONSUMER_NOT_FOUND: "), "{said}");
    let flags = ["--token-file", "/no/such/file"];
    let mut worker = Worker::start(&proxy, &nobody, &flags, "exit 0");
    assert_eq!(worker.wait().await.code(), Some(1));
    let said = worker.read("err");
    assert!(said.contains("error: CLIENT_FILE: --token-file: cannot read"), "{said}");
}
