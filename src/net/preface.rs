//! Reads the first bytes of a connection and recognizes the protocol. The listener bounds the time for them:
//! a silent socket of a port scan would hold its descriptor permanently. A peer with another protocol is
//! answered in that protocol. Owns the first bytes of a connection and nothing else.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf};

/// How every HTTP/2 connection begins (RFC 9113, section 3.4).
const HTTP2: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The answer to HTTP/1: one line of text. The connection ends with it.
const NOT_HTTP1: &str = "HTTP/1.1 505 HTTP Version Not Supported\r\n\
    content-type: text/plain; charset=utf-8\r\n\
    content-length: 86\r\n\
    connection: close\r\n\r\n\
    this port speaks gRPC over HTTP/2; /livez and /readyz are on the port of --ops-listen\n";
/// The answer to HTTP/1 without TLS on a port with TLS.
const TLS_FOR_HTTP1: &str = "HTTP/1.1 400 Bad Request\r\n\
    content-type: text/plain; charset=utf-8\r\n\
    content-length: 101\r\n\
    connection: close\r\n\r\n\
    this port speaks gRPC over HTTP/2 with TLS alone; /livez and /readyz are on the port of --ops-listen\n";
/// The answer to HTTP/2 without TLS on a port with TLS: empty SETTINGS, and a GOAWAY with the code
/// INADEQUATE_SECURITY and a text of 27 bytes, which many clients show (RFC 9113, section 6.8).
const TLS_FOR_HTTP2: &[u8] = b"\0\0\0\x04\0\0\0\0\0\
    \0\0\x23\x07\0\0\0\0\0\0\0\0\0\0\0\0\x0cthis port speaks TLS alone\n";
/// The answer to TLS: a fatal alert, `protocol_version` (RFC 8446, section 6).
const NOT_TLS: &[u8] = &[21, 3, 1, 0, 2, 2, 70];
/// Most bytes that are read after an answer to another protocol. Unread bytes would reset the connection
/// before the peer has the answer.
const MOST_DISCARDED: usize = 64 * 1024;

/// A connection whose first bytes have been read.
pub(super) struct Opened<T> {
    inner: T,
    /// The first bytes: a preface of HTTP/2, or the beginning of another protocol.
    first: [u8; HTTP2.len()],
    seen: usize,
    /// The number of first bytes that the reader of this connection has taken.
    read: usize,
}

/// A protocol that the port does not speak.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Foreign {
    Http1,
    Tls,
    /// HTTP/1 on a port with TLS.
    PlainHttp1,
    /// HTTP/2 on a port with TLS.
    PlainHttp2,
    Other,
}

impl Foreign {
    /// Its name in the log.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Http1 => "HTTP/1",
            Self::Tls => "TLS",
            Self::PlainHttp1 | Self::PlainHttp2 => "no TLS",
            Self::Other => "unknown",
        }
    }

    /// The same protocol without TLS, on a port with TLS.
    pub(super) fn plain(self) -> Self {
        match self {
            Self::Http1 | Self::PlainHttp1 => Self::PlainHttp1,
            Self::PlainHttp2 => Self::PlainHttp2,
            Self::Tls | Self::Other => Self::Other,
        }
    }
}

/// Reads until the protocol is clear.
///
/// # Errors
/// Errors of the read, and an early end of the connection.
pub(super) async fn read<T: AsyncRead + Unpin>(mut inner: T) -> io::Result<Opened<T>> {
    let (mut first, mut seen) = ([0; HTTP2.len()], 0);
    while seen < first.len() && first[..seen] == HTTP2[..seen] {
        let count = inner.read(&mut first[seen..]).await?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        seen += count;
    }
    Ok(Opened { inner, first, seen, read: 0 })
}

impl<T: AsyncRead + AsyncWrite + Unpin> Opened<T> {
    /// The other protocol, if the peer does not speak HTTP/2.
    pub(super) fn foreign(&self) -> Option<Foreign> {
        match &self.first[..self.seen] {
            first if first == HTTP2 => None,
            // A TLS handshake of version 3.x.
            [22, 3, ..] | [22] => Some(Foreign::Tls),
            [b'A'..=b'Z', ..] => Some(Foreign::Http1),
            _ => Some(Foreign::Other),
        }
    }

