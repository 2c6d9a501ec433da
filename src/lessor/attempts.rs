//! Attempts: the names that callers give to their Fetch calls, and what each of them has leased. A repeated call
//! finds its messages by its name. Pure: it knows no lease table, and the caller passes the time in.
//!
//! ```text
//!             begin                 lend                       settled
//!  unknown ───────────▶ WAITING ───────────▶ LENT: these leases ───────▶ LENT, and arrived
//!   ▲                    │ ▲  │                │ ▲ │  └ begin: again           └ begin: over
//!   └───── forget ───────┘ └──┘ begin: the     │ └─┘
//!   ▲                           older call     │ give_back
//!   └── forget, if one call has it             ▼                               begin: over
//!                              LENT, and arrived ◀─ give_back ─ LENT
//!                                           OVER ◀─ give_back ─ any other state
//! ```
//! 1. While an attempt is remembered, it has at most one set of leases.
//! 2. Of the calls of an attempt that wait, the latest has its place. The older one is told. But the first call never
//!    takes the place of its repeat: it came late, on a connection that the caller has given up.
//! 3. An attempt that was given back, or whose answer has arrived, is over for every later call. It keeps its leases,
//!    so that a give-back that has not come to its end can be repeated.
//! 4. The leases and the attempts that are remembered are bounded. The oldest attempt is forgotten first, but never
//!    one whose call waits.
//! 5. An attempt is forgotten a window after its first answer.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use crate::lease::LeaseId;

/// A digest of the principal, the consumer and the name of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AttemptKey(pub [u8; 16]);

/// One call of an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct CallNo(u64);

/// How much is remembered, and for how long.
#[derive(Debug, Clone, Copy)]
pub(super) struct AttemptLimits {
    /// Attempts that have an answer or are over.
    pub(super) attempts: usize,
    /// Leases of all attempts together.
    pub(super) leases: usize,
    /// From the first answer.
    pub(super) window: Duration,
}

/// The attempts of one replica. `C` tells a call that waits that it is over. `E` is the end of the first answer.
#[derive(Debug)]
pub(super) struct Attempts<C, E> {
    limits: AttemptLimits,
    known: BTreeMap<AttemptKey, Attempt<C, E>>,
    /// What is remembered, the oldest first. An entry counts if its call is that of its attempt.
    order: VecDeque<(Instant, AttemptKey, CallNo)>,
    leases: usize,
    calls: u64,
}

#[derive(Debug)]
struct Attempt<C, E> {
    /// The call that made it known.
    call: CallNo,
    state: State<C, E>,
}

#[derive(Debug)]
enum State<C, E> {
    Waiting {
        /// Its latest call, and the way to tell it.
        call: CallNo,
        tell: C,
        /// That call is a repeat.
        again: bool,
    },
    Lent {
        leases: Box<[LeaseId]>,
        /// The end of the answer, while a single call has it.
        first: Option<E>,
        /// A lease was settled or extended.
        arrived: bool,
    },
    Over,
}

/// What another replica is told, whose call repeats an attempt.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum FoundAttempt<C> {
    /// Nothing.
    Unknown,
    /// A call waited, and is over. It has leased nothing.
    Waited(C),
    /// The attempt has these leases.
    Again(Box<[LeaseId]>),
    /// It is over.
    Over,
}

/// What was known of an attempt that is given back.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ReturnedAttempt<C> {
    /// Anything.
    pub(super) known: bool,
    /// The call that waited, which is to be told.
    pub(super) waiting: Option<C>,
    /// The leases, which are to be given back. Some of them may have been before.
    pub(super) leases: Box<[LeaseId]>,
}

/// The answer to a call that begins.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Begun<C> {
    /// The call waits for messages in the place of the attempt. An older call that waited is over.
    Waits(CallNo, Option<C>),
    /// The attempt has these leases.
    Again(Box<[LeaseId]>),
    /// It is over.
    Over,
}

impl<C, E> Attempts<C, E> {
    pub(super) fn new(limits: AttemptLimits) -> Self {
        Self { limits, known: BTreeMap::new(), order: VecDeque::new(), leases: 0, calls: 0 }
    }

