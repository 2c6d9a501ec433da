//! A fetch-proxy process and a client of it.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant, SystemTime},
};

use fetch_proxy::pb::{self, fetch_service_client::FetchServiceClient};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tonic::{Code, IntoRequest, Request, Response, Status, transport::Channel};
use tonic_types::StatusExt as _;

use crate::{
    BOUND, eventually, jetstream::Fixture, millis, nats_server::NatsServer, program, signal,
};

pub type Client = FetchServiceClient<Channel>;

/// A proxy that lives as long as this.
pub struct Proxy {
    child: Child,
    folder: TempDir,
    pub grpc: String,
    pub ops: String,
}

impl Proxy {
    /// Serves in front of this server, with more flags.
    pub fn start(server: &NatsServer, flags: &[&str]) -> Self {
        Self::start_at(&server.url(), flags)
    }

    pub fn start_at(nats_url: &str, flags: &[&str]) -> Self {
        Self::start_on("127.0.0.1:0", nats_url, flags)
    }

    /// The same at an address that clients know already.
    pub fn start_on(listen: &str, nats_url: &str, flags: &[&str]) -> Self {
        Self::started(&program(), listen, nats_url, flags, &[], None, None)
    }

    /// Another program than the one that was built with this test.
    pub fn start_other(program: &Path, nats_url: &str, flags: &[&str]) -> Self {
        Self::started(program, "127.0.0.1:0", nats_url, flags, &[], None, None)
    }

    /// With variables, for what has no flag.
    pub fn start_with(nats_url: &str, flags: &[&str], variables: &[(&str, &str)]) -> Self {
        Self::started(&program(), "127.0.0.1:0", nats_url, flags, variables, None, None)
    }

    /// Its standard error goes there; [`Proxy::log`] has none of it.
    pub fn start_logging_to(log: Stdio, nats_url: &str, flags: &[&str]) -> Self {
        Self::started(&program(), "127.0.0.1:0", nats_url, flags, &[], Some(log), None)
    }

    /// It may have so many files open.
    pub fn start_with_files(nats_url: &str, files: u32) -> Self {
        Self::started(&program(), "127.0.0.1:0", nats_url, &[], &[], None, Some(files))
    }

