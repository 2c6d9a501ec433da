//! Check: a replica that may not ack promises no longer lease. Pure.
//!
//! "NATS_PERMISSION: not applied. The lease is still yours." Without acks, nothing keeps a message for longer than its
//! ack wait.

use std::time::Duration;

use super::{
    super::jetstream::Time,
    ledger::{CallId, Kind, Ledger, Told},
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

#[cfg(test)]
mod tests {
    use fetch_proxy::{broker::AckKind, pb};

    use super::{
        super::lab::{Lab, extend},
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
}
