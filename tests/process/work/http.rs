//! A worker that sends each message to an HTTP server.

use std::{
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use async_nats::HeaderMap;
use testkit::{authority::Authority, eventually, jetstream::Fixture, proxy::Proxy};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
};
use tokio_rustls::TlsAcceptor;

use super::{Worker, outcomes, stage};

/// The heads and the bodies that have come.
type Requests = Arc<Mutex<Vec<(String, Vec<u8>)>>>;

/// A server that answers as the body of each request says: `STATUS|HEADER|BODY`. `silence` gets no answer, and `close`
/// ends the connection.
struct Server {
    url: String,
    address: String,
    requests: Requests,
}

impl Server {
    async fn start() -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap())
    }

    fn on(listener: TcpListener) -> Self {
        let address = listener.local_addr().unwrap().to_string();
        let requests: Requests = Arc::default();
        let seen = requests.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(answer(socket, seen.clone()));
            }
        });
        Self { url: format!("http://{address}/tasks?from=test"), address, requests }
    }

    /// A server whose certificate this authority has signed.
    async fn start_with_tls(authority: &Authority) -> Self {
        let acceptor = TlsAcceptor::from(authority.server().server_tls());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let requests: Requests = Arc::default();
        let seen = requests.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let (acceptor, seen) = (acceptor.clone(), seen.clone());
                tokio::spawn(async move {
                    // A client that does not trust the certificate ends the handshake.
                    let Ok(socket) = acceptor.accept(socket).await else { return };
                    answer(socket, seen).await;
                });
            }
        });
        Self { url: format!("https://{address}/tasks"), address, requests }
    }

    fn requests(&self) -> Vec<(String, Vec<u8>)> {
        self.requests.lock().unwrap().clone()
    }
}

async fn answer(mut socket: impl AsyncRead + AsyncWrite + Unpin, seen: Requests) {
    let mut bytes = Vec::new();
    let (head, length, begin) = loop {
        if socket.read_buf(&mut bytes).await.unwrap_or(0) == 0 {
            return;
        }
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
            let length: usize = length.map_or(0, |length| length.parse().unwrap());
            break (head, length, end + 4);
        }
    };
    while bytes.len() < begin + length {
        assert_ne!(socket.read_buf(&mut bytes).await.unwrap(), 0);
    }
    let body = bytes[begin..].to_vec();
    seen.lock().unwrap().push((head, body.clone()));
    let text = String::from_utf8_lossy(&body).into_owned();
    let parts: Vec<&str> = text.split('|').collect();
    match parts[..] {
        ["silence"] => std::future::pending().await,
        [status, header, body] => {
            let answer =
                format!("HTTP/1.1 {status} x\r\n{header}\r\nconnection: close\r\n\r\n{body}");
            socket.write_all(answer.as_bytes()).await.unwrap();
            // With TLS, this tells the end of the answer. The client may have left.
            drop(socket.shutdown().await);
        }
        _ => {}
    }
}

fn start(proxy: &Proxy, fixture: &Fixture, url: &str, flags: &[&str]) -> Worker {
    Worker::start_command(proxy, fixture, &[&["--http", url], flags].concat(), &[])
}

#[tokio::test]
async fn each_answer_settles_its_message() {
    let (fixture, proxy) = stage().await;
    let server = Server::start().await;
    let date = SystemTime::now() + Duration::from_secs(7200);
    let date = httpdate::fmt_http_date(date);
    let cases = [
        ("200|x: y|fine".to_owned(), "acked", ""),
        ("204|x: y|".to_owned(), "acked", ""),
        ("429|Retry-After: 3600|".to_owned(), "nacked", "status 429; again in 1h"),
        (format!("503|Retry-After: {date}|"), "nacked", "status 503; again in 1h 59m"),
        ("503|x: y|".to_owned(), "nacked", "status 503; again in "),
        ("422|x: y|no such customer\nsecond line".to_owned(), "terminated", "no such customer"),
        ("500|Retry-After: 3600|".to_owned(), "nacked", "status 500; again in "),
        (format!("302|Location: {}|", server.url), "nacked", "status 302; again in "),
        ("silence".to_owned(), "nacked", "not done within 1s; again in "),
    ];
    for (body, ..) in &cases {
        fixture.publish("task", body.clone()).await;
    }
    let flags = ["--max", "9", "-j", "3", "--timeout", "1s", "--retry-delay", "10m"];
    let flags = [&flags[..], &["--max-retry-delay", "10m"]].concat();
    let mut worker = start(&proxy, &fixture, &server.url, &flags);
    let said = worker.ended().await;
    for (sequence, (body, outcome, why)) in (1_u64..).zip(&cases) {
        let line = said.iter().find(|line| line["sequence"] == sequence).unwrap();
        assert_eq!(line["outcome"], *outcome, "{body}: {line}");
        let begins = line["why"].as_str().unwrap_or_default().starts_with(why);
        // A second may pass until the date of the answer is read.
        assert!(begins || body.contains(&date), "{body}: {line}");
        assert_eq!(line["why"].as_str().unwrap_or_default().is_empty(), why.is_empty());
    }
    let dated = &said.iter().find(|line| line["sequence"] == 4).unwrap()["why"];
    assert!(
        dated.as_str().unwrap().contains("again in 1h 59m")
            || dated.as_str().unwrap().contains("again in 2h"),
        "{dated}"
    );
    assert_eq!(said.iter().find(|line| line["sequence"] == 1).unwrap()["stdout"], "fine");
    assert_eq!(server.requests().len(), 9, "no redirect is followed, and nothing is sent twice");
}

