//! Check: every reason and every outcome keeps its promise, at the answer and permanently. Pure.
//!
//! 1. A settlement is applied only if a client asked for it and was not promised that it is not applied.
//! 2. CONFIRMED and DUPLICATE mean that the same kind of settlement of this delivery was applied.
//! 3. A refusal has its cause: an earlier settlement, a consumer that is gone, a removed key, or some accident.
//! 4. A call has only reasons that the contract lists for it.

use std::time::Duration;

use super::{
    super::jetstream::{DeliveryId, Time},
    answers::{NO_ANSWER, OVERDUE, Reading, UNSENT},
    calls::SHORTEST_LEASE,
    causes::{
        happened, has_cause, is_away, overlaps, unknown_to_jetstream, waited_for_a_hand_over,
    },
    leases,
    ledger::{CallId, Effect, Fate, Kind, Ledger},
    report::Report,
    rights,
    troubles::Trouble,
};

pub const CHECK: &str = "promises";

/// Timers are exact to a millisecond.
const TICK: Duration = Duration::from_millis(2);

/// The reasons that the contract lists at Ack, and those that any call may have, as far as they are made
/// below the edge.
const OF_SETTLE: [&str; 12] = [
    "INVALID_FIELD",
    "TOKEN_INVALID",
    "KEY_UNKNOWN",
    "LEASE_EXPIRED",
    "LEASE_SETTLED",
    "LEASE_BUSY",
    "NATS_UNAVAILABLE",
    "NATS_PERMISSION",
    "NOT_ALLOWED",
    "OWNER_UNREACHABLE",
    "SETTLE_UNCONFIRMED",
    "JETSTREAM_DENIED",
];
const OUTCOMES: [&str; 4] =
    ["OUTCOME_CONFIRMED", "OUTCOME_SENT", "OUTCOME_DUPLICATE", "OUTCOME_EXTENDED"];

/// A client has its answer, which stands in the ledger already.
pub fn answered(
    ledger: &Ledger,
    CallId(id, place): CallId,
    reading: &Reading,
    now: Time,
    report: &mut Report,
) {
    let Some(one) = ledger.deliveries.get(&id) else { return };
    let Some(call) = one.calls.get(place) else { return };
    let (kind, name) = (call.kind, &*reading.name);
    report.coverage.count(format!("settle: {kind:?} {name}"));
    let mut broken: Vec<String> = Vec::new();
    let known = [NO_ANSWER, OVERDUE, UNSENT].contains(&name);
    if !known && !OF_SETTLE.contains(&name) && !OUTCOMES.contains(&name) {
        broken.push(format!("{name} is not listed for a settlement"));
    }
    if let Some(why) = lie(ledger, id, kind, now) {
        broken.push(why);
    }
    let done = matches!(name, "OUTCOME_CONFIRMED" | "OUTCOME_DUPLICATE");
    // "`SENT` only promises that the settlement was given to the connection": so does its repeat.
    let sent_before = one.calls_of(kind).any(|call| call.sent_only);
    if name == "OUTCOME_DUPLICATE" && sent_before && one.applied(kind) == 0 {
        report.coverage.count("settle: DUPLICATE of what was only sent");
    } else if done && one.applied(kind) == 0 {
        broken.push(format!("{name}, and never applied"));
    }
    let others = one.calls.iter().enumerate().filter(|(other, _)| *other != place);
    let mut others = others.map(|(_, other)| other);
    let ok = match name {
        "LEASE_SETTLED" => {
            reading.settled_as.is_some_and(|by| by != kind && one.may_have_applied(by) > 0)
                || terminated(ledger, id)
        }
        "LEASE_BUSY" => {
            others.any(|other| overlaps(ledger, one, other, call))
                || waited_for_a_hand_over(ledger, id, call, now)
        }
        "JETSTREAM_DENIED" => happened(ledger, id, Trouble::MadeAgain, now),
        "TOKEN_INVALID" | "KEY_UNKNOWN" if happened(ledger, id, Trouble::KeyRemoved, now) => true,
        "TOKEN_INVALID" => false,
        // "a pod that starts may seal with it before the others have it; they answer `KEY_UNKNOWN`"
        "KEY_UNKNOWN" => {
            let (consumer, key) = (&one.message.0, Trouble::KeyAtFront);
            let ahead = ledger.troubles.happened(key, consumer, call.began, now);
            if ahead {
                report.coverage.count("settle: KEY_UNKNOWN while a new key is at the front");
            }
            ahead
        }
        // "An answer that arrives after the end of the lease, or after a gap, confirms nothing."
        "SETTLE_UNCONFIRMED" if one.hold.is_some_and(|hold| hold.until <= now + TICK) => true,
        "SETTLE_UNCONFIRMED" if unknown_to_jetstream(ledger, id, call, now) => {
            report.coverage.count("settle: SETTLE_UNCONFIRMED, for an attempt of before a reset");
            true
        }
        // The deadline of the client may be sooner than any answer.
        "NATS_UNAVAILABLE" | "SETTLE_UNCONFIRMED" | "OWNER_UNREACHABLE" if call.hurried => true,
        "NATS_UNAVAILABLE" | "SETTLE_UNCONFIRMED" | "OWNER_UNREACHABLE" => {
            has_cause(ledger, id, call, now)
        }
        "INVALID_FIELD" => {
            kind == Kind::Extend && call.length.is_some_and(|length| length < SHORTEST_LEASE)
        }
        "NATS_PERMISSION" => happened(ledger, id, Trouble::Refused, now),
        "NOT_ALLOWED" => {
            rights::denies(ledger, (call.side, one.message.0.clone()), call.began, now)
        }
        // Patience is longer than the settle timeout.
        OVERDUE => {
            [call.side, one.side].into_iter().any(|side| is_away(ledger, id, side, call.began, now))
        }
        _ => true,
    };
    if !ok {
        broken.push(format!("{name} without a cause"));
    }
    for why in broken {
        let why = format!("{kind:?}: {why}\n  {reading:?}\n  {call:?}\n  {id:?} {one:?}");
        report.fail(CHECK, now, why);
    }
}

