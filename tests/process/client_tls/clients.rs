//! Certificates of clients: demanded, checked, and ended.

use std::{process::Command, time::SystemTime};

use rustls::HandshakeKind;
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    until,
};

use super::*;

#[tokio::test]
async fn client_certificate_is_demanded_and_checked() {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let files = Mounted::new(&ours.server(), ours.pem());
    let svid = ours.workload("spiffe://prod.example/ns/orders/sa/worker");
    let no_svid = ours.workload("spiffe://prod.example");
    let expired = ours.client_by("worker", |params| {
        params.not_after = rcgen::date_time_ymd(2020, 1, 1);
    });
    let of_server = ours.server();
    let good = ours.client("worker");
    for (auth, unnamed) in [("require", false), ("optional", true)] {
        let proxy = start(NOWHERE, &files.client_flags(), &["--tls-client-auth", auth]);
        for (who, identity, served) in [
            ("none", None, unnamed),
            ("ours", Some(&good), true),
            ("a workload of SPIFFE", Some(&svid), true),
            ("no workload of SPIFFE", Some(&no_svid), false),
            ("expired", Some(&expired), false),
            ("another authority's", Some(&other.client("worker")), false),
            ("a server's", Some(&of_server), false),
        ] {
            let seen = is_served(&proxy, &h2(&ours, identity)).await;
            assert_eq!(seen.is_ok(), served, "{auth}, {who}: {seen:?}");
        }
        let told = || async { (said(&proxy, "a TLS handshake has failed") > 1).then_some(()) };
        eventually("lines of failed handshakes", told).await;
    }
}

/// Waits for the end of a connection on which HTTP/2 has begun. Returns whether GOAWAY came before it.
async fn goaway_before_the_end(stream: &mut TlsStream<TcpStream>) -> bool {
    let mut goaway = false;
    let frames = async {
        while let Ok((kind, flags, content)) = frame(stream).await {
            goaway |= kind == GOAWAY;
            if kind == PING && flags == 0 {
                let answer = [&[0, 0, 8, PING, 1, 0, 0, 0, 0], &*content].concat();
                let _ = stream.write_all(&answer).await;
                let _ = stream.flush().await;
            }
        }
    };
    timeout(BOUND, frames).await.expect("it does not end");
    goaway
}

#[tokio::test]
async fn connection_ends_with_its_client_certificate() {
    let ca = Authority::new("ca");
    let files = Mounted::new(&ca.server(), ca.pem());
    let proxy = start(NOWHERE, &files.client_flags(), &[]);
    let end = SystemTime::now() + Duration::from_secs(3);
    let short = ca.client_by("worker", |params| params.not_after = end.into());
    let config = h2(&ca, Some(&short));
    let mut stream = connect(&proxy, &config).await.unwrap();
    // The SETTINGS of the client ask for nothing, so the server says only what is of interest here.
    begin_http2(&mut stream).await.unwrap();
    let mut stays = connect(&proxy, &h2(&ca, Some(&ca.client("worker")))).await.unwrap();
    begin_http2(&mut stays).await.unwrap();
    assert!(goaway_before_the_end(&mut stream).await, "{}", proxy.log());
    let late = SystemTime::now().duration_since(end);
    // The certificate counts whole seconds.
    let early = late.as_ref().map_or_else(|early| early.duration(), |_| Duration::ZERO);
    assert!(early < Duration::from_secs(1), "{early:?} too early");
    assert!(late.is_err() || late.unwrap() < Duration::from_secs(5), "too late");
    let expired = || async { is_served(&proxy, &config).await.is_err().then_some(()) };
    assert!(until(SEEN, expired).await.is_some(), "an expired certificate is still served");
    let more = timeout(Duration::from_millis(100), stays.read_u8()).await;
    assert!(!matches!(more, Ok(Err(_))), "another connection has ended too");
}

#[tokio::test]
async fn connections_end_soon_after_their_authority_was_removed() {
    let (ours, old) = (Authority::new("ours"), Authority::new("old"));
    let server = ours.server();
    let mut files = Mounted::new(&server, &[ours.pem(), old.pem()].concat());
    let proxy = start(NOWHERE, &files.client_flags(), &["--tls-client-auth", "optional"]);
    let (named, unnamed) = (h2(&ours, Some(&old.client("worker"))), h2(&ours, None));
    let mut streams = Vec::new();
    for _ in 0..5 {
        let mut stream = connect(&proxy, &named).await.unwrap();
        begin_http2(&mut stream).await.unwrap();
        streams.push(stream);
    }
    let mut stays = connect(&proxy, &unnamed).await.unwrap();
    begin_http2(&mut stays).await.unwrap();
    // Another authority in addition ends nothing.
    let third = Authority::new("third");
    files.swap(&server.cert, &server.key, &[ours.pem(), old.pem(), third.pem()].concat());
    let added = || async { is_served(&proxy, &h2(&ours, Some(&third.client("w")))).await.ok() };
    assert!(until(SEEN, added).await.is_some(), "{}", proxy.log());
    files.swap(&server.cert, &server.key, ours.pem());
    let removed = SystemTime::now();
    for stream in &mut streams {
        assert!(goaway_before_the_end(stream).await, "{}", proxy.log());
    }
    let took = removed.elapsed().unwrap();
    assert!(took < Duration::from_secs(15), "{took:?}");
    assert!(is_served(&proxy, &named).await.is_err(), "the removed authority is still trusted");
    let more = timeout(Duration::from_millis(100), stays.read_u8()).await;
    assert!(!matches!(more, Ok(Err(_))), "a connection without a certificate has ended too");
}

