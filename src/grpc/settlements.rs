//! The settlements of one call, of a Settle or of a Fetch: from their fields to their results. Settle and Fetch share
//! this way. Decides nothing about leases.

use std::time::Instant;

use tonic::Response;

use super::{
    answer_memory::{AnswerBudget, AnswerMemory},
    budget::Taken,
    decode,
};
use crate::{
    access::Settler,
    api_error::ApiError,
    audit::AuditedCall,
    broker::{Broker, Confirmation},
    bus::Bus,
    cluster::{Cluster, TokenAction, settle_result},
    metrics::Metrics,
    pb,
    traces::TracedSpan,
};

/// Most bytes of one result: a reason, a sentence and a subject. Only an error of another replica may have more.
const LARGEST_RESULT: usize = 512;

/// The settlements that a call asks for.
pub(super) struct CallSettlements {
    wanted: Vec<TokenAction>,
    confirmation: Confirmation,
}

/// The results of the settlements of a call.
pub(super) struct CallResults {
    /// One result for each settlement, in order.
    pub(super) results: Vec<pb::SettleResult>,
    /// The results that are errors.
    pub(super) failed: u32,
    /// The memory of the results.
    pub(super) taken: Option<Taken>,
}

impl CallSettlements {
    /// Reads all fields. There must be `least` settlements.
    ///
    /// # Errors
    /// The reason `INVALID_FIELD`.
    pub(super) fn read(
        settlements: Vec<pb::Settlement>,
        least: usize,
        confirmation: i32,
    ) -> Result<Self, ApiError> {
        let confirmation = decode::confirmation(confirmation)?;
        Ok(Self { wanted: decode::settlements(settlements, least)?, confirmation })
    }

    /// The number of settlements.
    pub(super) fn len(&self) -> usize {
        self.wanted.len()
    }

    /// Whether nothing is asked for.
    pub(super) fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Settles all. The memory of the results is taken before anything is settled, because the outcome must be
    /// answered afterwards.
    ///
    /// # Errors
    /// The reason `BYTE_LIMIT`. Then nothing is settled.
    pub(super) async fn settle<B: Broker + Bus>(
        self,
        cluster: &Cluster<B>,
        metrics: &Metrics,
        (call, span): (&AuditedCall<'_>, Option<&TracedSpan>),
        settler: &Settler,
        budget: Option<&AnswerBudget>,
        until: Instant,
    ) -> Result<CallResults, ApiError> {
        let Self { wanted, confirmation } = self;
        let bytes = wanted.len() * LARGEST_RESULT;
        let taken = budget.map(|budget| budget.take(bytes)).transpose()?;
        let results = cluster.settle(call, span, settler, wanted, confirmation, until).await;
        let mut failed = 0;
        for refused in results.iter().filter_map(|result| result.as_ref().err()) {
            failed += 1;
            metrics.refused(refused.reason().name(), call.method);
        }
        let results = results.into_iter().map(settle_result).collect();
        Ok(CallResults { results, failed, taken })
    }
}

/// The response with this answer, which keeps the memory that it needs of what was taken.
pub(super) fn answered<T: prost::Message>(answer: T, taken: Option<Taken>) -> Response<T> {
    let size = answer.encoded_len();
    let mut response = Response::new(answer);
    if let Some(mut taken) = taken {
        taken.shrink_to(size);
        response.extensions_mut().insert(AnswerMemory::new(taken));
    }
    response
}
