//! The windows in which two can settle one message, as the documentation admits them. Each window has its
//! own rule, its sentence, and a bound for its length. Pure.

use std::time::Duration;

use super::{
    super::jetstream::{Config, DeliveryId, Time},
    ledger::{Delivered, Effect, Kind, Ledger},
    troubles::Trouble,
    unheard::{CLOCKS, behind, never_heard},
};

/// A window that the documentation admits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Window {
    LateOnTheWire,
    LeaderChanged,
    LeaderUnseen,
    LeaderCutOff,
    WaitLowered,
    WaitLoweredWithoutOwner,
    MadeAgainWhileStopped,
    MadeAgainWhileStalled,
    ResetWithoutOwner,
    ResetNoticedLate,
    Misuse,
    ClockBehind,
    OwnerNeverHeard,
    OvertakenDelivery,
    DeliveryForgotten,
    AfterStaleNak,
}

/// An ack of an older delivery that settles the delivery of another client.
#[derive(Debug, Clone, Copy)]
pub struct Stale<'s> {
    pub effect: &'s Effect,
    pub of_id: DeliveryId,
    /// The delivery that the ack is of.
    pub of: &'s Delivered,
    /// The delivery that it settles.
    pub victim: &'s Delivered,
}

/// A window that was open at an ack: since when, and how long it may be open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Opened {
    pub since: Time,
    pub bound: Duration,
}

/// Until all has arrived after a stall.
const ARRIVAL: Duration = Duration::from_secs(1);
/// The longest stall of a plan, which is that of the routes of a server, and a second until all has arrived.
const LONGEST_STALL: Duration = Duration::from_secs(31);
/// From one look at the consumer to the next, if another server can lead it.
pub const LOOK: Duration = Duration::from_secs(1);
/// Until a look without an answer is a sign.
pub const SILENCE: Duration = Duration::from_millis(250);
/// Until a look without an answer is given up, and repeated.
pub const UNANSWERED: Duration = Duration::from_millis(2_250);
/// "It waits for their answers for at most one second."
pub const LONGEST_NEWS: Duration = Duration::from_secs(1);
/// "Such a server can also forget its last deliveries": those of this time before its end.
const FORGOTTEN: Duration = Duration::from_millis(250);
/// From one look to the next, if no other server can lead the consumer.
const RARE_LOOK: Duration = Duration::from_secs(30);

impl Window {
    /// In the order in which they are tried: the narrowest first.
    pub const ALL: [Self; 16] = [
        Self::LateOnTheWire,
        Self::MadeAgainWhileStopped,
        Self::MadeAgainWhileStalled,
        Self::ResetWithoutOwner,
        Self::ResetNoticedLate,
        Self::Misuse,
        Self::OvertakenDelivery,
        Self::DeliveryForgotten,
        Self::AfterStaleNak,
        Self::LeaderChanged,
        Self::LeaderUnseen,
        Self::LeaderCutOff,
        Self::WaitLowered,
        Self::WaitLoweredWithoutOwner,
        Self::ClockBehind,
        Self::OwnerNeverHeard,
    ];

