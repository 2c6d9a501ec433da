//! A Deployment, the kubelet and a Service in small: processes for pods, probed as the chart says,
//! and connections that are balanced over those that are ready. Decides nothing about calls: what is
//! balanced are bytes.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use fetch_proxy::client::probe;
use serde_json::Value;
use testkit::proxy::Proxy;
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::sleep,
};

use crate::{
    helm::{container, one},
    mounted::Mounted,
};

/// How long a pod that goes is still sent new connections.
const PROPAGATION: Duration = Duration::from_secs(1);

/// The chart's description of the pods.
#[derive(Clone)]
pub struct Plan {
    pub replicas: usize,
    pub grace: Duration,
    /// How long a pod must have been ready before it counts.
    settled: Duration,
    startup: Probe,
    readiness: Probe,
    liveness: Probe,
    /// The settings of the container, as flags.
    flags: Vec<String>,
}

#[derive(Clone)]
struct Probe {
    /// The container's name for the probed port.
    port: String,
    service: String,
    period: Duration,
    timeout: Duration,
    failures: u64,
}

impl Plan {
    pub fn of(objects: &[Value], files: &Mounted) -> Self {
        let spec = &one(objects, "Deployment")["spec"];
        let container = container(objects);
        let env = container["env"].as_array().unwrap().iter();
        let settings = env.filter_map(|variable| {
            let name = variable["name"].as_str().unwrap().strip_prefix("FETCH_PROXY_")?;
            let flag = format!("--{}", name.to_lowercase().replace('_', "-"));
            Some(match variable["value"].as_str().unwrap() {
                "true" => vec![flag],
                value => vec![flag, files.path(value)],
            })
        });
        let grace = spec["template"]["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
        let probe = |kind| Probe::of(&container[kind], &container["ports"]);
        Self {
            replicas: spec["replicas"].as_u64().unwrap().try_into().unwrap(),
            grace: Duration::from_secs(grace),
            settled: Duration::from_secs(spec["minReadySeconds"].as_u64().unwrap_or(0)),
            startup: probe("startupProbe"),
            readiness: probe("readinessProbe"),
            liveness: probe("livenessProbe"),
            flags: settings.flatten().collect(),
        }
    }
}

impl Probe {
    /// With the defaults of Kubernetes.
    fn of(probe: &Value, ports: &Value) -> Self {
        let seconds = |name, default| Duration::from_secs(probe[name].as_u64().unwrap_or(default));
        let mut ports = ports.as_array().unwrap().iter();
        let port = ports.find(|port| port["containerPort"] == probe["grpc"]["port"]);
        Self {
            port: port.expect("it asks a port of the container")["name"]
                .as_str()
                .unwrap()
                .to_owned(),
            service: probe["grpc"]["service"].as_str().unwrap_or_default().to_owned(),
            period: seconds("periodSeconds", 10),
            timeout: seconds("timeoutSeconds", 1),
            failures: probe["failureThreshold"].as_u64().unwrap_or(3),
        }
    }

    async fn asks(&self, pod: &Addresses) -> bool {
        let address = if self.port == "ops" { &pod.ops } else { &pod.grpc };
        probe(address, &self.service, self.timeout).await.is_ok_and(|(_, serving)| serving)
    }
}

/// One address for all pods that are ready.
pub struct Service {
    pub address: SocketAddr,
    ready: Arc<Mutex<Vec<(usize, String)>>>,
}

impl Service {
    pub async fn start(tasks: &mut JoinSet<()>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let ready: Arc<Mutex<Vec<(usize, String)>>> = Arc::default();
        let endpoints = ready.clone();
        tasks.spawn(async move {
            for turn in 0.. {
                let (mut client, _) = listener.accept().await.unwrap();
                let pod = {
                    let endpoints = endpoints.lock().unwrap();
                    endpoints.get(turn % endpoints.len().max(1)).map(|(_, address)| address.clone())
                };
                // Nobody is there: the connection ends as it began.
                let Some(pod) = pod else { continue };
                tokio::spawn(async move {
                    let mut pod = TcpStream::connect(pod).await?;
                    copy_bidirectional(&mut client, &mut pod).await
                });
            }
        });
        Self { address, ready }
    }

    fn set(&self, pod: usize, address: Option<&str>) {
        let mut ready = self.ready.lock().unwrap();
        ready.retain(|(number, _)| *number != pod);
        ready.extend(address.map(|address| (pod, address.to_owned())));
    }

