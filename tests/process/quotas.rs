//! The limits of each principal: a principal that has reached a limit is refused, and no other is.

use std::{
    fs,
    time::{Duration, Instant},
};

use fetch_proxy::{
    access::NewApiKey,
    pb::{self, settlement::Action},
};
use futures_util::future::join_all;
use prost::Message as _;
use tempfile::TempDir;
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, acking, fetch, reason, with_key},
    scrape::Scrape,
    until,
};
use tokio::net::TcpStream;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

/// How long a proxy takes at most to use a new file: a look every two seconds, on a busy machine.
const SEEN: Duration = Duration::from_secs(8);

/// A proxy with a policy, whose principals `orders` and `other` may work at one consumer.
struct Limited {
    fixture: Fixture,
    folder: TempDir,
    orders: String,
    other: String,
    proxy: Proxy,
}

impl Limited {
    /// `limits` are those of `orders`.
    async fn start(limits: &str) -> Self {
        Self::start_with(limits, &[]).await
    }

    /// With more flags.
    async fn start_with(limits: &str, flags: &[&str]) -> Self {
        let fixture = Fixture::new(config()).await;
        let folder = tempfile::tempdir().unwrap();
        let [orders, other] =
            ["orders", "other"].map(|name| NewApiKey::random(name).unwrap().unwrap());
        fs::write(folder.path().join("keys"), [orders.line, other.line].join("\n")).unwrap();
        write(&folder, &fixture, limits);
        let file = folder.path().join("policy");
        let flags = [&["--policy-file", file.to_str().unwrap()][..], flags].concat();
        let proxy = Proxy::start(NatsServer::shared(), &flags);
        proxy.ready().await;
        Self { fixture, folder, orders: orders.secret, other: other.secret, proxy }
    }

    async fn change(&self, limits: &str) {
        let loads = || self.proxy.log().matches("a policy is in use").count();
        let before = loads();
        write(&self.folder, &self.fixture, limits);
        let loaded = || async { (loads() > before).then_some(()) };
        assert!(until(SEEN, loaded).await.is_some(), "{}", self.proxy.log());
    }

    fn fetch(&self, key: &str, n: u32, wait: i64) -> Request<pb::FetchRequest> {
        with_key(key, fetch(&self.fixture, n, wait))
    }

