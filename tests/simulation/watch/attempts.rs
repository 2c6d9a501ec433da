//! Check: an attempt has one set of leases, until it is settled or given back. Pure.
//!
//! 1. A repeat at a replica that knows the attempt has the same messages, as far as their leases live, and no others.
//!    None of their leases ends earlier than an answer before has said.
//! 2. An attempt that is settled or given back leases nothing. ATTEMPT_OVER needs such a cause, or no lease is left.
//! 3. The messages of an attempt that was given back are nobody's: no old token settles them, and none is destroyed.

use std::time::Duration;

use fetch_proxy::{broker::ConsumerName, pb};
use tonic::Status;

use super::{
    super::jetstream::{DeliveryId, Time},
    answers,
    calls::{FetchId, OpenFetch},
    delivery_of, lease_of, leases,
    ledger::{CallId, Delivered, Hold, Kind, Ledger, Message, Told},
    report::Report,
    rights,
    troubles::Trouble,
};

pub const CHECK: &str = "attempts";

/// Timers are exact to a millisecond, and an answer rounds the length of a lease.
const TICK: Duration = Duration::from_millis(3);
/// The owner of an attempt may answer so late: "it asks all other replicas, and waits 200 ms for their answers".
const OWNER_ANSWERS: Duration = Duration::from_millis(200);
/// "A replica remembers an attempt for 5 min after its first answer."
const REMEMBERED: Duration = Duration::from_secs(290);
/// After an accident, replicas hear each other again within this time.
const RECOVERY: Duration = Duration::from_secs(8);
/// A refusal has its cause within this time.
const CAUSE_WITHIN: Duration = Duration::from_secs(12);

/// All calls with one name.
#[derive(Debug)]
pub struct Attempt {
    consumer: ConsumerName,
    calls: Vec<Call>,
    answers: Vec<Answer>,
    backs: Vec<Back>,
}

#[derive(Debug)]
struct Call {
    id: FetchId,
    side: usize,
    began: Time,
    arrived: Option<Time>,
    ended: Option<Time>,
    /// The length of its leases, if it asks for one.
    lease: Option<Duration>,
}

/// An answer that a replica has written.
#[derive(Debug)]
struct Answer {
    call: FetchId,
    side: usize,
    written: Time,
    /// Its messages, and the ends of their leases.
    ids: Vec<(DeliveryId, Time)>,
    rejected: bool,
}

#[derive(Debug)]
struct Back {
    side: usize,
    began: Time,
    /// A replica has said that the attempt is over.
    ended: Option<Time>,
    /// That replica had all its messages.
    sure: bool,
}

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

/// What an attempt means for a message of its answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Earlier {
    /// Nothing: the client has it by no other call.
    First,
    /// An answer before had it too. The call began then.
    Again(Time),
    /// Its client has given it back.
    Over,
}

impl Attempt {
    fn new(consumer: ConsumerName) -> Self {
        Self { consumer, calls: Vec::new(), answers: Vec::new(), backs: Vec::new() }
    }

    fn ids(&self) -> impl Iterator<Item = &(DeliveryId, Time)> {
        self.answers.iter().flat_map(|answer| &answer.ids)
    }

    fn has(&self, fetch: FetchId) -> bool {
        self.calls.iter().any(|call| call.id == fetch)
    }
}

/// A Fetch leaves its client.
pub fn called(ledger: &mut Ledger, fetch: &OpenFetch, id: FetchId) {
    let Some(name) = &fetch.attempt else { return };
    let new = || Attempt::new(fetch.consumer.clone());
    let attempt = ledger.attempts.entry(name.clone()).or_insert_with(new);
    let OpenFetch { side, began, lease, .. } = *fetch;
    attempt.calls.push(Call { id, side, began, arrived: None, ended: None, lease });
}

/// It has arrived at its replica.
pub fn arrived(ledger: &mut Ledger, fetch: &OpenFetch, id: FetchId, now: Time) {
    let attempt = fetch.attempt.as_ref().and_then(|name| ledger.attempts.get_mut(name));
    let calls = attempt.into_iter().flat_map(|attempt| &mut attempt.calls);
    calls.filter(|call| call.id == id).for_each(|call| call.arrived = Some(now));
}

/// It has ended for its client. A repeat may have leased messages anew that are not in its answer: nobody has seen it.
pub fn ended(ledger: &mut Ledger, (fetch, id): (&OpenFetch, FetchId), now: Time) {
    let attempt = fetch.attempt.as_ref().and_then(|name| ledger.attempts.get_mut(name));
    let Some(attempt) = attempt else { return };
    let Some(place) = attempt.calls.iter().position(|call| call.id == id) else { return };
    attempt.calls[place].ended = Some(now);
    if attempt.calls.len() == 1 {
        return;
    }
    // Its question to the owner may arrive later than the call ends.
    let calm = ledger.troubles.calm_at(&fetch.consumer, |_| true, fetch.began, now);
    let lent = calm.unwrap_or(now).max(now);
    let (own, others): (Vec<_>, Vec<_>) =
        attempt.answers.iter().partition(|answer| answer.call == id);
    let seen = |id: DeliveryId| own.iter().any(|own| own.ids.iter().any(|(of, _)| *of == id));
    for (of, _) in others.iter().flat_map(|answer| &answer.ids).filter(|(of, _)| !seen(*of)) {
        let one = ledger.deliveries.get_mut(of).filter(|one| {
            let calls = &attempt.calls;
            calls.iter().any(|call| call.id == one.by)
        });
        if let Some(hold) = one.and_then(|one| one.hold.as_mut()) {
            let length = fetch.lease.unwrap_or(hold.longest.saturating_sub(hold.from));
            hold.longest = hold.longest.max(lent + length);
        }
    }
}

