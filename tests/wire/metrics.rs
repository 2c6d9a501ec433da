//! The page of metrics, as a scraper reads it from a real replica.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use fetch_proxy::{
    metrics::{FAMILIES, FamilyId, FamilyKind},
    pb::{Codec, FetchRequest, Outcome},
};
use flate2::read::GzDecoder;
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, ack, acking, fetch, nak, take, take_one},
    scrape::{PROMETHEUS, Scrape, get},
};

/// The families of the table, as `# TYPE` lines of the text format show them.
fn table() -> Vec<(String, String)> {
    let kind = |kind| match kind {
        FamilyKind::Counter => "counter",
        FamilyKind::Gauge => "gauge",
        FamilyKind::Histogram(_) => "histogram",
    };
    FAMILIES.iter().map(|family| (family.shown(), kind(family.kind).to_owned())).collect()
}

/// Families without a series at the start: their labels are found while the proxy runs.
const FOUND_LATER: [FamilyId; 13] = [
    FamilyId::Refusals,
    FamilyId::AuthenticationFailures,
    FamilyId::Denials,
    FamilyId::PrincipalLimited,
    FamilyId::PrincipalLeases,
    FamilyId::PrincipalCalls,
    FamilyId::PrincipalWaiters,
    FamilyId::FileUnusable,
    FamilyId::CertificateEnd,
    FamilyId::IssuerKeysAge,
    FamilyId::ConsumerPending,
    FamilyId::ConsumerAckPending,
    FamilyId::ConsumerInfoAge,
];

