//! Leaders that crash, leave, lag, or are cut off, and servers that stop and start.

use std::collections::BTreeSet;

use fetch_proxy::broker::{AckKind, PullEnd};

use super::{
    super::jetstream::{Answered, Config, Connection, InboxId, Time},
    Lab, config, millis, name,
};

/// A client on the side of the majority.
const OTHER: Connection = Connection(2);

fn replicated(ack_wait: u64) -> Config {
    Config { replicas: 3, ..config(ack_wait) }
}

/// Measured with two of three servers stopped, and consumer.go:5990, :3127.
#[test]
fn deliveries_and_acks_wait_for_a_majority_and_progress_does_not() {
    let mut lab = Lab::new(1, replicated(5_000));
    lab.servers.lag(&name(), millis(30));
    lab.pull(1, 1, 1_000, true);
    assert_eq!(lab.sent(), []);
    lab.wait(30);
    assert_eq!(lab.sent(), [(1, Ok((1, 1)))]);
    lab.servers.lag(&name(), millis(0));
    lab.wait(5_000);
    let delivery = lab.take(1).remove(0);
    lab.servers.lag(&name(), millis(30));
    assert_eq!(lab.say(&delivery, AckKind::Progress), Some(Answered::Ok));
    assert_eq!(lab.say(&delivery, AckKind::Ack), None, "not yet");
    lab.wait(30);
    assert!(!lab.arrived().is_empty(), "the answer");
}

/// consumer.go:1729: a leader that goes drops the answers that it owes.
#[test]
fn an_ack_without_a_majority_is_lost_with_its_leader_and_kept_if_the_leader_leaves_in_order() {
    let left = |crash: bool| {
        let mut lab = Lab::new(1, replicated(5_000));
        let delivery = lab.take(1).remove(0);
        lab.wait(1_000);
        lab.servers.lag(&name(), millis(30));
        assert_eq!(lab.say(&delivery, AckKind::Ack), None);
        if crash {
            lab.servers.lose_leader(&name(), lab.now);
        } else {
            lab.servers.step_down(&name(), lab.now);
        }
        lab.servers.change_leader(&name(), millis(30), lab.now);
        lab.wait(100);
        assert_eq!(lab.arrived(), [], "nobody answers for the last leader");
        lab.servers.unsettled(&name())
    };
    assert_eq!((left(true), left(false)), (vec![1], vec![]));
}

#[test]
fn an_ack_that_was_answered_is_never_lost_with_copies() {
    let mut lab = Lab::new(1, replicated(5_000));
    let delivery = lab.take(1).remove(0);
    assert_eq!(lab.say(&delivery, AckKind::Ack), Some(Answered::Ok));
    lab.servers.lose_leader(&name(), lab.now);
    lab.servers.change_leader(&name(), millis(250), lab.now);
    assert_eq!(lab.servers.unsettled(&name()), [0; 0]);
}

/// Measured: two acks of one message at the same time, each with a reply subject, and one reply.
#[test]
fn one_of_two_acks_of_a_message_at_the_same_time_has_an_answer() {
    let mut lab = Lab::new(1, replicated(5_000));
    let delivery = lab.take(1).remove(0);
    lab.servers.lag(&name(), millis(30));
    assert_eq!(lab.say(&delivery, AckKind::Ack), None);
    assert_eq!(lab.say(&delivery, AckKind::Ack), None);
    lab.wait(30);
    assert_eq!(lab.arrived().len(), 1);
}

/// Measured on three servers, a leader killed, and consumer.go:3213.
#[test]
fn pulls_of_a_dead_leader_end_when_the_next_one_comes_and_those_of_a_dead_server_do_not() {
    let ends = |replicas| {
        let mut lab = Lab::new(0, Config { replicas, clustered: true, ..config(5_000) });
        lab.pull(1, 1, 60_000, true);
        lab.servers.lose_leader(&name(), lab.now);
        lab.wait(3_000);
        assert_eq!(lab.sent(), []);
        lab.servers.change_leader(&name(), millis(0), lab.now);
        lab.sent()
    };
    assert_eq!(ends(3), [(1, Err(PullEnd::LeaderGone))]);
    assert_eq!(ends(1), []);
}

/// Measured on three servers of 2.15.1, a leader killed: 503 for pulls and acks, no INFO, until 5.4 s later.
#[test]
fn nobody_listens_between_two_leaders() {
    for crash in [true, false] {
        let mut lab = Lab::new(1, replicated(5_000));
        let delivery = lab.take(1).remove(0);
        if crash {
            lab.servers.lose_leader(&name(), lab.now);
        } else {
            lab.servers.step_down(&name(), lab.now);
        }
        assert_eq!(lab.say(&delivery, AckKind::Ack), Some(Answered::NoResponders));
        assert_eq!(lab.servers.info(super::CLIENT, &name(), lab.now), None);
        lab.servers.change_leader(&name(), millis(0), lab.now);
        assert_eq!(lab.info().ack_pending, 1);
    }
}

/// Measured on three servers: a consumer without copies, whose server was killed and started again.
#[test]
fn a_change_of_leader_shows_with_copies_or_at_a_single_server() {
    let shows = |config: Config| {
        let mut lab = Lab::new(0, config);
        let before = lab.info();
        lab.servers.lose_leader(&name(), lab.now);
        lab.servers.change_leader(&name(), millis(0), lab.now);
        let after = lab.info();
        assert_eq!(after.leader_shows, before.leader_shows);
        (after.leader_shows, after.leader != before.leader)
    };
    assert_eq!(shows(replicated(1_000)), (true, true));
    assert_eq!(shows(config(1_000)), (true, true));
    assert_eq!(shows(Config { clustered: true, ..config(1_000) }), (false, false));
    let untold = Config { tells_since: false, ..replicated(1_000) };
    assert_eq!(shows(untold), (false, true), "by its name alone, before nats-server 2.12");
}

