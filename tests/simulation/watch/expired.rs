//! Check: no Ack and no Term is applied that a client asked for after the end of its lease. Pure.
//!
//! "A settlement after the end of the lease fails with `LEASE_EXPIRED`. JetStream is not asked, with one exception.
//! After the last delivery attempt, a late Ack or Term is applied while the consumer has no delivery in flight."
//! The check judges only calls that began after the end. A call from before is a matter of the check `holders`.

use std::time::Duration;

use fetch_proxy::lease::{ack_wait_of, margin};

use super::{
    super::jetstream::{DeliveryId, Time},
    ledger::{Delivered, Effect, Kind, Ledger, SettleCall, wait_of},
    report::Report,
    troubles::Trouble,
    unheard::{CLOCKS, never_heard},
};

pub const CHECK: &str = "expired";

/// Timers are exact to a millisecond, and answers are written a moment after the lease was granted.
const TICK: Duration = Duration::from_millis(10);
/// A late Ack of a last attempt leaves within this time after the consumer was seen without a delivery.
const SEEN: Duration = Duration::from_secs(1);

/// An ack of the delivery `of` has had its effect.
pub fn applied(ledger: &Ledger, of: DeliveryId, effect: &Effect, report: &mut Report) {
    if !matches!(effect.kind, Kind::Ack | Kind::Term) {
        return;
    }
    let Some(one) = ledger.deliveries.get(&of) else { return };
    let Some(ends) = one.hold.map(|hold| hold.longest) else { return };
    let asked = |call: &&SettleCall| call.kind == effect.kind && call.began <= effect.left;
    let Some(first) = one.calls.iter().filter(asked).map(|call| call.began).min() else { return };
    let from = one.hold.map_or(ends, |hold| hold.from);
    if first <= ends + TICK || ends <= from {
        return;
    }
    report.coverage.count("expired: asked for after the end of the lease, and applied");
    let late = first - ends;
    let mut other = None;
    let excuse = if first <= clock_of_jetstream(ledger, one, effect.left) {
        Some("the clock of JetStream has moved")
    } else if ledger.is_last_attempt(one) {
        other = in_flight(ledger, one, effect.left);
        other.is_none().then_some("last attempt")
    } else {
        // Only the owner knows the end of a lease by its own clock.
        let elsewhere = effect.side != one.side;
        (elsewhere && late <= CLOCKS)
            .then_some("by the clock of another replica")
            .or_else(|| never_heard(ledger, effect, one).then_some("of an owner never heard"))
    };
    match excuse {
        Some(excuse) => report.coverage.lasted(format!("expired: {excuse}"), late),
        None => {
            let why = format!(
                "{:?} is applied, and its client asked for it {late:?} after the end of the lease\n  \
                 {effect:?}\n  {of:?} {one:?}\n  in flight {other:?}",
                effect.kind
            );
            report.fail(CHECK, effect.at, why);
        }
    }
}

/// Without `lease`, the deadline is the clock of JetStream. A raised ack wait moves it, and so does progress. Returns
/// its end as it stands at `now`, and zero if the client asked for an end of its own.
fn clock_of_jetstream(ledger: &Ledger, one: &Delivered, now: Time) -> Time {
    if one.own_end {
        return Time::ZERO;
    }
    let arrived = one.arrived.unwrap_or(one.sent);
    let configs = ledger.configs.get(&one.message.0).map(Vec::as_slice).unwrap_or_default();
    let since = configs.iter().filter(|(at, _)| (one.sent..=now).contains(at));
    let waits = since.map(|(_, of)| ack_wait_of(of.ack_wait, &of.backoff, one.attempt));
    let ack_wait = waits.fold(one.ack_wait, Duration::max);
    let progress =
        one.effects.iter().filter(|effect| effect.kind == Kind::Extend && effect.at <= now);
    let began = progress.map(|effect| effect.left).fold(arrived, Time::max);
    began + ack_wait - margin(ack_wait)
}

/// The consumer had a delivery in flight for as long as the replica may have looked. "If the consumer has several copies,
/// it starts the timer a moment before."
fn in_flight<'l>(ledger: &'l Ledger, one: &Delivered, left: Time) -> Option<&'l Delivered> {
    let since = left.saturating_sub(SEEN + ledger.round_trip);
    let lag = ledger.lags.get(&one.message.0).copied().unwrap_or_default();
    let seen = |other: &Delivered| {
        let settled =
            other.effects.iter().any(|effect| effect.kind != Kind::Extend && effect.at <= left);
        let wait = shortest_wait(ledger, other, left);
        other.sent <= since && !settled && other.sent + wait > left + lag
    };
    let consumer = &one.message.0;
    let forgotten = |other: &Delivered| {
        let by = [Trouble::MadeAgain, Trouble::Restarted, Trouble::LeaderAway];
        by.into_iter().any(|trouble| ledger.troubles.happened(trouble, consumer, other.sent, left))
            || ledger.is_removed((&consumer.stream, other.message.1), left)
    };
    let mut of = ledger.deliveries.values().filter(|other| other.message.0 == *consumer);
    of.find(|other| seen(other) && !forgotten(other))
}

