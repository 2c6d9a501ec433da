//! Traces, with a real receiver: off unless they are asked for, spans by the table of the conventions, links from
//! message to Fetch to settlement, and a receiver that is dead or hangs.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use fetch_proxy::pb;
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, acking, fetch},
    scrape::{Scrape, get},
    traces::{TraceReceiver, link_attribute, silent_receiver},
};
use tonic::Request;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PUBLISHER: &str = "00f067aa0ba902b7";
const CALLER: &str = "b7ad6b7169203331";
/// Spans are sent soon.
const SOON: (&str, &str) = ("OTEL_BSP_SCHEDULE_DELAY", "50");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn traced(receiver: &TraceReceiver, variables: &[(&str, &str)]) -> Proxy {
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", &*receiver.url);
    let variables = [&[endpoint, SOON], variables].concat();
    Proxy::start_with(&NatsServer::shared().url(), &[], &variables)
}

#[test]
fn variable_that_cannot_be_used_ends_the_program() {
    for (name, value) in [
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://[nonsense"),
        ("OTEL_TRACES_SAMPLER", "sometimes"),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
            .args(["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"])
            .env("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317")
            .env(name, value)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        let error = said.lines().find(|line| line.starts_with("error: ")).unwrap();
        assert!(error.contains(name), "{error}");
    }
}

#[tokio::test]
async fn call_has_a_span_below_the_span_of_its_caller() {
    let receiver = TraceReceiver::start().await;
    let proxy = traced(&receiver, &[]);
    let fixture = Fixture::new(config()).await;
    let mut request = Request::new(fetch(&fixture, 1, 0));
    let parent = format!("00-{TRACE}-{CALLER}-01");
    request.metadata_mut().insert("traceparent", parent.parse().unwrap());
    proxy.ready().await;
    proxy.client().await.fetch(request).await.unwrap();
    let call = &receiver.named("fetchproxy.v1.FetchService/Fetch", 1).await[0];
    assert_eq!(
        (hex(&call.span.trace_id), hex(&call.span.parent_span_id)),
        (TRACE.into(), CALLER.into())
    );
    assert_eq!(call.span.kind, 2, "a server");
    let port = proxy.grpc.rsplit_once(':').unwrap().1;
    for (name, value) in [
        ("rpc.system.name", "grpc"),
        ("rpc.method", "fetchproxy.v1.FetchService/Fetch"),
        ("rpc.status_code", "OK"),
        ("server.address", "127.0.0.1"),
        ("server.port", port),
        ("network.peer.address", "127.0.0.1"),
        ("fetchproxy.principal", "anonymous"),
        ("fetchproxy.empty_reason", "NO_MESSAGES"),
    ] {
        assert_eq!(call.attribute(name).as_deref(), Some(value), "{name}");
    }
    assert_eq!(call.attributes().len(), 9, "and the port of the peer: {:?}", call.attributes());
    for (name, value) in
        [("service.name", "fetch-proxy"), ("service.version", env!("CARGO_PKG_VERSION"))]
    {
        assert_eq!(call.process(name).as_deref(), Some(value), "{name}");
    }
}

#[tokio::test]
async fn times_of_calls_name_their_traces_for_a_scraper_that_reads_exemplars() {
    let receiver = TraceReceiver::start().await;
    let proxy = traced(&receiver, &[("OTEL_TRACES_SAMPLER", "parentbased_always_on")]);
    let fixture = Fixture::new(config()).await;
    let unsampled = TRACE.replace('4', "5");
    proxy.ready().await;
    for parent in [format!("00-{TRACE}-{CALLER}-01"), format!("00-{unsampled}-{CALLER}-00")] {
        let mut request = Request::new(fetch(&fixture, 1, 0));
        request.metadata_mut().insert("traceparent", parent.parse().unwrap());
        proxy.client().await.fetch(request).await.unwrap();
    }
    proxy.client().await.ack(ack("nonsense")).await.unwrap_err();
    let settled = &receiver.named("fetchproxy.v1.FetchService/Ack", 1).await[0];
    let page = |accept| get(&proxy.ops, "/metrics", &[("Accept", accept)]).body;
    let open = String::from_utf8(page("application/openmetrics-text;version=1.0.0")).unwrap();
    for (family, trace) in [
        ("fetchproxy_fetch_seconds_bucket", TRACE.to_owned()),
        ("grpc_server_handling_seconds_bucket", hex(&settled.span.trace_id)),
    ] {
        let exemplar = format!(" # {{trace_id=\"{trace}\"}} ");
        let named =
            open.lines().filter(|line| line.starts_with(family) && line.contains(&exemplar));
        assert_eq!(named.count(), 1, "{family}");
    }
    assert!(!open.contains(&unsampled), "this trace is not sampled");
    let text = String::from_utf8(page("text/plain")).unwrap();
    assert!(text.contains("fetchproxy_fetch_seconds_count 2"));
    assert!(!text.contains("trace_id"), "the text format has no exemplars");
}

