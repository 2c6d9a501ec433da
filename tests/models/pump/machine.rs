//! The pump against its reference: every step it takes must be one that is due, and when it has
//! nothing more to do nothing may be due any more. The broker is free to do anything: bring too
//! much, end pulls in every way, say nothing, vanish.
//!
//! Time is dense, so that something happens at every edge.

use std::time::{Duration, Instant};

use fetch_proxy::pump::{self, Credit, FlowId, PullOutcome, Pump, Step, WaiterId, Why};
use proptest::prelude::*;
use proptest_state_machine::{ReferenceStateMachine, StateMachineTest, prop_state_machine};

use super::reference::{Allowed, Decided, Message, PullLimits, Reference, Want};

#[derive(Debug, Clone)]
enum Act {
    Pass {
        ms: u64,
        late: u64,
    },
    Join(Want),
    Leave(prop::sample::Index),
    /// A flow opens, with messages and bytes that it may hold.
    Open((u64, u64)),
    Credit(prop::sample::Index, (u64, u64)),
    /// So many messages of a flow have ended.
    Free(prop::sample::Index, usize),
    /// So many messages of a flow are being settled.
    Settling(prop::sample::Index, u64),
    /// A flow that was delivered messages gives the first of them back.
    Undeliver(prop::sample::Index),
    Stall(prop::sample::Index, bool),
    Close(prop::sample::Index),
    Bring(Vec<(u64, bool)>),
    End {
        end: PullOutcome,
        old: bool,
    },
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
            3 => credit().prop_map(Act::Open),
            2 => (any::<prop::sample::Index>(), credit()).prop_map(|(at, most)| Act::Credit(at, most)),
            8 => (any::<prop::sample::Index>(), 1..6_usize).prop_map(|(at, n)| Act::Free(at, n)),
            4 => (any::<prop::sample::Index>(), 0..4_u64).prop_map(|(at, n)| Act::Settling(at, n)),
            1 => any::<prop::sample::Index>().prop_map(Act::Undeliver),
            2 => (any::<prop::sample::Index>(), any::<bool>())
                .prop_map(|(at, stalled)| Act::Stall(at, stalled)),
            1 => any::<prop::sample::Index>().prop_map(Act::Close),
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

fn credit() -> impl Strategy<Value = (u64, u64)> {
    let messages = prop_oneof![1 => Just(0_u64), 3 => Just(1), 3 => 2..9_u64, 1 => Just(1000)];
    let bytes = prop::sample::select(vec![1_u64, 700, 1400, 5000, 100_000, 4 << 20]);
    (messages, bytes)
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
    let most = || prop_oneof![1..5_u32, Just(500)];
    let limits = ((most(), most()), expires, bytes, 1..1000_u64, linger);
    limits.prop_map(|(most, max_expires, max_request_bytes, park, linger)| PullLimits {
        max_batch: most.0,
        max_unsettled: most.1,
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
    /// Messages that have left the pump: answered, overdue, or freed.
    gone: usize,
    /// Messages that were delivered to flows, which still hold them.
    held: usize,
    last_answer: Vec<Message>,
}

impl StateMachineTest for Machine {
    type SystemUnderTest = Self;
    type Reference = Acts;

    fn init_test((): &()) -> Self {
        let limits = PullLimits {
            max_batch: 500,
            max_unsettled: 500,
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
            held: 0,
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
            Act::Open(most) => {
                let id = self.pump.open_flow(told_credit(most), now);
                self.reference.open(id, most, ms);
            }
            Act::Credit(index, most) => {
                if let Some((at, id)) = self.flow(index) {
                    self.pump.set_credit(id, told_credit(most), now);
                    self.reference.set_credit(at, most, ms);
                }
            }
            Act::Free(index, count) => {
                if let Some((at, id)) = self.flow(index) {
                    let freed = self.reference.free(at, count, ms);
                    self.pump.freed(id, sum(&freed), now);
                    self.let_go(freed.len());
                }
            }
            Act::Settling(index, messages) => {
                if let Some((at, id)) = self.flow(index) {
                    self.pump.settling(id, messages, now);
                    self.reference.settle_some(at, messages, ms);
                }
            }
            Act::Undeliver(index) => {
                if let Some((at, id)) = self.flow(index) {
                    let back = self.reference.free(at, 1, ms);
                    self.held -= back.len();
                    self.pump.freed(id, sum(&back), now);
                    self.give_back(back);
                }
            }
            Act::Stall(index, stalled) => {
                if let Some((at, id)) = self.flow(index) {
                    self.pump.stall_flow(id, stalled, now);
                    self.reference.stall(at, stalled, ms);
                }
            }
            Act::Close(index) => {
                if let Some((at, id)) = self.flow(index) {
                    self.pump.close_flow(id, now);
                    let held = self.reference.close(at, ms);
                    self.let_go(held);
                    // A flow that is not here any more frees nothing.
                    self.pump.freed(id, Credit { messages: 1, bytes: 1 }, now);
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
                self.give_back(messages);
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

    /// A flow that is open.
    fn flow(&self, index: prop::sample::Index) -> Option<(usize, FlowId)> {
        let flows = &self.reference.flows;
        let at = (!flows.is_empty()).then(|| index.index(flows.len()))?;
        Some((at, flows[at].id))
    }

    /// So many messages are with clients whose flows the pump does not know any more.
    fn let_go(&mut self, held: usize) {
        self.held -= held;
        self.gone += held;
    }

    fn give_back(&mut self, messages: Vec<Message>) {
        let sized = |message: Message| (message.clone(), message.size, message.last_attempt);
        let told = messages.iter().cloned().map(sized).collect();
        self.pump.unhanded(told, self.at(self.now));
        self.reference.back(messages, self.now);
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
                Some(Step::Deliver { flow, messages }) => {
                    let flows = &mut self.reference.flows;
                    let found = flows.iter_mut().find(|open| open.id == flow);
                    let handed = std::mem::take(&mut found.expect("it is open").undelivered);
                    assert!(!handed.is_empty(), "a delivery has messages");
                    self.held += handed.len();
                    let sized = handed.into_iter().map(|message| (message.clone(), message.size));
                    assert_eq!(messages, sized.collect::<Vec<_>>());
                }
                Some(Step::Over { flow }) => {
                    assert!(self.reference.draining && self.reference.pull.is_none());
                    let flows = &self.reference.flows;
                    let at = flows.iter().position(|open| open.id == flow);
                    let held = self.reference.close(at.expect("it is open"), now);
                    self.let_go(held);
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
        let over = self.reference.draining && self.reference.pull.is_none();
        let flows = &self.reference.flows;
        self.reference.decided.is_empty()
            && flows.iter().all(|flow| flow.undelivered.is_empty())
            && (flows.is_empty() || !over)
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
        assert_eq!(self.pump.flows(), reference.flows.len());
        let nobody = reference.waiters.is_empty() && reference.flows.is_empty();
        let idle = nobody && reference.parked.is_empty();
        assert_eq!(self.pump.is_idle(), idle && reference.pull.is_none());
        let held = reference.held() + self.held;
        assert_eq!(self.brought as usize, self.gone + reference.parked.len() + held);
        for flow in &reference.flows {
            assert!(flow.holds.len() as u64 <= flow.bound, "{flow:?} holds too much");
        }
        let in_store = reference.parked.front().filter(|_| reference.have_room());
        assert!(in_store.is_none(), "a flow has room for {in_store:?}");
    }
}

fn told_credit((messages, bytes): (u64, u64)) -> Credit {
    Credit { messages, bytes }
}

fn sum(messages: &[Message]) -> Credit {
    let bytes = messages.iter().map(|message| message.size).sum();
    Credit { messages: messages.len() as u64, bytes }
}

fn told_allowed(Allowed { messages, bytes, wait }: Allowed) -> pump::Allowance {
    pump::Allowance { messages, bytes, wait: Duration::from_millis(wait) }
}

fn told(limits: &PullLimits) -> pump::PullLimits {
    pump::PullLimits {
        max_batch: limits.max_batch,
        max_unsettled: limits.max_unsettled,
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