    /// The sentence of docs/explanation that admits it.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::LateOnTheWire => {
                "If the network to NATS stalls for longer than a lease and then recovers, a \
                 settlement from before the stall can arrive late."
            }
            Self::LeaderChanged => {
                "The proxy ends the affected leases as soon as it notices. Until then, both \
                 holders can settle."
            }
            Self::LeaderUnseen => {
                "The proxy may not notice that a leader restarted if `CONSUMER.INFO` does not \
                 show it."
            }
            Self::LeaderCutOff => {
                "A lease that was kept by such progress can outlive its message, and both holders \
                 can settle until it ends."
            }
            Self::WaitLowered => {
                "If the ack wait of a consumer is lowered while messages are leased, the proxy \
                 learns of it at its next look."
            }
            Self::MadeAgainWhileStopped => {
                "When it continues, it can still settle a message of the new consumer with an \
                 old token."
            }
            Self::WaitLoweredWithoutOwner => {
                "Without the owner, no replica knows that the ack wait was lowered after a token was \
                 given."
            }
            Self::MadeAgainWhileStalled => {
                "A settlement by an old token waits in that connection, and can settle a message of \
                 the new consumer when the stall ends."
            }
            Self::ResetWithoutOwner => {
                "Without the owner, no replica knows whether a token is from before a reset."
            }
            Self::ResetNoticedLate => {
                "The same holds if JetStream sends the first messages after a reset to a replica that \
                 is stopped or stalled."
            }
            Self::ClockBehind => "It may be at most 250 ms ahead of the clock of the proxy.",
            Self::OwnerNeverHeard => {
                "If its own clock is behind, its Ack or Term can settle the next worker's delivery, for \
                 as long as the two clocks differ."
            }
            Self::OvertakenDelivery => {
                "In both cases, both holders can settle until the lease of the late delivery ends."
            }
            Self::DeliveryForgotten => {
                "Then both holders can settle until the lease of the forgotten delivery ends."
            }
            Self::AfterStaleNak => {
                "After such a Nak, two workers hold the message until the first lease ends."
            }
            Self::Misuse => {
                "A worker that Naks a message, and Acks the same token after the owner has died, \
                 can settle the next worker's delivery."
            }
        }
    }

    /// Whether it was open for this ack. `None`: its rule does not fit.
    pub fn opened(self, stale: &Stale<'_>, ledger: &Ledger) -> Option<Opened> {
        let Stale { effect, of, victim, .. } = *stale;
        let (consumer, troubles, now) = (&of.message.0, &ledger.troubles, effect.at);
        let on_the_way = |trouble| troubles.happened(trouble, consumer, effect.left, now);
        match self {
            Self::LateOnTheWire => {
                let side = effect.side;
                let stalled =
                    on_the_way(Trouble::Wire { side }) || on_the_way(Trouble::Stopped { side });
                // "A settlement that begins just before its lease ends can reach JetStream one round
                // trip later."
                let quick = now - effect.left <= ledger.round_trip;
                // One stall can follow another before anything has arrived.
                let stalls = troubles.between(consumer, effect.left, now).filter(|span| {
                    [Trouble::Wire { side }, Trouble::Stopped { side }].contains(&span.trouble)
                });
                let ends = stalls.fold(effect.left, |ends, span| {
                    if span.from <= ends + ARRIVAL { ends.max(span.until) } else { ends }
                });
                let stall = LONGEST_STALL.max(ends.saturating_sub(effect.left) + ARRIVAL);
                let bound = if stalled { stall } else { ledger.round_trip };
                (effect.late && (stalled || quick)).then_some(Opened { since: effect.left, bound })
            }
            Self::LeaderChanged => {
                let changed = troubles.last_end(Trouble::LeaderAway, consumer, now)?;
                let since = changed.min(now);
                // On a wire in trouble, the answers to looks have taken longer, too.
                let wire = Trouble::Wire { side: effect.side };
                let slow = troubles.happened(wire, consumer, of.sent, now);
                let silence = if slow { UNANSWERED } else { SILENCE };
                // "A settlement that a stalled network held meanwhile arrives when the stall ends."
                let held = if on_the_way(wire) { now - effect.left } else { Duration::ZERO };
                let bound = LOOK + silence + ledger.round_trip + held.min(LONGEST_STALL);
                (!knew(stale, changed, ledger)).then_some(Opened { since, bound })
            }
            Self::LeaderUnseen => {
                let shown = ledger.config(consumer).is_some_and(Config::leader_shows);
                let since = troubles.last_end(Trouble::LeaderAway, consumer, now)?.min(now);
                // Until the lease is over.
                let ends = of.hold.map_or(of.sent + of.ack_wait, |hold| hold.longest);
                let bound = ends.saturating_sub(since) + ledger.round_trip;
                let from = troubles.last_begin(Trouble::LeaderAway, consumer, now)?;
                // "the proxy treats a time without an answer of the leader as a change of leader"
                let missed = ledger.looks.doubt_ended(effect.side, consumer, from, effect.left);
                // "Leases whose deliveries `CONSUMER.INFO` no longer contains are lost."
                let number = (of.number, of.arrived.unwrap_or(of.sent));
                let forgotten = ledger.looks.forgotten(effect.side, consumer, number, effect.left);
                (!shown && !missed && !forgotten).then_some(Opened { since, bound })
            }
            Self::LeaderCutOff => {
                let by_old = of.effects.iter().filter(|one| one.unkept && one.kind == Kind::Extend);
                let since = by_old.map(|one| one.at).filter(|at| *at <= effect.left).max()?;
                // Until the lease is over.
                let ends = of.hold.map_or(of.sent + of.ack_wait, |hold| hold.longest);
                Some(Opened { since, bound: ends.saturating_sub(since) + ledger.round_trip })
            }
            Self::WaitLowered => {
                let (at, before, _) = lowered(stale, ledger)?;
                let look = RARE_LOOK.min(before / 3) + UNANSWERED + ledger.round_trip;
                // Progress before that look keeps a lease whose message waits for its redelivery already.
                let kept = of.effects.iter().any(|effect| {
                    effect.kind == Kind::Extend && at <= effect.at && effect.at <= at + look
                });
                let ends = of.hold.map_or(of.sent + of.ack_wait, |hold| hold.longest);
                let kept = kept.then(|| ends.saturating_sub(at) + ledger.round_trip);
                Some(Opened { since: at, bound: look.max(kept.unwrap_or_default()) })
            }
            Self::WaitLoweredWithoutOwner => {
                let (at, before, _) = lowered(stale, ledger)?;
                // The token has the old ack wait if it was given before the next look.
                let look = RARE_LOOK.min(before / 3) + UNANSWERED + ledger.round_trip;
                let old = of.sent <= at + look && without_owner(stale, ledger);
                // "This is possible for at most one ack wait, as long as it was before."
                let bound = of.sent.saturating_sub(at) + before;
                old.then_some(Opened { since: at, bound })
            }
            Self::MadeAgainWhileStopped => {
                let side = effect.side;
                let stop = troubles
                    .between(consumer, of.sent, now)
                    .filter(|span| span.trouble == Trouble::Stopped { side })
                    .find(|span| {
                        let made = Trouble::MadeAgain;
                        troubles.happened(made, consumer, of.sent, span.until)
                    })?;
                // The news waits for it, and it reads them within a look.
                Some(Opened { since: stop.until.min(now), bound: LOOK })
            }
            Self::MadeAgainWhileStalled => {
                // It may wait in front of the library, too, or on its way from the replica that was called.
                let calls = of.calls_of(effect.kind).filter(|call| call.began <= effect.left);
                let began = calls.map(|call| call.began).fold(effect.left, Time::min);
                let wire = Trouble::Wire { side: effect.side };
                let made = troubles.last_end(Trouble::MadeAgain, consumer, now)?.min(now);
                // The stall kept the news away, and then the settlement.
                let mut stalls = troubles.between(consumer, made, made + LONGEST_NEWS);
                let stalled = stalls.any(|span| span.trouble == wire && began <= span.until);
                let waited = now - began > ledger.round_trip;
                // Until the clock of JetStream ends the lease: then the replica closes the connection.
                let ends = clock_of_jetstream(of, ledger);
                let bound = ends.saturating_sub(made) + ledger.round_trip;
                (stalled && waited).then_some(Opened { since: made, bound })
            }
            Self::ResetWithoutOwner => {
                let reset = troubles.last_end(Trouble::Reset, consumer, now)?.min(now);
                let without = without_owner(stale, ledger) && of.sent <= reset;
                // "This is possible for at most one ack wait."
                without.then_some(Opened { since: reset, bound: of.ack_wait })
            }
            Self::ResetNoticedLate => {
                let since = troubles.last_begin(Trouble::Reset, consumer, now)?;
                let after = |one: &&Delivered| one.message.0 == *consumer && one.sent >= since;
                let first = ledger.deliveries.values().filter(after).min_by_key(|one| one.sent)?;
                let side = first.side;
                let mut kept = [Trouble::Wire { side }, Trouble::Stopped { side }].into_iter();
                let kept = kept.any(|one| troubles.happened(one, consumer, first.sent, first.sent));
                let number = (of.number, of.arrived.unwrap_or(of.sent));
                let told = ledger.looks.forgotten(effect.side, consumer, number, effect.left);
                // "At their next look. That is at most 30 s, or a third of the ack wait, later."
                let bound = RARE_LOOK.min(of.ack_wait / 3) + UNANSWERED + ledger.round_trip;
                (kept && !told && of.sent <= since).then_some(Opened { since, bound })
            }
            Self::ClockBehind => {
                let behind = Trouble::ClockBehind { side: of.side };
                let behind = troubles.happened(behind, consumer, of.sent, now);
                let since = [Trouble::LeaderAway, Trouble::Restarted];
                let since = since.iter().filter_map(|one| troubles.last_end(*one, consumer, now));
                let since = since.max().filter(|since| behind && of.sent <= *since)?.min(now);
                // Until the lease is over.
                let ends = of.hold.map_or(of.sent + of.ack_wait, |hold| hold.longest);
                Some(Opened { since, bound: ends.saturating_sub(since) + ledger.round_trip })
            }
            Self::OwnerNeverHeard => {
                let since = token_ends(of);
                let trusts = without_owner(stale, ledger) && never_heard(ledger, effect, of);
                // Each replica allows for the difference that two clocks may have.
                let differ = behind(ledger, effect, of).checked_sub(CLOCKS).filter(|_| trusts)?;
                (since <= now).then_some(Opened { since, bound: differ + ledger.round_trip })
            }
            Self::OvertakenDelivery => {
                let arrived = of.arrived?;
                // A stall of a route concerns every replica, and also those that start meanwhile.
                let mut spans = troubles.between(consumer, of.sent, arrived);
                let stalled = spans.any(|span| matches!(span.trouble, Trouble::Wire { .. }));
                let changed = troubles.happened(Trouble::LeaderAway, consumer, of.sent, arrived);
                // Until the lease of the late delivery is over.
                (stalled && changed).then_some(Opened { since: arrived, bound: of.ack_wait })
            }
            Self::DeliveryForgotten => {
                let since = troubles.last_begin(Trouble::Restarted, consumer, effect.left)?;
                let last = since.saturating_sub(FORGOTTEN)..=since;
                // The server counts the attempt again, and the replica was not told that its own is unknown.
                let again = victim.sent >= since && victim.attempt <= of.attempt;
                let number = (of.number, of.arrived.unwrap_or(of.sent));
                let told = ledger.looks.forgotten(effect.side, consumer, number, effect.left);
                // Until the lease is over.
                let ends = of.hold.map_or(of.sent + of.ack_wait, |hold| hold.longest);
                let bound = ends.saturating_sub(since) + ledger.round_trip;
                let forgotten = last.contains(&of.sent) && again && !told;
                forgotten.then_some(Opened { since, bound })
            }
            Self::AfterStaleNak => {
                let since = stale_nak(stale, ledger)?;
                let ends = of.hold.map_or(of.sent + of.ack_wait, |hold| hold.longest);
                Some(Opened { since, bound: ends.saturating_sub(since) + ledger.round_trip })
            }
            Self::Misuse => {
                let side = of.side;
                let died = troubles.happened(Trouble::Killed { side }, consumer, of.sent, now)
                    || ledger.ended.contains(&side);
                let said = |call: &super::ledger::SettleCall| match call.kind {
                    Kind::Nak => effect.kind != Kind::Nak,
                    Kind::Extend => true,
                    Kind::Ack | Kind::Term => false,
                };
                let first = of.calls.iter().filter(|call| said(call)).map(|call| call.began).min();
                let since = first.filter(|_| died)?;
                // "This is possible for at most one ack wait."
                Some(Opened { since, bound: of.ack_wait })
            }
        }
    }
}

