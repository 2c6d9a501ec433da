//! What is held against a consumer in whose time a connection broke by what it brought. Pure.
//!
//! ```text
//!            found some, or may not look
//!   CLEAR ───────────────────────────────────▶ APART ──again, and nothing new──▶ FENCED
//!     │ nothing found                          ▲   ▲                                │
//!     ▼                                        │   └────────its time is over────────┘
//!   WATCHED ─────────────again─────────────────┘
//! ```
//! and from everywhere back to CLEAR, once the time was survived in which a guilty message would have
//! come back. Apart is a connection of its own: what breaks that one hurts nobody else. A consumer
//! that is fenced off is not pulled from, for a time that doubles.
//!
//! 1. A break is weighed once, after it was looked for messages that explain it.
//! 2. Whoever makes progress, by messages that were terminated, is never fenced off.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use crate::{broker::Place, lessor::error::Unsuitable};

/// How long a consumer is fenced off, at first and at most.
const FENCE: Duration = Duration::from_secs(30);
const LONGEST_FENCE: Duration = Duration::from_secs(600);
/// A message is with the next pull this long after its ack wait,
const LATE: Duration = Duration::from_secs(2);
/// and has come with it by then: longer than a pull may take, and what it brings may be under way.
const PROBATION: Duration = Duration::from_secs(10);
/// Terminated messages that are remembered.
const REMEMBERED: usize = 4096;

/// What a look for unreadable messages has led to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Looked {
    /// These were terminated; there may be none.
    Terminated(Vec<u64>),
    /// Our rights do not cover this subject.
    NotAllowed(String),
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Suspicion {
    standing: Standing,
    /// Where the last break was, until it is weighed.
    accused: Option<Place>,
    /// When it was first pulled after the last break with what may have come back.
    tried: Option<Instant>,
    terminated: BTreeSet<u64>,
    fence: Duration,
    /// The right that was missing at the last look.
    needs: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Clear,
    Watched {
        since: Instant,
    },
    /// From `since` on; fenced off before.
    Apart {
        since: Instant,
    },
}

impl Suspicion {
    pub(super) fn none() -> Self {
        Self {
            standing: Standing::Clear,
            accused: None,
            tried: None,
            terminated: BTreeSet::new(),
            fence: FENCE,
            needs: None,
        }
    }

