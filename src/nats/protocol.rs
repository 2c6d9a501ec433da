//! The lines of the NATS protocol, as far as the settling connection needs them. Pure: no I/O.
//!
//! ```text
//!  server ─▶ INFO {json}   MSG subject sid [reply] size    HMSG subject sid [reply] headers size
//!            PING   PONG   +OK   -ERR 'text'
//!  client ─▶ CONNECT {json}   PUB subject [reply] size   SUB subject sid   UNSUB sid   PING   PONG
//! ```
//! A line ends with CR LF, and a payload follows its line. A server that writes anything else is not a
//! server that settlements can be sent to, so the connection ends.

use std::io::Write as _;

use bytes::{Buf as _, Bytes, BytesMut};

/// Longest line, in bytes: the line of a message is below 4 KiB, and INFO lists the servers of a cluster.
const LONGEST_LINE: usize = 256 << 10;
/// Largest message, in bytes: nats-server accepts no `max_payload` above it.
const LARGEST_MESSAGE: usize = 64 << 20;

/// One operation of the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServerOp {
    /// The description of the server, in JSON.
    Info(Bytes),
    /// A message for a subscription.
    Message(ServerMessage),
    /// A question whether the client lives.
    Ping,
    /// The answer to a `PING`.
    Pong,
    /// An answer that nobody waits for.
    Ok,
    /// A refusal, or the reason why the server will close the connection.
    Error(String),
}

/// A message for a subscription.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerMessage {
    /// The number of the subscription.
    pub sid: u64,
    /// The subject.
    pub subject: String,
    /// The subject for an answer.
    pub reply: Option<String>,
    /// The status in the headers, such as 503. Other headers are left out.
    pub status: Option<u16>,
    /// The payload.
    pub payload: Bytes,
}

/// The server wrote something that is not the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the server does not speak the NATS protocol")]
pub struct Malformed;

/// Takes the first whole operation out of `buffer`. `None`: more bytes must come first.
///
/// # Errors
/// The bytes are no operation, whatever comes after them.
pub fn take_op(buffer: &mut BytesMut) -> Result<Option<ServerOp>, Malformed> {
    let Some(end) = buffer.windows(2).take(LONGEST_LINE).position(|pair| pair == b"\r\n") else {
        return if buffer.len() > LONGEST_LINE { Err(Malformed) } else { Ok(None) };
    };
    let line = &buffer[..end];
    let (word, rest) = match line.iter().position(|byte| matches!(byte, b' ' | b'\t')) {
        Some(at) => (&line[..at], line[at + 1..].trim_ascii()),
        None => (line, &[][..]),
    };
    let is = |name: &str| word.eq_ignore_ascii_case(name.as_bytes());
    let op = if is("MSG") || is("HMSG") {
        return take_message(buffer, end, is("HMSG"));
    } else if is("PING") {
        ServerOp::Ping
    } else if is("PONG") {
        ServerOp::Pong
    } else if is("+OK") {
        ServerOp::Ok
    } else if is("-ERR") {
        let text = String::from_utf8_lossy(rest);
        ServerOp::Error(text.trim_matches('\'').to_owned())
    } else if is("INFO") {
        ServerOp::Info(Bytes::copy_from_slice(rest))
    } else {
        return Err(Malformed);
    };
    buffer.advance(end + 2);
    Ok(Some(op))
}

/// Takes a message whose line ends at `end`.
fn take_message(
    buffer: &mut BytesMut,
    end: usize,
    with_headers: bool,
) -> Result<Option<ServerOp>, Malformed> {
    let line = str::from_utf8(&buffer[..end]).map_err(|_| Malformed)?;
    let mut fields = line.split_ascii_whitespace().skip(1);
    let fields: [Option<&str>; 6] = std::array::from_fn(|_| fields.next());
    // The numbers stand at the end, and the reply is optional.
    let (subject, sid, reply, sizes) = match (with_headers, fields) {
        (false, [Some(subject), Some(sid), Some(size), None, ..]) => {
            (subject, sid, None, (None, size))
        }
        (false, [Some(subject), Some(sid), Some(reply), Some(size), None, _]) => {
            (subject, sid, Some(reply), (None, size))
        }
        (true, [Some(subject), Some(sid), Some(headers), Some(size), None, _]) => {
            (subject, sid, None, (Some(headers), size))
        }
        (true, [Some(subject), Some(sid), Some(reply), Some(headers), Some(size), None]) => {
            (subject, sid, Some(reply), (Some(headers), size))
        }
        _ => return Err(Malformed),
    };
    let size: usize = number(sizes.1).ok_or(Malformed)?;
    let headers: usize = sizes.0.map_or(Some(0), number).ok_or(Malformed)?;
    if size > LARGEST_MESSAGE || headers > size {
        return Err(Malformed);
    }
    let whole = end + 2 + size + 2;
    if buffer.len() < whole {
        return Ok(None);
    }
    if &buffer[whole - 2..whole] != b"\r\n" {
        return Err(Malformed);
    }
    let (subject, reply) = (subject.to_owned(), reply.map(str::to_owned));
    let sid = number(sid).ok_or(Malformed)?;
    buffer.advance(end + 2);
    let status = status(&buffer[..headers]);
    buffer.advance(headers);
    let payload = buffer.split_to(size - headers).freeze();
    buffer.advance(2);
    Ok(Some(ServerOp::Message(ServerMessage { sid, subject, reply, status, payload })))
}

/// A number without a sign.
fn number<N: std::str::FromStr>(text: &str) -> Option<N> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// The number in the first line of headers, `NATS/1.0 503 No Responders`.
fn status(headers: &[u8]) -> Option<u16> {
    let line = headers.split(|byte| *byte == b'\r').next()?;
    let rest = line.strip_prefix(b"NATS/1.0")?.trim_ascii_start();
    number(str::from_utf8(rest.get(..3)?).ok()?)
}

