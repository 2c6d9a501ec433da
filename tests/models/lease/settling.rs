//! The promises of settling: one settlement passes, a refusal has a reason, and a repeat does no
//! harm.

use std::time::Duration;

use fetch_proxy::lease::{
    BeginResult, ConsumerId, Due, LeaseError, LeaseId, LeaseStatus, PublishOutcome, SettleKind,
    Terms,
};

use super::{ACK_BY, ACK_WAIT, CONSUMER, OVER, TimedTable};

#[test]
fn ack_passes_before_the_deadline_and_is_refused_after_it() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    assert_eq!(timed.begin(id, SettleKind::Ack, 1000), Err(OVER));
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    assert_eq!(timed.begin(id, SettleKind::Ack, 999), Ok(BeginResult::Publish(&"one")));
}

#[test]
fn settled_lease_answers_duplicate_or_settled_by_kind() {
    for (kind, other) in [
        (SettleKind::Ack, SettleKind::Nak),
        (SettleKind::Nak, SettleKind::Term),
        (SettleKind::Term, SettleKind::Ack),
    ] {
        let mut timed = TimedTable::new();
        let id = timed.assigned(1000);
        timed.begin(id, kind, 1).unwrap();
        assert_eq!(
            timed.finish(id, PublishOutcome::Confirmed, 2),
            (LeaseStatus::Gone, Some("one"))
        );
        assert_eq!(timed.begin(id, kind, 60_000), Ok(BeginResult::Duplicate));
        assert_eq!(timed.begin(id, other, 60_000), Err(LeaseError::Settled { by: kind }));
        assert_eq!(timed.extend(id, 1, 60_000), Err(LeaseError::Settled { by: kind }));
    }
}

#[test]
fn lease_under_settlement_is_busy_and_does_not_expire() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    timed.begin(id, SettleKind::Ack, 999).unwrap();
    assert_eq!(timed.begin(id, SettleKind::Ack, 999), Err(LeaseError::Busy));
    assert_eq!((timed.sweep(60_000), timed.table.next_due()), (vec![], None));
    assert_eq!(timed.extend(id, 1, 60_000), Err(LeaseError::Busy));
    let back = timed.table.give_back(id, timed.at(60_000));
    assert_eq!(back, None);
    assert_eq!(
        timed.finish(id, PublishOutcome::Confirmed, 60_000),
        (LeaseStatus::Gone, Some("one"))
    );
}

#[test]
fn unsent_settlement_leaves_the_lease_free_for_any_kind() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    assert_eq!(timed.settle(id, SettleKind::Ack, PublishOutcome::Unsent, 1), LeaseStatus::Held);
    assert_eq!(timed.settle(id, SettleKind::Nak, PublishOutcome::Confirmed, 2), LeaseStatus::Gone);
}

#[test]
fn settlement_unsent_by_its_deadline_lapses_and_is_released() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    timed.begin(id, SettleKind::Ack, 999).unwrap();
    assert_eq!(timed.finish(id, PublishOutcome::Unsent, 1000), (LeaseStatus::Gone, None));
    assert_eq!(timed.begin(id, SettleKind::Ack, 1000), Err(OVER));
    let release = Some(timed.at(ACK_BY));
    assert_eq!(timed.sweep(1000), [Due::Lapsed { id, payload: "one", release }]);
}

#[test]
fn settlement_unsent_by_ack_by_is_lost() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    timed.begin(id, SettleKind::Ack, ACK_BY - 1).unwrap();
    assert_eq!(timed.finish(id, PublishOutcome::Unsent, ACK_BY), (LeaseStatus::Gone, Some("one")));
    assert_eq!(timed.begin(id, SettleKind::Ack, ACK_BY), Err(OVER));
}

#[test]
fn unconfirmed_ack_or_term_may_be_repeated_and_not_changed() {
    for (kind, other) in [(SettleKind::Ack, SettleKind::Term), (SettleKind::Term, SettleKind::Nak)]
    {
        let mut timed = TimedTable::new();
        let id = timed.assigned(1000);
        assert_eq!(timed.settle(id, kind, PublishOutcome::Unconfirmed, 1), LeaseStatus::Uncertain);
        assert_eq!(timed.begin(id, other, 2), Err(LeaseError::Settled { by: kind }));
        assert_eq!(timed.extend(id, 1, 2), Err(LeaseError::Settled { by: kind }));
        assert_eq!(timed.sweep(ACK_BY - 1), []);
        let again = timed.settle(id, kind, PublishOutcome::Unconfirmed, ACK_BY - 1);
        assert_eq!(again, LeaseStatus::Uncertain);
        assert_eq!(timed.begin(id, kind, ACK_BY), Err(OVER));
        assert_eq!(timed.begin(id, other, ACK_BY), Err(OVER));
        assert_eq!(timed.sweep(ACK_BY), [Due::Lost { id, payload: "one" }]);
    }
}

#[test]
fn unsent_repeat_leaves_the_first_try_uncertain() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    timed.settle(id, SettleKind::Ack, PublishOutcome::Unconfirmed, 1);
    assert_eq!(
        timed.settle(id, SettleKind::Ack, PublishOutcome::Unsent, 2),
        LeaseStatus::Uncertain
    );
    let nak = timed.begin(id, SettleKind::Nak, 3);
    assert_eq!(nak, Err(LeaseError::Settled { by: SettleKind::Ack }), "the Ack may have arrived");
}

