//! Check: nothing is lost, and nothing is delivered that must not be. Pure.
//!
//! 1. Each message ends by an Ack or a Term that a client asked for. There are four exceptions: it left the
//!    stream, the proxy had to terminate it, its attempts are used up, or JetStream has never sent the last.
//! 2. After a confirmed Ack or Term, the message is not delivered again.
//! 3. A Nak with a delay is not delivered again before the delay is over.
//! 4. The proxy never uses up the last attempt by itself.

use std::time::Duration;

use fetch_proxy::{broker::ConsumerName, pb};

use super::{
    super::jetstream::{DeliveryId, Time},
    give_backs,
    ledger::{Delivered, Effect, Fate, Kind, Ledger, Message, Told},
    report::Report,
    troubles::Trouble,
    windows::{Stale, Window},
};

pub const CHECK: &str = "delivery";

/// Until every replica knows the configuration of a consumer.
const UNTIL_LOOK: Duration = Duration::from_secs(31);

/// JetStream sends a delivery, which stands in the ledger already.
pub fn sent(ledger: &Ledger, id: DeliveryId, now: Time, report: &mut Report) {
    let again = ledger.deliveries.get(&id).is_some_and(|one| one.attempt > 1);
    report.coverage.count(if again { "delivery: repeated" } else { "delivery: first" });
    for (other, one) in ledger.earlier(id) {
        // Its end is undone: "a crash of the NATS server, or a restart, can undo confirmed acks".
        let undone = [Trouble::MadeAgain, Trouble::Restarted]
            .into_iter()
            .any(|trouble| ledger.troubles.happened(trouble, &one.message.0, one.sent, now));
        if undone {
            continue;
        }
        // "`SENT` only promises that the settlement was given to the connection."
        let confirmed = |kind| {
            let sent_only = one.calls_of(kind).any(|call| call.sent_only);
            !sent_only
                && one
                    .calls_of(kind)
                    .any(|call| call.ended.is_some_and(|(_, told)| told == Told::Applied))
        };
        if confirmed(Kind::Ack) || confirmed(Kind::Term) {
            let why =
                format!("{id:?} is sent after a confirmed end of its message: {other:?} {one:?}");
            report.fail(CHECK, now, why);
        }
        let early = too_early(ledger, one, now);
        if early.is_some() && is_hurried_by_another(ledger, other, one) {
            report.coverage.count("delivery: a delay of a Nak ended by an earlier holder");
        } else if let Some(early) = early {
            let why =
                format!("{id:?} is sent {early:?} before the delay of a Nak is over: {one:?}");
            report.fail(CHECK, now, why);
        }
    }
}

/// How much of the delay of a Nak is left, if nothing but the Nak can have brought the message back.
fn too_early(ledger: &Ledger, one: &Delivered, now: Time) -> Option<Duration> {
    let of = &one.message;
    let settled = |effect: &&Effect| effect.kind == Kind::Nak;
    let effect = one.effects.iter().rev().find(settled)?;
    let delayed = effect.delay.is_some_and(|delay| delay.as_nanos() > 1);
    let newest = ledger.of.get(of).and_then(|all| all.iter().rev().nth(1).copied());
    let newest = newest.and_then(|before| ledger.deliveries.get(&before));
    // Another delivery since, or a new leader, which knows nothing of the newest Naks.
    let disturbed = newest.is_some_and(|newest| newest.sent > one.sent)
        || ledger.troubles.happened(Trouble::LeaderAway, &of.0, one.sent, now)
        || ledger.troubles.happened(Trouble::Configured, &of.0, one.sent, now);
    if !delayed || disturbed {
        return None;
    }
    let asked = one.calls_of(Kind::Nak).filter(|call| call.may_apply() && call.began <= effect.at);
    let until = asked.filter_map(|call| Some(call.began + call.length?)).min()?;
    until.checked_sub(now).filter(|left| !left.is_zero())
}

