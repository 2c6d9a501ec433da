//! The promises to flows: who is handed a message, when a pull is for flows, and how a flow ends.

use super::*;

const MANY: Credit = Credit { messages: 1000, bytes: 64 << 20 };

fn credit(messages: u64) -> Credit {
    Credit { messages, bytes: BYTES }
}

fn small(messages: u64) -> Credit {
    Credit { messages, bytes: messages * SMALL }
}

impl TimedPump {
    fn open(&mut self, most: Credit) -> FlowId {
        self.pump.open_flow(most, self.now())
    }

    fn freed(&mut self, flow: FlowId, messages: u64) {
        self.pump.freed(flow, small(messages), self.now());
    }

    /// What flows are delivered now.
    fn delivered(&mut self) -> Vec<(FlowId, Vec<u32>)> {
        let delivered = |step| match step {
            Deliver { flow, messages } => {
                Some((flow, messages.into_iter().map(|(message, _)| message).collect()))
            }
            Pull { .. } | Answer { .. } | Over { .. } | Overdue { .. } => None,
        };
        self.steps().into_iter().filter_map(delivered).collect()
    }
}

#[test]
fn one_plain_pull_serves_a_stream_that_frees_its_credit_in_time() {
    let mut timed = TimedPump::new();
    let flow = timed.open(MANY);
    let steps = timed.steps();
    let [Pull { no: 1, batch: 1000, no_wait: false, .. }] = steps[..] else { panic!("{steps:?}") };
    for message in 1..=5 {
        timed.ms += 100;
        timed.arrive([message]);
        assert_eq!(timed.delivered(), [(flow, vec![message])]);
        timed.freed(flow, 1);
        assert_eq!(timed.steps(), [], "the pull is still open");
    }
}

#[test]
fn message_after_one_that_is_being_settled_is_pulled_and_waits_for_its_credit() {
    let mut timed = TimedPump::new();
    let flow = timed.open(credit(1));
    timed.pull();
    timed.arrive([1]);
    assert_eq!(timed.delivered(), [(flow, vec![1])]);
    assert_eq!(timed.steps(), [], "the stream has no credit");
    timed.pump.settling(flow, 1, timed.now());
    assert_eq!(timed.pull().1, 1);
    timed.arrive([2]);
    assert_eq!(timed.delivered(), [], "its credit is not free yet");
    timed.freed(flow, 1);
    timed.pump.settling(flow, 0, timed.now());
    assert_eq!(timed.delivered(), [(flow, vec![2])]);
    assert_eq!(timed.steps(), [], "nothing more is asked for");
}

/// A settlement may take seconds. Each message that is pulled in vain costs an attempt.
#[test]
fn message_that_waits_for_its_credit_is_pulled_for_once() {
    let mut timed = TimedPump::new();
    let flow = timed.open(credit(5));
    timed.pull();
    timed.arrive(1..=5);
    timed.steps();
    timed.pump.settling(flow, 2, timed.now());
    timed.ms += 1;
    let (no, batch, _) = timed.pull();
    assert_eq!(batch, 2);
    timed.arrive([6]);
    timed.end(no, PullOutcome::Refused);
    timed.ms += 100;
    assert_eq!(timed.pull().1, 1, "one waits for its credit already");
    timed.arrive([7]);
    timed.ms += 100;
    assert_eq!((timed.steps(), timed.pump.parked()), (vec![], 2));
    timed.pump.settling(flow, 4, timed.now());
    timed.ms += 1;
    assert_eq!(timed.pull().1, 2, "for the messages that are settled now, too");
}

#[test]
fn message_that_waits_for_its_credit_takes_bytes_of_it() {
    let mut timed = TimedPump::new();
    let flow = timed.open(Credit { messages: 5, bytes: 8 * SMALL });
    timed.pull();
    timed.arrive(1..=5);
    timed.steps();
    timed.pump.settling(flow, 5, timed.now());
    timed.ms += 1;
    let (no, batch, _) = timed.pull();
    assert_eq!(batch, 2);
    timed.arrive_sized(6, 3 * SMALL);
    timed.end(no, PullOutcome::Refused);
    timed.ms += 100;
    assert_eq!(timed.steps(), []);
}

#[test]
fn message_that_was_pulled_for_a_settlement_that_failed_goes_back() {
    let mut timed = TimedPump::new();
    let flow = timed.open(credit(1));
    timed.pull();
    timed.arrive([1]);
    timed.steps();
    timed.pump.settling(flow, 1, timed.now());
    timed.pull();
    timed.arrive([2]);
    timed.pump.settling(flow, 0, timed.now());
    timed.ms += 1000;
    assert_eq!(timed.steps(), [Overdue { message: 2 }]);
}

#[test]
fn stream_holds_no_more_than_its_credit() {
    let mut timed = TimedPump::new();
    let flow = timed.open(credit(2));
    assert_eq!(timed.pull().1, 2);
    timed.arrive(1..=3);
    assert_eq!(timed.delivered(), [(flow, vec![1, 2])]);
    assert_eq!(timed.pump.parked(), 1);
    timed.freed(flow, 1);
    assert_eq!(timed.delivered(), [(flow, vec![3])]);
}

#[test]
fn last_message_may_pass_the_bytes_of_the_credit() {
    let mut timed = TimedPump::new();
    let flow = timed.open(Credit { messages: 10, bytes: SMALL + 1 });
    timed.steps();
    timed.arrive(1..=3);
    assert_eq!(timed.delivered(), [(flow, vec![1, 2])]);
    assert_eq!(timed.pump.parked(), 1);
}

