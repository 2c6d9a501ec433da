//! The promises of answering: which waiter gets which message, when a waiter is answered, and where
//! a message goes that no waiter wants.

use super::*;

#[test]
fn first_waiter_is_filled_before_the_next() {
    let mut timed = TimedPump::new();
    let (first, second) = (timed.join(2, 30_000), timed.join(2, 30_000));
    timed.pull();
    timed.arrive(1..=3);
    assert_eq!(timed.steps(), [answer(first, [1, 2], Why::Filled)]);
    timed.end(1, PullOutcome::Done);
    assert_eq!(timed.steps(), [answer(second, [3], Why::Filled)]);
}

#[test]
fn waiter_with_messages_is_answered_after_5_ms_of_quiet() {
    let mut timed = TimedPump::new();
    let first = timed.join(9, 30_000);
    timed.pull();
    timed.arrive([1]);
    assert_eq!(timed.steps_at(4), []);
    timed.arrive([2]);
    assert_eq!(timed.steps_at(8), []);
    assert_eq!(timed.steps_at(9), [answer(first, [1, 2], Why::Filled)]);
}

#[test]
fn linger_continues_after_the_first_message_and_across_pulls() {
    let mut timed = TimedPump::new();
    let first = timed.join_lingering(9, 30_000, 300);
    timed.pull();
    timed.arrive([1]);
    timed.end(1, PullOutcome::Done);
    assert_eq!(timed.pull(), (2, 8, 250));
    timed.ms = 200;
    timed.arrive([2]);
    assert_eq!(timed.steps_at(299), []);
    assert_eq!(timed.steps_at(300), [answer(first, [1, 2], Why::Filled)]);
}

/// Otherwise its first message could be delivered to another worker before it is answered.
#[test]
fn linger_is_no_longer_than_the_consumer_allows() {
    let mut timed = TimedPump::new();
    timed.pump.set_limits(PullLimits { linger: Duration::from_millis(200), ..limits() });
    let first = timed.join_lingering(9, 30_000, 300);
    timed.pull();
    timed.arrive([1]);
    assert_eq!(timed.steps_at(199), []);
    assert_eq!(timed.steps_at(200), [answer(first, [1], Why::Filled)]);
}

#[test]
fn waiter_is_answered_at_the_end_of_its_wait() {
    let mut timed = TimedPump::new();
    let first = timed.join(1, 700);
    timed.pull();
    assert_eq!(timed.steps_at(699), []);
    assert_eq!(timed.steps_at(700), [answer(first, [], Why::Waited)]);
}

#[test]
fn impatient_waiter_is_answered_at_the_end_of_its_short_pull() {
    let mut timed = TimedPump::new();
    let first = timed.join_impatient(5);
    assert_eq!(timed.pull(), (1, 5, 50));
    assert_eq!(timed.steps_at(50), []);
    timed.end(1, PullOutcome::Done);
    assert_eq!(timed.steps(), [answer(first, [], Why::Waited)]);
}

#[test]
fn end_of_an_older_pull_does_not_answer_an_impatient_waiter() {
    let mut timed = TimedPump::new();
    timed.join(1, 30_000);
    timed.pull();
    let second = timed.join_impatient(5);
    timed.ms = 4999;
    timed.arrive([]);
    timed.end(1, PullOutcome::Done);
    assert_eq!(timed.answers(), [(second, vec![])], "nothing had come for long");

    let third = timed.join_impatient(5);
    timed.end(2, PullOutcome::Done);
    let steps = timed.steps();
    assert!(!steps.iter().any(|step| matches!(step, Answer { .. })), "{third:?} in {steps:?}");
}

#[test]
fn impatient_waiter_at_a_silent_pull_is_answered_after_100_ms() {
    let mut timed = TimedPump::new();
    timed.join(1, 30_000);
    timed.pull();
    timed.ms = 1000;
    let second = timed.join_impatient(5);
    assert_eq!(timed.steps_at(1099), []);
    assert_eq!(timed.steps_at(1100), [answer(second, [], Why::Waited)]);
}

#[test]
fn impatient_waiter_is_answered_within_a_second() {
    let mut timed = TimedPump::new();
    timed.pump.down(timed.now());
    let first = timed.join_impatient(1);
    assert_eq!(timed.steps_at(999), [], "the connection may still come");
    assert_eq!(timed.steps_at(1000), [answer(first, [], Why::Down)]);
}

#[test]
fn messages_of_a_waiter_that_left_go_to_the_next_in_order() {
    let mut timed = TimedPump::new();
    let (first, second) = (timed.join(3, 30_000), timed.join(3, 30_000));
    timed.pull();
    timed.arrive([1, 2]);
    timed.pump.leave(first, timed.now());
    timed.arrive([3]);
    assert_eq!(timed.answers(), [(second, vec![1, 2, 3])]);
}