/// Progress or a Nak for an earlier holder has moved the clock of a message after its Nak. A window admits it, or it was
/// late: "A late `Nak` costs that message one delivery attempt. Late progress can end the delay of a Nak early."
fn is_hurried_by_another(ledger: &Ledger, id: DeliveryId, victim: &Delivered) -> bool {
    let nak = victim.effects.iter().rev().find(|effect| effect.kind == Kind::Nak);
    let moves = |effect: &&Effect| {
        matches!(effect.kind, Kind::Extend | Kind::Nak)
            && effect.settled == Some(id)
            && nak.is_some_and(|nak| nak.at <= effect.at)
    };
    let late = |Stale { effect, of, .. }: &Stale<'_>| {
        let (name, side) = (&of.message.0, of.side);
        ledger.troubles.between(name, effect.left, effect.left).any(|span| {
            let stalls =
                [Trouble::Wire { side }, Trouble::Stopped { side }].contains(&span.trouble);
            stalls && effect.at <= span.until
        })
    };
    let admitted = |stale: &Stale<'_>| {
        let mut open = Window::ALL.iter().filter_map(|window| window.opened(stale, ledger));
        late(stale) || open.any(|one| stale.effect.at.saturating_sub(one.since) <= one.bound)
    };
    ledger.earlier(id).any(|(of_id, of)| {
        of.effects.iter().filter(moves).any(|effect| admitted(&Stale { effect, of_id, of, victim }))
    })
}

/// JetStream has handled an ack.
pub fn applied(ledger: &Ledger, id: DeliveryId, effect: &Effect, report: &mut Report) {
    let Some(one) = ledger.deliveries.get(&id).filter(|_| effect.kind == Kind::Nak) else { return };
    if one.may_have_applied(Kind::Nak) > 0 {
        return;
    }
    report.coverage.count(if one.hold.is_some() {
        "give-back: lapsed"
    } else {
        "give-back: not handed out"
    });
    // "the proxy learns of it at its next look. That is at most 30 s".
    let since = effect.at.saturating_sub(UNTIL_LOOK);
    let changed = ledger.troubles.happened(Trouble::Configured, &one.message.0, since, effect.at);
    if ledger.is_last_attempt(one) && changed {
        report.coverage.count("give-back: last attempt, and the limit has changed");
    } else if ledger.is_removed((&one.message.0.stream, one.message.1), effect.at) {
        report.coverage.count("give-back: the message has left its stream");
    } else if ledger.is_last_attempt(one) {
        let why = format!("the proxy gives up a last attempt by itself: {effect:?} {id:?} {one:?}");
        report.fail(CHECK, effect.at, why);
    }
}

/// A client has received a message: it is what JetStream has sent.
pub fn received(
    ledger: &Ledger,
    id: DeliveryId,
    answer: &pb::Delivery,
    now: Time,
    report: &mut Report,
) {
    let Some(one) = ledger.deliveries.get(&id) else {
        let why = format!("a client has a message that was never delivered: {id:?}");
        return report.fail(CHECK, now, why);
    };
    let told = (answer.stream_sequence, u64::from(answer.delivery_count));
    if told != (one.message.1, one.attempt) {
        let why = format!("sequence and attempt are {told:?} in the answer: {id:?} {one:?}");
        report.fail(CHECK, now, why);
    }
}

