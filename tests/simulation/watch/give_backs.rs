//! Check: the messages of an attempt that was given back are nobody's. Pure.
//!
//! 1. No old token settles them, and none is destroyed.
//! 2. A give-back ends, and a refusal of it has a cause.

use std::time::Duration;

use fetch_proxy::broker::ConsumerName;
use tonic::Status;

use super::{
    super::jetstream::{DeliveryId, Time},
    answers,
    attempts::{Answer, Back, CHECK, TICK, has_moved, remembers, unseen_until},
    leases,
    ledger::{CallId, Delivered, Kind, Ledger, Message, Told},
    report::Report,
    rights,
    troubles::Trouble,
};

/// A refusal has its cause within this time.
const CAUSE_WITHIN: Duration = Duration::from_secs(12);

/// How a give-back ended, for its client.
#[derive(Debug, Clone, Copy)]
pub enum BackEnd<'e> {
    /// So many messages were given back, as far as the replica knows.
    Done(usize),
    Refused(&'e Status),
    /// A patient client has waited for as long as any call may take.
    Overdue,
    Gone,
}

/// An attempt is about to be given back: its client relies on nothing of it from now on.
pub fn called(ledger: &mut Ledger, name: &str, side: usize, now: Time) -> usize {
    let Some(attempt) = ledger.attempts.get_mut(name) else { return 0 };
    attempt.backs.push(Back { side, began: now, ended: None, sure: false });
    for (id, _) in attempt.answers.iter().flat_map(|answer| &answer.ids) {
        let one = ledger.deliveries.get_mut(id).filter(|one| {
            let calls = &attempt.calls;
            calls.iter().any(|call| call.id == one.by)
        });
        if let Some(hold) = one.and_then(|one| one.hold.as_mut()) {
            hold.until = hold.until.min(now);
        }
    }
    attempt.backs.len() - 1
}

/// A give-back has ended for its client.
pub fn ended(
    ledger: &mut Ledger,
    (name, number): (&str, usize),
    end: BackEnd<'_>,
    now: Time,
    report: &mut Report,
) {
    let Some(attempt) = ledger.attempts.get(name) else { return };
    let Some(Back { side, began, .. }) = attempt.backs.get(number) else { return };
    let (side, began) = (*side, *began);
    let why = match end {
        BackEnd::Done(_) => None,
        BackEnd::Gone => return,
        BackEnd::Overdue => {
            let gone = [Trouble::Killed { side }, Trouble::Stopped { side }];
            let mut gone = gone.into_iter().chain([Trouble::Suspended { side }]);
            let consumer = &attempt.consumer;
            let gone = gone.any(|trouble| ledger.troubles.happened(trouble, consumer, began, now));
            (!gone).then(|| "has no answer, and its process lives".to_owned())
        }
        BackEnd::Refused(status) => {
            let reason = answers::reason_of(status);
            report.coverage.count(format!("give back: {reason}"));
            refused(ledger, (&attempt.consumer, side), &reason, (began, now))
        }
    };
    if let Some(why) = why {
        return report.fail(CHECK, now, format!("GiveBack: {why}\n  {attempt:?}"));
    }
    if !matches!(end, BackEnd::Done(_)) {
        return;
    }
    let BackEnd::Done(count) = end else { return };
    let all = || attempt.ids().filter_map(|(id, _)| ledger.deliveries.get(id));
    let sure = |answer: &Answer| remembers(ledger, side, answer.written, now);
    let owns = all().all(|one| one.side == side && !has_moved(ledger, one, now))
        && attempt.answers.iter().all(sure);
    let back: Vec<DeliveryId> = attempt
        .ids()
        .filter(|(id, _)| {
            let one = ledger.deliveries.get(id);
            // A lease that has ended before was not given back.
            let lives = |one: &Delivered| one.hold.is_some_and(|hold| now + TICK < hold.longest);
            one.is_some_and(|one| one.calls.is_empty() && attempt.has(one.by) && lives(one))
        })
        .map(|(id, _)| *id)
        .collect();
    let sure = !attempt.answers.is_empty() && (owns || count >= all().count());
    if sure {
        let through = if owns { "" } else { " through another replica" };
        report.coverage.count(format!("attempt: given back{through}"));
    }
    if let Some(one) = ledger.attempts.get_mut(name).and_then(|one| one.backs.get_mut(number)) {
        (one.ended, one.sure) = (Some(now), sure);
    }
    for id in back.iter().filter(|_| sure) {
        if let Some(one) = ledger.deliveries.get_mut(id) {
            one.given_back.get_or_insert(now);
            one.hold.iter_mut().for_each(|hold| hold.longest = hold.longest.min(now));
        }
    }
}

