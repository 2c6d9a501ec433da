//! The log line of a refusal. The first refusal of each reason, consumer and principal is logged, and again after
//! an hour. Anyone can be refused as often as they like, so lines and memory are bounded.

mod recent;

use std::{
    sync::Mutex,
    time::{Duration, Instant},
};

pub use self::recent::RecentRefusal;
use self::recent::RecentRefusals;
use crate::{
    api_error::ApiError,
    broker::ConsumerName,
    clock,
    lock::lock,
    log_throttle::KeyedLogThrottle,
    metrics::{Metrics, PrincipalMeter},
    request_log::RequestLogScope,
};

/// The least time between two lines for the same reason, consumer and principal.
const REPEAT_AFTER: Duration = Duration::from_secs(3600);
/// Lines in ten seconds.
const LINES_PER_TEN_SECONDS: u32 = 10;

/// The refusals that are in the log already.
#[derive(Debug)]
pub struct RefusalLog {
    said: KeyedLogThrottle,
    /// Calls with a line in the request log have no line here.
    requests: RequestLogScope,
    recent: Mutex<RecentRefusals>,
    principals: PrincipalMeter,
}

/// The caller that was refused, as far as it is known.
#[derive(Debug, Default)]
pub struct RefusedCaller<'c> {
    /// The consumer that the call is about.
    pub consumer: Option<ConsumerName>,
    /// The principal of the caller.
    pub principal: Option<&'c str>,
    /// The name that the worker gave. Empty: it gave none.
    pub worker: &'c str,
}

impl RefusalLog {
    /// A log without a refusal.
    pub fn new() -> Self {
        Self::metered(&Metrics::off(), RequestLogScope::Off)
    }

    /// The same. Refusals of principals are counted. The request log has the lines of this scope.
    pub fn metered(metrics: &Metrics, requests: RequestLogScope) -> Self {
        let said = KeyedLogThrottle::new(REPEAT_AFTER, LINES_PER_TEN_SECONDS);
        let principals = metrics.principals().clone();
        Self { said, requests, recent: Mutex::default(), principals }
    }

    /// Counts a refusal, and keeps it for operators.
    fn see(&self, call: &'static str, caller: &RefusedCaller<'_>, error: &ApiError, now: Instant) {
        self.count(error);
        let reason = error.reason().name();
        lock(&self.recent).add((call, reason), caller.consumer.as_ref(), caller.principal, now);
    }

    fn count(&self, error: &ApiError) {
        if let ApiError::NotAllowed(denied) = error {
            self.principals.denied(denied.principal.as_deref(), denied.verb.name());
        } else if let ApiError::OverLimit(over) = error {
            self.principals.limited(&over.principal, over.limit.name());
        } else if let ApiError::Unauthenticated(why) = error {
            self.principals.not_accepted(why.name());
        } else if let ApiError::AuthUnavailable(_) = error {
            self.principals.not_accepted("keys_away");
        }
    }

    /// A call with this name was refused. Logs it, unless the log has such a line already.
    pub fn refused(&self, call: &'static str, caller: &RefusedCaller<'_>, error: &ApiError) {
        if self.requests.has(Some(error.reason().name())) {
            self.see(call, caller, error, clock::now());
        } else {
            self.token_refused(call, caller, error);
        }
    }

    /// The same for a token of a call: such a call has no line in the request log, or one for all its tokens.
    pub fn token_refused(&self, call: &'static str, caller: &RefusedCaller<'_>, error: &ApiError) {
        let (reason, principal, now) = (error.reason().name(), caller.principal, clock::now());
        self.see(call, caller, error, now);
        if self.said.allow(&(reason, &caller.consumer, principal), now) {
            let consumer = caller.consumer.as_ref().map(ToString::to_string);
            let worker = Some(caller.worker).filter(|worker| !worker.is_empty());
            let why = error.message();
            tracing::info!(call, reason, consumer, principal, worker, why, "a call was refused");
        }
    }

    /// The last kinds of refusals, the newest first.
    pub fn recent(&self) -> Vec<RecentRefusal> {
        lock(&self.recent).list()
    }
}

impl Default for RefusalLog {
    fn default() -> Self {
        Self::new()
    }
}