/// Measured with two of three servers stopped. raft.go:307: a leader notices after 10 s, and looks every 10 s.
#[test]
fn a_leader_that_is_cut_off_still_answers_its_side_for_some_time() {
    let mut lab = Lab::new(2, replicated(5_000));
    lab.servers.connect(OTHER);
    let delivery = lab.take(1).remove(0);
    let before = lab.info();
    lab.servers.isolate_leader(&name(), BTreeSet::from([super::CLIENT]), lab.now);
    let other = |lab: &Lab| lab.servers.info(OTHER, &name(), lab.now);
    assert_eq!(other(&lab), None);
    lab.wait(4_000);
    assert_eq!(lab.say(&delivery, AckKind::Progress), Some(Answered::Ok), "without effect");
    assert_eq!(lab.say(&delivery, AckKind::Ack), None);
    lab.servers.change_leader(&name(), millis(0), lab.now);
    assert_ne!(other(&lab).unwrap().unwrap().leader, before.leader);
    assert_eq!(lab.info().leader, before.leader, "INFO lags");
    assert_eq!(lab.sequences(1), [0; 0], "nothing comes from the old leader");
    lab.wait(1_000);
    let to = InboxId { connection: OTHER, inbox: 9 };
    let asked = fetch_proxy::broker::PullRequest {
        no: 9,
        batch: 1,
        expires: millis(1_000),
        no_wait: true,
        max_bytes: None,
    };
    assert!(lab.servers.pull(&name(), to, asked, lab.now));
    assert_eq!(lab.sent(), [(9, Ok((1, 2)))], "published an ack wait ago");
    lab.wait(15_000);
    assert_eq!(lab.servers.info(super::CLIENT, &name(), lab.now), None, "it has noticed");
    lab.servers.heal(&name(), lab.now);
    assert_ne!(lab.info().leader, before.leader);
}

#[test]
fn a_leader_that_was_cut_off_continues_if_no_other_has_come() {
    let mut lab = Lab::new(2, replicated(5_000));
    let delivery = lab.take(1).remove(0);
    let leader = lab.info().leader;
    lab.servers.isolate_leader(&name(), BTreeSet::from([super::CLIENT]), lab.now);
    lab.wait(1_000);
    assert_eq!(lab.say(&delivery, AckKind::Ack), None);
    assert_eq!(lab.sequences(1), [0; 0], "the second message waits for a majority");
    lab.servers.heal(&name(), lab.now);
    lab.wait(1);
    assert_eq!(lab.arrived().len(), 2, "an answer and a message");
    assert_eq!(lab.info().leader, leader);
    assert_eq!(lab.servers.unsettled(&name()), [2]);
}

/// Measured: `409 Server Shutdown` for pulls without copies, and most of the newest changes are written.
#[test]
fn servers_that_stop_in_order_end_their_pulls() {
    let mut lab = Lab::new(1, config(5_000));
    let delivery = lab.take(1).remove(0);
    lab.pull(1, 1, 60_000, true);
    assert_eq!(lab.say(&delivery, AckKind::Ack), Some(Answered::Ok));
    lab.servers.shut_down(lab.now);
    assert_eq!(lab.sent(), [(1, Err(PullEnd::LeaderGone))]);
    lab.servers.restart(millis(0), true, lab.now);
    assert_eq!(lab.servers.unsettled(&name()), [0; 0]);
}

/// Measured on one server after a SIGUSR2.
#[test]
fn jetstream_that_leaves_in_lame_duck_mode_does_not_end_its_pulls() {
    let mut lab = Lab::new(1, config(5_000));
    let delivery = lab.take(1).remove(0);
    lab.pull(1, 1, 1_000, true);
    lab.servers.leave_in_lame_duck_mode(lab.now);
    lab.wait(2_000);
    assert_eq!(lab.sent(), []);
    assert_eq!(lab.say(&delivery, AckKind::Ack), Some(Answered::NoResponders));
    lab.servers.restart(millis(0), true, lab.now);
    assert_eq!(lab.servers.unsettled(&name()), [1]);
}

/// store.go:521, and seen over a kill: the start of an ack clock is stored in whole seconds.
#[test]
fn a_server_that_starts_counts_from_whole_seconds() {
    let mut lab = Lab::new(1, config(5_000));
    let delivery = lab.take(1).remove(0);
    lab.wait(1_700);
    lab.say(&delivery, AckKind::Progress);
    lab.wait(300);
    lab.servers.restart(millis(100), true, lab.now);
    lab.servers.connect(super::CLIENT);
    assert_eq!(lab.until_next().0, 4_000, "an ack wait after 1 s");
}

#[test]
fn a_crash_forgets_more_the_longer_the_disk_was_not_written() {
    let left = |forgets: Time| {
        let mut lab = Lab::new(3, config(5_000));
        for delivery in lab.take(3) {
            lab.wait(100);
            lab.say(&delivery, AckKind::Ack);
        }
        lab.servers.restart(forgets, true, lab.now);
        lab.servers.unsettled(&name()).len()
    };
    assert_eq!([left(millis(0)), left(millis(50)), left(millis(150))], [0, 1, 2]);
    assert_eq!(left(millis(10_000)), 3, "but not older than the longest time");
}
