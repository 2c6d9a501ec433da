//! The promises of a quarantine, over all histories of seven events, with equal states merged: breaks with
//! every result of a search, pulls, and time.

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    time::{Duration, Instant},
};

use fetch_proxy::{
    broker::ConnectionKind,
    lessor::quarantine::{Quarantine, QuarantineReason, SearchResult},
    pump::Cause,
};

/// Events of a history.
const EVENTS: usize = 7;
/// The consumer's ack wait, in seconds.
const ACK_WAIT: u64 = 5;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Event {
    /// So many seconds pass.
    Pass(u64),
    Pull,
    /// The connection broke, and everything of this consumer had arrived.
    OtherBroke,
    Broke(Found, Bytes),
}

/// The result of the search after a break.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// A message that was terminated, and was not known.
    New,
    /// A message that was terminated before, too.
    Same,
    /// A message that could not be terminated.
    Stuck,
    Nothing,
    NothingSeen,
    Forbidden,
}

/// The verdict of the bytes that were on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bytes {
    Unknown,
    /// They explain it.
    Explain,
    /// The consumer gets its messages.
    Work,
}

const EVENTS_TO_TRY: &[Event] = &[
    Event::Pass(4),
    Event::Pass(40),
    Event::Pull,
    Event::OtherBroke,
    Event::Broke(Found::New, Bytes::Unknown),
    Event::Broke(Found::Same, Bytes::Explain),
    Event::Broke(Found::Stuck, Bytes::Unknown),
    Event::Broke(Found::Nothing, Bytes::Unknown),
    Event::Broke(Found::Nothing, Bytes::Explain),
    Event::Broke(Found::NothingSeen, Bytes::Unknown),
    Event::Broke(Found::NothingSeen, Bytes::Work),
    Event::Broke(Found::Forbidden, Bytes::Unknown),
    Event::Broke(Found::Forbidden, Bytes::Explain),
];

/// A quarantine, and what is known of its consumer since it was clear.
#[derive(Debug, Clone, Hash)]
struct Case {
    quarantine: Quarantine,
    start: Instant,
    now: u64,
    /// Breaks that are held against the consumer.
    breaks: u8,
    isolated: bool,
    suspensions: u32,
    suspended_until: u64,
    /// From then on an unreadable message can come back after an ack wait.
    calm_since: u64,
    tried_at: Option<u64>,
    messages: u64,
}

impl Case {
    fn at(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Pass(seconds) => self.now += seconds,
            Event::Pull if self.now < self.suspended_until => {}
            Event::Pull => {
                self.quarantine.pulled(Duration::from_secs(ACK_WAIT), self.at(self.now));
                if self.breaks > 0 && self.now >= self.calm_since + ACK_WAIT + 2 {
                    self.tried_at.get_or_insert(self.now);
                }
            }
            Event::OtherBroke => {
                self.quarantine.connection_broke(self.quarantine.connection());
                self.quarantine.cleared();
                self.tried_at = None;
            }
            Event::Broke(found, bytes) => self.broke(found, bytes),
        }
        let survived = self.tried_at.is_some_and(|tried| self.now >= tried + 10);
        assert_eq!(self.quarantine.release(self.at(self.now)), survived, "released");
        if survived {
            *self = Self { now: self.now, ..Self::new(self.start) };
        }
        self.check();
    }

    fn broke(&mut self, found: Found, bytes: Bytes) {
        let (kind, now) = (self.quarantine.connection(), self.at(self.now));
        self.quarantine.connection_broke(kind);
        assert!(self.quarantine.is_suspect());
        self.tried_at = None;
        let known: Vec<u64> = (0..self.messages).collect();
        let result = match found {
            Found::New => SearchResult::Found { terminated: vec![self.messages], needs: None },
            Found::Same => SearchResult::Found { terminated: known, needs: None },
            Found::Stuck => {
                SearchResult::Found { terminated: Vec::new(), needs: Some("ACK".to_owned()) }
            }
            Found::Nothing => SearchResult::Nothing { complete: true },
            Found::NothingSeen => SearchResult::Nothing { complete: false },
            Found::Forbidden => SearchResult::NotAllowed("GET".to_owned()),
        };
        self.messages += u64::from(found == Found::New);
        let (surely, worked) = (bytes == Bytes::Explain, bytes == Bytes::Work);
        let cause = Cause { out: 0, slow: false, surely, worked };
        let cause = (bytes != Bytes::Unknown).then_some(cause);
        let reason = self.quarantine.assess(&result, cause, now);
        assert_eq!(self.quarantine.assess(&result, cause, now), None, "a break is assessed once");

        let own = kind == ConnectionKind::Dedicated;
        let some = matches!(found, Found::New | Found::Same | Found::Stuck);
        if surely && !some {
            assert_eq!(reason, None, "bytes explain it");
            return;
        }
        let stays = matches!(found, Found::Same | Found::Stuck);
        let blind = matches!(found, Found::NothingSeen | Found::Forbidden) && !worked;
        let unreadable = matches!(reason, Some(QuarantineReason::Unreadable { .. }));
        let suspected = matches!(reason, Some(QuarantineReason::Suspected { .. }));
        assert_eq!(unreadable, own && stays, "a message that stays on the own connection");
        assert_eq!(suspected, own && blind, "a suspicion after a break of the own connection");
        let nothing = matches!(found, Found::Nothing | Found::NothingSeen);
        self.isolated |= own || !nothing || self.breaks > 0;
        self.breaks = self.breaks.saturating_add(1).min(2);
        self.calm_since = self.now;
        self.suspended_until = 0;
        if unreadable {
            self.suspended_until = self.now + (30 << self.suspensions.min(5)).min(600);
            self.suspensions += 1;
            self.calm_since = self.suspended_until;
        }
    }

    fn check(&self) {
        let suspended = self.quarantine.suspended(self.at(self.now)).is_some();
        assert_eq!(suspended, self.now < self.suspended_until, "suspended");
        let own = self.quarantine.connection() == ConnectionKind::Dedicated;
        assert_eq!(own, self.isolated, "isolated");
        assert!(!self.quarantine.is_suspect(), "a break waits to be assessed");
        assert_eq!(self.quarantine.terminated().len() as u64, self.messages);
    }

    fn new(start: Instant) -> Self {
        Self {
            quarantine: Quarantine::clear(),
            start,
            now: 0,
            breaks: 0,
            isolated: false,
            suspensions: 0,
            suspended_until: 0,
            calm_since: 0,
            tried_at: None,
            messages: 0,
        }
    }
}

fn walk(case: &Case, left: usize, met: &mut [HashSet<u64>], steps: &mut usize) {
    if left == 0 {
        return;
    }
    let mut hasher = DefaultHasher::new();
    case.hash(&mut hasher);
    if met[left].insert(hasher.finish()) {
        for event in EVENTS_TO_TRY {
            let mut next = case.clone();
            *steps += 1;
            next.happen(*event);
            walk(&next, left - 1, met, steps);
        }
    }
}

#[test]
fn quarantine_keeps_its_promises_in_every_history() {
    let (mut met, mut steps) = (vec![HashSet::new(); EVENTS + 1], 0);
    walk(&Case::new(Instant::now()), EVENTS, &mut met, &mut steps);
    println!("{steps} steps");
    assert!(steps > 1000, "the walk is broken");
}