#[test]
fn unconfirmed_nak_is_never_published_again() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    let nak = SettleKind::Nak;
    assert_eq!(timed.settle(id, nak, PublishOutcome::Unconfirmed, 1), LeaseStatus::Uncertain);
    let ack_wait = Duration::from_millis(ACK_WAIT);
    let again = timed.begin(id, nak, ACK_BY - 1);
    assert_eq!(again, Ok(BeginResult::NakUnconfirmed { ack_wait }));
    let settled = Err(LeaseError::Settled { by: nak });
    assert_eq!(timed.begin(id, SettleKind::Ack, ACK_BY - 1), settled);
    assert_eq!(timed.begin(id, nak, ACK_BY), Err(OVER));
    assert_eq!(timed.sweep(ACK_BY), [Due::Lost { id, payload: "one" }]);
    assert_eq!(timed.begin(id, nak, ACK_BY), Err(OVER));
}

#[test]
fn progress_is_not_sent_behind_a_nak() {
    for (kind, may) in [(SettleKind::Nak, false), (SettleKind::Ack, true)] {
        let mut timed = TimedTable::new();
        let id = timed.assigned(60_000);
        assert!(timed.table.may_progress(id));
        timed.begin(id, kind, 5000).unwrap();
        assert_eq!(timed.table.may_progress(id), may);
        timed.finish(id, PublishOutcome::Unconfirmed, 5001);
        assert_eq!(timed.table.may_progress(id), may);
    }
    let mut timed = TimedTable::new();
    let id = timed.assigned(60_000);
    timed.settle(id, SettleKind::Ack, PublishOutcome::Confirmed, 1);
    assert!(!timed.table.may_progress(id), "it is over");
}

#[test]
fn unconfirmed_nak_is_not_kept_alive_and_not_released() {
    for length in [1000, 60_000] {
        let mut timed = TimedTable::new();
        let id = timed.assigned(length);
        timed.settle(id, SettleKind::Nak, PublishOutcome::Unconfirmed, 1);
        assert_eq!(timed.sweep(ACK_BY - 1), []);
        assert_eq!(timed.sweep(ACK_BY), [Due::Lost { id, payload: "one" }]);
    }
}

#[test]
fn redelivery_ends_a_lease_with_an_unconfirmed_nak() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    timed.settle(id, SettleKind::Nak, PublishOutcome::Unconfirmed, 1);
    assert_eq!(timed.table.grant(timed.terms(1, 2), "two").1, Some((id, "one")));
    assert_eq!(timed.begin(id, SettleKind::Nak, 3), Err(OVER));
}

#[test]
fn denied_settlement_ends_the_lease_as_lost() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    assert_eq!(timed.settle(id, SettleKind::Ack, PublishOutcome::Denied, 1), LeaseStatus::Gone);
    assert_eq!(timed.begin(id, SettleKind::Ack, 2), Err(OVER));
}

#[test]
fn newer_delivery_of_the_message_ends_the_older_lease() {
    let mut timed = TimedTable::new();
    let older = timed.assigned(60_000);
    let (newer, superseded) = timed.table.grant(timed.terms(1, 500), "two");
    assert_eq!(superseded, Some((older, "one")));
    assert_eq!(timed.begin(older, SettleKind::Ack, 500), Err(OVER));
    assert_eq!(timed.begin(newer, SettleKind::Ack, 500), Ok(BeginResult::Publish(&"two")));
    assert_eq!(timed.table.held_by(CONSUMER), 1);
}

#[test]
fn same_sequence_of_another_consumer_is_another_message() {
    let mut timed = TimedTable::new();
    let one = timed.granted();
    let terms = Terms { consumer: ConsumerId(8), ..timed.terms(1, 0) };
    assert_eq!(timed.table.grant(terms, "two").1, None);
    assert!(timed.begin(one, SettleKind::Ack, 0).is_ok());
}

#[test]
fn nak_overtaken_by_its_redelivery_is_a_duplicate_only_if_it_was_confirmed() {
    for (outcome, repeated) in [
        (PublishOutcome::Confirmed, Ok(BeginResult::Duplicate)),
        (PublishOutcome::Unconfirmed, Err(OVER)),
        (PublishOutcome::Unsent, Err(OVER)),
        (PublishOutcome::Denied, Err(OVER)),
    ] {
        let mut timed = TimedTable::new();
        let id = timed.assigned(1000);
        timed.begin(id, SettleKind::Nak, 1).unwrap();
        let (newer, superseded) = timed.table.grant(timed.terms(1, 2), "two");
        assert_eq!(superseded, Some((id, "one")));
        assert_eq!(timed.begin(id, SettleKind::Nak, 2), Err(LeaseError::Busy));
        assert_eq!(timed.finish(id, outcome, 3), (LeaseStatus::Gone, None));
        assert_eq!(timed.begin(id, SettleKind::Nak, 4), repeated);
        assert!(timed.begin(newer, SettleKind::Nak, 4).is_ok(), "the newer lease is untouched");
    }
}

#[test]
fn caller_with_an_earlier_clock_is_judged_by_the_latest_time() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    assert_eq!(timed.extend(id, 5000, 1000), Err(OVER));
    assert_eq!(timed.begin(id, SettleKind::Ack, 999), Err(OVER), "an ended lease stays ended");
}

#[test]
fn old_outcomes_are_forgotten_and_unknown_leases_count_as_forgotten() {
    let mut timed = TimedTable::new();
    let id = timed.assigned(1000);
    timed.settle(id, SettleKind::Ack, PublishOutcome::Confirmed, 1);
    for sequence in 2..=64 {
        timed.table.grant(timed.terms(sequence, 1), "any");
    }
    assert_eq!(timed.begin(id, SettleKind::Ack, 1), Ok(BeginResult::Duplicate));
    timed.table.grant(timed.terms(65, 1), "any");
    let forgotten = Err(LeaseError::Expired { forgotten: true });
    assert_eq!(timed.begin(id, SettleKind::Ack, 1), forgotten);
    assert_eq!(timed.begin(LeaseId::new(66).unwrap(), SettleKind::Ack, 1), forgotten);
}
