//! The numbers of a stream: short names for the leases that it gave out, and how each of them has ended. Pure.
//!
//! ```text
//!  sent ──▶ LIVES ── settled by this stream ──▶ SETTLED ── ended ──▶ OVER     nothing is told
//!             ├── ended, none is under way ───────────────────────▶ OVER     the end is told
//!             └── ended, some are under way ──▶ UNDECIDED ── done ─▶ OVER     nothing is told
//!                                                  └─── all fail ──▶ OVER     the end is told
//! ```
//! 1. A number names its token while its lease lives, and after that until [`MAX_ENDED`] others have ended.
//! 2. A number that is forgotten is never given out again.
//! 3. An end is told at most once, and never for a lease that this stream has settled.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use crate::{
    api_error::ApiError,
    cluster::settle_result,
    lessor::{EndedLease, Error},
    pb::{self, Outcome},
};

/// The numbers of ended leases that are known, at about 350 bytes each.
const MAX_ENDED: usize = 1024;

/// The numbers of one stream.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    sent: BTreeMap<u64, SentLease>,
    by_token: BTreeMap<Arc<str>, u64>,
    over: VecDeque<u64>,
    /// The last number that was given out.
    last: u64,
    /// The consumer is gone, so no lease lives.
    gone: bool,
    /// What is to be told.
    untold: VecDeque<UntoldEnd>,
}

/// A lease that was sent.
#[derive(Debug)]
struct SentLease {
    token: Arc<str>,
    /// Settlements of this stream without a result.
    under_way: u32,
    life: Life,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Lives,
    Settled,
    Undecided(EndedLease),
    Over,
}

/// The end of a lease that this stream has not settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum UntoldEnd {
    /// The table knows how.
    Lease(EndedLease),
    /// Its consumer is gone.
    Gone(u64),
}

/// Settlements by their tokens alone.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// Those that have a token.
    pub(super) settlements: Vec<pb::Settlement>,
    /// The number of each of them. 0: the lease is not of this stream.
    pub(super) numbers: Vec<u64>,
    /// The results of the others, each with its index among all.
    pub(super) known: Vec<(usize, pb::SettleResult)>,
}

