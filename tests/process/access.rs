//! A policy in use: who is accepted, what is refused, and what a change of the file does to open calls.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use fetch_proxy::{
    access::NewApiKey,
    pb::{self, Outcome, fetch_service_client::FetchServiceClient, settlement::Action},
};
use hyper_util::rt::TokioIo;
use tempfile::TempDir;
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, acking, extend, fetch, reason, waiting, with_key},
};
use tokio::net::TcpStream;
use tonic::{Code, Request, Status, transport::Endpoint};
use tonic_types::StatusExt as _;

/// A policy file, and a key for each of its principals.
struct Policy {
    folder: TempDir,
    orders: [String; 2],
    other: String,
    dispatcher: String,
}

impl Policy {
    /// The principals `orders` and `other` may work at this consumer, and `dispatcher` may settle all.
    fn of(fixture: &Fixture) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let names = ["orders-1", "orders-2", "other", "dispatcher"];
        let keys = names.map(|name| NewApiKey::random(name).unwrap().unwrap());
        let lines: Vec<_> = keys.iter().map(|key| key.line.clone()).collect();
        fs::write(folder.path().join("keys"), lines.join("\n")).unwrap();
        let [first, second, other, dispatcher] = keys.map(|key| key.secret);
        let policy = Self { folder, orders: [first, second], other, dispatcher };
        policy.write(&policy.text(fixture));
        policy
    }

    fn text(&self, fixture: &Fixture) -> String {
        let (stream, consumer) = (&fixture.stream, &fixture.consumer);
        format!(
            "version: 1\n\
             authenticate: {{api_keys: {{file: keys}}}}\n\
             principals:\n\
             - {{name: orders, match: ['key:orders-*']}}\n\
             - {{name: other, match: ['key:other']}}\n\
             - {{name: dispatcher, match: ['key:dispatcher']}}\n\
             rules:\n\
             - {{principals: [orders, other], streams: [{stream}], consumers: [{consumer}], verbs: [work]}}\n\
             - {{principals: [dispatcher], streams: ['*'], consumers: ['*'], verbs: [settle-any]}}\n"
        )
    }

    fn write(&self, text: &str) {
        let part = self.folder.path().join("part");
        fs::write(&part, text).unwrap();
        fs::rename(part, self.file()).unwrap();
    }

    fn file(&self) -> std::path::PathBuf {
        self.folder.path().join("policy.yaml")
    }

    fn serve(&self) -> Proxy {
        Proxy::start(NatsServer::shared(), &["--policy-file", self.file().to_str().unwrap()])
    }
}

fn detail(status: &Status, name: &str) -> Option<String> {
    status.get_details_error_info().unwrap().metadata.get(name).cloned()
}

/// One message, as the holder of this key takes it.
async fn taken(client: &mut Client, fixture: &Fixture, key: &str) -> String {
    fixture.publish("n", "x").await;
    let request = with_key(key, fetch(fixture, 1, 10_000));
    let answer = client.fetch(request).await.unwrap().into_inner();
    answer.messages[0].token.clone()
}

#[tokio::test]
async fn caller_is_accepted_by_its_credential_alone() {
    let fixture = Fixture::new(config()).await;
    let policy = Policy::of(&fixture);
    let proxy = policy.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    let why = |status: &Status| {
        assert_eq!(reason(status), (Code::Unauthenticated, "UNAUTHENTICATED".to_owned()));
        detail(status, "why").unwrap()
    };
    let missing = client.fetch(fetch(&fixture, 1, 0)).await.unwrap_err();
    assert_eq!(why(&missing), "missing");
    let missing = client.ack(ack("x")).await.unwrap_err();
    assert_eq!(why(&missing), "missing");
    let unknown = NewApiKey::random("orders-1").unwrap().unwrap().secret;
    let unknown = client.fetch(with_key(&unknown, fetch(&fixture, 1, 0))).await.unwrap_err();
    assert_eq!(why(&unknown), "api_key");
    let mut twice = with_key(&policy.orders[0], fetch(&fixture, 1, 0));
    twice.metadata_mut().append("authorization", "Bearer x".parse().unwrap());
    assert_eq!(why(&client.fetch(twice).await.unwrap_err()), "malformed");
    for key in &policy.orders {
        client.fetch(with_key(key, fetch(&fixture, 1, 0))).await.unwrap();
    }
    let log = proxy.log();
    assert!(policy.orders.iter().all(|key| !log.contains(&**key)), "a key is in the log");
}

