//! The audit lines of a real process: each event, its fields, how often it is written, and that no secret of a
//! caller is ever in the log.

use std::{collections::BTreeSet, fs};

use fetch_proxy::{
    access::NewApiKey,
    pb::{self, FetchRequest},
};
use serde_json::Value;
use tempfile::TempDir;
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, extend, fetch, reason, with_key},
};
use tonic::Request;

/// The fields that an audit line may have.
const FIELDS: [&str; 20] = [
    "timestamp",
    "level",
    "message",
    "target",
    "event",
    "identity",
    "principal",
    "verb",
    "stream",
    "consumer",
    "why",
    "detail",
    "rule",
    "policy",
    "peer",
    "certificate",
    "method",
    "request_id",
    "trace_id",
    "repeated",
];

/// A replica with a policy, and the keys of its principals.
struct Audited {
    _folder: TempDir,
    proxy: Proxy,
    client: Client,
    orders: String,
    other: String,
    dispatcher: String,
}

impl Audited {
    async fn start(fixture: &Fixture, flags: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let names = ["orders-1", "other", "dispatcher"];
        let keys = names.map(|name| NewApiKey::random(name).unwrap().unwrap());
        let lines: Vec<_> = keys.iter().map(|key| key.line.clone()).collect();
        fs::write(folder.path().join("keys"), lines.join("\n")).unwrap();
        let (file, stream) = (folder.path().join("policy.yaml"), &fixture.stream);
        let policy = format!(
            "version: 1\n\
             authenticate: {{api_keys: {{file: keys}}}}\n\
             principals:\n\
             - {{name: orders, match: ['key:orders-*']}}\n\
             - {{name: other, match: ['key:other']}}\n\
             - {{name: dispatcher, match: ['key:dispatcher']}}\n\
             rules:\n\
             - {{principals: [orders, other], streams: [{stream}], consumers: ['*'], verbs: [work]}}\n\
             - {{principals: [dispatcher], streams: ['*'], consumers: ['*'], verbs: [settle-any]}}\n"
        );
        fs::write(&file, policy).unwrap();
        let flags = [&["--policy-file", file.to_str().unwrap()], flags].concat();
        let proxy = Proxy::start(NatsServer::shared(), &flags);
        let [orders, other, dispatcher] = keys.map(|key| key.secret);
        let client = proxy.client().await;
        Self { _folder: folder, proxy, client, orders, other, dispatcher }
    }

    fn lines(&self) -> Vec<Value> {
        let log = self.proxy.log();
        // The last line may be half written.
        let lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
        let lines = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
        lines.filter(|line| line["target"] == "audit").collect()
    }

    /// The lines of this event, once there are some.
    async fn of(&self, event: &str) -> Vec<Value> {
        eventually(event, || async {
            let mut lines = self.lines();
            lines.retain(|line| line["event"] == event);
            (!lines.is_empty()).then_some(lines)
        })
        .await
    }

    async fn taken(&mut self, fixture: &Fixture, payload: &'static str) -> String {
        fixture.publish("n", payload).await;
        let request = with_key(&self.orders, fetch(fixture, 1, 10_000));
        self.client.fetch(request).await.unwrap().into_inner().messages[0].token.clone()
    }
}

fn with_ids<T>(mut request: Request<T>, id: &str) -> Request<T> {
    let metadata = request.metadata_mut();
    metadata.insert("x-request-id", id.parse().unwrap());
    metadata.insert("x-secret", "secret-header".parse().unwrap());
    request
}

