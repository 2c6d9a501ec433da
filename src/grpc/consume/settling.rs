//! The settlements of a frame: begun in the order of the frames, each frame with one result.

use std::future::Future;

use super::{
    ConsumeTask,
    numbers::{self, Named},
};
use crate::{
    access::{RightLost, Settler},
    api_error::ApiError,
    broker::Broker,
    bus::Bus,
    clock,
    cluster::settle_result,
    grpc::settlements::{CallResults, CallSettlements},
    pb::{self, settlement::Action},
};

/// The settlements of a frame are done.
pub(super) struct SettledFrame {
    id: u64,
    settled: Result<CallResults, ApiError>,
    /// The number of each settlement that was begun. 0: its lease is not of this stream.
    numbers: Vec<u64>,
    /// The results of the others.
    known: Vec<(usize, pb::SettleResult)>,
}

impl<B: Broker + Bus> ConsumeTask<B> {
    /// Begins the settlements of a frame. `None`: nothing of it may be done. Its result says why, or the end of the
    /// stream.
    pub(super) fn begin(
        &mut self,
        settle: pb::ConsumeSettle,
    ) -> Option<impl Future<Output = SettledFrame> + Send + use<B>> {
        let pb::ConsumeSettle { id, settlements, confirmation } = settle;
        if let Err(refused) = self.is_accepted() {
            // Without a result: the client repeats the settlements with a newer credential.
            self.fail(refused);
            return None;
        }
        let ends = |settlement: &&pb::Settlement| {
            settlement.number > 0 && !matches!(settlement.action, Some(Action::Extend(_)))
        };
        let ending = settlements.iter().filter(ends).count();
        let named = self.numbers.named(settlements);
        let settling = named.and_then(|Named { settlements, numbers, known }| {
            let least = usize::from(known.is_empty());
            Ok((CallSettlements::read(settlements, least, confirmation)?, numbers, known))
        });
        let (settling, numbers, known) = match settling {
            Ok(settling) => settling,
            Err(refused) => {
                self.service.metrics().refused(refused.reason().name(), "Consume");
                self.results.push(failed(id, refused), None);
                return None;
            }
        };
        self.numbers.begun(&numbers);
        let count = settling.len() + known.len();
        self.work.tokens = self.work.tokens.map(|tokens| tokens + count);
        let (service, call) = (self.service.clone(), self.started.call.clone());
        let settler = Settler::new(service.gatekeeper().rights(), self.started.caller.clone());
        let until = clock::now() + service.lessor.settle_timeout();
        let ending = self.flow.settling(ending);
        Some(async move {
            let _ending = ending;
            let audited = call.audited(service.gatekeeper().audit());
            let budget = call.budget();
            let settled =
                service.settle_all(settling, (&audited, call.span()), &settler, budget, until);
            SettledFrame { id, settled: settled.await, numbers, known }
        })
    }

    /// Whether the credential of the stream is still accepted. Each settlement is asked for its right besides.
    fn is_accepted(&self) -> Result<(), ApiError> {
        match self.started.still_may_fetch(&self.service.gatekeeper().rights()) {
            Err(lost @ RightLost::NotAccepted(_)) => Err(lost.into()),
            Err(RightLost::Denied(_)) | Ok(()) => Ok(()),
        }
    }

    /// The settlements of a frame have their results.
    pub(super) fn settled(&mut self, settled: SettledFrame) {
        let SettledFrame { id, settled, numbers, known } = settled;
        let results = settled.as_ref().ok().map(|settled| &*settled.results);
        self.numbers.settled(&numbers, results);
        let (result, memory) = match settled {
            Ok(CallResults { results, failed, taken }) => {
                let failed = failed + u32::try_from(known.len()).unwrap_or(u32::MAX);
                let results = numbers::merged(results, known);
                (pb::ConsumeResult { id, results, failed, error: None }, taken)
            }
            Err(refused) => (failed(id, refused), None),
        };
        self.work.failed = self.work.failed.map(|failed| failed + result.failed);
        self.results.push(result, memory);
    }
}

/// Nothing of a frame was done.
fn failed(id: u64, refused: ApiError) -> pb::ConsumeResult {
    let error = settle_result(Err(refused)).error;
    pb::ConsumeResult { id, error, ..Default::default() }
}
