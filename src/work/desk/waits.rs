//! How long to wait before something is repeated. Pure.

use std::time::Duration;

/// The first wait, and the longest, without the time that the proxy asks for.
const WAITS: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];

/// Waits that vary, so that workers that failed together do not come back together.
#[derive(Debug)]
pub(super) struct Waits {
    seed: u64,
}

impl Waits {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed }
    }

    /// The time that was asked for, and half to all of a time that doubles with each of `tries`.
    pub(super) fn next(&mut self, asked: Duration, tries: u32) -> Duration {
        // The constants of Knuth's MMIX. Only the spread matters here.
        let seed = self.seed.wrapping_mul(6_364_136_223_846_793_005);
        self.seed = seed.wrapping_add(1_442_695_040_888_963_407);
        let share = f64::from((self.seed >> 32) as u32) / f64::from(u32::MAX);
        let [first, longest] = WAITS;
        let whole = (first * 2_u32.pow(tries.min(10))).min(longest);
        asked.min(longest) + whole.mul_f64(0.5 + share / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_is_what_was_asked_for_and_more() {
        let mut waits = Waits::new(7);
        for (asked, tries, least, most) in [
            (0, 0, 50, 100),
            (0, 3, 400, 800),
            (0, 60, 2500, 5000),
            (1000, 0, 1050, 1100),
            (99_000, 9, 7500, 10_000),
        ] {
            let mut seen = Vec::new();
            for _ in 0..100 {
                let wait = waits.next(Duration::from_millis(asked), tries).as_millis();
                assert!((least..=most).contains(&wait), "{asked} {tries}: {wait}");
                seen.push(wait);
            }
            seen.dedup();
            assert!(seen.len() > 50, "the waits do not vary");
        }
    }
}