    /// A call of this attempt begins; `again`: it is a repeat. `returned` says of the first answer whether it went back
    /// without being written. If not, that answer does not return its messages any more.
    pub(super) fn begin(
        &mut self,
        (key, again): (AttemptKey, bool),
        waiting: C,
        returned: impl FnOnce(&E) -> bool,
        now: Instant,
    ) -> Begun<C> {
        self.expire(now);
        match self.known.get_mut(&key).map(|known| &mut known.state) {
            None => {}
            Some(State::Over) => return Begun::Over,
            Some(State::Lent { arrived: true, .. }) => return Begun::Over,
            Some(State::Lent { leases, first, .. }) => {
                let back = first.take().is_some_and(|end| returned(&end));
                if !back {
                    return Begun::Again(leases.clone());
                }
            }
            Some(State::Waiting { again: true, .. }) if !again => return Begun::Over,
            Some(State::Waiting { call, tell, again: repeats }) => {
                self.calls += 1;
                (*call, *repeats) = (CallNo(self.calls), again);
                return Begun::Waits(*call, Some(std::mem::replace(tell, waiting)));
            }
        }
        self.remove(key);
        let call = self.next_call();
        let state = State::Waiting { call, tell: waiting, again };
        self.known.insert(key, Attempt { call, state });
        Begun::Waits(call, None)
    }

    /// A call of this attempt has come to another replica, which knows nothing of it. `returned` is that of
    /// [`Attempts::begin`]. A call that waits here is over.
    pub(super) fn find(
        &mut self,
        key: AttemptKey,
        returned: impl FnOnce(&E) -> bool,
        now: Instant,
    ) -> FoundAttempt<C> {
        self.expire(now);
        match self.known.get_mut(&key).map(|known| &mut known.state) {
            None => return FoundAttempt::Unknown,
            Some(State::Over | State::Lent { arrived: true, .. }) => return FoundAttempt::Over,
            Some(State::Lent { leases, first, .. }) => {
                let back = first.take().is_some_and(|end| returned(&end));
                if !back {
                    return FoundAttempt::Again(leases.clone());
                }
            }
            Some(State::Waiting { .. }) => {}
        }
        match self.remove(key).map(|known| known.state) {
            Some(State::Waiting { tell, .. }) => FoundAttempt::Waited(tell),
            _ => FoundAttempt::Unknown,
        }
    }

    /// The call gets these leases, of which there is at least one. `false`: it is over, and has no leases.
    pub(super) fn lend(
        &mut self,
        key: AttemptKey,
        call: CallNo,
        leases: Box<[LeaseId]>,
        answer: E,
        now: Instant,
    ) -> bool {
        match self.known.get_mut(&key) {
            Some(known) if matches!(known.state, State::Waiting { call: latest, .. } if latest == call) =>
            {
                self.leases += leases.len();
                known.state = State::Lent { leases, first: Some(answer), arrived: false };
                known.call = call;
            }
            Some(_) | None => return false,
        }
        self.remember(key, call, now);
        true
    }

    /// The call has ended without an answer that anybody may have. Nothing of the attempt is known any more, unless
    /// another call of it is here.
    pub(super) fn forget(&mut self, key: AttemptKey, call: CallNo) {
        let only = self.known.get(&key).is_some_and(|known| match &known.state {
            State::Waiting { call: latest, .. } => *latest == call,
            State::Lent { first, .. } => first.is_some() && known.call == call,
            State::Over => false,
        });
        if only {
            self.remove(key);
        }
    }

    /// A lease of the attempt was settled or extended, or none is left: its answer has arrived.
    pub(super) fn arrived(&mut self, key: AttemptKey) {
        if let Some(Attempt { state: State::Lent { arrived, .. }, .. }) = self.known.get_mut(&key) {
            *arrived = true;
        }
    }

    /// The attempt is over. A repeat returns the same leases. `returned` is that of [`Attempts::begin`].
    pub(super) fn give_back(
        &mut self,
        key: AttemptKey,
        returned: impl FnOnce(&E) -> bool,
        now: Instant,
    ) -> ReturnedAttempt<C> {
        self.expire(now);
        let before = self.remove(key);
        let known = before.is_some();
        let (waiting, leases) = match before.map(|known| known.state) {
            Some(State::Waiting { tell, .. }) => (Some(tell), Box::default()),
            Some(State::Lent { leases, first, .. }) => {
                let back = first.is_some_and(|end| returned(&end));
                (None, if back { Box::default() } else { leases })
            }
            Some(State::Over) | None => (None, Box::default()),
        };
        let state = if leases.is_empty() {
            State::Over
        } else {
            State::Lent { leases: leases.clone(), first: None, arrived: true }
        };
        let call = self.next_call();
        self.leases += leases.len();
        self.known.insert(key, Attempt { call, state });
        self.remember(key, call, now);
        ReturnedAttempt { known, waiting, leases }
    }

