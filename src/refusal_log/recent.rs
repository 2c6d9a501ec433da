//! The last kinds of refusals, for people. Pure: `now` is an argument. Equal refusals share a place, so a client that
//! repeats itself hides no other client.

use std::{collections::VecDeque, time::Instant};

use crate::broker::ConsumerName;

/// Kinds that are kept.
const MOST_KINDS: usize = 20;
/// Most bytes of a principal that are kept.
const MOST_PRINCIPAL: usize = 64;

/// Refusals with the same call, reason, consumer and principal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecentRefusal {
    /// The name of the call.
    pub call: &'static str,
    /// The reason, as in the contract.
    pub reason: &'static str,
    /// The consumer that the call was about, if it is known.
    pub consumer: Option<ConsumerName>,
    /// The principal of the caller, if it has one.
    pub principal: Option<String>,
    /// The number of these refusals since the kind was seen first.
    pub count: u64,
    /// When it was seen last.
    pub last: Instant,
}

/// The kinds that were seen last, the newest at the end.
#[derive(Debug, Default)]
pub(super) struct RecentRefusals(VecDeque<RecentRefusal>);

impl RecentRefusals {
    /// A call was refused.
    pub(super) fn add(
        &mut self,
        (call, reason): (&'static str, &'static str),
        consumer: Option<&ConsumerName>,
        principal: Option<&str>,
        now: Instant,
    ) {
        let principal = principal.map(|name| &name[..name.floor_char_boundary(MOST_PRINCIPAL)]);
        let same = |known: &RecentRefusal| {
            known.reason == reason
                && known.call == call
                && known.consumer.as_ref() == consumer
                && known.principal.as_deref() == principal
        };
        let known = self.0.iter().rposition(same).and_then(|place| self.0.remove(place));
        if self.0.len() == MOST_KINDS {
            self.0.pop_front();
        }
        let new = || RecentRefusal {
            call,
            reason,
            consumer: consumer.cloned(),
            principal: principal.map(str::to_owned),
            count: 0,
            last: now,
        };
        let known = known.unwrap_or_else(new);
        self.0.push_back(RecentRefusal { count: known.count + 1, last: now, ..known });
    }

    /// The kinds, the newest first.
    pub(super) fn list(&self) -> Vec<RecentRefusal> {
        self.0.iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock;

    #[test]
    fn client_that_repeats_itself_hides_no_other_client() {
        let (mut recent, now) = (RecentRefusals::default(), clock::now());
        recent.add(("Fetch", "CONSUMER_NOT_FOUND"), None, Some("orders"), now);
        for _ in 0..1000 {
            recent.add(("Ack", "LEASE_EXPIRED"), None, None, now + Duration::from_secs(1));
        }
        let list = recent.list();
        let seen: Vec<_> = list.iter().map(|kind| (kind.reason, kind.count)).collect();
        assert_eq!(seen, [("LEASE_EXPIRED", 1000), ("CONSUMER_NOT_FOUND", 1)]);
        assert_eq!(list[0].last, now + Duration::from_secs(1));
    }

    #[test]
    fn kind_that_was_not_seen_for_longest_gives_its_place() {
        let (mut recent, now) = (RecentRefusals::default(), clock::now());
        let long = "ä".repeat(100);
        recent.add(("Fetch", "A"), None, Some(&long), now);
        for number in 0..MOST_KINDS {
            recent.add(("Fetch", "B"), None, Some(&number.to_string()), now);
            recent.add(("Fetch", "A"), None, Some(&long), now);
        }
        let list = recent.list();
        assert_eq!((list.len(), list[0].reason), (MOST_KINDS, "A"));
        assert!(list[0].principal.as_ref().is_some_and(|name| name.len() <= MOST_PRINCIPAL));
        let oldest = list.last().and_then(|kind| kind.principal.as_deref());
        assert_eq!(oldest, Some("1"));
    }
}
