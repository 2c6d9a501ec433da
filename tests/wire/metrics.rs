//! The page of metrics, as a scraper reads it from a real replica.

use std::{io::Read as _, net::TcpStream};

use fetch_proxy::metrics::{FAMILIES, FamilyKind};
use flate2::read::GzDecoder;
use testkit::{
    eventually,
    nats_server::NatsServer,
    proxy::Proxy,
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

/// Labels whose values are found while the proxy runs.
const FOUND_LATER: [&str; 1] = ["consumer"];

#[tokio::test]
async fn fresh_replica_shows_each_family_of_the_table_with_a_value() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let scrape = Scrape::of(&proxy.ops);
    assert_eq!(scrape.types, table());
    for family in FAMILIES {
        let series = scrape.of_family(&family.shown()).count();
        let later = family.labels.iter().any(|label| FOUND_LATER.contains(label));
        assert!(series > 0 || later, "{} has no series", family.shown());
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
            use std::io::Write as _;
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
