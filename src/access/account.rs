//! The account of one principal: its open calls, and its calls in a second. Pure: `now` is an argument, and so
//! are the limits, which may change while calls are open.
//!
//! 1. A call that is refused changes nothing.
//! 2. Each call that has begun ends once. Limits that change never change the counts.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    bucket::{CallRate, TokenBucket},
    document::PrincipalLimits,
};

/// A limit of a principal that is reached, with its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReachedLimit {
    /// Leases held at once.
    Leases(u64),
    /// Fetch calls open at once.
    Waiters(u64),
    /// Calls under way at once.
    Calls(u64),
    /// Calls in a second.
    Rate {
        /// The calls that are allowed in a second.
        per_second: u64,
        /// The time until the next call is allowed.
        free_in: Duration,
    },
}

impl ReachedLimit {
    /// Its name, for programs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Leases(_) => "leases",
            Self::Waiters(_) => "waiters",
            Self::Calls(_) => "calls",
            Self::Rate { .. } => "rate",
        }
    }
}

/// A limit of this principal is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OverLimit {
    /// The name of the principal.
    pub principal: Arc<str>,
    /// The limit.
    pub limit: ReachedLimit,
}

/// The open calls of a principal, and its calls in a second.
#[derive(Debug, Default)]
pub struct CallAccount {
    calls: u64,
    waiters: u64,
    /// `None`: its calls were never counted in a second.
    bucket: Option<TokenBucket>,
}

impl CallAccount {
    /// Its calls under way, and the Fetch calls among them.
    pub fn open(&self) -> (u64, u64) {
        (self.calls, self.waiters)
    }

    /// Begins a call. It must be ended by [`CallAccount::end`].
    ///
    /// # Errors
    /// The limit that is reached.
    pub fn begin(
        &mut self,
        is_fetch: bool,
        limits: &PrincipalLimits,
        now: Instant,
    ) -> Result<(), ReachedLimit> {
        let reached = |most: Option<u64>, count| most.filter(|most| count >= *most);
        if let Some(most) = reached(limits.max_calls, self.calls) {
            return Err(ReachedLimit::Calls(most));
        }
        if let Some(most) = reached(limits.max_waiters, self.waiters).filter(|_| is_fetch) {
            return Err(ReachedLimit::Waiters(most));
        }
        // Last, because it is the only one that takes something.
        if let Some((per_second, burst)) = limits.rate {
            let rate = CallRate { per_second, burst };
            let bucket = self.bucket.get_or_insert_with(|| TokenBucket::full(rate, now));
            let rate_reached = |free_in| ReachedLimit::Rate { per_second, free_in };
            bucket.take(rate, now).map_err(rate_reached)?;
        }
        self.calls += 1;
        self.waiters += u64::from(is_fetch);
        Ok(())
    }

    /// Ends a call that has begun.
    pub fn end(&mut self, is_fetch: bool) {
        self.calls = self.calls.saturating_sub(1);
        self.waiters = self.waiters.saturating_sub(u64::from(is_fetch));
    }
}

impl PrincipalLimits {
    /// The leases that a principal with so many leases may still take.
    ///
    /// # Errors
    /// The limit that is reached.
    pub fn leases_left(&self, held: impl FnOnce() -> usize) -> Result<u64, ReachedLimit> {
        let Some(most) = self.max_leases else { return Ok(u64::MAX) };
        let left = most.saturating_sub(held() as u64);
        if left == 0 { Err(ReachedLimit::Leases(most)) } else { Ok(left) }
    }
}

impl OverLimit {
    /// The limit in words.
    pub fn message(&self) -> String {
        let name = &self.principal;
        match self.limit {
            ReachedLimit::Leases(most) => {
                format!(
                    "principal `{name}` holds {most} leases of this replica, which is its limit"
                )
            }
            ReachedLimit::Waiters(most) => {
                format!(
                    "principal `{name}` has {most} Fetch calls at this replica, which is its limit"
                )
            }
            ReachedLimit::Calls(most) => {
                format!("principal `{name}` has {most} calls at this replica, which is its limit")
            }
            ReachedLimit::Rate { per_second, .. } => format!(
                "principal `{name}` may make {per_second} calls in a second at this replica"
            ),
        }
    }