#[tokio::test]
async fn fresh_replica_shows_each_family_of_the_table_with_a_value() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let scrape = Scrape::of(&proxy.ops);
    assert_eq!(scrape.types, table());
    for family in FAMILIES {
        let series = scrape.of_family(&family.shown()).count();
        let later = FOUND_LATER.contains(&family.id);
        assert_eq!(series > 0, !later, "{}", family.shown());
    }
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(scrape.value(&format!("fetchproxy_build_info{{version=\"{version}\"}}")), 1.0);
    for (series, value) in [
        ("fetchproxy_ready", 1.0),
        ("fetchproxy_draining", 0.0),
        ("fetchproxy_insecure", 0.0),
        ("fetchproxy_panics_total", 0.0),
        ("fetchproxy_log_lines_dropped_total", 0.0),
    ] {
        assert_eq!(scrape.value(series), value, "{series}");
    }
    let lines = proxy.log().lines().filter(|line| line.contains("INFO")).count() as f64;
    assert_eq!(
        scrape.value("fetchproxy_log_lines_total{level=\"info\"}"),
        lines,
        "{}",
        proxy.log()
    );
    assert!(scrape.value("process_resident_memory_bytes") > 1e6);
    assert!(scrape.value("tokio_workers") >= 1.0);
    eventually("the lag of a timer", || async {
        let seen = Scrape::of(&proxy.ops).value("fetchproxy_runtime_lag_seconds_count");
        (seen > 1.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn replica_that_drains_without_nats_says_so() {
    let mut server = NatsServer::start();
    server.kill();
    let proxy = Proxy::start(&server, &["--drain-delay", "1h"]);
    assert_eq!(Scrape::of(&proxy.ops).value("fetchproxy_ready"), 0.0);
    proxy.signal("TERM");
    eventually("the drain", || async {
        (Scrape::of(&proxy.ops).value("fetchproxy_draining") == 1.0).then_some(())
    })
    .await;
}

#[tokio::test]
async fn each_scraper_gets_its_format_and_its_coding() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let open = get(&proxy.ops, "/metrics", &[("Accept", PROMETHEUS)]);
    assert_eq!(
        open.headers["content-type"],
        "application/openmetrics-text; version=1.0.0; charset=utf-8"
    );
    assert!(!open.headers.contains_key("content-encoding"));
    let open = String::from_utf8(open.body).unwrap();
    assert!(open.ends_with("\n# EOF\n"), "{open}");
    assert!(open.contains("\n# TYPE fetchproxy_panics counter\nfetchproxy_panics_total 0\n"));
    let packed = get(&proxy.ops, "/metrics", &[("Accept-Encoding", "br, gzip;q=0.5")]);
    assert_eq!(packed.headers["content-type"], "text/plain; version=0.0.4; charset=utf-8");
    assert_eq!(packed.headers["content-encoding"], "gzip");
    let mut text = String::new();
    GzDecoder::new(&*packed.body).read_to_string(&mut text).unwrap();
    assert!(text.contains("\n# TYPE fetchproxy_panics_total counter\nfetchproxy_panics_total 0\n"));
    assert!(!text.contains("# EOF"));
}

#[tokio::test]
async fn replica_without_metrics_has_no_such_page() {
    let proxy = Proxy::start(NatsServer::shared(), &["--metrics", "off"]);
    proxy.ready().await;
    assert_eq!(get(&proxy.ops, "/metrics", &[]).status, 404);
    assert_eq!(get(&proxy.ops, "/readyz", &[]).status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn hundred_scrapers_at_once_and_silent_readers_all_get_a_page() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    // These send a request and read nothing.
    let silent: Vec<TcpStream> = (0..10)
        .map(|_| {
            let mut stream = TcpStream::connect(&proxy.ops).unwrap();
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
            stream
        })
        .collect();
    let scrapers = (0..100).map(|_| {
        let ops = proxy.ops.clone();
        tokio::task::spawn_blocking(move || get(&ops, "/metrics", &[]).status)
    });
    for status in futures_util::future::join_all(scrapers).await {
        assert_eq!(status.unwrap(), 200);
    }
    drop(silent);
}

/// Waits until the series of a page are as the test wants them.
async fn until(proxy: &Proxy, what: &str, wanted: impl Fn(&Scrape) -> bool) -> Scrape {
    eventually(what, || async {
        let scrape = Scrape::of(&proxy.ops);
        wanted(&scrape).then_some(scrape)
    })
    .await
}

#[tokio::test]
async fn each_call_is_counted_with_its_method_and_its_code() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let client = proxy.client().await;
    fixture.publish("x", "12345").await;
    let delivery = take_one(&client, &fixture).await;
    client.clone().ack(ack(&delivery.token)).await.unwrap();
    let again = client.clone().ack(ack(&delivery.token)).await.unwrap().into_inner();
    assert_eq!(again.outcome(), Outcome::Duplicate);
    client.clone().ack(ack("no token")).await.unwrap_err();
    let unknown = FetchRequest { consumer: "nobody".to_owned(), ..fetch(&fixture, 1, 0) };
    client.clone().fetch(unknown).await.unwrap_err();
    let handled = |scrape: &Scrape, method: &str, code: &str| {
        let labels = [format!("grpc_method=\"{method}\""), format!("grpc_code=\"{code}\"")];
        let labels = labels.each_ref().map(String::as_str);
        scrape.sum("grpc_server_handled_total", &labels)
    };
    let seen = until(&proxy, "the end of the calls", |scrape| {
        scrape.sum("grpc_server_handled_total", &["FetchService"]) == 5.0
    })
    .await;
    assert_eq!(seen.sum("grpc_server_started_total", &["FetchService"]), 5.0);
    for (method, code, count) in [
        ("Ack", "OK", 2.0),
        ("Ack", "InvalidArgument", 1.0),
        ("Fetch", "OK", 1.0),
        ("Fetch", "NotFound", 1.0),
    ] {
        assert_eq!(handled(&seen, method, code), count, "{method} {code}");
    }
    let times = seen.sum("grpc_server_handling_seconds_count", &["grpc_method=\"Ack\""]);
    assert_eq!(times, 3.0);
    assert_eq!(seen.sum("grpc_server_handling_seconds_count", &["grpc_method=\"Fetch\""]), 0.0);
    assert_eq!(seen.value("fetchproxy_fetch_seconds_count"), 2.0);
    let refusals = seen.of_family("fetchproxy_refusals_total").collect::<Vec<_>>();
    assert_eq!(
        refusals,
        [
            ("fetchproxy_refusals_total{reason=\"CONSUMER_NOT_FOUND\",rpc=\"Fetch\"}", 1.0),
            ("fetchproxy_refusals_total{reason=\"TOKEN_INVALID\",rpc=\"Ack\"}", 1.0),
        ]
    );
    assert_eq!(seen.value("fetchproxy_calls_open"), 0.0);
    assert_eq!(seen.value("fetchproxy_calls_limit"), 20_000.0);
    // The consumer that JetStream knows has series of its own, and the other name has none.
    let of_ours = [&*format!("consumer=\"{}\"", fixture.consumer), "stream"];
    let ours = |family: &str| seen.sum(family, &of_ours);
    assert_eq!(ours("fetchproxy_messages_fetched_total"), 1.0);
    assert_eq!(ours("fetchproxy_message_bytes_fetched_total"), 5.0);
    assert_eq!(ours("fetchproxy_leases_granted_total"), 1.0);
    assert_eq!(ours("fetchproxy_fetches_total"), 1.0);
    let settled = |outcome: &str| {
        let outcome = format!("outcome=\"{outcome}\"");
        seen.sum("fetchproxy_settlements_total", &[of_ours[0], &outcome])
    };
    assert_eq!((settled("confirmed"), settled("duplicate")), (1.0, 1.0));
    assert!(!seen.series.keys().any(|series| series.contains("consumer=\"nobody\"")));
    assert_eq!(seen.sum("fetchproxy_fetches_total", &["_other", "result=\"refused\""]), 1.0);
    let books = seen.books().unwrap();
    assert_eq!((books.began, books.ended, books.held), (1, 1, 0));
}

#[tokio::test]
async fn settlement_on_a_fetch_counts_like_that_of_a_settle() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let client = proxy.client().await;
    fixture.publish_many(2).await;
    let token = take_one(&client, &fixture).await.token;
    let next = acking(&token, fetch(&fixture, 1, 10_000));
    let next = client.clone().fetch(next).await.unwrap().into_inner();
    let nobody = FetchRequest { consumer: "nobody".to_owned(), ..fetch(&fixture, 1, 0) };
    for request in
        [acking(&next.messages[0].token, nobody), acking("no token", fetch(&fixture, 1, 0))]
    {
        client.clone().fetch(request).await.unwrap();
    }
    let seen = until(&proxy, "the end of the calls", |scrape| {
        scrape.sum("grpc_server_handled_total", &["Fetch", "grpc_code=\"OK\""]) == 4.0
    })
    .await;
    let ours = format!("consumer=\"{}\"", fixture.consumer);
    let settled = ["fetchproxy_settlements_total", &ours, "kind=\"ack\"", "outcome=\"confirmed\""];
    assert_eq!(seen.sum(settled[0], &settled[1..]), 2.0);
    let refusals = seen.of_family("fetchproxy_refusals_total").collect::<Vec<_>>();
    assert_eq!(
        refusals,
        [
            ("fetchproxy_refusals_total{reason=\"CONSUMER_NOT_FOUND\",rpc=\"Fetch\"}", 1.0),
            ("fetchproxy_refusals_total{reason=\"TOKEN_INVALID\",rpc=\"Fetch\"}", 1.0),
        ]
    );
    let fetches = |consumer: &str, result: &str| {
        let result = format!("result=\"{result}\"");
        seen.sum("fetchproxy_fetches_total", &[consumer, &result])
    };
    assert_eq!((fetches(&ours, "messages"), fetches(&ours, "refused")), (2.0, 1.0));
    assert_eq!(fetches("_other", "refused"), 1.0);
    let books = seen.books().unwrap();
    assert_eq!((books.began, books.ended, books.held), (2, 2, 0));
}

#[tokio::test]
async fn caller_that_leaves_and_a_method_that_is_not_served_are_counted() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let client = proxy.client().await;
    let waiting = tokio::spawn({
        let (mut client, request) = (client.clone(), fetch(&fixture, 1, 60_000));
        async move { client.fetch(request).await }
    });
    until(&proxy, "a waiter", |scrape| scrape.sum("fetchproxy_waiters", &[]) == 1.0).await;
    assert_eq!(Scrape::of(&proxy.ops).value("fetchproxy_calls_open"), 1.0);
    waiting.abort();
    until(&proxy, "its end", |scrape| {
        scrape.sum("grpc_server_handled_total", &["grpc_code=\"Canceled\""]) == 1.0
            && scrape.sum("fetchproxy_fetches_total", &["result=\"left\""]) == 1.0
            && scrape.sum("fetchproxy_waiters", &[]) == 0.0
            && scrape.value("fetchproxy_calls_open") == 0.0
    })
    .await;
    let channel = tonic::transport::Channel::from_shared(format!("http://{}", proxy.grpc));
    let channel = channel.unwrap().connect().await.unwrap();
    let mut raw = tonic::client::Grpc::new(channel);
    raw.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<(), ()>::default();
    let path = http::uri::PathAndQuery::from_static("/no.such.Service/Method");
    raw.unary(tonic::Request::new(()), path, codec).await.unwrap_err();
    until(&proxy, "the unknown method", |scrape| {
        let labels = ["_OTHER", "grpc_code=\"Unimplemented\""];
        scrape.sum("grpc_server_handled_total", &labels) == 1.0
    })
    .await;
}

