//! Check: a replica that may not ack promises no longer lease, and a policy is obeyed from the moment at which a
//! replica has read it. Pure.
//!
//! "Every right is asked as it is at that moment: if a principal loses `settle`, its leases end unsettled."
//!
//! "NATS_PERMISSION: not applied. The lease is still yours." Without acks, nothing keeps a message for longer than its
//! ack wait. A replica knows of a refusal until an ack is confirmed, the consumer is deleted, or a right
//! is back.

use std::time::Duration;

use fetch_proxy::{broker::ConsumerName, pb};

use super::{
    super::jetstream::Time,
    calls::OpenFetch,
    ledger::{CallId, DenialSpan, Kind, Ledger, Told},
    one_call,
    report::Report,
    troubles::Trouble,
};

pub const CHECK: &str = "rights";

/// A settlement under way learns of the refusal, and then its replica knows.
const UNTIL_KNOWN: Duration = Duration::from_millis(200);

/// An Extend has been answered.
pub fn extended(
    ledger: &Ledger,
    CallId(id, place): CallId,
    told: Told,
    now: Time,
    report: &mut Report,
) {
    let Some(one) = ledger.deliveries.get(&id) else { return };
    let Some(call) = one.calls.get(place).filter(|call| call.kind == Kind::Extend) else { return };
    let (side, consumer) = (one.side, &one.message.0);
    let moved = ledger.troubles.happened(Trouble::Draining { side }, consumer, one.sent, now);
    let Some(since) = ledger.refused.get(&(side, consumer.clone())).filter(|_| !moved) else {
        return;
    };
    report.coverage.count("rights: Extend at a replica that may not ack");
    if told == Told::Applied && call.began > *since + UNTIL_KNOWN {
        let why = format!(
            "Extend is confirmed, and acks are refused since {since:?}\n  {call:?}\n  {id:?} {one:?}"
        );
        report.fail(CHECK, now, why);
    }
}

/// Whether the policy of a replica gave no right at a consumer at some moment from `began` to `now`.
pub fn denies(ledger: &Ledger, at: (usize, ConsumerName), began: Time, now: Time) -> bool {
    let overlaps =
        |(from, until): &DenialSpan| *from <= now && until.is_none_or(|until| until >= began);
    ledger.denied.get(&at).is_some_and(|spans| spans.iter().any(overlaps))
}

/// Since when the policy of a replica gives no right at a consumer.
fn denied_since(ledger: &Ledger, at: (usize, ConsumerName)) -> Option<Time> {
    let (since, end) = ledger.denied.get(&at)?.last()?;
    end.is_none().then_some(*since)
}

/// A settlement has been answered. Its rights are asked when its call arrives, which is after it began.
pub fn settled(
    ledger: &Ledger,
    CallId(id, place): CallId,
    told: Told,
    now: Time,
    report: &mut Report,
) {
    let Some(one) = ledger.deliveries.get(&id) else { return };
    let Some(call) = one.calls.get(place) else { return };
    let Some(since) = denied_since(ledger, (call.side, one.message.0.clone())) else { return };
    report.coverage.count("rights: settlement at a replica whose policy denies it");
    if told == Told::Applied && call.began > since {
        let why = format!(
            "{:?} is confirmed, and the policy denies it since {since:?}\n  {call:?}\n  {id:?}",
            call.kind
        );
        report.fail(CHECK, now, why);
    }
}

/// A Fetch has been answered. Its rights are asked again when messages are handed to it.
pub fn fetched(
    ledger: &Ledger,
    fetch: &OpenFetch,
    answer: &pb::FetchResponse,
    (written, now): (Time, Time),
    report: &mut Report,
) {
    let Some(since) = denied_since(ledger, (fetch.side, fetch.consumer.clone())) else { return };
    report.coverage.count("rights: Fetch at a replica whose policy denies it");
    if written > since && !one_call::has_not_fetched(answer) {
        let count = answer.messages.len();
        let why = format!(
            "a Fetch got {count} messages at {written:?}, and the policy denies it since {since:?}\n  {fetch:?}"
        );
        report.fail(CHECK, now, why);
    }
}

#[cfg(test)]
mod tests {
    use fetch_proxy::broker::AckKind;

    use super::{
        super::lab::{Lab, ack, extend},
        *,
    };

    #[test]
    fn extend_is_refused_once_acks_are_refused_and_until_one_is_applied() {
        for (after, granted, found) in
            [(100, false, vec![]), (300, false, vec![CHECK]), (300, true, vec![])]
        {
            let mut lab = Lab::new();
            let id = lab.held();
            lab.refuse_acks(1);
            lab.wait(after);
            if granted {
                lab.apply(1, AckKind::Progress, id, id);
            }
            let call = lab.ask(1, id, &extend(2_000));
            lab.succeed(call, pb::Outcome::Extended, 2_000);
            assert_eq!(lab.found(), found, "{after} {granted}");
        }
    }

    #[test]
    fn refusal_is_forgotten_with_its_consumer_and_a_new_refusal_counts() {
        for (refused_again, found) in [(false, vec![]), (true, vec![CHECK])] {
            let mut lab = Lab::new();
            lab.refuse_acks(1);
            lab.wait(300);
            lab.trouble(Trouble::MadeAgain, 0);
            let id = lab.held();
            if refused_again {
                lab.refuse_acks(1);
            }
            lab.wait(300);
            let call = lab.ask(1, id, &extend(2_000));
            lab.succeed(call, pb::Outcome::Extended, 2_000);
            assert_eq!(lab.found(), found, "{refused_again}");
        }
    }

    #[test]
    fn refusal_counts_until_a_right_is_back() {
        for (back, found) in [(false, vec![CHECK]), (true, vec![])] {
            let mut lab = Lab::new();
            let id = lab.held();
            lab.refuse_acks(1);
            lab.wait(300);
            if back {
                lab.watch().right_is_back();
            }
            let call = lab.ask(1, id, &extend(2_000));
            lab.succeed(call, pb::Outcome::Extended, 2_000);
            assert_eq!(lab.found(), found, "{back}");
        }
    }

    #[test]
    fn settlement_after_a_denial_is_refused_and_after_its_end_is_not() {
        for (denied, given_back, found) in
            [(false, false, vec![]), (true, false, vec![CHECK]), (true, true, vec![])]
        {
            let mut lab = Lab::new();
            let id = lab.held();
            if denied {
                lab.deny(1, true);
            }
            lab.wait(100);
            if given_back {
                lab.deny(1, false);
            }
            let call = lab.ask(1, id, &ack());
            lab.apply(1, AckKind::Ack, id, id);
            lab.succeed(call, pb::Outcome::Confirmed, 0);
            assert_eq!(lab.found(), found, "{denied} {given_back}");
        }
    }
}