/// Appends a message. `false`: a subject would break the line, and nothing is appended.
pub(super) fn publish(
    into: &mut Vec<u8>,
    subject: &str,
    reply: Option<&str>,
    payload: &[u8],
) -> bool {
    if !is_subject(subject) || reply.is_some_and(|reply| !is_subject(reply)) {
        return false;
    }
    // Each settlement is written here, and a text without a format costs half.
    into.extend_from_slice(b"PUB ");
    into.extend_from_slice(subject.as_bytes());
    if let Some(reply) = reply {
        into.push(b' ');
        into.extend_from_slice(reply.as_bytes());
    }
    // Writing to memory never fails.
    let _ = write!(into, " {}\r\n", payload.len());
    into.extend_from_slice(payload);
    into.extend_from_slice(b"\r\n");
    true
}

/// Appends a subscription. `false` as for [`publish`].
pub(super) fn subscribe(into: &mut Vec<u8>, subject: &str, sid: u64) -> bool {
    let is_subject = is_subject(subject);
    if is_subject {
        let _ = write!(into, "SUB {subject} {sid}\r\n");
    }
    is_subject
}

/// Appends the end of a subscription.
pub(super) fn unsubscribe(into: &mut Vec<u8>, sid: u64) {
    let _ = write!(into, "UNSUB {sid}\r\n");
}

/// Looks at all bytes, because the compiler can check many together if it need not stop at the first.
fn is_subject(text: &str) -> bool {
    let breaks = |byte: u8| byte.is_ascii_whitespace() || byte == 0;
    !text.is_empty() && !text.bytes().fold(false, |broken, byte| broken | breaks(byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(text: &[u8]) -> Result<Vec<ServerOp>, Malformed> {
        let (mut buffer, mut ops) = (BytesMut::from(text), Vec::new());
        while let Some(op) = take_op(&mut buffer)? {
            ops.push(op);
        }
        Ok(ops)
    }

    fn message(reply: Option<&str>, status: Option<u16>, payload: &'static str) -> ServerOp {
        let payload = Bytes::from_static(payload.as_bytes());
        let reply = reply.map(str::to_owned);
        ServerOp::Message(ServerMessage { sid: 7, subject: "a.b".into(), reply, status, payload })
    }

    #[test]
    fn each_operation_of_the_server_is_read_in_every_split() {
        let text = b"INFO {\"a\":1}\r\nPING\r\nPONG\r\n+OK\r\n-ERR 'Slow Consumer'\r\n\
            MSG a.b 7 2\r\nhi\r\nMSG a.b 7 r.1 0\r\n\r\n\
            HMSG a.b 7 16 18\r\nNATS/1.0 503\r\n\r\nhi\r\nHMSG a.b 7 r.1 18 18\r\nNATS/1.0\r\nA: b\r\n\r\n\r\n";
        let want = vec![
            ServerOp::Info(Bytes::from_static(b"{\"a\":1}")),
            ServerOp::Ping,
            ServerOp::Pong,
            ServerOp::Ok,
            ServerOp::Error("Slow Consumer".into()),
            message(None, None, "hi"),
            message(Some("r.1"), None, ""),
            message(None, Some(503), "hi"),
            message(Some("r.1"), None, ""),
        ];
        assert_eq!(all(text).unwrap(), want);
        for split in 0..text.len() {
            let (mut buffer, mut ops) = (BytesMut::new(), Vec::new());
            for part in [&text[..split], &text[split..]] {
                buffer.extend_from_slice(part);
                while let Some(op) = take_op(&mut buffer).unwrap() {
                    ops.push(op);
                }
            }
            assert_eq!(ops, want, "split at {split}");
        }
    }

    #[test]
    fn what_is_no_operation_is_refused_and_keeps_no_memory() {
        let long = [b'x'; LONGEST_LINE + 2];
        for text in [
            &b"HTTP/1.1 400 Bad Request\r\n"[..],
            b"\r\n",
            b"MSG a.b 7\r\n",
            b"MSG a.b 7 r 1 2\r\n",
            b"MSG a.b x 2\r\nhi\r\n",
            b"MSG a.b 7 -2\r\n",
            b"MSG a.b 7 +2\r\nhi\r\n",
            b"MSG a.b 7 67108865\r\n",
            b"MSG a.b 7 18446744073709551615\r\n",
            b"MSG a.b 7 2\r\nhix\r",
            b"HMSG a.b 7 4 2\r\nhi\r\n",
            &long,
        ] {
            assert_eq!(all(text), Err(Malformed), "{:?}", String::from_utf8_lossy(text));
        }
    }

    #[test]
    fn a_subject_that_would_end_its_line_is_not_written() {
        let mut lines = Vec::new();
        assert!(
            publish(&mut lines, "a.b", Some("r.1"), b"hi") && publish(&mut lines, "a", None, b"")
        );
        assert!(subscribe(&mut lines, "r.*", 3));
        unsubscribe(&mut lines, 3);
        let written = b"PUB a.b r.1 2\r\nhi\r\nPUB a 0\r\n\r\nSUB r.* 3\r\nUNSUB 3\r\n";
        assert_eq!(lines, written);
        for bad in ["", "a b", "a\r\nPUB b 0", "a\tb", "a\0"] {
            assert!(!publish(&mut lines, bad, None, b""));
            assert!(!publish(&mut lines, "a", Some(bad), b""));
            assert!(!subscribe(&mut lines, bad, 1));
        }
        assert_eq!(lines, written);
    }
}
