//! A NATS server that lets the proxy in and drops it at once, again and again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use testkit::{eventually, proxy::Proxy};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

use super::run::measured;

#[tokio::test]
async fn short_lived_connections_are_retried_with_backoff() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("nats://{}", listener.local_addr().unwrap());
    let greeted = Arc::new(AtomicUsize::new(0));
    let counted = greeted.clone();
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            if greet(socket).await.is_ok() {
                counted.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    let proxy = Proxy::start_at(&url, &[]);
    eventually("a connection", || async { (greeted.load(Ordering::Relaxed) > 0).then_some(()) })
        .await;
    tokio::time::sleep(Duration::from_secs(4)).await;
    let count = greeted.load(Ordering::Relaxed);
    measured("connections that were dropped at once, in 4 s", count);
    // Two are kept: 50, 200, 500 ms, and then one a second. The library itself tries each once more.
    assert!(count <= 40, "{count} connections in 4 s: {}", proxy.log());
    // A busy machine may take longer for the first of them.
    eventually("six connections", || async {
        (greeted.load(Ordering::Relaxed) >= 6).then_some(())
    })
    .await;
}

/// Lets one in, up to its first ping, and drops it.
async fn greet(mut socket: TcpStream) -> std::io::Result<()> {
    let hello = b"INFO {\"server_id\":\"S\",\"version\":\"2.15.1\",\"max_payload\":1000}\r\n";
    socket.write_all(hello).await?;
    let mut said = Vec::new();
    while !said.ends_with(b"PING\r\n") {
        if socket.read_buf(&mut said).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
    socket.write_all(b"PONG\r\n").await
}