impl Numbers {
    /// Deliveries are sent under these numbers. A message without a token has none.
    pub(super) fn sent<'t>(&mut self, sent: impl Iterator<Item = (u64, &'t str)>) {
        for (number, token) in sent.filter(|(number, _)| *number > 0) {
            self.last = self.last.max(number);
            let token: Arc<str> = token.into();
            self.by_token.insert(token.clone(), number);
            self.sent.insert(number, SentLease { token, under_way: 0, life: Life::Lives });
        }
    }

    /// The stream does not have these leases any more.
    pub(super) fn ended(&mut self, leases: impl IntoIterator<Item = EndedLease>) {
        for ended in leases {
            let number = ended.number;
            let Some(sent) = self.sent.get_mut(&number) else { continue };
            match sent.life {
                Life::Lives if sent.under_way > 0 => sent.life = Life::Undecided(ended),
                Life::Lives => self.end(number, Some(UntoldEnd::Lease(ended))),
                Life::Settled => self.end(number, None),
                Life::Undecided(_) | Life::Over => {}
            }
        }
    }

    /// The consumer is gone, and all leases with it.
    pub(super) fn gone(&mut self) {
        if std::mem::replace(&mut self.gone, true) {
            return;
        }
        let idle = self.sent.iter().filter(|(_, sent)| sent.under_way == 0);
        let idle = idle.filter(|(_, sent)| sent.life == Life::Lives);
        for number in Vec::from_iter(idle.map(|(number, _)| *number)) {
            self.end(number, Some(UntoldEnd::Gone(number)));
        }
    }

    /// Settlements of these leases begin.
    pub(super) fn begun(&mut self, numbers: &[u64]) {
        for number in numbers {
            self.sent.get_mut(number).into_iter().for_each(|sent| sent.under_way += 1);
        }
    }

    /// They have their results. `None`: nothing was done, for another reason than a lease has.
    pub(super) fn settled(&mut self, numbers: &[u64], results: Option<&[pb::SettleResult]>) {
        for (at, number) in numbers.iter().enumerate() {
            let result = results.and_then(|results| results.get(at));
            let Some(sent) = self.sent.get_mut(number) else { continue };
            sent.under_way = sent.under_way.saturating_sub(1);
            let done = result.is_some_and(|result| {
                result.error.is_none() && result.outcome() != Outcome::Extended
            });
            let free = sent.under_way == 0;
            match sent.life {
                Life::Lives if done => sent.life = Life::Settled,
                Life::Lives if free && self.gone => {
                    self.end(*number, Some(UntoldEnd::Gone(*number)))
                }
                Life::Undecided(_) if done => self.end(*number, None),
                Life::Undecided(ended) if free => {
                    self.end(*number, Some(UntoldEnd::Lease(ended)));
                }
                Life::Lives | Life::Settled | Life::Undecided(_) | Life::Over => {}
            }
        }
    }

    /// Whether an end is to be told.
    pub(super) fn has_untold(&self) -> bool {
        !self.untold.is_empty()
    }

    /// The next end that is to be told.
    pub(super) fn next_untold(&mut self) -> Option<UntoldEnd> {
        self.untold.pop_front()
    }

    /// Puts the token in the place of each number.
    ///
    /// # Errors
    /// The reason `INVALID_FIELD`: a settlement has both, or neither.
    pub(super) fn named(&self, settlements: Vec<pb::Settlement>) -> Result<Named, ApiError> {
        let mut named = Named::default();
        for (index, mut settlement) in settlements.into_iter().enumerate() {
            let mut number = std::mem::take(&mut settlement.number);
            if (number == 0) == settlement.token.is_empty() {
                let field = format!("settle.settlements[{index}].number");
                let why = "must be set, or else `token`, and not both".to_owned();
                return Err(ApiError::Field { field, why });
            }
            if number == 0 {
                number = self.by_token.get(&*settlement.token).copied().unwrap_or(0);
            } else {
                match self.sent.get(&number) {
                    Some(sent) => settlement.token = sent.token.to_string(),
                    None => {
                        let refused = if number <= self.last {
                            Error::LeaseExpired { forgotten: true }.into()
                        } else {
                            ApiError::TokenInvalid
                        };
                        named.known.push((index, settle_result(Err(refused))));
                        continue;
                    }
                }
            }
            named.numbers.push(number);
            named.settlements.push(settlement);
        }
        Ok(named)
    }

    fn end(&mut self, number: u64, told: Option<UntoldEnd>) {
        self.sent.get_mut(&number).into_iter().for_each(|sent| sent.life = Life::Over);
        self.untold.extend(told);
        self.over.push_back(number);
        if self.over.len() > MAX_ENDED {
            let oldest = self.over.pop_front().and_then(|oldest| self.sent.remove(&oldest));
            oldest.map(|oldest| self.by_token.remove(&oldest.token));
        }
    }
}

