//! The request log of a real process: which calls have a line, what a line says, and that it has no secret.

use std::time::Duration;

use fetch_proxy::pb::{self, FetchRequest, SettleRequest, Settlement, settlement::Action};
use serde_json::Value;
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch, nak, reason},
};
use tonic::Request;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

/// The lines of the request log.
fn lines(proxy: &Proxy) -> Vec<Value> {
    let log = proxy.log();
    // The last line may be half written.
    let lines = log.split_inclusive('\n').filter(|line| line.ends_with('\n'));
    let lines = lines.filter_map(|line| serde_json::from_str::<Value>(line).ok());
    lines.filter(|line| line["target"] == "request").collect()
}

async fn until(proxy: &Proxy, count: usize) -> Vec<Value> {
    eventually("lines of the request log", || async {
        let lines = lines(proxy);
        (lines.len() >= count).then_some(lines)
    })
    .await
}

fn with_ids(request: FetchRequest) -> Request<FetchRequest> {
    let mut request = Request::new(request);
    let metadata = request.metadata_mut();
    metadata.insert("x-request-id", "call-1".parse().unwrap());
    metadata.insert("traceparent", format!("00-{TRACE}-00f067aa0ba902b7-01").parse().unwrap());
    metadata.insert("x-secret", "secret-header".parse().unwrap());
    request
}

/// Fields of a line, except those that every line has.
fn fields(line: &Value) -> Value {
    let mut line = line.clone();
    for common in ["timestamp", "level", "message", "target", "peer", "bytes", "seconds"] {
        let field = line.as_object_mut().unwrap().remove(common);
        assert!(field.is_some_and(|field| !field.is_null()), "{common}");
    }
    line
}

#[tokio::test]
async fn only_calls_that_fail_have_a_line_by_default() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let mut client = proxy.client().await;
    fixture.publish("n", "{}").await;
    let taken = client.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
    let token = &taken.messages[0].token;
    client.ack(ack(token)).await.unwrap();
    // An everyday refusal, and a client that leaves.
    let settled = client.nak(nak(token, 0)).await;
    assert_eq!(reason(&settled.unwrap_err()).1, "LEASE_SETTLED");
    let mut left = proxy.client().await;
    let leaves = left.fetch(fetch(&fixture, 1, 30_000));
    assert!(tokio::time::timeout(Duration::from_millis(100), leaves).await.is_err());

    let unknown = FetchRequest {
        stream: fixture.stream.clone(),
        consumer: "absent".into(),
        worker: "worker-1".into(),
        n: 7,
        ..Default::default()
    };
    for _ in 0..20 {
        client.fetch(with_ids(unknown.clone())).await.unwrap_err();
    }
    let logged = until(&proxy, 2).await;
    let (first, second) = (fields(&logged[0]), fields(&logged[1]));
    assert_eq!((&first["rpc"], &first["reason"]), (&"Nak".into(), &"LEASE_SETTLED".into()));
    let why = second["why"].as_str().unwrap();
    let expected = serde_json::json!({
        "rpc": "Fetch",
        "code": "NotFound",
        "reason": "CONSUMER_NOT_FOUND",
        "why": why,
        "stream": fixture.stream,
        "consumer": "absent",
        "worker": "worker-1",
        "asked": 7,
        "principal": "anonymous",
        "identity": "anonymous",
        "request_id": "call-1",
        "trace_id": TRACE,
    });
    assert!(why.contains("absent"), "{why}");
    assert_eq!(second, expected);
    // The other calls of that second are counted.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    client.fetch(with_ids(unknown)).await.unwrap_err();
    let logged = until(&proxy, 3).await;
    let repeated: u64 = logged.iter().filter_map(|line| line["repeated"].as_u64()).sum();
    let written = logged.iter().filter(|line| line["rpc"] == "Fetch").count() as u64;
    assert_eq!(repeated + written, 21, "{logged:?}");
    let other = |line: &str| line.contains("a call was refused") && line.contains("Fetch");
    assert!(!proxy.log().lines().any(other), "a refused Fetch has one line");
}

#[tokio::test]
async fn every_call_has_a_line_if_that_is_asked_for() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--request-log", "all"]);
    proxy.ready().await;
    let mut client = proxy.client().await;
    for _ in 0..2 {
        fixture.publish("n", "secret-payload").await;
    }
    let taken = client.fetch(with_ids(fetch(&fixture, 2, 10_000))).await.unwrap().into_inner();
    let (messages, rejected) = (taken.messages.len(), taken.rejected.len());
    assert_eq!(messages + rejected, 2);
    let settlement = |token: &str| Settlement {
        number: 0,
        token: token.into(),
        action: Some(Action::Ack(Default::default())),
    };
    let token = taken.messages[0].token.clone();
    let settlements = vec![settlement(&token), settlement("nonsense")];
    client.settle(SettleRequest { settlements, ..Default::default() }).await.unwrap();

    let logged = until(&proxy, 2).await;
    let (fetched, settled) = (fields(&logged[0]), fields(&logged[1]));
    assert_eq!((&fetched["rpc"], &fetched["code"]), (&"Fetch".into(), &"OK".into()));
    assert_eq!((&fetched["messages"], &fetched["asked"]), (&messages.into(), &2.into()));
    assert!(logged[0]["bytes"].as_u64().unwrap() > 28, "two payloads of 14 bytes");
    assert_eq!((&settled["tokens"], &settled["failed"]), (&2.into(), &1.into()));
    let start = pb::ConsumeStart {
        stream: fixture.stream.clone(),
        consumer: fixture.consumer.clone(),
        ..Default::default()
    };
    let frame = pb::ConsumeRequest { start: Some(start), ..Default::default() };
    let mut frames =
        client.consume(futures_util::stream::iter([frame])).await.unwrap().into_inner();
    while frames.message().await.unwrap().is_some() {}
    let logged = until(&proxy, 3).await;
    let consumed = fields(&logged[2]);
    assert_eq!((&consumed["rpc"], &consumed["code"]), (&"Consume".into(), &"OK".into()));
    assert_eq!(consumed["consumer"], fixture.consumer.as_str());
    for secret in [&*token, "nonsense", "secret-payload", "secret-header"] {
        assert!(!proxy.log().contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn no_call_has_a_line_if_the_request_log_is_off() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--request-log", "off"]);
    proxy.ready().await;
    let mut client = proxy.client().await;
    let unknown = FetchRequest { consumer: "absent".into(), ..fetch(&fixture, 1, 0) };
    client.fetch(unknown).await.unwrap_err();
    eventually("the seldom line", || async {
        proxy.log().contains("a call was refused").then_some(())
    })
    .await;
    assert!(lines(&proxy).is_empty());
}