/// The shortest ack wait since a delivery: "JetStream counts the new ack wait for messages that were delivered before."
fn shortest_wait(ledger: &Ledger, one: &Delivered, until: Time) -> Duration {
    let configs = ledger.configs.get(&one.message.0).map(Vec::as_slice).unwrap_or_default();
    let since = configs.iter().filter(|(at, _)| (one.sent..=until).contains(at));
    since.map(|(_, config)| wait_of(config, one.attempt)).fold(one.ack_wait, Duration::min)
}

#[cfg(test)]
mod tests {
    use fetch_proxy::{
        broker::AckKind,
        pb::{self, settlement::Action},
    };

    use super::{
        super::{
            super::jetstream::Config,
            Reading,
            lab::{ACK_WAIT, Lab, ack, millis, name},
        },
        *,
    };

    /// A client asks process `side` for an Ack, `late` after the end of its lease, and it is applied.
    fn acked(lab: &mut Lab, side: usize, late: u64) -> Vec<&'static str> {
        let id = lab.held();
        lab.wait(ACK_WAIT - ACK_WAIT / 10 + late);
        lab.ask(side, id, &ack());
        lab.wait(5);
        lab.apply(side, AckKind::Ack, id, id);
        lab.found()
    }

    #[test]
    fn ack_that_is_asked_for_after_the_end_of_its_lease_is_found() {
        let late = |late| acked(&mut Lab::new(), 1, late);
        assert_eq!((late(9), late(12)), (vec![], vec![CHECK]));
    }

    #[test]
    fn ack_that_is_asked_for_before_and_after_the_end_is_none_of_this_check() {
        let mut lab = Lab::new();
        let id = lab.held();
        for _ in 0..2 {
            lab.ask(1, id, &ack());
            lab.wait(ACK_WAIT);
        }
        lab.apply(1, AckKind::Ack, id, id);
        assert!(lab.found().is_empty());
    }

    #[test]
    fn lease_without_a_length_follows_the_clock_of_jetstream() {
        for (raised, held, found) in [
            (false, None, vec![CHECK]),
            (true, None, vec![]),
            // The client asked for an end of its own, which may be the end of the clock by chance.
            (true, Some(1_000), vec![CHECK]),
            (true, Some(ACK_WAIT - ACK_WAIT / 10), vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let id = lab.send(1, 1);
            match held {
                Some(length) => lab.hand(1, id, 1, length),
                None => lab.hand_until_redelivery(1, id),
            }
            lab.wait(100);
            if raised {
                let config = Config::new(millis(2 * ACK_WAIT));
                lab.watch().configured(&name(), &config, lab.now);
            }
            lab.wait(ACK_WAIT);
            lab.ask(1, id, &ack());
            lab.wait(5);
            lab.apply(1, AckKind::Ack, id, id);
            assert_eq!(lab.found(), found, "raised {raised}, held {held:?}");
        }
    }

    #[test]
    fn progress_moves_the_end_of_a_lease_without_a_length() {
        let mut lab = Lab::new();
        let id = lab.held();
        lab.wait(ACK_WAIT / 2);
        lab.apply(1, AckKind::Progress, id, id);
        lab.wait(ACK_WAIT / 2);
        lab.ask(1, id, &ack());
        lab.wait(5);
        lab.apply(1, AckKind::Ack, id, id);
        assert!(lab.found().is_empty());
    }

    #[test]
    fn replica_without_the_owner_may_be_wrong_by_the_difference_of_the_clocks() {
        let at_another = |late| acked(&mut Lab::new(), 2, late);
        assert_eq!((at_another(250), at_another(252)), (vec![], vec![CHECK]));
    }

    #[test]
    fn replica_that_never_heard_an_owner_trusts_its_clock() {
        for (together, gone, found) in [
            (2_900, Trouble::Killed { side: 1 }, vec![]),
            (2_900, Trouble::Draining { side: 1 }, vec![]),
            (2_900, Trouble::Draining { side: 2 }, vec![CHECK]),
            (3_100, Trouble::Killed { side: 1 }, vec![CHECK]),
            (3_100, Trouble::Draining { side: 1 }, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            lab.trouble(Trouble::ClockOff { side: 1 }, 100_000);
            lab.trouble(Trouble::Wire { side: 2 }, 1_000);
            lab.wait(together);
            lab.trouble(gone, 0);
            assert_eq!(acked(&mut lab, 2, 1_000), found, "{together} {gone:?}");
        }
    }

    #[test]
    fn replica_that_is_parted_from_an_owner_since_its_start_trusts_its_clock() {
        // The owner starts after 5 s. It and the other replica are parted, from then on or later.
        let (wire, stopped) = (Trouble::Wire { side: 2 }, Trouble::Stopped { side: 2 });
        for (part_at, parted, by, found) in [
            (5_000, 15_000, wire, vec![]),
            (9_000, 11_000, wire, vec![CHECK]),
            (5_000, 2_000, wire, vec![CHECK]),
            (5_000, 15_000, stopped, vec![]),
            (5_000, 2_000, stopped, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            lab.trouble(Trouble::ClockOff { side: 1 }, 100_000);
            lab.trouble(Trouble::Wire { side: 2 }, 100);
            lab.wait(5_000);
            lab.trouble(Trouble::Wire { side: 1 }, 100);
            lab.wait(part_at - 5_000);
            lab.trouble(by, parted);
            lab.wait(12_000 - part_at);
            assert_eq!(acked(&mut lab, 2, 1_000), found, "{part_at} {parted} {by:?}");
        }
    }

    #[test]
    fn late_ack_of_a_last_attempt_is_applied_while_nothing_is_in_flight() {
        for (in_flight, found) in [(false, vec![]), (true, vec![CHECK])] {
            let config = Config { max_deliver: Some(1), ..Config::new(millis(ACK_WAIT)) };
            let mut lab = Lab::with(config);
            let id = lab.held();
            lab.wait(2 * ACK_WAIT);
            if in_flight {
                lab.send(2, 2);
            }
            lab.wait(1_100);
            lab.ask(1, id, &ack());
            lab.wait(5);
            lab.apply(1, AckKind::Ack, id, id);
            let found_by = |check| lab.found().contains(&check);
            assert_eq!(found_by(CHECK), !found.is_empty(), "{found:?}");
        }
    }

    #[test]
    fn delivery_is_in_flight_for_no_longer_than_a_lowered_ack_wait() {
        for (lowered, found) in [(1_000, false), (3_000, true)] {
            let config = Config { max_deliver: Some(1), ..Config::new(millis(ACK_WAIT)) };
            let mut lab = Lab::with(config.clone());
            let id = lab.held();
            lab.wait(2 * ACK_WAIT);
            lab.send(2, 2);
            lab.wait(10);
            let lower = Config { ack_wait: millis(lowered), ..config };
            lab.watch().configured(&name(), &lower, lab.now);
            lab.wait(1_100);
            lab.ask(1, id, &ack());
            lab.wait(5);
            lab.apply(1, AckKind::Ack, id, id);
            assert_eq!(lab.found().contains(&CHECK), found, "{lowered}");
        }
    }

    #[test]
    fn consumer_with_copies_counts_the_ack_wait_from_before_the_delivery_leaves() {
        for (lag, found) in [(0, vec![CHECK]), (60, vec![])] {
            let config = Config { max_deliver: Some(1), ..Config::new(millis(ACK_WAIT)) };
            let mut lab = Lab::with(config);
            lab.watch().lags(&name(), millis(lag));
            let id = lab.send(1, 1);
            lab.hand(1, id, 1, ACK_WAIT - ACK_WAIT / 10);
            lab.wait(ACK_WAIT - 40);
            lab.ask(1, id, &ack());
            lab.wait(2);
            lab.apply(1, AckKind::Ack, id, id);
            assert_eq!(lab.found(), found, "{lag}");
        }
    }

    #[test]
    fn extend_without_a_length_and_without_an_answer_lasts_as_long_as_the_fetch_granted() {
        // The message waits at the proxy for 500 ms, so its lease is shorter when a client gets it.
        let whole = ACK_WAIT - ACK_WAIT / 10;
        for (asked, late, found) in [
            (None, whole, vec![]),
            (None, whole + 50, vec![CHECK]),
            (Some(1_000), 1_000, vec![]),
            (Some(1_000), 1_050, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let id = lab.send(1, 1);
            lab.wait(500);
            match asked {
                Some(length) => lab.hand(1, id, 1, length),
                None => lab.hand_for(1, id, whole - 500),
            }
            lab.wait(900);
            let extend = Action::Extend(pb::ExtendAction { lease: None });
            let call = lab.ask(1, id, &extend);
            lab.watch().settle_ended(call, &Reading::nothing(), lab.now);
            lab.wait(late);
            lab.ask(1, id, &ack());
            lab.wait(5);
            lab.apply(1, AckKind::Ack, id, id);
            assert_eq!(lab.found(), found, "{asked:?} {late}");
        }
    }
}
