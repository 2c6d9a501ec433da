//! Check: an attempt has one set of leases, until it is settled or given back. Pure.
//!
//! 1. A repeat at a replica that knows the attempt has the same messages, as far as their leases live, and no others.
//!    None of their leases ends earlier than an answer before has said.
//! 2. An attempt that is settled or given back leases nothing. ATTEMPT_OVER needs such a cause, or no lease is left.

use std::time::Duration;

use fetch_proxy::{broker::ConsumerName, pb};

use super::{
    super::jetstream::{DeliveryId, Time},
    attempts::{Answer, Attempt, Back, CHECK, Call, TICK, has_moved, remembers},
    calls::{FetchId, OpenFetch},
    delivery_of, lease_of, leases,
    ledger::{Delivered, Ledger, Told},
    report::Report,
};

/// The owner of an attempt may answer so late: "it asks all other replicas, and waits 200 ms for their answers".
const OWNER_ANSWERS: Duration = Duration::from_millis(200);
/// After an accident, replicas hear each other again within this time.
const RECOVERY: Duration = Duration::from_secs(8);

/// Whether the lease of a message, which ends then, must still be held by its attempt.
fn is_leased(ledger: &Ledger, (id, end): (DeliveryId, Time), now: Time) -> bool {
    let Some(one) = ledger.deliveries.get(&id) else { return false };
    let (name, sequence) = &one.message;
    let newest = ledger.of.get(&one.message).and_then(|all| all.last()) == Some(&id);
    newest
        && now + TICK < end
        && one.calls.is_empty()
        && !ledger.is_removed((&name.stream, *sequence), now)
        && !has_moved(ledger, one, now)
        && !leases::ends_early(ledger, id, now)
}

/// Whether a call at `side` must find what the process `owner` knows.
fn finds(ledger: &Ledger, name: &ConsumerName, (side, owner): (usize, usize), now: Time) -> bool {
    let touches = |of| of == side || of == owner;
    let since = now.saturating_sub(RECOVERY);
    side == owner || ledger.troubles.calm_at(name, touches, since, now).is_none()
}

/// A replica has written the answer to a Fetch.
pub fn written(
    ledger: &mut Ledger,
    (fetch, id): (&OpenFetch, FetchId),
    answer: &pb::FetchResponse,
    now: Time,
    report: &mut Report,
) {
    let Some(name) = &fetch.attempt else { return };
    let ids = answer.messages.iter().map(|one| (delivery_of(one), now + lease_of(one)));
    let ids: Vec<(DeliveryId, Time)> = ids.collect();
    let Some(attempt) = ledger.attempts.get(name) else { return };
    for why in wrong(ledger, attempt, (fetch, id), (answer, &ids), now, report) {
        let why = format!("attempt {name}: {why}\n  {fetch:?}\n  {answer:?}\n  {attempt:?}");
        report.fail(CHECK, now, why);
    }
    let rejected = !answer.rejected.is_empty();
    if !ids.is_empty() || rejected {
        let answer = Answer { call: id, side: fetch.side, written: now, ids, rejected };
        ledger.attempts.entry(name.clone()).and_modify(|one| one.answers.push(answer));
    }
}

fn wrong(
    ledger: &Ledger,
    attempt: &Attempt,
    (fetch, id): (&OpenFetch, FetchId),
    (answer, ids): (&pb::FetchResponse, &[(DeliveryId, Time)]),
    now: Time,
    report: &mut Report,
) -> Vec<String> {
    let (mut broken, name) = (Vec::new(), &fetch.consumer);
    let Some(call) = attempt.calls.iter().find(|call| call.id == id) else { return broken };
    let Some(arrived) = call.arrived else { return broken };
    let over = |since: Time| since < arrived && remembers(ledger, fetch.side, since, now);
    let back = |back: &Back| back.side == fetch.side && back.ended.is_some_and(over);
    let ended = attempt.backs.iter().any(back);
    let here = |one: &&Delivered| one.side == fetch.side && !has_moved(ledger, one, now);
    let done = |one: &Delivered| {
        let told = |(at, told)| told == Told::Applied && at < arrived;
        one.calls.iter().any(|call| !call.old_token && call.ended.is_some_and(told))
    };
    let settled = attempt.answers.iter().any(|earlier| {
        let all = earlier.ids.iter().filter_map(|(of, _)| ledger.deliveries.get(of));
        earlier.call != id && over(earlier.written) && all.filter(here).any(done)
    });
    let empty = answer.empty_reason();
    let waits =
        [pb::EmptyReason::NoMessages, pb::EmptyReason::Paused, pb::EmptyReason::MaxAckPending];
    if ended || settled {
        report.coverage.count("attempt: over, and repeated");
        if !ids.is_empty() || waits.contains(&empty) {
            broken.push(format!("is over (given back {ended}, settled {settled}), and goes on"));
        }
        return broken;
    }
    for earlier in attempt.answers.iter().filter(|earlier| earlier.call != id) {
        for (of, end) in &earlier.ids {
            let Some(one) = ledger.deliveries.get(of) else { continue };
            let again = ids.iter().find(|(other, _)| other == of);
            if let Some((_, new_end)) = again {
                let late = if fetch.side == one.side { TICK } else { OWNER_ANSWERS + TICK };
                let early = *new_end + late < *end;
                if early && one.calls.is_empty() && !leases::ends_early(ledger, *of, now) {
                    broken.push(format!("{of:?} ends at {new_end:?}, and was to end at {end:?}"));
                }
                let through = if fetch.side == one.side { "" } else { ", at another replica" };
                report.coverage.count(format!("attempt: same messages again{through}"));
                continue;
            }
            let others = || attempt.calls.iter().filter(|other| other.id != id);
            let knows = earlier.written < arrived
                && remembers(ledger, one.side, earlier.written, now)
                && finds(ledger, name, (fetch.side, one.side), now)
                // A deadline may leave no time to ask the owner.
                && (fetch.side == one.side || fetch.explained_within.is_none())
                && (fetch.side == one.side || others().all(|other| other.side == one.side))
                && attempt.backs.is_empty()
                && earlier.ids.iter().all(|one| is_leased(ledger, *one, now));
            let rejected = answer.rejected.iter().any(|no| no.stream_sequence == one.message.1);
            if knows && !rejected && (!ids.is_empty() || waits.contains(&empty)) {
                broken.push(format!("{of:?} is leased to it, and is not in the answer"));
            }
        }
    }
    broken
}

