//! What a port with TLS accepts, and what others are told.

use std::time::Instant;

use testkit::{BOUND, eventually, until};

use super::*;

const WITHOUT_TLS: &str = "a client speaks without TLS to a port with TLS";
const OLD_VERSION: &str = "a client offers only versions of TLS below --tls-min";

fn served() -> (Authority, Mounted, Proxy) {
    served_with(&[])
}

fn served_with(more: &[&str]) -> (Authority, Mounted, Proxy) {
    let ca = Authority::new("ca");
    let files = Mounted::new(&ca.server(), ca.pem());
    let proxy = start(NOWHERE, &files.flags(), more);
    (ca, files, proxy)
}

/// A line is written a moment after the client has its answer, and once in ten seconds.
async fn told_once(proxy: &Proxy, text: &str) {
    eventually(text, || async { (said(proxy, text) > 0).then_some(()) }).await;
    assert_eq!(said(proxy, text), 1, "{}", proxy.log());
}

#[tokio::test]
async fn client_that_offers_http2_or_no_protocol_is_served() {
    let (ca, _files, proxy) = served();
    for (alpn, chosen) in
        [(&[&b"h2"[..]][..], Some(&b"h2"[..])), (&[b"http/1.1", b"h2"], Some(b"h2")), (&[], None)]
    {
        let mut stream = connect(&proxy, &raw(&ca, &[&TLS13], alpn, None)).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), chosen);
        begin_http2(&mut stream).await.unwrap();
    }
    let http1 = raw(&ca, &[&TLS13], &[b"http/1.1"], None);
    let error = connect(&proxy, &http1).await.unwrap_err().to_string();
    assert!(error.contains("NoApplicationProtocol"), "{error}");
}

#[tokio::test]
async fn http1_inside_tls_is_answered_in_http1() {
    let (ca, _files, proxy) = served();
    let mut stream = connect(&proxy, &raw(&ca, &[&TLS13], &[], None)).await.unwrap();
    stream.write_all(b"GET /livez HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 505 ") && answer.contains("--ops-listen"), "{answer}");
}

#[tokio::test]
async fn client_below_the_lowest_version_is_refused_and_named() {
    let (ca, _files, proxy) = served();
    let old = raw(&ca, &[&TLS12], &[b"h2"], None);
    assert!(is_served(&proxy, &old).await.is_err());
    assert!(is_served(&proxy, &old).await.is_err());
    told_once(&proxy, OLD_VERSION).await;
    let (ca, _files, proxy) = served_with(&["--tls-min", "1.2"]);
    for version in [&TLS12, &TLS13] {
        is_served(&proxy, &raw(&ca, &[version], &[b"h2"], None)).await.unwrap();
    }
}

#[tokio::test]
async fn client_without_tls_is_answered_and_named() {
    let (_ca, _files, proxy) = served();
    let mut http2 = TcpStream::connect(&proxy.grpc).await.unwrap();
    http2.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    timeout(BOUND, http2.read_to_end(&mut answer)).await.unwrap().unwrap();
    let goaway = String::from_utf8_lossy(&answer);
    assert!(goaway.contains("this port speaks TLS alone"), "{goaway}");
    let mut http1 = TcpStream::connect(&proxy.grpc).await.unwrap();
    http1.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    timeout(BOUND, http1.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("with TLS alone"), "{answer}");
    told_once(&proxy, WITHOUT_TLS).await;
    let refused = FetchServiceClient::connect(format!("http://{}", proxy.grpc)).await;
    if let Ok(mut client) = refused {
        client.ack(testkit::proxy::ack("t")).await.expect_err("no call is answered without TLS");
    }
}

#[tokio::test]
async fn client_with_tls_at_a_port_without_tls_is_named() {
    let ca = Authority::new("ca");
    let proxy = start(NOWHERE, &[], &[]);
    let error = connect(&proxy, &h2(&ca, None)).await.unwrap_err().to_string();
    assert!(error.contains("ProtocolVersion"), "{error}");
    told_once(&proxy, "a client speaks TLS to a port without TLS").await;
}

#[tokio::test]
async fn client_that_does_not_trust_the_server_is_told_in_the_log() {
    let (_ca, _files, proxy) = served();
    let other = Authority::new("other");
    assert!(connect(&proxy, &h2(&other, None)).await.is_err());
    eventually("the line", || async {
        (said(&proxy, "a TLS handshake has failed") == 1).then_some(())
    })
    .await;
}

/// Half of them are silent, and half stop within the first message of a handshake.
#[tokio::test]
async fn thousand_half_open_handshakes_end_after_five_seconds_and_stop_nobody() {
    let (ca, _files, proxy) = served();
    let config = h2(&ca, None);
    let began = Instant::now();
    let mut open = Vec::new();
    for number in 0..1000 {
        let mut stream = TcpStream::connect(&proxy.grpc).await.unwrap();
        if number % 2 == 0 {
            stream.write_all(&[22, 3, 1, 1, 0, 1, 0]).await.unwrap();
        }
        open.push(stream);
    }
    is_served(&proxy, &config).await.unwrap();
    for mut stream in open {
        let mut rest = [0; 16];
        let ended = timeout(BOUND, stream.read(&mut rest)).await.expect("it stays open");
        assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    }
    assert!(began.elapsed() >= Duration::from_secs(5), "a slow client has five seconds");
    assert!(until(SEEN, || async { is_served(&proxy, &config).await.ok() }).await.is_some());
}
