//! The commands for operators, as an operator types them, at two replicas: who holds what, and how to take it away.

use std::{
    fs,
    io::Write as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::{
    access::NewApiKey,
    pb::{
        self, LeaseFilter, ListConnectionsRequest, ListConsumersRequest, ListLeasesRequest,
        ListReplicasRequest, ReleaseLeasesRequest, admin_service_client::AdminServiceClient,
    },
    token::new_key_line,
};
use serde_json::Value;
use tempfile::{NamedTempFile, TempDir};
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch, reason, take, with_key},
};
use tonic::{Code, Status, transport::Channel};

/// Two replicas of one cluster, and a consumer.
struct Fleet {
    fixture: Fixture,
    proxies: [Proxy; 2],
    _keys: NamedTempFile,
}

impl Fleet {
    async fn start(consumer: pull::Config, flags: &[&str]) -> Self {
        let fixture = Fixture::new(consumer).await;
        let keys = NamedTempFile::new().unwrap();
        fs::write(keys.path(), new_key_line().unwrap()).unwrap();
        let (file, cluster) = (keys.path().to_str().unwrap(), fixture.stream.clone());
        let flags = [&["--token-key-file", file, "--cluster", &cluster], flags].concat();
        let proxies = [(); 2].map(|()| Proxy::start(NatsServer::shared(), &flags));
        for proxy in &proxies {
            eventually("replicas to hear of each other", || async {
                proxy.log().contains("a replica was found").then_some(())
            })
            .await;
            proxy.ready().await;
        }
        Self { fixture, proxies, _keys: keys }
    }

    /// A worker that is a process of its own, takes messages for an hour and dies.
    fn worker(&self, at: usize, name: &str, n: u32) -> Vec<String> {
        let grpcurl = std::env::var_os("FETCH_PROXY_TEST_GRPCURL");
        let Fixture { stream, consumer, .. } = &self.fixture;
        let request = format!(
            r#"{{"stream":"{stream}","consumer":"{consumer}","n":{n},"lease":"3600s","worker":"{name}","linger":"2s"}}"#
        );
        let mut command = Command::new(grpcurl.unwrap_or_else(|| "grpcurl".into()));
        command.args(["-plaintext", "-d", &request, &self.proxies[at].grpc]);
        let output = command.arg("fetchproxy.v1.FetchService/Fetch").output().unwrap();
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        let messages = answer["messages"].as_array().unwrap();
        messages.iter().map(|message| message["token"].as_str().unwrap().to_owned()).collect()
    }

    /// Runs a command at the admin socket of this replica. Returns its exit code and what it wrote.
    fn run(&self, at: usize, arguments: &[&str]) -> (i32, String, String) {
        let arguments = [arguments, &["--ops-listen", &self.proxies[at].ops]].concat();
        typed(&arguments, Stdio::null())
    }

    fn names(&self) -> [&str; 2] {
        [&self.fixture.stream, &self.fixture.consumer]
    }
}

fn typed(arguments: &[&str], input: Stdio) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
    let output = command.args(arguments).stdin(input).output().unwrap();
    let [out, error] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code().unwrap(), out, error)
}

/// The reason why a fetch that does not wait is empty.
async fn empty_reason(client: &Client, fixture: &Fixture) -> pb::EmptyReason {
    client.clone().fetch(fetch(fixture, 1, 0)).await.unwrap().into_inner().empty_reason()
}