    /// A Fetch of `orders` that waits. It is repeated if another call has its place for a moment.
    async fn wait(&self, client: &Client) -> Waiting {
        let (mut client, key) = (client.clone(), self.orders.clone());
        let request = fetch(&self.fixture, 1, 60_000);
        let call = tokio::spawn(async move {
            while let Err(refused) = client.fetch(with_key(&key, request.clone())).await {
                assert_eq!(reason(&refused).1, "WAITER_LIMIT");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        self.fixture.pulled().await;
        call
    }

    /// The refusal of a Fetch of `orders` that takes what is there.
    async fn refused(&self, client: &Client) -> Option<Status> {
        client.clone().fetch(self.fetch(&self.orders, 1, 0)).await.err()
    }
}

type Waiting = tokio::task::JoinHandle<()>;

fn write(folder: &TempDir, fixture: &Fixture, limits: &str) {
    let (stream, consumer) = (&fixture.stream, &fixture.consumer);
    let policy = format!(
        "version: 1\n\
         authenticate: {{api_keys: {{file: keys}}}}\n\
         principals:\n\
         - {{name: orders, match: ['key:orders'], limits: {{{limits}}}}}\n\
         - {{name: other, match: ['key:other']}}\n\
         rules:\n\
         - {{principals: ['*'], streams: [{stream}], consumers: [{consumer}], verbs: [work]}}\n"
    );
    let part = folder.path().join("part");
    fs::write(&part, policy).unwrap();
    fs::rename(part, folder.path().join("policy")).unwrap();
}

/// The status is this refusal, and names the principal as the one whose limit is reached.
fn assert_is_limit(status: &Status, name: &str) {
    assert_eq!(reason(status), (Code::ResourceExhausted, name.to_owned()), "{status:?}");
    let details = status.get_error_details();
    let quota = &details.quota_failure().unwrap().violations[0];
    assert_eq!(quota.subject, "principal:orders");
    assert_eq!(details.error_info().unwrap().metadata["principal"], "orders");
    let retry = details.retry_info().unwrap().retry_delay.unwrap();
    assert!(!retry.is_zero() && retry <= Duration::from_secs(1), "{retry:?}");
    let pushback = status.metadata().get("grpc-retry-pushback-ms").unwrap().to_str().unwrap();
    assert_eq!(pushback.parse::<u128>().unwrap(), retry.as_micros().div_ceil(1000));
}

#[tokio::test]
async fn open_fetch_calls_of_a_principal_are_limited_and_those_of_others_are_not() {
    let limited = Limited::start("max_waiters: 2").await;
    let client = limited.proxy.client().await;
    let (first, second) = (limited.wait(&client).await, limited.wait(&client).await);
    // Another connection of the same principal.
    let another = limited.proxy.client().await;
    let refused = eventually("the refusal", || limited.refused(&another)).await;
    assert_is_limit(&refused, "WAITER_LIMIT");
    let mut foreign = limited.proxy.client().await;
    foreign.fetch(limited.fetch(&limited.other, 1, 0)).await.unwrap();
    // Only a Fetch is a waiter.
    let invalid = client.clone().ack(with_key(&limited.orders, ack("x"))).await.unwrap_err();
    assert_eq!(reason(&invalid).1, "TOKEN_INVALID");
    first.abort();
    let served = || async { limited.refused(&another).await.is_none().then_some(()) };
    eventually("the place of the call that left", served).await;
    second.abort();
}

#[tokio::test]
async fn principal_over_its_limit_does_not_ask_for_a_place_of_the_replica() {
    let limited = Limited::start_with("max_waiters: 1", &["--max-waiters", "1"]).await;
    let client = limited.proxy.client().await;
    let open = limited.wait(&client).await;
    let mut foreign = client.clone();
    let refused = foreign.fetch(limited.fetch(&limited.other, 1, 0)).await.unwrap_err();
    assert_eq!(reason(&refused).1, "WAITER_LIMIT");
    let details = refused.get_error_details();
    let subject = &details.quota_failure().unwrap().violations[0].subject;
    assert_eq!(subject, "replica", "it has no limit of its own");
    assert_is_limit(&limited.refused(&client).await.unwrap(), "WAITER_LIMIT");
    open.abort();
}

#[tokio::test]
async fn calls_of_a_principal_are_limited_of_all_kinds_together() {
    let limited = Limited::start("max_calls: 1").await;
    let mut client = limited.proxy.client().await;
    let open = limited.wait(&client).await;
    let refused = eventually("the refusal", || limited.refused(&client)).await;
    assert_is_limit(&refused, "CALL_LIMIT");
    let refused = client.ack(with_key(&limited.orders, ack("x"))).await.unwrap_err();
    assert_is_limit(&refused, "CALL_LIMIT");
    let invalid = client.ack(with_key(&limited.other, ack("x"))).await.unwrap_err();
    assert_eq!(reason(&invalid).1, "TOKEN_INVALID");
    open.abort();
}

#[tokio::test]
async fn call_counts_until_its_answer_is_written() {
    let limited = Limited::start("max_calls: 1").await;
    limited.fixture.publish("n", "x").await;
    // A client that takes headers, and not one byte of an answer.
    let socket = TcpStream::connect(&limited.proxy.grpc).await.unwrap();
    let mut unread = h2::client::Builder::new();
    let unread = unread.initial_window_size(0).handshake::<_, bytes::Bytes>(socket);
    let (send, connection) = unread.await.unwrap();
    let driver = tokio::spawn(connection);
    let request = http::Request::post("http://proxy/fetchproxy.v1.FetchService/Fetch")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("authorization", format!("Bearer {}", limited.orders))
        .body(())
        .unwrap();
    let (answer, mut body) = send.ready().await.unwrap().send_request(request, false).unwrap();
    let message = fetch(&limited.fixture, 1, 10_000).encode_to_vec();
    let length = u32::try_from(message.len()).unwrap().to_be_bytes();
    let frame = [&[0], &length[..], &message].concat();
    body.send_data(frame.into(), true).unwrap();
    let answer = answer.await.unwrap();
    assert_eq!(answer.headers().get("grpc-status"), None, "it has a message");
    let client = limited.proxy.client().await;
    assert_is_limit(&limited.refused(&client).await.unwrap(), "CALL_LIMIT");
    driver.abort();
    let served = || async { limited.refused(&client).await.is_none().then_some(()) };
    eventually("the place of the call", served).await;
}

#[tokio::test]
async fn leases_of_a_principal_are_limited_until_it_settles_them() {
    let limited = Limited::start("max_leases: 3").await;
    for _ in 0..5 {
        limited.fixture.publish("n", "x").await;
    }
    let mut client = limited.proxy.client().await;
    let mut held = Vec::new();
    while held.len() < 3 {
        let answer = client.fetch(limited.fetch(&limited.orders, 10, 10_000)).await.unwrap();
        held.extend(answer.into_inner().messages);
    }
    assert_eq!(held.len(), 3, "the number of a Fetch is lowered to what is left");
    assert_is_limit(&limited.refused(&client).await.unwrap(), "LEASE_LIMIT");
    let foreign = client.fetch(limited.fetch(&limited.other, 1, 10_000)).await.unwrap();
    assert_eq!(foreign.into_inner().messages.len(), 1);
    client.ack(with_key(&limited.orders, ack(&held[0].token))).await.unwrap();
    let answer = client.fetch(limited.fetch(&limited.orders, 10, 10_000)).await.unwrap();
    assert_eq!(answer.into_inner().messages.len(), 1, "one place is free again");
    assert_is_limit(&limited.refused(&client).await.unwrap(), "LEASE_LIMIT");
}

#[tokio::test]
async fn principal_with_one_lease_loops_with_one_call_a_message() {
    let limited = Limited::start("max_leases: 1").await;
    for _ in 0..6 {
        limited.fixture.publish("n", "x").await;
    }
    let mut client = limited.proxy.client().await;
    let first = client.fetch(limited.fetch(&limited.orders, 1, 10_000)).await.unwrap();
    let mut token = first.into_inner().messages[0].token.clone();
    for _ in 0..5 {
        let request = acking(&token, fetch(&limited.fixture, 1, 10_000));
        let answer = client.fetch(with_key(&limited.orders, request)).await.unwrap().into_inner();
        assert_eq!((answer.failed, answer.messages.len()), (0, 1), "{answer:?}");
        token.clone_from(&answer.messages[0].token);
    }
    // An Extend frees nothing. The answer says whose limit is reached.
    let settlements = vec![pb::Settlement {
        number: 0,
        token: token.clone(),
        action: Some(Action::Extend(pb::ExtendAction::default())),
    }];
    let request = pb::FetchRequest { settlements, ..fetch(&limited.fixture, 1, 60_000) };
    let answer = client.fetch(with_key(&limited.orders, request)).await.unwrap().into_inner();
    let error = answer.error.unwrap();
    assert_eq!((&*error.reason, &*error.metadata["principal"]), ("LEASE_LIMIT", "orders"));
}

#[tokio::test]
async fn calls_in_a_second_are_limited_and_a_settle_counts_as_one() {
    let limited = Limited::start("calls_per_second: 1, burst: 3").await;
    let client = limited.proxy.client().await;
    let settle = || {
        let (mut client, key) = (client.clone(), &limited.orders);
        let settlement = |_| pb::Settlement {
            number: 0,
            token: "x".to_owned(),
            action: Some(Action::Ack(pb::AckAction {})),
        };
        let settlements = (0..1000).map(settlement).collect();
        let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
        async move { client.settle(with_key(key, request)).await }
    };
    let began = Instant::now();
    let answers = join_all((0..40).map(|_| settle())).await;
    let most = 3 + began.elapsed().as_secs() as usize + 1;
    let (done, refused): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
    assert!((3..=most).contains(&done.len()), "{} of at most {most}", done.len());
    let refusals: Vec<Status> = refused.into_iter().filter_map(Result::err).collect();
    for refusal in &refusals {
        assert_is_limit(refusal, "RATE_LIMIT");
    }
    let waits = refusals.iter().filter_map(|it| it.get_details_retry_info()?.retry_delay);
    // The table of reasons has a second. A call that comes a moment later waits for less.
    assert!(waits.min().unwrap() < Duration::from_secs(1), "it is the time until the next call");
    let mut foreign = client.clone();
    for _ in 0..10 {
        foreign.fetch(limited.fetch(&limited.other, 1, 0)).await.unwrap();
    }
    // The wait that the refusal names is enough.
    let refused = eventually("a refusal", || async { settle().await.err() }).await;
    let wait = refused.get_details_retry_info().unwrap().retry_delay.unwrap();
    tokio::time::sleep(wait).await;
    settle().await.unwrap();
}

#[tokio::test]
async fn changed_limit_counts_with_the_calls_that_are_open() {
    let limited = Limited::start("max_waiters: 1").await;
    let client = limited.proxy.client().await;
    let mut open = vec![limited.wait(&client).await];
    let refused = eventually("the refusal", || limited.refused(&client)).await;
    assert_is_limit(&refused, "WAITER_LIMIT");
    limited.change("max_waiters: 2").await;
    assert!(limited.refused(&client).await.is_none(), "the raised limit is used");
    open.push(limited.wait(&client).await);
    let refused = eventually("the refusal", || limited.refused(&client)).await;
    assert_is_limit(&refused, "WAITER_LIMIT");
    limited.change("max_waiters: 1").await;
    open.pop().unwrap().abort();
    // The first call was open before all of these limits, and still counts.
    let refused = limited.refused(&client).await.unwrap();
    assert_is_limit(&refused, "WAITER_LIMIT");
    open.pop().unwrap().abort();
    let served = || async { limited.refused(&client).await.is_none().then_some(()) };
    eventually("the end of the limit", served).await;
}

#[tokio::test]
async fn limits_of_the_file_are_for_each_principal_by_itself() {
    let limited = Limited::start("max_calls: 50").await;
    let file = limited.folder.path().join("policy");
    let text = fs::read_to_string(&file).unwrap().replace(", limits: {max_calls: 50}", "");
    fs::write(&file, text.replace("principals:\n", "limits: {max_waiters: 1}\nprincipals:\n"))
        .unwrap();
    let client = limited.proxy.client().await;
    let open = limited.wait(&client).await;
    let refused = eventually("the refusal", || limited.refused(&client)).await;
    assert_is_limit(&refused, "WAITER_LIMIT");
    let mut foreign = client.clone();
    foreign.fetch(limited.fetch(&limited.other, 1, 0)).await.unwrap();
    open.abort();
}

#[tokio::test]
async fn first_refusal_of_each_principal_is_in_the_log() {
    let limits = "calls_per_second: 1, burst: 1";
    let limited = Limited::start(limits).await;
    let file = limited.folder.path().join("policy");
    let (text, other) = (fs::read_to_string(&file).unwrap(), "match: ['key:other']");
    fs::write(&file, text.replace(other, &format!("{other}, limits: {{{limits}}}"))).unwrap();
    let client = limited.proxy.client().await;
    for (principal, key) in [("orders", &limited.orders), ("other", &limited.other)] {
        let refused = || {
            let (mut client, request) = (client.clone(), limited.fetch(key, 1, 0));
            async move { client.fetch(request).await.err() }
        };
        let refused = eventually("a refusal", refused).await;
        assert_eq!(reason(&refused).1, "RATE_LIMIT");
        let logged = || async {
            let log = limited.proxy.log();
            let lines = log.lines().filter(|line| line.contains("a call was refused"));
            let name = format!("\"principal\":\"{principal}\"");
            (lines.filter(|line| line.contains(&name)).count() == 1).then_some(())
        };
        eventually("its line", logged).await;
    }
}

#[tokio::test]
async fn refusals_of_principals_are_counted_by_their_name() {
    let proxied = Limited::start("max_calls: 1").await;
    let client = proxied.proxy.client().await;
    let waiting = proxied.wait(&client).await;
    let limited = client.clone().fetch(proxied.fetch(&proxied.orders, 1, 0)).await.unwrap_err();
    assert_eq!(reason(&limited).1, "CALL_LIMIT");
    let foreign = pb::FetchRequest { consumer: "foreign".into(), ..fetch(&proxied.fixture, 1, 0) };
    let denied = client.clone().fetch(with_key(&proxied.other, foreign)).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    client.clone().fetch(fetch(&proxied.fixture, 1, 0)).await.unwrap_err();
    let seen = Scrape::of(&proxied.proxy.ops);
    for (series, value) in [
        ("principal_limited_total{principal=\"orders\",limit=\"calls\"}", 1.0),
        ("denials_total{principal=\"other\",verb=\"fetch\"}", 1.0),
        ("authentication_failures_total{fault=\"missing\"}", 1.0),
        ("principal_calls{principal=\"orders\"}", 1.0),
        ("principal_waiters{principal=\"orders\"}", 1.0),
        ("file_unusable{file=\"policy\"}", 0.0),
    ] {
        assert_eq!(seen.value(&format!("fetchproxy_{series}")), value, "{series}");
    }
    fs::write(proxied.folder.path().join("policy"), "nonsense").unwrap();
    let unusable = || async {
        let seen = Scrape::of(&proxied.proxy.ops);
        (seen.value("fetchproxy_file_unusable{file=\"policy\"}") == 1.0).then_some(())
    };
    assert!(until(SEEN, unusable).await.is_some());
    // The waiting call gets a message.
    proxied.fixture.publish("x", "1").await;
    let leases = || async {
        let seen = Scrape::of(&proxied.proxy.ops);
        let leases = seen.series.get("fetchproxy_principal_leases{principal=\"orders\"}");
        (leases == Some(&1.0)).then_some(())
    };
    assert!(until(SEEN, leases).await.is_some());
    drop(waiting);
}
