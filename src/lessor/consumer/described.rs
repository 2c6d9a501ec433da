//! The task of a consumer as operators see it. Only reads.

use std::time::Instant;

use super::{callers::Callers, handle::TaskState, info::InfoQuestion, poison::PoisonWatch};
use crate::broker::Broker;

/// The state of a task with these parts.
pub(super) fn describe<B: Broker>(
    callers: &Callers,
    info: &InfoQuestion<B>,
    poison: &PoisonWatch<B>,
    now: Instant,
) -> TaskState {
    TaskState {
        waiters: callers.pump.waiters(),
        wanted: callers.pump.wanted(),
        pulled: callers.pump.pulled(),
        parked: callers.pump.parked(),
        info: info.last_read().cloned(),
        suspended: poison.suspended(now).map(|error| error.to_string()),
    }
}
