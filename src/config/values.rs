//! The ranges of typed values. Each range is wide enough for any use, and narrow enough that no sum of
//! two values overflows.

use std::{ops::RangeInclusive, time::Duration};

/// Largest count. With 400 bytes each, it would take 40 GB.
pub(super) const MAX_COUNT: u32 = 100_000_000;
/// Longest time: a leap year.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 3600);

/// Largest size of memory, in bytes: a tebibyte.
const MAX_MEMORY_BYTES: usize = 1 << 40;

/// A time like `1h 30m`, at most 366 days.
///
/// # Errors
/// The mistake in the text, for people.
pub(super) fn time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text)
        .map_err(|_| "must be a number with a unit, such as 500ms, 10s, 5m or 1h".to_owned())?;
    if time > MAX_DURATION { Err("must be at most 366 days".to_owned()) } else { Ok(time) }
}

/// A reader of numbers in this range.
///
/// # Errors
/// The reader returns the mistake in the text, for people.
pub(super) fn number(
    range: RangeInclusive<u32>,
) -> impl Fn(&str) -> Result<u32, String> + Clone + Send + Sync {
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        let (least, most) = (range.start(), range.end());
        number.ok_or_else(|| format!("must be a number from {least} to {most}"))
    }
}

/// A count, at least 1 and at most [`MAX_COUNT`].
///
/// # Errors
/// The mistake in the text, for people.
pub(super) fn count(text: &str) -> Result<usize, String> {
    number(1..=MAX_COUNT)(text).map(|count| count as usize)
}

/// A number of bytes, at least 1 and at most [`MAX_MEMORY_BYTES`].
///
/// # Errors
/// The mistake in the text, for people.
pub(super) fn bytes(text: &str) -> Result<usize, String> {
    let bytes = text.parse().ok().filter(|bytes| (1..=MAX_MEMORY_BYTES).contains(bytes));
    bytes.ok_or_else(|| format!("must be a number from 1 to {MAX_MEMORY_BYTES}"))
}
