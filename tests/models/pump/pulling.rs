//! When the pump pulls, how much, and what it makes of the end of a pull.

use super::*;

#[test]
fn one_pull_serves_all_waiters() {
    let mut desk = Desk::new();
    desk.join(3, 30_000);
    desk.join(4, 30_000);
    assert_eq!(desk.pull(), (1, 7, 5000));
    desk.join(5, 30_000);
    assert_eq!(desk.steps(), [], "one pull at a time");
}

#[test]
fn pull_keeps_to_its_allowance_and_its_limits() {
    let mut desk = Desk::new();
    desk.join(50, 30_000);
    desk.allowed = allow(20);
    assert_eq!(desk.pull().1, 20);
    desk.end(1, PullOutcome::Done);
    let (max_batch, max_expires) = (10, Duration::from_secs(2));
    desk.pump.set_limits(PullLimits {
        max_batch,
        max_expires,
        max_request_bytes: Some(9000),
        ..limits()
    });
    desk.ms = 5000;
    let pull =
        Pull { no: 2, batch: 10, expires: max_expires, no_wait: true, max_bytes: Some(9000) };
    assert_eq!(desk.steps(), [pull]);
}

#[test]
fn pump_without_an_allowance_pulls_nothing_and_says_so() {
    let mut desk = Desk::new();
    desk.allowed = allow(0);
    desk.join(1, 30_000);
    assert_eq!(desk.steps(), []);
    assert!(desk.pump.starved());
    desk.allowed = allow(1);
    assert_eq!(desk.pull(), (1, 1, 5000));
    assert!(!desk.pump.starved());
}

#[test]
fn pull_ends_a_little_before_the_last_wait() {
    let mut desk = Desk::new();
    desk.join(1, 400);
    desk.join(1, 1000);
    assert_eq!(desk.pull(), (1, 2, 950));
}

#[test]
fn bytes_of_a_pull_leave_room_for_overhead() {
    let mut desk = Desk::new();
    desk.join_with(Want { max_bytes: 1_000_000, ..desk.want(100, 30_000) });
    let steps = desk.steps();
    assert!(matches!(steps[..], [Pull { batch: 100, max_bytes: Some(940_000), .. }]), "{steps:?}");
}

#[test]
fn small_answer_is_not_asked_to_hold_a_thousand_messages() {
    let mut desk = Desk::new();
    desk.join_with(Want { max_bytes: 120_000, ..desk.want(1000, 30_000) });
    let steps = desk.steps();
    assert!(matches!(steps[..], [Pull { batch: 100, max_bytes: Some(60_000), .. }]), "{steps:?}");
}

#[test]
fn full_batch_ends_the_pull_without_a_status() {
    let mut desk = Desk::new();
    let (first, second) = (desk.join(2, 30_000), desk.join(2, 30_000));
    desk.pump.set_limits(PullLimits { max_batch: 3, ..limits() });
    desk.pull();
    desk.arrive(1..=3);
    assert_eq!(desk.answers(), [(first, vec![1, 2]), (second, vec![3])]);
    assert!(desk.pump.is_idle());
}

#[test]
fn short_wait_gets_a_pull_of_its_own_once() {
    let mut desk = Desk::new();
    desk.join(1, 90);
    assert_eq!(desk.pull(), (1, 1, 100));
    desk.ms = 60;
    desk.end(1, PullOutcome::Done);
    assert_eq!(desk.steps(), [], "another would outlive it, and cost an attempt");
    desk.join(1, 30);
    assert_eq!(desk.pull(), (2, 2, 100));
}

#[test]
fn small_pull_is_followed_by_a_pull_for_one_large_message() {
    let mut desk = Desk::new();
    desk.join(9, 30_000);
    desk.pull();
    desk.end(1, PullOutcome::TooLarge);
    let expires = Duration::from_secs(5);
    let uncapped = Pull { no: 2, batch: 1, expires, no_wait: true, max_bytes: None };
    assert_eq!(desk.steps(), [uncapped]);
    desk.arrive_sized(1, BYTES);
    let steps = desk.steps();
    assert!(matches!(steps[..], [Answer { .. }]), "{steps:?}");
}

#[test]
fn pull_with_used_bytes_is_followed_by_an_equal_pull() {
    let mut desk = Desk::new();
    desk.join_lingering(9, 30_000, 1000);
    desk.pull();
    desk.arrive([1]);
    desk.end(1, PullOutcome::TooLarge);
    let steps = desk.steps();
    assert!(matches!(steps[..], [Pull { batch: 8, max_bytes: Some(_), .. }]), "{steps:?}");
}

#[test]
fn pump_waits_behind_other_pulls_after_a_moment() {
    let mut desk = Desk::new();
    desk.join(9, 30_000);
    desk.pull();
    desk.end(1, PullOutcome::RequestsPending);
    assert_eq!(desk.steps_at(4), []);
    desk.ms = 50;
    let expires = Duration::from_secs(5);
    let steps = desk.steps();
    let [Pull { no: 2, batch: 1, no_wait: false, expires: wait, .. }] = steps[..] else {
        panic!("{steps:?}")
    };
    assert_eq!(wait, expires);
}