/// JetStream has handled an ack of this delivery, which stands in the ledger already.
pub fn applied(ledger: &Ledger, id: DeliveryId, effect: &Effect, report: &mut Report) {
    report.coverage.count(format!("applied: {:?}", effect.kind));
    if let Some(why) = lie(ledger, id, effect.kind, effect.at) {
        let one = ledger.deliveries.get(&id);
        let why = format!("{:?} {why}\n  {effect:?}\n  {id:?} {one:?}", effect.kind);
        report.fail(CHECK, effect.at, why);
    }
}

/// More was applied than clients asked for and were not refused.
fn lie(ledger: &Ledger, id: DeliveryId, kind: Kind, now: Time) -> Option<String> {
    let one = ledger.deliveries.get(&id)?;
    let side = one.side;
    let moved = happened(ledger, id, Trouble::Draining { side }, now);
    // After a hand-over, every replica is another one.
    let asked = one.may_have_sent(kind) * if moved { 2 } else { 1 };
    let applied = one.applied(kind);
    match kind {
        // The proxy keeps a lease alive by itself.
        Kind::Extend => None,
        Kind::Ack | Kind::Term if applied <= asked => None,
        Kind::Term if terminated(ledger, id) => None,
        Kind::Ack | Kind::Term => {
            Some(format!("applied {applied} times, and {asked} calls may have been"))
        }
        // The proxy gives back by itself, but never while a client holds the lease.
        Kind::Nak => {
            let given_back = one.effects.iter().filter(|effect| {
                let held = one.is_held(effect.at) && !leases::ends_early(ledger, id, effect.at);
                effect.kind == Kind::Nak && held && effect.at <= now
            });
            let given_back = given_back.count();
            (given_back > asked).then(|| {
                format!(
                    "applied {given_back} times to a lease that is held, {asked} were asked for"
                )
            })
        }
    }
}

/// The proxy itself may have terminated it.
fn terminated(ledger: &Ledger, id: DeliveryId) -> bool {
    let stored = ledger.deliveries.get(&id).and_then(|one| {
        let (name, sequence) = &one.message;
        ledger.stored.get(&(name.stream.clone(), *sequence))
    });
    stored.is_some_and(|stored| stored.fate == Fate::Terminated)
}

#[cfg(test)]
mod tests {
    use fetch_proxy::{broker::AckKind, pb};