    fn started(
        program: &Path,
        listen: &str,
        nats_url: &str,
        flags: &[&str],
        variables: &[(&str, &str)],
        stderr: Option<Stdio>,
        files: Option<u32>,
    ) -> Self {
        // Proxies need distinct cluster names, unless they are replicas of each other.
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let cluster = format!("c{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let folder = tempfile::tempdir().unwrap();
        let ports = folder.path().join("ports.json");
        let log = fs::File::create(folder.path().join("log")).unwrap();
        let mut command = Command::new(if files.is_some() { "sh".as_ref() } else { program });
        if let Some(files) = files {
            let limited = format!("ulimit -n {files} && exec \"$0\" \"$@\"");
            command.args(["-c", &limited]).arg(program);
        }
        let child = command
            .args(["serve", "--listen", listen, "--ops-listen", "127.0.0.1:0"])
            .args(["--nats-url", nats_url, "--ports-file"])
            .arg(&ports)
            .args(flags)
            .env_remove("RUST_LOG")
            .env("FETCH_PROXY_DRAIN_DELAY", "0s")
            .env("FETCH_PROXY_CLUSTER", cluster)
            .envs(variables.iter().copied())
            .stderr(stderr.unwrap_or_else(|| Stdio::from(log.try_clone().unwrap())))
            .stdout(Stdio::from(log))
            .spawn()
            .unwrap();
        let mut proxy = Self { child, folder, grpc: String::new(), ops: String::new() };
        let ports = proxy.wait_for_ports(ports);
        (proxy.grpc, proxy.ops) = (ports["grpc"].clone(), ports["ops"].clone());
        proxy
    }

    pub async fn client(&self) -> Client {
        FetchServiceClient::connect(format!("http://{}", self.grpc)).await.unwrap()
    }

    /// Waits until it has its connections to NATS: it serves before, and refuses what needs them.
    pub async fn ready(&self) {
        eventually("readiness", || async { self.log().contains("\"ready\"").then_some(()) }).await;
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether the process has ended, as far as a signal to it tells.
    pub fn has_ended(&self) -> bool {
        let pid = self.pid().to_string();
        !Command::new("kill").args(["-0", &pid]).stderr(Stdio::null()).status().unwrap().success()
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// The time of the first log line that holds `text`, by the proxy's own clock.
    pub fn logged_at(&self, text: &str) -> Option<SystemTime> {
        let log = self.log();
        // The last line may be half written.
        let line =
            log.split_inclusive('\n').find(|line| line.contains(text) && line.ends_with('\n'));
        let line: serde_json::Value = serde_json::from_str(line?).unwrap();
        Some(humantime::parse_rfc3339(line["timestamp"].as_str().unwrap()).unwrap())
    }

    /// Sends it a signal by name, like `TERM`; see [`signal`].
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name);
    }

    /// Waits for its end, and lets this runtime's own connections answer meanwhile.
    pub async fn wait(&mut self) -> ExitStatus {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(began.elapsed() < BOUND, "the proxy does not end:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn wait_for_ports(&mut self, file: PathBuf) -> HashMap<String, String> {
        let began = Instant::now();
        loop {
            let read = fs::read(&file).ok();
            if let Some(ports) = read.and_then(|bytes| serde_json::from_slice(&bytes).ok()) {
                return ports;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "the proxy ended with {ended:?}:\n{}", self.log());
            assert!(began.elapsed() < BOUND, "the proxy does not listen:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A Fetch of what is there for this fixture, up to `n`, waiting up to `wait` milliseconds.
pub fn fetch(fixture: &Fixture, n: u32, wait: i64) -> pb::FetchRequest {
    pb::FetchRequest {
        stream: fixture.stream.clone(),
        consumer: fixture.consumer.clone(),
        n,
        max_wait: millis(wait),
        ..pb::FetchRequest::default()
    }
}

/// The same Fetch, which acks this token first.
pub fn acking(token: &str, request: pb::FetchRequest) -> pb::FetchRequest {
    let action = Some(pb::settlement::Action::Ack(pb::AckAction {}));
    let settlements = vec![pb::Settlement { number: 0, token: token.to_owned(), action }];
    pb::FetchRequest { settlements, ..request }
}

/// Receives the whole number of messages that `request` asks for, in as many calls as that takes. A
/// call that is refused is repeated.
///
/// # Panics
/// If no message comes within [`BOUND`].
pub async fn take(client: &Client, request: pb::FetchRequest) -> Vec<pb::Delivery> {
    let count = request.n as usize;
    let mut taken = Vec::new();
    while taken.len() < count {
        let n = u32::try_from((count - taken.len()).min(1000)).unwrap();
        let answer = eventually("messages", || {
            let request = pb::FetchRequest { n, linger: millis(500), ..request.clone() };
            let mut client = client.clone();
            async move {
                let messages = client.fetch(request).await.ok()?.into_inner().messages;
                (!messages.is_empty()).then_some(messages)
            }
        });
        taken.extend(answer.await);
    }
    taken
}

/// Receives one message of this fixture.
pub async fn take_one(client: &Client, fixture: &Fixture) -> pb::Delivery {
    take(client, fetch(fixture, 1, 10_000)).await.remove(0)
}

/// A Fetch that waits: its pull has reached the server.
pub async fn waiting(
    client: &Client,
    fixture: &Fixture,
    request: impl IntoRequest<pb::FetchRequest>,
) -> JoinHandle<Result<Response<pb::FetchResponse>, Status>> {
    let (mut client, request) = (client.clone(), request.into_request());
    let call = tokio::spawn(async move { client.fetch(request).await });
    fixture.pulled().await;
    call
}

pub fn ack(token: &str) -> pb::AckRequest {
    pb::AckRequest { token: token.to_owned(), ..pb::AckRequest::default() }
}

pub fn nak(token: &str, delay: i64) -> pb::NakRequest {
    let token = token.to_owned();
    pb::NakRequest { token, delay: millis(delay), ..pb::NakRequest::default() }
}

pub fn term(token: &str, reason: &str) -> pb::TermRequest {
    let (token, reason) = (token.to_owned(), reason.to_owned());
    pb::TermRequest { token, reason, ..pb::TermRequest::default() }
}

pub fn extend(token: &str, lease: i64) -> pb::ExtendRequest {
    pb::ExtendRequest { token: token.to_owned(), lease: millis(lease) }
}

/// A request whose caller waits for so long.
pub fn timed<T>(message: T, deadline: Duration) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(deadline);
    request
}

/// A request of the holder of this API key.
///
/// # Panics
/// When the key has characters that no key has.
pub fn with_key<T>(key: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {key}").parse().unwrap());
    request
}

/// Code and reason of a refusal, which must carry both the details and the trailer.
pub fn reason(status: &Status) -> (Code, String) {
    let info = status.get_details_error_info();
    let info = info.unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!(info.domain, "fetchproxy");
    let trailer = status.metadata().get("fetchproxy-reason").expect("no reason trailer");
    assert_eq!(trailer.to_str().unwrap(), info.reason);
    (status.code(), info.reason)
}
