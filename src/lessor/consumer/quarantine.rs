//! Decides which connection a consumer is on, after a connection broke by a message that it brought.
//!
//! ```text
//!           the search found some,           a message was found, and is still there
//!           or is not allowed
//!   CLEAR ─────────────────────────▶ ISOLATED ──────────────────────────────▶ SUSPENDED
//!     │ it found nothing               ▲   ▲                                      │
//!     ▼                                │   └───────── the suspension ends ────────┘
//!   WATCHED ─────── another break ─────┘
//! ```
//! An isolated consumer has a connection of its own, so that a break hurts nobody else. A suspended consumer is
//! not pulled from. From every state the quarantine returns to CLEAR once the consumer has survived the time
//! in which an unreadable message would have come back.
//!
//! 1. A break is assessed once, after the search for messages that explain it.
//! 2. A consumer is suspended only for a message that was found on its own connection, and is still there.
//! 3. A consumer that makes progress, because messages were terminated, is not suspended.
//! 4. Each suspension is twice as long as the one before: 30 s at first, 10 min at most.
//! 5. Callers hear of a suspicion only after a break of the consumer's own connection. A search that saw
//!    everything and found nothing leaves no suspicion. A cut that bytes explain changes nothing.
//! 6. A consumer that is only suspected is pulled from at once. The message that broke its connection is with
//!    nobody for an ack wait, and good messages can come meanwhile.
//!
//! Pure; `now` is an argument and never goes back.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use crate::{broker::ConnectionKind, pump::Cause};

/// The length of the first suspension, and of the longest one.
const FIRST_SUSPENSION: Duration = Duration::from_secs(30);
const MAX_SUSPENSION: Duration = Duration::from_secs(600);
/// A message is delivered again with a pull that is sent this long after its ack wait,
const REDELIVERY_SLACK: Duration = Duration::from_secs(2);
/// and has arrived this long after the pull. A pull lasts for less, and its deliveries can be on their way for
/// some time.
const RELEASE_AFTER: Duration = Duration::from_secs(10);
/// The number of terminated messages that are remembered.
const MAX_REMEMBERED: usize = 4096;

/// The result of a search for unreadable messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SearchResult {
    /// Some were found.
    Found {
        /// The stream sequences of those that were terminated.
        terminated: Vec<u64>,
        /// The ack subject that our rights do not cover.
        needs: Option<String>,
    },
    /// None was found.
    Nothing {
        /// The search saw every message that may have been on its way.
        complete: bool,
    },
    /// Our rights do not cover this subject.
    NotAllowed(String),
}

/// The reason that callers hear.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum QuarantineReason {
    /// One of the consumer's messages cannot be read.
    Unreadable {
        /// The right that was missing to terminate it.
        needs: Option<String>,
    },
    /// One of the consumer's messages may be unreadable.
    Suspected {
        /// The right that was missing to find out.
        needs: Option<String>,
    },
}

/// See the [module](self).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Quarantine {
    state: QuarantineState,
    /// The kind of connection that broke last, until the break is assessed.
    broken: Option<ConnectionKind>,
    /// When the consumer was first pulled from after that, with an unreadable message due again.
    tried_at: Option<Instant>,
    /// The stream sequences of messages that were terminated since the consumer was clear.
    terminated: BTreeSet<u64>,
    next_suspension: Duration,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum QuarantineState {
    Clear,
    Watched {
        since: Instant,
    },
    Isolated {
        since: Instant,
    },
    /// From `until` on the consumer is isolated.
    Suspended {
        until: Instant,
        needs: Option<String>,
    },
}

impl Quarantine {
    /// A quarantine that holds nothing against its consumer.
    pub fn clear() -> Self {
        Self {
            state: QuarantineState::Clear,
            broken: None,
            tried_at: None,
            terminated: BTreeSet::new(),
            next_suspension: FIRST_SUSPENSION,
        }
    }

    /// A connection broke while it may have been bringing something of this consumer.
    pub fn connection_broke(&mut self, kind: ConnectionKind) {
        (self.broken, self.tried_at) = (Some(kind), None);
    }

    /// A break is to be assessed.
    pub fn is_suspect(&self) -> bool {
        self.broken.is_some()
    }

    /// The connection brought nothing of this consumer when it broke.
    pub fn cleared(&mut self) {
        self.broken = None;
    }