#[tokio::test]
async fn refused_call_has_its_reason_and_is_no_error_of_the_server() {
    let receiver = TraceReceiver::start().await;
    let proxy = traced(&receiver, &[]);
    let refused = proxy.client().await.ack(ack("nonsense")).await.unwrap_err();
    let call = &receiver.named("fetchproxy.v1.FetchService/Ack", 1).await[0];
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert_eq!(call.attribute("rpc.status_code").as_deref(), Some("INVALID_ARGUMENT"));
    assert_eq!(call.attribute("error.type").as_deref(), Some("TOKEN_INVALID"));
    assert_eq!(call.span.status.clone().unwrap_or_default().code, 0, "not set");
}

#[tokio::test]
async fn fetched_messages_link_to_the_spans_that_published_them() {
    let receiver = TraceReceiver::start().await;
    let proxy = traced(&receiver, &[]);
    let fixture = Fixture::new(config()).await;
    let parent = format!("00-{TRACE}-{PUBLISHER}-01");
    for (header, parent) in
        [("traceparent", &*parent), ("Traceparent", &*parent), ("traceparent", "00-x-y-z")]
    {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert(header, parent);
        fixture.publish_with("n", headers, "x").await;
    }
    proxy.ready().await;
    let request = pb::FetchRequest { worker: "w1".to_owned(), ..fetch(&fixture, 3, 10_000) };
    let request = pb::FetchRequest { linger: millis(500), ..request };
    let answer = proxy.client().await.fetch(request).await.unwrap().into_inner();
    assert_eq!(answer.messages.len(), 3);
    assert_eq!(answer.messages[0].headers["traceparent"].values, [parent], "untouched");
    let name = format!("fetch {}", fixture.stream);
    let receive = &receiver.named(&name, 1).await[0];
    assert_eq!(receive.span.kind, 3, "a client");
    for (name, value) in [
        ("messaging.system", "nats"),
        ("messaging.operation.type", "receive"),
        ("messaging.operation.name", "fetch"),
        ("messaging.destination.name", &*fixture.stream),
        ("messaging.consumer.group.name", &*fixture.consumer),
        ("messaging.batch.message_count", "3"),
        ("messaging.client.id", "w1"),
    ] {
        assert_eq!(receive.attribute(name).as_deref(), Some(value), "{name}");
    }
    assert_eq!(receive.attributes().len(), 7, "{:?}", receive.attributes());
    let call = &receiver.named("fetchproxy.v1.FetchService/Fetch", 1).await[0];
    assert!(call.is_parent_of(receive));
    assert!(receive.span.start_time_unix_nano >= call.span.start_time_unix_nano);
    let links = &receive.span.links;
    assert_eq!(links.len(), 2, "the third header is malformed: {links:?}");
    for (index, link) in links.iter().enumerate() {
        assert_eq!((hex(&link.trace_id), hex(&link.span_id)), (TRACE.into(), PUBLISHER.into()));
        let sequence = answer.messages[index].stream_sequence.to_string();
        assert_eq!(link_attribute(link, "messaging.message.id"), Some(sequence));
        assert_eq!(link_attribute(link, "messaging.nats.delivery_count").as_deref(), Some("1"));
    }
}

