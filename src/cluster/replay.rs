//! The questions that were heard last, so that none is answered twice. Pure.

use std::collections::{HashSet, VecDeque};

use super::Nonce;

/// Questions that are remembered: what is heard twice is so within a moment.
const REMEMBERED_REQUESTS: usize = 8192;

#[derive(Debug, Default)]
pub(super) struct Recent {
    order: VecDeque<Nonce>,
    heard: HashSet<Nonce>,
}

impl Recent {
    /// Whether it was not heard before, as far as is remembered.
    pub(super) fn is_new(&mut self, question: Nonce) -> bool {
        if !self.heard.insert(question) {
            return false;
        }
        if self.order.len() == REMEMBERED_REQUESTS
            && let Some(oldest) = self.order.pop_front()
        {
            self.heard.remove(&oldest);
        }
        self.order.push_back(question);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_question_is_new_once_and_what_is_forgotten_takes_no_room() {
        let (mut recent, mut question) = (Recent::default(), [0; 24]);
        for number in 0..2 * REMEMBERED_REQUESTS as u64 {
            question[..8].copy_from_slice(&number.to_be_bytes());
            assert!(recent.is_new(question));
            assert!(!recent.is_new(question));
        }
        assert_eq!(
            (recent.order.len(), recent.heard.len()),
            (REMEMBERED_REQUESTS, REMEMBERED_REQUESTS)
        );
    }
}