#[test]
fn untaken_answer_goes_first_to_the_next_waiter() {
    let mut timed = TimedPump::new();
    timed.arrive([3]);
    timed.pump.unhanded(vec![(1, SMALL, false), (2, SMALL, true)], timed.now());
    let first = timed.join(9, 30_000);
    assert_eq!(timed.answers(), [(first, vec![1, 2, 3])]);
}

#[test]
fn returned_answer_goes_first_to_the_next_waiter_and_soon_to_others() {
    let mut timed = TimedPump::new();
    timed.arrive([3]);
    timed.pump.returned(vec![(1, SMALL, false), (2, SMALL, true)], timed.now());
    assert_eq!(timed.steps_at(249), []);
    assert_eq!(timed.steps_at(250), [Overdue { message: 1 }]);
    let first = timed.join(9, 30_000);
    assert_eq!(timed.answers(), [(first, vec![2, 3])]);
}

#[test]
fn surplus_is_parked_briefly_and_then_given_back() {
    let mut timed = TimedPump::new();
    timed.arrive([1]);
    assert_eq!(timed.steps_at(999), []);
    assert_eq!(timed.steps_at(1000), [Overdue { message: 1 }]);
    assert!(timed.pump.is_idle());
}

#[test]
fn last_attempt_is_parked_until_it_is_taken() {
    let mut timed = TimedPump::new();
    timed.pump.arrived(1, SMALL, true, timed.now());
    assert_eq!(timed.steps_at(3_600_000), []);
    let first = timed.join(1, 30_000);
    assert_eq!(timed.steps(), [answer(first, [1], Why::Filled)]);
}

#[test]
fn message_without_room_ends_the_answer_and_waits_for_the_next() {
    let mut timed = TimedPump::new();
    let first = timed.join_with(Want { max_bytes: 5000, ..timed.want(9, 30_000) });
    let second = timed.join(1, 30_000);
    timed.pull();
    timed.arrive_sized(1, 3000);
    timed.arrive_sized(2, 3000);
    assert_eq!(timed.answers(), [(first, vec![1]), (second, vec![2])]);
}

#[test]
fn message_goes_to_the_first_waiter_that_it_fits() {
    let mut timed = TimedPump::new();
    let first = timed.join_with(Want { max_bytes: 2000, ..timed.want(1, 30_000) });
    let second = timed.join(1, 30_000);
    timed.pull();
    timed.arrive_sized(1, 3000);
    assert_eq!(timed.answers(), [(second, vec![1])]);
    timed.arrive([2]);
    assert_eq!(timed.answers(), [(first, vec![2])]);
}

#[test]
fn message_that_fits_no_waiter_is_rejected_and_blocks_none() {
    let mut timed = TimedPump::new();
    let (first, second) = (timed.join(2, 30_000), timed.join(1, 30_000));
    timed.pull();
    timed.arrive([1]);
    timed.arrive_sized(2, BYTES + 1);
    timed.arrive([3]);
    let told = Answer { waiter: first, messages: vec![1], too_large: Some(2), why: Why::Filled };
    assert_eq!(timed.steps(), [told, answer(second, [3], Why::Filled)]);
}

#[test]
fn waiters_with_messages_are_answered_at_a_lost_connection() {
    let mut timed = TimedPump::new();
    let (first, second) = (timed.join_lingering(9, 400, 300), timed.join(1, 400));
    timed.pull();
    timed.arrive([1]);
    timed.pump.down(timed.now());
    assert_eq!(timed.steps(), [answer(first, [1], Why::Filled)]);
    assert_eq!(timed.steps_at(399), []);
    assert_eq!(timed.steps_at(400), [answer(second, [], Why::Down)]);
}

#[test]
fn failure_answers_all_waiters_and_keeps_their_messages() {
    let mut timed = TimedPump::new();
    let waiters = [timed.join_lingering(9, 30_000, 300), timed.join(1, 30_000)];
    timed.pull();
    timed.arrive([1, 2]);
    assert_eq!(timed.pump.fail(timed.now()), waiters);
    assert_eq!((timed.pump.waiters(), timed.pump.parked()), (0, 2));
    assert_eq!(timed.pump.take_parked(), [1, 2]);
}

#[test]
fn ten_thousand_waiters_are_served_in_turn() {
    let mut timed = TimedPump::new();
    let waiters: Vec<WaiterId> = (0..10_000).map(|_| timed.join(1, 30_000)).collect();
    timed.pull();
    timed.arrive(0..1000);
    let answered: Vec<WaiterId> = timed.answers().into_iter().map(|(waiter, _)| waiter).collect();
    assert_eq!(answered, waiters[..answered.len()]);
    assert_eq!(timed.pump.waiters() + 1000, 10_000);
}
