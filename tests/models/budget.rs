//! The budget that many share, against its promises: after every step at random its sums are right, and
//! nobody waits for what is free. Examples for what each promise is there for.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use fetch_proxy::pump::{ByteRequest, PullBound, PullBudget};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const BOUND: u64 = 16 * MIB;

fn budget() -> PullBudget<u32> {
    PullBudget::new(BOUND, u64::MAX)
}

fn busy(most: u64) -> ByteRequest {
    ByteRequest { most, least: 1024.min(most), idle: false }
}

fn idle() -> ByteRequest {
    ByteRequest { most: 64 << 10, least: 1024, idle: true }
}

#[test]
fn single_consumer_has_nearly_all_and_leaves_something() {
    let mut budget = budget();
    let share = budget.ask(&1, busy(u64::MAX)).unwrap();
    assert!((BOUND * 8 / 10..BOUND).contains(&share), "{share}");
    assert!(budget.ask(&2, idle()).is_some(), "somebody new need not wait");
}

#[test]
fn hungry_consumers_share_equally_in_turn() {
    let mut budget = budget();
    let mut line: VecDeque<u32> = (0..40).collect();
    let mut served: BTreeMap<u32, u64> = BTreeMap::new();
    let mut holders: VecDeque<(u32, u64)> = VecDeque::new();
    for _ in 0..40_000 {
        while let Some(who) = line.pop_front() {
            if let Some(share) = budget.ask(&who, busy(4 * MIB)) {
                holders.push_back((who, share));
            }
        }
        // The first grant ends first, and its owner asks again at once.
        let Some((who, share)) = holders.pop_front() else { panic!("no consumer has anything") };
        budget.arrived(&who, share);
        budget.end(&who);
        *served.entry(who).or_default() += share;
        line.push_back(who);
        line.extend(budget.called());
        budget.check();
    }
    let (least, most) = (served.values().min().unwrap(), served.values().max().unwrap());
    assert_eq!(served.len(), 40);
    assert!(most < &(least * 2), "{served:?}");
}

#[test]
fn thousand_idle_consumers_leave_half_to_busy_ones() {
    let mut budget = budget();
    for who in 0..1000 {
        assert!(budget.ask(&who, idle()).is_some(), "{who}");
    }
    assert!(budget.free() >= BOUND / 2 - MIB, "{} is free", budget.free());
    let share = budget.ask(&1000, busy(4 * MIB)).unwrap();
    assert_eq!(share, 4 * MIB);
}

#[test]
fn message_larger_than_the_budget_comes_alone() {
    let mut budget = budget();
    let whole = ByteRequest { most: 2 * BOUND, least: 2 * BOUND, idle: false };
    budget.ask(&1, idle()).unwrap();
    let share = budget.ask(&2, busy(MIB)).unwrap();
    assert_eq!(budget.ask(&3, whole), None);
    assert_eq!(budget.ask(&4, busy(MIB)), None, "it must be served at some time");
    budget.arrived(&2, share);
    assert!(budget.called().is_empty());
    budget.end(&2);
    assert_eq!(budget.called(), [3]);
    assert_eq!(budget.ask(&3, whole), Some(2 * BOUND));
    budget.end(&3);
    assert_eq!(budget.called(), [4]);
}

#[test]
fn caller_that_leaves_the_line_returns_its_share() {
    let mut budget = budget();
    let all = ByteRequest { most: BOUND, least: BOUND, idle: false };
    budget.ask(&1, all).unwrap();
    for who in [2, 3] {
        assert_eq!(budget.ask(&who, all), None);
    }
    budget.leave(&2);
    budget.end(&1);
    budget.leave(&3);
    assert_eq!((budget.called(), budget.out()), (vec![], 0));
}

#[test]
fn budget_in_doubt_is_not_granted_again() {
    let mut budget = budget();
    let share = budget.ask(&1, busy(BOUND)).unwrap();
    assert_eq!(budget.keep(&1, u64::MAX), share);
    budget.end(&1);
    assert_eq!(budget.out(), share);
    budget.release(&1, share);
    assert_eq!(budget.out(), 0);
}

