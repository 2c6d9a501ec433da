//! The promises of holding a lease: two clocks, what extends them, and what ends with them.

use std::time::Duration;

use fetch_proxy::lease::{
    Assigned, Due, GivenBack, PublishOutcome, SettleKind, Terms, ack_wait_of, margin,
};

use super::{ACK_BY, LeaseTable, OVER, TimedTable};

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
    let mut timed = TimedTable::new();
    let first = timed.granted();
    timed.settle(first, SettleKind::Ack, PublishOutcome::Confirmed, 1);
    let second = timed.granted();
    assert_eq!((first.get(), second.get()), (1, 2));
}

#[test]
fn unset_lease_ends_a_margin_before_the_ack_wait() {
    let mut timed = TimedTable::new();
    let id = timed.granted();
    let by = timed.at(ACK_BY);
    let assigned = timed.table.assign(id, None, timed.at(500));
    assert_eq!(assigned, Ok(Assigned { deadline: by, settle_by: by }));
    assert_eq!(timed.table.next_due(), Some(by));
}

#[test]
fn settle_by_is_the_earlier_of_both_clocks() {
    let mut timed = TimedTable::new();
    let id = timed.granted();
    let long = timed.table.assign(id, Some(Duration::from_secs(60)), timed.at(500)).unwrap();
    assert_eq!((long.deadline, long.settle_by), (timed.at(60_500), timed.at(ACK_BY)));
    let short = timed.table.assign(id, Some(Duration::from_secs(1)), timed.at(500)).unwrap();
    assert_eq!((short.deadline, short.settle_by), (timed.at(1500), timed.at(1500)));
}

#[test]
fn repeated_assignment_never_ends_a_lease_earlier() {
    let seconds = Duration::from_secs;
    let mut timed = TimedTable::new();
    let id = timed.assigned(20_000);
    let again = timed.table.assign_again(id, Some(seconds(5)), timed.at(1000)).unwrap();
    assert_eq!((again.deadline, again.settle_by), (timed.at(20_000), timed.at(ACK_BY)));
    let again = timed.table.assign_again(id, None, timed.at(1000)).unwrap();
    assert_eq!(again.deadline, timed.at(20_000), "JetStream alone waits for less");
    let again = timed.table.assign_again(id, Some(seconds(30)), timed.at(1000)).unwrap();
    assert_eq!(again.deadline, timed.at(31_000));
    assert_eq!(timed.table.assign_again(id, Some(seconds(60)), timed.at(31_000)), Err(OVER));
}

#[test]
fn reissued_lease_is_that_of_its_message_and_its_old_id_has_ended() {
    let mut timed = TimedTable::new();
    let old = timed.assigned(2000);
    let new = timed.table.reissue(old, timed.at(1000)).unwrap();
    assert_eq!((timed.table.payload(old), timed.table.payload(new)), (None, Some(&"one")));
    assert_eq!(timed.begin(old, SettleKind::Ack, 1000).unwrap_err(), OVER);
    assert_eq!(timed.table.reissue(old, timed.at(1000)), None);
    // The caller's end counts no more, and JetStream's clock has not moved.
    assert_eq!((timed.sweep(2000), timed.ack_by(new)), (vec![], u128::from(ACK_BY)));
    let (_, older) = timed.table.grant(timed.terms(1, 3000), "again");
    assert_eq!(older, Some((new, "one")), "the message arrives again");
    timed.table.check();
}

#[test]
fn reissued_last_attempt_is_kept_for_its_next_caller() {
    let mut timed = TimedTable::new();
    let old = timed.last_attempt();
    timed.table.assign(old, Some(Duration::from_secs(2)), timed.at(0)).unwrap();
    let new = timed.table.reissue(old, timed.at(1000)).unwrap();
    assert!(matches!(timed.sweep(5000)[..], [Due::Progress { id }] if id == new));
    timed.progressed(new, 5000, 5000);
    assert_eq!(timed.ack_by(new), 5000 + u128::from(ACK_BY));
}