#[tokio::test]
async fn fetch_that_settles_needs_the_right_for_each_part() {
    let fixture = Fixture::new(config()).await;
    let policy = Policy::of(&fixture);
    let proxy = policy.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    let token = taken(&mut client, &fixture, &policy.orders[0]).await;
    fixture.publish("n", "x").await;
    // A caller that may only settle: its call is refused, and has settled nothing.
    let request = acking(&token, fetch(&fixture, 1, 0));
    let refused = client.fetch(with_key(&policy.dispatcher, request.clone())).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::PermissionDenied, "NOT_ALLOWED".to_owned()));
    assert_eq!(detail(&refused, "verb").as_deref(), Some("fetch"));
    assert_eq!(fixture.info().await.num_ack_pending, 1);
    // A caller that may fetch, and has the token of another principal: nothing is settled or fetched.
    let answer = client.fetch(with_key(&policy.other, request.clone())).await.unwrap().into_inner();
    assert_eq!((answer.empty_reason(), answer.failed), (pb::EmptyReason::Settle, 1));
    let error = answer.results[0].error.clone().unwrap();
    assert_eq!((&*error.reason, &*error.metadata["detail"]), ("NOT_ALLOWED", "foreign_token"));
    let info = fixture.info().await;
    assert_eq!((info.num_ack_pending, info.num_pending), (1, 1));
    // Its own token is settled, and the next message follows.
    let request = pb::FetchRequest { max_wait: testkit::millis(10_000), ..request };
    let answer = client.fetch(with_key(&policy.orders[1], request)).await.unwrap().into_inner();
    assert_eq!(answer.results[0].outcome(), Outcome::Confirmed);
    assert_eq!(answer.messages.len(), 1);
}

#[tokio::test]
async fn refusal_is_the_same_whether_the_stream_exists_or_not() {
    let fixture = Fixture::new(config()).await;
    let policy = Policy::of(&fixture);
    let proxy = policy.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    let hidden = Fixture::new(config()).await;
    let absent = pb::FetchRequest { stream: "absent".to_owned(), ..fetch(&fixture, 1, 0) };
    for request in [fetch(&hidden, 1, 0), absent] {
        let stream = request.stream.clone();
        let refused = client.fetch(with_key(&policy.other, request)).await.unwrap_err();
        assert_eq!(reason(&refused), (Code::PermissionDenied, "NOT_ALLOWED".to_owned()));
        for (name, value) in [("principal", "other"), ("verb", "fetch"), ("stream", &stream)] {
            assert_eq!(detail(&refused, name).as_deref(), Some(value), "{name}");
        }
    }
    let refused = client.fetch(with_key(&policy.dispatcher, fetch(&fixture, 1, 0))).await;
    assert_eq!(reason(&refused.unwrap_err()).1, "NOT_ALLOWED", "it may only settle");
}

#[tokio::test]
async fn token_belongs_to_the_principal_that_fetched_it() {
    let fixture = Fixture::new(config()).await;
    let policy = Policy::of(&fixture);
    let proxy = policy.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    let [first, second] = &policy.orders;
    let token = taken(&mut client, &fixture, first).await;
    let refused = client.ack(with_key(&policy.other, ack(&token))).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::PermissionDenied, "NOT_ALLOWED".to_owned()));
    assert_eq!(detail(&refused, "detail").as_deref(), Some("foreign_token"));
    assert_eq!(detail(&refused, "stream"), None, "a token tells nothing");
    let refused = client.extend(with_key(&policy.other, extend(&token, 60_000))).await;
    assert_eq!(reason(&refused.unwrap_err()).1, "NOT_ALLOWED");
    client.extend(with_key(second, extend(&token, 60_000))).await.unwrap();
    let acked = client.ack(with_key(second, ack(&token))).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed, "another identity of the principal");

    // One Settle with its own token, a foreign token, and both for a dispatcher.
    let own = taken(&mut client, &fixture, &policy.other).await;
    let foreign = taken(&mut client, &fixture, first).await;
    let settle = |tokens: &[&str]| pb::SettleRequest {
        settlements: tokens
            .iter()
            .map(|token| pb::Settlement {
                number: 0,
                token: (*token).to_owned(),
                action: Some(Action::Ack(pb::AckAction {})),
            })
            .collect(),
        ..pb::SettleRequest::default()
    };
    let request = with_key(&policy.other, settle(&[&own, &foreign]));
    let results = client.settle(request).await.unwrap().into_inner().results;
    assert_eq!(results[0].outcome(), Outcome::Confirmed);
    assert_eq!(results[1].error.as_ref().unwrap().reason, "NOT_ALLOWED");
    let request = with_key(&policy.dispatcher, settle(&[&foreign]));
    let results = client.settle(request).await.unwrap().into_inner().results;
    assert_eq!(results[0].outcome(), Outcome::Confirmed);
}

