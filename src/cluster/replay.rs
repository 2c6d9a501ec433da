//! The requests that were received last, so that none is answered twice. Pure.

use std::collections::{HashSet, VecDeque};

use crate::token::Nonce;

/// Requests that are remembered. A request that is received twice is so within a moment.
const REMEMBERED_REQUESTS: usize = 8192;

#[derive(Debug, Default)]
pub(super) struct RecentRequests {
    order: VecDeque<Nonce>,
    known: HashSet<Nonce>,
}

impl RecentRequests {
    /// Whether this request was not received before, as far as is remembered.
    pub(super) fn is_new(&mut self, request: Nonce) -> bool {
        if !self.known.insert(request) {
            return false;
        }
        if self.order.len() == REMEMBERED_REQUESTS
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.order.push_back(request);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_new_once_and_the_memory_is_bounded() {
        let (mut recent, mut request) = (RecentRequests::default(), [0; 24]);
        for number in 0..2 * REMEMBERED_REQUESTS as u64 {
            request[..8].copy_from_slice(&number.to_be_bytes());
            assert!(recent.is_new(request));
            assert!(!recent.is_new(request));
        }
        assert_eq!(
            (recent.order.len(), recent.known.len()),
            (REMEMBERED_REQUESTS, REMEMBERED_REQUESTS)
        );
    }
}
