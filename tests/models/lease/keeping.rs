//! The promises of leases that live as long as a stream.

use std::time::Duration;

use fetch_proxy::lease::{
    Assigned, ConsumerEnd, Due, LeaseOutcome, LeaseStatus, PublishOutcome, SettleKind,
};

use super::{ACK_BY, CONSUMER, TimedTable};

#[test]
fn kept_lease_ends_after_the_grace_of_its_stream() {
    let mut timed = TimedTable::new();
    let (id, seconds) = (timed.granted(), Duration::from_secs);
    let kept = timed.table.assign_kept(id, (seconds(60), seconds(2)), timed.origin);
    // The stream may end at once, and another worker may have the message after the grace.
    assert_eq!(kept, Ok(Assigned { deadline: timed.at(60_000), settle_by: timed.at(2000) }));
    assert_eq!(timed.sweep(5000), [Due::Progress { id }], "it outlives the ack wait");
    timed.progressed(id, 5000, 5001);
    timed.table.end_kept(id, timed.at(6000));
    timed.table.end_kept(id, timed.at(7000));
    assert_eq!(timed.sweep(7999), []);
    let release = Some(timed.at(5000 + ACK_BY));
    assert_eq!(timed.sweep(8000), [Due::Lapsed { id, payload: "one", release }]);
}

#[test]
fn grace_never_makes_a_kept_lease_longer_and_may_be_nothing() {
    for (grace, end) in [(100, 8000), (0, 3000)] {
        let mut timed = TimedTable::new();
        let (id, seconds) = (timed.granted(), Duration::from_secs);
        timed.table.assign_kept(id, (seconds(8), seconds(grace)), timed.origin).unwrap();
        timed.table.end_kept(id, timed.at(3000));
        assert_eq!(timed.table.next_due(), Some(timed.at(end)));
    }
}

#[test]
fn extension_takes_a_lease_out_of_its_stream() {
    let mut timed = TimedTable::new();
    let (id, seconds) = (timed.granted(), Duration::from_secs);
    timed.table.assign_kept(id, (seconds(60), seconds(1)), timed.origin).unwrap();
    assert_eq!(timed.extend(id, 8000, 500), Ok(timed.at(8500)));
    timed.table.end_kept(id, timed.at(1000));
    assert_eq!(timed.table.next_due(), Some(timed.at(8500)));
    let again = timed.table.extend(id, None, timed.at(1000));
    assert_eq!(again, Ok(timed.at(1000 + ACK_BY)), "as long as JetStream waits");
}

#[test]
fn settlement_that_fails_after_the_end_of_its_stream_keeps_no_lease() {
    let mut timed = TimedTable::new();
    let (id, seconds) = (timed.granted(), Duration::from_secs);
    timed.table.assign_kept(id, (seconds(60), seconds(1)), timed.origin).unwrap();
    timed.begin(id, SettleKind::Ack, 500).unwrap();
    timed.table.end_kept(id, timed.at(600));
    assert_eq!(timed.finish(id, PublishOutcome::Unsent, 700).0, LeaseStatus::Held);
    assert_eq!(timed.table.next_due(), Some(timed.at(1600)));
}

#[test]
fn end_of_a_lease_is_told_unless_it_is_here_or_has_moved() {
    let mut timed = TimedTable::new();
    let [held, acked, lapsed, moved] = [1, 2, 3, 4].map(|sequence| {
        let id = timed.table.grant(timed.terms(sequence, 0), "any").0;
        timed.table.assign(id, None, timed.origin).unwrap();
        id
    });
    timed.settle(acked, SettleKind::Ack, PublishOutcome::Confirmed, 10);
    timed.table.assign(lapsed, Some(Duration::from_millis(20)), timed.at(10)).unwrap();
    timed.sweep(40);
    timed.table.remove_moved(moved);
    let by = SettleKind::Ack;
    assert_eq!(timed.table.end_of(acked), Some(LeaseOutcome::Settled { by }));
    assert_eq!(timed.table.end_of(lapsed), Some(LeaseOutcome::Expired));
    assert_eq!((timed.table.end_of(held), timed.table.end_of(moved)), (None, None));
    timed.begin(held, SettleKind::Nak, 50).unwrap();
    timed.table.grant(timed.terms(1, 60), "again");
    let by = SettleKind::Nak;
    assert_eq!(timed.table.end_of(held), Some(LeaseOutcome::Settled { by }), "it came again");
    for (how, outcome) in [
        (ConsumerEnd::Gone, LeaseOutcome::ConsumerGone),
        (ConsumerEnd::Reset, LeaseOutcome::Expired),
    ] {
        let mut timed = TimedTable::new();
        let id = timed.granted();
        timed.table.end_consumer(CONSUMER, how);
        timed.sweep(0);
        assert_eq!(timed.table.end_of(id), Some(outcome), "{how:?}");
    }
}