/// Whether the owner had died, or had left without a hand-over, so that another replica has settled. A replica that
/// leaves after a reset has no leases any more, and its tokens are out.
fn without_owner(stale: &Stale<'_>, ledger: &Ledger) -> bool {
    let Stale { effect, of, .. } = *stale;
    let died = Trouble::Killed { side: of.side };
    let died = ledger.troubles.happened(died, &of.message.0, of.sent, effect.at);
    (died || ledger.alone.contains(&of.side)) && effect.side != of.side
}

/// When the clock of JetStream ends a lease: an ack wait after the delivery, or after the last progress.
fn clock_of_jetstream(of: &Delivered, ledger: &Ledger) -> Time {
    let progress = of.effects.iter().filter(|effect| effect.kind == Kind::Extend);
    let started = progress.map(|effect| effect.at).max().or(of.arrived).unwrap_or(of.sent);
    started + ledger.longest_wait(&of.message.0, of.sent)
}

/// The latest end that a token of this delivery can name: "the earlier of the first end of the lease and the end of the
/// ack wait", as they stood when a client got it last.
fn token_ends(of: &Delivered) -> Time {
    let got = of.hold.map_or(of.sent, |hold| hold.from);
    let got = of.lent_again.last().map_or(got, |(_, ended)| got.max(*ended));
    let progress = of.effects.iter().filter(|one| one.kind == Kind::Extend && one.at <= got);
    let started = progress.map(|one| one.at).max().or(of.arrived).unwrap_or(of.sent);
    let first = of.kept.or(of.granted).map_or(Time::MAX, |length| got + length);
    first.min(started + of.ack_wait)
}