/// Why a refusal of a give-back is wrong.
fn refused(
    ledger: &Ledger,
    (consumer, side): (&ConsumerName, usize),
    reason: &str,
    (began, now): (Time, Time),
) -> Option<String> {
    let since = began.saturating_sub(CAUSE_WITHIN);
    let happened = |trouble| ledger.troubles.happened(trouble, consumer, Time::ZERO, now);
    let cause = match reason {
        "NATS_UNAVAILABLE" => {
            // The replica with the messages may be another, and may be leaving.
            let accident = ledger.troubles.calm_at(consumer, |_| true, since, now).is_some();
            accident || began < CAUSE_WITHIN
        }
        "NATS_PERMISSION" => happened(Trouble::Refused),
        "DRAINING" => happened(Trouble::Draining { side }),
        "NOT_ALLOWED" => rights::denies(ledger, (side, consumer.clone()), began, now),
        _ => return Some(format!("{reason} is not listed, or nothing can cause it")),
    };
    (!cause).then(|| format!("{reason} without a cause"))
}

/// Whether an attempt is given back for sure.
pub fn is_given_back(ledger: &Ledger, name: &str) -> bool {
    let attempt = ledger.attempts.get(name);
    attempt.is_some_and(|attempt| attempt.backs.iter().any(|back| back.sure))
}

/// A settlement is answered: "No token of it settles anything then." Nobody knows that of a process that is gone.
pub fn said(
    ledger: &Ledger,
    CallId(id, place): CallId,
    told: Told,
    now: Time,
    report: &mut Report,
) {
    let Some(one) = ledger.deliveries.get(&id) else { return };
    let Some(call) = one.calls.get(place).filter(|call| call.old_token) else { return };
    let side = one.side;
    let killed = ledger.troubles.happened(Trouble::Killed { side }, &one.message.0, one.sent, now);
    if killed || has_moved(ledger, one, now) {
        return;
    }
    match told {
        // "After the last delivery attempt, a late Ack or Term is applied while the consumer has no delivery in flight."
        // A lease that has ended before is not given back.
        Told::Applied if ledger.is_last_attempt(one) && leases::ends_early(ledger, id, now) => {
            report.coverage.count("attempt: late, by the token of a lease that had ended before");
        }
        // It settles nothing: there is no message any more, and no delivery in flight.
        Told::Applied
            if ledger.is_last_attempt(one)
                && ledger.is_removed((&one.message.0.stream, one.message.1), now) =>
        {
            report.coverage.count("attempt: late, of a message that has left its stream");
        }
        Told::Applied => {
            let why =
                format!("a token that was given back is confirmed: {call:?}\n  {id:?} {one:?}");
            report.fail(CHECK, now, why);
        }
        Told::NotApplied => report.coverage.count("attempt: old token refused"),
        Told::Unknown => {}
    }
}

/// Since when a message waits for a caller, because its attempt was given back, and no accident has touched it since.
pub fn back_since(ledger: &Ledger, one: &Delivered, now: Time) -> Option<Time> {
    let at = one.given_back?;
    let moved = has_moved(ledger, one, now);
    let touches = |side| moved || side == one.side;
    let calm = ledger.troubles.calm_at(&one.message.0, touches, at, now).is_none();
    calm.then_some(at)
}

