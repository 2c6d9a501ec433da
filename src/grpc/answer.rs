//! An answer on its way to the wire: knows what of it was never written, and gives back what the
//! client therefore never had.
//!
//! hyper polls a body to its end long before h2 has sent it, so a body that was dropped early says
//! nothing. Each piece is a buffer that h2 advances as it writes and drops in the end: dropped with
//! bytes left, it was never written. A piece that fits the buffers of h2 and of the kernel counts as
//! written; what is in it waits for its lease.
//!
//! A piece is small: h2 takes one while the client's window has room, and only what h2 has not taken
//! ends with the task of its stream. See `unwritten`.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Instant,
};

use bytes::{Buf, Bytes};
use http_body::{Frame, SizeHint};
use tonic::Status;

use super::budget::Taken;
use crate::{
    lessor::Fetched,
    lock::lock,
    net::{OpenCall, StartedAnswer},
};

/// Most bytes of a piece. The default of an HTTP/2 window is twice that.
const MAX_PIECE_BYTES: usize = 32 * 1024;

/// What an answer holds until it is written. Goes from the call to its body among the response's
/// extensions.
#[derive(Debug, Clone)]
pub(super) struct DeliveryGuard(Arc<Mutex<Option<AnswerContent>>>);

/// What an answer holds until it is written.
#[derive(Debug, Default)]
pub(super) struct AnswerContent {
    /// Given back unless all of the answer is written.
    pub(super) fetched: Option<Fetched>,
    /// Bytes of the budget, which are free with the last piece.
    pub(super) _bytes: Option<Taken>,
}

impl AnswerContent {
    /// When the last lease in it ends; nobody needs the answer after that.
    pub(super) fn ends_at(&self) -> Option<Instant> {
        let fetched = self.fetched.as_ref()?;
        let rejected = fetched.rejected().iter().map(|rejected| &rejected.leased);
        fetched.messages().iter().chain(rejected).map(|leased| leased.deadline).max()
    }
}

impl DeliveryGuard {
    pub(super) fn new(load: AnswerContent) -> Self {
        Self(Arc::new(Mutex::new(Some(load))))
    }

    /// What is in it; the second time nothing.
    pub(super) fn unload(&self) -> AnswerContent {
        lock(&self.0).take().unwrap_or_default()
    }
}

/// What ends with the last piece of an answer.
#[derive(Debug)]
pub(super) struct WriteState {
    pub(super) load: AnswerContent,
    /// The places of the call.
    pub(super) _places: Vec<Taken>,
    pub(super) begun: StartedAnswer,
    pub(super) _open: OpenCall,
    /// All of the body was polled.
    pub(super) ended: AtomicBool,
    /// A piece of it was dropped with bytes left.
    pub(super) cut: AtomicBool,
}

impl Drop for WriteState {
    fn drop(&mut self) {
        let written = *self.ended.get_mut() && !*self.cut.get_mut();
        if let Some(fetched) = self.load.fetched.take().filter(|_| written) {
            tracing::debug!(messages = fetched.messages().len(), "written to the client");
            fetched.delivered();
        }
    }
}

/// The body of an answer.
pub(super) struct Body {
    inner: tonic::body::Body,
    /// The rest of a frame of `inner`.
    rest: Bytes,
    hold: Option<Arc<WriteState>>,
}

impl Body {
    /// Without a hold: of a call that holds nothing.
    pub(super) fn new(inner: tonic::body::Body, hold: Option<WriteState>) -> Self {
        Self { inner, rest: Bytes::new(), hold: hold.map(Arc::new) }
    }

    fn next_piece(&mut self) -> Piece {
        let bytes = self.rest.split_to(self.rest.len().min(MAX_PIECE_BYTES));
        Piece { bytes, hold: self.hold.clone() }
    }
}

impl http_body::Body for Body {
    type Data = Piece;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, Status>>> {
        if self.rest.is_empty() {
            let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
            let frame = match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(bytes))) => {
                    self.hold.iter().for_each(|hold| hold.begun.made(bytes.len()));
                    self.rest = bytes;
                    return Poll::Ready(Some(Ok(Frame::data(self.next_piece()))));
                }
                Some(Ok(Err(trailers))) => Some(Ok(trailers.map_data(|_| Piece::empty()))),
                Some(Err(error)) => Some(Err(error)),
                None => None,
            };
            let failed = matches!(frame, Some(Err(_)));
            self.hold.iter().for_each(|hold| hold.ended.store(!failed, Ordering::Relaxed));
            return Poll::Ready(frame);
        }
        Poll::Ready(Some(Ok(Frame::data(self.next_piece()))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.rest.is_empty() { self.inner.size_hint() } else { SizeHint::default() }
    }
}

/// A part of an answer.
pub(super) struct Piece {
    bytes: Bytes,
    hold: Option<Arc<WriteState>>,
}

impl Piece {
    fn empty() -> Self {
        Self { bytes: Bytes::new(), hold: None }
    }
}

impl Buf for Piece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        if let Some(hold) = &self.hold {
            hold.begun.wrote(count);
        }
    }

    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        let bytes = self.bytes.slice(..count);
        self.advance(count);
        bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(hold) = self.hold.as_ref().filter(|_| self.bytes.has_remaining()) {
            hold.cut.store(true, Ordering::Relaxed);
        }
    }
}
