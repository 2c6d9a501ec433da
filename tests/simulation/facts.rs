//! The model does the same as nats-server 2.15.1 did when it was measured. Pure: no runtime, no clock.
//! Most facts that a client can see are promises of tests/broker/contract, too, which runs them on the model
//! and on a real server.

mod leaders;

use std::{collections::VecDeque, time::Duration};

use fetch_proxy::broker::{AckKind, ConsumerInfo, ConsumerName, Delivery, PullEnd, PullRequest};

use super::jetstream::{Answered, Config, Connection, InboxId, JetStream, Sent, Time};

const CLIENT: Connection = Connection(1);

/// A delivery has expired after so many milliseconds, if the ack wait is a second (ackWaitDelay).
const EXPIRED: u64 = 1_001;

/// A message by its stream sequence and attempt, or the end of a pull.
type FactResult = Result<(u64, u64), PullEnd>;

struct Lab {
    servers: JetStream,
    now: Time,
    pulls: u64,
    /// Everything that the servers have sent and no test has looked at.
    sent: VecDeque<Sent>,
}

fn name() -> ConsumerName {
    ConsumerName { stream: "S".into(), consumer: "worker".into() }
}

fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

impl Lab {
    /// So many messages, and a consumer.
    fn new(messages: u64, config: Config) -> Self {
        let mut servers = JetStream::new();
        servers.connect(CLIENT);
        servers.add_stream("S");
        servers.add_consumer(&name(), config);
        let mut lab = Self { servers, now: Duration::ZERO, pulls: 0, sent: VecDeque::new() };
        for _ in 0..messages {
            lab.publish();
        }
        lab
    }

    fn publish(&mut self) {
        self.servers.publish("S", "x".into(), false, self.now);
    }

    fn wait(&mut self, time: u64) {
        let until = self.now + millis(time);
        while let Some(due) = self.servers.next_due(self.now).filter(|due| *due <= until) {
            self.now = self.now.max(due);
            self.servers.advance(self.now);
        }
        self.now = until;
        self.servers.advance(until);
    }

    /// Opens a pull on an inbox of this number.
    fn pull(&mut self, inbox: u64, batch: u32, expires: u64, no_wait: bool) {
        self.pulls += 1;
        let to = InboxId { connection: CLIENT, inbox };
        let (no, expires, max_bytes) = (self.pulls, millis(expires), None);
        let asked = PullRequest { no, batch, expires, no_wait, max_bytes };
        assert!(self.servers.pull(&name(), to, asked, self.now));
    }

    /// Takes everything that was sent to an inbox so far.
    fn arrived(&mut self) -> Vec<Sent> {
        self.sent.extend(self.servers.sent());
        self.sent.drain(..).collect()
    }

    /// The arrivals of each inbox: the stream sequence and the attempt, or the end.
    fn sent(&mut self) -> Vec<(u64, FactResult)> {
        let fact = |sent| match sent {
            Sent::Message { to, delivery, .. } => {
                Some((to.inbox, Ok((delivery.stream_sequence, delivery.delivery_count))))
            }
            Sent::End { to, end, .. } => Some((to.inbox, Err(end))),
            Sent::Answer { .. } => None,
        };
        self.arrived().into_iter().filter_map(fact).collect()
    }

    /// Pulls the messages that are available, and returns the deliveries.
    fn take(&mut self, batch: u32) -> Vec<Delivery> {
        self.pull(0, batch, 60_000, true);
        let delivery = |sent| match sent {
            Sent::Message { delivery, .. } => Some(delivery),
            Sent::End { .. } | Sent::Answer { .. } => None,
        };
        self.arrived().into_iter().filter_map(delivery).collect()
    }

    fn sequences(&mut self, batch: u32) -> Vec<u64> {
        self.take(batch).iter().map(|one| one.stream_sequence).collect()
    }

    /// The answer to an ack. `None`: there is none now.
    fn say(&mut self, of: &Delivery, kind: AckKind) -> Option<Answered> {
        self.sent.extend(self.servers.sent());
        self.servers.ack(CLIENT, &of.ack.0, &kind, Some(1), self.now);
        let (answers, rest): (Vec<Sent>, Vec<Sent>) =
            self.servers.sent().into_iter().partition(|one| matches!(one, Sent::Answer { .. }));
        self.sent.extend(rest);
        answers.into_iter().find_map(|answer| match answer {
            Sent::Answer { answered, .. } => Some(answered),
            Sent::Message { .. } | Sent::End { .. } => None,
        })
    }

    fn info(&self) -> ConsumerInfo {
        self.servers.info(CLIENT, &name(), self.now).unwrap().unwrap()
    }

