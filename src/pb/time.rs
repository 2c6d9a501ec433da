//! Times of the standard library as protobuf times, and back.

use std::time::Duration;

use prost_types::{Duration as PbDuration, Timestamp};

/// Most seconds of a `google.protobuf.Duration`, by its specification.
const MAX_SECONDS: u64 = 315_576_000_000;

/// The timestamp for a time since the Unix epoch.
pub(crate) fn timestamp(unix: Duration) -> Timestamp {
    Timestamp {
        seconds: i64::try_from(unix.as_secs()).unwrap_or(i64::MAX),
        // Below 10^9, so it fits.
        nanos: i32::try_from(unix.subsec_nanos()).unwrap_or_default(),
    }
}

/// The time since the Unix epoch for a timestamp. `None`: it is before the epoch or malformed.
pub(crate) fn to_unix(at: &Timestamp) -> Option<Duration> {
    to_duration(&PbDuration { seconds: at.seconds, nanos: at.nanos })
}

/// The same duration. A duration beyond 292 billion years becomes 0: no such duration exists here.
pub(crate) fn duration(duration: Duration) -> PbDuration {
    PbDuration::try_from(duration).unwrap_or_default()
}

/// The same duration. `None`: it is negative or malformed.
pub(crate) fn to_duration(value: &PbDuration) -> Option<Duration> {
    let seconds = u64::try_from(value.seconds).ok().filter(|seconds| *seconds <= MAX_SECONDS)?;
    let nanos = u32::try_from(value.nanos).ok().filter(|nanos| *nanos < 1_000_000_000)?;
    Some(Duration::new(seconds, nanos))
}