#[tokio::test]
async fn each_connection_is_open_refused_or_closed() {
    let proxy = Proxy::start(NatsServer::shared(), &["--max-connections", "20"]);
    proxy.ready().await;
    let first = proxy.client().await;
    for hello in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3]] {
        let mut stream = TcpStream::connect(&proxy.grpc).unwrap();
        stream.write_all(hello).unwrap();
        stream.read_to_end(&mut Vec::new()).unwrap();
    }
    let grpc = |scrape: &Scrape, family: &str, label: &str| {
        scrape.sum(&format!("fetchproxy_{family}"), &["listener=\"grpc\"", label])
    };
    let seen = until(&proxy, "the refusals", |scrape| {
        grpc(scrape, "connections_refused_total", "") == 2.0
    })
    .await;
    assert_eq!(grpc(&seen, "connections_refused_total", "reason=\"protocol\""), 1.0);
    assert_eq!(grpc(&seen, "connections_refused_total", "reason=\"tls_on_plaintext\""), 1.0);
    assert_eq!(grpc(&seen, "connections_limit", ""), 20.0);
    assert!(grpc(&seen, "connections_open", "") >= 1.0);
    drop(first);
    until(&proxy, "the end of all connections", |scrape| {
        let ended = grpc(scrape, "connections_refused_total", "")
            + grpc(scrape, "connections_closed_total", "");
        grpc(scrape, "connections_open", "") == 0.0
            && ended == grpc(scrape, "connections_accepted_total", "")
    })
    .await;
}

