//! The pump against its reference: every step it takes must be one that is due, and when it has
//! nothing more to do nothing may be due any more. The broker is free to do anything: bring too
//! much, end pulls in every way, say nothing, vanish.
//!
//! Time is dense, so that something happens at every edge.

use std::time::{Duration, Instant};

use fetch_proxy::pump::{self, PullOutcome, Pump, Step, WaiterId, Why};
use proptest::prelude::*;
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};

use super::reference::{Allowed, Decided, Message, PullLimits, Reference, Want};

#[derive(Debug, Clone)]
enum Act {
    Pass { ms: u64, late: u64 },
    Join(Want),
    Leave(prop::sample::Index),
    Bring(Vec<(u64, bool)>),
    End { end: PullOutcome, old: bool },
    GiveBack,
    Allow(Allowed),
    PullLimits(PullLimits),
    Up,
    Down,
    Fail,
    Drain,
}

/// The acts need no state to be chosen: whom they concern is found when they are done.
struct Acts;

impl ReferenceStateMachine for Acts {
    type State = ();
    /// And whether the pump is asked right after it, or only when time passes.
    type Transition = (Act, bool);

    fn init_state() -> BoxedStrategy<()> {
        Just(()).boxed()
    }

    fn transitions((): &()) -> BoxedStrategy<(Act, bool)> {
        let pass = prop_oneof![8 => 1..60_u64, 3 => Just(5), 2 => Just(100), 1 => 900..1200_u64];
        let late = prop_oneof![3 => Just(0), 1 => 1..4_u64];
        let size = prop_oneof![Just(1_u64), 599..602_u64, Just(1400), Just(4900), Just(200_000)];
        let size = prop_oneof![2 => Just(650), 1 => size];
        let end = prop_oneof![
            4 => Just(PullOutcome::Done),
            2 => Just(PullOutcome::RequestsPending),
            2 => Just(PullOutcome::TooLarge),
            1 => Just(PullOutcome::Spent),
            1 => Just(PullOutcome::Refused),
        ];
        let act = prop_oneof![
            20 => (pass, late).prop_map(|(ms, late)| Act::Pass { ms, late }),
            10 => want().prop_map(Act::Join),
            2 => any::<prop::sample::Index>().prop_map(Act::Leave),
            10 => prop::collection::vec((size, prop::bool::weighted(0.2)), 1..6)
                .prop_map(Act::Bring),
            6 => (end, prop::bool::weighted(0.1)).prop_map(|(end, old)| Act::End { end, old }),
            1 => Just(Act::GiveBack),
            3 => allowed().prop_map(Act::Allow),
            1 => limits().prop_map(Act::PullLimits),
            2 => Just(Act::Up),
            1 => Just(Act::Down),
            1 => Just(Act::Fail),
            1 => prop::bool::weighted(0.1)
                .prop_map(|drain| if drain { Act::Drain } else { Act::Up }),
        ];
        (act, prop::bool::weighted(0.8)).boxed()
    }

    fn apply((): (), _: &(Act, bool)) {}
}

/// `until` is a duration here.
fn want() -> impl Strategy<Value = Want> {
    let n = prop_oneof![Just(1_u32), 1..8_u32, Just(1000)];
    let bytes = [1_u64, 600, 700, 1199, 1400, 2600, 5000, 100_000, 4 << 20];
    let until = prop_oneof![0..180_u64, 90..110_u64, 140..160_u64, 200..7000_u64];
    let linger = prop_oneof![2 => Just(0), 1 => 1..400_u64];
    let no_wait = prop::bool::weighted(0.3);
    let want = (n, prop::sample::select(bytes.to_vec()), until, linger, no_wait);
    want.prop_map(|(n, max_bytes, until, linger, no_wait)| Want {
        n,
        max_bytes,
        until,
        linger,
        no_wait,
    })
}

fn limits() -> impl Strategy<Value = PullLimits> {
    let expires = prop_oneof![3 => Just(60_000), 1 => 20..300_u64];
    let bytes = prop::option::weighted(0.3, prop::sample::select(vec![1_u64, 3000, 100_000]));
    let linger = prop_oneof![Just(5000), 1..300_u64];
    let limits = (prop_oneof![1..5_u32, Just(500)], expires, bytes, 1..1000_u64, linger);
    limits.prop_map(|(max_batch, max_expires, max_request_bytes, park, linger)| PullLimits {
        max_batch,
        max_expires,
        max_request_bytes,
        park,
        linger,
    })
}