/// Whether the replica had seen a sign of the change before it sent the settlement. News that may be older
/// than the change, because the wire was in trouble, are no sign.
fn knew(stale: &Stale<'_>, changed: Time, ledger: &Ledger) -> bool {
    let Stale { effect, of, .. } = *stale;
    let config = ledger.config(&of.message.0);
    let copies = config.map_or(1, |config| config.replicas);
    // "Settlements get `NATS_UNAVAILABLE` until `CONSUMER.INFO` names the leader."
    if copies > 1 && ledger.looks.in_doubt(effect.side, &of.message.0, effect.left) {
        return true;
    }
    let wire = Trouble::Wire { side: effect.side };
    let doubtful = ledger.troubles.happened(wire, &of.message.0, of.sent, effect.left);
    let fresh = changed + ledger.round_trip;
    // "The proxy notices by its own connection": INFO tells nothing new of a server that has no other next to it.
    let server_alone = copies == 1 && config.is_none_or(|config| !config.clustered);
    let linked = ledger.linked.get(&effect.side);
    if server_alone && linked.is_none_or(|at| *at < changed || *at >= effect.left) {
        return false;
    }
    // With several consumers, the sign may be of another one.
    let alone = ledger.configs.len() == 1;
    let at = ledger.learned.get(&effect.side);
    alone && at.is_some_and(|at| *at >= fresh && *at < effect.left && !doubtful)
}

