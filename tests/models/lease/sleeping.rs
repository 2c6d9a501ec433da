//! The promises when the clock of the callers stood still, because the machine was suspended.

use std::time::Duration;

use fetch_proxy::lease::{Due, LeaseStatus, PublishOutcome, SettleKind, Terms};

use super::{ACK_BY, OVER, TimedTable};

impl TimedTable {
    fn slept(&mut self, gap: u64, now: u64) {
        let now = self.at(now);
        self.table.slept(Duration::from_millis(gap), now);
    }
}

#[test]
fn every_clock_of_a_lease_runs_while_the_machine_sleeps() {
    let mut timed = TimedTable::new();
    let id = timed.granted();
    timed.slept(4000, 1000);
    assert_eq!(timed.ack_by(id), u128::from(ACK_BY) - 4000);
    assert!(timed.begin(id, SettleKind::Ack, ACK_BY - 4000 - 1).is_ok());
    let mut timed = TimedTable::new();
    let id = timed.assigned(2000);
    timed.slept(1500, 100);
    assert_eq!(timed.table.next_due(), Some(timed.at(500)), "the holder's clock, too");
    assert_eq!(timed.begin(id, SettleKind::Ack, 500), Err(OVER));
}

#[test]
fn lease_that_ended_during_a_sleep_settles_nothing() {
    let mut timed = TimedTable::new();
    let id = timed.granted();
    timed.slept(60_000, 1);
    for kind in [SettleKind::Ack, SettleKind::Nak, SettleKind::Term] {
        assert_eq!(timed.begin(id, kind, 1), Err(OVER));
    }
    // A caller that read the clock before the gap was noticed gets no more.
    assert_eq!(timed.begin(id, SettleKind::Ack, 0), Err(OVER));
    assert_eq!(timed.sweep(1), [Due::Lapsed { id, payload: "one", release: None }]);
}

#[test]
fn progress_sent_before_a_sleep_counts_from_before_it() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    timed.slept(3000, 1000);
    timed.progressed(id, 500, 1001);
    assert_eq!(timed.ack_by(id), 500 + u128::from(ACK_BY) - 3000);
    timed.progressed(id, 1500, 1501);
    assert_eq!(timed.ack_by(id), 1500 + u128::from(ACK_BY), "a new start is on the same clock");
}

#[test]
fn settlement_unsent_before_a_sleep_finds_its_lease_over() {
    let mut timed = TimedTable::new();
    let id = timed.granted();
    timed.begin(id, SettleKind::Ack, 0).unwrap();
    timed.slept(60_000, 1);
    assert_eq!(timed.finish(id, PublishOutcome::Unsent, 1), (LeaseStatus::Gone, Some("one")));
}

#[test]
fn delivery_whose_pull_was_sent_before_a_sleep_counts_from_before_it() {
    let mut timed = TimedTable::new();
    timed.slept(3000, 1000);
    let pulled = |timed: &TimedTable, sent| Terms {
        sent_after: Some(timed.at(sent)),
        ..timed.terms(1, 1010)
    };
    let (id, _) = timed.table.grant(pulled(&timed, 990), "one");
    // Half of the margin is for its way.
    assert_eq!(timed.ack_by(id), 990 + 500 + u128::from(ACK_BY) - 3000);
    let (id, _) = timed.table.grant(pulled(&timed, 1005), "two");
    assert_eq!(timed.ack_by(id), 1010 + u128::from(ACK_BY), "its pull was sent after it");
}