/// The end of a run. `unsettled`: what JetStream still has of this consumer. `unsent`: the sequence and the
/// number of each attempt that JetStream counted and never sent.
pub fn finished(
    ledger: &Ledger,
    name: &ConsumerName,
    (unsettled, unsent): (&[u64], &[(u64, u64)]),
    now: Time,
    report: &mut Report,
) {
    for ((stream, sequence), stored) in &ledger.stored {
        if *stream != name.stream || unsettled.contains(sequence) {
            continue;
        }
        let message = (name.clone(), *sequence);
        let end = end_of(ledger, &message);
        match end {
            _ if ledger.is_removed((stream, *sequence), now) => {
                report.coverage.count("end: removed")
            }
            Some(MessageEnd::Settled) => report.coverage.count("end: settled by a client"),
            Some(MessageEnd::AttemptsOver) => {
                report.coverage.count("end: attempts over");
                give_backs::destroyed(ledger, &message, now, report);
            }
            _ if stored.fate == Fate::Terminated => report.coverage.count("end: terminated"),
            // "If the leader changes in that moment, the attempt is lost."
            None if is_last_unsent(ledger, &message, unsent) => {
                report.coverage.count("end: the last attempt was never sent");
            }
            None => {
                let ids = ledger.of.get(&message).map(Vec::as_slice).unwrap_or_default();
                let last = ids.last().and_then(|id| ledger.deliveries.get(id));
                let why = format!("a message is lost: {message:?}, last delivery {last:?}");
                report.fail(CHECK, now, why);
            }
        }
    }
}

/// Whether JetStream counted the last attempt of a message, and never sent it.
fn is_last_unsent(ledger: &Ledger, (name, sequence): &Message, unsent: &[(u64, u64)]) -> bool {
    let all = ledger.configs.get(name).map(Vec::as_slice).unwrap_or_default();
    let attempts = unsent.iter().filter(|(of, _)| of == sequence).map(|(_, attempt)| *attempt);
    let over =
        |attempt| all.iter().any(|(_, one)| one.max_deliver.is_some_and(|most| attempt >= most));
    all.iter().any(|(_, config)| config.replicas > 1) && attempts.into_iter().any(over)
}

enum MessageEnd {
    Settled,
    AttemptsOver,
}

fn end_of(ledger: &Ledger, message: &Message) -> Option<MessageEnd> {
    let ids = ledger.of.get(message)?;
    let all = ids.iter().filter_map(|id| ledger.deliveries.get(id));
    let settled = |one: &Delivered| {
        [Kind::Ack, Kind::Term]
            .into_iter()
            .any(|kind| one.applied(kind) > 0 && one.may_have_applied(kind) > 0)
    };
    if all.clone().any(settled) {
        return Some(MessageEnd::Settled);
    }
    all.into_iter().any(|one| ledger.is_last_attempt(one)).then_some(MessageEnd::AttemptsOver)
}

#[cfg(test)]
mod tests {
    use fetch_proxy::broker::AckKind;

    use super::{
        super::{
            super::jetstream::Config,
            lab::{ACK_WAIT, Lab, ack, millis, nak, name},
        },
        *,
    };

