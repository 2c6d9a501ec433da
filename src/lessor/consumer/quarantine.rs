//! What is held against a consumer in whose time a connection broke by what it brought. Pure.
//!
//! ```text
//!            found some, or may not look             the same again
//!   CLEAR ───────────────────────────────────▶ APART ──────────────────────────────────▶ FENCED
//!     │ nothing found                          ▲   ▲                                       │
//!     ▼                                        │   └──────────── its time is over ─────────┘
//!   WATCHED ─────────────again─────────────────┘
//! ```
//! and from everywhere back to CLEAR, once the time was survived in which a guilty message would have
//! come back. Apart is a connection of its own: a break of that connection hurts nobody else. A consumer that
//! is fenced off is not pulled from, for a time that doubles. One that is only suspected is pulled from at once:
//! what broke its connection is with nobody for an ack wait, and what is good can come meanwhile.
//!
//! 1. A break is weighed once, after it was looked for messages that explain it.
//! 2. Whoever makes progress, by messages that were terminated, is not fenced off.
//! 3. A consumer is fenced off only for a message that was found, and is still there.
//! 4. Those who wait are told of a suspicion only where nothing comes any more. A look that saw everything
//!    and found nothing leaves none, and a cut that bytes explain is held against nobody.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use crate::{broker::ConnectionKind, pump::Cause};

/// How long a consumer is fenced off, at first and at most.
const FIRST_SUSPENSION: Duration = Duration::from_secs(30);
const MAX_SUSPENSION: Duration = Duration::from_secs(600);
/// A message is with the next pull this long after its ack wait,
const REDELIVERY_SLACK: Duration = Duration::from_secs(2);
/// and has come with it by then: longer than a pull may take, and what it brings may be under way.
const RELEASE_AFTER: Duration = Duration::from_secs(10);
/// Terminated messages that are remembered.
const MAX_REMEMBERED: usize = 4096;

/// What a look for unreadable messages has led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum SearchResult {
    /// Some were found.
    Found {
        /// These were terminated.
        terminated: Vec<u64>,
        /// Our rights do not cover this ack subject.
        needs: Option<String>,
    },
    /// None was found.
    Nothing {
        /// All that may have been on its way was looked at.
        complete: bool,
    },
    /// Our rights do not cover this subject.
    NotAllowed(String),
}