#[tokio::test]
async fn messages_of_a_dead_worker_are_found_and_freed_by_an_operator() {
    let consumer = pull::Config { max_ack_pending: 20, ..config() };
    let fleet = Fleet::start(consumer, &[]).await;
    let [stream, consumer] = fleet.names();
    fleet.fixture.publish_many(25).await;
    let tokens = fleet.worker(0, "worker-7", 20);
    assert_eq!(tokens.len(), 20);
    let other = fleet.proxies[1].client().await;
    let stuck = empty_reason(&other, &fleet.fixture).await;
    assert_eq!(stuck, pb::EmptyReason::MaxAckPending, "the dead worker blocks all others");

    // The operator asks a replica that has none of the leases.
    let (code, table, error) = fleet.run(1, &["leases", stream, consumer]);
    assert_eq!((code, &*error), (0, ""), "{table}");
    let rows: Vec<&str> = table.lines().skip(1).collect();
    assert_eq!(rows.len(), 20, "{table}");
    for row in &rows {
        assert!(row.contains("worker-7") && row.contains("127.0.0.1:"), "{row}");
        assert!(row.contains("59m") && row.contains("held") && row.contains("anonymous"), "{row}");
    }
    let (_, table, _) = fleet.run(1, &["consumers", stream, consumer]);
    assert!(table.contains("20 of 20"), "{table}");

    let release = ["release", stream, consumer, "--worker", "worker-7"];
    let (code, text, _) = fleet.run(1, &[&release[..], &["--dry-run"]].concat());
    assert!(code == 0 && text.contains("20 leases would be released"), "{text}");
    let (code, _, error) = fleet.run(1, &release);
    assert!(code == 2 && error.contains("--yes"), "nobody is asked: {error}");
    let stuck = empty_reason(&other, &fleet.fixture).await;
    assert_eq!(stuck, pb::EmptyReason::MaxAckPending, "nothing was released so far");
    let (code, text, _) = fleet.run(1, &[&release[..], &["--yes"]].concat());
    assert!(code == 0 && text.contains("20 leases released"), "{text}");

    let began = Instant::now();
    let request = pb::FetchRequest {
        linger: Some(prost_types::Duration { seconds: 2, nanos: 0 }),
        ..fetch(&fleet.fixture, 20, 60_000)
    };
    let taken = take(&other, request).await;
    assert!(began.elapsed() < Duration::from_secs(30), "another worker gets them at once");
    let again = taken.iter().filter(|message| message.delivery_count == 2).count();
    assert!(again > 0 && taken.len() == 20, "{again} of {} came again", taken.len());
    let late = fleet.proxies[0].client().await.ack(ack(&tokens[0])).await.unwrap_err();
    assert_eq!(reason(&late).1, "LEASE_EXPIRED", "the dead worker is not dead: {late:?}");
    let (code, text, error) = fleet.run(0, &["leases", stream, consumer, "--worker", "worker-7"]);
    assert_eq!((code, &*text, &*error), (1, "", "nothing matches\n"));
    let log = fleet.proxies[1].log();
    let line = log.lines().find(|line| line.contains("leases_released")).unwrap();
    for part in ["local:", "admin", "worker-7", "\"count\":20", "ReleaseLeases"] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
}

#[tokio::test]
async fn lists_have_all_replicas_and_no_secret() {
    let fleet = Fleet::start(config(), &[]).await;
    let [stream, consumer] = fleet.names();
    for (at, name) in [(0, "one"), (1, "other")] {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Secret-Header", "secret-value");
        fleet.fixture.publish_with("secret-subject", headers, "secret-payload").await;
        assert_eq!(fleet.worker(at, name, 1).len(), 1);
    }
    let waiting = fleet.proxies[0].client().await;
    let mut caller = waiting.clone();
    let request = fetch(&fleet.fixture, 1, 20_000);
    tokio::spawn(async move { caller.fetch(request).await });
    fleet.fixture.pulled().await;

    let (code, replicas, error) = fleet.run(0, &["replicas", "--json"]);
    assert_eq!((code, &*error), (0, ""));
    let rows: Vec<Value> = replicas.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
    assert_eq!(rows.len(), 2);
    for row in &rows {
        assert!(row["ready"] == true && row["natsUp"] == true && row["leases"] == "1", "{row}");
        assert!(row["startTime"].is_string() && row["keyIds"].as_array().unwrap().len() == 1);
    }
    // INFO may be two seconds old.
    let consumers = eventually("INFO to show both deliveries", || async {
        let (_, consumers, _) = fleet.run(1, &["consumers", stream, "--json"]);
        consumers.contains("\"ackPending\":\"2\"").then_some(consumers)
    })
    .await;
    let row: Value = serde_json::from_str(&consumers).unwrap();
    assert_eq!((&row["total"]["leases"], &row["total"]["waiters"]), (&"2".into(), &"1".into()));
    assert_eq!(row["shares"][1]["leases"], "1");
    let (_, leases, _) = fleet.run(0, &["leases", stream, consumer, "--json"]);
    let workers: Vec<Value> =
        leases.lines().map(|row| serde_json::from_str(row).unwrap()).collect();
    let mut workers: Vec<&str> =
        workers.iter().map(|row| row["worker"].as_str().unwrap()).collect();
    workers.sort_unstable();
    assert_eq!(workers, ["one", "other"]);
    let (code, connections, _) = fleet.run(1, &["connections", "--json"]);
    assert!(code == 0 && connections.contains("\"callsOpen\":\"1\""), "{connections}");
    let (_, released, _) =
        fleet.run(0, &["release", stream, consumer, "--all", "--dry-run", "--json"]);
    assert!(released.contains("\"released\":\"2\""), "{released}");
    for answer in [replicas, consumers, leases, connections, released] {
        let lower = answer.to_lowercase();
        for secret in ["secret", "$js.ack", "token", "payload", "header"] {
            assert!(!lower.contains(secret), "{secret} in {answer}");
        }
    }
    for command in ["replicas", "consumers", "leases", "connections"] {
        let (code, table, error) = fleet.run(0, &[command]);
        assert!(code == 0 && error.is_empty() && table.lines().count() > 1, "{table}{error}");
    }
}

