//! The promises of answering: which waiter gets which message, when a waiter is answered, and where
//! a message goes that no waiter wants.

use super::*;

#[test]
fn the_first_is_filled_before_the_next_gets_any() {
    let mut desk = Desk::new();
    let (first, second) = (desk.join(2, 30_000), desk.join(2, 30_000));
    desk.pull();
    desk.arrive(1..=3);
    assert_eq!(desk.steps(), [answer(first, [1, 2], Why::Filled)]);
    desk.end(1, PullOutcome::Done);
    assert_eq!(desk.steps(), [answer(second, [3], Why::Filled)]);
}

#[test]
fn whoever_has_some_is_answered_when_it_has_been_quiet_for_5_ms() {
    let mut desk = Desk::new();
    let first = desk.join(9, 30_000);
    desk.pull();
    desk.arrive([1]);
    assert_eq!(desk.steps_at(4), []);
    desk.arrive([2]);
    assert_eq!(desk.steps_at(8), []);
    assert_eq!(desk.steps_at(9), [answer(first, [1, 2], Why::Filled)]);
}

#[test]
fn a_linger_goes_on_after_the_first_message_and_over_ends_of_pulls() {
    let mut desk = Desk::new();
    let first = desk.join_lingering(9, 30_000, 300);
    desk.pull();
    desk.arrive([1]);
    desk.end(1, PullOutcome::Done);
    assert_eq!(desk.pull(), (2, 8, 250));
    desk.ms = 200;
    desk.arrive([2]);
    assert_eq!(desk.steps_at(299), []);
    assert_eq!(desk.steps_at(300), [answer(first, [1, 2], Why::Filled)]);
}

#[test]
fn a_wait_ends_at_its_end() {
    let mut desk = Desk::new();
    let first = desk.join(1, 700);
    desk.pull();
    assert_eq!(desk.steps_at(699), []);
    assert_eq!(desk.steps_at(700), [answer(first, [], Why::Waited)]);
}

#[test]
fn whoever_does_not_wait_gets_a_short_pull_and_is_answered_at_its_end() {
    let mut desk = Desk::new();
    let first = desk.join_impatient(5);
    assert_eq!(desk.pull(), (1, 5, 50));
    assert_eq!(desk.steps_at(50), []);
    desk.end(1, PullOutcome::Done);
    assert_eq!(desk.steps(), [answer(first, [], Why::Waited)]);
}

#[test]
fn the_end_of_an_older_pull_tells_whoever_does_not_wait_nothing() {
    let mut desk = Desk::new();
    desk.join(1, 30_000);
    desk.pull();
    let second = desk.join_impatient(5);
    desk.ms = 4999;
    desk.arrive([]);
    desk.end(1, PullOutcome::Done);
    assert_eq!(desk.answers(), [(second, vec![])], "nothing had come for long");

    let third = desk.join_impatient(5);
    desk.end(2, PullOutcome::Done);
    let steps = desk.steps();
    assert!(!steps.iter().any(|step| matches!(step, Answer { .. })), "{third:?} in {steps:?}");
}

#[test]
fn beside_a_silent_pull_whoever_does_not_wait_is_answered_after_100_ms() {
    let mut desk = Desk::new();
    desk.join(1, 30_000);
    desk.pull();
    desk.ms = 1000;
    let second = desk.join_impatient(5);
    assert_eq!(desk.steps_at(1099), []);
    assert_eq!(desk.steps_at(1100), [answer(second, [], Why::Waited)]);
}

#[test]
fn whoever_does_not_wait_is_not_kept_longer_than_a_second() {
    let mut desk = Desk::new();
    desk.pump.down(desk.now());
    let first = desk.join_impatient(1);
    assert_eq!(desk.steps_at(999), [], "the connection may still come");
    assert_eq!(desk.steps_at(1000), [answer(first, [], Why::Down)]);
}

#[test]
fn what_a_waiter_had_when_it_left_goes_to_the_next_in_order() {
    let mut desk = Desk::new();
    let (first, second) = (desk.join(3, 30_000), desk.join(3, 30_000));
    desk.pull();
    desk.arrive([1, 2]);
    desk.pump.leave(first, desk.now());
    desk.arrive([3]);
    assert_eq!(desk.answers(), [(second, vec![1, 2, 3])]);
}

