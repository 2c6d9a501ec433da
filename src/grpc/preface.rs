//! A connection whose peer must say what it speaks within a time: an idle socket of a port scan,
//! or half a preface, would hold its descriptor for ever. Owns that deadline and nothing else.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

/// How every HTTP/2 connection begins (RFC 9113, section 3.4).
const HTTP2: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Reads fail when the preface, or something that is none, is not there in time.
pub(super) struct Preface<T> {
    inner: T,
    /// How much of the preface has come; `None` once it is over.
    pending: Option<(usize, Pin<Box<Sleep>>)>,
}

impl<T> Preface<T> {
    pub(super) fn new(inner: T, within: Duration) -> Self {
        Self { inner, pending: Some((0, Box::pin(sleep(within)))) }
    }

    fn came(&mut self, bytes: &[u8]) {
        let Some((seen, _)) = &mut self.pending else { return };
        let expected = &HTTP2[*seen..];
        let count = bytes.len().min(expected.len());
        *seen += count;
        if *seen == HTTP2.len() || bytes[..count] != expected[..count] {
            self.pending = None;
        }
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Preface<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if let Some((_, deadline)) = &mut self.pending
            && deadline.as_mut().poll(cx).is_ready()
        {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buffer);
        self.came(&buffer.filled()[before..]);
        read
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Preface<T> {
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
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    const WITHIN: Duration = Duration::from_secs(5);

    /// What a read after `sent` comes to, when the peer says no more.
    async fn after(sent: &[u8]) -> io::Result<usize> {
        let (mut peer, ours) = duplex(1024);
        let mut ours = Preface::new(ours, WITHIN);
        peer.write_all(sent).await.unwrap();
        if !sent.is_empty() {
            ours.read_exact(&mut vec![0; sent.len()]).await?;
        }
        let rest = tokio::time::timeout(2 * WITHIN, ours.read(&mut [0; 1])).await;
        rest.unwrap_or(Ok(0))
    }

    #[tokio::test(start_paused = true)]
    async fn a_peer_that_says_nothing_or_half_of_it_is_given_up() {
        for sent in [&HTTP2[..0], &HTTP2[..1], &HTTP2[..23]] {
            assert_eq!(after(sent).await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_has_spoken_may_be_silent() {
        for sent in [HTTP2, b"GET /livez HTTP/1.0\r\n", b"G"] {
            assert_eq!(after(sent).await.unwrap(), 0);
        }
    }
}