#[tokio::test]
async fn connections_to_nats_are_up_or_lost() {
    let mut server = NatsServer::start();
    let proxy = Proxy::start(&server, &[]);
    proxy.ready().await;
    let of = |scrape: &Scrape, family: &str| {
        ["deliveries", "settling"]
            .map(|role| scrape.value(&format!("fetchproxy_{family}{{role=\"{role}\"}}")))
    };
    let seen = until(&proxy, "an echo", |scrape| {
        scrape.value("fetchproxy_nats_round_trip_seconds_count{role=\"settling\"}") > 0.0
    })
    .await;
    assert_eq!(of(&seen, "nats_up"), [1.0, 1.0]);
    assert_eq!(of(&seen, "nats_connects_total"), [1.0, 1.0]);
    assert_eq!(of(&seen, "nats_losses_total"), [0.0, 0.0]);
    server.kill();
    let seen = until(&proxy, "the loss", |scrape| of(scrape, "nats_up") == [0.0, 0.0]).await;
    assert_eq!(of(&seen, "nats_losses_total"), [1.0, 1.0]);
    server.restart();
    let seen = until(&proxy, "new connections", |scrape| of(scrape, "nats_up") == [1.0, 1.0]).await;
    assert!(of(&seen, "nats_connects_total").iter().all(|connects| *connects >= 2.0));
}