#[tokio::test]
async fn replica_that_has_stopped_answering_is_named_and_the_rest_is_shown() {
    let fleet = Fleet::start(config(), &[]).await;
    fleet.fixture.publish_many(1).await;
    fleet.worker(0, "one", 1);
    fleet.proxies[1].signal("STOP");
    let (code, table, error) = fleet.run(0, &["leases"]);
    fleet.proxies[1].signal("CONT");
    assert!(code == 1 && table.contains("one"), "{table}");
    assert!(error.contains("is missing: it has not answered within 1s"), "{error}");
}

#[tokio::test]
async fn wrong_usage_and_a_watch_end_as_they_should() {
    let fleet = Fleet::start(config(), &[]).await;
    let [stream, consumer] = fleet.names();
    let (code, _, error) = fleet.run(0, &["release", stream, consumer, "--yes"]);
    assert!(code == 2 && error.contains("--all"), "nothing says which leases: {error}");
    let (code, _, error) = fleet.run(0, &["leases", "--replica", "pod-1"]);
    assert!(code == 2 && error.contains("filter.replica"), "{error}");
    let (code, _, error) = fleet.run(0, &["release", stream, consumer, "--all", "--yes"]);
    assert!(code == 1 && error.contains("no lease was released"), "{error}");
    let (code, _, error) = typed(&["replicas", "--admin-socket", "@nobody-listens"], Stdio::null());
    assert!(code == 1 && error.contains("cannot connect"), "{error}");
    let mut command = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
    command.args(["replicas", "--ops-listen", &fleet.proxies[0].ops, "--watch=200ms"]);
    let mut watch = command.stdout(Stdio::piped()).spawn().unwrap();
    tokio::time::sleep(Duration::from_secs(2)).await;
    watch.kill().unwrap();
    let output = watch.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.matches("INSTANCE").count() > 1 && !text.contains('\x1b'), "{text}");
}

/// A policy with an inspector of one stream, an inspector of all, an administrator of one stream, and a worker.
struct Rights {
    folder: TempDir,
    keys: Vec<(&'static str, String)>,
}

impl Rights {
    fn of(streams: [&str; 2]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [mine, _] = streams;
        let mut lines = Vec::new();
        let mut keys = Vec::new();
        for name in ["worker", "inspector", "overseer", "admin", "stranger"] {
            let key = NewApiKey::random(name).unwrap().unwrap();
            lines.push(key.line);
            keys.push((name, key.secret));
        }
        fs::write(folder.path().join("keys"), lines.join("\n")).unwrap();
        let policy = format!(
            "version: 1\n\
             authenticate: {{api_keys: {{file: keys}}}}\n\
             principals:\n\
             - {{name: worker, match: ['key:worker']}}\n\
             - {{name: inspector, match: ['key:inspector']}}\n\
             - {{name: overseer, match: ['key:overseer']}}\n\
             - {{name: admin, match: ['key:admin']}}\n\
             rules:\n\
             - {{principals: [worker], streams: ['*'], consumers: ['*'], verbs: [work]}}\n\
             - {{principals: [inspector], streams: [{mine}], consumers: ['*'], verbs: [inspect]}}\n\
             - {{principals: [overseer], streams: ['*'], consumers: ['*'], verbs: [inspect]}}\n\
             - {{principals: [admin], streams: [{mine}], consumers: ['*'], verbs: [inspect, admin]}}\n"
        );
        fs::write(folder.path().join("policy"), policy).unwrap();
        Self { folder, keys }
    }

