//! The promises when a consumer changes or goes, or when its server forgets.

use std::time::Duration;

use fetch_proxy::lease::{
    ConsumerEnd, Due, LeaseId, LeaseStatus, PublishOutcome, SettleKind, Terms,
};

use super::{ACK_BY, CONSUMER, OVER, TimedTable};

#[test]
fn server_that_forgot_costs_one_second_and_recent_progress() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    timed.progressed(id, 5000, 5001);
    timed.distrust(5251);
    assert_eq!(timed.ack_by(id), 5000 + u128::from(ACK_BY) - 1000, "stored 250 ms before");
    timed.progressed(id, 6000, 6001);
    assert_eq!(timed.ack_by(id), 6000 + u128::from(ACK_BY), "a new start is not in doubt");
    timed.distrust(6250);
    timed.distrust(6250);
    assert_eq!(timed.ack_by(id), 5000 + u128::from(ACK_BY) - 1000, "not stored");
}

#[test]
fn new_server_counts_a_delivery_from_its_message() {
    let mut timed = TimedTable::new();
    let old = Duration::from_secs(3);
    let (id, _) = timed.table.grant(Terms { age: old, ..timed.terms(1, 0) }, "one");
    assert_eq!(timed.ack_by(id), u128::from(ACK_BY));
    timed.distrust(5000);
    assert_eq!(timed.ack_by(id), u128::from(ACK_BY) - 3000 - 1000);

    let (id, _) = timed.table.grant(Terms { age: old * 4, ..timed.terms(2, 5000) }, "two");
    timed.distrust(5001);
    assert_eq!(timed.begin(id, SettleKind::Ack, 5001).unwrap_err(), OVER, "given away at once");
}

#[test]
fn progress_from_before_a_lost_state_does_not_count() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    timed.distrust(5000);
    timed.progressed(id, 5000, 5100);
    assert_eq!(timed.ack_by(id), u128::from(ACK_BY) - 1000);
    timed.distrust(4000);
    timed.progressed(id, 4500, 5100);
    assert_eq!(timed.ack_by(id), u128::from(ACK_BY) - 1000, "it forgot at 5000 anyway");
    timed.progressed(id, 5001, 5100);
    assert_eq!(timed.ack_by(id), 5001 + u128::from(ACK_BY));
}

#[test]
fn deliveries_forgotten_by_the_server_are_lost() {
    let mut timed = TimedTable::new();
    let known = timed.granted();
    let (unknown, _) = timed.table.grant(timed.terms(2, 0), "two");
    assert_eq!(timed.table.lose_after(CONSUMER, 1, None, 100), None);
    assert_eq!(timed.begin(unknown, SettleKind::Ack, 1), Err(OVER));
    assert!(timed.begin(known, SettleKind::Ack, 1).is_ok());
    assert_eq!(timed.sweep(1), [Due::Lost { id: unknown, payload: "two" }]);
}

#[test]
fn new_ack_wait_counts_from_the_last_start_of_the_clock() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    timed.progressed(id, 5000, 5001);
    let after = timed.table.retune(CONSUMER, |_| Duration::from_secs(3), None, 100);
    assert_eq!((after, timed.ack_by(id)), (None, 5000 + 2700));
}

#[test]
fn unset_lease_follows_a_new_ack_wait_unlike_a_set_one() {
    for (length, due) in [(None, 2700), (Some(8000), 1500)] {
        let mut timed = TimedTable::new();
        let id = timed.granted();
        timed.table.assign(id, length.map(Duration::from_millis), timed.origin).unwrap();
        timed.table.retune(CONSUMER, |_| Duration::from_secs(3), None, 100);
        assert_eq!(timed.table.next_due(), Some(timed.at(due)));
    }
}

#[test]
fn longer_ack_wait_revives_no_ended_lease() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    timed.begin(id, SettleKind::Ack, ACK_BY - 1).unwrap();
    assert_eq!(timed.table.sweep(timed.at(ACK_BY), 100), []);
    timed.table.retune(CONSUMER, |_| Duration::from_secs(600), None, 100);
    assert_eq!(timed.finish(id, PublishOutcome::Unsent, ACK_BY), (LeaseStatus::Gone, Some("one")));
}

#[test]
fn new_ack_wait_revives_no_forgotten_delivery() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    timed.table.lose_after(CONSUMER, 0, None, 100);
    timed.table.retune(CONSUMER, |_| Duration::from_secs(600), None, 100);
    assert_eq!(timed.begin(id, SettleKind::Ack, 1), Err(OVER));
    assert_eq!(timed.sweep(1), [Due::Lost { id, payload: "one" }]);
}

#[test]
fn server_may_forget_in_the_first_second_of_the_table() {
    let mut timed = TimedTable::new();
    let terms = Terms { ack_wait: Duration::from_millis(1500), ..timed.terms(1, 0) };
    let id = timed.table.grant(terms, "one").0;
    timed.distrust(100);
    assert_eq!(timed.ack_by(id), 350);
    assert_eq!(timed.extend(id, 5000, 200), Ok(timed.at(5200)));
    assert_eq!(timed.sweep(200), [Due::Progress { id }], "a doubted start is renewed in time");
}

#[test]
fn walks_over_a_consumer_resume_where_they_stopped() {
    let mut timed = TimedTable::new();
    for sequence in 1..=5 {
        timed.table.grant(timed.terms(sequence, 0), "any");
    }
    let mut after = None;
    let mut steps = Vec::new();
    loop {
        after = timed.table.lose_after(CONSUMER, 0, after, 2);
        steps.push(after);
        if after.is_none() {
            break;
        }
    }
    assert_eq!(steps, [Some(2), Some(4), None]);
    assert_eq!(timed.sweep(0).len(), 5);
}

#[test]
fn leases_of_an_ended_consumer_are_refused_and_leave_in_steps() {
    let mut timed = TimedTable::new();
    for sequence in 1..=5 {
        timed.table.grant(timed.terms(sequence, 0), "any");
    }
    let settling = LeaseId::new(2).unwrap();
    timed.begin(settling, SettleKind::Ack, 0).unwrap();
    timed.table.end_consumer(CONSUMER, ConsumerEnd::Gone);
    assert_eq!(timed.begin(LeaseId::new(1).unwrap(), SettleKind::Ack, 0), Err(OVER));
    assert_eq!(timed.table.next_due(), Some(timed.origin));
    let steps: Vec<usize> = (0..3).map(|_| timed.table.sweep(timed.origin, 2).len()).collect();
    assert_eq!(steps, [1, 2, 1], "two looked at in each, one of them being settled");
    assert_eq!(timed.table.next_due(), None);
    assert_eq!(timed.finish(settling, PublishOutcome::Unsent, 1), (LeaseStatus::Gone, Some("any")));
    assert!(timed.table.is_empty());
}