#[tokio::test]
async fn right_that_is_lost_while_a_call_waits_gives_its_message_back() {
    let fixture = Fixture::new(config()).await;
    let policy = Policy::of(&fixture);
    let proxy = policy.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    let held = taken(&mut client, &fixture, &policy.other).await;
    let (mut waiting, key) = (client.clone(), policy.other.clone());
    let request = with_key(&key, fetch(&fixture, 1, 20_000));
    let call = tokio::spawn(async move { waiting.fetch(request).await });
    fixture.pulled().await;
    policy.write(&policy.text(&fixture).replace("[orders, other]", "[orders]"));
    let loaded =
        || async { (proxy.log().matches("a policy is in use").count() == 2).then_some(()) };
    eventually("the new policy", loaded).await;
    fixture.publish("n", "x").await;
    let refused = call.await.unwrap().unwrap_err();
    assert_eq!(reason(&refused).1, "NOT_ALLOWED");
    let refused = client.ack(with_key(&policy.other, ack(&held))).await.unwrap_err();
    assert_eq!(reason(&refused).1, "NOT_ALLOWED", "a right to settle is asked as it is now");
    let request = with_key(&policy.orders[0], fetch(&fixture, 1, 10_000));
    let answer = client.fetch(request).await.unwrap().into_inner();
    assert_eq!(answer.messages.len(), 1, "the message went to the next caller");
    assert_ne!(answer.messages[0].token, held);
}

#[tokio::test]
async fn wrong_policy_changes_nothing_and_is_named_once() {
    let fixture = Fixture::new(config()).await;
    let policy = Policy::of(&fixture);
    let proxy = policy.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    policy.write("version: 2");
    let said = || async { proxy.log().contains("the policy cannot be used").then_some(()) };
    eventually("the mistake in the log", said).await;
    client.fetch(with_key(&policy.other, fetch(&fixture, 1, 0))).await.unwrap();
    policy.write(&policy.text(&fixture));
    let said = || async { proxy.log().contains("the policy can be used again").then_some(()) };
    eventually("the end of the mistake", said).await;
    assert_eq!(proxy.log().matches("the policy cannot be used").count(), 1);
}

#[tokio::test]
async fn key_is_sent_by_hand_from_its_file() {
    let fixture = Fixture::new(config()).await;
    let policy = Policy::of(&fixture);
    let proxy = policy.serve();
    proxy.ready().await;
    fixture.publish("n", "by hand").await;
    let file = policy.folder.path().join("key");
    fs::write(&file, format!("{}\n", policy.other)).unwrap();
    let run = |flags: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
        command.args(["fetch", &fixture.stream, &fixture.consumer, "--addr", &proxy.grpc]);
        let output = command.args(flags).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.success(), text(&output.stdout), text(&output.stderr))
    };
    let (well, _, errors) = run(&[]);
    assert!(!well && errors.contains("UNAUTHENTICATED"), "{errors}");
    let (well, out, errors) = run(&["--token-file", file.to_str().unwrap()]);
    assert!(well && out.contains("by hand"), "{out}{errors}");
}

#[tokio::test]
async fn credential_of_a_caller_does_not_matter_without_a_policy() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let mut client = proxy.client().await;
    let token = taken(&mut client, &fixture, "anything").await;
    client.ack(Request::new(ack(&token))).await.unwrap();
}