    fn found_at_the_end(lab: &Lab) -> Vec<&'static str> {
        found_without(lab, &[])
    }

    /// JetStream has never sent these attempts.
    fn found_without(lab: &Lab, unsent: &[(u64, u64)]) -> Vec<&'static str> {
        lab.watch().finished(&name(), (&[], unsent), lab.now);
        lab.found()
    }

    #[test]
    fn message_that_nobody_settled_is_lost() {
        let mut lab = Lab::new();
        assert_eq!(found_at_the_end(&lab), [CHECK]);
        lab = Lab::new();
        lab.held();
        assert_eq!(found_at_the_end(&lab), [CHECK]);
    }

    #[test]
    fn message_that_a_client_settled_or_that_was_removed_is_not_lost() {
        let mut lab = Lab::new();
        let id = lab.held();
        lab.ask(1, id, &ack());
        lab.apply(1, AckKind::Ack, id, id);
        assert!(found_at_the_end(&lab).is_empty());
        lab = Lab::new();
        lab.watch().removed("S", 1, lab.now);
        assert!(found_at_the_end(&lab).is_empty());
    }

    #[test]
    fn message_may_end_with_its_last_attempt() {
        for (attempt, found) in [(2, vec![]), (1, vec![CHECK])] {
            let mut lab =
                Lab::with(Config { max_deliver: Some(2), ..Config::new(millis(ACK_WAIT)) });
            lab.send(1, attempt);
            assert_eq!(found_at_the_end(&lab), found);
        }
    }

    #[test]
    fn last_attempt_that_jetstream_has_never_sent_is_the_end() {
        for (replicas, unsent, found) in [
            (3, (1, 2), vec![]),
            (3, (1, 1), vec![CHECK]),
            (3, (2, 2), vec![CHECK]),
            (1, (1, 2), vec![CHECK]),
        ] {
            let config = Config::new(millis(ACK_WAIT));
            let mut lab = Lab::with(Config { max_deliver: Some(2), replicas, ..config });
            lab.send(1, 1);
            assert_eq!(found_without(&lab, &[unsent]), found, "{replicas} {unsent:?}");
        }
    }

    #[test]
    fn message_that_is_sent_after_its_confirmed_ack_is_found_unless_a_restart_undoes_it() {
        for (restarts, found) in [(false, vec![CHECK]), (true, vec![])] {
            let mut lab = Lab::new();
            let id = lab.held();
            let call = lab.ask(1, id, &ack());
            lab.apply(1, AckKind::Ack, id, id);
            lab.confirm(call);
            lab.watch().dropped(id, lab.now);
            if restarts {
                lab.trouble(Trouble::Restarted, 100);
            }
            lab.wait(ACK_WAIT);
            lab.send(2, 2);
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn message_comes_back_after_the_delay_of_its_nak_and_not_before() {
        for (after, found) in [(1_900, vec![CHECK]), (2_000, vec![])] {
            let mut lab = Lab::new();
            let id = lab.held();
            let call = lab.ask(1, id, &nak(2_000));
            lab.apply(1, AckKind::Nak(Some(millis(2_000))), id, id);
            lab.confirm(call);
            lab.wait(after);
            lab.send(2, 2);
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn delay_of_a_nak_may_end_early_by_a_holder_before() {
        let trials = [
            (Some(Trouble::LeaderAway), vec![]),
            (Some(Trouble::Wire { side: 1 }), vec![]),
            (Some(Trouble::Wire { side: 3 }), vec![CHECK]),
            (None, vec![CHECK]),
        ];
        let kinds = [AckKind::Progress, AckKind::Nak(None)];
        for (kind, (trouble, found)) in
            kinds.into_iter().flat_map(|kind| trials.clone().map(|trial| (kind.clone(), trial)))
        {
            let mut lab = Lab::new();
            let old = lab.held();
            lab.ask(1, old, &nak(0));
            lab.wait(ACK_WAIT);
            if let Some(trouble) = trouble {
                lab.trouble(trouble, 1_000);
            }
            lab.wait(100);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 3_600);
            let call = lab.ask(2, new, &nak(6_000));
            lab.apply(2, AckKind::Nak(Some(millis(6_000))), new, new);
            lab.confirm(call);
            lab.wait(300);
            lab.apply(1, kind, old, new);
            lab.watch().dropped(new, lab.now);
            lab.wait(ACK_WAIT);
            lab.send(2, 3);
            let own: Vec<_> = lab.found().into_iter().filter(|check| *check == CHECK).collect();
            assert_eq!(own, found);
        }
    }

    #[test]
    fn last_attempt_is_never_given_back_by_the_proxy() {
        for (attempt, found) in [(1, vec![]), (2, vec![CHECK])] {
            let mut lab =
                Lab::with(Config { max_deliver: Some(2), ..Config::new(millis(ACK_WAIT)) });
            let id = lab.send(1, attempt);
            lab.apply(1, AckKind::Nak(None), id, id);
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn answer_says_which_message_and_attempt_it_has() {
        for (attempt, found) in [(1, vec![]), (2, vec![CHECK])] {
            let mut lab = Lab::new();
            let id = lab.send(1, 1);
            lab.hand(1, id, attempt, 3_600);
            assert_eq!(lab.found(), found);
        }
        let lab = Lab::new();
        lab.hand(1, DeliveryId(7), 1, 3_600);
        assert_eq!(lab.found(), [CHECK], "it was never delivered");
    }
}