    use super::{
        super::{
            super::jetstream::Config,
            lab::{ACK_WAIT, Lab, ack, extend, millis, nak},
        },
        *,
    };

    /// A client has the message and says this; then `happens`.
    fn told(
        action: &pb::settlement::Action,
        happens: impl FnOnce(&mut Lab, DeliveryId, Option<CallId>),
    ) -> Vec<&'static str> {
        let mut lab = Lab::new();
        let id = lab.held();
        lab.wait(100);
        let call = lab.ask(1, id, action);
        happens(&mut lab, id, call);
        lab.found()
    }

    #[test]
    fn ack_that_is_confirmed_was_applied() {
        let confirmed = |applies: bool, outcome| {
            told(&ack(), |lab, id, call| {
                if applies {
                    lab.apply(1, AckKind::Ack, id, id);
                }
                lab.succeed(call, outcome, 0);
            })
        };
        for outcome in [pb::Outcome::Confirmed, pb::Outcome::Duplicate] {
            assert_eq!(confirmed(false, outcome), [CHECK]);
            assert!(confirmed(true, outcome).is_empty());
        }
        assert!(confirmed(false, pb::Outcome::Sent).is_empty());
    }

    #[test]
    fn nak_that_is_answered_as_a_duplicate_was_applied() {
        let repeated = |applies: bool| {
            told(&nak(0), |lab, id, call| {
                lab.trouble(Trouble::LeaderAway, 0);
                lab.refuse(call, "SETTLE_UNCONFIRMED");
                if applies {
                    lab.apply(1, AckKind::Nak(None), id, id);
                }
                let call = lab.ask(1, id, &nak(0));
                lab.succeed(call, pb::Outcome::Duplicate, 0);
            })
        };
        assert_eq!((repeated(false), repeated(true)), (vec![CHECK], vec![]));
    }

    #[test]
    fn ack_that_is_promised_not_to_be_applied_never_is() {
        let promised = |reason: &'static str| {
            told(&ack(), |lab, id, call| {
                lab.trouble(Trouble::LeaderAway, 0);
                lab.refuse(call, reason);
                lab.wait(3_000);
                lab.apply(1, AckKind::Ack, id, id);
            })
        };
        assert_eq!(promised("NATS_UNAVAILABLE"), [CHECK]);
        assert!(promised("SETTLE_UNCONFIRMED").is_empty());
    }

    #[test]
    fn repeated_ack_is_applied_as_often_as_it_was_not_refused() {
        let twice = |second: &'static str| {
            told(&ack(), |lab, id, call| {
                lab.trouble(Trouble::LeaderAway, 0);
                lab.refuse(call, "SETTLE_UNCONFIRMED");
                let call = lab.ask(1, id, &ack());
                lab.apply(1, AckKind::Ack, id, id);
                lab.apply(1, AckKind::Ack, id, id);
                lab.refuse(call, second);
            })
        };
        assert_eq!(twice("NATS_UNAVAILABLE"), [CHECK]);
        assert!(twice("SETTLE_UNCONFIRMED").is_empty());
    }

    #[test]
    fn settlement_that_nobody_asked_for_is_found_and_progress_not() {
        let applied = |kind| told(&extend(5_000), |lab, id, _| lab.apply(1, kind, id, id));
        assert_eq!(applied(AckKind::Term(String::new())), [CHECK]);
        // While a client holds it, the proxy does not give a message back.
        assert_eq!(applied(AckKind::Nak(None)), [CHECK]);
        assert!(applied(AckKind::Progress).is_empty());
    }

    #[test]
    fn lapsed_lease_may_be_given_back() {
        let lapsed = told(&extend(1_000), |lab, id, call| {
            lab.succeed(call, pb::Outcome::Extended, 1_000);
            lab.wait(1_000);
            lab.apply(1, AckKind::Nak(None), id, id);
        });
        assert!(lapsed.is_empty());
    }

    #[test]
    fn settled_lease_was_settled_in_another_way() {
        let settled = |by: &'static str| {
            told(&ack(), |lab, id, call| {
                lab.apply(1, AckKind::Ack, id, id);
                lab.confirm(call);
                let call = lab.ask(1, id, &nak(0));
                lab.refuse_with(call, "LEASE_SETTLED", ("settled_as", by));
            })
        };
        assert!(settled("ACK").is_empty());
        assert_eq!((settled("TERM"), settled("NAK")), (vec![CHECK], vec![CHECK]));
    }

    #[test]
    fn key_is_unknown_while_a_new_key_is_at_the_front_and_not_after_that() {
        for (reason, after, found) in [
            ("KEY_UNKNOWN", 0, vec![]),
            ("KEY_UNKNOWN", 1, vec![CHECK]),
            ("TOKEN_INVALID", 0, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let id = lab.held();
            lab.trouble(Trouble::KeyAtFront, 100);
            lab.wait(100 + after);
            lab.refuse(lab.ask(2, id, &ack()), reason);
            assert_eq!(lab.found(), found, "{reason}, {after} ms after it");
        }
    }

    #[test]
    fn busy_lease_has_another_call() {
        assert_eq!(told(&ack(), |lab, _, call| lab.refuse(call, "LEASE_BUSY")), [CHECK]);
        let two = told(&ack(), |lab, id, call| {
            lab.ask(2, id, &ack());
            lab.refuse(call, "LEASE_BUSY");
        });
        assert!(two.is_empty());
    }

    #[test]
    fn request_to_the_owner_that_waits_in_a_wire_makes_its_lease_busy() {
        let busy = |side, stalls: bool| {
            told(&extend(9_000), |lab, id, call| {
                lab.succeed(call, pb::Outcome::Extended, 9_000);
                lab.wait(1);
                let call = lab.ask(side, id, &ack());
                if stalls {
                    lab.trouble(Trouble::Wire { side: 1 }, 4_000);
                }
                lab.wait(3_000);
                lab.apply(side, AckKind::Ack, id, id);
                lab.confirm(call);
                lab.wait(1_000);
                let call = lab.ask(1, id, &ack());
                lab.refuse(call, "LEASE_BUSY");
            })
        };
        assert!(busy(2, true).is_empty());
        assert_eq!((busy(2, false), busy(1, true)), (vec![CHECK], vec![CHECK]));
    }

    #[test]
    fn lease_is_busy_for_a_call_that_has_waited_for_a_hand_over() {
        let busy = |(drains, hurried): (usize, bool), wait| {
            told(&extend(9_000), |lab, id, call| {
                lab.succeed(call, pb::Outcome::Extended, 9_000);
                lab.wait(1);
                lab.trouble(Trouble::Draining { side: drains }, 60_000);
                let call = lab.watch().settle_called(1, id, &ack(), (false, hurried), lab.now);
                lab.wait(wait);
                lab.refuse(call, "LEASE_BUSY");
            })
        };
        assert!(busy((1, true), 100).is_empty() && busy((1, false), 5_000).is_empty());
        assert_eq!((busy((1, false), 100), busy((2, true), 100)), (vec![CHECK], vec![CHECK]));
    }

    #[test]
    fn refusal_has_its_cause() {
        for (reason, cause) in [
            ("NATS_UNAVAILABLE", Trouble::LeaderAway),
            ("OWNER_UNREACHABLE", Trouble::Killed { side: 1 }),
            ("SETTLE_UNCONFIRMED", Trouble::Wire { side: 1 }),
            ("JETSTREAM_DENIED", Trouble::MadeAgain),
            ("TOKEN_INVALID", Trouble::KeyRemoved),
            ("KEY_UNKNOWN", Trouble::KeyRemoved),
        ] {
            let without = told(&ack(), |lab, _, call| lab.refuse(call, reason));
            assert_eq!(without, [CHECK], "{reason}");
            let with = told(&ack(), |lab, _, call| {
                lab.trouble(cause, 0);
                lab.refuse(call, reason);
            });
            assert!(with.is_empty(), "{reason}");
        }
    }

    #[test]
    fn late_ack_of_a_last_attempt_may_get_no_answer_after_a_reset() {
        // The second delivery of the message comes so long before the call, or after it.
        for (most, resets, before, after, found) in [
            (1, true, None, None, vec![]),
            (1, true, None, Some(5), vec![]),
            (1, true, Some(5), None, vec![CHECK]),
            (1, false, None, None, vec![CHECK]),
            (2, true, None, None, vec![CHECK]),
        ] {
            let config = Config { max_deliver: Some(most), ..Config::new(millis(ACK_WAIT)) };
            let mut lab = Lab::with(config);
            let id = lab.send(1, 1);
            lab.hand(1, id, 1, 60_000);
            if resets {
                lab.trouble(Trouble::Reset, 0);
                lab.trouble(Trouble::MadeAgain, 0);
            }
            lab.wait(20_000);
            let again = |lab: &mut Lab, wait: Option<u64>| {
                wait.into_iter().for_each(|wait| _ = lab.send_slowly(1, 1, wait));
            };
            again(&mut lab, before);
            let call = lab.ask(1, id, &ack());
            lab.wait(1);
            again(&mut lab, after);
            lab.wait(5_000);
            lab.refuse(call, "SETTLE_UNCONFIRMED");
            let found_by = lab.found().into_iter().filter(|check| *check == CHECK);
            assert_eq!(found_by.collect::<Vec<_>>(), found, "{most} {resets} {before:?} {after:?}");
        }
    }

    #[test]
    fn reason_that_the_contract_does_not_list_is_found() {
        for reason in ["LEASE_LIMIT", "INTERNAL", "INVALID_FIELD", "NATS_PERMISSION"] {
            assert_eq!(told(&ack(), |lab, _, call| lab.refuse(call, reason)), [CHECK]);
        }
    }

    #[test]
    fn call_ends_in_time_unless_its_process_is_gone() {
        let overdue = |trouble: Option<Trouble>| {
            told(&ack(), |lab, _, call| {
                if let Some(trouble) = trouble {
                    lab.trouble(trouble, 0);
                }
                lab.wait(8_000);
                lab.watch().settle_ended(call, &Reading::overdue(), lab.now);
            })
        };
        assert_eq!(overdue(None), [CHECK]);
        assert!(overdue(Some(Trouble::Killed { side: 1 })).is_empty());
    }

    #[test]
    fn repeat_of_what_was_only_sent_may_be_a_duplicate_of_nothing() {
        let repeated = |sent| {
            told(&extend(5_000), |lab, id, _| {
                let call = lab.watch().settle_called(1, id, &ack(), (sent, false), lab.now);
                lab.succeed(call, pb::Outcome::Sent, 0);
                let call = lab.ask(1, id, &ack());
                lab.succeed(call, pb::Outcome::Duplicate, 0);
            })
        };
        assert_eq!((repeated(true), repeated(false)), (vec![], vec![CHECK]));
    }

    #[test]
    fn answer_after_the_end_of_a_lease_or_near_a_deadline_need_not_confirm() {
        let unconfirmed = |hurried, wait| {
            told(&extend(5_000), |lab, id, _| {
                lab.wait(wait);
                let says = (false, hurried);
                let call = lab.watch().settle_called(1, id, &ack(), says, lab.now);
                lab.refuse(call, "SETTLE_UNCONFIRMED");
            })
        };
        assert_eq!(unconfirmed(false, 100), [CHECK]);
        assert!(unconfirmed(true, 100).is_empty());
        assert!(unconfirmed(false, 3_600).is_empty());
    }

    #[test]
    fn ack_at_another_replica_may_be_sent_by_two() {
        let twice = |side| {
            told(&extend(5_000), |lab, id, _| {
                lab.ask(side, id, &ack());
                lab.apply(1, AckKind::Ack, id, id);
                lab.apply(side, AckKind::Ack, id, id);
            })
        };
        assert_eq!((twice(1), twice(2)), (vec![CHECK], vec![]));
    }

    #[test]
    fn extend_that_is_too_short_is_refused_for_its_field() {
        let refused =
            |lease| told(&extend(lease), |lab, _, call| lab.refuse(call, "INVALID_FIELD"));
        assert_eq!((refused(999), refused(1_000)), (vec![], vec![CHECK]));
    }

    #[test]
    fn reasons_are_those_of_the_contract() {
        let contract = include_str!("../../../proto/fetchproxy/v1/fetch.proto");
        for reason in OF_SETTLE {
            assert!(contract.contains(&format!("// - {reason}")), "{reason}");
        }
    }
}
