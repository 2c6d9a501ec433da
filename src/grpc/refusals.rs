//! The log's line of a refusal: the first of each reason and consumer, and again after an hour. Strangers
//! can be refused as often as they like, so lines and memory are bounded.

use std::time::Duration;

use crate::{api_error::ApiError, broker::ConsumerName, clock, log_throttle::KeyedLogThrottle};

/// Between two lines for the same reason and consumer, at least.
const REPEAT_AFTER: Duration = Duration::from_secs(3600);
/// Lines in ten seconds.
const LINES_PER_TEN_SECONDS: u32 = 10;

/// What has been refused.
#[derive(Debug)]
pub(super) struct Refusals(KeyedLogThrottle);

/// Who asked, as far as it is known.
#[derive(Debug, Default)]
pub(super) struct Who<'w> {
    pub(super) consumer: Option<ConsumerName>,
    pub(super) worker: &'w str,
}

impl Refusals {
    pub(super) fn new() -> Self {
        Self(KeyedLogThrottle::new(REPEAT_AFTER, LINES_PER_TEN_SECONDS))
    }

    /// Says that a call of this name was refused, if it has not been said lately.
    pub(super) fn see(&self, call: &'static str, who: &Who<'_>, refused: &ApiError) {
        let reason = refused.reason().name();
        if self.0.allow(&(reason, &who.consumer), clock::now()) {
            let consumer = who.consumer.as_ref().map(ToString::to_string);
            let worker = Some(who.worker).filter(|worker| !worker.is_empty());
            let why = refused.message();
            tracing::info!(call, reason, consumer, worker, why, "a call was refused");
        }
    }
}
