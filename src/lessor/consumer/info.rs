//! The open question for CONSUMER.INFO. Asks it, translates the answer for the monitor, and says in the log
//! why a consumer cannot be read. Decides nothing: the monitor says when INFO is asked.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::monitor::{ConsumerView, InfoAnswer};
use crate::{
    broker::{Broker, ConsumerInfo, ConsumerName, InfoError, Link},
    clock,
    lessor::{Error, core::Core, spec::ConsumerSpec, underway::Underway},
};

/// The longest wait for an answer.
const INFO_TIMEOUT: Duration = Duration::from_secs(2);
/// A question without an answer is a sign after this, or after twice the time that the last answer took.
const LOOK_PATIENCE: Duration = Duration::from_millis(250);

/// See the [module](self).
pub(super) struct InfoQuestion<B: Broker> {
    core: Arc<Core<B>>,
    name: ConsumerName,
    asked: Underway<Result<ConsumerInfo, InfoError>>,
    asked_at: Instant,
    patience: Duration,
    /// Why the consumer cannot be read.
    why: Option<String>,
    /// The reason that was logged last.
    logged: Option<String>,
    /// The last answer, and when it came.
    last_read: Option<(Instant, ConsumerInfo)>,
}

impl<B: Broker> InfoQuestion<B> {
    pub(super) fn new(core: Arc<Core<B>>, name: ConsumerName) -> Self {
        let (asked, asked_at) = (Underway::none(), clock::now());
        Self {
            core,
            name,
            asked,
            asked_at,
            patience: LOOK_PATIENCE,
            why: None,
            logged: None,
            last_read: None,
        }
    }

    pub(super) fn ask(&mut self) {
        let (core, name) = (self.core.clone(), self.name.clone());
        self.asked_at = clock::now();
        let until = self.asked_at + INFO_TIMEOUT;
        self.asked.begin(async move { core.broker.info(&name, until).await });
    }

    pub(super) fn cancel(&mut self) {
        self.asked.cancel();
    }

    /// Waits for the answer. Never ends if nothing is asked. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<ConsumerInfo, InfoError> {
        let answer = self.asked.next().await;
        if answer.is_ok() {
            let took = clock::now().saturating_duration_since(self.asked_at);
            self.patience = LOOK_PATIENCE.max(took * 2);
        }
        answer
    }

    /// INFO as it was read last, and when.
    pub(super) fn last_read(&self) -> Option<&(Instant, ConsumerInfo)> {
        self.last_read.as_ref()
    }

    /// When INFO was asked last.
    pub(super) fn asked_at(&self) -> Instant {
        self.asked_at
    }

    /// When the open question has had no answer for too long.
    pub(super) fn silent_at(&self) -> Option<Instant> {
        self.asked.is_some().then(|| self.asked_at + self.patience)
    }

    /// The meaning of an answer: to the monitor, and to callers if it ends the task.
    pub(super) fn read(
        &mut self,
        info: &Result<ConsumerInfo, InfoError>,
    ) -> (InfoAnswer, Option<Error>) {
        let answer = match info {
            Ok(info) => {
                self.was_read(info);
                return match ConsumerSpec::check(&self.name, info) {
                    Ok(()) => (InfoAnswer::Read(ConsumerView::of(info)), None),
                    Err(error) => {
                        let created = info.created.clone();
                        (InfoAnswer::Unsuitable { created }, Some(error))
                    }
                };
            }
            Err(InfoError::Unavailable(why)) => {
                tracing::debug!(consumer = %self.name, why, "INFO");
                self.why = Some(why.clone());
                InfoAnswer::Silent
            }
            Err(InfoError::NoStream | InfoError::NoConsumer) => InfoAnswer::Gone,
            Err(InfoError::Permission(_)) => InfoAnswer::Forbidden,
        };
        let error = info.as_ref().err().cloned();
        (answer, error.map(|error| Error::of_info(error, &self.name)))
    }

    /// Says in the log why the consumer cannot be read, once for each reason.
    pub(super) fn log_failure(&mut self, now: Instant) {
        let new = self.why.as_ref().filter(|why| self.logged.as_ref() != Some(why));
        if let Some(why) = new.filter(|_| self.core.unread.allow(now)) {
            tracing::warn!(consumer = %self.name, why, "the consumer cannot be read");
            self.logged = Some(why.clone());
        }
    }

    /// Why NATS, or the consumer, is not to be had. `None`: nothing has failed yet.
    pub(super) fn why_away(&self, link: &Link) -> Option<Error> {
        let why = match (link, &self.why) {
            (Link::Down(why) | Link::Unsupported(why), _) => why.to_string(),
            (Link::Up(_), Some(why)) => format!("the consumer cannot be read: {why}"),
            (Link::Up(_), None) => return None,
        };
        Some(Error::Unavailable(why))
    }

    fn was_read(&mut self, info: &ConsumerInfo) {
        self.why = None;
        self.last_read = Some((clock::now(), info.clone()));
        if self.logged.take().is_some() {
            tracing::info!(consumer = %self.name, "the consumer can be read again");
        }
    }
}