    /// The time until the call may be repeated, if that is known.
    pub fn free_in(&self) -> Option<Duration> {
        match self.limit {
            ReachedLimit::Rate { free_in, .. } => Some(free_in),
            ReachedLimit::Leases(_) | ReachedLimit::Waiters(_) | ReachedLimit::Calls(_) => None,
        }
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "a test begins at any moment")]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Debug, Clone, Copy)]
    enum Step {
        Begin {
            is_fetch: bool,
        },
        /// Ends one of the open calls.
        End(prop::sample::Index),
        /// Changes the limits of calls, of waiters, and of calls in a second.
        Limits(Option<u64>, Option<u64>, Option<u64>),
        Wait(u64),
    }

    fn step() -> impl Strategy<Value = Step> {
        let limit = || prop::option::of(1_u64..5);
        prop_oneof![
            4 => any::<bool>().prop_map(|is_fetch| Step::Begin { is_fetch }),
            2 => any::<prop::sample::Index>().prop_map(Step::End),
            1 => (limit(), limit(), limit())
                .prop_map(|(calls, waiters, rate)| Step::Limits(calls, waiters, rate)),
            1 => (0_u64..2_000).prop_map(Step::Wait),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]

        /// The reference is the list of open calls, and a bucket of its own.
        #[test]
        fn account_refuses_as_the_list_of_open_calls_does(steps in prop::collection::vec(step(), 1..80)) {
            let (mut account, mut limits) = (CallAccount::default(), PrincipalLimits::default());
            let (mut open, mut bucket) = (Vec::new(), None);
            let mut now = Instant::now();
            for step in steps {
                match step {
                    Step::Begin { is_fetch } => {
                        let count = |fetch: bool| open.iter().filter(|one| **one || !fetch).count();
                        let full = |most: Option<u64>, count: usize| {
                            most.is_some_and(|most| count as u64 >= most)
                        };
                        let mut refused = None;
                        if full(limits.max_calls, count(false)) {
                            refused = Some("calls");
                        } else if is_fetch && full(limits.max_waiters, count(true)) {
                            refused = Some("waiters");
                        } else if let Some((per_second, burst)) = limits.rate {
                            let rate = CallRate { per_second, burst };
                            let bucket: &mut TokenBucket =
                                bucket.get_or_insert_with(|| TokenBucket::full(rate, now));
                            refused = bucket.take(rate, now).is_err().then_some("rate");
                        }
                        let found = account.begin(is_fetch, &limits, now).err().map(|limit| match limit {
                            ReachedLimit::Calls(_) => "calls",
                            ReachedLimit::Waiters(_) => "waiters",
                            ReachedLimit::Rate { .. } => "rate",
                            ReachedLimit::Leases(_) => "leases",
                        });
                        prop_assert_eq!(found, refused);
                        if found.is_none() {
                            open.push(is_fetch);
                        }
                    }
                    Step::End(which) if !open.is_empty() => {
                        account.end(open.swap_remove(which.index(open.len())));
                    }
                    Step::End(_) => {}
                    Step::Limits(max_calls, max_waiters, rate) => {
                        let rate = rate.map(|rate| (rate, rate));
                        limits = PrincipalLimits { max_calls, max_waiters, rate, max_leases: None };
                    }
                    Step::Wait(milliseconds) => now += Duration::from_millis(milliseconds),
                }
                prop_assert_eq!(account.calls as usize, open.len());
                prop_assert_eq!(account.waiters as usize, open.iter().filter(|one| **one).count());
            }
        }
    }

    #[test]
    fn leases_are_left_up_to_the_limit() {
        let limits = |max_leases| PrincipalLimits { max_leases, ..PrincipalLimits::default() };
        for (most, held, left) in [
            (None, 1_000_000, Ok(u64::MAX)),
            (Some(5), 0, Ok(5)),
            (Some(5), 4, Ok(1)),
            (Some(5), 5, Err(ReachedLimit::Leases(5))),
            (Some(5), 9, Err(ReachedLimit::Leases(5))),
        ] {
            assert_eq!(limits(most).leases_left(|| held), left);
        }
    }
}