#[test]
fn one_message_finds_out_whether_a_budget_in_doubt_is_free() {
    let mut budget = budget();
    let keeps = |budget: &mut PullBudget<u32>, who| {
        let kept = budget.keep(&who, u64::MAX);
        budget.end(&who);
        kept
    };
    for who in 1..=2 {
        assert!(budget.ask(&who, busy(BOUND)).is_some());
    }
    let kept: u64 = (1..=2).map(|who| keeps(&mut budget, who)).sum();
    assert!(kept > BOUND * 9 / 10, "{kept}");
    // A consumer that is not in doubt finds nothing out, and leaves the turn to the next.
    let all = ByteRequest { most: BOUND, least: BOUND / 4, idle: false };
    assert_eq!(budget.ask(&3, all), Some(BOUND / 4));
    assert_eq!(budget.ask(&1, busy(BOUND)), None, "there is one probe at a time");
    budget.end(&3);
    assert_eq!((budget.called(), budget.ask(&1, busy(BOUND))), (vec![1], Some(1024)));
    assert_eq!(budget.ask(&2, busy(BOUND)), None);
    // Nothing is heard of this probe either.
    assert_eq!(keeps(&mut budget, 1), 1024);
    assert!(budget.called().is_empty(), "no probe follows");
    budget.release(&1, 1024);
    assert_eq!((budget.called(), budget.ask(&2, busy(BOUND))), (vec![2], Some(1024)));
    budget.check();
}

#[test]
fn consumer_that_keeps_its_share_never_has_everything() {
    let mut budget = PullBudget::new(100_000, 100_000);
    for who in 0..4 {
        while let Some(share) =
            budget.ask(&who, ByteRequest { most: 10_000, least: 1, idle: false })
        {
            budget.keep(&who, share);
            budget.end(&who);
        }
        budget.leave(&who);
        assert!(budget.free() > 0, "nothing is left after {who}");
    }
    assert!(budget.kept_by(&0) >= 89_000, "{} for one alone", budget.kept_by(&0));
}

#[test]
fn share_of_a_few_can_be_all_of_them() {
    let mut budget = PullBudget::new(5, 5);
    let five = ByteRequest { most: 5, least: 1, idle: false };
    assert_eq!(budget.ask(&1, five), Some(5));
}

#[test]
fn cut_under_load_lowers_the_bound_for_a_while() {
    let start = Instant::now();
    let mut bound = PullBound::new(BOUND);
    for most in [4 * MIB, MIB, MIB / 4, 64 << 10, 16 << 10, 16 << 10] {
        let out = bound.at(start);
        let cause = bound.cut(out, start);
        assert_eq!((cause.slow, cause.surely), (out >= 32 << 10, out >= 4 * MIB));
        assert_eq!(bound.at(start), most);
    }
    let later = start + Duration::from_secs(100_000);
    for _ in 0..10 {
        bound.at(later);
    }
    assert_eq!(bound.at(later), 32 << 10, "one step at a time");
    let mut at = later;
    for _ in 0..10 {
        at += Duration::from_secs(2000);
        bound.at(at);
    }
    assert_eq!(bound.at(at), BOUND);
}

#[test]
fn cut_after_many_arrivals_does_not_lower_the_bound() {
    let start = Instant::now();
    let mut bound = PullBound::new(BOUND);
    bound.came(5 * BOUND);
    let cause = bound.cut(BOUND, start);
    assert!(cause.slow && !cause.surely, "it is still named");
    assert_eq!(bound.at(start), BOUND);
}

#[derive(Debug, Clone)]
enum Act {
    ByteRequest(u32, ByteRequest),
    Arrive(u32, u64),
    Keep(u32, u64),
    Release(u32, u64),
    End(u32),
    Leave(u32),
    PullBound(u64),
}

