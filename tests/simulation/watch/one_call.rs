//! Check: a Fetch that settles first has one result for each settlement. If one of them failed, it has fetched nothing.
//! Pure.

use fetch_proxy::pb;

/// What is wrong with the answer to a Fetch with so many settlements.
pub fn wrong(settlements: usize, answer: &pb::FetchResponse) -> Option<String> {
    let empty = answer.empty_reason();
    let errors = answer.results.iter().filter(|result| result.error.is_some()).count();
    let got = answer.messages.len() + answer.rejected.len();
    if answer.results.len() != settlements || answer.failed as usize != errors {
        let results = answer.results.len();
        return Some(format!("{settlements} settlements, {results} results, {errors} errors"));
    }
    if (errors > 0) != (empty == pb::EmptyReason::Settle) || errors > 0 && got > 0 {
        return Some(format!("{errors} settlements failed, {got} messages, {empty:?}"));
    }
    let failed = empty == pb::EmptyReason::FetchFailed;
    if answer.error.is_some() != failed || failed && (settlements == 0 || got > 0) {
        return Some(format!("{empty:?} with {:?} and {got} messages", answer.error));
    }
    None
}

/// "If a settlement failed, nothing is fetched", and a Fetch that has failed has its reason: neither uses the right to
/// fetch. [`wrong`] holds that such an answer has no messages.
pub fn has_not_fetched(answer: &pb::FetchResponse) -> bool {
    matches!(answer.empty_reason(), pb::EmptyReason::Settle | pb::EmptyReason::FetchFailed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(failed: bool) -> pb::SettleResult {
        pb::SettleResult { error: failed.then(pb::SettleError::default), ..Default::default() }
    }

    fn answer(failed: &[bool], empty: pb::EmptyReason, messages: usize) -> pb::FetchResponse {
        pb::FetchResponse {
            results: failed.iter().copied().map(result).collect(),
            failed: failed.iter().filter(|failed| **failed).count() as u32,
            empty_reason: empty.into(),
            messages: vec![pb::Delivery::default(); messages],
            error: (empty == pb::EmptyReason::FetchFailed).then(pb::FetchError::default),
            ..Default::default()
        }
    }

    #[test]
    fn failed_settlement_means_that_nothing_was_fetched() {
        use pb::EmptyReason::{FetchFailed, NoMessages, Settle, Unspecified};
        for (good, settlements, answer) in [
            (true, 0, answer(&[], Unspecified, 1)),
            (true, 2, answer(&[false, false], Unspecified, 1)),
            (true, 2, answer(&[false, false], NoMessages, 0)),
            (true, 2, answer(&[false, true], Settle, 0)),
            (true, 1, answer(&[false], FetchFailed, 0)),
            (false, 2, answer(&[false], Unspecified, 1)),
            (false, 2, answer(&[false, true], Unspecified, 1)),
            (false, 2, answer(&[false, true], Settle, 1)),
            (false, 2, answer(&[false, true], NoMessages, 0)),
            (false, 2, answer(&[false, false], Settle, 0)),
            (false, 1, answer(&[true], FetchFailed, 0)),
            (false, 1, answer(&[false], FetchFailed, 1)),
            (false, 0, answer(&[], FetchFailed, 0)),
            (false, 1, pb::FetchResponse { failed: 1, ..answer(&[false], Unspecified, 1) }),
            (false, 1, pb::FetchResponse { error: None, ..answer(&[false], FetchFailed, 0) }),
        ] {
            assert_eq!(wrong(settlements, &answer).is_none(), good, "{settlements} {answer:?}");
        }
    }
}