fn allowed() -> impl Strategy<Value = Allowed> {
    let messages = prop_oneof![0..12_u32, Just(1000)];
    let bytes = prop_oneof![3 => 0..4000_u64, 3 => Just(100_000), 2 => Just(u64::MAX)];
    let wait = prop_oneof![Just(500_u64), Just(60_000)];
    (messages, bytes, wait).prop_map(|(messages, bytes, wait)| Allowed { messages, bytes, wait })
}

/// The pump, what it should be like, and those around it.
struct Machine {
    pump: Pump<Message>,
    reference: Reference,
    start: Instant,
    now: u64,
    allowed: Allowed,
    brought: u32,
    /// Messages that have left the pump, by being answered or overdue.
    gone: usize,
    last_answer: Vec<Message>,
}

impl StateMachineTest for Machine {
    type SystemUnderTest = Self;
    type Reference = Acts;

    fn init_test((): &()) -> Self {
        let limits = PullLimits {
            max_batch: 500,
            max_expires: 60_000,
            max_request_bytes: None,
            park: 500,
            linger: 5000,
        };
        let mut machine = Self {
            pump: Pump::new(told(&limits)),
            reference: Reference::new(limits),
            start: Instant::now(),
            now: 0,
            allowed: Allowed { messages: 1000, bytes: u64::MAX, wait: 60_000 },
            brought: 0,
            gone: 0,
            last_answer: Vec::new(),
        };
        machine.act(Act::Up);
        machine
    }

    fn apply(mut machine: Self, (): &(), (act, settle): (Act, bool)) -> Self {
        machine.act(act);
        if settle {
            machine.settle();
        }
        machine
    }
}

impl Machine {
    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    fn act(&mut self, act: Act) {
        let (ms, now) = (self.now, self.at(self.now));
        match act {
            Act::Pass { ms, late } => self.pass(ms, late),
            Act::Join(want) => self.join(Want { until: ms + want.until, ..want }),
            Act::Leave(index) => {
                if !self.reference.waiters.is_empty() {
                    let id = index.get(&self.reference.waiters).id;
                    self.pump.leave(id, now);
                    self.reference.leave(id, ms);
                }
            }
            Act::Bring(messages) => messages.into_iter().for_each(|message| self.bring(message)),
            Act::End { end, old } => {
                if let Some(pull) = &self.reference.pull {
                    let no = if old { pull.no - 1 } else { pull.no };
                    self.pump.ended(no, end, now);
                    self.reference.ended(no, end, ms);
                }
            }
            Act::GiveBack => {
                let messages = std::mem::take(&mut self.last_answer);
                self.gone -= messages.len();
                let sized =
                    |message: Message| (message.clone(), message.size, message.last_attempt);
                self.pump.unhanded(messages.iter().cloned().map(sized).collect(), now);
                self.reference.back(messages, ms);
            }
            Act::Allow(allowed) => self.allowed = allowed,
            Act::PullLimits(limits) => {
                self.pump.set_limits(told(&limits));
                self.reference.limits = limits;
            }
            Act::Up => {
                self.pump.up(now);
                self.reference.up = true;
                self.reference.no_pull();
            }
            Act::Down => {
                self.pump.down(now);
                self.reference.up = false;
                self.reference.no_pull();
            }
            Act::Fail => assert_eq!(self.pump.fail(now), self.reference.fail(ms)),
            Act::Drain => {
                self.pump.drain(now);
                self.reference.draining = true;
            }
        }
    }

    fn join(&mut self, want: Want) {
        let told = pump::Want {
            n: want.n,
            max_bytes: want.max_bytes,
            until: self.at(want.until),
            linger: Duration::from_millis(want.linger),
            no_wait: want.no_wait,
        };
        let id = self.pump.join(told, self.at(self.now));
        self.reference.join(id, want, self.now);
    }

    fn bring(&mut self, (size, last_attempt): (u64, bool)) {
        self.brought += 1;
        let message = Message { id: self.brought, size, last_attempt };
        self.pump.arrived(message.clone(), size, last_attempt, self.at(self.now));
        self.reference.arrived(message, self.now);
    }

    /// Time passes. The pump is asked when it wants to be, or a little later.
    fn pass(&mut self, ms: u64, late: u64) {
        let end = self.now + ms;
        self.settle();
        while let Some(next) = self.pump.next_deadline(self.at(self.now)) {
            let next = u64::try_from((next - self.start).as_millis()).expect("it is near") + late;
            if next > end {
                break;
            }
            self.now = next;
            self.settle();
        }
        self.now = end;
        self.settle();
    }

