//! The page at `/` for people who forward the ops port: who is there, who holds what, and which calls were
//! refused. It changes nothing, and has no token, no payload and no credential.
//!
//! ```text
//!  GET / ── from loopback, to a name of loopback? ── no ──▶ one line that says how
//!                │ yes
//!                ▼
//!    one look at a time ─▶ snapshot ─▶ view, which escapes every text
//! ```
//! 1. Only a request that comes through loopback is answered: `kubectl port-forward` ends inside the pod.
//! 2. Its `Host` must name loopback. Otherwise a web page of strangers could read this page through a name of theirs
//!    that leads to loopback.
//! 3. Requests that come while the cluster is looked at share the look. A look takes at most [`PAGE_PATIENCE`].

mod parts;
mod snapshot;
mod view;
mod words;

use std::{
    net::IpAddr,
    sync::{Arc, LazyLock},
    time::{Duration, Instant},
};

use axum::{body::Body, extract::Request};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{HeaderValue, Response, StatusCode, header, uri::Authority};
use ring::digest::{SHA256, digest};
use tokio::{sync::Mutex, time::timeout_at};

use self::snapshot::Snapshot;
pub use self::snapshot::{NatsShown, StatusSources};
use crate::{clock, net::Peer};

/// Longest time from a request to its answer.
const PAGE_PATIENCE: Duration = Duration::from_millis(1500);
/// Left of it for the rendering.
const RENDERING_TIME: Duration = Duration::from_millis(150);
/// A look that is younger is shown again.
const FRESH: Duration = Duration::from_secs(1);
/// The query of a page that loads itself again every 5 s.
const REFRESHING: &str = "refresh=5";

const STYLE: &str = include_str!("page/style.css");

/// Nothing but our own style is allowed: no script, no image, no other site, no frame around the page.
static CONTENT_POLICY: LazyLock<HeaderValue> = LazyLock::new(|| {
    let style = STANDARD.encode(digest(&SHA256, STYLE.as_bytes()));
    let policy = format!(
        "default-src 'none'; style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'; \
         frame-ancestors 'none'"
    );
    HeaderValue::try_from(policy).unwrap_or(HeaderValue::from_static("default-src 'none'"))
});

/// Answers with the page.
#[derive(Clone)]
pub(super) struct StatusPages(Arc<Inner>);

struct Inner {
    sources: StatusSources,
    last: Mutex<Option<Look>>,
}

/// One look at the cluster, and the pages that show it: one that stays, and one that loads itself again.
struct Look {
    ended: Instant,
    snapshot: Snapshot,
    pages: [Option<Bytes>; 2],
}

/// The reason why a request gets no page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refused {
    /// It comes from another machine.
    Remote,
    /// It names another host.
    Misdirected,
}

impl StatusPages {
    pub(super) fn new(sources: StatusSources) -> Self {
        Self(Arc::new(Inner { sources, last: Mutex::default() }))
    }

    /// The answer to one request.
    pub(super) async fn answer(self, request: Request) -> Response<Body> {
        match admitted(&request) {
            Ok(()) => {}
            Err(Refused::Remote) => {
                let how = "this page is only for requests from the pod itself: run `kubectl port-forward POD \
                           50052`, and open http://127.0.0.1:50052/\n";
                return plain(StatusCode::FORBIDDEN, how);
            }
            Err(Refused::Misdirected) => {
                let how = "open this page as http://127.0.0.1, http://localhost or http://[::1], with the port\n";
                return plain(StatusCode::MISDIRECTED_REQUEST, how);
            }
        }
        let refreshing = request.uri().query() == Some(REFRESHING);
        let asked_at = clock::now();
        match timeout_at((asked_at + PAGE_PATIENCE).into(), self.page(refreshing, asked_at)).await {
            Ok(page) => html(page),
            Err(_) => {
                plain(StatusCode::SERVICE_UNAVAILABLE, "this replica is too busy for the page\n")
            }
        }
    }

    async fn page(&self, refreshing: bool, asked_at: Instant) -> Bytes {
        let Inner { sources, last } = &*self.0;
        let mut last = last.lock().await;
        let fresh = |look: &Look| {
            look.ended >= asked_at || asked_at.saturating_duration_since(look.ended) < FRESH
        };
        let mut look = match last.take().filter(fresh) {
            Some(look) => look,
            None => {
                let snapshot = sources.look(asked_at + PAGE_PATIENCE - RENDERING_TIME).await;
                Look { ended: clock::now(), snapshot, pages: [None, None] }
            }
        };
        let page = &mut look.pages[usize::from(refreshing)];
        let page = page
            .get_or_insert_with(|| view::page(&look.snapshot, STYLE, refreshing).into())
            .clone();
        *last = Some(look);
        page
    }
}