#[test]
fn message_too_large_behind_other_pulls_is_reached() {
    let mut desk = Desk::new();
    desk.join(9, 30_000);
    desk.pull();
    desk.end(1, PullOutcome::TooLarge);
    desk.pull();
    desk.end(2, PullOutcome::RequestsPending);
    desk.ms = 50;
    let steps = desk.steps();
    assert!(matches!(steps[..], [Pull { no_wait: false, max_bytes: None, .. }]), "{steps:?}");
}

#[test]
fn pull_after_a_refusal_waits_100_ms() {
    let mut desk = Desk::new();
    desk.join(9, 30_000);
    desk.pull();
    desk.end(1, PullOutcome::Refused);
    assert_eq!(desk.steps_at(99), []);
    assert_eq!(desk.steps_at(100).len(), 1);
}

#[test]
fn pull_that_ends_empty_at_once_does_not_spin() {
    let mut desk = Desk::new();
    desk.join(9, 30_000);
    desk.pull();
    desk.end(1, PullOutcome::Done);
    assert_eq!(desk.steps_at(99), []);
    assert_eq!(desk.steps_at(100).len(), 1);
}

#[test]
fn pull_with_a_lost_end_is_over_a_second_after_its_expiry() {
    let mut desk = Desk::new();
    desk.join(9, 30_000);
    desk.pull();
    assert_eq!(desk.steps_at(5999), []);
    assert_eq!(desk.steps_at(6000).len(), 1);
    desk.end(1, PullOutcome::Refused);
    desk.ms = 7000;
    assert_eq!(desk.steps(), [], "the second is still open");
}

#[test]
fn new_connection_is_pulled_on_at_once() {
    let mut desk = Desk::new();
    desk.join(1, 30_000);
    desk.pull();
    desk.pump.down(desk.now());
    assert_eq!(desk.steps(), []);
    desk.pump.up(desk.now());
    assert_eq!(desk.pull().0, 2);
}

#[test]
fn drain_pulls_no_more_and_answers_waiters_after_the_pull() {
    let mut desk = Desk::new();
    let (first, second) = (desk.join(1, 30_000), desk.join(1, 30_000));
    desk.pull();
    desk.pump.drain(desk.now());
    assert_eq!(desk.steps_at(3000), []);
    desk.arrive([1]);
    desk.end(1, PullOutcome::Done);
    let drained = answer(second, [], Why::Draining);
    assert_eq!(desk.steps(), [answer(first, [1], Why::Filled), drained]);
    let third = desk.join(1, 30_000);
    assert_eq!(desk.steps(), [answer(third, [], Why::Draining)]);
}

#[test]
fn allowance_bounds_a_pull_and_the_next_follows_at_once() {
    let mut desk = Desk::new();
    let waiter = desk.join(9, 30_000);
    desk.allowed = Allowance { bytes: 3000, wait: Duration::from_millis(500), ..allow(100) };
    let expires = Duration::from_millis(500);
    let pull = |no, batch| Pull { no, batch, expires, no_wait: true, max_bytes: Some(3000) };
    assert_eq!(desk.steps(), [pull(1, 9)]);
    desk.arrive(1..=3);
    desk.end(1, PullOutcome::TooLarge);
    assert_eq!(
        desk.steps(),
        [pull(2, 6)],
        "more is there: the waiter is filled from several pulls"
    );
    assert_eq!(desk.steps_at(99), [], "it is on its way");
    desk.arrive(4..=6);
    desk.end(2, PullOutcome::Spent);
    desk.allowed = allow(2);
    assert_eq!(desk.pull().1, 2);
    desk.arrive(7..=8);
    desk.allowed = Allowance::NONE;
    assert_eq!(desk.steps(), [], "its batch was full of what was allowed");
    assert!(desk.pump.starved());
    assert_eq!(desk.steps_at(104), [answer(waiter, [1, 2, 3, 4, 5, 6, 7, 8], Why::Filled)]);
}

#[test]
fn message_beyond_the_allowance_gets_more_and_then_no_cap() {
    let mut desk = Desk::new();
    desk.join(9, 30_000);
    desk.allowed = Allowance { bytes: 1000, ..allow(100) };
    desk.pull();
    desk.end(1, PullOutcome::TooLarge);
    desk.allowed = Allowance { bytes: 100_000, ..allow(100) };
    let steps = desk.steps();
    assert!(matches!(steps[..], [Pull { batch: 9, max_bytes: Some(100_000), .. }]), "{steps:?}");
    desk.end(2, PullOutcome::TooLarge);
    let steps = desk.steps();
    assert!(matches!(steps[..], [Pull { batch: 1, max_bytes: None, .. }]), "{steps:?}");
}
