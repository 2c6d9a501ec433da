//! The edge of the server against peers that say nothing, say too much, or stay too long.

use std::time::{Duration, Instant};

use fetch_proxy::client::probe;
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, fetch, reason, waiting},
    relay::{Flow, Relay},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};
use tonic::{Code, transport::Endpoint};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
use tonic_types::StatusExt as _;

/// Reads until the server closes the connection.
async fn closed(mut socket: TcpStream) {
    let mut sink = Vec::new();
    // A reset is an end like any other.
    let _ = timeout(BOUND, socket.read_to_end(&mut sink)).await.expect("it stays open");
}

#[tokio::test]
async fn peer_without_a_whole_preface_is_closed() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    for listener in [&proxy.grpc, &proxy.ops] {
        for said in [&b""[..], b"PRI * HTTP/2.0\r\n"] {
            let began = Instant::now();
            let mut socket = TcpStream::connect(listener).await.unwrap();
            socket.write_all(said).await.unwrap();
            closed(socket).await;
            let took = began.elapsed();
            println!("measured: silent peer closed after: {took:?}");
            assert!(took >= Duration::from_secs(5), "{took:?} is no patience");
        }
    }
}

#[tokio::test]
async fn connections_beyond_the_cap_get_a_reason_and_health() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--max-connections", "2"]);
    let mut within: Vec<Client> = Vec::new();
    for _ in 0..2 {
        let mut client = proxy.client().await;
        client.fetch(fetch(&fixture, 1, 0)).await.unwrap();
        within.push(client);
    }
    let refused = proxy.client().await.fetch(fetch(&fixture, 1, 0)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::ResourceExhausted, "CONNECTION_LIMIT".to_owned()));
    assert!(refused.get_details_retry_info().is_some());
    eventually("health", || async { probe(&proxy.grpc, "", BOUND).await.unwrap().1.then_some(()) })
        .await;
    within.pop();
    eventually("a place", || async {
        proxy.client().await.fetch(fetch(&fixture, 1, 0)).await.ok()
    })
    .await;
}

#[tokio::test]
async fn idle_clients_leave_files_for_nats_and_probes() {
    let mut server = NatsServer::start();
    let proxy = Proxy::start_with_files(&server.url(), 64);
    proxy.ready().await;
    assert!(proxy.log().contains("the limit of open files is too low"), "{}", proxy.log());
    let mut idle = Vec::new();
    for _ in 0..100 {
        idle.push(TcpStream::connect(&proxy.grpc).await.unwrap());
        // They are open for longer than a preface may take.
        let (send, connection) = h2::client::handshake(idle.pop().unwrap()).await.unwrap();
        idle_for_good(send, connection);
    }
    server.kill();
    eventually("the loss", || async {
        proxy.log().contains("NATS cannot be reached").then_some(())
    })
    .await;
    server.restart();
    eventually("NATS again", || async {
        (proxy.log().matches("connected to NATS").count() >= 4).then_some(())
    })
    .await;
    eventually("readiness", || async { probe(&proxy.ops, "", BOUND).await.ok()?.1.then_some(()) })
        .await;
    assert!(!proxy.log().contains("cannot be accepted"), "{}", proxy.log());
}

/// Keeps a connection open, and answers its pings.
fn idle_for_good(
    send: h2::client::SendRequest<bytes::Bytes>,
    connection: h2::client::Connection<TcpStream>,
) {
    tokio::spawn(async move {
        let _send = send;
        let _ = connection.await;
    });
}

#[tokio::test]
async fn probe_is_served_despite_idle_connections_on_the_ops_port() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let mut idle = Vec::new();
    for _ in 0..300 {
        let mut socket = TcpStream::connect(&proxy.ops).await.unwrap();
        socket.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut answer = [0; 12];
        timeout(BOUND, socket.read_exact(&mut answer)).await.expect("no answer").unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        idle.push(socket);
    }
    assert!(probe(&proxy.ops, "liveness", BOUND).await.unwrap().1);
    // The first is the one that was idle longest.
    closed(idle.remove(0)).await;
    let mut last = idle.pop().unwrap();
    last.write_all(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    while !answer.ends_with(b"HTTP/1.1 200") {
        answer.push(timeout(BOUND, last.read_u8()).await.expect("no answer").unwrap());
    }
}

/// A stream that does not end by itself holds no place of those that are few.
#[tokio::test]
async fn connections_beyond_the_cap_close_soon_despite_open_streams() {
    let proxy = Proxy::start(NatsServer::shared(), &["--max-connections", "1"]);
    let _within = proxy.client().await;
    proxy.ready().await;
    let watch = async || {
        let channel = Endpoint::from_shared(format!("http://{}", proxy.grpc)).unwrap();
        let began = Instant::now();
        let mut health = HealthClient::new(channel.connect().await.unwrap());
        let watching = health.watch(HealthCheckRequest::default());
        let mut watching = watching.await.unwrap().into_inner();
        while let Ok(Some(_)) = watching.message().await {}
        began.elapsed()
    };
    let watches = (0..8).map(|_| timeout(BOUND, watch()));
    for took in futures_util::future::join_all(watches).await {
        let took = took.expect("it stays open");
        println!("measured: a Watch beyond the cap is gone after: {took:?}");
        assert!(took > Duration::from_secs(3), "{took:?}");
    }
}