#[tokio::test]
async fn tokens_from_before_the_policy_are_accepted_if_it_says_so() {
    let fixture = Fixture::new(config()).await;
    let policy = Policy::of(&fixture);
    let keys = policy.folder.path().join("token-keys");
    fs::write(&keys, fetch_proxy::token::new_key_line().unwrap()).unwrap();
    let shared = ["--token-key-file", keys.to_str().unwrap(), "--cluster", "turned-on"];
    let before = Proxy::start(NatsServer::shared(), &shared);
    before.ready().await;
    let [first, second] = [
        taken(&mut before.client().await, &fixture, "x").await,
        taken(&mut before.client().await, &fixture, "x").await,
    ];
    let file = policy.file();
    let flags = [&shared[..], &["--policy-file", file.to_str().unwrap()]].concat();
    let after = Proxy::start(NatsServer::shared(), &flags);
    after.ready().await;
    let mut client = after.client().await;
    let refused = client.ack(with_key(&policy.other, ack(&first))).await.unwrap_err();
    assert_eq!(reason(&refused).1, "NOT_ALLOWED");
    let accepting = "authenticate: {accept_anonymous_tokens: true, ";
    policy.write(&policy.text(&fixture).replace("authenticate: {", accepting));
    eventually("the new policy", || async {
        after.log().contains("accept_anonymous_tokens is set").then_some(())
    })
    .await;
    for token in [first, second] {
        let acked = client.ack(with_key(&policy.other, ack(&token))).await.unwrap().into_inner();
        assert_eq!(acked.outcome(), Outcome::Confirmed);
    }
}

/// A client whose connections are counted.
async fn counted_client(proxy: &Proxy) -> (Client, Arc<AtomicUsize>) {
    let (address, count) = (proxy.grpc.clone(), Arc::new(AtomicUsize::new(0)));
    let counted = count.clone();
    let connector = tower::service_fn(move |_| {
        counted.fetch_add(1, Ordering::Relaxed);
        let address = address.clone();
        async move { TcpStream::connect(address).await.map(TokioIo::new) }
    });
    let endpoint = Endpoint::from_static("http://proxy");
    let channel = endpoint.connect_with_connector(connector).await.unwrap();
    (FetchServiceClient::new(channel), count)
}

#[tokio::test]
async fn connection_ends_after_twenty_refused_credentials_in_a_row() {
    let fixture = Fixture::new(config()).await;
    let policy = Policy::of(&fixture);
    let proxy = policy.serve();
    proxy.ready().await;
    let (client, connections) = counted_client(&proxy).await;
    let refused = || async {
        let refused = client.clone().ack(ack("x")).await.unwrap_err();
        assert_eq!(reason(&refused).1, "UNAUTHENTICATED");
    };
    for _ in 0..2 {
        for _ in 0..19 {
            refused().await;
        }
        // An accepted credential between them; the token is none.
        let accepted = client.clone().ack(with_key(&policy.other, ack("x"))).await.unwrap_err();
        assert_eq!(reason(&accepted).1, "TOKEN_INVALID");
    }
    assert_eq!(connections.load(Ordering::Relaxed), 1);
    // The call that is the last is answered, and an open call on the connection stays.
    let open = with_key(&policy.other, fetch(&fixture, 1, 1_000));
    let open = waiting(&client, &fixture, open).await;
    for _ in 0..20 {
        refused().await;
    }
    let ended = || async {
        // A call may meet the end of the connection.
        let _ = client.clone().ack(ack("x")).await;
        (connections.load(Ordering::Relaxed) > 1).then_some(())
    };
    eventually("the end of the connection", ended).await;
    open.await.unwrap().unwrap();
}

