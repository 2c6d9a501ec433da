//! Owns the two clocks: the only room that reads the time. Everything that decides takes `now` as
//! an argument, so that tests can choose it.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The monotonic time that leases and waits are measured by.
///
/// It is tokio's clock, so a test that pauses tokio's time pauses ours too.
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads the clock")]
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The wall clock at this moment, as the time since the Unix epoch. Only for what leaves the
/// process: timestamps in answers and the `settle_by` inside tokens.
#[expect(clippy::disallowed_methods, reason = "this is the one place that reads the clock")]
pub fn unix_time() -> Duration {
    // Ahead of what is real only where a test has paused time and let it pass: then this clock goes
    // with it, or the two would drift apart. Otherwise nothing.
    let ahead = now().saturating_duration_since(Instant::now());
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default() + ahead
}

/// Sleeps until `when`; for ever when there is no `when`.
pub async fn sleep_until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when.into()).await,
        None => std::future::pending().await,
    }
}