/// The kind of the next handshake of a client that keeps its tickets, after it has read some bytes.
async fn handshake(proxy: &Proxy, config: &Arc<ClientConfig>) -> Result<HandshakeKind, String> {
    let mut stream = connect(proxy, config).await.map_err(|error| error.to_string())?;
    begin_http2(&mut stream).await.map_err(|error| error.to_string())?;
    Ok(stream.get_ref().1.handshake_kind().unwrap())
}

#[tokio::test]
async fn session_from_before_a_change_of_authorities_is_not_resumed() {
    let (ours, old) = (Authority::new("ours"), Authority::new("old"));
    let server = ours.server();
    let mut files = Mounted::new(&server, old.pem());
    let proxy = start(NOWHERE, &files.client_flags(), &["--tls-min", "1.2"]);
    let versions = [&TLS12, &TLS13];
    let clients = versions.map(|version| raw(&ours, &[version], &[b"h2"], Some(&old.client("w"))));
    for config in clients.iter().chain(&clients) {
        assert_eq!(handshake(&proxy, config).await, Ok(HandshakeKind::Full));
    }
    files.swap(&server.cert, &server.key, ours.pem());
    for config in &clients {
        let refused = || async { handshake(&proxy, config).await.err() };
        assert!(until(SEEN, refused).await.is_some(), "{}", proxy.log());
    }
    // Without certificates of clients, the same client resumes: this test can tell the difference.
    let proxy = start(NOWHERE, &files.flags(), &["--tls-min", "1.2"]);
    for version in versions {
        let config = raw(&ours, &[version], &[b"h2"], None);
        assert_eq!(handshake(&proxy, &config).await, Ok(HandshakeKind::Full));
        assert_eq!(handshake(&proxy, &config).await, Ok(HandshakeKind::Resumed));
    }
}

#[tokio::test]
async fn command_line_speaks_tls_and_shows_its_certificate() {
    let ca = Authority::new("ca");
    let files = Mounted::new(&ca.server(), ca.pem());
    ca.client("worker").write(files.folder.path(), "client");
    let fixture = Fixture::new(config()).await;
    let proxy = start(&NatsServer::shared().url(), &files.client_flags(), &[]);
    proxy.ready().await;
    fixture.publish("n", "by TLS").await;
    let [trust, cert, key] = ["ca.crt", "client.crt", "client.key"].map(|name| files.file(name));
    let port = proxy.grpc.rsplit_once(':').unwrap().1;
    let run = |arguments: &[&str], addr: &str, more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
        let output = command.args(arguments).args(["--addr", addr]).args(more).output().unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (text, output.status.code().unwrap())
    };
    let take = ["fetch", &*fixture.stream, &*fixture.consumer];
    let identity = ["--ca", &trust, "--cert", &cert, "--key", &key];
    let addr = format!("https://localhost:{port}");
    let (text, code) = run(&take, &addr, &identity);
    assert!(code == 0 && text.contains("by TLS"), "{text}");
    let (text, code) = run(&["probe"], &addr, &identity);
    assert_eq!((text.trim(), code), ("SERVING", 0));
    for (addr, more, cause) in [
        (&addr, &["--ca", &trust][..], "if the server asks for a certificate"),
        (&addr, &["--ca", &trust, "--cert", &cert], "--cert and --key must be given together"),
        (&addr, &["--ca", "/nowhere"], "--ca: cannot read /nowhere"),
        (&addr, &[], "cannot connect to"),
        (&proxy.grpc, &["--ca", &trust], "need an address that begins with https://"),
    ] {
        let (text, code) = run(&take, addr, more);
        assert!(code == 1 && text.contains(cause), "{addr} {more:?}: {code} {text}");
    }
    let named = [&identity[..], &["--server-name", "127.0.0.1"]].concat();
    let (text, code) = run(&["probe"], &addr, &named);
    assert_eq!((text.trim(), code), ("SERVING", 0));
    let named = [&identity[..], &["--server-name", "elsewhere"]].concat();
    let (text, _) = run(&take, &addr, &named);
    assert!(text.contains("not valid for name"), "{text}");
    eventually("the refused clients", || async {
        proxy.log().contains("a TLS handshake has failed").then_some(())
    })
    .await;
}