    /// Assesses a break by the result of the search, and by the bytes that were on their way. Returns the
    /// reason that callers hear.
    pub fn assess(
        &mut self,
        result: &SearchResult,
        cause: Option<Cause>,
        now: Instant,
    ) -> Option<QuarantineReason> {
        let kind = self.broken.take()?;
        let found = matches!(result, SearchResult::Found { .. });
        if !found && cause.is_some_and(|cause| cause.surely) {
            return None;
        }
        let works = cause.is_some_and(|cause| cause.worked);
        let suspected = |needs| Some(QuarantineReason::Suspected { needs });
        let reason = match result {
            SearchResult::Found { terminated, .. } if self.remember(terminated) => None,
            SearchResult::Found { needs, .. } => {
                Some(QuarantineReason::Unreadable { needs: needs.clone() })
            }
            SearchResult::Nothing { complete: true } => None,
            SearchResult::Nothing { .. } | SearchResult::NotAllowed(_) if works => None,
            SearchResult::Nothing { .. } => suspected(None),
            SearchResult::NotAllowed(subject) => suspected(Some(subject.clone())),
        };
        let reason = reason.filter(|_| kind == ConnectionKind::Dedicated);
        let nothing = matches!(result, SearchResult::Nothing { .. });
        let first = nothing && self.state == QuarantineState::Clear;
        self.state = match &reason {
            Some(QuarantineReason::Unreadable { needs }) => {
                let until = now + self.next_suspension;
                self.next_suspension = (self.next_suspension * 2).min(MAX_SUSPENSION);
                QuarantineState::Suspended { until, needs: needs.clone() }
            }
            _ if first && kind == ConnectionKind::Shared => QuarantineState::Watched { since: now },
            Some(QuarantineReason::Suspected { .. }) | None => {
                QuarantineState::Isolated { since: now }
            }
        };
        reason
    }

    /// The kind of connection that the consumer's next inbox is on.
    pub fn connection(&self) -> ConnectionKind {
        match self.state {
            QuarantineState::Clear | QuarantineState::Watched { .. } => ConnectionKind::Shared,
            QuarantineState::Isolated { .. } | QuarantineState::Suspended { .. } => {
                ConnectionKind::Dedicated
            }
        }
    }

    /// The reason why the consumer is not pulled from now.
    pub fn suspended(&self, now: Instant) -> Option<QuarantineReason> {
        match &self.state {
            QuarantineState::Suspended { until, needs } if now < *until => {
                Some(QuarantineReason::Unreadable { needs: needs.clone() })
            }
            QuarantineState::Suspended { .. }
            | QuarantineState::Clear
            | QuarantineState::Watched { .. }
            | QuarantineState::Isolated { .. } => None,
        }
    }

    /// The consumer is pulled from. An unsettled delivery of it comes back after `longest_ack_wait` at most.
    pub fn pulled(&mut self, longest_ack_wait: Duration, now: Instant) {
        let since = match self.state {
            QuarantineState::Clear => return,
            QuarantineState::Watched { since } | QuarantineState::Isolated { since } => since,
            QuarantineState::Suspended { until, .. } => until,
        };
        if now >= since + longest_ack_wait + REDELIVERY_SLACK {
            self.tried_at.get_or_insert(now);
        }
    }

    /// Clears the consumer, if it has survived the return of each message that it may have had. Returns
    /// whether it has.
    pub fn release(&mut self, now: Instant) -> bool {
        let survived = self.tried_at.is_some_and(|tried| now >= tried + RELEASE_AFTER);
        if survived {
            *self = Self::clear();
        }
        survived
    }

    /// The stream sequences of messages that were terminated since the consumer was clear.
    pub fn terminated(&self) -> &BTreeSet<u64> {
        &self.terminated
    }

