//! The page for people at the ops port, as somebody sees it who forwards the port.

use std::{collections::BTreeSet, fs, io::Write as _, net::TcpStream, time::Duration};

use fetch_proxy::{pb::FetchRequest, token::new_key_line};
use tempfile::NamedTempFile;
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch, take, take_one},
    scrape::{Page, get, visit},
};
use tokio::task::JoinHandle;

fn page(proxy: &Proxy, path: &str) -> Page {
    visit(&proxy.ops, "GET", path, &proxy.ops)
}

fn text(page: Page) -> String {
    assert_eq!(page.status, 200, "{}", String::from_utf8_lossy(&page.body));
    String::from_utf8(page.body).unwrap()
}

#[tokio::test]
async fn page_shows_who_holds_which_message_and_what_was_refused() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--replica-name", "replica-7"]);
    proxy.ready().await;
    fixture.publish_many(3).await;
    let client = proxy.client().await;
    let request = FetchRequest { worker: "<i>worker</i>\n7".to_owned(), ..fetch(&fixture, 3, 0) };
    let held = take(&client, request).await;
    let unknown = FetchRequest { consumer: "nobody-is-here".to_owned(), ..fetch(&fixture, 1, 0) };
    client.clone().fetch(unknown).await.unwrap_err();
    let seen = page(&proxy, "/");
    assert_eq!(seen.headers["content-type"], "text/html; charset=utf-8");
    assert_eq!(seen.headers["cache-control"], "no-store");
    assert!(seen.headers["content-security-policy"].starts_with("default-src 'none'; style-src"));
    let seen = text(seen);
    for said in [
        "replica-7",
        env!("CARGO_PKG_VERSION"),
        &*fixture.stream,
        &*fixture.consumer,
        "&lt;i&gt;worker&lt;/i&gt;\\u{a}7",
        "127.0.0.1:",
        "CONSUMER_NOT_FOUND",
        "nobody-is-here",
        "deliveries",
        "settling",
    ] {
        assert!(seen.contains(said), "{said} is not in {seen}");
    }
    assert!(!seen.contains("<script") && !seen.contains("http-equiv"), "{seen}");
    for message in &held {
        assert!(!seen.contains(&message.token), "a token");
    }
    let lower = seen.to_lowercase();
    for secret in ["$js.ack", "bearer", "payload"] {
        assert!(!lower.contains(secret), "{secret}");
    }
    assert!(text(page(&proxy, "/?refresh=5")).contains("http-equiv=\"refresh\" content=\"5\""));
    assert!(!text(page(&proxy, "/?refresh=0")).contains("http-equiv"));
}

#[tokio::test]
async fn page_is_for_names_of_loopback_and_for_reading_alone() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let head = visit(&proxy.ops, "HEAD", "/", "localhost:50052");
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert!(head.headers["content-length"].parse::<usize>().unwrap() > 1000);
    let rebound = visit(&proxy.ops, "GET", "/", "rebound.example:50052");
    assert_eq!(rebound.status, 421);
    assert!(!String::from_utf8_lossy(&rebound.body).contains("<html"));
    assert_eq!(visit(&proxy.ops, "POST", "/", "localhost").status, 405);
    assert_eq!(visit(&proxy.ops, "GET", "/status", "localhost").status, 404);
    assert_eq!(visit(&proxy.ops, "GET", "/index.html", "localhost").status, 404);
    // Scrapers and probes name any host.
    assert_eq!(get(&proxy.ops, "/readyz", &[]).status, if ready(&proxy) { 200 } else { 503 });
    assert_eq!(get(&proxy.ops, "/metrics", &[]).status, 200);
}

fn ready(proxy: &Proxy) -> bool {
    get(&proxy.ops, "/readyz", &[]).status == 200
}

#[tokio::test]
async fn page_opens_without_nats() {
    let mut server = NatsServer::start();
    server.kill();
    let proxy = Proxy::start(&server, &[]);
    let seen = text(page(&proxy, "/"));
    assert!(seen.contains("not ready") && seen.contains("down"), "{seen}");
}

/// Two replicas of one cluster.
struct Both {
    fixture: Fixture,
    here: Proxy,
    other: Proxy,
    _keys: NamedTempFile,
}

impl Both {
    async fn start() -> Self {
        let fixture = Fixture::new(config()).await;
        let keys = NamedTempFile::new().unwrap();
        fs::write(keys.path(), new_key_line().unwrap()).unwrap();
        let file = keys.path().to_str().unwrap();
        let replica = |name| {
            let flags =
                ["--token-key-file", file, "--cluster", &*fixture.stream, "--replica-name", name];
            Proxy::start(NatsServer::shared(), &flags)
        };
        let (here, other) = (replica("replica-here"), replica("replica-silent"));
        here.ready().await;
        eventually("both replicas on the page", || async {
            text(page(&here, "/")).contains("replica-silent").then_some(())
        })
        .await;
        Self { fixture, here, other, _keys: keys }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn page_names_a_silent_replica_and_shows_the_rest() {
    let Both { fixture, here, other, .. } = &Both::start().await;
    fixture.publish_many(1).await;
    let _held = take_one(&here.client().await, fixture).await;
    other.signal("STOP");
    // A look that is a moment old may be shown again.
    let seen = eventually("a page that names the silent replica", || async {
        let seen = text(page(here, "/"));
        seen.contains("has not answered within").then_some(seen)
    })
    .await;
    other.signal("CONT");
    assert!(seen.contains("Replicas that do not answer"), "{seen}");
    assert!(seen.contains("replica-here") && seen.contains(&*fixture.consumer), "{seen}");
}

/// A look at a silent replica lasts a second. Whatever is asked meanwhile shares it, and no call waits for it.
#[tokio::test(flavor = "multi_thread")]
async fn hundred_pages_at_once_share_a_few_looks_and_hold_up_nobody() {
    let Both { fixture, mut here, other, .. } = Both::start().await;
    fixture.publish_many(20).await;
    let client = here.client().await;
    // The first Fetch of a consumer waits for the other replica.
    let message = take_one(&client, &fixture).await;
    client.clone().ack(ack(&message.token)).await.unwrap();
    let mut overtaken = 0;
    for _ in 0..5 {
        // A look that is a moment old would be shown again.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        other.signal("STOP");
        let pages: Vec<_> = (0..100)
            .map(|_| {
                let ops = here.ops.clone();
                tokio::task::spawn_blocking(move || text(visit(&ops, "GET", "/", "localhost")))
            })
            .collect();
        let message = take_one(&client, &fixture).await;
        client.clone().ack(ack(&message.token)).await.unwrap();
        overtaken += usize::from(!pages.iter().any(JoinHandle::is_finished));
        let pages = futures_util::future::join_all(pages).await;
        let looks: BTreeSet<_> = pages.into_iter().map(Result::unwrap).collect();
        assert!(looks.len() <= 4, "{} looks for pages at once", looks.len());
        other.signal("CONT");
    }
    assert!(overtaken > 0, "no call is answered while pages wait");

    // People who ask and do not read delay no drain.
    let _unread: Vec<TcpStream> = (0..100)
        .map(|_| {
            let mut stream = TcpStream::connect(&here.ops).unwrap();
            stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
            stream
        })
        .collect();
    here.signal("TERM");
    assert!(here.wait().await.success());
    assert!(here.log().contains("drained"), "{}", here.log());
}
