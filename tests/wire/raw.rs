//! Bytes that no client library would send: no message, short frames, headers that lie. Each gets a
//! status of our table, or a closed connection; none stops the service.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Method, Request};
use testkit::{
    BOUND,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, fetch},
};

const FETCH: &str = "/fetchproxy.v1.FetchService/Fetch";

/// Status and reason that one request of raw bytes is answered with; `None` where there is neither.
async fn send(
    proxy: &Proxy,
    method: Method,
    path: &str,
    headers: &[(&'static str, &str)],
    body: Vec<u8>,
) -> Option<(String, String)> {
    let socket = tokio::net::TcpStream::connect(&proxy.grpc).await.unwrap();
    let (client, connection) = h2::client::handshake(socket).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let uri = format!("http://{}{path}", proxy.grpc);
    let mut request = Request::builder().method(method).uri(uri);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let (response, mut stream) = client.send_request(request.body(()).unwrap(), false).unwrap();
    // The server may answer before it has read all of it, and reset the rest.
    let _ = stream.send_data(Bytes::from(body), true);
    let answer = async {
        let response = response.await.ok()?;
        let mut found = read(response.headers());
        let mut body = response.into_body();
        while let Some(Ok(chunk)) = body.data().await {
            let _ = body.flow_control().release_capacity(chunk.len());
        }
        if found.is_none() {
            found = body.trailers().await.ok().flatten().and_then(|trailers| read(&trailers));
        }
        found
    };
    let answer = tokio::time::timeout(BOUND, answer).await.expect("it hangs");
    driver.abort();
    answer
}

fn read(headers: &HeaderMap) -> Option<(String, String)> {
    let text = |name: &str| Some(headers.get(name)?.to_str().unwrap().to_owned());
    Some((text("grpc-status")?, text("fetchproxy-reason").unwrap_or_default()))
}

/// A gRPC frame: a flag, a length, and whatever.
fn frame(flag: u8, length: u32, body: &[u8]) -> Vec<u8> {
    [&[flag], &length.to_be_bytes()[..], body].concat()
}

const GRPC: (&str, &str) = ("content-type", "application/grpc");

fn malformed() -> Option<(String, String)> {
    Some(("3".to_owned(), "MALFORMED".to_owned()))
}

#[tokio::test]
async fn bytes_without_a_message_are_malformed() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let garbage = [0xff; 40];
    for body in [
        frame(0, 40, &garbage),
        // A string field that claims more bytes than there are.
        frame(0, 2, &[0x0a, 0x7f]),
        // A string field that is not UTF-8.
        frame(0, 3, &[0x0a, 0x01, 0xff]),
        // A frame that ends before its length, and one that ends within its head.
        frame(0, 100, &[0; 10]),
        vec![0, 0, 0],
        // A flag that means nothing.
        frame(7, 0, &[]),
        // Compressed, and never said how.
        frame(1, 2, &[1, 2]),
        // No message at all.
        Vec::new(),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
    ] {
        let shown = format!("{:?}", &body[..body.len().min(12)]);
        let answer = send(&proxy, Method::POST, FETCH, &[GRPC], body).await;
        assert_eq!(answer, malformed(), "{shown}");
    }
    still_serves(&proxy).await;
}

#[tokio::test]
async fn compressed_garbage_is_malformed_and_unknown_compression_unsupported() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let gzip = [GRPC, ("grpc-encoding", "gzip")];
    let answer = send(&proxy, Method::POST, FETCH, &gzip, frame(1, 4, b"oops")).await;
    assert_eq!(answer, malformed());
    let zip = [GRPC, ("grpc-encoding", "zip")];
    let answer = send(&proxy, Method::POST, FETCH, &zip, frame(1, 4, b"oops")).await;
    assert_eq!(answer, Some(("12".to_owned(), "UNSUPPORTED".to_owned())));
    still_serves(&proxy).await;
}

#[tokio::test]
async fn request_over_four_mebibytes_is_refused_unread() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let claimed = frame(0, 5 * 1024 * 1024, &[0; 100]);
    let answer = send(&proxy, Method::POST, FETCH, &[GRPC], claimed).await;
    assert_eq!(answer, Some(("8".to_owned(), "REQUEST_TOO_LARGE".to_owned())));
    still_serves(&proxy).await;
}

#[tokio::test]
async fn malformed_deadline_counts_as_none() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    for timeout in ["x", "-1S", "99999999999999H", ""] {
        let headers = [GRPC, ("grpc-timeout", timeout)];
        let answer = send(&proxy, Method::POST, FETCH, &headers, frame(0, 0, &[])).await;
        // An empty request has no stream.
        assert_eq!(answer, Some(("3".to_owned(), "INVALID_FIELD".to_owned())), "{timeout:?}");
    }
}

