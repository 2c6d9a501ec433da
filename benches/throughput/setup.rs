//! A nats-server with a filled stream, and a proxy in front of it, each a process of its own.

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use async_nats::jetstream::{self, consumer::pull, stream};
use futures_util::future::join_all;
use testkit::{nats_server::NatsServer, proxy::Proxy};

pub const STREAM: &str = "BENCH";
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
        let config = stream::Config {
            name: STREAM.into(),
            subjects: vec!["bench.>".into()],
            ..Default::default()
        };
        jetstream.create_stream(config).await.unwrap();
        let payload = bytes::Bytes::from(vec![b'x'; SIZE]);
        for _ in 0..messages.div_ceil(1000) {
            let sent = (0..1000).map(|_| jetstream.publish("bench.x", payload.clone()));
            for sent in join_all(sent).await {
                sent.unwrap().await.unwrap();
            }
        }
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

    /// A new durable consumer over the whole stream.
    pub async fn consumer(&self) -> String {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("c{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let config = pull::Config {
            durable_name: Some(name.clone()),
            max_ack_pending: 1_000_000,
            ack_wait: Duration::from_secs(60),
            ..Default::default()
        };
        self.jetstream.create_consumer_on_stream(config, STREAM).await.unwrap();
        name
    }

    /// CPU of this process, the proxy and nats-server.
    pub fn cpu_proxied(&self) -> Cpu {
        self.cpu_of(self.proxy.pid())
    }

    /// CPU of this process, this proxy and nats-server.
    pub fn cpu_of(&self, proxy: u32) -> Cpu {
        Cpu(vec![std::process::id(), proxy, self.server.pid()])
    }

    pub fn nats_url(&self) -> String {
        self.server.url()
    }

    /// CPU of both replicas alone.
    pub fn cpu_replicas(&self) -> Cpu {
        Cpu(vec![self.proxy.pid(), self.other_proxy.pid()])
    }

    /// One more connection to NATS.
    pub async fn another_nats(&self) -> async_nats::Client {
        async_nats::connect(self.server.url()).await.unwrap()
    }

    /// CPU of this process and nats-server.
    pub fn cpu_direct(&self) -> Cpu {
        Cpu(vec![std::process::id(), self.server.pid()])
    }

    /// CPU of this process and the no-op server.
    pub fn cpu_noop(&self) -> Cpu {
        Cpu(vec![std::process::id(), self.noop_process.id()])
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

/// The CPU time of some processes.
pub struct Cpu(Vec<u32>);

impl Cpu {
    /// That of one process.
    pub fn of_one(pid: u32) -> Self {
        Self(vec![pid])
    }

    /// Microseconds so far, user and system together.
    pub fn micros(&self) -> f64 {
        self.0.iter().map(|pid| micros(*pid)).sum()
    }
}

/// From /proc: fields 14 and 15 of `stat`, in ticks of 10 ms.
fn micros(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<f64> = after_name.split(' ').filter_map(|field| field.parse().ok()).collect();
    // The state letter is not a number, so utime and stime are 10 and 11 of what is.
    fields.get(10).zip(fields.get(11)).map_or(0.0, |(user, system)| (user + system) * 10_000.0)
}
