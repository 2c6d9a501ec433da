//! A connection whose writes are gathered while it is polled, and go to the kernel together. h2 writes each frame that
//! holds data by itself: headers and data, then the trailers.
//!
//! ```text
//!  h2 ── frame, frame, frame ──▶ gathered ── full, or the poll is over ──▶ kernel
//! ```
//! What is gathered counts as written, as in the buffer of the kernel. It is at most [`MAX_GATHERED`] bytes.

use std::{
    cell::Cell,
    future::{Future, poll_fn},
    io::{self, IoSlice},
    mem::take,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::lock::lock;

/// Most bytes that are gathered. Two frames of the default size of HTTP/2, with their heads, and more for small ones.
const MAX_GATHERED: usize = 36 * 1024;

thread_local! {
    /// The buffer of the connection that a thread polls. An idle connection holds none, so a thread needs a single one.
    static BUFFER: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// One side of the connection, which hyper has. The other side [drives](Cork::drive) it.
pub(super) struct Corked<T>(Arc<Mutex<Line<T>>>);

/// The other side.
pub(super) struct Cork<T>(Arc<Mutex<Line<T>>>);

struct Line<T> {
    inner: T,
    gathered: Vec<u8>,
    /// The kernel has the bytes before this.
    written: usize,
}

/// Both sides of a connection.
pub(super) fn corked<T>(inner: T) -> (Corked<T>, Cork<T>) {
    let line = Arc::new(Mutex::new(Line { inner, gathered: Vec::new(), written: 0 }));
    (Corked(line.clone()), Cork(line))
}

impl<T: AsyncWrite + Unpin> Cork<T> {
    /// Polls `served`, which owns the first side, and writes what each poll has gathered. Ready also if the connection is
    /// lost.
    pub(super) async fn drive<F: Future>(&self, mut served: Pin<&mut F>) {
        poll_fn(|cx| {
            let over = served.as_mut().poll(cx).is_ready();
            let lost = matches!(lock(&self.0).poll_written(cx), Poll::Ready(Err(_)));
            if over || lost { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }
}

impl<T: AsyncWrite + Unpin> Line<T> {
    /// Hands all that is gathered to the kernel.
    fn poll_written(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.gathered.len() {
            let rest = &self.gathered[self.written..];
            match ready!(Pin::new(&mut self.inner).poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.written += count,
            }
        }
        self.written = 0;
        let mut buffer = take(&mut self.gathered);
        if buffer.capacity() > 0 {
            buffer.clear();
            BUFFER.set(buffer);
        }
        // Encrypted bytes can wait in the stream.
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.gathered.len() >= MAX_GATHERED {
            ready!(self.poll_written(cx))?;
        }
        Poll::Ready(Ok(MAX_GATHERED - self.gathered.len()))
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Corked<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut lock(&self.0).inner).poll_read(cx, buffer)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Corked<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut line = lock(&self.0);
        let (mut room, mut taken) = (ready!(line.poll_room(cx))?, 0);
        if line.gathered.capacity() == 0 {
            line.gathered = BUFFER.take();
            line.gathered.reserve_exact(MAX_GATHERED);
        }
        for slice in slices {
            let part = &slice[..slice.len().min(room)];
            line.gathered.extend_from_slice(part);
            room -= part.len();
            taken += part.len();
        }
        Poll::Ready(Ok(taken))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// The end of the poll is the flush.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut line = lock(&self.0);
        ready!(line.poll_written(cx))?;
        Pin::new(&mut line.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::ready, pin::pin, task::Waker};

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    /// A stream that counts its writes.
    struct Counted(Vec<usize>, usize);

    impl AsyncWrite for Counted {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let count = bytes.len().min(self.1);
            self.0.push(count);
            Poll::Ready(Ok(count))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// The writes to a stream that takes at most so many bytes at once.
    async fn writes(most: usize, sizes: &[usize]) -> Vec<usize> {
        let (mut corked, cork) = corked(Counted(Vec::new(), most));
        let write = async {
            for size in sizes {
                corked.write_all(&vec![0; *size]).await.unwrap();
                corked.flush().await.unwrap();
            }
        };
        cork.drive(pin!(write)).await;
        take(&mut lock(&cork.0).inner.0)
    }

    #[tokio::test]
    async fn writes_of_one_poll_are_one_write_until_too_much_is_gathered() {
        assert_eq!(writes(usize::MAX, &[9, 1400, 30]).await, [1439]);
        assert_eq!(writes(1000, &[9, 1400, 30]).await, [1000, 439]);
        assert_eq!(writes(usize::MAX, &[MAX_GATHERED + 1]).await, [MAX_GATHERED, 1]);
        assert_eq!(writes(usize::MAX, &[]).await, [0; 0]);
        assert_eq!(writes(0, &[1]).await, [0], "a stream that takes nothing is lost");
    }

    #[tokio::test]
    async fn a_stream_that_is_full_takes_no_more_than_the_bound_and_all_in_order() {
        let (ours, mut theirs) = duplex(10);
        let (mut corked, cork) = corked(ours);
        let sent: Vec<u8> = (0..100_000_u32).map(|number| number as u8).collect();
        let mut write = pin!(async {
            corked.write_all(&sent).await.unwrap();
            corked.shutdown().await.unwrap();
        });
        let mut cx = Context::from_waker(Waker::noop());
        assert!(pin!(cork.drive(write.as_mut())).poll(&mut cx).is_pending());
        assert_eq!(lock(&cork.0).gathered.len(), MAX_GATHERED);
        let (mut received, driven) = (Vec::new(), cork.drive(write));
        let (read, ()) = tokio::join!(theirs.read_to_end(&mut received), driven);
        assert_eq!((read.unwrap(), received == sent), (sent.len(), true));
    }

    #[tokio::test]
    async fn connection_that_must_wait_keeps_its_bytes_while_others_write() {
        let (ours, mut theirs) = duplex(10);
        let (mut corked, cork) = corked(ours);
        let mut write = pin!(corked.write_all(&[7; 500]));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(pin!(cork.drive(write.as_mut())).poll(&mut cx).is_ready());
        assert_eq!(writes(usize::MAX, &[9, 1400]).await, [1409]);
        let mut received = [0; 500];
        let rest = poll_fn(|cx| lock(&cork.0).poll_written(cx));
        let (read, rest) = tokio::join!(theirs.read_exact(&mut received), rest);
        assert_eq!((read.unwrap(), rest.is_ok(), received), (500, true, [7; 500]));
    }

    #[tokio::test]
    async fn nothing_is_written_of_a_connection_that_is_over_already() {
        let (_, cork) = corked(Counted(Vec::new(), 1));
        cork.drive(pin!(ready(()))).await;
        assert!(lock(&cork.0).inner.0.is_empty());
    }
}
