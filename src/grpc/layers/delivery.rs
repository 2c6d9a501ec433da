//! Delivers answers: knows which part of an answer was never written, and gives back the messages that the
//! client therefore never received.
//!
//! hyper polls a body to its end long before h2 has sent it, so an early drop of the body says
//! nothing. Each piece of a body is a buffer that h2 advances as it writes and drops at the end. A piece that
//! is dropped with bytes left was never written. A piece that fits the buffers of h2 and of the kernel counts
//! as written; its messages wait for the end of their leases.
//!
//! A piece is small: h2 takes a piece while the client's window has room. Only bytes that h2 has not taken
//! end with the task of their stream, see `net::unwritten`.

use std::{
    collections::VecDeque,
    future::Future,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use futures_util::TryFutureExt as _;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use tonic::Status;

use crate::{
    grpc::{answer_memory::AnswerMemory, budget::Taken, call::Call, method::CallKind},
    lessor::DeliveryGuard,
    lock::lock,
    net::{ClientConnection, InnerService, Middleware, Next, OpenCall, StartedAnswer},
};

/// Most bytes of a piece. The default of an HTTP/2 window is twice that.
const MAX_PIECE_BYTES: usize = 32 * 1024;

/// The layer that follows the answers of one connection until they are written. A handler leaves the guard
/// of its messages among the extensions of its answer, as an `Arc<DeliveryGuard>`.
#[derive(Debug, Clone)]
pub(in crate::grpc) struct AnswerDelivery(Arc<ClientConnection>);

impl AnswerDelivery {
    pub(in crate::grpc) fn new(connection: &Arc<ClientConnection>) -> Self {
        Self(connection.clone())
    }
}

/// What each frame of a stream holds until it is written, in the order of the frames. A handler leaves it among the
/// extensions of an answer that is a stream. Each frame is one piece of data of the body.
pub type FrameHolds = Arc<Mutex<VecDeque<FrameHold>>>;

/// What one frame holds until it is written.
#[derive(Debug, Default)]
pub struct FrameHold {
    /// Given back unless all of the frame is written.
    pub(in crate::grpc) deliveries: Option<Arc<DeliveryGuard>>,
    /// The memory of the messages.
    pub(in crate::grpc) memory: Option<AnswerMemory>,
    /// The memory of the results.
    pub(in crate::grpc) _results: Vec<Taken>,
    /// Counts the bytes of the stream that are written. `None`: nobody asks.
    pub(in crate::grpc) written: Option<Arc<AtomicU64>>,
}

impl FrameHold {
    /// The frame, or the answer, is written: its messages are the client's.
    pub fn deliver(&self) {
        if let Some(deliveries) = &self.deliveries {
            tracing::debug!(messages = deliveries.messages().len(), "written to the client");
            deliveries.deliver();
        }
    }
}

impl<S, R> Middleware<Request<R>, S> for AnswerDelivery
where
    S: InnerService<Request<R>, Response = Response<tonic::body::Body>>,
    R: Send + 'static,
{
    type Response = Response<AnswerBody>;
    type Error = S::Error;

    fn handle(
        &self,
        mut request: Request<R>,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<Self::Response, S::Error>> + Send + 'static {
        let (connection, open) = (self.0.clone(), self.0.open_call());
        if Call::kind_of(&request) == CallKind::Consume {
            request.extensions_mut().insert(connection.clone());
        }
        next.run(request).map_ok(move |mut answer| {
            let deliveries = answer.extensions_mut().remove::<Arc<DeliveryGuard>>();
            let holds = answer.extensions_mut().remove::<FrameHolds>();
            if http_body::Body::is_end_stream(answer.body()) {
                return answer.map(|body| AnswerBody::new(body, None, None));
            }
            let until = deliveries.as_ref().and_then(|deliveries| deliveries.ends_at());
            let begun = connection.unwritten.begin(until);
            let whole = Arc::new(WholeAnswer { begun, _open: open });
            let hold = FrameHold { deliveries, ..FrameHold::default() };
            let state = WriteState::new(hold, whole);
            answer.map(|body| AnswerBody::new(body, Some(state), holds))
        })
    }
}

/// The answer that a piece belongs to.
#[derive(Debug)]
struct WholeAnswer {
    begun: StartedAnswer,
    _open: OpenCall,
}

/// State that ends with the last piece of an answer, or of a frame of a stream.
#[derive(Debug)]
struct WriteState {
    hold: FrameHold,
    whole: Arc<WholeAnswer>,
    /// Whether all of it was polled.
    ended: AtomicBool,
    /// Whether a piece was dropped with bytes left.
    cut: AtomicBool,
}

impl WriteState {
    fn new(hold: FrameHold, whole: Arc<WholeAnswer>) -> Self {
        let (ended, cut) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { hold, whole, ended, cut }
    }
}

impl Drop for WriteState {
    fn drop(&mut self) {
        if *self.ended.get_mut() && !*self.cut.get_mut() {
            self.hold.deliver();
        }
    }
}

/// The body of an answer.
#[derive(Default)]
pub(in crate::grpc) struct AnswerBody {
    inner: tonic::body::Body,
    /// The rest of a frame of `inner`.
    rest: Bytes,
    /// The state of the answer, or of the present frame of a stream.
    state: Option<Arc<WriteState>>,
    /// `None`: the answer is not a stream of ours.
    holds: Option<FrameHolds>,
}

impl AnswerBody {
    fn new(inner: tonic::body::Body, state: Option<WriteState>, holds: Option<FrameHolds>) -> Self {
        Self { inner, rest: Bytes::new(), state: state.map(Arc::new), holds }
    }

    fn next_piece(&mut self) -> AnswerPiece {
        let bytes = self.rest.split_to(self.rest.len().min(MAX_PIECE_BYTES));
        let piece = AnswerPiece { bytes, state: self.state.clone() };
        if self.rest.is_empty() && self.holds.is_some() {
            self.state.iter().for_each(|state| state.ended.store(true, Ordering::Relaxed));
        }
        piece
    }

    /// The next frame of a stream has a state of its own.
    fn begin_frame(&mut self) {
        let Some(hold) = self.holds.as_ref().and_then(|holds| lock(holds).pop_front()) else {
            return;
        };
        let whole = self.state.as_ref().map(|state| state.whole.clone());
        self.state = whole.map(|whole| Arc::new(WriteState::new(hold, whole)));
    }
}

impl From<&'static str> for AnswerBody {
    fn from(text: &'static str) -> Self {
        Self::new(tonic::body::Body::new(axum::body::Body::from(text)), None, None)
    }
}