    /// The time until a waiting pull has the next message, in milliseconds.
    fn until_next(&mut self) -> (u128, Delivery) {
        let began = self.now;
        self.pull(0, 1, 60_000, false);
        loop {
            self.sent.extend(self.servers.sent());
            if let Some(Sent::Message { delivery, .. }) = self.sent.pop_front() {
                return ((self.now - began).as_millis(), delivery);
            }
            self.now = self.servers.next_due(self.now).expect("something happens");
            self.servers.advance(self.now);
        }
    }
}

fn config(ack_wait: u64) -> Config {
    Config::new(millis(ack_wait))
}

/// Measured: Naks of 3, 1 and 2 of five messages, and 3, 1, 2, 4, 5 came.
#[test]
fn naks_come_back_in_their_order_before_new_messages_and_beyond_max_ack_pending() {
    let mut lab = Lab::new(5, Config { max_ack_pending: Some(3), ..config(10_000) });
    let out = lab.take(3);
    for place in [2, 0, 1] {
        lab.say(&out[place], AckKind::Nak(None));
    }
    assert_eq!(lab.sequences(3), [3, 1, 2]);
    assert_eq!(lab.sequences(5), [0; 0], "the limit is reached");
}

/// consumer.go:6154, and measured by the contract.
#[test]
fn expired_messages_come_back_in_the_order_of_the_stream() {
    let mut lab = Lab::new(3, config(1_000));
    lab.take(3);
    lab.wait(EXPIRED);
    assert_eq!(lab.sequences(3), [1, 2, 3]);
}

/// Measured: a Nak of 1 s with a backoff of 1, 3 and 5 s took 1.00, 3.00, 5.00 and 5.00 s.
#[test]
fn a_delayed_nak_is_measured_from_the_first_ack_wait_of_a_backoff() {
    let backoff = vec![millis(1_000), millis(3_000), millis(5_000)];
    let mut lab = Lab::new(1, Config { backoff, ..config(1_000) });
    let mut delivery = lab.take(1).remove(0);
    let mut waits = Vec::new();
    for _ in 0..4 {
        lab.say(&delivery, AckKind::Nak(Some(millis(1_000))));
        let (waited, next) = lab.until_next();
        waits.push(waited);
        delivery = next;
    }
    assert_eq!(waits, [1_000, 3_000, 5_000, 5_000]);
}

/// Measured: backoff 1, 3 and 5 s, progress 1 s into the second attempt, and the third came at 4.00 s. After
/// the ack wait, the next pull had the message 0.00 s after the progress.
#[test]
fn progress_restarts_the_wait_of_this_attempt_and_does_not_help_after_it() {
    let backoff = vec![millis(1_000), millis(3_000), millis(5_000)];
    let mut lab = Lab::new(1, Config { backoff, ..config(1_000) });
    lab.take(1);
    let (_, second) = lab.until_next();
    lab.wait(1_000);
    lab.say(&second, AckKind::Progress);
    let (waited, third) = lab.until_next();
    assert_eq!((waited, third.delivery_count), (3_000, 3));
    lab.wait(5_000);
    lab.say(&third, AckKind::Progress);
    assert_eq!(lab.until_next().0, 0, "it was in line already");
}

/// Measured: all kinds of acks, and a subject with forged counts of 99 and 77.
#[test]
fn a_stale_ack_subject_settles_the_delivery_of_another_and_forged_numbers_do_too() {
    let mut lab = Lab::new(1, config(1_000));
    let stale = lab.take(1).remove(0);
    lab.wait(EXPIRED);
    let current = lab.take(1).remove(0);
    assert_eq!(current.delivery_count, 2);
    assert_eq!(lab.say(&stale, AckKind::Ack), Some(Answered::Ok));
    assert_eq!(lab.servers.unsettled(&name()), [0; 0]);
    let again = lab.say(&current, AckKind::Ack);
    assert_eq!(again, Some(Answered::Ok), "an answer as if it had an effect");
}

/// Measured at a consumer that was deleted and created again, and at one that was reset (consumer.go:3757).
#[test]
fn an_ack_of_a_message_that_was_never_delivered_has_no_answer() {
    let mut lab = Lab::new(2, config(1_000));
    let second = lab.take(2).remove(1);
    lab.servers.reset(&name(), 1, lab.now);
    assert_eq!(lab.say(&second, AckKind::Ack), None);
    lab.servers.delete_consumer(&name());
    assert_eq!(lab.say(&second, AckKind::Ack), Some(Answered::NoResponders));
}

