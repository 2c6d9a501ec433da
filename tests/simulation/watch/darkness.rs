//! Check: no message is dark for longer than its bound, and no Fetch waits while messages are available. Pure.
//!
//! A message may be unseen for the sum of these, counted from the last event that touched it:
//!
//! ```text
//!  the lease of its last holder  "the messages come back when their leases end"
//!  + the ack wait of an attempt  "come back after their ack wait"
//!  + a few seconds in which somebody asks for it, at a replica that no accident has touched lately
//! ```
//! After a Nak it is the delay, and the few seconds. After a give-back it is a quarter of a second, and the few seconds.

use std::{collections::BTreeMap, time::Duration};

use fetch_proxy::broker::ConsumerName;

use super::{
    super::jetstream::Time,
    attempts,
    calls::{FetchId, OpenFetch},
    give_backs, keep,
    ledger::{Delivered, Kind, Ledger, Message},
    report::Report,
    streams,
    troubles::Trouble,
};

pub const CHECK: &str = "darkness";

/// The consumer as it is at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Look {
    pub consumer: ConsumerName,
    /// Sequences that are not settled.
    pub unsettled: Vec<u64>,
    /// From this sequence on, the consumer has delivered nothing, as far as its leader knows.
    pub next: u64,
    /// How many messages JetStream would hand out now.
    pub available: usize,
    /// `max_ack_pending` is reached.
    pub full: bool,
}

/// A replica as it is at this moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    pub side: usize,
    /// It serves, and can lease more.
    pub serves: bool,
}

/// The memory of earlier looks at one consumer.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Looked {
    /// When the servers last said that `max_ack_pending` is reached, or that it is paused.
    pub full_at: Option<Time>,
    pub paused_at: Option<Time>,
    /// For how long somebody has asked while messages were available and none was sent.
    idle: Duration,
    /// For how long somebody has asked while a message was dark beyond its bound.
    dark: BTreeMap<u64, Duration>,
}

/// A replica that an accident has touched needs so long. It connects again (1 s), tells the other replicas
/// (1 s), and waits for the end of a pull that nobody answers (5 s).
const RECOVERY: Duration = Duration::from_secs(8);
/// A Fetch counts as asking if it waits at its replica for this long.
const ASKING: Duration = Duration::from_millis(300);
/// The few seconds.
const SLACK: Duration = Duration::from_secs(5);
/// For so long nothing may be sent while messages are available and a Fetch waits.
const IDLE: Duration = Duration::from_secs(3);

/// "If no caller takes a message within a quarter of a second, the proxy naks it for the other replicas."
const PARKED: Duration = Duration::from_millis(250);

/// A look at one consumer, `passed` after the one before.
pub fn look(
    ledger: &Ledger,
    looked: &mut Looked,
    fetches: &BTreeMap<FetchId, OpenFetch>,
    (look, places): (&Look, &[Place]),
    (now, passed): (Time, Duration),
    report: &mut Report,
) {
    let name = &look.consumer;
    let paused = ledger.troubles.happened(Trouble::Paused, name, now.saturating_sub(RECOVERY), now);
    let asking: Vec<usize> = fetches
        .values()
        .filter(|fetch| {
            is_asking(ledger, fetch, name, places, now)
                || streams::is_asking(ledger, fetch, name, places, now)
        })
        .map(|fetch| fetch.side)
        .collect();
    let sent_lately = |since: Time| {
        let lately = ledger.of.range((name.clone(), 0)..).take_while(|((of, _), _)| of == name);
        lately.into_iter().any(|((of, sequence), _)| {
            ledger.newest(&(of.clone(), *sequence)).is_some_and(|one| one.sent >= since)
        })
    };
    let waits = !asking.is_empty() && look.available > 0 && !paused;
    looked.idle = if waits && !sent_lately(now.saturating_sub(passed)) {
        looked.idle + passed
    } else {
        Duration::ZERO
    };
    if looked.idle > IDLE {
        let why = format!(
            "{} messages are available for {:?}, and Fetch calls wait",
            look.available, looked.idle
        );
        report.fail(CHECK, now, why);
        looked.idle = Duration::ZERO;
    }
    let mut dark = BTreeMap::new();
    for sequence in &look.unsettled {
        let message = (name.clone(), *sequence);
        let newest = ledger.newest(&message);
        // A new message waits in its line, and behind those that come again. It is new again if the consumer was made
        // again, or has forgotten that it was delivered.
        if newest.is_none() || *sequence >= look.next {
            continue;
        }
        let asked = match newest {
            // The proxy keeps a last attempt until a worker takes it, at that replica.
            Some(one) if ledger.is_last_attempt(one) => asking.contains(&one.side),
            _ => !asking.is_empty(),
        };
        if paused || due(ledger, &message, now) > now {
            continue;
        }
        let before = looked.dark.get(sequence).copied().unwrap_or_default();
        let time = if asked { before + passed } else { before };
        if time > SLACK && before <= SLACK {
            let why = format!(
                "{sequence} is dark since {:?}, and was asked for {time:?}: {newest:?}",
                due(ledger, &message, now)
            );
            report.fail(CHECK, now, why);
        }
        dark.insert(*sequence, time);
    }
    if let Some(longest) = dark.values().max() {
        report.coverage.lasted("dark: beyond its bound, while asked for", *longest);
    }
    looked.dark = dark;
}