#[test]
fn an_answer_that_nobody_took_goes_first_to_the_next() {
    let mut desk = Desk::new();
    desk.arrive([3]);
    desk.pump.unhanded(vec![(1, SMALL, false), (2, SMALL, true)], desk.now());
    let first = desk.join(9, 30_000);
    assert_eq!(desk.answers(), [(first, vec![1, 2, 3])]);
}

#[test]
fn surplus_is_parked_for_a_moment_and_then_given_back() {
    let mut desk = Desk::new();
    desk.arrive([1]);
    assert_eq!(desk.steps_at(999), []);
    assert_eq!(desk.steps_at(1000), [Overdue { message: 1 }]);
    assert!(desk.pump.is_idle());
}

#[test]
fn a_last_attempt_is_parked_until_somebody_takes_it() {
    let mut desk = Desk::new();
    desk.pump.arrived(1, SMALL, true, desk.now());
    assert_eq!(desk.steps_at(3_600_000), []);
    let first = desk.join(1, 30_000);
    assert_eq!(desk.steps(), [answer(first, [1], Why::Filled)]);
}

#[test]
fn what_does_not_fit_any_more_ends_an_answer_and_goes_to_the_next() {
    let mut desk = Desk::new();
    let first = desk.join_with(Want { max_bytes: 5000, ..desk.want(9, 30_000) });
    let second = desk.join(1, 30_000);
    desk.pull();
    desk.arrive_sized(1, 3000);
    desk.arrive_sized(2, 3000);
    assert_eq!(desk.answers(), [(first, vec![1]), (second, vec![2])]);
}

#[test]
fn a_message_too_large_for_the_first_goes_to_the_first_it_fits() {
    let mut desk = Desk::new();
    let first = desk.join_with(Want { max_bytes: 2000, ..desk.want(1, 30_000) });
    let second = desk.join(1, 30_000);
    desk.pull();
    desk.arrive_sized(1, 3000);
    assert_eq!(desk.answers(), [(second, vec![1])]);
    desk.arrive([2]);
    assert_eq!(desk.answers(), [(first, vec![2])]);
}

#[test]
fn a_message_that_fits_nobody_is_told_to_the_first_and_blocks_no_one() {
    let mut desk = Desk::new();
    let (first, second) = (desk.join(2, 30_000), desk.join(1, 30_000));
    desk.pull();
    desk.arrive([1]);
    desk.arrive_sized(2, BYTES + 1);
    desk.arrive([3]);
    let told = Answer { waiter: first, messages: vec![1], too_large: Some(2), why: Why::Filled };
    assert_eq!(desk.steps(), [told, answer(second, [3], Why::Filled)]);
}

#[test]
fn whoever_has_some_is_answered_when_the_connection_is_lost_and_others_wait_for_it() {
    let mut desk = Desk::new();
    let (first, second) = (desk.join_lingering(9, 400, 300), desk.join(1, 400));
    desk.pull();
    desk.arrive([1]);
    desk.pump.down(desk.now());
    assert_eq!(desk.steps(), [answer(first, [1], Why::Filled)]);
    assert_eq!(desk.steps_at(399), []);
    assert_eq!(desk.steps_at(400), [answer(second, [], Why::Down)]);
}

#[test]
fn a_failure_takes_out_all_waiters_and_keeps_what_they_had() {
    let mut desk = Desk::new();
    let waiters = [desk.join_lingering(9, 30_000, 300), desk.join(1, 30_000)];
    desk.pull();
    desk.arrive([1, 2]);
    assert_eq!(desk.pump.fail(desk.now()), waiters);
    assert_eq!((desk.pump.waiters(), desk.pump.parked()), (0, 2));
    assert_eq!(desk.pump.take_parked(), [1, 2]);
}

#[test]
fn ten_thousand_waiters_are_served_in_turn() {
    let mut desk = Desk::new();
    let waiters: Vec<WaiterId> = (0..10_000).map(|_| desk.join(1, 30_000)).collect();
    desk.pull();
    desk.arrive(0..1000);
    let answered: Vec<WaiterId> = desk.answers().into_iter().map(|(waiter, _)| waiter).collect();
    assert_eq!(answered, waiters[..answered.len()]);
    assert_eq!(desk.pump.waiters() + 1000, 10_000);
}
