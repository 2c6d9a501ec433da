//! The last tokens of one connection that were accepted. A signature takes some ten microseconds to check, and most
//! clients send the same token with each call.

use std::{collections::VecDeque, time::Duration};

use super::{credential::Credential, rights::KnownCaller};

/// Most tokens of one connection. A worker has one, or two while it changes to a new one.
const MAX_BEARERS: usize = 4;

/// Accepted tokens, by the whole value of their header.
#[derive(Debug, Default)]
pub struct BearerCache {
    /// The generation of the rights that accepted them.
    generation: u64,
    /// The one that was accepted first is in front.
    accepted: VecDeque<(Box<[u8]>, KnownCaller)>,
}

impl BearerCache {
    /// The caller that this value gave, by rights of the same generation. `now` is the time since the Unix epoch.
    pub fn find(&mut self, header: &[u8], generation: u64, now: Duration) -> Option<KnownCaller> {
        if self.generation != generation {
            self.accepted.clear();
            return None;
        }
        let (_, caller) = self.accepted.iter().find(|(value, _)| **value == *header)?;
        caller.until.is_some_and(|until| now < until).then(|| caller.clone())
    }

    /// Keeps the caller that this value gave, if it has shown a token.
    pub fn keep(&mut self, header: &[u8], generation: u64, caller: &KnownCaller) {
        if !matches!(caller.credential, Credential::Token(_)) {
            return;
        }
        if self.generation != generation {
            self.accepted.clear();
            self.generation = generation;
        }
        self.accepted.retain(|(value, _)| **value != *header);
        if self.accepted.len() == MAX_BEARERS {
            self.accepted.pop_front();
        }
        self.accepted.push_back((header.into(), caller.clone()));
    }
}