/// Whether the request may see the page.
///
/// # Errors
/// See [`Refused`].
fn admitted<B>(request: &http::Request<B>) -> Result<(), Refused> {
    let peer = request.extensions().get::<Arc<Peer>>().map(|peer| peer.address.ip());
    if !peer.is_some_and(|peer: IpAddr| peer.to_canonical().is_loopback()) {
        return Err(Refused::Remote);
    }
    let mut hosts = request.headers().get_all(header::HOST).iter().map(|host| host.to_str().ok());
    // HTTP/2 has the host in its path.
    let host = request.uri().host().or(hosts.next().flatten());
    if hosts.next().is_none() && host.is_some_and(names_loopback) {
        Ok(())
    } else {
        Err(Refused::Misdirected)
    }
}

/// Whether this host, with or without a port, is loopback by its name.
fn names_loopback(host: &str) -> bool {
    let host = host.parse::<Authority>().ok().filter(|host| !host.as_str().contains('@'));
    let names = ["localhost", "127.0.0.1", "[::1]", "::1"];
    host.is_some_and(|host| names.iter().any(|name| host.host().eq_ignore_ascii_case(name)))
}

fn html(page: Bytes) -> Response<Body> {
    let answer = Response::builder()
        .header(header::CONTENT_TYPE, "text/html; charset=utf-8")
        .header(header::CONTENT_SECURITY_POLICY, CONTENT_POLICY.clone())
        .header(header::CACHE_CONTROL, "no-store")
        .header(header::REFERRER_POLICY, "no-referrer")
        .header(header::X_CONTENT_TYPE_OPTIONS, "nosniff");
    answer.body(Body::from(page)).unwrap_or_default()
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    let answer = Response::builder()
        .status(status)
        .header(header::CONTENT_TYPE, "text/plain; charset=utf-8")
        .header(header::CACHE_CONTROL, "no-store");
    answer.body(Body::from(text)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(peer: &str, host: &[&str], uri: &str) -> Result<(), Refused> {
        let mut request = http::Request::get(uri);
        for host in host {
            request = request.header(header::HOST, *host);
        }
        let peer = Arc::new(Peer { address: peer.parse().unwrap(), certificate: None });
        admitted(&request.extension(peer).body(()).unwrap())
    }

    #[test]
    fn only_requests_through_loopback_see_the_page() {
        for (peer, seen) in [
            ("127.0.0.1:1", Ok(())),
            ("127.0.0.6:1", Ok(())),
            ("[::1]:1", Ok(())),
            ("[::ffff:127.0.0.1]:1", Ok(())),
            ("192.0.2.1:1", Err(Refused::Remote)),
            ("[::ffff:192.0.2.1]:1", Err(Refused::Remote)),
            ("[2001:db8::1]:1", Err(Refused::Remote)),
            ("0.0.0.0:1", Err(Refused::Remote)),
        ] {
            assert_eq!(asked(peer, &["localhost"], "/"), seen, "{peer}");
        }
        let unknown = http::Request::get("/").header(header::HOST, "localhost").body(()).unwrap();
        assert_eq!(admitted(&unknown), Err(Refused::Remote));
    }

    #[test]
    fn only_names_of_loopback_open_the_page() {
        let seen = |hosts: &[&str]| asked("127.0.0.1:1", hosts, "/").is_ok();
        for host in ["localhost", "LOCALHOST:9", "127.0.0.1", "127.0.0.1:50052", "[::1]", "[::1]:1"]
        {
            assert!(seen(&[host]), "{host}");
        }
        for host in [
            "evil.example",
            "localhost.evil.example",
            "127.0.0.1.evil.example:50052",
            "evil@localhost",
            "localhost@evil.example",
            "127.0.0.2",
            "[::2]",
            "localhost, evil.example",
            "10.0.0.1:50052",
            "",
        ] {
            assert!(!seen(&[host]), "{host}");
        }
        assert!(!seen(&[]), "a request without a host");
        assert!(!seen(&["localhost", "evil.example"]), "two hosts");
        assert_eq!(asked("127.0.0.1:1", &[], "http://127.0.0.1:9/"), Ok(()), "HTTP/2");
        let other = asked("127.0.0.1:1", &["localhost"], "http://evil.example/");
        assert_eq!(other, Err(Refused::Misdirected));
    }

    #[test]
    fn policy_allows_the_style_of_the_page_and_nothing_else() {
        let policy = CONTENT_POLICY.to_str().unwrap();
        assert!(policy.starts_with("default-src 'none'; style-src 'sha256-"), "{policy}");
        assert!(!policy.contains("unsafe") && !policy.contains("script"), "{policy}");
    }
}