    /// A connection broke while it may have been bringing something of this consumer.
    pub(super) fn accuse(&mut self, place: Place) {
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

    /// Weighs a break by what was found.
    pub(super) fn weigh(&mut self, looked: &Looked, now: Instant) {
        let Some(place) = self.accused.take() else { return };
        let (progress, may_look) = match looked {
            Looked::Terminated(found) => (self.remember(found), true),
            Looked::NotAllowed(subject) => {
                self.needs = Some(subject.clone());
                (false, false)
            }
        };
        if may_look {
            self.needs = None;
        }
        let watched = self.standing != Standing::Clear;
        self.standing = match place {
            Place::Apart if !progress => {
                let since = now + self.fence;
                self.fence = (self.fence * 2).min(LONGEST_FENCE);
                Standing::Apart { since }
            }
            Place::Shared if !progress && may_look && !watched => Standing::Watched { since: now },
            Place::Apart | Place::Shared => Standing::Apart { since: now },
        };
    }

    /// Where its next inbox is to be.
    pub(super) fn place(&self) -> Place {
        match self.standing {
            Standing::Clear | Standing::Watched { .. } => Place::Shared,
            Standing::Apart { .. } => Place::Apart,
        }
    }

    /// Why it is not pulled from now.
    pub(super) fn fenced(&self, now: Instant) -> Option<Unsuitable> {
        let Standing::Apart { since } = self.standing else { return None };
        (now < since).then(|| Unsuitable::Unreadable { needs: self.needs.clone() })
    }

    /// It is pulled from.
    pub(super) fn pulled(&mut self, longest_ack_wait: Duration, now: Instant) {
        let since = match self.standing {
            Standing::Clear => return,
            Standing::Watched { since } | Standing::Apart { since } => since,
        };
        if now >= since + longest_ack_wait + LATE {
            self.tried.get_or_insert(now);
        }
    }

    /// Clears it, if it has survived what may have come back.
    pub(super) fn outlived(&mut self, now: Instant) -> bool {
        let outlived = self.tried.is_some_and(|tried| now >= tried + PROBATION);
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
        while self.terminated.len() > REMEMBERED {
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

    fn nothing() -> Looked {
        Looked::Terminated(Vec::new())
    }

    fn denied() -> Looked {
        Looked::NotAllowed("MSG.GET".to_owned())
    }

    fn broke(suspicion: &mut Suspicion, looked: &Looked, now: Instant) {
        suspicion.accuse(suspicion.place());
        suspicion.weigh(looked, now);
    }

    #[test]
    fn a_break_that_nothing_explains_is_forgiven_once() {
        let (mut suspicion, now) = (Suspicion::none(), clock::now());
        broke(&mut suspicion, &nothing(), now);
        assert_eq!(suspicion.place(), Place::Shared);
        broke(&mut suspicion, &nothing(), now);
        assert_eq!(suspicion.place(), Place::Apart);
        assert_eq!(suspicion.fenced(now), None);
    }

    #[test]
    fn the_guilty_and_those_that_may_not_be_looked_at_are_set_apart_at_once() {
        for looked in [Looked::Terminated(vec![7]), denied()] {
            let (mut suspicion, now) = (Suspicion::none(), clock::now());
            broke(&mut suspicion, &looked, now);
            assert_eq!((suspicion.place(), suspicion.fenced(now)), (Place::Apart, None));
        }
    }

    #[test]
    fn whoever_breaks_its_own_connection_is_fenced_off_for_a_time_that_doubles() {
        let (mut suspicion, mut now) = (Suspicion::none(), clock::now());
        broke(&mut suspicion, &denied(), now);
        for seconds in [30, 60, 120, 240, 480, 600, 600] {
            broke(&mut suspicion, &denied(), now);
            let needs = Some("MSG.GET".to_owned());
            let last = now + SECOND * (seconds - 1);
            assert_eq!(suspicion.fenced(last), Some(Unsuitable::Unreadable { needs }));
            now += SECOND * seconds;
            assert_eq!((suspicion.place(), suspicion.fenced(now)), (Place::Apart, None));
        }
    }

    #[test]
    fn progress_is_not_fenced_off_and_the_same_message_again_is_no_progress() {
        let (mut suspicion, now) = (Suspicion::none(), clock::now());
        for sequence in 1..9 {
            broke(&mut suspicion, &Looked::Terminated(vec![1, sequence]), now);
            assert_eq!((suspicion.place(), suspicion.fenced(now)), (Place::Apart, None));
        }
        broke(&mut suspicion, &Looked::Terminated(vec![1, 2]), now);
        assert!(suspicion.fenced(now).is_some());
    }

    #[test]
    fn surviving_what_would_have_come_back_clears() {
        let (mut suspicion, now) = (Suspicion::none(), clock::now());
        broke(&mut suspicion, &denied(), now);
        suspicion.pulled(SECOND * 30, now + SECOND * 31);
        assert!(!suspicion.outlived(now + SECOND * 60), "it was not pulled late enough");
        suspicion.pulled(SECOND * 30, now + SECOND * 60);
        suspicion.pulled(SECOND * 30, now + SECOND * 65);
        assert!(!suspicion.outlived(now + SECOND * 69));
        assert_eq!(suspicion.place(), Place::Apart);
        assert!(suspicion.outlived(now + SECOND * 70));
        assert_eq!(suspicion.place(), Place::Shared);
    }

    #[test]
    fn another_break_starts_the_time_anew() {
        let (mut suspicion, now) = (Suspicion::none(), clock::now());
        broke(&mut suspicion, &denied(), now);
        suspicion.pulled(SECOND, now + SECOND * 5);
        broke(&mut suspicion, &Looked::Terminated(vec![1]), now + SECOND * 6);
        assert!(!suspicion.outlived(now + SECOND * 60));
    }

    #[test]
    fn a_break_that_brought_nothing_of_it_changes_nothing() {
        let (mut suspicion, now) = (Suspicion::none(), clock::now());
        suspicion.accuse(Place::Shared);
        suspicion.acquit();
        suspicion.weigh(&denied(), now);
        assert_eq!(suspicion.place(), Place::Shared);
    }
}
