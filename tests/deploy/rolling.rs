//! Rolling updates in small: the pods of the chart are replaced, with its probes and its grace
//! period. Meanwhile the workers of `examples` work in every available language, and one client
//! leaves repeats to its library.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use testkit::{
    authority::Authority,
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
};
use tokio::{
    sync::{Mutex, watch},
    task::JoinSet,
};

use testkit::examples::{
    language::{self, Built, Language},
    reports::Reports,
    scenario::Publish,
    worker::Worker,
};

use crate::{
    helm,
    mounted::Mounted,
    pods::{Deployment, Plan, Service},
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const UPDATES: usize = 2;
/// Between one change of all certificates and of the policy, and the next.
const ROTATION: Duration = Duration::from_millis(1500);
/// Workers come with certificates, and something else may not come at all.
const GUARDED_BY_CERTIFICATES: &[&str] = &[
    "tokenKeys.secret=token-keys",
    "tls.secret=certificate",
    "tls.clientCASecret=authorities",
    "access.policyConfigMap=policy",
];
const WORKER: &str = "spiffe://cluster.example/ns/orders/sa/worker";
const POLICY: &str = "\
version: 1
principals:
- {name: orders, match: ['spiffe://cluster.example/ns/orders/*']}
rules:
- {principals: [orders], streams: ['*'], consumers: ['*'], verbs: [work]}
";
/// Between one message and the next.
const PACE: Duration = Duration::from_millis(3);
/// One message in so many takes so long, in seconds: longer than a pod that goes is still there.
const SLOW: (u64, f64) = (150, 6.0);
/// The settings by which a client's library repeats failed calls, in
/// docs/how-to/configure-the-channel.md.
const MOST_ATTEMPTS: usize = 5;

/// Each test needs the whole machine.
static TURN: Mutex<()> = Mutex::const_new(());

#[tokio::test(flavor = "multi_thread")]
async fn update_costs_no_call_and_no_lease() {
    let _turn = TURN.lock().await;
    let files = Arc::new(Mutex::new(Mounted::new()));
    update(&[helm::LEAST], files, UPDATES, BTreeMap::new()).await;
}

/// Meanwhile certificates of the proxy, certificates of workers, and the policy change all the time.
#[tokio::test(flavor = "multi_thread")]
async fn update_with_certificates_and_policy_costs_no_call_and_no_lease() {
    let _turn = TURN.lock().await;
    let files = Arc::new(Mutex::new(Mounted::new()));
    let (authority, clients) = (Authority::new("proxies"), Authority::new("workers"));
    rotate(&mut *files.lock().await, &authority, &clients, 0);
    let path =
        async |name: &str| files.lock().await.path(&format!("/etc/fetch-proxy/worker/{name}"));
    let env = BTreeMap::from([
        ("FETCH_PROXY_CA".to_owned(), path("ca.crt").await),
        ("FETCH_PROXY_CERT".to_owned(), path("tls.crt").await),
        ("FETCH_PROXY_KEY".to_owned(), path("tls.key").await),
    ]);
    let mut rotating = JoinSet::new();
    let rotated = files.clone();
    rotating.spawn(async move {
        for round in 1.. {
            tokio::time::sleep(ROTATION).await;
            rotate(&mut *rotated.lock().await, &authority, &clients, round);
        }
    });
    let logs = update(GUARDED_BY_CERTIFICATES, files, 1, env).await;
    assert!(rotating.try_join_next().is_none(), "the rotation has ended");
    let used = |line: &str| logs.iter().map(|log| log.matches(line).count()).min();
    let (tls, policy) = (used("the TLS files were read again"), used("a policy is in use"));
    println!("each pod has used {tls:?} rotations of certificates and {policy:?} policies or more");
    // The first policy is that of the start.
    assert!(tls > Some(0) && policy > Some(1), "{logs:?}");
}

/// New files of everything but the token keys and the authorities.
fn rotate(files: &mut Mounted, authority: &Authority, clients: &Authority, round: usize) {
    let policy = format!("# {round}\n{POLICY}");
    let (server, worker) = (authority.server(), clients.workload(WORKER));
    files.put("tls", &[("tls.crt", &server.cert), ("tls.key", &server.key)]);
    files.put("tls-client-ca", &[("ca.crt", clients.pem())]);
    files.put("policy", &[("policy.yaml", &policy)]);
    let of_the_worker =
        [("ca.crt", authority.pem()), ("tls.crt", &*worker.cert), ("tls.key", &*worker.key)];
    files.put("worker", &of_the_worker);
}

/// Rolls the pods of a chart with these values, and judges what that has cost. Returns the logs of the pods
/// at the end.
async fn update(
    values: &[&str],
    files: Arc<Mutex<Mounted>>,
    updates: usize,
    credentials: BTreeMap<String, String>,
) -> Vec<String> {
    let languages = built().await;
    let server = NatsServer::start();
    let fixture = Arc::new(Fixture::on(&server, config()).await);
    let keys = fetch_proxy::token::new_key_line().unwrap();
    files.lock().await.put("token-keys", &[("token-keys", &keys)]);
    let mut tasks = JoinSet::new();
    let service = Service::start(&mut tasks).await;
    let plan = Plan::of(&helm::objects(values), &*files.lock().await);
    let mut deployment = Deployment::start(plan, service, server.url()).await;

    let reports = Arc::new(Reports::default());
    let mut workers = Vec::new();
    for language in &languages {
        let mut env = environment(&fixture, &deployment, !credentials.is_empty());
        env.extend(credentials.clone());
        workers.push(Worker::start("worker", language, &env, &reports));
    }
    let (over, watched) = watch::channel(false);
    let publishing = tokio::spawn(publish(fixture.clone(), reports.clone(), watched));
    eventually("work to be done", || async { (reports.count("acked") > 100).then_some(()) }).await;
    let mut ends = Vec::new();
    for _ in 0..updates {
        ends.extend(deployment.roll().await);
    }
    over.send_replace(true);
    let published = publishing.await.unwrap();
    eventually("all to be done", || async { nothing_left(&fixture).await.then_some(()) }).await;
    for worker in &mut workers {
        worker.stop();
        let status = worker.ended(testkit::BOUND).await;
        let said = worker.errors();
        assert!(status.is_some_and(|status| status.success()), "{}: {said}", worker.name);
    }
    let killed = deployment.killed();
    Verdict::of(published, &reports, &fixture, updates, ends, killed).await.is_clean();
    deployment.logs()
}

/// The workers that can be run here, and the client that is this test's own.
async fn built() -> Vec<Language> {
    let mut ready = Vec::new();
    for language in language::all(Path::new(ROOT)) {
        match language.build().await {
            Built::Ready => ready.push(language),
            Built::Lacking(what) => println!("NOT TESTED: {}: {what}", language.name),
            Built::Failed(why) => panic!("{}: {why}", language.name),
        }
    }
    let python = ready.iter().any(|language| language.name == "python");
    assert!(python, "the client with a retry policy needs Python");
    let folder = PathBuf::from(ROOT).join("tests/deploy");
    ready.push(Language { name: "policy".to_owned(), folder });
    ready
}

fn environment(fixture: &Fixture, deployment: &Deployment, tls: bool) -> BTreeMap<String, String> {
    let address = deployment.service.address;
    let address =
        if tls { format!("https://localhost:{}", address.port()) } else { address.to_string() };
    BTreeMap::from([
        ("FETCH_PROXY_ADDR".to_owned(), address),
        ("STREAM".to_owned(), fixture.stream.clone()),
        ("CONSUMER".to_owned(), fixture.consumer.clone()),
        ("SERVICE_CONFIG".to_owned(), service_config()),
    ])
}

/// The one that docs/how-to/configure-the-channel.md recommends.
fn service_config() -> String {
    let page = include_str!("../../docs/how-to/configure-the-channel.md");
    let block = page.split("As a service config").nth(1).unwrap();
    let config = block.split("```json").nth(1).unwrap().split("```").next().unwrap();
    let config: serde_json::Value = serde_json::from_str(config).unwrap();
    for method in config["methodConfig"].as_array().unwrap() {
        assert_eq!(method["retryPolicy"]["maxAttempts"], MOST_ATTEMPTS);
    }
    config.to_string()
}

/// Publishes until it is over; returns how many.
async fn publish(fixture: Arc<Fixture>, reports: Arc<Reports>, over: watch::Receiver<bool>) -> u64 {
    let promise: Publish = serde_json::from_str(r#"{"becomes": ["acked"]}"#).unwrap();
    for number in 1.. {
        if *over.borrow() {
            return number - 1;
        }
        let task = match number % SLOW.0 {
            0 => serde_json::json!({ "id": number, "do": "slow", "seconds": SLOW.1 }),
            _ => serde_json::json!({ "id": number, "do": "ok" }),
        };
        reports.published(number, Some(number), &promise);
        let sequence = fixture.publish("task", task.to_string()).await;
        assert_eq!(sequence, number, "nobody else publishes");
        tokio::time::sleep(PACE).await;
    }
    unreachable!("that many messages")
}

async fn nothing_left(fixture: &Fixture) -> bool {
    let info = fixture.info().await;
    (info.num_pending, info.num_ack_pending) == (0, 0)
}

struct Verdict {
    updates: usize,
    published: u64,
    handed: u64,
    acked: usize,
    lost: usize,
    failed: usize,
    repeated: usize,
    complaints: Vec<String>,
    ends: Vec<Duration>,
    killed: usize,
}

impl Verdict {
    async fn of(
        published: u64,
        reports: &Reports,
        fixture: &Fixture,
        updates: usize,
        ends: Vec<Duration>,
        killed: usize,
    ) -> Self {
        let verdict = Self {
            updates,
            published,
            handed: fixture.info().await.delivered.consumer_sequence,
            acked: reports.count("acked"),
            lost: reports.count("lost"),
            failed: reports.count("failed"),
            repeated: reports.count("retry"),
            complaints: reports.complaints(false),
            ends,
            killed,
        };
        verdict.print(reports);
        verdict
    }

    fn print(&self, reports: &Reports) {
        let seconds = |end: Option<&Duration>| end.map_or(0.0, Duration::as_secs_f64);
        println!("{} rolling updates of 3 pods", self.updates);
        for (what, count) in [
            ("published", self.published),
            ("handed to workers", self.handed),
            ("acked", self.acked as u64),
            ("leases lost", self.lost as u64),
            ("calls that failed with a retry policy", self.failed as u64),
            ("calls that workers without one repeated", self.repeated as u64),
            ("pods that a kubelet would have killed", self.killed as u64),
        ] {
            println!("{what:40} {count:7}");
        }
        println!(
            "{:40} {:5.1} s",
            "the longest that a pod took to end",
            seconds(self.ends.iter().max())
        );
        println!("acked by language: {:?}", reports.tally().acked);
    }

    fn is_clean(&self) {
        assert_eq!(self.complaints, Vec::<String>::new());
        assert_eq!((self.acked as u64, self.lost, self.failed), (self.published, 0, 0));
        // An attempt more would be a lease that was lost, whether anybody noticed or not.
        assert_eq!(self.handed, self.published);
        assert_eq!((self.ends.len(), self.killed), (self.updates * 3, 0));
    }
}
