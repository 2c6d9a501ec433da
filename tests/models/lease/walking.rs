//! Walks over the table, and leases that an operator takes away.

use std::collections::BTreeSet;

use fetch_proxy::lease::{LeaseId, LeaseStage, PublishOutcome, Revoked, SettleKind};
use proptest::prelude::*;

use super::{ACK_BY, OVER, TimedTable};

/// One thing that happens between two steps of a walk.
#[derive(Debug, Clone)]
enum Churn {
    /// A message arrives. It may be one that is leased.
    Arrive(u64),
    /// The lease at this place ends.
    Settle(prop::sample::Index),
    /// The lease at this place is given to another caller.
    Assign(prop::sample::Index),
}

fn churn() -> impl Strategy<Value = Vec<Churn>> {
    let one = prop_oneof![
        3 => (1_u64..40).prop_map(Churn::Arrive),
        2 => any::<prop::sample::Index>().prop_map(Churn::Settle),
        1 => any::<prop::sample::Index>().prop_map(Churn::Assign),
    ];
    prop::collection::vec(one, 0..4)
}

/// The ids of the table's leases, as one unbounded look tells them.
fn all(timed: &TimedTable) -> Vec<LeaseId> {
    let mut ids = Vec::new();
    let end = timed.table.walk(None, usize::MAX, timed.origin, |lease| {
        ids.push(lease.id);
        true
    });
    assert_eq!(end, None);
    ids
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn lease_that_lives_through_a_walk_is_seen_exactly_once(
        first in 0_u64..30,
        limit in 1_usize..8,
        page in 1_usize..5,
        steps in prop::collection::vec(churn(), 1..60),
    ) {
        let mut timed = TimedTable::new();
        for sequence in 1..=first {
            timed.table.grant(timed.terms(sequence, 0), "any");
        }
        let mut living: BTreeSet<LeaseId> = all(&timed).into_iter().collect();
        let (mut seen, mut after, mut steps) = (Vec::new(), None, steps.into_iter());
        loop {
            let (mut looked, mut room) = (0, page);
            after = timed.table.walk(after, limit, timed.origin, |lease| {
                looked += 1;
                seen.push(lease.id);
                room -= 1;
                room > 0
            });
            prop_assert!(looked <= limit.min(page));
            if after.is_none() {
                break;
            }
            for happens in steps.next().unwrap_or_default() {
                let now = all(&timed);
                match happens {
                    Churn::Arrive(sequence) => drop(timed.table.grant(timed.terms(sequence, 0), "any")),
                    Churn::Settle(at) if !now.is_empty() => {
                        timed.settle(now[at.index(now.len())], SettleKind::Ack, PublishOutcome::Confirmed, 1);
                    }
                    Churn::Assign(at) if !now.is_empty() => {
                        timed.table.assign(now[at.index(now.len())], None, timed.origin).unwrap();
                    }
                    Churn::Settle(_) | Churn::Assign(_) => {}
                }
                living.retain(|id| all(&timed).contains(id));
            }
        }
        prop_assert!(seen.is_sorted_by(|one, next| one < next), "each once, in order: {seen:?}");
        prop_assert!(living.iter().all(|id| seen.contains(id)), "{living:?} in {seen:?}");
    }
}

#[test]
fn view_shows_the_state_and_the_end_of_a_lease() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    let shown = |timed: &TimedTable, now| {
        timed.table.view(id, timed.at(now)).map(|lease| (lease.stage, lease.expires))
    };
    assert_eq!(shown(&timed, 1), Some((LeaseStage::Held, Some(timed.at(60_000)))));
    timed.begin(id, SettleKind::Ack, 1).unwrap();
    assert_eq!(shown(&timed, 2), Some((LeaseStage::Settling, Some(timed.at(60_000)))));
    let now = timed.at(3);
    timed.table.finish(id, PublishOutcome::Unconfirmed, now);
    assert_eq!(shown(&timed, 4), Some((LeaseStage::Uncertain, Some(timed.at(ACK_BY)))));
    assert_eq!(shown(&timed, ACK_BY), None, "it is over, also before a sweep");
    let last = timed.last_attempt();
    let lease = timed.table.view(last, timed.at(1)).unwrap();
    assert_eq!((lease.last_attempt, lease.expires), (true, None), "it waits for a caller");
}

#[test]
fn revoked_lease_is_over_for_its_holder() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    let now = timed.at(100);
    assert_eq!(timed.table.revoke(id, false, now), Revoked::Done("one", Some(timed.at(ACK_BY))));
    assert_eq!(timed.begin(id, SettleKind::Ack, 200), Err(OVER));
    assert_eq!(timed.table.revoke(id, true, now), Revoked::Gone);
}

#[test]
fn last_attempt_is_revoked_by_force_alone() {
    let mut timed = TimedTable::new();
    let id = timed.last_attempt();
    let now = timed.at(100);
    assert_eq!(timed.table.revoke(id, false, now), Revoked::LastAttempt);
    assert_eq!(timed.table.revoke(id, true, now), Revoked::Done("last", Some(timed.at(ACK_BY))));
}

#[test]
fn lease_that_is_being_settled_is_not_revoked() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    timed.begin(id, SettleKind::Ack, 1).unwrap();
    let now = timed.at(2);
    assert_eq!(timed.table.revoke(id, true, now), Revoked::Settling);
    timed.table.finish(id, PublishOutcome::Unconfirmed, now);
    assert_eq!(timed.table.revoke(id, true, now), Revoked::Settling, "it may have been settled");
}

#[test]
fn revoked_lease_sends_nothing_when_its_time_is_short() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(ACK_BY);
    let now = timed.at(ACK_BY - 1000);
    assert_eq!(timed.table.revoke(id, false, now), Revoked::Done("one", None));
}