/// When a Nak of an older delivery, in a window of its own, has made JetStream deliver the message again.
fn stale_nak(stale: &Stale<'_>, ledger: &Ledger) -> Option<Time> {
    let Stale { of_id, of, victim, .. } = *stale;
    let admitted = |(id, one): (DeliveryId, &Delivered)| {
        let naks = one.effects.iter().filter(|effect| {
            effect.kind == Kind::Nak && effect.settled == Some(of_id) && effect.at <= victim.sent
        });
        let opened = |effect: &Effect| {
            let nak = Stale { effect, of_id: id, of: one, victim: of };
            let length = |opened: Opened| effect.at.saturating_sub(opened.since) <= opened.bound;
            let mut all = Window::ALL.iter();
            all.any(|window| window.opened(&nak, ledger).is_some_and(length)).then_some(effect.at)
        };
        naks.filter_map(opened).max()
    };
    ledger.earlier(of_id).filter_map(admitted).max()
}

/// When the ack wait of this attempt was last lowered, from what and to what.
fn lowered(stale: &Stale<'_>, ledger: &Ledger) -> Option<(Time, Duration, Duration)> {
    let Stale { effect, of, .. } = *stale;
    let all = ledger.configs.get(&of.message.0)?;
    let wait = |config| super::ledger::wait_of(config, of.attempt);
    let mut pairs = all.windows(2).map(|two| (two[1].0, wait(&two[0].1), wait(&two[1].1)));
    pairs.rfind(|(at, before, after)| *at <= effect.at && after < before)
}

#[cfg(test)]
mod tests {
    use super::{super::leases::EarlyEnd, *};

    #[test]
    fn sentence_of_each_window_stands_in_the_documentation() {
        let pages = [
            include_str!("../../../docs/explanation/guarantees.md"),
            include_str!("../../../docs/explanation/leases.md"),
            include_str!("../../../docs/explanation/replicas.md"),
        ];
        let pages = pages.concat().split_whitespace().collect::<Vec<_>>().join(" ");
        let windows = Window::ALL.map(Window::sentence);
        for sentence in windows.into_iter().chain(EarlyEnd::ALL.map(EarlyEnd::sentence)) {
            assert!(pages.contains(sentence), "{sentence}");
        }
    }
}