/// All attempts of a message are over: "It never naks a last attempt: that message waits for a caller at its replica."
pub fn destroyed(ledger: &Ledger, message: &Message, now: Time, report: &mut Report) {
    let Some(id) = ledger.of.get(message).and_then(|all| all.last()) else { return };
    let Some(one) = ledger.deliveries.get(id) else { return };
    let Some(at) = one.given_back else { return };
    let moved = one.effects.iter().map(|effect| effect.at).fold(one.sent, Time::max);
    let gone = (moved + ledger.longest_wait(&message.0, one.sent)).min(now);
    // JetStream had given it up before, or another attempt may have had it without an answer that was seen. Or the next
    // caller could not decode it: "a message that cannot be decoded is terminated with a reason".
    let terminated = one.applied(Kind::Term) > 0;
    if gone < at || terminated || unseen_until(ledger, one, now).is_some_and(|until| until >= at) {
        return;
    }
    if back_since(ledger, one, gone.max(at)).is_some() {
        let why = format!("a message was given back, and nobody had it again: {id:?} {one:?}");
        report.fail(CHECK, now, why);
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            super::jetstream::Config,
            lab::{ACK_WAIT, Lab, ack, millis, name},
        },
        *,
    };

    #[test]
    fn old_token_settles_nothing() {
        for (reason, found) in [(None, vec![CHECK]), (Some("LEASE_EXPIRED"), vec![])] {
            let mut lab = Lab::new();
            let id = lab.lent(3_600);
            lab.give_back(1, "a");
            // Another client has the message.
            lab.hand(1, id, 1, 3_600);
            let call = lab.ask(1, id, &ack());
            lab.watch().by_old_token(call);
            match reason {
                Some(reason) => lab.refuse(call, reason),
                None => {
                    lab.apply(1, fetch_proxy::broker::AckKind::Ack, id, id);
                    lab.confirm(call);
                }
            }
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn old_token_of_a_last_attempt_may_settle_if_its_lease_had_ended_before() {
        for (most, leader_away, found) in [(1, true, false), (1, false, true), (2, true, true)] {
            let config = Config { max_deliver: Some(most), ..Config::new(millis(ACK_WAIT)) };
            let mut lab = Lab::with(config);
            let id = lab.lent(60_000);
            if leader_away {
                lab.trouble(Trouble::LeaderAway, 1_000);
            }
            lab.wait(2_000);
            lab.give_back(1, "a");
            let call = lab.ask(1, id, &ack());
            lab.watch().by_old_token(call);
            lab.apply(1, fetch_proxy::broker::AckKind::Ack, id, id);
            lab.confirm(call);
            assert_eq!(lab.found().contains(&CHECK), found, "{most} {leader_away}");
        }
    }

    #[test]
    fn old_token_of_a_last_attempt_may_be_confirmed_after_its_message_has_left_the_stream() {
        for (most, removed, found) in [(1, true, false), (1, false, true), (2, true, true)] {
            let config = Config { max_deliver: Some(most), ..Config::new(millis(ACK_WAIT)) };
            let mut lab = Lab::with(config);
            let id = lab.lent(60_000);
            lab.give_back(1, "a");
            if removed {
                lab.watch().removed("S", 1, lab.now);
            }
            let call = lab.ask(1, id, &ack());
            lab.watch().by_old_token(call);
            lab.wait(10);
            lab.confirm(call);
            assert_eq!(lab.found().contains(&CHECK), found, "{most} {removed}");
        }
    }

    #[test]
    fn message_that_was_given_back_may_be_terminated_by_its_codec() {
        let config = Config { max_deliver: Some(1), ..Config::new(millis(ACK_WAIT)) };
        let mut lab = Lab::with(config);
        let id = lab.lent(3_600);
        lab.give_back(1, "a");
        lab.wait(100);
        lab.apply(1, fetch_proxy::broker::AckKind::Term(String::new()), id, id);
        lab.wait(60_000);
        lab.watch().finished(&name(), (&[], &[]), lab.now);
        assert!(!lab.found().contains(&CHECK), "{:?}", lab.found());
    }

    #[test]
    fn last_attempt_that_was_given_back_waits_for_a_caller() {
        for (taken, killed, found) in
            [(false, false, vec![CHECK]), (true, false, vec![]), (false, true, vec![])]
        {
            let config = Config { max_deliver: Some(1), ..Config::new(millis(ACK_WAIT)) };
            let mut lab = Lab::with(config);
            let id = lab.lent(3_600);
            lab.give_back(1, "a");
            if taken {
                lab.hand(1, id, 1, 1_000);
            }
            if killed {
                lab.trouble(Trouble::Killed { side: 1 }, 0);
            }
            lab.wait(60_000);
            lab.watch().finished(&name(), (&[], &[]), lab.now);
            assert_eq!(lab.found(), found, "{taken} {killed}");
        }
    }
}