#[test]
fn lease_that_is_being_settled_is_not_reissued() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(20_000);
    timed.begin(id, SettleKind::Ack, 10).unwrap();
    assert_eq!(timed.table.reissue(id, timed.at(20)), None);
    timed.finish(id, PublishOutcome::Unconfirmed, 30);
    assert_eq!(timed.table.reissue(id, timed.at(40)), None, "it may be done");
}

#[test]
fn extend_counts_from_now_and_may_shorten() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    assert_eq!(timed.extend(id, 5000, 999), Ok(timed.at(5999)));
    assert_eq!(timed.extend(id, 100, 2000), Ok(timed.at(2100)));
    assert_eq!(timed.extend(id, 5000, 2100), Err(OVER));
}

#[test]
fn extend_without_a_length_repeats_the_granted_length() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(4000);
    timed.extend(id, 60_000, 100).unwrap();
    let again = timed.table.extend(id, None, timed.at(1000));
    assert_eq!(again, Ok(timed.at(5000)), "not as long as it was extended last");
    // Another caller is granted the lease again.
    timed.table.assign(id, None, timed.at(1500)).unwrap();
    let again = timed.table.extend(id, None, timed.at(2000));
    assert_eq!(again, Ok(timed.at(2000 + ACK_BY)), "as long as JetStream waits");
    assert_eq!(timed.sweep(6000), [Due::Progress { id }], "and kept alive for as long");
    let shorter = |_| Duration::from_secs(5);
    timed.table.retune(super::CONSUMER, shorter, None, 100);
    let again = timed.table.extend(id, None, timed.at(2000));
    assert_eq!(again, Err(OVER), "an ended lease stays ended");
}

#[test]
fn no_lease_is_longer_than_the_longest() {
    let mut timed = TimedTable::new();
    let longest = Duration::from_secs(3);
    timed.table = LeaseTable::new(timed.origin, longest, 64);
    let id = timed.granted();
    for length in [None, Some(Duration::MAX), Some(longest)] {
        let assigned = timed.table.assign(id, length, timed.at(600)).unwrap();
        assert_eq!((assigned.deadline, assigned.settle_by), (timed.at(3600), timed.at(3600)));
        for length in [None, Some(Duration::MAX), Some(longest)] {
            assert_eq!(timed.table.extend(id, length, timed.at(600)), Ok(timed.at(3600)));
        }
    }
    assert_eq!(timed.extend(id, 2999, 700), Ok(timed.at(3699)));
    // Nor does it grow with JetStream's patience.
    timed.table.assign(id, None, timed.at(1000)).unwrap();
    timed.table.retune(super::CONSUMER, |_| Duration::from_secs(60), None, 100);
    let lapsed = timed.sweep(4000);
    assert!(matches!(lapsed[..], [Due::Lapsed { release: Some(_), .. }]), "{lapsed:?}");
}

#[test]
fn short_lease_is_released_at_its_deadline() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    assert_eq!(timed.table.next_due(), Some(timed.at(1000)));
    assert_eq!(timed.sweep(999), []);
    let release = Some(timed.at(ACK_BY));
    assert_eq!(timed.sweep(1000), [Due::Lapsed { id, payload: "one", release }]);
    assert!(timed.table.is_empty());
}

#[test]
fn lapse_within_the_margin_of_ack_by_sends_nothing() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(ACK_BY - 1000);
    let swept = timed.sweep(ACK_BY - 1000);
    assert_eq!(swept, [Due::Lapsed { id, payload: "one", release: None }]);
}

#[test]
fn lease_without_a_length_lapses_at_ack_by_unless_something_has_moved_ack_by() {
    let mut timed = TimedTable::new();
    let id = timed.granted();
    timed.table.assign(id, None, timed.origin).unwrap();
    assert_eq!(timed.sweep(ACK_BY), [Due::Lapsed { id, payload: "one", release: None }]);
    let mut timed = TimedTable::new();
    let id = timed.granted();
    timed.table.assign(id, None, timed.origin).unwrap();
    timed.distrust(4000);
    assert_eq!(timed.sweep(ACK_BY), [Due::Lost { id, payload: "one" }]);
}

