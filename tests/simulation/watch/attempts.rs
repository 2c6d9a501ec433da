//! Facts about attempts: all calls with one name, their answers and give-backs, and what they mean for a hold. Pure.
//!
//! The checks `repeats` and `give_backs` judge them.

use std::time::Duration;

use fetch_proxy::broker::ConsumerName;

use super::{
    super::jetstream::{DeliveryId, Time},
    calls::{FetchId, OpenFetch},
    ledger::{Delivered, Hold, Ledger},
    troubles::Trouble,
};

/// The name of the checks of attempts.
pub const CHECK: &str = "attempts";

/// Timers are exact to a millisecond, and an answer rounds the length of a lease.
pub const TICK: Duration = Duration::from_millis(3);
/// "A replica remembers an attempt for 5 min after its first answer."
const REMEMBERED: Duration = Duration::from_secs(290);

/// All calls with one name.
#[derive(Debug)]
pub struct Attempt {
    pub consumer: ConsumerName,
    pub calls: Vec<Call>,
    pub answers: Vec<Answer>,
    pub backs: Vec<Back>,
}

#[derive(Debug)]
pub struct Call {
    pub id: FetchId,
    pub side: usize,
    pub began: Time,
    pub arrived: Option<Time>,
    pub ended: Option<Time>,
    /// The length of its leases, if it asks for one.
    pub lease: Option<Duration>,
}

/// An answer that a replica has written.
#[derive(Debug)]
pub struct Answer {
    pub call: FetchId,
    pub side: usize,
    pub written: Time,
    /// Its messages, and the ends of their leases.
    pub ids: Vec<(DeliveryId, Time)>,
    pub rejected: bool,
}

#[derive(Debug)]
pub struct Back {
    pub side: usize,
    pub began: Time,
    /// A replica has said that the attempt is over.
    pub ended: Option<Time>,
    /// That replica had all its messages.
    pub sure: bool,
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

    pub fn ids(&self) -> impl Iterator<Item = &(DeliveryId, Time)> {
        self.answers.iter().flat_map(|answer| &answer.ids)
    }

    pub fn has(&self, fetch: FetchId) -> bool {
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
pub fn remembers(ledger: &Ledger, side: usize, since: Time, now: Time) -> bool {
    let of = ledger.attempts.values().flat_map(|attempt| &attempt.answers);
    let later = of.filter(|answer| answer.side == side && answer.written >= since);
    let lent: usize = later.map(|answer| answer.ids.len() + 1).sum();
    let most = ledger.places.get(&side).copied().unwrap_or_default();
    2 * lent + 20 <= most && now < since + REMEMBERED
}

pub fn has_moved(ledger: &Ledger, one: &Delivered, now: Time) -> bool {
    let drained = Trouble::Draining { side: one.side };
    ledger.troubles.happened(drained, &one.message.0, one.sent, now)
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
