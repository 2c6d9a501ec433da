//! The promises of holding a lease: two clocks, what extends them, and what ends with them.

use std::time::Duration;

use fetch_proxy::lease::{
    Assigned, Due, GivenBack, PublishOutcome, SettleKind, Terms, ack_wait_of, margin,
};

use super::{ACK_BY, Desk, LeaseTable, OVER};

#[test]
fn ack_wait_is_that_of_the_delivery_count() {
    let secs = Duration::from_secs;
    let backoff = [secs(1), secs(2), secs(3)];
    let waits = [1, 2, 3, 4, u64::MAX].map(|count| ack_wait_of(secs(30), &backoff, count));
    assert_eq!(waits, [secs(1), secs(2), secs(3), secs(3), secs(3)]);
    assert_eq!(ack_wait_of(secs(30), &[], 5), secs(30));
}

#[test]
fn margin_is_a_tenth_within_its_bounds() {
    let millis = Duration::from_millis;
    assert_eq!(margin(millis(500)), millis(50));
    assert_eq!(margin(millis(510)), millis(51));
    assert_eq!(margin(millis(20_000)), millis(2000));
    assert_eq!(margin(millis(3_600_000)), millis(2000));
    assert_eq!(margin(millis(30)), millis(30), "no lease ends before it begins");
}

#[test]
fn ids_are_sequential_from_one_and_never_used_again() {
    let mut desk = Desk::new();
    let first = desk.granted();
    desk.settle(first, SettleKind::Ack, PublishOutcome::Confirmed, 1);
    let second = desk.granted();
    assert_eq!((first.get(), second.get()), (1, 2));
}

#[test]
fn unset_lease_ends_a_margin_before_the_ack_wait() {
    let mut desk = Desk::new();
    let id = desk.granted();
    let by = desk.at(ACK_BY);
    let lent = desk.table.assign(id, None, desk.at(500));
    assert_eq!(lent, Ok(Assigned { deadline: by, settle_by: by }));
    assert_eq!(desk.table.next_due(), Some(by));
}

#[test]
fn settle_by_is_the_earlier_of_both_clocks() {
    let mut desk = Desk::new();
    let id = desk.granted();
    let long = desk.table.assign(id, Some(Duration::from_secs(60)), desk.at(500)).unwrap();
    assert_eq!((long.deadline, long.settle_by), (desk.at(60_500), desk.at(ACK_BY)));
    let short = desk.table.assign(id, Some(Duration::from_secs(1)), desk.at(500)).unwrap();
    assert_eq!((short.deadline, short.settle_by), (desk.at(1500), desk.at(1500)));
}

#[test]
fn extend_counts_from_now_and_may_shorten() {
    let mut desk = Desk::new();
    let id = desk.lent(1000);
    assert_eq!(desk.extend(id, 5000, 999), Ok(desk.at(5999)));
    assert_eq!(desk.extend(id, 100, 2000), Ok(desk.at(2100)));
    assert_eq!(desk.extend(id, 5000, 2100), Err(OVER));
}

#[test]
fn extend_without_a_length_repeats_the_granted_length() {
    let mut desk = Desk::new();
    let id = desk.lent(4000);
    desk.extend(id, 60_000, 100).unwrap();
    let again = desk.table.extend(id, None, desk.at(1000));
    assert_eq!(again, Ok(desk.at(5000)), "not as long as it was extended last");
    // Another caller is granted the lease again.
    desk.table.assign(id, None, desk.at(1500)).unwrap();
    let again = desk.table.extend(id, None, desk.at(2000));
    assert_eq!(again, Ok(desk.at(2000 + ACK_BY)), "as long as JetStream waits");
    assert_eq!(desk.sweep(6000), [Due::Progress { id }], "and kept alive for as long");
    let shorter = |_| Duration::from_secs(5);
    desk.table.retune(super::CONSUMER, shorter, None, 100);
    let again = desk.table.extend(id, None, desk.at(2000));
    assert_eq!(again, Err(OVER), "what time has ended stays over");
}

#[test]
fn no_lease_is_longer_than_the_longest() {
    let mut desk = Desk::new();
    let longest = Duration::from_secs(3);
    desk.table = LeaseTable::new(desk.origin, longest, 64);
    let id = desk.granted();
    for length in [None, Some(Duration::MAX), Some(longest)] {
        let lent = desk.table.assign(id, length, desk.at(600)).unwrap();
        assert_eq!((lent.deadline, lent.settle_by), (desk.at(3600), desk.at(3600)));
        for length in [None, Some(Duration::MAX), Some(longest)] {
            assert_eq!(desk.table.extend(id, length, desk.at(600)), Ok(desk.at(3600)));
        }
    }
    assert_eq!(desk.extend(id, 2999, 700), Ok(desk.at(3699)));
    // Nor does it grow with JetStream's patience.
    desk.table.assign(id, None, desk.at(1000)).unwrap();
    desk.table.retune(super::CONSUMER, |_| Duration::from_secs(60), None, 100);
    let lapsed = desk.sweep(4000);
    assert!(matches!(lapsed[..], [Due::Lapsed { release: Some(_), .. }]), "{lapsed:?}");
}