/// The first frame is asked for the right to fetch, and each settlement for the right to settle its token.
#[tokio::test]
async fn stream_needs_the_rights_of_fetch_and_settle() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(2).await;
    let policy = Policy::of(&fixture);
    let (proxy, name) = (policy.serve(), fixture.consumer.clone());
    let mut client = proxy.client().await;
    let (stream, foreign) = (fixture.stream.clone(), policy.orders[0].clone());
    let taken = client.fetch(with_key(&foreign, fetch(&fixture, 1, 10_000))).await.unwrap();
    let token = taken.into_inner().messages.remove(0).token;
    let credit = Some(pb::ConsumeCredit { max_leases: Some(10), ..Default::default() });
    let start = pb::ConsumeStart { stream, consumer: name, credit, ..Default::default() };
    let start = pb::ConsumeRequest { start: Some(start), ..Default::default() };
    let action = Some(Action::Ack(pb::AckAction {}));
    let settlements = vec![pb::Settlement { token, action, number: 0 }];
    let settle = pb::ConsumeSettle { settlements, ..Default::default() };
    let settle = pb::ConsumeRequest { settle: Some(settle), ..Default::default() };
    let consume = |key: &str| {
        let frames = [start.clone(), settle.clone()];
        let request = with_key(key, futures_util::stream::iter(frames));
        let mut client = client.clone();
        async move { client.consume(request).await.unwrap().into_inner() }
    };
    let refused = consume(&policy.dispatcher).await.message().await.unwrap_err();
    assert_eq!(reason(&refused), (Code::PermissionDenied, "NOT_ALLOWED".to_owned()));
    let mut frames = consume(&policy.other).await;
    let mut results = Vec::new();
    while let Some(frame) = frames.message().await.unwrap() {
        results.extend(frame.results);
    }
    assert_eq!((results.len(), results[0].failed), (1, 1));
    assert_eq!(results[0].results[0].error.as_ref().unwrap().reason, "NOT_ALLOWED");
    // A right that is lost ends a stream when the next message is there.
    let (send, mut receive) = tokio::sync::mpsc::unbounded_channel();
    let requests = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
    let mut frames = client.consume(with_key(&policy.other, requests)).await.unwrap().into_inner();
    send.send(start).unwrap();
    assert!(frames.message().await.unwrap().unwrap().opened.is_some());
    policy.write(&policy.text(&fixture).replace("[orders, other]", "[orders]"));
    let refused = eventually("the right to be lost", || async {
        let refused = client.clone().fetch(with_key(&policy.other, fetch(&fixture, 1, 0))).await;
        refused.err()
    })
    .await;
    assert_eq!(reason(&refused).1, "NOT_ALLOWED");
    fixture.publish_many(1).await;
    let ended = loop {
        match frames.message().await {
            Ok(frame) => drop(frame.expect("it ended with OK")),
            Err(status) => break status,
        }
    };
    assert_eq!(reason(&ended), (Code::PermissionDenied, "NOT_ALLOWED".to_owned()));
    drop(send);
}

#[tokio::test]
async fn stream_of_a_key_that_is_revoked_settles_nothing_more() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let policy = Policy::of(&fixture);
    let proxy = policy.serve();
    let mut client = proxy.client().await;
    let (send, mut receive) = tokio::sync::mpsc::unbounded_channel();
    let requests = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
    let mut frames = client.consume(with_key(&policy.other, requests)).await.unwrap().into_inner();
    let start = Some(testkit::consume::start(&fixture, 1));
    send.send(pb::ConsumeRequest { start, ..Default::default() }).unwrap();
    let message = loop {
        let mut frame = frames.message().await.unwrap().expect("it has ended");
        if let Some(message) = frame.messages.pop() {
            break message;
        }
    };
    let keys = policy.folder.path().join("keys");
    let lines = fs::read_to_string(&keys).unwrap();
    let left: Vec<&str> = lines.lines().filter(|line| !line.contains("other")).collect();
    fs::write(keys, left.join("\n")).unwrap();
    let refused = eventually("the key to be revoked", || async {
        let refused = client.clone().fetch(with_key(&policy.other, fetch(&fixture, 1, 0))).await;
        refused.err()
    })
    .await;
    assert_eq!(reason(&refused).1, "UNAUTHENTICATED");
    let settlements = vec![testkit::consume::acked(&message)];
    let settle = Some(pb::ConsumeSettle { id: 7, settlements, ..Default::default() });
    send.send(pb::ConsumeRequest { settle, ..Default::default() }).unwrap();
    let ended = loop {
        match frames.message().await {
            Ok(frame) => assert_eq!(frame.expect("it ended with OK").results, []),
            Err(status) => break status,
        }
    };
    assert_eq!(reason(&ended), (Code::Unauthenticated, "UNAUTHENTICATED".to_owned()));
    assert_eq!(fixture.info().await.num_ack_pending, 1, "the message is not settled");
}
