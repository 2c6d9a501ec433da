//! The memory of requests and answers, between the limiter that owns the budgets and the handlers. It travels in
//! the record of a call, and among the extensions of requests and answers.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::budget::{MemoryShare, Taken};
use crate::{
    api_error::{ApiError, BudgetKind, ExhaustedScope},
    clock,
    lessor::{Fetched, Rejected, RejectedCause, encoded_size},
};

/// Longest wait for the memory of an answer.
const BYTES_PATIENCE: Duration = Duration::from_secs(1);

/// The bytes that the answers of one connection may take; a part of the record of each call.
#[derive(Debug, Clone)]
pub(super) struct AnswerBudget(MemoryShare);

/// The bytes that one answer has taken, held until the answer is written; an extension of the answer.
#[derive(Debug, Clone)]
pub(super) struct AnswerMemory {
    _taken: Arc<Taken>,
}

/// The bytes that a request with settlements has taken, until they are settled; an extension of the request of a Fetch.
#[derive(Debug, Clone)]
pub(super) struct RequestMemory {
    _taken: Arc<Taken>,
}

impl RequestMemory {
    pub(super) fn new(taken: Taken) -> Self {
        Self { _taken: Arc::new(taken) }
    }
}

impl AnswerBudget {
    pub(super) fn new(share: MemoryShare) -> Self {
        Self(share)
    }

    /// Takes `bytes`.
    ///
    /// # Errors
    /// [`ApiError::ByteLimit`].
    pub(super) fn take(&self, bytes: usize) -> Result<Taken, ApiError> {
        self.0.take(bytes).map_err(exhausted)
    }

    /// Takes `bytes`, and waits for them until `until`.
    ///
    /// # Errors
    /// [`ApiError::ByteLimit`].
    pub(super) async fn take_by(&self, bytes: usize, until: Instant) -> Result<Taken, ApiError> {
        self.0.take_by(bytes, until).await.map_err(exhausted)
    }
}

impl AnswerMemory {
    pub(super) fn new(taken: Taken) -> Self {
        Self { _taken: Arc::new(taken) }
    }
}

fn exhausted(scope: ExhaustedScope) -> ApiError {
    ApiError::ByteLimit(BudgetKind::Answers, scope)
}

/// Takes the memory of a Fetch's answer. Its messages are in memory twice: as they came, and as they go. The answer has
/// `besides` bytes more. Clients that read free memory within moments, so the call waits for it.
pub(super) async fn fetch_memory(
    budget: Option<&AnswerBudget>,
    fetched: &Fetched,
    besides: usize,
) -> Result<Option<AnswerMemory>, ApiError> {
    let Some(budget) = budget else { return Ok(None) };
    // A message that is too large is answered without its payload.
    let large = |rejected: &&Rejected| rejected.cause != RejectedCause::TooLarge;
    let rejected = fetched.rejected().iter().filter(large).map(|rejected| &rejected.leased);
    let sizes = fetched.messages().iter().chain(rejected);
    let size: u64 = sizes.map(|leased| encoded_size(leased.delivery())).sum();
    let size = usize::try_from(2 * size).unwrap_or(usize::MAX).saturating_add(besides);
    let taken = budget.take_by(size, clock::now() + BYTES_PATIENCE).await?;
    Ok(Some(AnswerMemory::new(taken)))
}