/// Until when a message may be leased to an attempt of which no client has seen an answer. Its first answer was not
/// written when a repeat came, and that of the repeat was not written either: "A Fetch with an `attempt_id` can be
/// repeated or given back before" the end of its leases.
pub fn unseen_until(ledger: &Ledger, one: &Delivered, now: Time) -> Option<Time> {
    let name = &one.message.0;
    let of = ledger.attempts.values().filter(|attempt| attempt.consumer == *name);
    let unseen = one.hold.is_none() || one.given_back.is_some();
    let may = of.filter(|attempt| unseen && attempt.calls.len() > 1).flat_map(|attempt| {
        let unanswered = |call: &&Call| !attempt.answers.iter().any(|no| no.call == call.id);
        attempt.calls.iter().filter(unanswered)
    });
    let ends = may.map(|call| (call.ended.unwrap_or(now), call.lease));
    let (wait, since) = (ledger.longest_wait(name, one.sent), one.given_back.unwrap_or(one.sent));
    let ends = ends.filter(|(ended, _)| *ended >= since);
    ends.map(|(ended, lease)| ended + lease.unwrap_or(wait)).max()
}

/// Whether a process still remembers what it has lent then: "at most as many leases of attempts as it may have". It
/// counts also what no client has seen.
fn remembers(ledger: &Ledger, side: usize, since: Time, now: Time) -> bool {
    let of = ledger.attempts.values().flat_map(|attempt| &attempt.answers);
    let later = of.filter(|answer| answer.side == side && answer.written >= since);
    let lent: usize = later.map(|answer| answer.ids.len() + 1).sum();
    let most = ledger.places.get(&side).copied().unwrap_or_default();
    2 * lent + 20 <= most && now < since + REMEMBERED
}

fn has_moved(ledger: &Ledger, one: &Delivered, now: Time) -> bool {
    let drained = Trouble::Draining { side: one.side };
    ledger.troubles.happened(drained, &one.message.0, one.sent, now)
}

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

/// What the attempt of a Fetch means for a message that it has brought.
pub fn earlier(ledger: &Ledger, fetch: FetchId, id: DeliveryId) -> Earlier {
    let Some(attempt) = ledger.attempts.values().find(|attempt| attempt.has(fetch)) else {
        return Earlier::First;
    };
    if !attempt.backs.is_empty() {
        return Earlier::Over;
    }
    let has = |answer: &Answer| answer.call != fetch && answer.ids.iter().any(|(of, _)| *of == id);
    let began = attempt.calls.iter().find(|call| call.id == fetch).map(|call| call.began);
    let again = began.filter(|_| attempt.answers.iter().any(has));
    again.map_or(Earlier::First, Earlier::Again)
}

/// The hold of a client that has a message by this Fetch from now on.
pub fn hold(earlier: Earlier, one: &mut Delivered, fetch: FetchId, new: Hold) {
    let Some(before) = one.hold else {
        (one.hold, one.by) = (Some(new), fetch);
        return;
    };
    match earlier {
        Earlier::First => {
            (one.hold, one.by, one.given_back) = (Some(new), fetch, None);
        }
        Earlier::Again(began) => {
            one.lent_again.push((began, new.from));
            let relies = new.from < new.until && one.calls.is_empty();
            let until = if relies { before.until.max(new.until) } else { before.until };
            let longest = before.longest.max(new.longest);
            one.hold = Some(Hold { from: before.from, until, longest });
        }
        // Another client may have it now.
        Earlier::Over if one.by == fetch => {
            let until = before.until.min(new.from);
            one.hold = Some(Hold { until, ..before });
        }
        Earlier::Over => {}
    }
}

/// An attempt is about to be given back: its client relies on nothing of it from now on.
pub fn give_back_called(ledger: &mut Ledger, name: &str, side: usize, now: Time) -> usize {
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
pub fn give_back_ended(
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
    use fetch_proxy::pb::EmptyReason::{AttemptOver, NoMessages, Unspecified};

    use super::{
        super::{
            super::jetstream::Config,
            FetchEnd, Served,
            lab::{ACK_WAIT, Lab, ack, millis, name},
        },
        *,
    };

    /// The attempt has the message until `lease` is over, and its client does not know it.
    fn lent(lab: &mut Lab, lease: u64) -> DeliveryId {
        lab.wait(20_000);
        let id = lab.send(1, 1);
        let first = lab.fetch_named(1, "a");
        lab.write_to(first, Some((id, lease)), Unspecified);
        lab.end(first, FetchEnd::Gone);
        lab.wait(10);
        id
    }

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
            lent(&mut lab, 3_600);
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
            let id = lent(&mut lab, 3_600);
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
            let id = lent(&mut lab, 3_600);
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
            lent(&mut lab, 3_600);
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

    #[test]
    fn old_token_settles_nothing() {
        for (reason, found) in [(None, vec![CHECK]), (Some("LEASE_EXPIRED"), vec![])] {
            let mut lab = Lab::new();
            let id = lent(&mut lab, 3_600);
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
            let id = lent(&mut lab, 60_000);
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
    fn message_that_was_given_back_may_be_terminated_by_its_codec() {
        let config = Config { max_deliver: Some(1), ..Config::new(millis(ACK_WAIT)) };
        let mut lab = Lab::with(config);
        let id = lent(&mut lab, 3_600);
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
            let id = lent(&mut lab, 3_600);
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
