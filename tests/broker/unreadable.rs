//! A message counts as unreadable if, and only if, the client library cannot read it.

use async_nats::{ConnectOptions, Event};
use fetch_proxy::nats::unreadable;
use futures_util::StreamExt as _;
use testkit::{BOUND, nats_server::NatsServer, raw_nats};

/// Whether a client of its own survives the arrival of this message.
async fn survives(subject: &str, headers: &[u8]) -> bool {
    let server = NatsServer::shared();
    let (lost, mut losses) = tokio::sync::mpsc::unbounded_channel();
    let options = ConnectOptions::new().event_callback(move |event| {
        if event == Event::Disconnected {
            let _ = lost.send(());
        }
        std::future::ready(())
    });
    let client = options.connect(server.url()).await.unwrap();
    let mut messages = client.subscribe(subject.to_owned()).await.unwrap();
    client.flush().await.unwrap();
    // The server knows of the subscription once it has answered something that came after it.
    client.request("$JS.API.INFO", "".into()).await.unwrap();
    raw_nats::publish(&server.url(), subject.as_bytes(), headers, b"payload");
    tokio::select! {
        message = messages.next() => message.is_some(),
        _ = losses.recv() => false,
        () = tokio::time::sleep(BOUND) => panic!("{subject:?} never arrived"),
    }
}

const CORPUS: &[&[u8]] = &[
    b"NATS/1.0\r\n\r\n",
    b"NATS/1.0\r\nA: b\r\n\r\n",
    b"NATS/1.0\nA: b\n\n",
    b"NATS/1.0\r\nA: b\rc\r\n\r\n",
    b"NATS/1.0\r\nA: b\r\r\n\r\n",
    b"NATS/1.0\r\nA:\rb\r\n\r\n",
    b"NATS/1.0\r\nA: b\r\n c\rd\r\n\r\n",
    b"NATS/1.0\r\nA: b\r\n c\r\n\r\n",
    b"NATS/1.0\r\n c\r\n\r\n",
    b"NATS/1.0\r\nA: \xff\r\n\r\n",
    b"NATS/1.0\r\nA: \xc3\xa9\r\n\r\n",
    b"NATS/1.0\r\n\xc3\xa9: a\r\n\r\n",
    b"NATS/1.0\r\nno colon\r\n\r\n",
    b"NATS/1.0\r\nA b: c\r\n\r\n",
    b"NATS/1.0\r\nA : c\r\n\r\n",
    b"NATS/1.0\r\nA\rB: c\r\n\r\n",
    b"NATS/1.0\r\n: c\r\n\r\n",
    b"NATS/1.0\r\nA:\r\n\r\n",
    b"NATS/1.0\r\nA: b\0c\r\n\r\n",
    b"NATS/1.0\r\nA\0: b\r\n\r\n",
    b"NATS/1.0\r\nA: b",
    b"NATS/1.0 408 evil\r\n\r\n",
    b"NATS/1.0 evil\r\n\r\n",
    b"NATS/1.0 4088\r\n\r\n",
    b"NATS/1.0 099\r\n\r\n",
    b"NATS/1.0408\r\n\r\n",
    b"NATS/1.0\t200\r\n\r\n",
    b"NATS/1.0  200  ok\r\n\r\n",
    b"NATS/1.0\x0b\r\n\r\n",
    b"NATS/1.1\r\n\r\n",
    b"HTTP/1.1\r\n\r\n",
    b"\r\n\r\n",
    b" ",
];

#[tokio::test]
async fn library_breaks_at_unreadable_messages_only() {
    for (number, headers) in CORPUS.iter().enumerate() {
        let subject = format!("unreadable.{number}");
        let why = unreadable(&subject, headers);
        let survived = survives(&subject, headers).await;
        assert_eq!(survived, why.is_none(), "{:?}: {why:?}", String::from_utf8_lossy(headers));
    }
}

#[tokio::test]
async fn library_breaks_at_unreadable_subjects_only() {
    for subject in ["a\u{a0}b", "a\u{b}b", "a\u{85}b", "a\u{e9}b", "a\u{200b}b"] {
        let why = unreadable(subject, CORPUS[0]);
        let survived = survives(subject, CORPUS[0]).await;
        assert_eq!(survived, why.is_none(), "{subject:?}: {why:?}");
    }
}

/// Headers made of pieces that matter to a parser, in every order that chance finds.
#[tokio::test]
async fn library_breaks_at_unreadable_random_headers_only() {
    const PIECES: &[&[u8]] =
        &[b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b"A", b"\xc3\xa9", b"\xff", b"1", b"\xc2\x85"];
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut chance = |below: usize| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        (seed % below as u64) as usize
    };
    for number in 0..300 {
        let mut headers = b"NATS/1.0".to_vec();
        if chance(4) > 0 {
            headers.extend_from_slice(b"\r\nA: b");
        }
        for _ in 0..chance(6) {
            headers.extend_from_slice(PIECES[chance(PIECES.len())]);
        }
        headers.extend_from_slice(b"\r\n\r\n");
        let subject = format!("chance.{number}");
        let why = unreadable(&subject, &headers);
        let survived = survives(&subject, &headers).await;
        assert_eq!(survived, why.is_none(), "{:?}: {why:?}", String::from_utf8_lossy(&headers));
    }
}