#[test]
fn stream_that_only_fills_its_buffer_comes_after_everybody_else() {
    let mut timed = TimedPump::new();
    let full = timed.open(MANY);
    timed.steps();
    timed.arrive([1]);
    assert_eq!(timed.delivered(), [(full, vec![1])]);
    let (waiter, idle) = (timed.join(1, 30_000), timed.open(credit(9)));
    timed.arrive(2..=5);
    let steps = timed.steps();
    let sized = |messages: &[u32]| messages.iter().map(|one| (*one, SMALL)).collect();
    let due = [
        Deliver { flow: full, messages: sized(&[4]) },
        Deliver { flow: idle, messages: sized(&[3, 5]) },
        answer(waiter, [2], Why::Filled),
    ];
    assert_eq!(steps, due);
}

#[test]
fn idle_stream_is_before_a_waiter_that_came_later() {
    let mut timed = TimedPump::new();
    let flow = timed.open(credit(1));
    let waiter = timed.join(1, 30_000);
    timed.steps();
    timed.arrive([1]);
    assert_eq!(timed.delivered(), [(flow, vec![1])]);
    timed.freed(flow, 1);
    timed.arrive([2]);
    let steps = timed.steps();
    assert!(steps.contains(&answer(waiter, [2], Why::Filled)), "{steps:?}");
}

#[test]
fn small_pull_for_flows_waits_a_millisecond_to_grow() {
    let mut timed = TimedPump::new();
    let flow = timed.open(credit(10));
    timed.pull();
    timed.arrive(1..=10);
    assert_eq!(timed.delivered(), [(flow, (1..=10).collect())]);
    timed.freed(flow, 1);
    assert_eq!(timed.steps(), []);
    timed.freed(flow, 2);
    timed.ms += 1;
    assert_eq!(timed.pull(), (2, 3, 5000));
    timed.end(2, PullOutcome::Refused);
    timed.freed(flow, 7);
    timed.ms += 100;
    assert_eq!(timed.pull(), (3, 10, 5000));
}

#[test]
fn half_of_all_credit_is_pulled_for_at_once() {
    let mut timed = TimedPump::new();
    let flow = timed.open(credit(10));
    timed.pull();
    timed.arrive(1..=10);
    timed.steps();
    timed.freed(flow, 4);
    assert_eq!(timed.steps(), []);
    timed.freed(flow, 1);
    assert_eq!(timed.pull(), (2, 5, 5000));
}

/// JetStream holds such a pull until somebody settles, and then it brings the next message.
#[test]
fn pull_for_flows_is_not_bound_by_max_ack_pending() {
    let mut timed = TimedPump::new();
    timed.pump.set_limits(PullLimits { max_unsettled: 2, max_batch: 50, ..limits() });
    timed.open(MANY);
    assert_eq!(timed.pull().1, 50);
    timed.end(1, PullOutcome::RequestsPending);
    timed.join(10, 30_000);
    timed.join(10, 30_000);
    timed.ms = 60;
    assert_eq!(timed.pull().1, 1, "behind other pulls, a waiter asks for one message");
    timed.end(2, PullOutcome::Spent);
    assert_eq!(timed.pull().1, 2);
}

#[test]
fn waiter_at_a_pull_for_flows_is_answered_after_a_millisecond_of_quiet() {
    let mut timed = TimedPump::new();
    let flow = timed.open(credit(10));
    timed.pull();
    let waiter = timed.join(5, 30_000);
    timed.arrive(1..=3);
    assert_eq!(timed.steps(), [Deliver { flow, messages: vec![(1, SMALL)] }]);
    assert_eq!(timed.steps_at(1), [answer(waiter, [2, 3], Why::Filled)]);
}

#[test]
fn stalled_stream_gets_nothing_until_it_reads() {
    let mut timed = TimedPump::new();
    let flow = timed.open(MANY);
    timed.pull();
    timed.pump.stall_flow(flow, true, timed.now());
    timed.arrive([1]);
    assert_eq!((timed.delivered(), timed.pump.parked()), (vec![], 1));
    timed.pump.stall_flow(flow, false, timed.now());
    assert_eq!(timed.delivered(), [(flow, vec![1])]);
}

#[test]
fn paused_stream_gets_nothing_and_keeps_what_it_has() {
    let mut timed = TimedPump::new();
    let flow = timed.open(credit(2));
    timed.pull();
    timed.arrive([1]);
    assert_eq!(timed.delivered(), [(flow, vec![1])]);
    timed.pump.set_credit(flow, credit(0), timed.now());
    timed.arrive([2]);
    assert_eq!(timed.steps_at(999), []);
    assert_eq!(timed.steps_at(1000), [Overdue { message: 2 }]);
}

#[test]
fn messages_of_a_stream_that_closes_go_to_the_next_caller() {
    let mut timed = TimedPump::new();
    let flow = timed.open(MANY);
    timed.pull();
    timed.arrive(1..=3);
    timed.pump.close_flow(flow, timed.now());
    let waiter = timed.join(3, 30_000);
    assert_eq!(timed.answers(), [(waiter, vec![1, 2, 3])]);
}

#[test]
fn drain_delivers_what_the_open_pull_brings_and_ends_the_streams() {
    let mut timed = TimedPump::new();
    let (first, second) = (timed.open(credit(1)), timed.open(credit(1)));
    timed.pull();
    timed.pump.drain(timed.now());
    timed.arrive([1]);
    assert_eq!(timed.steps(), [Deliver { flow: first, messages: vec![(1, SMALL)] }]);
    timed.end(1, PullOutcome::Done);
    assert_eq!(timed.steps(), [Over { flow: first }, Over { flow: second }]);
    assert!(timed.pump.is_idle());
    let third = timed.open(credit(1));
    assert_eq!(timed.steps(), [Over { flow: third }]);
}