/// Measured: with a limit of two, the message was still pending after its second ack wait, until a pull came.
#[test]
fn one_attempt_is_over_with_its_ack_wait_and_more_when_the_next_pull_asks() {
    let pending = |most| {
        let mut lab = Lab::new(1, Config { max_deliver: Some(most), ..config(1_000) });
        for _ in 0..most {
            lab.take(1);
            lab.wait(EXPIRED);
        }
        let before = lab.servers.unsettled(&name()).len();
        lab.pull(1, 1, 100, false);
        (before, lab.servers.unsettled(&name()).len())
    };
    assert_eq!(pending(1), (0, 0));
    assert_eq!(pending(2), (1, 0));
}

/// Measured: two pulls of three messages, and four messages: 1 and 3, 2 and 4.
#[test]
fn waiting_pulls_are_served_in_turn() {
    let mut lab = Lab::new(0, config(10_000));
    lab.pull(1, 3, 60_000, false);
    lab.pull(2, 3, 60_000, false);
    for _ in 0..4 {
        lab.publish();
    }
    let sent = lab.sent();
    let inboxes: Vec<u64> = sent.iter().map(|(inbox, _)| *inbox).collect();
    assert_eq!(inboxes, [1, 2, 1, 2]);
}

/// Measured: a pull behind a waiting pull of ten, at `max_ack_pending`, ended within 1 ms.
#[test]
fn a_one_shot_ends_if_others_wait_for_the_pending_messages() {
    let mut lab = Lab::new(1, Config { max_ack_pending: Some(1), ..config(10_000) });
    lab.take(1);
    lab.publish();
    lab.pull(1, 10, 5_000, false);
    lab.pull(2, 10, 5_000, true);
    assert_eq!(lab.sent(), [(2, Err(PullEnd::RequestsPending))]);
}

/// Measured: no end within 15 s without an expiry (consumer.go:5566).
#[test]
fn nothing_but_time_ends_a_one_shot_at_max_ack_pending() {
    let mut lab = Lab::new(3, Config { max_ack_pending: Some(2), ..config(10_000) });
    lab.pull(1, 5, 500, true);
    assert_eq!(lab.sent(), [(1, Ok((1, 1))), (1, Ok((2, 1)))]);
    lab.wait(499);
    assert_eq!(lab.sent(), []);
    lab.wait(1);
    assert_eq!(lab.sent(), [(1, Err(PullEnd::Done))]);
}

/// consumer.go:1909, and measured over a kill of a server and over a change of leader.
#[test]
fn a_leader_that_comes_hands_out_at_once_what_is_older_than_its_ack_wait() {
    let mut lab = Lab::new(1, Config { replicas: 3, ..config(5_000) });
    lab.wait(4_000);
    lab.take(1);
    lab.wait(1_000);
    lab.servers.change_leader(&name(), Duration::ZERO, lab.now);
    assert_eq!(lab.until_next().0, 0, "published 5 s ago, delivered 1 s ago");
}

/// Measured for the Nak: it came back 5.8 s after the change of leader, with an ack wait of 6 s.
#[test]
fn a_leader_that_comes_may_have_forgotten_the_newest_progress_and_every_plain_nak() {
    let left = |before: u64, forgets: u64| {
        let mut lab = Lab::new(1, Config { replicas: 3, ..config(5_000) });
        let delivery = lab.take(1).remove(0);
        lab.wait(4_000);
        lab.say(&delivery, AckKind::Progress);
        lab.wait(before);
        lab.servers.change_leader(&name(), millis(forgets), lab.now);
        lab.until_next().0
    };
    assert_eq!(left(300, 250), 4_700);
    assert_eq!(left(100, 250), 900, "as if there had been no progress");
    let mut lab = Lab::new(1, Config { replicas: 3, ..config(5_000) });
    let delivery = lab.take(1).remove(0);
    lab.say(&delivery, AckKind::Nak(None));
    lab.servers.change_leader(&name(), Duration::ZERO, lab.now);
    assert_eq!(lab.until_next().0, 5_000);
}

/// Measured: 200 acks confirmed, then a kill. After the start, none was acked, and 179 were not delivered.
#[test]
fn a_crash_without_copies_undoes_the_newest_acks_and_deliveries() {
    let mut lab = Lab::new(2, config(5_000));
    let first = lab.take(1).remove(0);
    lab.wait(300);
    assert_eq!(lab.say(&first, AckKind::Ack), Some(Answered::Ok));
    lab.take(1);
    lab.wait(50);
    lab.servers.restart(millis(100), true, lab.now);
    lab.servers.connect(CLIENT);
    assert_eq!(lab.servers.unsettled(&name()), [1, 2], "both confirmed, and forgotten");
    let second = lab.take(1).remove(0);
    assert_eq!((second.stream_sequence, second.delivery_count), (2, 1), "its first attempt again");
}