fn is_asking(
    ledger: &Ledger,
    fetch: &OpenFetch,
    name: &ConsumerName,
    places: &[Place],
    now: Time,
) -> bool {
    let serves = places.iter().any(|place| place.side == fetch.side && place.serves);
    let since = now.saturating_sub(RECOVERY);
    let calm = ledger.troubles.calm_at(name, |side| side == fetch.side, since, now).is_none();
    // Without a way to its replica, a client asks nobody.
    let asks = |since: Time| since + ASKING <= now && now < since + fetch.max_wait;
    let open = fetch.waits_since.is_some_and(asks);
    fetch.consumer == *name && serves && calm && open
}

/// Until when a message may be unseen.
fn due(ledger: &Ledger, message: &Message, now: Time) -> Time {
    let (name, sequence) = message;
    let stored = ledger.stored.get(&(name.stream.clone(), *sequence));
    let stored = stored.map(|stored| stored.at).unwrap_or_default();
    let Some(newest) = ledger.newest(message) else { return stored };
    if let Some(at) = after_nak(ledger, message, now) {
        return at;
    }
    // Another attempt may have it since then, by an answer that no client has seen.
    let unseen = attempts::unseen_until(ledger, newest, now);
    let back = give_backs::back_since(ledger, newest, now);
    if let Some(at) = back.filter(|at| unseen.is_none_or(|until| until < *at)) {
        return at + PARKED;
    }
    if let Some(at) = keep::grace_ends(ledger, newest, now) {
        return at;
    }
    let wait = ledger.longest_wait(name, newest.sent);
    let drained = Trouble::Draining { side: newest.side };
    let moved = ledger.troubles.happened(drained, name, newest.sent, now);
    let touches = |side| moved || side == newest.side;
    let calm = ledger.troubles.calm_at(name, touches, newest.sent, now);
    let held = newest.hold.map(|hold| hold.longest);
    let held = held.max(unseen);
    let last = [Some(newest.sent), calm, held, moved_by_acks(ledger, message, newest)];
    last.into_iter().flatten().max().unwrap_or_default() + wait
}

/// The time at which a Nak brings a message back, if nothing has touched the message since. Nobody holds it,
/// and it waits at JetStream.
fn after_nak(ledger: &Ledger, message: &Message, now: Time) -> Option<Time> {
    let (ids, name) = (ledger.of.get(message)?, &message.0);
    let id = ids.last().copied();
    let effects =
        ids.iter().filter_map(|id| ledger.deliveries.get(id)).flat_map(|one| &one.effects);
    let last = effects.filter(|effect| effect.settled == id).max_by_key(|effect| effect.at)?;
    let disturbed = ledger.troubles.calm_at(name, |_| false, last.at, now).is_some();
    // "A consumer with a backoff may make the wait longer".
    let config = ledger.config(name)?;
    let step = config.backoff.first().copied().unwrap_or(config.ack_wait);
    let longer = ledger.longest_wait(name, last.at).saturating_sub(step);
    let delay = last.delay.unwrap_or_default();
    let longer = if delay.is_zero() { Duration::ZERO } else { longer };
    (last.kind == Kind::Nak && !disturbed).then(|| last.at + delay + longer)
}