#[tokio::test]
async fn server_has_the_message_in_the_request() {
    let (fixture, proxy) = stage().await;
    let server = Server::start().await;
    let mut headers = HeaderMap::new();
    headers.append("Trace-Id", "one");
    headers.append("Trace-Id", "two");
    let payload = [b"200|x: y|".to_vec(), b"a\0b\xff".to_vec(), vec![b'x'; 900_000]].concat();
    fixture.publish_with("new", headers, payload.clone()).await;
    let mut worker = start(&proxy, &fixture, &server.url, &["--until-empty"]);
    let key = worker.path("key");
    std::fs::write(&key, "secret\n").unwrap();
    assert_eq!(outcomes(&worker.ended().await), [(1, "acked")]);
    let (head, body) = server.requests().remove(0);
    assert!(body == payload, "{} bytes came", body.len());
    for line in [
        "post /tasks?from=test http/1.1",
        &format!("host: {}", server.address),
        "content-type: application/octet-stream",
        &format!("fetch-proxy-stream: {}", fixture.stream).to_lowercase(),
        "fetch-proxy-consumer: worker",
        &format!("fetch-proxy-subject: {}.new", fixture.stream).to_lowercase(),
        "fetch-proxy-sequence: 1",
        "fetch-proxy-attempt: 1",
        "fetch-proxy-max-attempts: 0",
        "fetch-proxy-header-trace-id: one",
        "fetch-proxy-header-trace-id: two",
    ] {
        assert!(head.lines().any(|said| said == line), "{line} is not in:\n{head}");
    }
    assert!(!head.contains("authorization"), "{head}");

    fixture.publish("new", "200|x: y|").await;
    let flags = ["--until-empty", "--http-token-file", key.to_str().unwrap()];
    let mut worker = start(&proxy, &fixture, &server.url, &flags);
    worker.ended().await;
    let (head, _) = server.requests().remove(1);
    assert!(head.lines().any(|line| line == "authorization: bearer secret"), "{head}");
}

#[tokio::test]
async fn message_goes_only_to_a_server_whose_certificate_is_trusted() {
    let (fixture, proxy) = stage().await;
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let server = Server::start_with_tls(&ours).await;
    fixture.publish("task", "200|x: y|fine").await;
    let folder = tempfile::tempdir().unwrap();
    for (authority, outcome, why) in [
        (Some(&other), "nacked", "TLS: invalid peer certificate: "),
        // The system's authorities are trusted then.
        (None, "nacked", "TLS: invalid peer certificate: "),
        (Some(&ours), "acked", ""),
    ] {
        let file = folder.path().join("ca.pem");
        let mut flags = vec!["--max", "1", "--retry-delay", "0s", "--max-retry-delay", "0s"];
        if let Some(authority) = authority {
            std::fs::write(&file, authority.pem()).unwrap();
            flags.extend(["--http-ca", file.to_str().unwrap()]);
        }
        let said = start(&proxy, &fixture, &server.url, &flags).ended().await;
        assert_eq!(outcomes(&said), [(1, outcome)], "{said:?}");
        let told = said[0]["why"].as_str().unwrap_or_default();
        assert!(told.starts_with(why) && told.is_empty() == why.is_empty(), "{told}");
        assert_eq!(server.requests().len(), usize::from(outcome == "acked"));
    }
}

#[tokio::test]
async fn worker_slows_down_while_nobody_listens_and_continues_afterwards() {
    let (fixture, proxy) = stage().await;
    fixture.publish_many(100).await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let url = format!("http://{address}/");
    let flags = ["-j", "5", "--retry-delay", "0s", "--max-retry-delay", "0s"];
    let mut worker = start(&proxy, &fixture, &url, &flags);
    let said = worker.settled(7).await;
    let why = said[0]["why"].as_str().unwrap();
    assert!(why.starts_with("cannot connect: Connection refused"), "{why}");
    // The first five begin together. After that, one begins after each longer time.
    let notes = worker.read("err");
    for seconds in ["0.5", "1.0"] {
        let note = format!("note: no message begins for {seconds} s, because the server is away");
        assert!(notes.contains(&note), "{note} is not in:\n{notes}");
    }
    let closures = notes.matches("no message begins").count();
    let nacked = worker.said().len();
    assert!(nacked <= 5 + closures + 1, "{nacked} attempts in {closures} rounds");
    let _server = Server::on(TcpListener::bind(address).await.unwrap());
    fixture.publish("task", "200|x: y|").await;
    eventually("a message that was answered", || async {
        let is_reached = |line: &serde_json::Value| {
            !line["why"].as_str().unwrap_or_default().starts_with("cannot connect")
        };
        worker.said().iter().any(is_reached).then_some(())
    })
    .await;
    worker.signal("TERM");
    worker.ended().await;
}

#[tokio::test]
async fn request_is_dropped_when_the_worker_must_stop() {
    let (fixture, proxy) = stage().await;
    let server = Server::start().await;
    fixture.publish("task", "silence").await;
    let flags = ["--stop-timeout", "0s"];
    let mut worker = start(&proxy, &fixture, &server.url, &flags);
    eventually("the request", || async { (!server.requests().is_empty()).then_some(()) }).await;
    worker.signal("TERM");
    assert_eq!(outcomes(&worker.ended().await), [(1, "given-back")]);
}