#[tokio::test]
async fn settlements_of_a_fetch_have_their_spans_below_it() {
    let receiver = TraceReceiver::start().await;
    let proxy = traced(&receiver, &[]);
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(2).await;
    proxy.ready().await;
    let mut client = proxy.client().await;
    let first = client.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
    let request = acking(&first.messages[0].token, fetch(&fixture, 1, 10_000));
    client.fetch(request.clone()).await.unwrap();
    let nobody = pb::FetchRequest { consumer: "nobody".to_owned(), ..request };
    client.fetch(nobody).await.unwrap();
    client.fetch(acking("nonsense", fetch(&fixture, 1, 10_000))).await.unwrap();
    let fetches = receiver.named(&format!("fetch {}", fixture.stream), 2).await;
    let acks = receiver.named(&format!("ack {}", fixture.stream), 2).await;
    let calls = receiver.named("fetchproxy.v1.FetchService/Fetch", 4).await;
    let below = |call: usize| acks.iter().filter(|ack| calls[call].is_parent_of(ack)).count();
    assert_eq!([0, 1, 2, 3].map(below), [0, 1, 1, 0]);
    let ack = acks.iter().find(|ack| calls[1].is_parent_of(ack)).unwrap();
    assert_eq!(ack.span.links[0].span_id, fetches[0].span.span_id, "to the Fetch of its message");
    assert!(calls[1].is_parent_of(&fetches[1]));
    let ended = ack.span.end_time_unix_nano;
    assert!(fetches[1].span.start_time_unix_nano >= ended, "the wait begins after the settlements");
    for (call, empty, error) in
        [(2, "FETCH_FAILED", Some("CONSUMER_NOT_FOUND")), (3, "SETTLE", None)]
    {
        assert_eq!(calls[call].attribute("fetchproxy.empty_reason").as_deref(), Some(empty));
        assert_eq!(calls[call].attribute("error.type").as_deref(), error);
        assert_eq!(calls[call].attribute("rpc.status_code").as_deref(), Some("OK"));
    }
}

/// The middle of the times of these calls.
fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

async fn timed(client: &mut Client, token: &str) -> Duration {
    let began = Instant::now();
    // A refusal is a call like others, and needs nothing of NATS.
    client.ack(ack(token)).await.unwrap_err();
    began.elapsed()
}

#[tokio::test]
async fn receiver_that_is_dead_or_hangs_delays_no_call_and_its_spans_are_counted() {
    let (hanging, hangs) = silent_receiver();
    let (closed, dead) = silent_receiver();
    drop(closed);
    let nats = NatsServer::shared().url();
    let plain = Proxy::start_at(&nats, &[]);
    for (url, timeout) in [(&hangs, "300"), (&dead, "30000")] {
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &**url),
            SOON,
            ("OTEL_BSP_MAX_QUEUE_SIZE", "16"),
            ("OTEL_BSP_EXPORT_TIMEOUT", timeout),
        ];
        let proxy = Proxy::start_with(&nats, &[], &variables);
        let (mut with, mut without) = (proxy.client().await, plain.client().await);
        let (mut traced, mut untraced) = (Vec::new(), Vec::new());
        for _ in 0..300 {
            traced.push(timed(&mut with, "nonsense").await);
            untraced.push(timed(&mut without, "nonsense").await);
        }
        let (traced, untraced) = (median(traced), median(untraced));
        assert!(traced < 2 * untraced, "{url}: {traced:?} for {untraced:?}");
        let warning = "the receiver of traces takes no spans: they are dropped";
        let line = eventually("a warning", || async {
            let log = proxy.log();
            let line = log.lines().find(|line| line.contains(warning))?;
            serde_json::from_str::<serde_json::Value>(line).ok()
        })
        .await;
        assert!(line["dropped"].as_u64().unwrap() > 0, "{line}");
        assert_eq!(proxy.log().matches(warning).count(), 1, "{}", proxy.log());
        let dropped = Scrape::of(&proxy.ops).value("fetchproxy_spans_dropped_total");
        assert!(dropped >= line["dropped"].as_f64().unwrap(), "{dropped}, and {line}");
    }
    drop(hanging);
}

