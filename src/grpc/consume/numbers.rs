//! The numbers of a stream: short names for the tokens that it gave out. Pure.
//!
//! 1. A number names its token while its lease lives, and after that until [`MAX_ENDED`] others have ended.
//! 2. A number that is forgotten is never given out again.

use std::collections::{BTreeMap, VecDeque};

use crate::{api_error::ApiError, cluster::settle_result, lessor::Error, pb};

/// The numbers of ended leases that are known, at about 250 bytes each.
const MAX_ENDED: usize = 1024;

/// The numbers of one stream.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    tokens: BTreeMap<u64, Box<str>>,
    ended: VecDeque<u64>,
    /// The last number that was given out.
    last: u64,
}

/// Settlements by their tokens alone.
#[derive(Debug, Default)]
pub(super) struct Named {
    /// Those that have a token.
    pub(super) settlements: Vec<pb::Settlement>,
    /// The results of the others, each with its index among all.
    pub(super) known: Vec<(usize, pb::SettleResult)>,
}

impl Numbers {
    /// Deliveries are sent under these numbers. A message without a token has none.
    pub(super) fn sent<'t>(&mut self, sent: impl Iterator<Item = (u64, &'t str)>) {
        for (number, token) in sent.filter(|(number, _)| *number > 0) {
            self.last = self.last.max(number);
            self.tokens.insert(number, token.into());
        }
    }

    /// The leases of these numbers have ended.
    pub(super) fn ended(&mut self, numbers: impl IntoIterator<Item = u64>) {
        self.ended.extend(numbers);
        while self.ended.len() > MAX_ENDED {
            self.ended.pop_front().map(|number| self.tokens.remove(&number));
        }
    }

    /// Puts the token in the place of each number.
    ///
    /// # Errors
    /// The reason `INVALID_FIELD`: a settlement has both, or neither.
    pub(super) fn named(&self, settlements: Vec<pb::Settlement>) -> Result<Named, ApiError> {
        let mut named = Named::default();
        for (index, mut settlement) in settlements.into_iter().enumerate() {
            let number = std::mem::take(&mut settlement.number);
            if (number == 0) == settlement.token.is_empty() {
                let field = format!("settle.settlements[{index}].number");
                let why = "must be set, or else `token`, and not both".to_owned();
                return Err(ApiError::Field { field, why });
            }
            if number > 0 {
                match self.tokens.get(&number) {
                    Some(token) => settlement.token = token.to_string(),
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
            named.settlements.push(settlement);
        }
        Ok(named)
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

    #[test]
    fn number_stands_for_its_token_until_it_is_forgotten() {
        let mut numbers = Numbers::default();
        let tokens: Vec<String> = (0..=MAX_ENDED + 2).map(|number| number.to_string()).collect();
        numbers.sent((1..).zip(tokens[1..].iter().map(String::as_str)));
        numbers.ended([1, 2]);
        let named = numbers.named(vec![by(2, ""), by(0, "t"), by(9_999_999, "")]).unwrap();
        let asked: Vec<&str> = named.settlements.iter().map(|one| &*one.token).collect();
        assert_eq!((asked, named.settlements[0].number), (vec!["2", "t"], 0));
        assert_eq!(reasons(&named), [(2, Reason::TokenInvalid.name())]);
        numbers.ended(3..=MAX_ENDED as u64 + 2);
        let named = numbers.named(vec![by(1, ""), by(2, ""), by(3, "")]).unwrap();
        assert_eq!(named.settlements.len(), 1);
        let forgotten = Reason::LeaseExpired.name();
        assert_eq!(reasons(&named), [(0, forgotten), (1, forgotten)]);
        let done = pb::SettleResult { outcome: 1, ..Default::default() };
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
}