#[tokio::test]
async fn each_limit_and_each_way_of_a_message_is_shown() {
    let fixture = Fixture::new(config()).await;
    let flags = ["--max-leases", "500", "--max-waiters", "70"];
    let proxy = Proxy::start(NatsServer::shared(), &flags);
    proxy.ready().await;
    let client = proxy.client().await;
    fixture.publish("x", "not JSON").await;
    let json = FetchRequest { codec: Codec::Json.into(), ..fetch(&fixture, 1, 10_000) };
    let answer = client.clone().fetch(json).await.unwrap().into_inner();
    assert_eq!(answer.rejected.len(), 1, "{answer:?}");
    for _ in 0..2 {
        fixture.publish("x", "[]").await;
    }
    let first = take_one(&client, &fixture).await;
    client.clone().nak(nak(&first.token, 0)).await.unwrap();
    let request = FetchRequest { n: 2, ..fetch(&fixture, 2, 10_000) };
    let held = take(&client, request).await;
    assert!(held.iter().any(|message| message.delivery_count == 2), "{held:?}");
    let seen = Scrape::of(&proxy.ops);
    let of = |family: &str| {
        let Fixture { stream, consumer, .. } = &fixture;
        let series = format!("{family}{{stream=\"{stream}\",consumer=\"{consumer}\"}}");
        seen.value(&format!("fetchproxy_{series}"))
    };
    assert_eq!(seen.sum("fetchproxy_messages_rejected_total", &["cause=\"codec\""]), 1.0);
    assert_eq!(seen.sum("fetchproxy_messages_redelivered_total", &[]), 1.0);
    // A message that is delivered again has no delay.
    assert!(seen.value("fetchproxy_delivery_delay_seconds_count") >= 1.0);
    assert_eq!(seen.value("fetchproxy_lease_held_seconds_count{how=\"nak\"}"), 1.0);
    assert_eq!(of("leases"), 2.0);
    for message in &held {
        client.clone().ack(ack(&message.token)).await.unwrap();
    }
    // An alert looks for consumers without leases, so they have a series, too.
    let none = format!(
        "fetchproxy_leases{{stream=\"{}\",consumer=\"{}\"}}",
        fixture.stream, fixture.consumer
    );
    assert_eq!(Scrape::of(&proxy.ops).series.get(&none), Some(&0.0));
    assert_eq!(seen.value("fetchproxy_leases_limit"), 500.0);
    let free = seen.value("fetchproxy_leases_places_free");
    assert!((400.0..=498.0).contains(&free), "{free}");
    assert_eq!(seen.value("fetchproxy_waiters_limit"), 70.0);
    assert!(of("consumer_pending_messages") <= 3.0);
    assert!(of("consumer_ack_pending_messages") <= 3.0);
    assert!((0.0..60.0).contains(&of("consumer_info_age_seconds")));
    let keys: Vec<_> = seen.of_family("fetchproxy_token_keys").collect();
    assert_eq!(keys.len(), 1);
    assert!(keys[0].0.ends_with(",use=\"seals\"}") && keys[0].1 == 1.0, "{keys:?}");
}
