//! When the pump pulls, how much, and what it makes of the end of a pull.

use super::*;

#[test]
fn one_pull_serves_all_waiters() {
    let mut timed = TimedPump::new();
    timed.join(3, 30_000);
    timed.join(4, 30_000);
    assert_eq!(timed.pull(), (1, 7, 5000));
    timed.join(5, 30_000);
    assert_eq!(timed.steps(), [], "one pull at a time");
}

#[test]
fn pull_keeps_to_its_allowance_and_its_limits() {
    let mut timed = TimedPump::new();
    timed.join(50, 30_000);
    timed.allowed = allow(20);
    assert_eq!(timed.pull().1, 20);
    timed.end(1, PullOutcome::Done);
    let (max_batch, max_expires) = (10, Duration::from_secs(2));
    timed.pump.set_limits(PullLimits {
        max_batch,
        max_expires,
        max_request_bytes: Some(9000),
        ..limits()
    });
    timed.ms = 5000;
    let pull =
        Pull { no: 2, batch: 10, expires: max_expires, no_wait: true, max_bytes: Some(9000) };
    assert_eq!(timed.steps(), [pull]);
}

#[test]
fn pump_without_an_allowance_pulls_nothing_and_says_so() {
    let mut timed = TimedPump::new();
    timed.allowed = allow(0);
    timed.join(1, 30_000);
    assert_eq!(timed.steps(), []);
    assert!(timed.pump.starved());
    timed.allowed = allow(1);
    assert_eq!(timed.pull(), (1, 1, 5000));
    assert!(!timed.pump.starved());
}

#[test]
fn pull_ends_a_little_before_the_last_wait() {
    let mut timed = TimedPump::new();
    timed.join(1, 400);
    timed.join(1, 1000);
    assert_eq!(timed.pull(), (1, 2, 950));
}

#[test]
fn bytes_of_a_pull_leave_room_for_overhead() {
    let mut timed = TimedPump::new();
    timed.join_with(Want { max_bytes: 1_000_000, ..timed.want(100, 30_000) });
    let steps = timed.steps();
    assert!(matches!(steps[..], [Pull { batch: 100, max_bytes: Some(940_000), .. }]), "{steps:?}");
}

#[test]
fn small_answer_is_not_asked_to_hold_a_thousand_messages() {
    let mut timed = TimedPump::new();
    timed.join_with(Want { max_bytes: 120_000, ..timed.want(1000, 30_000) });
    let steps = timed.steps();
    assert!(matches!(steps[..], [Pull { batch: 100, max_bytes: Some(60_000), .. }]), "{steps:?}");
}

#[test]
fn full_batch_ends_the_pull_without_a_status() {
    let mut timed = TimedPump::new();
    let (first, second) = (timed.join(2, 30_000), timed.join(2, 30_000));
    timed.pump.set_limits(PullLimits { max_batch: 3, ..limits() });
    timed.pull();
    timed.arrive(1..=3);
    assert_eq!(timed.answers(), [(first, vec![1, 2]), (second, vec![3])]);
    assert!(timed.pump.is_idle());
}

#[test]
fn short_wait_gets_a_pull_of_its_own_once() {
    let mut timed = TimedPump::new();
    timed.join(1, 90);
    assert_eq!(timed.pull(), (1, 1, 100));
    timed.ms = 60;
    timed.end(1, PullOutcome::Done);
    assert_eq!(timed.steps(), [], "another would outlive it, and cost an attempt");
    timed.join(1, 30);
    assert_eq!(timed.pull(), (2, 2, 100));
}

#[test]
fn small_pull_is_followed_by_a_pull_for_one_large_message() {
    let mut timed = TimedPump::new();
    timed.join(9, 30_000);
    timed.pull();
    timed.end(1, PullOutcome::TooLarge);
    let expires = Duration::from_secs(5);
    let uncapped = Pull { no: 2, batch: 1, expires, no_wait: true, max_bytes: None };
    assert_eq!(timed.steps(), [uncapped]);
    timed.arrive_sized(1, BYTES);
    let steps = timed.steps();
    assert!(matches!(steps[..], [Answer { .. }]), "{steps:?}");
}

#[test]
fn pull_with_used_bytes_is_followed_by_an_equal_pull() {
    let mut timed = TimedPump::new();
    timed.join_lingering(9, 30_000, 1000);
    timed.pull();
    timed.arrive([1]);
    timed.end(1, PullOutcome::TooLarge);
    let steps = timed.steps();
    assert!(matches!(steps[..], [Pull { batch: 8, max_bytes: Some(_), .. }]), "{steps:?}");
}

#[test]
fn pump_waits_behind_other_pulls_after_a_moment() {
    let mut timed = TimedPump::new();
    timed.join(9, 30_000);
    timed.pull();
    timed.end(1, PullOutcome::RequestsPending);
    assert_eq!(timed.steps_at(4), []);
    timed.ms = 50;
    let expires = Duration::from_secs(5);
    let steps = timed.steps();
    let [Pull { no: 2, batch: 1, no_wait: false, expires: wait, .. }] = steps[..] else {
        panic!("{steps:?}")
    };
    assert_eq!(wait, expires);
}