    fn key(&self, name: &str) -> &str {
        &self.keys.iter().find(|(known, _)| *known == name).unwrap().1
    }
}

fn denied(status: &Status) {
    assert_eq!(reason(status), (Code::PermissionDenied, "NOT_ALLOWED".to_owned()), "{status:?}");
}

fn of_stream(stream: &str) -> LeaseFilter {
    LeaseFilter { stream: stream.to_owned(), ..LeaseFilter::default() }
}

fn releases(filter: LeaseFilter) -> ReleaseLeasesRequest {
    ReleaseLeasesRequest { filter: Some(filter), ..ReleaseLeasesRequest::default() }
}

#[tokio::test]
async fn each_operator_sees_and_changes_what_its_verbs_allow() {
    let [mine, other] = [Fixture::new(config()).await, Fixture::new(config()).await];
    let rights = Rights::of([&mine.stream, &other.stream]);
    let policy = rights.folder.path().join("policy");
    let flags = ["--policy-file", policy.to_str().unwrap()];
    let proxy = Proxy::start(NatsServer::shared(), &flags);
    proxy.ready().await;
    let mut worker = proxy.client().await;
    for fixture in [&mine, &other] {
        fixture.publish_many(2).await;
        let request = with_key(rights.key("worker"), fetch(fixture, 2, 10_000));
        assert_eq!(worker.fetch(request).await.unwrap().into_inner().messages.len(), 2);
    }
    let mut calls: AdminServiceClient<Channel> =
        AdminServiceClient::connect(format!("http://{}", proxy.grpc)).await.unwrap();

    // Without a principal, and with the verbs of a worker alone, nothing is shown.
    for name in ["stranger", "worker"] {
        let key = rights.key(name);
        denied(&calls.list_replicas(with_key(key, ListReplicasRequest {})).await.unwrap_err());
        let request = with_key(key, ListConsumersRequest::default());
        denied(&calls.list_consumers(request).await.unwrap_err());
        let request = with_key(key, ListLeasesRequest::default());
        denied(&calls.list_leases(request).await.unwrap_err());
        let request = with_key(key, ListConnectionsRequest::default());
        denied(&calls.list_connections(request).await.unwrap_err());
        let request = with_key(key, releases(of_stream(&mine.stream)));
        denied(&calls.release_leases(request).await.unwrap_err());
    }
    // A worker may ask for what it fetches from, and an inspector for what it inspects.
    let mut client = proxy.client().await;
    for (name, fixture, allowed) in [
        ("worker", &other, true),
        ("inspector", &mine, true),
        ("inspector", &other, false),
        ("stranger", &mine, false),
    ] {
        let (stream, consumer) = (fixture.stream.clone(), fixture.consumer.clone());
        let request = pb::GetConsumerRequest { stream, consumer };
        let answer = client.get_consumer(with_key(rights.key(name), request)).await;
        assert_eq!(answer.is_ok(), allowed, "{name}: {answer:?}");
        answer.err().iter().for_each(denied);
    }
    // An inspector sees its own stream, and releases nothing.
    let key = rights.key("inspector");
    let leases = calls.list_leases(with_key(key, ListLeasesRequest::default())).await.unwrap();
    let leases = leases.into_inner().leases;
    assert!(leases.len() == 2 && leases.iter().all(|lease| lease.stream == mine.stream));
    assert!(
        leases.iter().all(|lease| lease.identity == "key:worker" && lease.principal == "worker")
    );
    let request = with_key(key, ListConsumersRequest::default());
    let consumers = calls.list_consumers(request).await.unwrap().into_inner().consumers;
    assert!(consumers.len() == 1 && consumers[0].stream == mine.stream);
    assert_eq!(
        calls
            .list_replicas(with_key(key, ListReplicasRequest {}))
            .await
            .unwrap()
            .into_inner()
            .replicas
            .len(),
        1
    );
    let request = with_key(key, ListConnectionsRequest::default());
    denied(&calls.list_connections(request).await.unwrap_err());
    let named = ListLeasesRequest {
        filter: Some(LeaseFilter { consumer: other.consumer.clone(), ..of_stream(&other.stream) }),
        ..ListLeasesRequest::default()
    };
    denied(&calls.list_leases(with_key(key, named)).await.unwrap_err());
    let request = with_key(key, releases(of_stream(&mine.stream)));
    denied(&calls.release_leases(request).await.unwrap_err());
    // Only who inspects everything sees connections.
    let key = rights.key("overseer");
    let request = with_key(key, ListConnectionsRequest::default());
    let connections = calls.list_connections(request).await.unwrap().into_inner().connections;
    assert!(connections.iter().any(|connection| connection.identity == "key:worker"));
    assert!(connections.iter().all(|connection| connection.calls_total > 0));
    let leases = calls.list_leases(with_key(key, ListLeasesRequest::default())).await.unwrap();
    assert_eq!(leases.into_inner().leases.len(), 4);
    // An administrator of one stream releases there alone, also if the filter means more.
    let key = rights.key("admin");
    let worker = LeaseFilter { principal: "worker".to_owned(), ..LeaseFilter::default() };
    let answer = calls.release_leases(with_key(key, releases(worker))).await.unwrap().into_inner();
    assert_eq!(answer.released, 2);
    assert!(answer.leases.iter().all(|lease| lease.stream == mine.stream));
    let named = LeaseFilter { consumer: other.consumer.clone(), ..of_stream(&other.stream) };
    denied(&calls.release_leases(with_key(key, releases(named))).await.unwrap_err());
    let empty = calls.release_leases(with_key(key, releases(LeaseFilter::default()))).await;
    assert_eq!(reason(&empty.unwrap_err()), (Code::InvalidArgument, "INVALID_FIELD".to_owned()));
    let wrong = ListLeasesRequest { page_token: "x".repeat(50_000), ..Default::default() };
    let wrong = calls.list_leases(with_key(key, wrong)).await.unwrap_err();
    assert_eq!(reason(&wrong), (Code::InvalidArgument, "INVALID_FIELD".to_owned()));
    // A thread of its own writes the log.
    let line = eventually("the line for auditors", || async {
        let log = proxy.log();
        log.lines().find(|line| line.contains("leases_released")).map(str::to_owned)
    })
    .await;
    assert!(line.contains("key:admin") && line.contains("\"count\":2"), "{line}");

    // The command ends with 3.
    let key_file = rights.folder.path().join("inspector");
    fs::File::create(&key_file).unwrap().write_all(rights.key("inspector").as_bytes()).unwrap();
    let file = key_file.to_str().unwrap();
    let arguments = ["connections", "--addr", &proxy.grpc, "--token-file", file];
    let (code, _, error) = typed(&arguments, Stdio::null());
    assert!(code == 3 && error.contains("NOT_ALLOWED"), "{error}");
}

#[tokio::test]
async fn consumer_is_shown_with_its_settings_and_why_it_cannot_be_used() {
    let seconds = Duration::from_secs;
    let settings = pull::Config {
        max_deliver: 3,
        max_ack_pending: 50,
        backoff: vec![seconds(20), seconds(40)],
        filter_subject: String::new(),
        ..config()
    };
    let fixture = Fixture::new(settings).await;
    fixture.publish_many(3).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--max-lease", "30m"]);
    proxy.ready().await;
    let mut client = proxy.client().await;
    let mut ask = async |consumer: &str| {
        let (stream, consumer) = (fixture.stream.clone(), consumer.to_owned());
        client.get_consumer(pb::GetConsumerRequest { stream, consumer }).await
    };
    let shown = ask(&fixture.consumer).await.unwrap().into_inner();
    let whole = |length: Option<prost_types::Duration>| length.unwrap().seconds;
    let backoff: Vec<i64> = shown.backoff.iter().map(|wait| wait.seconds).collect();
    assert_eq!((shown.max_deliver, shown.max_ack_pending, backoff), (3, 50, vec![20, 40]));
    assert_eq!((shown.pending, shown.ack_pending, shown.paused), (3, 0, false));
    assert_eq!((whole(shown.unset_lease), whole(shown.max_lease)), (18, 1800));
    assert_eq!((&*shown.unsuitable, shown.max_messages), ("", 1000));
    assert!(shown.create_time.unwrap().seconds > 1_700_000_000);
    assert_eq!(reason(&ask("nobody").await.unwrap_err()).1, "CONSUMER_NOT_FOUND");
    for wrong in ["", "a.b", "*"] {
        assert_eq!(reason(&ask(wrong).await.unwrap_err()).1, "INVALID_FIELD", "{wrong}");
    }
    let none = pull::Config {
        durable_name: Some("none".to_owned()),
        ack_policy: async_nats::jetstream::consumer::AckPolicy::None,
        ..pull::Config::default()
    };
    let jetstream = &fixture.jetstream;
    jetstream.create_consumer_on_stream(none, &fixture.stream).await.unwrap();
    assert_eq!(ask("none").await.unwrap().into_inner().unsuitable, "ack_policy");
    let arguments = ["consumer", &fixture.stream, &fixture.consumer, "--addr", &proxy.grpc];
    let (code, text, _) = typed(&arguments, Stdio::null());
    assert_eq!(code, 0);
    for line in ["usable        yes", "ack pending   0 of 50", "default lease 18s"] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
    let arguments = ["consumer", &fixture.stream, "none", "--addr", &proxy.grpc];
    let (code, text, _) = typed(&arguments, Stdio::null());
    assert!(code == 1 && text.contains("no: ack_policy"), "{text}");
}
