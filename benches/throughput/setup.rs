//! A nats-server with a filled stream, and a proxy in front of it, each a process of its own.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use async_nats::jetstream;
use testkit::{backlog::Backlog, measure::Processes, nats_server::NatsServer, proxy::Proxy};

const SIZE: usize = 1024;
/// Flags of each proxy.
pub const FLAGS: [&str; 8] = [
    "--max-leases",
    "2000000",
    "--max-waiters",
    "200000",
    "--max-calls",
    "200000",
    "--log-level",
    "off",
];

pub struct Setup {
    pub nats: async_nats::Client,
    pub jetstream: jetstream::Context,
    /// The stream of most rows.
    pub backlog: Backlog,
    pub grpc: String,
    /// A replica of the same cluster.
    pub other_grpc: String,
    pub noop: String,
    server: NatsServer,
    proxy: Proxy,
    other_proxy: Proxy,
    noop_process: Child,
    _keys: tempfile::NamedTempFile,
}

impl Setup {
    /// Starts everything and fills the stream; every run reads it from its beginning with a new
    /// consumer.
    pub async fn start(messages: usize) -> Self {
        let server = NatsServer::start();
        let nats = async_nats::connect(server.url()).await.unwrap();
        let jetstream = jetstream::new(nats.clone());
        let backlog = Backlog::fill(&jetstream, "BENCH", SIZE, messages).await;
        let keys = tempfile::NamedTempFile::new().unwrap();
        fs::write(keys.path(), fetch_proxy::token::new_key_line().unwrap()).unwrap();
        let cluster = ["--cluster", "bench", "--token-key-file", keys.path().to_str().unwrap()];
        let flags = [&FLAGS[..], &cluster].concat();
        let (proxy, other_proxy) = (Proxy::start(&server, &flags), Proxy::start(&server, &flags));
        let mut noop_process = Command::new(env::current_exe().unwrap())
            .arg("--noop-server")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut noop = String::new();
        let said = noop_process.stdout.as_mut().unwrap();
        BufReader::new(said).read_line(&mut noop).unwrap();
        Self {
            nats,
            jetstream,
            backlog,
            grpc: format!("http://{}", proxy.grpc),
            other_grpc: format!("http://{}", other_proxy.grpc),
            noop: format!("http://{}", noop.trim()),
            server,
            proxy,
            other_proxy,
            noop_process,
            _keys: keys,
        }
    }

    /// This process, the proxy and nats-server.
    pub fn proxied(&self) -> Processes {
        self.proxied_by(self.proxy.pid())
    }

    /// This process, this proxy and nats-server.
    pub fn proxied_by(&self, proxy: u32) -> Processes {
        Processes { proxies: vec![proxy], others: vec![std::process::id(), self.server.pid()] }
    }

    /// The same with both replicas.
    pub fn replicated(&self) -> Processes {
        let proxies = vec![self.proxy.pid(), self.other_proxy.pid()];
        Processes { proxies, ..self.proxied() }
    }

    /// This process and nats-server.
    pub fn direct(&self) -> Processes {
        Processes { proxies: Vec::new(), ..self.proxied() }
    }

    /// This process and the no-op server.
    pub fn unproxied(&self) -> Processes {
        let others = vec![std::process::id(), self.noop_process.id()];
        Processes { proxies: Vec::new(), others }
    }

    pub fn nats_url(&self) -> String {
        self.server.url()
    }

    /// One more connection to NATS.
    pub async fn another_nats(&self) -> async_nats::Client {
        async_nats::connect(self.server.url()).await.unwrap()
    }

    pub fn proxy_pid(&self) -> u32 {
        self.proxy.pid()
    }
}

impl Drop for Setup {
    fn drop(&mut self) {
        let _ = self.noop_process.kill();
        let _ = self.noop_process.wait();
    }
}