/// The HTTP status of one request, and what is in its answer.
async fn http(
    proxy: &Proxy,
    method: Method,
    content: Option<&str>,
    body: Vec<u8>,
) -> (u16, String) {
    let socket = tokio::net::TcpStream::connect(&proxy.grpc).await.unwrap();
    let (client, connection) = h2::client::handshake(socket).await.unwrap();
    let driver = tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let mut request =
        Request::builder().method(method).uri(format!("http://{}{FETCH}", proxy.grpc));
    if let Some(content) = content {
        request = request.header("content-type", content);
    }
    let (response, mut stream) = client.send_request(request.body(()).unwrap(), false).unwrap();
    let _ = stream.send_data(Bytes::from(body), true);
    let response = tokio::time::timeout(BOUND, response).await.expect("it hangs").unwrap();
    let (status, mut body) = (response.status().as_u16(), response.into_body());
    let mut text = Vec::new();
    while let Some(Ok(chunk)) = body.data().await {
        text.extend_from_slice(&chunk);
    }
    driver.abort();
    (status, String::from_utf8_lossy(&text).into_owned())
}

#[tokio::test]
async fn only_grpc_calls_receive_messages() {
    let fixture = Fixture::new(config()).await;
    fixture.publish("x", "1").await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let request = prost::Message::encode_to_vec(&fetch(&fixture, 1, 5000));
    let body = frame(0, u32::try_from(request.len()).unwrap(), &request);
    for content in [
        None,
        Some("text/plain"),
        Some("application/json"),
        Some("application/grpc-web"),
        Some("application/grpc-web+proto"),
        Some("application/grpc+json"),
    ] {
        let (status, text) = http(&proxy, Method::POST, content, body.clone()).await;
        assert_eq!(status, 415, "{content:?}");
        assert!(text.contains("application/grpc") && text.lines().count() == 1, "{text}");
    }
    let (status, text) = http(&proxy, Method::GET, Some("application/grpc"), Vec::new()).await;
    assert_eq!((status, text.lines().count()), (405, 1), "{text}");
    assert_eq!(fixture.info().await.delivered.consumer_sequence, 0, "something was pulled");
    let (status, _) = http(&proxy, Method::POST, Some("application/grpc+proto"), body).await;
    assert_eq!(status, 200);
}

/// Everything that the port says to somebody who sends this.
fn said(port: &str, sent: &[u8]) -> Vec<u8> {
    let mut socket = TcpStream::connect(port).unwrap();
    socket.set_read_timeout(Some(BOUND)).unwrap();
    socket.write_all(sent).unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).unwrap();
    answer
}

#[tokio::test]
async fn peer_with_another_protocol_is_answered_and_logged() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let get = b"GET /readyz HTTP/1.1\r\nHost: x\r\n\r\n";
    let answer = String::from_utf8(said(&proxy.grpc, get)).unwrap();
    assert!(answer.starts_with("HTTP/1.1 505 "), "{answer}");
    let (_, text) = answer.split_once("\r\n\r\n").unwrap();
    assert!(text.contains("gRPC") && text.lines().count() == 1, "{text}");
    let logged = || async { proxy.log().contains("\"spoken\":\"HTTP/1\"").then_some(()) };
    testkit::eventually("the log line", logged).await;
    // A TLS alert, which a client shows as a wrong version.
    for port in [&proxy.grpc, &proxy.ops] {
        let hello = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
        assert_eq!(said(port, &hello), [21, 3, 1, 0, 2, 2, 70]);
    }
}

#[tokio::test]
async fn call_to_the_ops_port_is_told_the_right_port() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let ops = format!("http://{}", proxy.ops);
    let mut client = testkit::proxy::Client::connect(ops).await.unwrap();
    let refused = client.ack(testkit::proxy::ack("x")).await.unwrap_err();
    assert_eq!(testkit::proxy::reason(&refused).1, "UNSUPPORTED");
    assert!(refused.message().contains("--listen"), "{}", refused.message());
    let get = b"GET /nothing HTTP/1.0\r\n\r\n";
    let answer = String::from_utf8(said(&proxy.ops, get)).unwrap();
    assert!(answer.starts_with("HTTP/1.0 404") && answer.contains("/readyz"), "{answer}");
}

#[tokio::test]
async fn request_without_grpc_is_refused() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    for (method, content) in [(Method::GET, GRPC), (Method::POST, ("content-type", "text/plain"))] {
        // Whatever the answer is, there is one.
        send(&proxy, method, FETCH, &[content], Vec::new()).await;
    }
    still_serves(&proxy).await;
}

#[tokio::test]
async fn connection_of_noise_is_closed_and_disturbs_nobody() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    for noise in [
        &b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..],
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        &[0; 4096],
    ] {
        let mut socket = TcpStream::connect(&proxy.grpc).unwrap();
        socket.set_read_timeout(Some(BOUND)).unwrap();
        socket.write_all(noise).unwrap();
        // The other side closes: reading ends, by an end or by a reset.
        let _ = socket.read_to_end(&mut Vec::new());
    }
    // One that says nothing for a while is no burden either.
    let silent = TcpStream::connect(&proxy.grpc).unwrap();
    still_serves(&proxy).await;
    drop(silent);
}

async fn still_serves(proxy: &Proxy) {
    let fixture = Fixture::new(config()).await;
    fixture.publish("x", "1").await;
    let mut client = proxy.client().await;
    let answer =
        tokio::time::timeout(Duration::from_secs(10), client.fetch(fetch(&fixture, 1, 5000)));
    assert_eq!(answer.await.unwrap().unwrap().into_inner().messages.len(), 1);
}