#[test]
fn message_too_large_behind_other_pulls_is_reached() {
    let mut timed = TimedPump::new();
    timed.join(9, 30_000);
    timed.pull();
    timed.end(1, PullOutcome::TooLarge);
    timed.pull();
    timed.end(2, PullOutcome::RequestsPending);
    timed.ms = 50;
    let steps = timed.steps();
    assert!(matches!(steps[..], [Pull { no_wait: false, max_bytes: None, .. }]), "{steps:?}");
}

#[test]
fn pull_after_a_refusal_waits_100_ms() {
    let mut timed = TimedPump::new();
    timed.join(9, 30_000);
    timed.pull();
    timed.end(1, PullOutcome::Refused);
    assert_eq!(timed.steps_at(99), []);
    assert_eq!(timed.steps_at(100).len(), 1);
}

#[test]
fn pull_that_ends_empty_at_once_does_not_spin() {
    let mut timed = TimedPump::new();
    timed.join(9, 30_000);
    timed.pull();
    timed.end(1, PullOutcome::Done);
    assert_eq!(timed.steps_at(99), []);
    assert_eq!(timed.steps_at(100).len(), 1);
}

#[test]
fn pull_with_a_lost_end_is_over_a_second_after_its_expiry() {
    let mut timed = TimedPump::new();
    timed.join(9, 30_000);
    timed.pull();
    assert_eq!(timed.steps_at(5999), []);
    assert_eq!(timed.steps_at(6000).len(), 1);
    timed.end(1, PullOutcome::Refused);
    timed.ms = 7000;
    assert_eq!(timed.steps(), [], "the second is still open");
}

#[test]
fn new_connection_is_pulled_on_at_once() {
    let mut timed = TimedPump::new();
    timed.join(1, 30_000);
    timed.pull();
    timed.pump.down(timed.now());
    assert_eq!(timed.steps(), []);
    timed.pump.up(timed.now());
    assert_eq!(timed.pull().0, 2);
}

#[test]
fn drain_pulls_no_more_and_answers_waiters_after_the_pull() {
    let mut timed = TimedPump::new();
    let (first, second) = (timed.join(1, 30_000), timed.join(1, 30_000));
    timed.pull();
    timed.pump.drain(timed.now());
    assert_eq!(timed.steps_at(3000), []);
    timed.arrive([1]);
    timed.end(1, PullOutcome::Done);
    let drained = answer(second, [], Why::Draining);
    assert_eq!(timed.steps(), [answer(first, [1], Why::Filled), drained]);
    let third = timed.join(1, 30_000);
    assert_eq!(timed.steps(), [answer(third, [], Why::Draining)]);
}

#[test]
fn allowance_bounds_a_pull_and_the_next_follows_at_once() {
    let mut timed = TimedPump::new();
    let waiter = timed.join(9, 30_000);
    timed.allowed = Allowance { bytes: 3000, wait: Duration::from_millis(500), ..allow(100) };
    let expires = Duration::from_millis(500);
    let pull = |no, batch| Pull { no, batch, expires, no_wait: true, max_bytes: Some(3000) };
    assert_eq!(timed.steps(), [pull(1, 9)]);
    timed.arrive(1..=3);
    timed.end(1, PullOutcome::TooLarge);
    assert_eq!(
        timed.steps(),
        [pull(2, 6)],
        "more is there: the waiter is filled from several pulls"
    );
    assert_eq!(timed.steps_at(99), [], "it is on its way");
    timed.arrive(4..=6);
    timed.end(2, PullOutcome::Spent);
    timed.allowed = allow(2);
    assert_eq!(timed.pull().1, 2);
    timed.arrive(7..=8);
    timed.allowed = Allowance::NONE;
    assert_eq!(timed.steps(), [], "its batch was full of what was allowed");
    assert!(timed.pump.starved());
    assert_eq!(timed.steps_at(104), [answer(waiter, [1, 2, 3, 4, 5, 6, 7, 8], Why::Filled)]);
}

#[test]
fn message_beyond_the_allowance_gets_more_and_then_no_cap() {
    let mut timed = TimedPump::new();
    timed.join(9, 30_000);
    timed.allowed = Allowance { bytes: 1000, ..allow(100) };
    timed.pull();
    timed.end(1, PullOutcome::TooLarge);
    timed.allowed = Allowance { bytes: 100_000, ..allow(100) };
    let steps = timed.steps();
    assert!(matches!(steps[..], [Pull { batch: 9, max_bytes: Some(100_000), .. }]), "{steps:?}");
    timed.end(2, PullOutcome::TooLarge);
    let steps = timed.steps();
    assert!(matches!(steps[..], [Pull { batch: 1, max_bytes: None, .. }]), "{steps:?}");
}