/// Whether it is true that the attempt of a Fetch is over.
pub fn is_over(ledger: &Ledger, fetch: &OpenFetch, now: Time) -> bool {
    let Some(attempt) = fetch.attempt.as_ref().and_then(|name| ledger.attempts.get(name)) else {
        return false;
    };
    let this = |call: &Call| call.side == fetch.side && call.began == fetch.began;
    let Some(place) = attempt.calls.iter().position(this) else { return false };
    // Another call, which may have arrived later, or its question to the other replicas.
    let overlaps = |other: &Call| {
        other.ended.is_none_or(|ended| fetch.began <= ended + OWNER_ANSWERS + ledger.round_trip)
    };
    let others = attempt.calls.iter().enumerate().filter(|(other, _)| *other != place);
    let replaced = others.map(|(_, other)| other).any(overlaps);
    let settled = |(id, _): &(DeliveryId, Time)| {
        ledger.deliveries.get(id).is_some_and(|one| !one.calls.is_empty())
    };
    let rejected = attempt.answers.iter().any(|answer| answer.rejected);
    let mut ids = attempt.ids().peekable();
    let none_left = ids.peek().is_some() && !ids.any(|one| is_leased(ledger, *one, now));
    // A repeat has taken the messages of an answer that was not written, and its own answer was not written either. Or
    // such leases have ended by an accident.
    let answered = |call: &Call| attempt.answers.iter().any(|answer| answer.call == call.id);
    let unseen = attempt.calls[..place].iter().any(|call| !answered(call));
    let since = attempt.calls[0].began;
    let accident = || ledger.troubles.calm_at(&fetch.consumer, |_| true, since, now).is_some();
    let unseen = unseen && (place > 1 || accident());
    !attempt.backs.is_empty()
        || replaced
        || attempt.ids().any(settled)
        || rejected
        || none_left
        || unseen
}

#[cfg(test)]
mod tests {
    use fetch_proxy::pb::EmptyReason::{AttemptOver, NoMessages, Unspecified};

    use super::{
        super::{
            FetchEnd, Served,
            lab::{Lab, ack},
            troubles::Trouble,
        },
        *,
    };

    #[test]
    fn repeat_that_finds_nothing_has_a_cause() {
        for (side, wait, trouble, found) in [
            (1, 0, None, vec![CHECK]),
            (2, 0, None, vec![CHECK]),
            (1, 3_600, None, vec![]),
            (2, 0, Some(Trouble::Wire { side: 1 }), vec![]),
            (1, 0, Some(Trouble::Draining { side: 1 }), vec![]),
        ] {
            let mut lab = Lab::new();
            lab.lent(3_600);
            lab.fetch_named(2, "other");
            lab.wait(wait);
            trouble.into_iter().for_each(|trouble| lab.trouble(trouble, 0));
            let again = lab.fetch_named(side, "a");
            lab.write_to(again, None, NoMessages);
            assert_eq!(lab.found(), found, "{side} {wait} {trouble:?}");
        }
    }

    #[test]
    fn repeat_never_ends_a_lease_earlier() {
        for (lease, found) in [(3_590, vec![]), (3_500, vec![CHECK]), (9_000, vec![])] {
            let mut lab = Lab::new();
            let id = lab.lent(3_600);
            let again = lab.fetch_named(1, "a");
            lab.write_to(again, Some((id, lease)), Unspecified);
            assert_eq!(lab.found(), found, "{lease}");
        }
    }

    #[test]
    fn attempt_that_is_over_leases_nothing() {
        for (over, settled, found) in
            [(true, false, vec![CHECK]), (false, true, vec![CHECK]), (false, false, vec![])]
        {
            let mut lab = Lab::new();
            let id = lab.lent(3_600);
            if over {
                lab.give_back(1, "a");
            }
            if settled {
                let call = lab.ask(1, id, &ack());
                lab.apply(1, fetch_proxy::broker::AckKind::Ack, id, id);
                lab.confirm(call);
            }
            lab.wait(10);
            let again = lab.fetch_named(1, "a");
            lab.write_to(again, Some((id, 3_600)), Unspecified);
            assert_eq!(lab.found(), found, "{over} {settled}");
        }
    }

    #[test]
    fn attempt_is_over_for_a_cause() {
        for (back, wait, found) in
            [(false, 0, vec!["calls"]), (true, 0, vec![]), (false, 3_600, vec![])]
        {
            let mut lab = Lab::new();
            lab.lent(3_600);
            lab.wait(300 + wait);
            let again = lab.fetch_named(1, "a");
            if back {
                lab.give_back(1, "a");
            }
            let answer = pb::FetchResponse {
                empty_reason: AttemptOver.into(),
                ..pb::FetchResponse::default()
            };
            let served = Served { arrived: lab.now, written: lab.now };
            lab.end(again, FetchEnd::Answer { answer: &answer, served, received: true });
            assert_eq!(lab.found(), found, "{back} {wait}");
        }
    }
}
