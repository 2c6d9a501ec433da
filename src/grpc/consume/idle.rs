//! Why nothing comes on a stream: asked a moment before each heartbeat without a message, and told with it.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use futures_util::{FutureExt as _, future::BoxFuture};

use crate::{
    grpc::encode::empty_reason,
    lessor::FlowIdle,
    pb::{self, EmptyReason},
};

/// The question is asked this long before its answer is due, or half a heartbeat before.
const ASK_BEFORE: Duration = Duration::from_millis(500);

/// See the [module](self).
pub(super) struct IdleReason {
    heartbeat: Duration,
    /// The last message, or the last answer.
    quiet_since: Instant,
    question: Option<BoxFuture<'static, Option<FlowIdle>>>,
    asked: bool,
    answer: Option<pb::ConsumeIdle>,
}

impl IdleReason {
    pub(super) fn new(heartbeat: Duration, now: Instant) -> Self {
        Self { heartbeat, quiet_since: now, question: None, asked: false, answer: None }
    }

    /// A message was delivered, or the reason was told.
    pub(super) fn restart(&mut self, now: Instant) {
        *self = Self::new(self.heartbeat, now);
    }

    /// Whether it is time to ask.
    pub(super) fn asks(&self, now: Instant) -> bool {
        !self.asked && now >= self.asks_at()
    }

    pub(super) fn ask(&mut self, ask: impl Future<Output = Option<FlowIdle>> + Send + 'static) {
        (self.asked, self.question) = (true, Some(ask.boxed()));
    }

    /// Waits for the answer.
    pub(super) async fn answered(&mut self) {
        let Some(question) = &mut self.question else { return std::future::pending().await };
        let answer = question.await;
        self.question = None;
        self.answer = answer.map(told);
    }

    /// Whether the reason is due and known.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        now >= self.quiet_since + self.heartbeat && self.asked && self.question.is_none()
    }

    /// The reason, if it is due and known.
    pub(super) fn take(&mut self, now: Instant) -> Option<pb::ConsumeIdle> {
        if !self.is_due(now) {
            return None;
        }
        let answer = self.answer.take();
        self.restart(now);
        answer
    }

    /// The time of the next thing to do.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match (self.asked, &self.question) {
            (false, _) => Some(self.asks_at()),
            (true, None) => Some(self.quiet_since + self.heartbeat),
            (true, Some(_)) => None,
        }
    }

    fn asks_at(&self) -> Instant {
        self.quiet_since + self.heartbeat - ASK_BEFORE.min(self.heartbeat / 2)
    }
}

fn told(idle: FlowIdle) -> pb::ConsumeIdle {
    let (reason, pending) = match idle {
        FlowIdle::Credit => (EmptyReason::Credit, 0),
        FlowIdle::LeaseLimit => (EmptyReason::LeaseLimit, 0),
        FlowIdle::Away => (EmptyReason::NatsUnavailable, 0),
        FlowIdle::Empty(empty, pending) => (empty_reason(empty), pending),
    };
    pb::ConsumeIdle { reason: reason.into(), pending }
}
