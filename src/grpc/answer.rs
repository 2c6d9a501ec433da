//! An answer on its way to the wire: knows what of it was never written, and gives back what the
//! client therefore never had.
//!
//! hyper polls a body to its end long before h2 has sent it, so a body that was dropped early says
//! nothing. Each piece is a buffer that h2 advances as it writes and drops in the end: dropped with
//! bytes left, it was never written. A piece that fits the buffers of h2 and of the kernel counts as
//! written; what is in it waits for its lease.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http_body::{Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;

use crate::lessor::Fetched;

/// What is given back unless its answer is written. Goes from the call to its body among the
/// response's extensions.
#[derive(Clone)]
pub(super) struct Freight(Arc<Hold>);

struct Hold {
    fetched: Option<Fetched>,
    /// All of the body was polled.
    ended: AtomicBool,
    /// A piece of it was dropped with bytes left.
    cut: AtomicBool,
}

impl Freight {
    pub(super) fn new(fetched: Fetched) -> Self {
        let (ended, cut) = (AtomicBool::new(false), AtomicBool::new(false));
        Self(Arc::new(Hold { fetched: Some(fetched), ended, cut }))
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let written = *self.ended.get_mut() && !*self.cut.get_mut();
        if let Some(fetched) = self.fetched.take().filter(|_| written) {
            tracing::debug!(messages = fetched.messages().len(), "written to the client");
            fetched.delivered();
        }
    }
}

/// The body of an answer, and the call's place, which is free again when all of it is written.
pub(super) struct Body {
    inner: tonic::body::Body,
    freight: Option<Freight>,
    place: Option<Arc<OwnedSemaphorePermit>>,
}

impl Body {
    pub(super) fn new(
        inner: tonic::body::Body,
        freight: Option<Freight>,
        place: Option<OwnedSemaphorePermit>,
    ) -> Self {
        Self { inner, freight, place: place.map(Arc::new) }
    }
}

impl http_body::Body for Body {
    type Data = Piece;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Piece>, Status>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        let ended =
            frame.as_ref().is_none_or(|frame| !matches!(frame, Ok(frame) if frame.is_data()));
        if let Some(Freight(hold)) = self.freight.as_ref().filter(|_| ended) {
            hold.ended.store(!matches!(frame, Some(Err(_))), Ordering::Relaxed);
        }
        let piece =
            |bytes| Piece { bytes, freight: self.freight.clone(), _place: self.place.clone() };
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A part of an answer.
pub(super) struct Piece {
    bytes: Bytes,
    freight: Option<Freight>,
    _place: Option<Arc<OwnedSemaphorePermit>>,
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
    }

    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        self.bytes.copy_to_bytes(count)
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(Freight(hold)) = self.freight.as_ref().filter(|_| self.bytes.has_remaining()) {
            hold.cut.store(true, Ordering::Relaxed);
        }
    }
}
