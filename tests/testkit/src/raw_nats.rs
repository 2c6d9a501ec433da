//! Publishes as no client library would: raw headers over a bare TCP connection.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
};

/// Publishes a message with these raw headers, to nobody in particular. Returns when the server has
/// taken it. `subject` and `headers` may be any bytes that the protocol can frame.
pub fn publish(nats_url: &str, subject: &[u8], headers: &[u8], payload: &[u8]) {
    let address = nats_url.trim_start_matches("nats://");
    let (user, address) = address
        .split_once('@')
        .map_or((None, address), |(user, address)| (user.split_once(':'), address));
    let mut stream = TcpStream::connect(address).unwrap();
    let mut connect = serde_json::json!({ "verbose": false, "headers": true });
    if let Some((user, password)) = user {
        connect["user"] = user.into();
        connect["pass"] = password.into();
    }
    let (length, total) = (headers.len(), headers.len() + payload.len());
    let mut bytes = format!("CONNECT {connect}\r\n").into_bytes();
    bytes.extend_from_slice(b"HPUB ");
    bytes.extend_from_slice(subject);
    bytes.extend_from_slice(format!(" {length} {total}\r\n").as_bytes());
    bytes.extend_from_slice(headers);
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(b"\r\nPING\r\n");
    stream.write_all(&bytes).unwrap();
    for line in BufReader::new(stream).lines() {
        let line = line.unwrap();
        assert!(!line.starts_with("-ERR"), "{line}");
        if line.starts_with("PONG") {
            return;
        }
    }
    panic!("the server hung up");
}