/// All results, in the order of the settlements.
pub(super) fn merged(
    mut results: Vec<pb::SettleResult>,
    known: Vec<(usize, pb::SettleResult)>,
) -> Vec<pb::SettleResult> {
    for (index, result) in known {
        results.insert(index.min(results.len()), result);
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reason::Reason;

    fn by(number: u64, token: &str) -> pb::Settlement {
        pb::Settlement { token: token.to_owned(), action: None, number }
    }

    fn reasons(named: &Named) -> Vec<(usize, &str)> {
        let reason = |(index, result): &'_ (usize, pb::SettleResult)| {
            (*index, result.error.clone().unwrap().reason)
        };
        let found: Vec<_> = named.known.iter().map(reason).collect();
        let named = |reason: &str| {
            [Reason::LeaseExpired, Reason::TokenInvalid]
                .into_iter()
                .find(|known| known.name() == reason)
                .unwrap()
                .name()
        };
        found.iter().map(|(index, reason)| (*index, named(reason))).collect()
    }

    fn lease(number: u64) -> EndedLease {
        EndedLease { number, lease: number + 1000 }
    }

    fn over(numbers: &[u64]) -> Vec<EndedLease> {
        numbers.iter().map(|number| lease(*number)).collect()
    }

    /// A stream that has sent three leases, with the tokens `1`, `2` and `3`.
    fn three() -> Numbers {
        let mut numbers = Numbers::default();
        numbers.sent([(1, "1"), (2, "2"), (3, "3"), (0, "")].into_iter());
        numbers
    }

    fn untold(numbers: &mut Numbers) -> Vec<UntoldEnd> {
        std::iter::from_fn(|| numbers.next_untold()).collect()
    }

    fn result(outcome: Outcome) -> pb::SettleResult {
        pb::SettleResult { outcome: outcome.into(), ..Default::default() }
    }

    fn refused(error: ApiError) -> pb::SettleResult {
        settle_result(Err(error))
    }

    #[test]
    fn number_stands_for_its_token_until_it_is_forgotten() {
        let mut numbers = Numbers::default();
        let tokens: Vec<String> = (0..=MAX_ENDED + 2).map(|number| number.to_string()).collect();
        numbers.sent((1..).zip(tokens[1..].iter().map(String::as_str)));
        numbers.ended(over(&[1, 2]));
        let named = numbers.named(vec![by(2, ""), by(0, "t"), by(9_999_999, "")]).unwrap();
        let asked: Vec<&str> = named.settlements.iter().map(|one| &*one.token).collect();
        assert_eq!((asked, named.settlements[0].number), (vec!["2", "t"], 0));
        assert_eq!(named.numbers, [2, 0]);
        assert_eq!(reasons(&named), [(2, Reason::TokenInvalid.name())]);
        numbers.ended(over(&Vec::from_iter(3..=MAX_ENDED as u64 + 2)));
        let named = numbers.named(vec![by(1, ""), by(2, ""), by(3, "")]).unwrap();
        assert_eq!((named.settlements.len(), numbers.by_token.len()), (1, MAX_ENDED));
        let forgotten = Reason::LeaseExpired.name();
        assert_eq!(reasons(&named), [(0, forgotten), (1, forgotten)]);
        let done = result(Outcome::Confirmed);
        let all = merged(vec![done.clone()], named.known);
        assert_eq!(all.iter().position(|result| *result == done), Some(2));
    }

    #[test]
    fn settlement_has_a_number_or_a_token() {
        let numbers = Numbers::default();
        for wrong in [by(0, ""), by(1, "t")] {
            assert!(numbers.named(vec![wrong]).is_err());
        }
    }

    #[test]
    fn end_is_told_unless_this_stream_has_settled_the_lease_before_or_after() {
        let mut numbers = three();
        let named = numbers.named(vec![by(1, ""), by(0, "2")]).unwrap();
        assert_eq!(named.numbers, [1, 2], "a token of the stream is a number, too");
        numbers.begun(&named.numbers);
        numbers.ended(over(&[1, 3]));
        assert_eq!(untold(&mut numbers), [UntoldEnd::Lease(lease(3))]);
        numbers.settled(&[1, 2], Some(&[result(Outcome::Confirmed), result(Outcome::Sent)]));
        numbers.ended(over(&[2, 3]));
        assert_eq!(untold(&mut numbers), []);
    }

    #[test]
    fn end_is_told_once_the_last_settlement_has_failed() {
        let mut numbers = three();
        numbers.begun(&[1, 1, 2]);
        numbers.ended(over(&[1]));
        let expired = || refused(Error::LeaseExpired { forgotten: false }.into());
        numbers.settled(&[1], Some(&[expired()]));
        assert!(!numbers.has_untold(), "another one is under way");
        numbers.settled(&[1], None);
        assert_eq!(untold(&mut numbers), [UntoldEnd::Lease(lease(1))]);
        numbers.settled(&[2], Some(&[result(Outcome::Extended)]));
        numbers.ended(over(&[2]));
        assert_eq!(untold(&mut numbers), [UntoldEnd::Lease(lease(2))], "an Extend settles nothing");
    }

    #[test]
    fn all_leases_of_a_consumer_that_is_gone_are_told() {
        let mut numbers = three();
        numbers.begun(&[1, 2]);
        numbers.settled(&[1], Some(&[result(Outcome::Confirmed)]));
        numbers.gone();
        numbers.gone();
        assert_eq!(untold(&mut numbers), [UntoldEnd::Gone(3)]);
        numbers.settled(&[2], Some(&[refused(Error::ConsumerGone.into())]));
        numbers.ended(over(&[1, 2, 3]));
        assert_eq!(untold(&mut numbers), [UntoldEnd::Gone(2)]);
    }
}
