//! Prometheus itself scrapes replicas that are at work. Its linter is content with their page, and each query of the
//! dashboard, of the alerts and of KEDA is understood.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::{TcpListener, TcpStream},
    process::{Child, Stdio},
    time::Duration,
};

use fetch_proxy::pb;
use serde_json::Value;
use tempfile::NamedTempFile;
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch, nak, take, take_one, term},
    scrape::{PROMETHEUS, get},
    traces::TraceReceiver,
};

use crate::tool;

/// Queries that are empty while all is well, each with its reason. All others must find something.
const EMPTY: [(&str, &str); 2] = [
    ("principal_limited", "no principal is limited: there is no policy"),
    ("denials_total", "nothing is denied: there is no policy"),
];

/// A Prometheus that scrapes these.
struct Prometheus {
    process: Child,
    address: String,
    _folder: tempfile::TempDir,
}

impl Prometheus {
    fn start(proxies: &[Proxy]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let targets: Vec<&str> = proxies.iter().map(|proxy| &*proxy.ops).collect();
        let rules = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/monitoring/rules.yaml");
        let config = serde_json::json!({
            "global": { "scrape_interval": "1s", "evaluation_interval": "1s" },
            "rule_files": [rules],
            "scrape_configs": [{ "job_name": "fetch-proxy", "static_configs": [{ "targets": targets }] }],
        });
        fs::write(folder.path().join("prometheus.yml"), config.to_string()).unwrap();
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap().to_string();
        drop(free);
        let process = tool("FETCH_PROXY_TEST_PROMETHEUS")
            .arg("--config.file=prometheus.yml")
            .arg(format!("--web.listen-address={address}"))
            // Debian's own default is one folder for all.
            .arg("--storage.tsdb.path=data")
            .arg("--enable-feature=exemplar-storage")
            .current_dir(folder.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { process, address, _folder: folder }
    }

    /// The answer to a question of its API. It answers in another way while it starts.
    fn ask(&self, path: &str) -> Result<Value, String> {
        let mut connection = TcpStream::connect(&self.address).map_err(|why| why.to_string())?;
        // Version 1.0 has no chunks.
        write!(connection, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
        let mut answer = String::new();
        connection.read_to_string(&mut answer).unwrap();
        let body = answer.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        serde_json::from_str(body).map_err(|_| format!("{path}: {answer}"))
    }

    /// How many series a query finds.
    fn found(&self, query: &str) -> Result<usize, String> {
        let encoded: String = query
            .bytes()
            .map(|byte| match byte.is_ascii_alphanumeric() {
                true => char::from(byte).to_string(),
                false => format!("%{byte:02X}"),
            })
            .collect();
        let answer = self.ask(&format!("/api/v1/query?query={encoded}"))?;
        if answer["status"] != "success" {
            return Err(answer.to_string());
        }
        Ok(answer["data"]["result"].as_array().map_or(0, Vec::len))
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The texts of all fields of this name.
fn texts(value: &Value, name: &str, into: &mut Vec<String>) {
    match value {
        Value::Object(object) => {
            for (field, value) in object {
                into.extend(value.as_str().filter(|_| field == name).map(str::to_owned));
                texts(value, name, into);
            }
        }
        Value::Array(all) => all.iter().for_each(|value| texts(value, name, into)),
        _ => {}
    }
}

fn read(name: &str) -> String {
    fs::read_to_string(format!("{}/deploy/{name}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Two replicas at work: each kind of call, and each end of a lease that a worker can choose.
async fn at_work() -> (Fixture, Vec<Proxy>, NamedTempFile) {
    let fixture = Fixture::new(config()).await;
    let keys = NamedTempFile::new().unwrap();
    fs::write(keys.path(), fetch_proxy::token::new_key_line().unwrap()).unwrap();
    let flags = ["--token-key-file", keys.path().to_str().unwrap(), "--cluster", &*fixture.stream];
    let proxies: Vec<_> = (0..2).map(|_| Proxy::start(NatsServer::shared(), &flags)).collect();
    for proxy in &proxies {
        proxy.ready().await;
    }
    work(&fixture, &proxies).await;
    (fixture, proxies, keys)
}

async fn work(fixture: &Fixture, proxies: &[Proxy]) {
    for proxy in proxies {
        let mut client = proxy.client().await;
        fixture.publish_many(4).await;
        let held = take(&client, fetch(fixture, 3, 10_000)).await;
        client.ack(ack(&held[0].token)).await.unwrap();
        client.nak(nak(&held[1].token, 0)).await.unwrap();
        client.term(term(&held[2].token, "x")).await.unwrap();
        let message = take_one(&client, fixture).await;
        client.ack(ack("no token")).await.unwrap_err();
        // The last one is settled at the other replica.
        let other = &proxies[usize::from(std::ptr::eq(proxy, &proxies[0]))];
        let batch = [pb::Settlement {
            token: message.token,
            action: Some(pb::settlement::Action::Ack(pb::AckAction::default())),
            ..pb::Settlement::default()
        }];
        let request =
            pb::SettleRequest { settlements: batch.into(), ..pb::SettleRequest::default() };
        other.client().await.settle(request).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn linter_of_prometheus_is_content_with_the_page_of_a_busy_replica() {
    let (_fixture, proxies, _keys) = at_work().await;
    let page = get(&proxies[0].ops, "/metrics", &[]).body;
    let mut linter = tool("FETCH_PROXY_TEST_PROMTOOL")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    linter.stdin.take().unwrap().write_all(&page).unwrap();
    let said = linter.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&said.stderr) + String::from_utf8_lossy(&said.stdout);
    assert!(said.status.success() && text.trim().is_empty(), "{text}");
    let open = get(&proxies[0].ops, "/metrics", &[("Accept", PROMETHEUS)]).body;
    assert!(open.ends_with(b"# EOF\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_knows_the_trace_of_a_sampled_call() {
    let receiver = TraceReceiver::start().await;
    let variables = [("OTEL_EXPORTER_OTLP_ENDPOINT", &*receiver.url)];
    let proxies = [Proxy::start_with(&NatsServer::shared().url(), &[], &variables)];
    let fixture = Fixture::new(config()).await;
    proxies[0].ready().await;
    proxies[0].client().await.fetch(fetch(&fixture, 1, 0)).await.unwrap();
    let prometheus = Prometheus::start(&proxies);
    let question =
        "/api/v1/query_exemplars?query=fetchproxy_fetch_seconds_bucket&start=0&end=9999999999";
    let trace = eventually("an exemplar", || async {
        let answer = prometheus.ask(question).ok()?;
        let exemplar = &answer["data"][0]["exemplars"][0]["labels"]["trace_id"];
        exemplar.as_str().map(str::to_owned)
    })
    .await;
    let call = &receiver.named("fetchproxy.v1.FetchService/Fetch", 1).await[0];
    let sent: String = call.span.trace_id.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(trace, sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_query_finds_something_at_replicas_at_work() {
    let (fixture, proxies, _keys) = at_work().await;
    let prometheus = Prometheus::start(&proxies);
    eventually("two scrapes of both replicas", || async {
        let found = prometheus.found("count_over_time(fetchproxy_ready[1m]) > 1");
        found.is_ok_and(|found| found == 2).then_some(())
    })
    .await;
    // Rates need a change between two scrapes.
    work(&fixture, &proxies).await;
    fixture.publish_many(1).await;
    let _held = take_one(&proxies[0].client().await, &fixture).await;
    tokio::time::sleep(Duration::from_secs(3)).await;

    let dashboard: Value = serde_json::from_str(&read("monitoring/dashboard.json")).unwrap();
    let rules: Value = yaml_serde::from_str(&read("monitoring/rules.yaml")).unwrap();
    let scaling: Value = yaml_serde::from_str(&read("keda/worker-by-metrics.yaml")).unwrap();
    let (mut shown, mut alerts) = (Vec::new(), Vec::new());
    texts(&dashboard, "expr", &mut shown);
    texts(&scaling, "query", &mut shown);
    texts(&rules, "expr", &mut alerts);
    let filled = |query: &str| {
        let mut query =
            query.replace("[$__rate_interval]", "[1m]").replace("namespace=\"fetch-proxy\", ", "");
        for (example, here) in
            [("ORDERS", &fixture.stream), ("\"worker\"", &format!("\"{}\"", fixture.consumer))]
        {
            query = query.replace(example, here);
        }
        ["job", "instance", "stream", "consumer"]
            .iter()
            .fold(query, |query, name| query.replace(&format!("${name}"), ".+"))
    };
    let mut empty = BTreeMap::new();
    for query in &shown {
        let found = prometheus.found(&filled(query)).unwrap_or_else(|why| panic!("{query}: {why}"));
        if found == 0 && !EMPTY.iter().any(|(known, _)| query.contains(known)) {
            empty.insert(query, found);
        }
    }
    assert!(shown.len() > 40, "{}", shown.len());
    assert!(empty.is_empty(), "these find nothing: {empty:#?}");
    // The series of an alert are there, also if the alert is silent.
    for query in &alerts {
        prometheus.found(query).unwrap_or_else(|why| panic!("{query}: {why}"));
    }
    let judged = prometheus.ask("/api/v1/rules").unwrap();
    let groups = judged["data"]["groups"][0]["rules"].as_array().unwrap();
    assert_eq!(groups.len(), alerts.len());
    let (mut faults, mut firing) = (Vec::new(), Vec::new());
    for rule in groups {
        if rule["health"] != "ok" {
            faults.push(rule.to_string());
        }
        if rule["state"] == "firing" {
            firing.push(rule["name"].as_str().unwrap().to_owned());
        }
    }
    assert_eq!(faults, [""; 0], "rules that cannot be judged");
    assert_eq!(firing, [""; 0], "alerts at replicas that work well");
}
