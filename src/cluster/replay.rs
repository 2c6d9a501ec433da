//! The questions that were received last, so that none is answered twice. Pure.

use std::collections::{HashSet, VecDeque};

use crate::token::Nonce;

/// Questions that are remembered. A question that is received twice is so within a moment.
const REMEMBERED_REQUESTS: usize = 8192;

#[derive(Debug, Default)]
pub(super) struct RecentQuestions {
    order: VecDeque<Nonce>,
    known: HashSet<Nonce>,
}

impl RecentQuestions {
    /// Whether this question was not received before, as far as is remembered.
    pub(super) fn is_new(&mut self, question: Nonce) -> bool {
        if !self.known.insert(question) {
            return false;
        }
        if self.order.len() == REMEMBERED_REQUESTS
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        self.order.push_back(question);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_new_once_and_the_memory_is_bounded() {
        let (mut recent, mut question) = (RecentQuestions::default(), [0; 24]);
        for number in 0..2 * REMEMBERED_REQUESTS as u64 {
            question[..8].copy_from_slice(&number.to_be_bytes());
            assert!(recent.is_new(question));
            assert!(!recent.is_new(question));
        }
        assert_eq!(
            (recent.order.len(), recent.known.len()),
            (REMEMBERED_REQUESTS, REMEMBERED_REQUESTS)
        );
    }
}