impl http_body::Body for AnswerBody {
    type Data = AnswerPiece;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<AnswerPiece>, Status>>> {
        if self.rest.is_empty() {
            let frame = ready!(Pin::new(&mut self.inner).poll_frame(cx));
            let frame = match frame.map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(bytes))) => {
                    self.begin_frame();
                    self.state.iter().for_each(|state| state.whole.begun.made(bytes.len()));
                    self.rest = bytes;
                    return Poll::Ready(Some(Ok(Frame::data(self.next_piece()))));
                }
                Some(Ok(Err(trailers))) => Some(Ok(trailers.map_data(|_| AnswerPiece::empty()))),
                Some(Err(error)) => Some(Err(error)),
                None => None,
            };
            let failed = matches!(frame, Some(Err(_)));
            self.state.iter().for_each(|state| state.ended.store(!failed, Ordering::Relaxed));
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
pub(in crate::grpc) struct AnswerPiece {
    bytes: Bytes,
    state: Option<Arc<WriteState>>,
}

impl AnswerPiece {
    fn empty() -> Self {
        Self { bytes: Bytes::new(), state: None }
    }
}

impl Buf for AnswerPiece {
    fn remaining(&self) -> usize {
        self.bytes.remaining()
    }

    fn chunk(&self) -> &[u8] {
        self.bytes.chunk()
    }

    fn advance(&mut self, count: usize) {
        self.bytes.advance(count);
        if let Some(state) = &self.state {
            state.whole.begun.wrote(count);
            if let Some(written) = &state.hold.written {
                written.fetch_add(count as u64, Ordering::Relaxed);
            }
        }
    }

    fn copy_to_bytes(&mut self, count: usize) -> Bytes {
        let bytes = self.bytes.slice(..count);
        self.advance(count);
        bytes
    }
}

impl Drop for AnswerPiece {
    fn drop(&mut self) {
        if let Some(state) = self.state.as_ref().filter(|_| self.bytes.has_remaining()) {
            state.cut.store(true, Ordering::Relaxed);
        }
    }
}
