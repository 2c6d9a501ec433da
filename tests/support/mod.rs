//! What the integration tests share: a real nats-server, a real proxy in front of it, and ways to
//! wait for a condition with a bound. Nothing here asserts anything about the product.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

pub mod cluster;
pub mod jetstream;
pub mod nats_server;
pub mod proxy;
pub mod raw_nats;
pub mod relay;

use std::{
    future::Future,
    time::{Duration, Instant},
};

/// Long enough for a loaded machine of two cores; a test that waits this long has failed.
pub const BOUND: Duration = Duration::from_secs(20);

/// Asks again and again until the answer is there.
///
/// # Panics
/// When it is not there within [`BOUND`]; `what` says what was waited for.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut ask: impl FnMut() -> F,
) -> T {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return answer;
        }
        assert!(began.elapsed() < BOUND, "waited {BOUND:?} for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A protobuf duration of so many milliseconds.
pub fn millis(millis: i64) -> Option<prost_types::Duration> {
    let nanos = i32::try_from(millis % 1000 * 1_000_000).unwrap();
    Some(prost_types::Duration { seconds: millis / 1000, nanos })
}