    fn next_call(&mut self) -> CallNo {
        self.calls += 1;
        CallNo(self.calls)
    }

    fn remember(&mut self, key: AttemptKey, call: CallNo, now: Instant) {
        self.order.push_back((now, key, call));
        while self.order.len() > self.limits.attempts || self.leases > self.limits.leases {
            let Some((_, key, call)) = self.order.pop_front() else { return };
            self.forget_old(key, call);
        }
    }

    fn expire(&mut self, now: Instant) {
        let window = self.limits.window;
        let old = |(at, ..): &mut (Instant, _, _)| now.saturating_duration_since(*at) >= window;
        while let Some((_, key, call)) = self.order.pop_front_if(old) {
            self.forget_old(key, call);
        }
    }

    fn forget_old(&mut self, key: AttemptKey, call: CallNo) {
        if self.known.get(&key).is_some_and(|known| {
            known.call == call && !matches!(known.state, State::Waiting { .. })
        }) {
            self.remove(key);
        }
    }

    fn remove(&mut self, key: AttemptKey) -> Option<Attempt<C, E>> {
        let known = self.known.remove(&key)?;
        if let State::Lent { leases, .. } = &known.state {
            self.leases -= leases.len();
        }
        Some(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const WINDOW: Duration = Duration::from_secs(300);

    type Tested = Attempts<&'static str, bool>;

    fn attempts(attempts: usize, leases: usize) -> Tested {
        Attempts::new(AttemptLimits { attempts, leases, window: WINDOW })
    }

    fn key(number: u8) -> AttemptKey {
        AttemptKey([number; 16])
    }

    fn leases(ids: impl IntoIterator<Item = u64>) -> Box<[LeaseId]> {
        ids.into_iter().filter_map(LeaseId::new).collect()
    }

    /// The first answer of each test says by itself whether it went back.
    fn begin(
        tested: &mut Tested,
        number: u8,
        name: &'static str,
        now: Instant,
    ) -> Begun<&'static str> {
        tested.begin((key(number), false), name, |end| *end, now)
    }

    fn repeat(tested: &mut Tested, name: &'static str, now: Instant) -> Begun<&'static str> {
        tested.begin((key(1), true), name, |end| *end, now)
    }

    fn waits(begun: Begun<&'static str>) -> (CallNo, Option<&'static str>) {
        let Begun::Waits(call, older) = begun else { panic!("{begun:?}") };
        (call, older)
    }

    fn lend(
        tested: &mut Tested,
        number: u8,
        ids: impl IntoIterator<Item = u64>,
        now: Instant,
    ) -> CallNo {
        let (call, _) = waits(begin(tested, number, "lent", now));
        assert!(tested.lend(key(number), call, leases(ids), false, now));
        call
    }

    fn back(
        tested: &mut Tested,
        number: u8,
        now: Instant,
    ) -> (Option<&'static str>, Box<[LeaseId]>) {
        let ReturnedAttempt { waiting, leases, .. } =
            tested.give_back(key(number), |end| *end, now);
        (waiting, leases)
    }

    #[test]
    fn another_replica_is_told_what_is_known_here() {
        let (mut tested, now) = (attempts(9, 9), clock::now());
        let find = |tested: &mut Tested, number| tested.find(key(number), |end| *end, now);
        assert_eq!(find(&mut tested, 1), FoundAttempt::Unknown);
        let (call, _) = waits(begin(&mut tested, 1, "waiting", now));
        assert_eq!(find(&mut tested, 1), FoundAttempt::Waited("waiting"));
        assert!(!tested.lend(key(1), call, leases([1]), false, now), "it is over");
        let call = lend(&mut tested, 2, [2, 3], now);
        for _ in 0..2 {
            assert_eq!(find(&mut tested, 2), FoundAttempt::Again(leases([2, 3])));
        }
        tested.forget(key(2), call);
        tested.arrived(key(2));
        assert_eq!(find(&mut tested, 2), FoundAttempt::Over);
        // An answer that goes back at this moment.
        let (call, _) = waits(begin(&mut tested, 3, "first", now));
        assert!(tested.lend(key(3), call, leases([4]), true, now));
        assert_eq!(find(&mut tested, 3), FoundAttempt::Unknown);
        assert!(!tested.give_back(key(4), |end| *end, now).known);
        assert!(tested.give_back(key(4), |end| *end, now).known);
    }

    #[test]
    fn repeat_finds_the_leases_until_one_of_them_is_settled() {
        let (mut tested, now) = (attempts(9, 9), clock::now());
        lend(&mut tested, 1, [4, 5], now);
        for _ in 0..3 {
            assert_eq!(begin(&mut tested, 1, "again", now), Begun::Again(leases([4, 5])));
        }
        tested.arrived(key(1));
        assert_eq!(begin(&mut tested, 1, "late", now), Begun::Over);
    }

    #[test]
    fn later_call_takes_the_place_of_one_that_waits() {
        let (mut tested, now) = (attempts(9, 9), clock::now());
        let (first, _) = waits(begin(&mut tested, 1, "first", now));
        let (second, older) = waits(begin(&mut tested, 1, "second", now));
        assert_eq!(older, Some("first"));
        assert!(!tested.lend(key(1), first, leases([1]), false, now), "it is over");
        tested.forget(key(1), first);
        assert!(tested.lend(key(1), second, leases([2]), false, now));
    }

    #[test]
    fn call_without_an_answer_leaves_nothing() {
        let (mut tested, now) = (attempts(9, 9), clock::now());
        let (call, _) = waits(begin(&mut tested, 1, "empty", now));
        tested.forget(key(1), call);
        assert_eq!(waits(begin(&mut tested, 1, "again", now)).1, None);
    }

    #[test]
    fn first_answer_that_went_back_is_forgotten_and_a_later_one_is_not() {
        let (mut tested, now) = (attempts(9, 9), clock::now());
        let call = lend(&mut tested, 1, [1], now);
        tested.forget(key(1), call);
        waits(begin(&mut tested, 1, "anew", now));
        // It goes back at this moment, and is not forgotten yet.
        let (call, _) = waits(begin(&mut tested, 2, "first", now));
        assert!(tested.lend(key(2), call, leases([2]), true, now));
        waits(begin(&mut tested, 2, "anew", now));
        tested.forget(key(2), call);
        assert_eq!(waits(begin(&mut tested, 2, "third", now)).1, Some("anew"));
        // Once a second call has the messages, the end of the first answer says nothing.
        let call = lend(&mut tested, 3, [3], now);
        assert_eq!(begin(&mut tested, 3, "again", now), Begun::Again(leases([3])));
        tested.forget(key(3), call);
        assert_eq!(begin(&mut tested, 3, "again", now), Begun::Again(leases([3])));
    }

    #[test]
    fn give_back_ends_an_attempt_in_every_state() {
        let (mut tested, now) = (attempts(9, 9), clock::now());
        let give_back = |tested: &mut Tested, number| back(tested, number, now);
        assert_eq!(give_back(&mut tested, 1), (None, leases([])), "its call comes later");
        let (call, _) = waits(begin(&mut tested, 2, "waiting", now));
        assert_eq!(give_back(&mut tested, 2), (Some("waiting"), leases([])));
        assert!(!tested.lend(key(2), call, leases([2]), false, now));
        lend(&mut tested, 3, [3, 4], now);
        assert_eq!(give_back(&mut tested, 3), (None, leases([3, 4])));
        lend(&mut tested, 4, [5, 6], now);
        tested.arrived(key(4));
        assert_eq!(give_back(&mut tested, 4), (None, leases([5, 6])), "the rest of it");
        for number in 1..=4 {
            assert_eq!(begin(&mut tested, number, "late", now), Begun::Over);
        }
    }

    /// Its caller may leave, and the replica may be unable to do it.
    #[test]
    fn give_back_that_has_not_come_to_its_end_is_repeated() {
        let (mut tested, now) = (attempts(9, 9), clock::now());
        lend(&mut tested, 1, [1, 2], now);
        for _ in 0..3 {
            assert_eq!(back(&mut tested, 1, now), (None, leases([1, 2])));
            assert_eq!(begin(&mut tested, 1, "late", now), Begun::Over);
        }
        assert_eq!(tested.leases, 2);
    }

    #[test]
    fn oldest_attempt_is_forgotten_first_and_never_a_call_that_waits() {
        let (mut tested, now) = (attempts(3, 10), clock::now());
        waits(begin(&mut tested, 9, "waiting", now));
        for number in 1..=4 {
            lend(&mut tested, number, [number.into()], now);
        }
        waits(begin(&mut tested, 1, "anew", now));
        assert_eq!(begin(&mut tested, 2, "again", now), Begun::Again(leases([2])));
        // Ten leases in all.
        lend(&mut tested, 5, 20..29, now);
        assert_eq!(tested.leases, 10);
        for number in [2, 3] {
            waits(begin(&mut tested, number, "anew", now));
        }
        assert_eq!(begin(&mut tested, 4, "again", now), Begun::Again(leases([4])));
        assert_eq!(waits(begin(&mut tested, 9, "later", now)).1, Some("waiting"));
    }

    #[test]
    fn first_call_that_comes_late_does_not_take_the_place_of_its_repeat() {
        let (mut tested, now) = (attempts(9, 9), clock::now());
        let (call, _) = waits(repeat(&mut tested, "repeat", now));
        assert_eq!(begin(&mut tested, 1, "first", now), Begun::Over);
        assert!(tested.lend(key(1), call, leases([1]), false, now), "the repeat has its place");
        let (mut tested, now) = (attempts(9, 9), clock::now());
        waits(begin(&mut tested, 1, "first", now));
        assert_eq!(waits(repeat(&mut tested, "repeat", now)).1, Some("first"));
        assert_eq!(waits(repeat(&mut tested, "next repeat", now)).1, Some("repeat"));
    }

    #[test]
    fn attempt_is_forgotten_a_window_after_its_first_answer() {
        let (mut tested, now) = (attempts(9, 9), clock::now());
        lend(&mut tested, 1, [1], now);
        let soon = now + WINDOW / 2;
        assert_eq!(begin(&mut tested, 1, "again", soon), Begun::Again(leases([1])));
        waits(begin(&mut tested, 1, "anew", now + WINDOW));
        assert_eq!((tested.leases, tested.order.len()), (0, 0));
    }

    /// Whatever happens, the sums are right and bounded.
    #[test]
    fn sums_are_those_of_the_attempts_that_are_remembered() {
        let (mut tested, start) = (attempts(5, 12), clock::now());
        let mut dice: u64 = 1;
        let mut roll = |sides: u64| {
            dice = dice
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (dice >> 33) % sides
        };
        let mut calls = Vec::new();
        for step in 0..20_000_u64 {
            let (now, key) = (start + Duration::from_secs(step), key(roll(8) as u8));
            match roll(6) {
                0 | 1 => {
                    let called = (key, roll(2) == 0);
                    if let Begun::Waits(call, _) = tested.begin(called, "", |end| *end, now) {
                        calls.push((key, call));
                    }
                }
                2 if !calls.is_empty() => {
                    let (key, call) = calls.swap_remove(roll(calls.len() as u64) as usize);
                    let ids = leases(1..=1 + roll(4));
                    tested.lend(key, call, ids, roll(3) == 0, now);
                }
                3 if !calls.is_empty() => {
                    let (key, call) = calls[roll(calls.len() as u64) as usize];
                    tested.forget(key, call);
                }
                4 => tested.arrived(key),
                5 => drop(tested.give_back(key, |end| *end, now)),
                _ => {}
            }
            let lent = |known: &Attempt<_, _>| match &known.state {
                State::Lent { leases, .. } => leases.len(),
                State::Waiting { .. } | State::Over => 0,
            };
            assert_eq!(tested.leases, tested.known.values().map(lent).sum::<usize>());
            assert!(tested.order.len() <= 5);
            let waiting = |known: &&Attempt<_, _>| matches!(known.state, State::Waiting { .. });
            let remembered = tested.known.len() - tested.known.values().filter(waiting).count();
            assert!(remembered <= 5, "{remembered} are remembered");
        }
    }
}