    /// Answers in the peer's own protocol, and closes the connection.
    ///
    /// # Errors
    /// Errors of the connection.
    pub(super) async fn turn_away(mut self, foreign: Foreign) -> io::Result<()> {
        let answer = match foreign {
            Foreign::Http1 => NOT_HTTP1.as_bytes(),
            Foreign::Tls => NOT_TLS,
            Foreign::PlainHttp1 => TLS_FOR_HTTP1.as_bytes(),
            Foreign::PlainHttp2 => TLS_FOR_HTTP2,
            Foreign::Other => return Ok(()),
        };
        self.inner.write_all(answer).await?;
        self.inner.shutdown().await?;
        let (mut discarded, mut buffer) = (0, [0; 1024]);
        while discarded < MOST_DISCARDED {
            match self.inner.read(&mut buffer).await? {
                0 => break,
                count => discarded += count,
            }
        }
        Ok(())
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Opened<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { inner, first, seen, read } = &mut *self;
        if read < seen {
            let count = buffer.remaining().min(*seen - *read);
            buffer.put_slice(&first[*read..*read + count]);
            *read += count;
            return Poll::Ready(Ok(()));
        }
        Pin::new(inner).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Opened<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::duplex;

    /// The protocol recognized for a peer that sends `sent` in two parts, and all bytes read after that.
    async fn after(sent: &[u8], part: usize) -> (Option<Foreign>, Vec<u8>) {
        let (mut peer, ours) = duplex(1024);
        let sending = async {
            peer.write_all(&sent[..part]).await.unwrap();
            tokio::task::yield_now().await;
            peer.write_all(&sent[part..]).await.unwrap();
            drop(peer);
        };
        let (opened, ()) = tokio::join!(read(ours), sending);
        let mut opened = opened.unwrap();
        let mut all = Vec::new();
        opened.read_to_end(&mut all).await.unwrap();
        (opened.foreign(), all)
    }

    #[tokio::test]
    async fn first_bytes_tell_the_protocol_and_none_is_lost() {
        let http2 = [&HTTP2[..], b"more"].concat();
        for (sent, expected) in [
            (&http2[..], None),
            (b"GET /livez HTTP/1.0\r\n", Some(Foreign::Http1)),
            (b"POST / HTTP/1.1\r\n", Some(Foreign::Http1)),
            (&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3], Some(Foreign::Tls)),
            (&[255; 30], Some(Foreign::Other)),
        ] {
            for part in 0..sent.len() {
                assert_eq!(after(sent, part).await, (expected, sent.to_vec()), "{sent:?} {part}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn silent_peer_and_half_a_preface_are_waited_for() {
        for sent in [&HTTP2[..0], &HTTP2[..1], &HTTP2[..23]] {
            let (mut peer, ours) = duplex(1024);
            peer.write_all(sent).await.unwrap();
            let read = tokio::time::timeout(std::time::Duration::from_secs(5), read(ours)).await;
            assert!(read.is_err(), "{sent:?}");
        }
    }

    /// The answer to a peer that sends `sent` and is taken for `foreign`.
    async fn answer(sent: &[u8], foreign: Foreign) -> Vec<u8> {
        let (mut peer, ours) = duplex(1024);
        peer.write_all(sent).await.unwrap();
        let opened = read(ours).await.unwrap();
        let (told, answer) = tokio::join!(opened.turn_away(foreign), async {
            let mut answer = Vec::new();
            peer.read_to_end(&mut answer).await.unwrap();
            drop(peer);
            answer
        });
        told.unwrap();
        answer
    }

    #[tokio::test]
    async fn http1_peer_is_answered_in_http1() {
        for foreign in [Foreign::Http1, Foreign::PlainHttp1] {
            let answer = answer(b"GET / HTTP/1.1\r\n\r\n", foreign).await;
            let answer = String::from_utf8(answer).unwrap();
            let (head, text) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.contains(&format!("content-length: {}", text.len())), "{answer}");
        }
    }

    #[tokio::test]
    async fn http2_peer_without_tls_is_answered_with_whole_frames() {
        let mut answer = &*answer(HTTP2, Foreign::PlainHttp2).await;
        let mut kinds = Vec::new();
        while let Some((head, rest)) = answer.split_first_chunk::<9>() {
            let length = usize::from(head[2]);
            let (body, rest) = rest.split_at(length);
            kinds.push((head[3], body.get(4..8).map(<[u8]>::to_vec)));
            answer = rest;
        }
        let (settings, goaway, inadequate_security) = (4, 7, vec![0, 0, 0, 12]);
        assert_eq!(kinds, [(settings, None), (goaway, Some(inadequate_security))]);
        assert!(answer.is_empty());
    }
}