#[test]
fn lapsed_last_attempt_is_not_released() {
    let mut timed = TimedTable::new();
    let id = timed.last_attempt();
    timed.table.assign(id, Some(Duration::from_secs(1)), timed.origin).unwrap();
    assert_eq!(timed.sweep(1000), [Due::Lapsed { id, payload: "last", release: None }]);
}

#[test]
fn last_attempt_is_kept_alive_until_taken_and_after_its_return() {
    let mut timed = TimedTable::new();
    let id = timed.last_attempt();
    assert_eq!(timed.sweep(5000), [Due::Progress { id }]);
    timed.progressed(id, 5000, 5001);
    assert_eq!(timed.ack_by(id), 5000 + u128::from(ACK_BY));
    timed.table.assign(id, Some(Duration::from_secs(2)), timed.at(6000)).unwrap();
    timed.table.reclaim(id, timed.at(7000));
    assert_eq!(timed.sweep(9999), [], "the caller's lease does not count any more");
    assert_eq!(timed.sweep(10_000), [Due::Progress { id }]);
}

#[test]
fn reclaimed_lease_lasts_as_long_as_a_fresh_one() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    timed.table.reclaim(id, timed.at(999));
    assert_eq!(timed.table.next_due(), Some(timed.at(ACK_BY)));
}

#[test]
fn unassigned_delivery_is_given_back_once() {
    let mut timed = TimedTable::new();
    let id = timed.granted();
    let back = timed.table.give_back(id, timed.at(100));
    assert_eq!(back, Some(GivenBack { payload: "one", release: Some(timed.at(ACK_BY)) }));
    assert_eq!(timed.table.give_back(id, timed.at(100)), None);
}

#[test]
fn late_or_last_delivery_is_not_released() {
    let mut timed = TimedTable::new();
    let id = timed.granted();
    let late = timed.table.give_back(id, timed.at(ACK_BY - 1000));
    assert_eq!(late, Some(GivenBack { payload: "one", release: None }));
    let last = timed.last_attempt();
    let last = timed.table.give_back(last, timed.at(ACK_BY - 1000));
    assert_eq!(last, Some(GivenBack { payload: "last", release: None }));
}

#[test]
fn long_lease_is_kept_alive_at_half_time_and_each_eighth() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    let progress = [Due::Progress { id }];
    assert_eq!(timed.sweep(4999), []);
    assert_eq!(timed.sweep(5000), progress);
    assert_eq!(timed.sweep(6249), []);
    assert_eq!(timed.sweep(6250), progress);
    timed.progressed(id, 6250, 6300);
    assert_eq!(timed.table.next_due(), Some(timed.at(6250 + 5000)));
    assert_eq!(timed.ack_by(id), 6250 + u128::from(ACK_BY));
}

#[test]
fn progress_confirmed_at_ack_by_is_too_late() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    timed.progressed(id, ACK_BY - 10, ACK_BY);
    assert_eq!(timed.sweep(ACK_BY), [Due::Lost { id, payload: "one" }]);
}

#[test]
fn extension_past_half_time_is_progressed_at_once() {
    let mut timed = TimedTable::new();
    let id = timed.granted();
    timed.extend(id, 60_000, 8000).unwrap();
    assert_eq!(timed.sweep(8000), [Due::Progress { id }]);
}

#[test]
fn sweep_does_no_more_than_asked() {
    let mut timed = TimedTable::new();
    for sequence in 1..=5 {
        timed.table.grant(timed.terms(sequence, 0), "any");
    }
    let now = timed.at(ACK_BY);
    let steps: Vec<usize> = (0..4).map(|_| timed.table.sweep(now, 2).len()).collect();
    assert_eq!(steps, [2, 2, 1, 0]);
}

#[test]
fn huge_times_do_not_overflow() {
    let mut timed = TimedTable::new();
    let terms = Terms { ack_wait: Duration::MAX, ..timed.terms(1, 0) };
    let id = timed.table.grant(terms, "one").0;
    assert!(timed.table.assign(id, Some(Duration::MAX), timed.at(5)).is_ok());
    timed.progressed(id, 6, 7);
    timed.distrust(8);
    assert!(timed.table.next_due().is_some());
    assert!(timed.begin(id, SettleKind::Ack, 9).is_ok());
}