    /// Does what the pump says, until it has nothing more to say.
    fn settle(&mut self) {
        let now = self.now;
        self.reference.settle(now);
        for _ in 0..1000 {
            match self.pump.step(self.at(now), told_allowed(self.allowed)) {
                Some(Step::Pull { no, batch, expires, no_wait, max_bytes }) => {
                    assert!(self.nothing_is_due(), "available messages go first");
                    let wants = self.reference.wants_to_pull(now, false);
                    assert!(!self.allowed.nothing() && wants);
                    let due = self.reference.issue(now, self.allowed);
                    assert_eq!((no, batch, no_wait), (due.no, due.batch, due.no_wait));
                    assert_eq!(expires, Duration::from_millis(due.expires));
                    assert_eq!(max_bytes, due.max_bytes);
                }
                Some(Step::Answer { waiter, messages, too_large, why }) => {
                    self.answered(waiter, messages, too_large, why);
                }
                Some(Step::Overdue { message }) => {
                    // If several are overdue, any of them may be the first.
                    let same = |(parked, until): &(Message, u64)| {
                        *parked == message && *until <= now && !message.last_attempt
                    };
                    let at = self.reference.parked.iter().position(same);
                    self.reference.parked.remove(at.expect("it is not overdue"));
                    self.gone += 1;
                }
                None => return self.check(),
            }
        }
        panic!("the pump does not come to an end");
    }

    fn answered(
        &mut self,
        id: WaiterId,
        messages: Vec<Message>,
        too_large: Option<Message>,
        why: Why,
    ) {
        self.gone += messages.len() + usize::from(too_large.is_some());
        self.last_answer = messages.iter().chain(&too_large).cloned().collect();
        if let Some(decided) = self.reference.decided.pop_front() {
            assert_eq!(Decided { id, messages, too_large }, decided);
            assert_eq!(why, Why::Filled);
            return;
        }
        let waiter = self.reference.waiters.iter().find(|waiter| waiter.id == id);
        let reasons = self.reference.reasons(waiter.expect("no such waiter"), self.now);
        assert!(reasons.contains(&why), "{why:?} is not among {reasons:?}");
        assert_eq!((self.reference.take(id), None), (messages, too_large));
    }

    fn nothing_is_due(&self) -> bool {
        let due = |waiter| !self.reference.reasons(waiter, self.now).is_empty();
        self.reference.decided.is_empty()
            && !self.reference.waiters.iter().any(due)
            && !self.reference.any_overdue(self.now)
    }

    fn check(&self) {
        let (now, reference) = (self.now, &self.reference);
        assert!(self.nothing_is_due(), "{reference:?} at {now}");
        let wanting = reference.wants_to_pull(now, true);
        assert!(!wanting || self.allowed.nothing(), "{reference:?} at {now}");
        assert!(!self.pump.starved() || self.allowed.nothing());
        assert!(self.pump.starved() || !wanting);

        let next = self.pump.next_deadline(self.at(now));
        assert!(next.is_none_or(|next| next > self.at(now)), "it would spin");
        if let Some(due) = reference.next_deadline(now, self.pump.starved()) {
            assert!(next.is_some_and(|next| next <= self.at(due)), "{next:?}, {reference:?}");
        }

        assert_eq!(self.pump.waiters(), reference.waiters.len());
        assert_eq!(self.pump.parked(), reference.parked.len());
        let idle = reference.waiters.is_empty() && reference.parked.is_empty();
        assert_eq!(self.pump.is_idle(), idle && reference.pull.is_none());
        let held = reference.held();
        assert_eq!(self.brought as usize, self.gone + reference.parked.len() + held);
    }
}

fn told_allowed(Allowed { messages, bytes, wait }: Allowed) -> pump::Allowance {
    pump::Allowance { messages, bytes, wait: Duration::from_millis(wait) }
}

fn told(limits: &PullLimits) -> pump::PullLimits {
    pump::PullLimits {
        max_batch: limits.max_batch,
        max_expires: Duration::from_millis(limits.max_expires),
        max_request_bytes: limits.max_request_bytes,
        park: Duration::from_millis(limits.park),
        linger: Duration::from_millis(limits.linger),
    }
}

prop_state_machine! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    #[test]
    fn every_step_is_due_and_none_is_left_out(sequential 1..120 => Machine);
}