#[tokio::test]
async fn end_does_not_wait_for_a_receiver_that_hangs() {
    let (_hanging, url) = silent_receiver();
    // Longer than the test waits.
    let hour = "3600000";
    let variables = [
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &*url),
        SOON,
        ("OTEL_EXPORTER_OTLP_TIMEOUT", hour),
        ("OTEL_BSP_EXPORT_TIMEOUT", hour),
    ];
    let mut proxy = Proxy::start_with(&NatsServer::shared().url(), &[], &variables);
    proxy.ready().await;
    let mut client = proxy.client().await;
    client.ack(ack("nonsense")).await.unwrap_err();
    // The exporter has the first span by now, or takes the second with it.
    tokio::time::sleep(Duration::from_millis(200)).await;
    client.ack(ack("nonsense")).await.unwrap_err();
    proxy.signal("TERM");
    assert!(proxy.wait().await.success());
    let log = proxy.log();
    assert!(
        log.contains("drain timeout: spans were not sent") && log.contains("\"drained\""),
        "{log}"
    );
}

#[tokio::test]
async fn receiver_that_comes_later_receives_later_spans() {
    let (closed, url) = silent_receiver();
    drop(closed);
    let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", &*url);
    let proxy = Proxy::start_with(&NatsServer::shared().url(), &[], &[endpoint, SOON]);
    let mut client = proxy.client().await;
    client.ack(ack("nonsense")).await.unwrap_err();
    let receiver = TraceReceiver::start_on(url.trim_start_matches("http://")).await;
    eventually("a span", || async {
        client.clone().ack(ack("nonsense")).await.unwrap_err();
        tokio::time::sleep(Duration::from_millis(50)).await;
        (!receiver.spans().is_empty()).then_some(())
    })
    .await;
}

#[tokio::test]
async fn switch_of_the_specification_ends_all_traces() {
    let receiver = TraceReceiver::start().await;
    for off in [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")] {
        let mut proxy = traced(&receiver, &[off]);
        proxy.client().await.ack(ack("nonsense")).await.unwrap_err();
        proxy.signal("TERM");
        assert!(proxy.wait().await.success());
        assert!(proxy.log().contains("\"traces\":false"), "{}", proxy.log());
    }
    let mut proxy = traced(&receiver, &[]);
    proxy.client().await.ack(ack("nonsense")).await.unwrap_err();
    proxy.signal("TERM");
    assert!(proxy.wait().await.success());
    assert!(proxy.log().contains("\"traces\":true"), "{}", proxy.log());
    let spans = receiver.spans();
    let names: Vec<_> = spans.iter().map(|traced| &*traced.span.name).collect();
    assert_eq!(
        names,
        ["fetchproxy.v1.FetchService/Ack", "hand over"],
        "of the last one, at its end"
    );
}

#[tokio::test]
async fn span_joins_no_trace_without_a_propagator() {
    let receiver = TraceReceiver::start().await;
    let proxy = traced(&receiver, &[("OTEL_PROPAGATORS", "none")]);
    let mut request = Request::new(ack("nonsense"));
    request
        .metadata_mut()
        .insert("traceparent", format!("00-{TRACE}-{CALLER}-01").parse().unwrap());
    proxy.client().await.ack(request).await.unwrap_err();
    let call = &receiver.named("fetchproxy.v1.FetchService/Ack", 1).await[0];
    assert_ne!(hex(&call.span.trace_id), TRACE);
    assert!(call.span.parent_span_id.is_empty());
}

#[tokio::test]
async fn caller_decides_by_its_flag_whether_a_call_is_traced() {
    let receiver = TraceReceiver::start().await;
    let ratio = ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio");
    let proxy = traced(&receiver, &[ratio, ("OTEL_TRACES_SAMPLER_ARG", "0")]);
    let mut client = proxy.client().await;
    client.ack(ack("nonsense")).await.unwrap_err();
    for flag in ["00", "01"] {
        let mut request = Request::new(ack("nonsense"));
        let parent = format!("00-{TRACE}-{CALLER}-{flag}");
        request.metadata_mut().insert("traceparent", parent.parse().unwrap());
        client.ack(request).await.unwrap_err();
    }
    let calls = receiver.named("fetchproxy.v1.FetchService/Ack", 1).await;
    assert_eq!(hex(&calls[0].span.trace_id), TRACE);
    assert_eq!(receiver.spans().len(), 1, "the call whose caller is sampled");
}
