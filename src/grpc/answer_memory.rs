//! The memory of answers, between the limiter that owns its budget and the handlers that take from it. It
//! travels among the extensions of requests and answers.

use std::{sync::Arc, time::Instant};

use super::budget::{MemoryShare, Taken};
use crate::api_error::{ApiError, BudgetKind, ExhaustedScope};

/// The bytes that the answers of one connection may take; an extension of each request of ours.
#[derive(Debug, Clone)]
pub(super) struct AnswerBudget(MemoryShare);

/// The bytes that one answer has taken, held until the answer is written; an extension of the answer.
#[derive(Debug, Clone)]
pub(super) struct AnswerMemory {
    _taken: Arc<Taken>,
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