/// The time to which an ack has moved the clock of JetStream: a Nak with a delay, or progress for a holder.
fn moved_by_acks(ledger: &Ledger, message: &Message, newest: &Delivered) -> Option<Time> {
    let ids = ledger.of.get(message)?;
    let all = ids.iter().filter_map(|id| ledger.deliveries.get(id));
    let effects = all.flat_map(|one| one.effects.iter().map(move |effect| (one, effect)));
    let id = ids.last().copied();
    let of_it = effects.filter(|(_, effect)| effect.settled == id);
    let moved = of_it.filter_map(|(of, effect)| match effect.kind {
        Kind::Nak => Some(effect.at + effect.delay.unwrap_or_default()),
        // Without a holder the proxy may not keep it alive permanently. In a window, an older holder has the message.
        Kind::Extend => {
            let mut holds = [of.hold, newest.hold].into_iter().flatten();
            holds.any(|hold| effect.at <= hold.longest).then_some(effect.at)
        }
        Kind::Ack | Kind::Term => None,
    });
    moved.max()
}

#[cfg(test)]
mod tests {
    use fetch_proxy::broker::AckKind;

    use super::{
        super::{
            super::jetstream::Config,
            FetchEnd,
            lab::{ACK_WAIT, Lab, millis, nak},
        },
        *,
    };

    #[test]
    fn progress_of_an_older_delivery_keeps_its_message_only_for_a_holder() {
        for (held, found) in [(true, false), (false, true)] {
            let mut lab = Lab::new();
            let old = lab.send(1, 1);
            if held {
                lab.hand(1, old, 1, 60_000);
            }
            lab.wait(ACK_WAIT);
            let new = lab.send(2, 2);
            lab.fetch(2, 300_000);
            for _ in 0..6 {
                lab.apply(1, AckKind::Progress, old, new);
                lab.look_on(3_000, 0, false);
            }
            assert_eq!(lab.found().contains(&CHECK), found, "{held}");
        }
    }

