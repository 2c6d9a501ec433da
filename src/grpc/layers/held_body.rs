//! A body that holds a value until it is written: until the body and all its data are dropped. hyper drops
//! the body early and keeps data that the client has not read.

use std::{
    io::IoSlice,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use http_body::{Body, Frame, SizeHint};

/// See the [module](self).
pub(in crate::grpc) struct HeldBody<B, H> {
    inner: B,
    held: Option<Arc<H>>,
}

/// Data of a [`HeldBody`].
pub(in crate::grpc) struct HeldData<D, H> {
    inner: D,
    _held: Option<Arc<H>>,
}

impl<B: Body, H> HeldBody<B, H> {
    /// Holds `held` until `inner` is written. An empty body is written with its headers.
    pub(super) fn new(inner: B, held: H) -> Self {
        Self::perhaps(inner, Some(held))
    }

    /// The same, if there is something to hold.
    pub(super) fn perhaps(inner: B, held: Option<H>) -> Self {
        let held = held.filter(|_| !inner.is_end_stream()).map(Arc::new);
        Self { inner, held }
    }
}

impl<B: Default, H> Default for HeldBody<B, H> {
    fn default() -> Self {
        Self { inner: B::default(), held: None }
    }
}

impl<B: From<&'static str>, H> From<&'static str> for HeldBody<B, H> {
    fn from(text: &'static str) -> Self {
        Self { inner: text.into(), held: None }
    }
}

impl<B: Body + Unpin, H> Body for HeldBody<B, H> {
    type Data = HeldData<B::Data, H>;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, B::Error>>> {
        let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
        let held = |inner| HeldData { inner, _held: self.held.clone() };
        Poll::Ready(frame.map(|frame| frame.map(|frame| frame.map_data(held))))
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl<D: Buf, H> Buf for HeldData<D, H> {
    fn remaining(&self) -> usize {
        self.inner.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.inner.chunk()
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        self.inner.chunks_vectored(slices)
    }

    fn advance(&mut self, count: usize) {
        self.inner.advance(count);
    }

    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        self.inner.copy_to_bytes(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn value_is_held_until_body_and_data_are_dropped() {
        let held = Arc::new(());
        let mut body = HeldBody::new(axum::body::Body::from("text"), held.clone());
        let mut cx = Context::from_waker(std::task::Waker::noop());
        let Poll::Ready(Some(Ok(frame))) = Pin::new(&mut body).poll_frame(&mut cx) else {
            panic!("no data")
        };
        drop(body);
        assert_eq!(Arc::strong_count(&held), 2, "data is left");
        drop(frame);
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[test]
    fn value_of_an_empty_body_is_dropped_at_once() {
        let held = Arc::new(());
        let body = HeldBody::new(axum::body::Body::empty(), held.clone());
        assert_eq!(Arc::strong_count(&held), 1);
        drop(body);
    }
}