/// What those who wait are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Barred {
    /// One of its messages cannot be read. The right that was missing to end it.
    Unreadable { needs: Option<String> },
    /// One of its messages may be like that. The right that was missing to find out.
    Suspected { needs: Option<String> },
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Quarantine {
    standing: Standing,
    /// Where the last break was, until it is weighed.
    accused: Option<ConnectionKind>,
    /// When it was first pulled after the last break with what may have come back.
    tried: Option<Instant>,
    terminated: BTreeSet<u64>,
    fence: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Standing {
    Clear,
    Watched {
        since: Instant,
    },
    /// From `since` on; fenced off before, for want of the right `needs`.
    Apart {
        since: Instant,
        needs: Option<String>,
    },
}

impl Quarantine {
    pub(super) fn none() -> Self {
        Self {
            standing: Standing::Clear,
            accused: None,
            tried: None,
            terminated: BTreeSet::new(),
            fence: FIRST_SUSPENSION,
        }
    }

    /// A connection broke while it may have been bringing something of this consumer.
    pub(super) fn accuse(&mut self, place: ConnectionKind) {
        (self.accused, self.tried) = (Some(place), None);
    }

    /// A break is to be weighed.
    pub(super) fn accused(&self) -> bool {
        self.accused.is_some()
    }

    /// It brought nothing of this consumer.
    pub(super) fn acquit(&mut self) {
        self.accused = None;
    }

    /// Weighs a break by what was found, and by what the bytes of the connection tell. What those who
    /// wait are told.
    pub(super) fn weigh(
        &mut self,
        looked: &SearchResult,
        cause: Option<Cause>,
        now: Instant,
    ) -> Option<Barred> {
        let place = self.accused.take()?;
        let (found, nothing) = (
            matches!(looked, SearchResult::Found { .. }),
            matches!(looked, SearchResult::Nothing { .. }),
        );
        if !found && cause.is_some_and(|cause| cause.surely) {
            return None;
        }
        let works = cause.is_some_and(|cause| cause.worked);
        let barred = match looked {
            SearchResult::Found { terminated, .. } if self.remember(terminated) => None,
            SearchResult::Found { needs, .. } => Some(Barred::Unreadable { needs: needs.clone() }),
            SearchResult::Nothing { complete: true } => None,
            SearchResult::Nothing { .. } | SearchResult::NotAllowed(_) if works => None,
            SearchResult::Nothing { .. } => Some(Barred::Suspected { needs: None }),
            SearchResult::NotAllowed(subject) => {
                Some(Barred::Suspected { needs: Some(subject.clone()) })
            }
        };
        let barred = barred.filter(|_| place == ConnectionKind::Dedicated);
        self.standing = match &barred {
            Some(Barred::Unreadable { needs }) => {
                let since = now + self.fence;
                self.fence = (self.fence * 2).min(MAX_SUSPENSION);
                Standing::Apart { since, needs: needs.clone() }
            }
            _ if place == ConnectionKind::Shared && nothing && self.standing == Standing::Clear => {
                Standing::Watched { since: now }
            }
            Some(Barred::Suspected { .. }) | None => Standing::Apart { since: now, needs: None },
        };
        barred
    }

    /// Where its next inbox is to be.
    pub(super) fn place(&self) -> ConnectionKind {
        match self.standing {
            Standing::Clear | Standing::Watched { .. } => ConnectionKind::Shared,
            Standing::Apart { .. } => ConnectionKind::Dedicated,
        }
    }

    /// Why it is not pulled from now.
    pub(super) fn fenced(&self, now: Instant) -> Option<Barred> {
        let Standing::Apart { since, needs } = &self.standing else { return None };
        (now < *since).then(|| Barred::Unreadable { needs: needs.clone() })
    }

    /// It is pulled from.
    pub(super) fn pulled(&mut self, longest_ack_wait: Duration, now: Instant) {
        let since = match self.standing {
            Standing::Clear => return,
            Standing::Watched { since } | Standing::Apart { since, .. } => since,
        };
        if now >= since + longest_ack_wait + REDELIVERY_SLACK {
            self.tried.get_or_insert(now);
        }
    }

    /// Clears it, if it has survived what may have come back.
    pub(super) fn outlived(&mut self, now: Instant) -> bool {
        let outlived = self.tried.is_some_and(|tried| now >= tried + RELEASE_AFTER);
        if outlived {
            *self = Self::none();
        }
        outlived
    }

    /// Messages that were terminated since it was clear.
    pub(super) fn terminated(&self) -> &BTreeSet<u64> {
        &self.terminated
    }

    /// Whether any of them is new.
    fn remember(&mut self, found: &[u64]) -> bool {
        let new = found.iter().filter(|sequence| self.terminated.insert(**sequence)).count();
        while self.terminated.len() > MAX_REMEMBERED {
            self.terminated.pop_first();
        }
        new > 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const SECOND: Duration = Duration::from_secs(1);

    fn nothing() -> SearchResult {
        SearchResult::Nothing { complete: true }
    }

    fn denied() -> SearchResult {
        SearchResult::NotAllowed("MSG.GET".to_owned())
    }

    fn found(terminated: &[u64]) -> SearchResult {
        SearchResult::Found { terminated: terminated.to_vec(), needs: None }
    }

    fn cause(surely: bool, worked: bool) -> Cause {
        Cause { out: 8 << 20, slow: true, surely, worked }
    }

    fn broke(quarantine: &mut Quarantine, looked: &SearchResult, now: Instant) -> Option<Barred> {
        quarantine.accuse(quarantine.place());
        quarantine.weigh(looked, None, now)
    }

    fn stands(quarantine: &Quarantine, now: Instant) -> (ConnectionKind, Option<Barred>) {
        (quarantine.place(), quarantine.fenced(now))
    }

    #[test]
    fn a_break_that_nothing_explains_is_forgiven_once_and_never_bars() {
        let (mut quarantine, now) = (Quarantine::none(), clock::now());
        broke(&mut quarantine, &nothing(), now);
        assert_eq!(stands(&quarantine, now), (ConnectionKind::Shared, None));
        for _ in 0..9 {
            broke(&mut quarantine, &nothing(), now);
            assert_eq!(stands(&quarantine, now), (ConnectionKind::Dedicated, None));
        }
    }

    #[test]
    fn a_cut_that_bytes_explain_changes_nothing() {
        for looked in [nothing(), denied(), SearchResult::Nothing { complete: false }] {
            let (mut quarantine, now) = (Quarantine::none(), clock::now());
            for _ in 0..9 {
                quarantine.accuse(quarantine.place());
                assert_eq!(quarantine.weigh(&looked, Some(cause(true, false)), now), None);
                assert_eq!(stands(&quarantine, now), (ConnectionKind::Shared, None));
            }
        }
    }

    #[test]
    fn a_consumer_that_gets_its_messages_is_set_apart_at_most() {
        for looked in [denied(), SearchResult::Nothing { complete: false }] {
            let (mut quarantine, now) = (Quarantine::none(), clock::now());
            for _ in 0..9 {
                quarantine.accuse(quarantine.place());
                assert_eq!(quarantine.weigh(&looked, Some(cause(false, true)), now), None);
            }
            assert_eq!(quarantine.place(), ConnectionKind::Dedicated);
        }
    }

    #[test]
    fn the_guilty_and_those_that_may_not_be_looked_at_are_set_apart_at_once() {
        for looked in [found(&[7]), found(&[]), denied()] {
            let (mut quarantine, now) = (Quarantine::none(), clock::now());
            broke(&mut quarantine, &looked, now);
            assert_eq!(stands(&quarantine, now), (ConnectionKind::Dedicated, None));
        }
    }

    #[test]
    fn one_that_was_found_and_is_still_there_fences_off_for_a_time_that_doubles() {
        let (mut quarantine, mut now) = (Quarantine::none(), clock::now());
        broke(&mut quarantine, &found(&[]), now);
        let barred = Some(Barred::Unreadable { needs: None });
        for seconds in [30, 60, 120, 240, 480, 600, 600] {
            assert_eq!(broke(&mut quarantine, &found(&[]), now), barred);
            assert_eq!(quarantine.fenced(now + SECOND * (seconds - 1)), barred);
            now += SECOND * seconds;
            assert_eq!(stands(&quarantine, now), (ConnectionKind::Dedicated, None));
        }
    }

    #[test]
    fn a_suspicion_is_told_and_fences_nobody_off() {
        let needs = Some("MSG.GET".to_owned());
        let blind = SearchResult::Nothing { complete: false };
        for (looked, needs) in [(denied(), needs), (blind, None)] {
            let (mut quarantine, now) = (Quarantine::none(), clock::now());
            while quarantine.place() == ConnectionKind::Shared {
                assert_eq!(broke(&mut quarantine, &looked, now), None);
            }
            for _ in 0..9 {
                let told = broke(&mut quarantine, &looked, now);
                assert_eq!(told, Some(Barred::Suspected { needs: needs.clone() }));
                assert_eq!(stands(&quarantine, now), (ConnectionKind::Dedicated, None));
            }
        }
    }

    #[test]
    fn progress_does_not_fence_off_and_the_same_message_again_is_no_progress() {
        let (mut quarantine, now) = (Quarantine::none(), clock::now());
        for sequence in 1..9 {
            broke(&mut quarantine, &found(&[1, sequence]), now);
            assert_eq!(stands(&quarantine, now), (ConnectionKind::Dedicated, None));
        }
        broke(&mut quarantine, &found(&[1, 2]), now);
        assert!(quarantine.fenced(now).is_some());
    }

    #[test]
    fn surviving_what_would_have_come_back_clears() {
        let (mut quarantine, now) = (Quarantine::none(), clock::now());
        broke(&mut quarantine, &denied(), now);
        quarantine.pulled(SECOND * 30, now + SECOND * 31);
        assert!(!quarantine.outlived(now + SECOND * 60), "it was not pulled late enough");
        quarantine.pulled(SECOND * 30, now + SECOND * 60);
        quarantine.pulled(SECOND * 30, now + SECOND * 65);
        assert!(!quarantine.outlived(now + SECOND * 69));
        assert_eq!(quarantine.place(), ConnectionKind::Dedicated);
        assert!(quarantine.outlived(now + SECOND * 70));
        assert_eq!(quarantine.place(), ConnectionKind::Shared);
    }

    #[test]
    fn another_break_starts_the_time_anew() {
        let (mut quarantine, now) = (Quarantine::none(), clock::now());
        broke(&mut quarantine, &denied(), now);
        quarantine.pulled(SECOND, now + SECOND * 5);
        broke(&mut quarantine, &found(&[1]), now + SECOND * 6);
        assert!(!quarantine.outlived(now + SECOND * 60));
    }

    #[test]
    fn a_break_that_brought_nothing_of_it_changes_nothing() {
        let (mut quarantine, now) = (Quarantine::none(), clock::now());
        quarantine.accuse(ConnectionKind::Shared);
        quarantine.acquit();
        quarantine.weigh(&denied(), None, now);
        assert_eq!(quarantine.place(), ConnectionKind::Shared);
    }
}