#[test]
fn short_lease_is_released_at_its_deadline() {
    let mut desk = Desk::new();
    let id = desk.lent(1000);
    assert_eq!(desk.table.next_due(), Some(desk.at(1000)));
    assert_eq!(desk.sweep(999), []);
    let release = Some(desk.at(ACK_BY));
    assert_eq!(desk.sweep(1000), [Due::Lapsed { id, payload: "one", release }]);
    assert!(desk.table.is_empty());
}

#[test]
fn lapse_within_the_margin_of_ack_by_sends_nothing() {
    let mut desk = Desk::new();
    let id = desk.lent(ACK_BY - 1000);
    let swept = desk.sweep(ACK_BY - 1000);
    assert_eq!(swept, [Due::Lapsed { id, payload: "one", release: None }]);
}

#[test]
fn lapsed_last_attempt_is_not_released() {
    let mut desk = Desk::new();
    let id = desk.last_attempt();
    desk.table.assign(id, Some(Duration::from_secs(1)), desk.origin).unwrap();
    assert_eq!(desk.sweep(1000), [Due::Lapsed { id, payload: "last", release: None }]);
}

#[test]
fn last_attempt_is_kept_alive_until_taken_and_after_its_return() {
    let mut desk = Desk::new();
    let id = desk.last_attempt();
    assert_eq!(desk.sweep(5000), [Due::Progress { id }]);
    desk.progressed(id, 5000, 5001);
    assert_eq!(desk.ack_by(id), 5000 + u128::from(ACK_BY));
    desk.table.assign(id, Some(Duration::from_secs(2)), desk.at(6000)).unwrap();
    desk.table.keep(id, desk.at(7000));
    assert_eq!(desk.sweep(9999), [], "the caller's lease does not count any more");
    assert_eq!(desk.sweep(10_000), [Due::Progress { id }]);
}

#[test]
fn kept_lease_lasts_as_long_as_a_fresh_one() {
    let mut desk = Desk::new();
    let id = desk.lent(1000);
    desk.table.keep(id, desk.at(999));
    assert_eq!(desk.table.next_due(), Some(desk.at(ACK_BY)));
}

#[test]
fn unassigned_delivery_is_given_back_once() {
    let mut desk = Desk::new();
    let id = desk.granted();
    let back = desk.table.give_back(id, desk.at(100));
    assert_eq!(back, Some(GivenBack { payload: "one", release: Some(desk.at(ACK_BY)) }));
    assert_eq!(desk.table.give_back(id, desk.at(100)), None);
}

#[test]
fn late_or_last_delivery_is_not_released() {
    let mut desk = Desk::new();
    let id = desk.granted();
    let late = desk.table.give_back(id, desk.at(ACK_BY - 1000));
    assert_eq!(late, Some(GivenBack { payload: "one", release: None }));
    let last = desk.last_attempt();
    let last = desk.table.give_back(last, desk.at(ACK_BY - 1000));
    assert_eq!(last, Some(GivenBack { payload: "last", release: None }));
}

#[test]
fn long_lease_is_kept_alive_at_half_time_and_each_eighth() {
    let mut desk = Desk::new();
    let id = desk.lent(60_000);
    let progress = [Due::Progress { id }];
    assert_eq!(desk.sweep(4999), []);
    assert_eq!(desk.sweep(5000), progress);
    assert_eq!(desk.sweep(6249), []);
    assert_eq!(desk.sweep(6250), progress);
    desk.progressed(id, 6250, 6300);
    assert_eq!(desk.table.next_due(), Some(desk.at(6250 + 5000)));
    assert_eq!(desk.ack_by(id), 6250 + u128::from(ACK_BY));
}

#[test]
fn progress_confirmed_at_ack_by_is_too_late() {
    let mut desk = Desk::new();
    let id = desk.lent(60_000);
    desk.progressed(id, ACK_BY - 10, ACK_BY);
    assert_eq!(desk.sweep(ACK_BY), [Due::Lost { id, payload: "one" }]);
}

#[test]
fn extension_past_half_time_is_progressed_at_once() {
    let mut desk = Desk::new();
    let id = desk.granted();
    desk.extend(id, 60_000, 8000).unwrap();
    assert_eq!(desk.sweep(8000), [Due::Progress { id }]);
}

#[test]
fn sweep_does_no_more_than_asked() {
    let mut desk = Desk::new();
    for sequence in 1..=5 {
        desk.table.grant(desk.terms(sequence, 0), "any");
    }
    let now = desk.at(ACK_BY);
    let steps: Vec<usize> = (0..4).map(|_| desk.table.sweep(now, 2).len()).collect();
    assert_eq!(steps, [2, 2, 1, 0]);
}

#[test]
fn huge_times_do_not_overflow() {
    let mut desk = Desk::new();
    let terms = Terms { ack_wait: Duration::MAX, ..desk.terms(1, 0) };
    let id = desk.table.grant(terms, "one").0;
    assert!(desk.table.assign(id, Some(Duration::MAX), desk.at(5)).is_ok());
    desk.progressed(id, 6, 7);
    desk.distrust(8);
    assert!(desk.table.next_due().is_some());
    assert!(desk.begin(id, SettleKind::Ack, 9).is_ok());
}
