//! Questions of operators between replicas: carried as bytes, and answered by whoever the app names. Decides
//! nothing, and knows no question.

use std::{future::Future, pin::Pin, sync::OnceLock, time::Instant};

use super::{
    channel::{Topic, Unanswered},
    replica::Replica,
};
use crate::{broker::Broker, bus::Bus, token::InstanceId};

type Answer = Pin<Box<dyn Future<Output = Option<Vec<u8>>> + Send>>;

/// Answers the questions of operators that other replicas were asked. `None`: the question is not answered.
pub type OperatorAnswers = Box<dyn Fn(Vec<u8>) -> Answer + Send + Sync>;

/// Who answers here, as soon as it is known.
#[derive(Default)]
pub(super) struct OperatorDesk(OnceLock<OperatorAnswers>);

impl OperatorDesk {
    /// From now on these are the answers. The first call counts.
    pub(super) fn open(&self, answers: OperatorAnswers) {
        let _ = self.0.set(answers);
    }

    pub(super) async fn answer(&self, question: Vec<u8>) -> Option<Vec<u8>> {
        self.0.get()?(question).await
    }
}

/// Asks one replica, once.
///
/// # Errors
/// See [`Unanswered`].
pub(super) async fn ask<B: Broker + Bus>(
    replica: &Replica<B>,
    other: InstanceId,
    question: &[u8],
    until: Instant,
) -> Result<Vec<u8>, Unanswered> {
    replica.channel.ask(other, Topic::Admin, question, until).await
}
