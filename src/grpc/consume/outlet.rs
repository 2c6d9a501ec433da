//! The frames of a Consume on their way to the body of its answer. One frame at a time is made, when the body asks for
//! it. Owns the place of that frame.
//!
//! A frame is a piece of the body of its own, because the stream is always pending after a frame: tonic joins only
//! messages that are ready together. So what was written of the body tells which frames were written. A frame that was
//! written in part was not received.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker},
};

use futures_util::Stream;
use tokio::sync::Notify;
use tonic::Status;

use crate::{
    grpc::layers::{FrameHold, FrameHolds},
    lock::lock,
    pb,
};

/// A frame, and what is held until it is written.
pub(super) struct Frame {
    pub(super) response: pb::ConsumeResponse,
    pub(super) hold: FrameHold,
}

/// The side of the task.
pub(in crate::grpc) struct Outlet {
    shared: Arc<Shared>,
    /// The bytes that are written.
    written: Arc<AtomicU64>,
}

/// The side of the body: the stream of responses.
pub struct ConsumeFrames(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Rings for the task.
    bell: Notify,
}

#[derive(Default)]
struct State {
    /// The body asks for a frame.
    wanted: bool,
    frame: Option<Frame>,
    /// What the frames hold that the body has taken from here, in order.
    holds: FrameHolds,
    end: Option<Result<(), Status>>,
    body: Option<Waker>,
    /// The body is gone.
    closed: bool,
}

/// Both sides, and where the layer finds what each frame holds.
pub(in crate::grpc) fn outlet() -> (Outlet, ConsumeFrames, FrameHolds) {
    let state = State::default();
    let holds = state.holds.clone();
    let shared = Arc::new(Shared { state: Mutex::new(state), bell: Notify::new() });
    let outlet = Outlet { shared: shared.clone(), written: Arc::default() };
    (outlet, ConsumeFrames(shared), holds)
}

impl Outlet {
    /// Waits until the body asks for a frame, or is gone.
    pub(super) async fn changed(&self) {
        self.shared.bell.notified().await;
    }

    /// Whether the body asks for a frame.
    pub(super) fn is_wanted(&self) -> bool {
        lock(&self.shared.state).wanted
    }

    /// The bytes of frames that are written.
    pub(super) fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Whether the body is gone.
    pub(super) fn is_closed(&self) -> bool {
        lock(&self.shared.state).closed
    }

    /// Gives the body the frame that it asks for.
    pub(super) fn put(&self, mut frame: Frame) {
        frame.hold.written = Some(self.written.clone());
        let mut state = lock(&self.shared.state);
        if state.closed {
            return drop(state);
        }
        (state.wanted, state.frame) = (false, Some(frame));
        if let Some(body) = state.body.take() {
            body.wake();
        }
    }

    /// Ends the stream behind the last frame.
    pub(super) fn end(&self, end: Result<(), Status>) {
        let mut state = lock(&self.shared.state);
        state.end.get_or_insert(end);
        if let Some(body) = state.body.take() {
            body.wake();
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        // A task that says nothing was torn down.
        self.end(Err(Status::unavailable("the call was ended")));
    }
}

impl Stream for ConsumeFrames {
    type Item = Result<pb::ConsumeResponse, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut state = lock(&self.0.state);
        if let Some(Frame { response, hold }) = state.frame.take() {
            lock(&state.holds).push_back(hold);
            return Poll::Ready(Some(Ok(response)));
        }
        if let Some(end) = &mut state.end {
            // An error is told once.
            let end = std::mem::replace(end, Ok(()));
            return Poll::Ready(end.err().map(Err));
        }
        state.body = Some(cx.waker().clone());
        state.wanted = true;
        drop(state);
        self.0.bell.notify_one();
        Poll::Pending
    }
}

impl Drop for ConsumeFrames {
    fn drop(&mut self) {
        let mut state = lock(&self.0.state);
        (state.closed, state.wanted) = (true, false);
        let frame = state.frame.take();
        drop(state);
        drop(frame);
        self.0.bell.notify_one();
    }
}