fn act() -> impl Strategy<Value = Act> {
    let who = || 0..6_u32;
    let ask = (1..200_u64, 1..80_u64, any::<bool>());
    let ask =
        ask.prop_map(|(most, least, idle)| ByteRequest { most, least: least.min(most), idle });
    prop_oneof![
        6 => (who(), ask).prop_map(|(who, ask)| Act::ByteRequest(who, ask)),
        3 => (who(), 1..100_u64).prop_map(|(who, count)| Act::Arrive(who, count)),
        1 => (who(), 1..50_u64).prop_map(|(who, count)| Act::Keep(who, count)),
        2 => (who(), 1..100_u64).prop_map(|(who, count)| Act::Release(who, count)),
        4 => who().prop_map(Act::End),
        1 => who().prop_map(Act::Leave),
        1 => (20..200_u64).prop_map(Act::PullBound),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    #[test]
    fn granted_total_matches_all_shares_and_serves_the_line(
        acts in prop::collection::vec(act(), 1..200),
    ) {
        let mut budget = PullBudget::new(100, u64::MAX);
        let mut line: Vec<u32> = Vec::new();
        let mut shares: BTreeMap<u32, u64> = BTreeMap::new();
        let mut kept: BTreeMap<u32, u64> = BTreeMap::new();
        let mut bound = 100;
        for act in acts {
            match act {
                Act::ByteRequest(who, ask) if !shares.contains_key(&who) => {
                    let before = budget.out();
                    match budget.ask(&who, ask) {
                        Some(share) => {
                            let stood = line.contains(&who);
                            prop_assert!(stood || line.is_empty(), "somebody was passed");
                            prop_assert!(stood || share <= ask.most, "more than it wants");
                            prop_assert!(share <= ask.most || before < bound);
                            line.retain(|waiting| *waiting != who);
                            shares.insert(who, share);
                        }
                        None if !line.contains(&who) => line.push(who),
                        None => {}
                    }
                }
                Act::ByteRequest(..) => {}
                Act::Arrive(who, count) => {
                    budget.arrived(&who, count);
                    shares.entry(who).and_modify(|share| *share = share.saturating_sub(count));
                }
                Act::Keep(who, count) => {
                    let had = shares.get(&who).copied().unwrap_or(0);
                    let now = budget.keep(&who, count);
                    prop_assert_eq!(now, had.min(count));
                    shares.entry(who).and_modify(|share| *share -= now);
                    *kept.entry(who).or_default() += now;
                }
                Act::Release(who, count) => {
                    budget.release(&who, count);
                    kept.entry(who).and_modify(|kept| *kept = kept.saturating_sub(count));
                }
                Act::End(who) if shares.remove(&who).is_some() => budget.end(&who),
                Act::End(_) => {}
                Act::Leave(who) => {
                    if !shares.contains_key(&who) {
                        budget.leave(&who);
                        line.retain(|waiting| *waiting != who);
                    }
                }
                Act::PullBound(most) => {
                    bound = most;
                    budget.set_bound(most);
                }
            }
            // The caller that is woken is first in line, and finds its share.
            for called in budget.called() {
                prop_assert_eq!(line.first(), Some(&called));
                line.remove(0);
                let ask = ByteRequest { most: u64::MAX, least: 1, idle: false };
                let share = budget.ask(&called, ask);
                prop_assert!(share.is_some(), "{} was called for nothing", called);
                shares.extend(share.map(|share| (called, share)));
            }
            budget.check();
            let sum = shares.values().sum::<u64>() + kept.values().sum::<u64>();
            prop_assert_eq!(budget.out(), sum);
        }
        for who in shares.into_keys() {
            budget.end(&who);
        }
        for (who, kept) in kept {
            budget.release(&who, kept);
        }
        loop {
            let called = budget.called();
            if called.is_empty() {
                break;
            }
            for who in called {
                budget.end(&who);
                line.retain(|waiting| *waiting != who);
            }
        }
        prop_assert_eq!(line, Vec::<u32>::new(), "with nobody else, each has its turn");
    }
}
