//! The Python worker of the README, run as it stands on the page.

use std::{path::Path, process::Stdio, time::Duration};

use async_nats::jetstream::{self, stream};
use testkit::{eventually, jetstream::config, nats_server::NatsServer, proxy::Proxy};
use tokio::{
    io::{AsyncBufReadExt as _, BufReader},
    process::Command,
    time::timeout,
};

use testkit::examples::language::Language;

const PAGE: &str = include_str!("../../README.md");
const PYTHON_PAGE: &str = include_str!("../../examples/python/README.md");
/// The address that the page names, in place of the test's own.
const ADDRESS: &str = "127.0.0.1:50051";
const MESSAGES: usize = 3;
/// For Python to start, and to handle all messages.
const WITHIN: Duration = Duration::from_secs(30);

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
    let folder = tempfile::tempdir().map_err(|error| error.to_string())?;
    generate(&python, folder.path()).await?;
    let program = format!(
        "def handle(text):\n    print(text, flush=True)\n\n{}",
        worker.replace(ADDRESS, &proxy.grpc)
    );
    let mut running = Command::new(python.folder.join(".build/venv/bin/python"))
        .args(["-c", &program])
        .env("PYTHONPATH", folder.path())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut lines = BufReader::new(running.stdout.take().ok_or("no output")?).lines();
    for number in 0..MESSAGES {
        let line = timeout(WITHIN, lines.next_line()).await;
        let line = line.map_err(|_| format!("the worker handled {number} of {MESSAGES}"))?;
        let line = line.map_err(|error| error.to_string())?;
        if line != Some(number.to_string()) {
            return Err(format!("the worker said {line:?} of message {number}"));
        }
    }
    eventually("the last ack", || async {
        let info = consumer.get_info().await.ok()?;
        (info.num_ack_pending == 0 && info.num_pending == 0).then_some(())
    })
    .await;
    Ok(())
}

/// Generates the client's code by the command of the Python page, for the names that the README imports.
async fn generate(python: &Language, into: &Path) -> Result<(), String> {
    let command =
        PYTHON_PAGE.split('`').find(|code| code.starts_with("python -m grpc_tools.protoc "));
    let command =
        command.ok_or("examples/python/README.md does not say how to generate the client")?;
    // The page writes into the folder of the worker.
    let here = |word: &str| word.replace("out=.", &format!("out={}", into.display()));
    let output = Command::new(python.folder.join(".build/venv/bin/python"))
        .args(command.split_whitespace().skip(1).map(here))
        .current_dir(&python.folder)
        .output()
        .await
        .map_err(|error| error.to_string())?;
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
    }
}
