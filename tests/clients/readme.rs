//! The Python worker of the README, run as it stands on the page.

use std::{collections::BTreeSet, process::Stdio, time::Duration};

use async_nats::jetstream::{self, stream};
use testkit::{eventually, jetstream::config, nats_server::NatsServer, proxy::Proxy};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::timeout,
};

use testkit::examples::language::Language;

const PAGE: &str = include_str!("../../README.md");
/// The address that the page names, in place of the test's own.
const ADDRESS: &str = "127.0.0.1:50051";
/// The delay of a Nak on the page, which a test does not wait for.
const DELAY: &str = "delay=30";
const MESSAGES: usize = 3;
/// For Python to start, and to handle all messages.
const WITHIN: Duration = Duration::from_secs(30);
/// The work, which the page leaves to the reader. The first attempt of message 1 fails.
const WORK: &str = "failed = []\n\
                    def work(data):\n    \
                    if data == 1 and not failed:\n        \
                    failed.append(data)\n        \
                    raise ConnectionError\n    \
                    print(f\"{data}\\n\", end=\"\", flush=True)\n\n";

/// Runs the worker until it has acked all messages.
///
/// # Errors The errors, for people.
pub async fn follow(python: Language) -> Result<(), String> {
    let worker = PAGE.split("```python\n").nth(1).and_then(|rest| rest.split("```").next());
    let worker = worker.ok_or("README.md has no block of Python")?;
    let nats = NatsServer::start();
    let client = async_nats::connect(nats.url()).await.map_err(|error| error.to_string())?;
    let jetstream = jetstream::new(client);
    let tasks = stream::Config {
        name: "TASKS".to_owned(),
        subjects: vec!["tasks.>".to_owned()],
        ..stream::Config::default()
    };
    let tasks = jetstream.create_stream(tasks).await.map_err(|error| error.to_string())?;
    let mut consumer = config();
    consumer.durable_name = Some("batch-worker".to_owned());
    let consumer = tasks.create_consumer(consumer).await.map_err(|error| error.to_string())?;
    for number in 0..MESSAGES {
        let stored = jetstream.publish("tasks.one", number.to_string().into()).await;
        stored.map_err(|error| error.to_string())?.await.map_err(|error| error.to_string())?;
    }
    let proxy = Proxy::start(&nats, &[]);
    let worker = worker.replace(ADDRESS, &proxy.grpc).replace(DELAY, "delay=0.1");
    let program = WORK.to_owned() + &worker;
    let mut running = Command::new(python.folder.join(".build/venv/bin/python"))
        .args(["-c", &program])
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut lines = BufReader::new(running.stdout.take().ok_or("no output")?).lines();
    let mut handled = BTreeSet::new();
    while handled.len() < MESSAGES {
        let line = timeout(WITHIN, lines.next_line()).await;
        let line = line.map_err(|_| format!("the worker handled {handled:?}"))?;
        let line = line.map_err(|error| error.to_string())?;
        handled.insert(line.ok_or("the worker has ended")?);
    }
    if handled != (0..MESSAGES).map(|number| number.to_string()).collect() {
        return Err(format!("the worker handled {handled:?}"));
    }
    eventually("the last ack", || async {
        let info = consumer.get_info().await.ok()?;
        (info.num_ack_pending == 0 && info.num_pending == 0).then_some(())
    })
    .await;
    Ok(())
}