    fn has(&self, pod: usize) -> bool {
        self.ready.lock().unwrap().iter().any(|(number, _)| *number == pod)
    }
}

/// Pods of one Deployment.
pub struct Deployment {
    pub plan: Plan,
    pub service: Arc<Service>,
    nats: String,
    pods: Vec<Pod>,
    started: usize,
    /// How often a kubelet would have killed one.
    killed: Arc<AtomicUsize>,
}

struct Pod {
    number: usize,
    proxy: Proxy,
    /// The kubelet's probes of it.
    probes: JoinSet<()>,
}

impl Deployment {
    pub async fn start(plan: Plan, service: Service, nats: String) -> Self {
        let (service, killed) = (Arc::new(service), Arc::default());
        let mut deployment = Self { plan, service, nats, pods: Vec::new(), started: 0, killed };
        for _ in 0..deployment.plan.replicas {
            deployment.add().await;
        }
        deployment
    }

    /// One more pod, and waits until it counts.
    async fn add(&mut self) {
        let (nats, flags) = (self.nats.clone(), self.plan.flags.clone());
        // Starting waits for a file.
        let starting = tokio::task::spawn_blocking(move || {
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            Proxy::start_at(&nats, &flags)
        });
        let (number, proxy) = (self.started, starting.await.unwrap());
        self.started += 1;
        let mut probes = JoinSet::new();
        probes.spawn(probed(
            self.plan.clone(),
            Addresses::of(&proxy),
            ToldOfPod { number, service: self.service.clone(), killed: self.killed.clone() },
        ));
        self.pods.push(Pod { number, proxy, probes });
        let (began, mut ready) = (Instant::now(), None);
        while ready.is_none_or(|since: Instant| since.elapsed() < self.plan.settled) {
            ready = if self.service.has(number) { ready.or(Some(Instant::now())) } else { None };
            assert!(began.elapsed() < testkit::BOUND, "it is never ready");
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Replaces every pod: one more, then one less, which is not waited for. Returns how long each
    /// took to end.
    pub async fn roll(&mut self) -> Vec<Duration> {
        let mut ending = JoinSet::new();
        for old in std::mem::take(&mut self.pods) {
            self.add().await;
            ending.spawn(old.end(self.service.clone(), self.plan.grace));
        }
        ending.join_all().await
    }

    /// The log of each pod.
    pub fn logs(&self) -> Vec<String> {
        self.pods.iter().map(|pod| pod.proxy.log()).collect()
    }

    pub fn killed(&self) -> usize {
        self.killed.load(Ordering::Relaxed)
    }
}

struct Addresses {
    grpc: String,
    ops: String,
}

impl Addresses {
    fn of(proxy: &Proxy) -> Self {
        Self { grpc: proxy.grpc.clone(), ops: proxy.ops.clone() }
    }
}

impl Pod {
    /// As a kubelet does: the signal, and the end of it by the grace period. Meanwhile the news
    /// spreads that it goes.
    async fn end(mut self, service: Arc<Service>, grace: Duration) -> Duration {
        let began = Instant::now();
        self.probes.shutdown().await;
        self.proxy.signal("TERM");
        sleep(PROPAGATION).await;
        service.set(self.number, None);
        let ended = tokio::time::timeout(grace, self.proxy.wait()).await;
        let status = ended.expect("it outlives its grace period");
        assert!(status.success(), "{status}: {}", self.proxy.log());
        began.elapsed()
    }
}

/// Receives what a kubelet learns of one pod.
struct ToldOfPod {
    number: usize,
    service: Arc<Service>,
    killed: Arc<AtomicUsize>,
}

/// A kubelet's probes of one pod: until it has started none but that for it.
async fn probed(plan: Plan, pod: Addresses, told: ToldOfPod) {
    let mut failures = 0;
    while !plan.startup.asks(&pod).await {
        failures += 1;
        told.killed_if(failures == plan.startup.failures);
        sleep(plan.startup.period).await;
    }
    tokio::join!(ready(&plan.readiness, &pod, &told), alive(&plan.liveness, &pod, &told));
}

impl ToldOfPod {
    fn killed_if(&self, failed: bool) {
        self.killed.fetch_add(usize::from(failed), Ordering::Relaxed);
    }
}

/// Tells the Service whether it is ready.
async fn ready(readiness: &Probe, pod: &Addresses, told: &ToldOfPod) {
    let ToldOfPod { number, service, .. } = told;
    let mut failures = 0;
    loop {
        failures = if readiness.asks(pod).await { 0 } else { failures + 1 };
        match failures {
            0 if !service.has(*number) => service.set(*number, Some(&pod.grpc)),
            _ if failures >= readiness.failures => service.set(*number, None),
            _ => {}
        }
        sleep(readiness.period).await;
    }
}

async fn alive(liveness: &Probe, pod: &Addresses, told: &ToldOfPod) {
    let mut failures = 0;
    loop {
        failures = if liveness.asks(pod).await { 0 } else { failures + 1 };
        told.killed_if(failures == liveness.failures);
        sleep(liveness.period).await;
    }
}
