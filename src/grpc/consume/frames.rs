//! The next frame of a stream: all that is to be said now.

use std::time::Instant;

use super::{ConsumeTask, numbers::UntoldEnd, outlet::Frame};
use crate::{
    broker::Broker,
    bus::Bus,
    cluster::settle_result,
    grpc::layers::FrameHold,
    lessor::Error,
    pb::{self, time::duration},
};

/// Most ends of leases in one frame, at about 150 bytes each.
const MAX_FRAME_ENDS: usize = 256;

impl<B: Broker + Bus> ConsumeTask<B> {
    /// The next frame, if there is something to say.
    pub(super) async fn frame(&mut self, now: Instant) -> Option<Frame> {
        let (results, memory) = self.results.take();
        let mut response = pb::ConsumeResponse {
            results,
            opened: self.opened.take(),
            ended: self.ended(),
            credit_id: std::mem::take(&mut self.credit_id),
            draining: self.draining(now),
            idle: self.idle.take(now).filter(|_| self.tells_idle()),
            ..Default::default()
        };
        let mut hold = FrameHold { _results: memory, ..FrameHold::default() };
        if let Err(refused) = self.add_messages(&mut response, &mut hold).await {
            self.fail(refused);
        }
        let silent = response == pb::ConsumeResponse::default();
        let heartbeat = now >= self.written_at + self.started.heartbeat;
        (!silent || heartbeat).then_some(Frame { response, hold })
    }

    /// The ends of leases that are to be told. A lease that has moved has not ended.
    fn ended(&mut self) -> Vec<pb::ConsumeEnded> {
        let mut told = Vec::new();
        while told.len() < MAX_FRAME_ENDS
            && let Some(ended) = self.numbers.next_untold()
        {
            let (number, why) = match ended {
                UntoldEnd::Lease(ended) => (ended.number, self.flow.end_of(ended)),
                UntoldEnd::Gone(number) => (number, Some(Error::ConsumerGone)),
            };
            let why = why.map(|why| settle_result(Err(why.into())).error);
            told.extend(why.map(|why| pb::ConsumeEnded { number, why }));
        }
        told
    }

    fn draining(&mut self, now: Instant) -> Option<pb::ConsumeDraining> {
        let leaving = self.leaving.as_mut().filter(|leaving| !leaving.told)?;
        leaving.told = true;
        let left = leaving.by.map(|by| duration(by.saturating_duration_since(now)));
        Some(pb::ConsumeDraining { cause: leaving.cause.into(), left })
    }
}
