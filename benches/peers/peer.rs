//! The program of a language: started once, and told what to do line by line.

use std::{path::Path, process::Stdio, time::Duration};

use testkit::measure::{Half, Processes, Run, half};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::Mutex,
    time::timeout,
};

use crate::Servers;

/// Longer than a run takes on a busy machine.
const LONGEST_RUN: Duration = Duration::from_secs(300);

pub struct Peer {
    child: Child,
    pipes: Mutex<(ChildStdin, Lines<BufReader<ChildStdout>>)>,
}

impl Peer {
    /// Starts the program of this folder, and waits until it is connected.
    pub async fn start(folder: &Path, servers: &Servers) -> Self {
        let mut child = Command::new(folder.join("run"))
            .env("NATS_URL", servers.nats.url())
            .env("FETCH_PROXY_ADDR", &servers.proxy.grpc)
            .env("STREAM", &servers.backlog.stream)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(next(&mut lines).await, "ready");
        Self { child, pipes: Mutex::new((input, lines)) }
    }

    /// The process. The script `run` becomes the program, so it is the same process.
    pub fn pid(&self) -> u32 {
        self.child.id().expect("it runs")
    }

    /// Does the work of this mode with a new consumer.
    pub async fn half(
        &self,
        servers: &Servers,
        processes: &Processes,
        mode: &str,
        workers: usize,
        run: Run,
    ) -> Half {
        let consumer = servers.backlog.consumer().await.name;
        let mut pipes = self.pipes.lock().await;
        let (input, lines) = &mut *pipes;
        let line = format!("{mode} {consumer} {workers} {}\n", run.messages);
        half(processes, run, async {
            input.write_all(line.as_bytes()).await.unwrap();
            let answer = next(lines).await;
            let count = answer.strip_prefix("done ").and_then(|count| count.parse().ok());
            count.unwrap_or_else(|| panic!("{mode}: {answer:?}"))
        })
        .await
    }
}

/// The next line that the program prints.
async fn next(lines: &mut Lines<BufReader<ChildStdout>>) -> String {
    let line = timeout(LONGEST_RUN, lines.next_line()).await.expect("it answers in time");
    line.unwrap().expect("it has ended")
}
