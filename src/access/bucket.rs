//! A token bucket: how many calls a principal may make in a second, and how many at once. Pure: `now` is an
//! argument.
//!
//! 1. The bucket begins full. It is filled evenly, and never holds more than `burst` tokens.
//! 2. Each call takes one token. Without a token there is no call, and nothing is taken.

use std::time::{Duration, Instant};

/// The parts of one token. With a rate of whole tokens a second, each nanosecond adds a whole number of parts.
const PARTS: u64 = 1_000_000_000;

/// The calls of a principal in a second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CallRate {
    /// Tokens that are added in a second, from 1 to 1,000,000.
    pub(super) per_second: u64,
    /// Most tokens, from 1 to 100,000,000: the calls that may come at once.
    pub(super) burst: u64,
}

/// See the [module](self).
#[derive(Debug, Clone)]
pub(super) struct TokenBucket {
    /// The parts that it held at that time.
    parts: u64,
    at: Instant,
}

impl TokenBucket {
    /// A full bucket.
    pub(super) fn full(rate: CallRate, now: Instant) -> Self {
        Self { parts: rate.burst.saturating_mul(PARTS), at: now }
    }

    /// Takes one token. The rate may be another one than before: it counts since the last token.
    ///
    /// # Errors
    /// The time until the next token is there.
    pub(super) fn take(&mut self, rate: CallRate, now: Instant) -> Result<(), Duration> {
        let filled = now.saturating_duration_since(self.at).as_nanos();
        let filled = filled.saturating_mul(rate.per_second.into());
        let filled = u64::try_from(filled).unwrap_or(u64::MAX).saturating_add(self.parts);
        self.parts = filled.min(rate.burst.saturating_mul(PARTS));
        self.at = self.at.max(now);
        match self.parts.checked_sub(PARTS) {
            Some(rest) => {
                self.parts = rest;
                Ok(())
            }
            None => {
                let missing = PARTS - self.parts;
                Err(Duration::from_nanos(missing.div_ceil(rate.per_second.max(1))))
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test begins at any moment")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The reference: a call is allowed if no time that ends now had more calls than it may have.
    fn naive(taken: &[Duration], rate: CallRate, now: Duration) -> bool {
        (0..taken.len()).all(|first| {
            let calls = (taken.len() - first) as u128 + 1;
            let added = (now - taken[first]).as_nanos() * u128::from(rate.per_second);
            calls * u128::from(PARTS) <= u128::from(rate.burst) * u128::from(PARTS) + added
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        #[test]
        fn bucket_allows_what_the_count_of_each_time_allows(
            per_second in prop_oneof![1_u64..5, 1_u64..1000, Just(1_000_000)], burst in 1_u64..6,
            steps in prop::collection::vec(
                prop_oneof![Just(0_u64), 1_u64..1000, 1_u64..2_000_000_000], 1..60,
            ),
        ) {
            let rate = CallRate { per_second, burst };
            let begin = Instant::now();
            let mut bucket = TokenBucket::full(rate, begin);
            let (mut taken, mut now) = (Vec::new(), Duration::ZERO);
            for step in steps {
                now += Duration::from_nanos(step);
                let allowed = naive(&taken, rate, now);
                let took = bucket.take(rate, begin + now);
                prop_assert_eq!(took.is_ok(), allowed);
                match took {
                    Ok(()) => taken.push(now),
                    Err(wait) => {
                        prop_assert!(naive(&taken, rate, now + wait));
                        prop_assert!(!naive(&taken, rate, now + wait - Duration::from_nanos(1)));
                        prop_assert!(wait <= Duration::from_secs(1));
                    }
                }
            }
        }
    }

    #[test]
    fn other_rate_counts_from_the_next_call_on() {
        let (slow, fast) =
            (CallRate { per_second: 1, burst: 2 }, CallRate { per_second: 100, burst: 10 });
        let now = Instant::now();
        let mut bucket = TokenBucket::full(slow, now);
        assert_eq!([(); 3].map(|()| bucket.take(slow, now).is_ok()), [true, true, false]);
        assert_eq!(bucket.take(fast, now), Err(Duration::from_millis(10)), "it gets no new burst");
        let later = now + Duration::from_secs(1);
        let taken = (0..20).filter(|_| bucket.take(fast, later).is_ok()).count();
        assert_eq!(taken, 10);
        assert_eq!(bucket.take(slow, later), Err(Duration::from_secs(1)));
    }

    #[test]
    fn clock_that_goes_back_adds_nothing() {
        let rate = CallRate { per_second: 1, burst: 1 };
        let now = Instant::now();
        let later = now + Duration::from_secs(5);
        let mut bucket = TokenBucket::full(rate, later);
        assert_eq!(bucket.take(rate, later), Ok(()));
        assert_eq!(bucket.take(rate, now), Err(Duration::from_secs(1)));
        assert_eq!(bucket.take(rate, later), Err(Duration::from_secs(1)));
    }
}