    /// Somebody asks at process 2 for all this time.
    fn asked_for(mut lab: Lab, time: u64) -> Vec<&'static str> {
        lab.fetch(2, 300_000);
        lab.look_on(time, 0, false);
        lab.found()
    }

    #[test]
    fn message_that_was_sent_and_never_handed_out_comes_back_after_its_ack_wait() {
        let sent = || {
            let mut lab = Lab::new();
            lab.send(1, 1);
            lab
        };
        assert!(asked_for(sent(), ACK_WAIT + 4_000).is_empty());
        assert_eq!(asked_for(sent(), ACK_WAIT + 6_000), [CHECK]);
    }

    #[test]
    fn message_of_a_holder_comes_back_after_the_lease_and_an_ack_wait() {
        let held = || {
            let mut lab = Lab::new();
            let id = lab.send(1, 1);
            lab.hand(1, id, 1, 9_000);
            lab
        };
        assert!(asked_for(held(), 9_000 + ACK_WAIT + 4_000).is_empty());
        assert_eq!(asked_for(held(), 9_000 + ACK_WAIT + 6_000), [CHECK]);
    }

    #[test]
    fn answer_that_is_still_on_its_way_holds_its_messages() {
        let written = |writes: bool| {
            let mut lab = Lab::new();
            let id = lab.send(1, 1);
            if writes {
                lab.write(id, 9_000);
            }
            lab
        };
        assert!(asked_for(written(true), 9_000 + ACK_WAIT + 4_000).is_empty());
        assert_eq!(asked_for(written(false), 9_000 + ACK_WAIT + 4_000), [CHECK]);
    }

    #[test]
    fn message_comes_back_after_the_delay_of_its_nak() {
        let nacked = || {
            let mut lab = Lab::new();
            let id = lab.held();
            lab.ask(1, id, &nak(12_000));
            lab.apply(1, AckKind::Nak(Some(millis(12_000))), id, id);
            lab
        };
        assert!(asked_for(nacked(), 12_000 + 4_000).is_empty());
        assert_eq!(asked_for(nacked(), 12_000 + 6_000), [CHECK]);
    }

    /// Attempt `a` has message 1, and is given back.
    fn given_back(lab: &mut Lab) {
        let id = lab.send(1, 1);
        let fetch = lab.fetch_named(1, "a");
        lab.write_to(fetch, Some((id, 60_000)), fetch_proxy::pb::EmptyReason::Unspecified);
        lab.wait(100);
        lab.give_back(1, "a");
    }

    #[test]
    fn message_that_was_given_back_waits_for_a_moment() {
        for (trouble, found) in [(None, vec![CHECK]), (Some(Trouble::LeaderAway), vec![])] {
            let mut lab = Lab::new();
            given_back(&mut lab);
            trouble.into_iter().for_each(|trouble| lab.trouble(trouble, 0));
            lab.fetch(2, 300_000);
            lab.look_on(4_000, 0, false);
            assert_eq!(lab.found(), Vec::<&str>::new());
            lab.look_on(2_500, 0, false);
            assert_eq!(lab.found(), found, "{trouble:?}");
        }
    }

    #[test]
    fn message_that_was_given_back_may_be_lent_to_an_attempt_whose_answers_nobody_has_seen() {
        for (calls, found) in [(1, vec![CHECK]), (2, vec![])] {
            let mut lab = Lab::new();
            given_back(&mut lab);
            for _ in 0..calls {
                let fetch = lab.fetch_named(1, "b");
                lab.wait(10);
                lab.end(fetch, FetchEnd::Gone);
            }
            lab.fetch(2, 300_000);
            lab.look_on(6_500, 0, false);
            assert_eq!(lab.found(), found, "{calls}");
        }
    }

    #[test]
    fn progress_without_a_holder_keeps_no_message_in_the_dark() {
        let mut lab = Lab::new();
        let id = lab.send(1, 1);
        lab.fetch(2, 300_000);
        for _ in 0..10 {
            lab.look_on(1_000, 0, false);
            lab.apply(1, AckKind::Progress, id, id);
        }
        assert_eq!(lab.found(), [CHECK]);
    }

    #[test]
    fn accident_that_touches_a_message_gives_it_time_and_another_does_not() {
        for (side, found) in [(1, vec![]), (3, vec![CHECK])] {
            let mut lab = Lab::new();
            lab.send(1, 1);
            lab.trouble(Trouble::Wire { side }, 8_000);
            assert_eq!(asked_for(lab, ACK_WAIT + 7_000), found);
        }
    }

    #[test]
    fn fetch_that_does_not_reach_its_replica_asks_nobody() {
        let mut lab = Lab::new();
        let fetch = lab.fetch(2, 300_000);
        lab.watch().fetch_waits(fetch, None);
        lab.look_on(60_000, 1, false);
        assert!(lab.found().is_empty());
        lab.watch().fetch_waits(fetch, Some(lab.now));
        lab.look_on(4_000, 1, false);
        assert_eq!(lab.found(), [CHECK]);
    }

    #[test]
    fn message_that_nobody_asks_for_may_be_dark() {
        let mut lab = Lab::new();
        lab.send(1, 1);
        lab.look_on(60_000, 0, false);
        assert!(lab.found().is_empty());
    }

    #[test]
    fn new_message_may_wait_in_its_line() {
        let mut lab = Lab::new();
        lab.fetch(2, 300_000);
        lab.look_on(60_000, 0, true);
        assert!(lab.found().is_empty());
    }

    #[test]
    fn message_that_the_consumer_has_forgotten_may_wait_in_its_line() {
        for (next, found) in [(1, vec![]), (2, vec![CHECK])] {
            let mut lab = Lab::new();
            lab.send(1, 1);
            lab.next = next;
            lab.fetch(2, 300_000);
            lab.look_on(60_000, 0, true);
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn last_attempt_waits_for_a_worker_at_its_own_replica() {
        for (side, found) in [(2, vec![]), (1, vec![CHECK])] {
            let mut lab =
                Lab::with(Config { max_deliver: Some(1), ..Config::new(millis(ACK_WAIT)) });
            lab.send(1, 1);
            lab.fetch(side, 300_000);
            lab.look_on(60_000, 0, false);
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn fetch_does_not_wait_while_messages_are_available() {
        for (available, found) in [(0, vec![]), (1, vec![CHECK])] {
            let mut lab = Lab::new();
            lab.fetch(2, 300_000);
            lab.look_on(4_000, available, false);
            assert_eq!(lab.found(), found);
        }
    }
}