#[tokio::test]
async fn each_event_has_its_line_and_no_secret_is_in_the_log() {
    let fixture = Fixture::new(config()).await;
    let flags = ["--audit", "all", "--log-level", "trace"];
    let mut audited = Audited::start(&fixture, &flags).await;
    audited.proxy.ready().await;
    let first = audited.taken(&fixture, "secret-payload").await;
    let (orders, other, dispatcher) =
        (audited.orders.clone(), audited.other.clone(), audited.dispatcher.clone());
    let mut client = audited.client.clone();

    let unknown = NewApiKey::random("orders-1").unwrap().unwrap().secret;
    for bearer in [&*unknown, "secret-bearer", "secret.json.token"] {
        let request = with_ids(with_key(bearer, fetch(&fixture, 1, 0)), "request-1");
        client.fetch(request).await.unwrap_err();
    }
    let refused = client.fetch(with_key(&dispatcher, fetch(&fixture, 1, 0))).await.unwrap_err();
    assert_eq!(reason(&refused).1, "NOT_ALLOWED");
    client.extend(with_key(&other, extend(&first, 60_000))).await.unwrap_err();
    let term = pb::TermRequest {
        token: first.clone(),
        reason: "secret-reason".to_owned(),
        ..Default::default()
    };
    client.term(with_ids(with_key(&dispatcher, term), "request 2")).await.unwrap();
    let second = audited.taken(&fixture, "secret-payload").await;
    client.ack(with_key(&orders, ack(&second))).await.unwrap();

    let loaded = audited.of("policy_loaded").await;
    assert_eq!(loaded[0]["policy"].as_str().map(str::len), Some(16), "{loaded:?}");
    let unauthenticated = audited.of("unauthenticated").await;
    let why: BTreeSet<_> = unauthenticated.iter().filter_map(|line| line["why"].as_str()).collect();
    assert!(why.contains("api_key") && why.contains("malformed"), "{unauthenticated:?}");
    assert_eq!(unauthenticated[0]["request_id"], "request-1");
    assert_eq!(unauthenticated[0]["method"], "Fetch");
    assert!(unauthenticated[0]["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    let denied = audited.of("denied").await;
    let shown = |line: &Value, names: &[&str]| {
        names.iter().map(|name| line[name].as_str().unwrap_or("-").to_owned()).collect::<Vec<_>>()
    };
    let (stream, consumer) = (&*fixture.stream, &*fixture.consumer);
    let fields = ["identity", "principal", "verb", "stream", "consumer", "detail", "method"];
    let expected = ["key:dispatcher", "dispatcher", "fetch", stream, consumer, "-", "Fetch"];
    assert_eq!(shown(&denied[0], &fields), expected);
    let expected = ["key:other", "other", "extend", stream, consumer, "foreign_token", "Extend"];
    assert_eq!(shown(&denied[1], &fields), expected, "the line names what the caller is not told");
    let foreign = audited.of("foreign_settle").await;
    let expected = ["key:dispatcher", "dispatcher", "settle", stream, consumer, "orders", "Term"];
    assert_eq!(shown(&foreign[0], &fields), expected);
    assert_eq!(foreign[0]["request_id"], Value::Null, "it has a space");
    let allowed = audited.of("allowed").await;
    let expected = ["key:orders-1", "orders", "fetch", stream, consumer, "-", "Fetch"];
    assert_eq!(shown(&allowed[0], &fields), expected);
    assert_eq!(allowed[0]["rule"], 8);

    for line in audited.lines() {
        for field in line.as_object().unwrap().keys() {
            assert!(FIELDS.contains(&&**field), "{field} in {line}");
        }
    }
    let log = audited.proxy.log();
    let secrets = [&*orders, &other, &dispatcher, &unknown, &first, &second];
    let words =
        ["secret-bearer", "secret.json.token", "secret-header", "secret-payload", "secret-reason"];
    for secret in secrets.into_iter().chain(words) {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[tokio::test]
async fn repeated_refusals_have_few_lines_that_count_them() {
    let fixture = Fixture::new(config()).await;
    let audited = Audited::start(&fixture, &["--log-level", "error"]).await;
    let refused = async |count: usize| {
        for _ in 0..count {
            let request: FetchRequest = fetch(&fixture, 1, 0);
            // Another connection is no other client.
            let mut client = audited.proxy.client().await;
            client.fetch(request.clone()).await.unwrap_err();
            client.fetch(with_key(&audited.dispatcher, request)).await.unwrap_err();
        }
    };
    let began = std::time::Instant::now();
    refused(20).await;
    let most = began.elapsed().as_secs() as usize + 1;
    for event in ["unauthenticated", "denied"] {
        let lines = audited.of(event).await.len();
        assert!(lines <= most, "{lines} lines in {:?}", began.elapsed());
    }
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    refused(1).await;
    for event in ["unauthenticated", "denied"] {
        let counted = eventually("the sum", || async {
            let lines = audited.of(event).await;
            let silent: u64 = lines.iter().filter_map(|line| line["repeated"].as_u64()).sum();
            (silent + lines.len() as u64 == 21).then_some(())
        });
        counted.await;
    }
}

#[tokio::test]
async fn audit_that_is_off_writes_no_line() {
    let fixture = Fixture::new(config()).await;
    let mut audited = Audited::start(&fixture, &["--audit", "off", "--request-log", "off"]).await;
    audited.client.fetch(fetch(&fixture, 1, 0)).await.unwrap_err();
    let refused = || async { audited.proxy.log().contains("a call was refused").then_some(()) };
    eventually("the refusal in the log", refused).await;
    assert_eq!(audited.lines(), [] as [Value; 0]);
}
