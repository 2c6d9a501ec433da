//! `fetch-proxy work`: a command for each message.

mod ending;
mod http;
mod outages;
mod settling;

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, ExitStatus, Stdio},
    time::Instant,
};

use serde_json::Value;
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::Proxy,
};

/// A worker that lives as long as this, with a folder for what its commands write.
pub struct Worker {
    child: Child,
    folder: tempfile::TempDir,
}

impl Worker {
    /// A worker of this consumer that runs `script` in a shell, in a folder of its own.
    pub fn start(proxy: &Proxy, fixture: &Fixture, flags: &[&str], script: &str) -> Self {
        Self::start_command(proxy, fixture, flags, &["sh", "-c", script])
    }

    pub fn start_command(
        proxy: &Proxy,
        fixture: &Fixture,
        flags: &[&str],
        command: &[&str],
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| Stdio::from(fs::File::create(folder.path().join(name)).unwrap());
        let child = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
            .args(["work", &fixture.stream, &fixture.consumer, "--addr", &proxy.grpc, "--json"])
            .args(flags)
            .args((!command.is_empty()).then_some("--"))
            .args(command)
            .current_dir(folder.path())
            .env("FETCH_PROXY_HEADER_OUTER", "of an outer message")
            .stdin(Stdio::null())
            .stdout(file("out"))
            .stderr(file("err"))
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The text of a file in its folder. Empty: there is no such file.
    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    pub fn write(&self, name: &str) {
        fs::write(self.path(name), "").unwrap();
    }

    /// Waits until a file has so many lines.
    pub async fn lines(&self, name: &str, count: usize) -> Vec<String> {
        eventually(&format!("{count} lines of {name}"), || async {
            let text = self.read(name);
            let lines: Vec<String> = text.lines().map(str::to_owned).collect();
            (lines.len() >= count).then_some(lines)
        })
        .await
    }

    /// Its lines about messages so far.
    pub fn said(&self) -> Vec<Value> {
        let text = self.read("out");
        let whole = text.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        whole.map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Waits until it has said something about so many messages.
    pub async fn settled(&self, count: usize) -> Vec<Value> {
        eventually(&format!("{count} messages; it says {}", self.read("err")), || async {
            let said = self.said();
            (said.len() >= count).then_some(said)
        })
        .await
    }

    pub fn signal(&self, name: &str) {
        testkit::signal(self.child.id(), name);
    }

    pub async fn wait(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < 2 * BOUND, "it does not end:\n{}", self.read("err"));
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    }

    /// Waits until it has ended in order.
    pub async fn ended(&mut self) -> Vec<Value> {
        let status = self.wait().await;
        assert!(status.success(), "{status}: {}", self.read("err"));
        self.said()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A proxy on the shared server, with a consumer of its own.
pub async fn stage() -> (Fixture, Proxy) {
    (Fixture::new(config()).await, Proxy::start(NatsServer::shared(), &[]))
}

/// The outcomes by the sequence of the message.
pub fn outcomes(said: &[Value]) -> Vec<(u64, &str)> {
    let of = |line: &'_ Value| line["sequence"].as_u64().unwrap();
    let mut all: Vec<(u64, &str)> =
        said.iter().map(|line| (of(line), line["outcome"].as_str().unwrap())).collect();
    all.sort_unstable();
    all
}