/// Not measured: the disk has the consumer, and not the file of its state.
#[test]
fn consumer_without_a_disk_starts_again_from_the_first_message() {
    let mut lab = Lab::new(2, config(5_000));
    lab.take(2);
    lab.wait(1_000);
    lab.servers.restart(Duration::ZERO, false, lab.now);
    lab.servers.connect(CLIENT);
    let again = lab.take(2);
    assert_eq!(again.iter().map(|one| one.consumer_sequence).collect::<Vec<_>>(), [1, 2]);
}

/// Measured: a pull at a paused consumer waits for its time, without a status.
#[test]
fn a_paused_consumer_hands_nothing_out_and_does_not_say_so() {
    let mut lab = Lab::new(1, config(5_000));
    lab.servers.pause(&name(), Some(millis(2_000)), lab.now);
    lab.pull(1, 1, 1_000, true);
    lab.wait(1_000);
    assert_eq!(lab.sent(), [(1, Err(PullEnd::Done))]);
    assert_eq!(lab.until_next().0, 1_000);
}

/// Measured for a deleted message and for a purge.
#[test]
fn a_message_that_was_removed_is_not_pending_and_its_ack_is_answered() {
    let mut lab = Lab::new(1, config(5_000));
    let delivery = lab.take(1).remove(0);
    lab.servers.remove("S", 1, lab.now);
    assert_eq!(lab.servers.unsettled(&name()), [0; 0]);
    assert_eq!(lab.say(&delivery, AckKind::Ack), Some(Answered::Ok));
}

/// Measured: `409 Consumer Deleted`, and `409 Leadership Change` with copies.
#[test]
fn a_consumer_that_is_deleted_or_loses_its_leader_ends_its_pulls() {
    let end = |act: fn(&mut Lab)| {
        let mut lab = Lab::new(0, Config { replicas: 3, ..config(5_000) });
        lab.pull(1, 1, 60_000, true);
        act(&mut lab);
        lab.sent()
    };
    let deleted = end(|lab| lab.servers.delete_consumer(&name()));
    assert_eq!(deleted, [(1, Err(PullEnd::ConsumerGone))]);
    let changed = end(|lab| lab.servers.change_leader(&name(), Duration::ZERO, lab.now));
    assert_eq!(changed, [(1, Err(PullEnd::LeaderGone))]);
    assert_eq!(end(|lab| lab.servers.delete_stream("S")), [(1, Err(PullEnd::ConsumerGone))]);
}

/// consumer.go:4692 and :4784, and measured by the contract.
#[test]
fn a_pull_beyond_a_limit_ends_at_once_with_the_limit() {
    let config = Config { max_batch: Some(2), max_waiting: 1, ..config(5_000) };
    let mut lab = Lab::new(0, config);
    lab.pull(1, 3, 1_000, false);
    lab.pull(1, 1, 1_000, false);
    lab.pull(2, 1, 1_000, false);
    let busy = |text: &str| Err(PullEnd::Busy(text.to_owned()));
    let expected = [(1, busy("Exceeded MaxRequestBatch of 2")), (2, busy("Exceeded MaxWaiting"))];
    assert_eq!(lab.sent(), expected);
}

/// consumer.go:6617, and measured by the contract.
#[test]
fn a_purge_settles_messages_and_forgets_naks() {
    let mut lab = Lab::new(3, config(1_000));
    for delivery in lab.take(3) {
        lab.say(&delivery, AckKind::Nak(None));
    }
    lab.servers.purge("S", 2, lab.now);
    assert_eq!(lab.servers.unsettled(&name()), [2, 3]);
    assert_eq!(lab.sequences(3), [0; 0]);
    lab.wait(EXPIRED);
    assert_eq!(lab.sent()[..2], [(0, Ok((2, 2))), (0, Ok((3, 2)))]);
}

/// Measured by the contract, with a coarser clock.
#[test]
fn messages_leave_their_stream_when_they_are_too_old() {
    let mut lab = Lab::new(1, config(5_000));
    lab.take(1);
    lab.wait(600);
    lab.publish();
    lab.servers.set_max_age("S", Some(millis(1_000)), lab.now);
    lab.wait(399);
    assert_eq!(lab.servers.unsettled(&name()), [1, 2]);
    lab.wait(1);
    assert_eq!(lab.servers.unsettled(&name()), [2]);
}
