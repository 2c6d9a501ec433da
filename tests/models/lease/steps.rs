//! The steps of the table, and how often each happens.

use fetch_proxy::lease::{ConsumerEnd, PublishOutcome, SettleKind};
use proptest::{prelude::*, sample::select};

/// One thing that happens.
#[derive(Debug, Clone)]
pub(super) enum Step {
    Grant(Arrival),
    /// `back` counts from the newest lease; 0 is one that is not granted yet. `late`: the caller
    /// read its clock 10 ms before it got the lock.
    Call {
        back: u64,
        call: Call,
        late: bool,
    },
    Sweep {
        limit: usize,
    },
    EndConsumer {
        name: usize,
        how: ConsumerEnd,
    },
    Retune {
        name: usize,
        ack_waits: [i64; 2],
    },
    Distrust {
        name: usize,
        ago: i64,
    },
    LoseAfter {
        name: usize,
        back: u64,
    },
    /// Time moves to an edge of a lease's clocks, or next to it.
    Reach {
        back: u64,
        edge: Edge,
        offset: i64,
    },
    Tick(i64),
    /// It is noticed that the callers' clock has stood still for so long.
    Slept(i64),
}

/// A question about one lease.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    Assign(Option<i64>),
    /// It is assigned to the caller of a stream.
    AssignKept {
        at_most: i64,
        grace: i64,
    },
    /// The stream of its caller has ended.
    EndKept,
    /// Its caller repeats its call.
    AssignAgain(Option<i64>),
    /// Its caller gives it back.
    Reissue,
    Extend(Option<i64>),
    Reclaim,
    Begin(SettleKind),
    Finish(PublishOutcome),
    GiveBack,
    /// An operator takes it away.
    Revoke {
        forced: bool,
    },
    Progressed {
        ago: i64,
        confirmed: bool,
    },
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Edge {
    Deadline,
    AckBy,
    Progress,
    /// From then on it is too late to give the message back.
    Release,
}

/// A delivery.
#[derive(Debug, Clone)]
pub(super) struct Arrival {
    pub(super) name: usize,
    pub(super) sequence: u64,
    pub(super) last_attempt: bool,
    pub(super) delivery_count: u64,
    /// How long before the present it was received.
    pub(super) ago: i64,
    /// How long before that it was published.
    pub(super) age: i64,
}

fn tens(range: std::ops::Range<i64>) -> impl Strategy<Value = i64> {
    range.prop_map(|tens| tens * 10)
}

fn length() -> impl Strategy<Value = i64> {
    prop_oneof![tens(1..8), tens(8..60), Just(5000)]
}

/// The longest lease: shorter than most lengths, among them, or longer than all.
pub(super) fn longest() -> impl Strategy<Value = i64> {
    select(vec![60, 300, 10_000, 10_000])
}

pub(super) fn ack_waits() -> impl Strategy<Value = [i64; 2]> {
    let ack_wait = || select(vec![80, 240, 400, 1600, 2400, 2400]);
    [ack_wait(), ack_wait()]
}

fn call() -> impl Strategy<Value = Call> {
    use PublishOutcome::{Confirmed, Denied, Unconfirmed, Unsent};
    let kind = select(vec![SettleKind::Ack, SettleKind::Nak, SettleKind::Term]);
    let outcome = select(vec![Confirmed, Unsent, Unsent, Denied, Unconfirmed, Unconfirmed]);
    let progressed = (tens(0..6), prop::bool::weighted(0.8));
    prop_oneof![
        6 => prop::option::of(length()).prop_map(Call::Assign),
        3 => (length(), prop_oneof![Just(0), length()])
            .prop_map(|(at_most, grace)| Call::AssignKept { at_most, grace }),
        2 => Just(Call::EndKept),
        3 => prop::option::of(length()).prop_map(Call::AssignAgain),
        1 => Just(Call::Reissue),
        4 => prop::option::of(length()).prop_map(Call::Extend),
        2 => Just(Call::Reclaim),
        10 => kind.prop_map(Call::Begin),
        9 => outcome.prop_map(Call::Finish),
        2 => Just(Call::GiveBack),
        2 => any::<bool>().prop_map(|forced| Call::Revoke { forced }),
        8 => progressed.prop_map(|(ago, confirmed)| Call::Progressed { ago, confirmed }),
    ]
}

/// Mostly one of the newest.
fn back() -> impl Strategy<Value = u64> {
    prop_oneof![12 => 1..4_u64, 1 => 0..14_u64]
}

fn arrival() -> impl Strategy<Value = Arrival> {
    let age = prop_oneof![Just(0), tens(1..100)];
    (0..2_usize, 0..3_u64, prop::bool::weighted(0.25), 1..4_u64, tens(0..3), age).prop_map(
        |(name, sequence, last_attempt, delivery_count, ago, age)| Arrival {
            name,
            sequence,
            last_attempt,
            delivery_count,
            ago,
            age,
        },
    )
}

pub(super) fn step() -> impl Strategy<Value = Step> {
    let name = || 0..2_usize;
    let ago = prop_oneof![tens(0..4), tens(0..30)];
    let edge = select(vec![Edge::Deadline, Edge::AckBy, Edge::Progress, Edge::Release]);
    prop_oneof![
        8 => arrival().prop_map(Step::Grant),
        36 => (back(), call(), prop::bool::weighted(0.2))
            .prop_map(|(back, call, late)| Step::Call { back, call, late }),
        6 => (1..4_usize).prop_map(|limit| Step::Sweep { limit }),
        1 => (name(), select(vec![ConsumerEnd::Gone, ConsumerEnd::Reset]))
            .prop_map(|(name, how)| Step::EndConsumer { name, how }),
        2 => (name(), ack_waits()).prop_map(|(name, ack_waits)| Step::Retune { name, ack_waits }),
        3 => (name(), ago).prop_map(|(name, ago)| Step::Distrust { name, ago }),
        1 => (name(), 0..4_u64).prop_map(|(name, back)| Step::LoseAfter { name, back }),
        12 => (back(), edge, tens(-1..2))
            .prop_map(|(back, edge, offset)| Step::Reach { back, edge, offset }),
        6 => tens(1..8).prop_map(Step::Tick),
        1 => prop_oneof![tens(1..8), tens(1..60)].prop_map(Step::Slept),
    ]
}
