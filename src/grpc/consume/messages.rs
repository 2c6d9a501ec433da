//! The messages of a frame: the rights and the limits that they need, and their tokens.

use std::sync::Arc;

use super::{ConsumeTask, MAX_UNREAD};
use crate::{
    api_error::ApiError,
    broker::Broker,
    bus::Bus,
    clock::{self, ClockPair},
    grpc::{answer_memory::fetch_memory, backend::nonces, encode::Seal, layers::FrameHold},
    pb,
};

impl<B: Broker + Bus> ConsumeTask<B> {
    /// Adds the messages that wait.
    pub(super) async fn add_messages(
        &mut self,
        response: &mut pb::ConsumeResponse,
        hold: &mut FrameHold,
    ) -> Result<(), ApiError> {
        if self.closed || self.flow.waits_since().is_none() {
            return Ok(());
        }
        let (service, started) = (self.service.clone(), self.started.clone());
        let rights = service.gatekeeper().rights();
        started.still_may_fetch(&rights)?;
        let now = clock::now();
        let Ok(left) = service.leases_left(&rights, &started.principal) else {
            // Others of the principal have all its leases now.
            self.stall(now + MAX_UNREAD);
            return Ok(());
        };
        let left = usize::try_from(left).unwrap_or(usize::MAX);
        let until = now + service.lessor.settle_timeout();
        let Some(fetched) = self.flow.take(left, until).await else { return Ok(()) };
        let besides = prost::Message::encoded_len(response);
        let memory = fetch_memory(started.call.budget(), &fetched, besides).await;
        let Ok(memory) = memory else {
            // The messages go back: their memory is needed for answers that are not read.
            drop(fetched);
            self.stall(clock::now() + MAX_UNREAD);
            return Ok(());
        };
        let (messages, rejected) = (fetched.messages().len(), fetched.rejected().len());
        self.idle.restart(clock::now());
        self.work.messages = self.work.messages.map(|sum| sum + messages);
        self.work.rejected = self.work.rejected.map(|sum| sum + rejected);
        let sealer = service.keys.sealer();
        let (owner, clocks, principal) = (service.owner, ClockPair::read(), &*started.principal);
        let seal = Seal { sealer: &sealer, owner, clocks, principal, span: None };
        let sealed = seal.fetch(&fetched, nonces()?);
        self.numbers.sent(sealed.messages.iter().map(|sent| (sent.number, &*sent.token)));
        self.numbers.sent(sealed.rejected.iter().map(|sent| (sent.number, &*sent.token)));
        (response.messages, response.rejected) = (sealed.messages, sealed.rejected);
        response.pending = sealed.pending;
        self.pending = sealed.pending;
        hold.deliveries = Some(Arc::new(fetched.into_deliveries()));
        hold.memory = memory;
        Ok(())
    }
}