    /// Remembers terminated messages. Returns whether any of them is new.
    fn remember(&mut self, terminated: &[u64]) -> bool {
        let new = terminated.iter().filter(|sequence| self.terminated.insert(**sequence)).count();
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

    fn broke(
        quarantine: &mut Quarantine,
        result: &SearchResult,
        now: Instant,
    ) -> Option<QuarantineReason> {
        quarantine.connection_broke(quarantine.connection());
        quarantine.assess(result, None, now)
    }

    fn stands(quarantine: &Quarantine, now: Instant) -> (ConnectionKind, Option<QuarantineReason>) {
        (quarantine.connection(), quarantine.suspended(now))
    }

    #[test]
    fn unexplained_break_isolates_the_second_time_and_suspends_never() {
        let (mut quarantine, now) = (Quarantine::clear(), clock::now());
        broke(&mut quarantine, &nothing(), now);
        assert_eq!(stands(&quarantine, now), (ConnectionKind::Shared, None));
        for _ in 0..9 {
            broke(&mut quarantine, &nothing(), now);
            assert_eq!(stands(&quarantine, now), (ConnectionKind::Dedicated, None));
        }
    }

    #[test]
    fn cut_that_bytes_explain_changes_nothing() {
        for result in [nothing(), denied(), SearchResult::Nothing { complete: false }] {
            let (mut quarantine, now) = (Quarantine::clear(), clock::now());
            for _ in 0..9 {
                quarantine.connection_broke(quarantine.connection());
                assert_eq!(quarantine.assess(&result, Some(cause(true, false)), now), None);
                assert_eq!(stands(&quarantine, now), (ConnectionKind::Shared, None));
            }
        }
    }

    #[test]
    fn working_consumer_is_isolated_at_most() {
        for result in [denied(), SearchResult::Nothing { complete: false }] {
            let (mut quarantine, now) = (Quarantine::clear(), clock::now());
            for _ in 0..9 {
                quarantine.connection_broke(quarantine.connection());
                assert_eq!(quarantine.assess(&result, Some(cause(false, true)), now), None);
            }
            assert_eq!(quarantine.connection(), ConnectionKind::Dedicated);
        }
    }

    #[test]
    fn found_message_or_missing_right_isolates_at_once() {
        for result in [found(&[7]), found(&[]), denied()] {
            let (mut quarantine, now) = (Quarantine::clear(), clock::now());
            broke(&mut quarantine, &result, now);
            assert_eq!(stands(&quarantine, now), (ConnectionKind::Dedicated, None));
        }
    }

    #[test]
    fn message_that_stays_suspends_for_a_time_that_doubles() {
        let (mut quarantine, mut now) = (Quarantine::clear(), clock::now());
        broke(&mut quarantine, &found(&[]), now);
        let barred = Some(QuarantineReason::Unreadable { needs: None });
        for seconds in [30, 60, 120, 240, 480, 600, 600] {
            assert_eq!(broke(&mut quarantine, &found(&[]), now), barred);
            assert_eq!(quarantine.suspended(now + SECOND * (seconds - 1)), barred);
            now += SECOND * seconds;
            assert_eq!(stands(&quarantine, now), (ConnectionKind::Dedicated, None));
        }
    }

    #[test]
    fn suspicion_is_reported_and_suspends_nobody() {
        let needs = Some("MSG.GET".to_owned());
        let blind = SearchResult::Nothing { complete: false };
        for (result, needs) in [(denied(), needs), (blind, None)] {
            let (mut quarantine, now) = (Quarantine::clear(), clock::now());
            while quarantine.connection() == ConnectionKind::Shared {
                assert_eq!(broke(&mut quarantine, &result, now), None);
            }
            for _ in 0..9 {
                let told = broke(&mut quarantine, &result, now);
                assert_eq!(told, Some(QuarantineReason::Suspected { needs: needs.clone() }));
                assert_eq!(stands(&quarantine, now), (ConnectionKind::Dedicated, None));
            }
        }
    }

    #[test]
    fn terminated_message_is_progress_only_once() {
        let (mut quarantine, now) = (Quarantine::clear(), clock::now());
        for sequence in 1..9 {
            broke(&mut quarantine, &found(&[1, sequence]), now);
            assert_eq!(stands(&quarantine, now), (ConnectionKind::Dedicated, None));
        }
        broke(&mut quarantine, &found(&[1, 2]), now);
        assert!(quarantine.suspended(now).is_some());
    }

    #[test]
    fn survived_redelivery_clears() {
        let (mut quarantine, now) = (Quarantine::clear(), clock::now());
        broke(&mut quarantine, &denied(), now);
        quarantine.pulled(SECOND * 30, now + SECOND * 31);
        assert!(!quarantine.release(now + SECOND * 60), "it was not pulled late enough");
        quarantine.pulled(SECOND * 30, now + SECOND * 60);
        quarantine.pulled(SECOND * 30, now + SECOND * 65);
        assert!(!quarantine.release(now + SECOND * 69));
        assert_eq!(quarantine.connection(), ConnectionKind::Dedicated);
        assert!(quarantine.release(now + SECOND * 70));
        assert_eq!(quarantine.connection(), ConnectionKind::Shared);
    }

    #[test]
    fn another_break_starts_the_time_again() {
        let (mut quarantine, now) = (Quarantine::clear(), clock::now());
        broke(&mut quarantine, &denied(), now);
        quarantine.pulled(SECOND, now + SECOND * 5);
        broke(&mut quarantine, &found(&[1]), now + SECOND * 6);
        assert!(!quarantine.release(now + SECOND * 60));
    }

    #[test]
    fn break_by_another_consumer_changes_nothing() {
        let (mut quarantine, now) = (Quarantine::clear(), clock::now());
        quarantine.connection_broke(ConnectionKind::Shared);
        quarantine.cleared();
        quarantine.assess(&denied(), None, now);
        assert_eq!(quarantine.connection(), ConnectionKind::Shared);
    }
}