#[tokio::test]
async fn calls_beyond_the_cap_get_a_reason_and_health_is_free() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--max-calls", "1"]);
    let mut client = proxy.client().await;
    let open = waiting(&client, &fixture, fetch(&fixture, 1, 60_000)).await;
    let refused = client.fetch(fetch(&fixture, 1, 0)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::ResourceExhausted, "CALL_LIMIT".to_owned()));
    assert!(refused.get_details_retry_info().is_some());
    eventually("health", || async { probe(&proxy.grpc, "", BOUND).await.unwrap().1.then_some(()) })
        .await;
    fixture.publish("n", "x").await;
    assert_eq!(open.await.unwrap().unwrap().into_inner().messages.len(), 1);
    // The place is free when the answer is written.
    eventually("the place", || {
        let (mut client, now) = (client.clone(), fetch(&fixture, 1, 0));
        async move { client.fetch(now).await.ok() }
    })
    .await;
}

#[tokio::test]
async fn one_connection_leaves_half_of_the_fetch_calls_to_others() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--max-waiters", "10"]);
    let greedy = proxy.client().await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (mut greedy, long) = (greedy.clone(), fetch(&fixture, 1, 60_000));
        calls.spawn(async move { greedy.fetch(long).await });
    }
    for _ in 0..15 {
        let refused = timeout(BOUND, calls.join_next()).await.expect("it waits").unwrap();
        let refused = refused.unwrap().unwrap_err();
        assert_eq!(reason(&refused), (Code::ResourceExhausted, "WAITER_LIMIT".to_owned()));
        let info = refused.get_details_error_info().unwrap();
        assert_eq!(info.metadata["scope"], "connection");
    }
    proxy.client().await.fetch(fetch(&fixture, 1, 0)).await.unwrap();
}

#[tokio::test]
async fn old_connection_is_closed_without_losing_a_call() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &["--max-connection-age", "3s"]);
    let socket = TcpStream::connect(&proxy.grpc).await.unwrap();
    let (send, connection) = h2::client::handshake(socket).await.unwrap();
    let connection = tokio::spawn(connection);
    // Calls that overlap, one more every 100 ms, until the connection takes no more. Their answers are read
    // afterwards, and the client takes only some hundred small frames that are not read.
    let mut calls = Vec::new();
    let mut send = send.ready().await.unwrap();
    while let Ok((answer, mut body)) = send.send_request(call(&proxy, FETCH), false) {
        body.send_data(framed(&fetch(&fixture, 1, 200)), true).unwrap();
        calls.push(answer);
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut answered = 0;
    for answer in calls {
        let answer = match timeout(BOUND, answer).await.unwrap() {
            // The call was sent after the client acknowledged the notice. The server says that it
            // never looked at the call (RFC 9113, section 6.8), and the client may repeat it.
            Err(error) if error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR) => {
                continue;
            }
            answer => answer.expect("it was lost"),
        };
        answered += 1;
        let mut body = answer.into_body();
        while let Some(chunk) = body.data().await {
            chunk.expect("it was lost");
        }
        let trailers = body.trailers().await.expect("it was lost").expect("no trailers");
        assert_eq!(trailers["grpc-status"], "0");
    }
    assert!(answered > 1, "no calls overlapped with the end of the connection");
    drop(send);
    timeout(BOUND, connection).await.expect("it stays open").unwrap().expect("it broke");
}

const FETCH: &str = "/fetchproxy.v1.FetchService/Fetch";

fn call(proxy: &Proxy, path: &str) -> http::Request<()> {
    let uri = format!("http://{}{path}", proxy.grpc);
    let request = http::Request::post(uri).header("content-type", "application/grpc");
    request.header("te", "trailers").body(()).unwrap()
}

/// A message as gRPC frames it: not compressed, its length, itself.
fn framed(message: &impl prost::Message) -> bytes::Bytes {
    let body = message.encode_to_vec();
    let length = u32::try_from(body.len()).unwrap().to_be_bytes();
    [&[0][..], &length, &body].concat().into()
}

#[tokio::test]
async fn streams_of_one_connection_are_bounded() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let socket = TcpStream::connect(&proxy.grpc).await.unwrap();
    let (send, mut connection) = h2::client::handshake(socket).await.unwrap();
    let answered = async {
        let mut send = send.ready().await.unwrap();
        send.send_request(call(&proxy, "/x"), true).unwrap().0.await.unwrap();
    };
    tokio::select! {
        () = answered => {}
        ended = &mut connection => panic!("{ended:?}"),
    }
    assert_eq!(connection.max_concurrent_send_streams(), 1000);
}

#[tokio::test]
async fn dead_peer_stops_waiting() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let relay = Relay::to(&proxy.grpc).await;
    let dead = relay.client().await;
    let _open = waiting(&dead, &fixture, fetch(&fixture, 1, 120_000)).await;
    relay.flow(Flow::Stall, Flow::Stall);
    let began = Instant::now();
    // A ping after 10 s, 5 s for its answer, 5 s for the pull to end. Between two pulls nobody waits
    // either, but not for long.
    let mut quiet_since = None;
    let gone = loop {
        let waiting = fixture.info().await.num_waiting > 0;
        quiet_since = quiet_since.or(Some(Instant::now())).filter(|_| !waiting);
        if let Some(since) = quiet_since.filter(|since| since.elapsed() > Duration::from_secs(2)) {
            break since - began;
        }
        assert!(began.elapsed() < Duration::from_secs(40), "it still waits");
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    println!("measured: waiter of a dead peer gone after: {gone:?}");
    fixture.publish("n", "x").await;
    let answer = proxy.client().await.fetch(fetch(&fixture, 1, 5000)).await.unwrap();
    assert_eq!(answer.into_inner().messages.len(), 1, "the dead peer had the message");
}
