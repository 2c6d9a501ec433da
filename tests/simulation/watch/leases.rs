//! Check: a lease holds until its end. Nobody else is sent the message before, and nobody is refused for an
//! expired lease, without an event that the documentation admits. Pure.

use std::time::Duration;

use fetch_proxy::lease::margin;

use super::{
    super::jetstream::{DeliveryId, Time},
    ledger::{Delivered, Kind, Ledger, SettleCall, Told},
    report::Report,
    troubles::Trouble,
    windows::{LONGEST_NEWS, LOOK, SILENCE, UNANSWERED},
};

pub const CHECK: &str = "leases";

/// An event that ends a lease before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EarlyEnd {
    OwnNak,
    LeaderChanged,
    LeaderNoticedLate,
    AnswerMissed,
    MadeAgain,
    MadeAgainHeardLate,
    MadeAgainNoticedLate,
    LimitsChanged,
    StaleSettlement,
    Suspended,
    HandedOver,
    LastMoment,
    TakenLate,
    NotKeptAlive,
}

/// Until every replica knows the configuration of a consumer.
const UNTIL_LOOK: Duration = Duration::from_secs(31);
/// A settlement without an answer is given up after this.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);
/// A step of a hand-over is under way for this long, at most.
const LONGEST_STEP: Duration = Duration::from_secs(2);

/// "A pull lasts for at most a fifth of the shortest ack wait, and at most 5 s."
const LONGEST_PULL: Duration = Duration::from_secs(5);

impl EarlyEnd {
    pub const ALL: [Self; 14] = [
        Self::OwnNak,
        Self::LeaderChanged,
        Self::LeaderNoticedLate,
        Self::AnswerMissed,
        Self::MadeAgain,
        Self::MadeAgainHeardLate,
        Self::MadeAgainNoticedLate,
        Self::LimitsChanged,
        Self::StaleSettlement,
        Self::Suspended,
        Self::HandedOver,
        Self::LastMoment,
        Self::TakenLate,
        Self::NotKeptAlive,
    ];

    /// The sentence of docs/explanation that admits it.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::OwnNak => "A Nak is never published twice.",
            Self::LeaderChanged => {
                "After a restart of a NATS server or a change of leader, JetStream immediately \
                 redelivers every unsettled message that is older than the ack wait."
            }
            Self::LeaderNoticedLate => {
                "Leases that are granted after the change, and before the proxy notices it, are \
                 treated like older leases."
            }
            Self::AnswerMissed => {
                "If it does not say so, the proxy treats a time without an answer of the leader as \
                 a change of leader."
            }
            Self::MadeAgain => {
                "A consumer that is deleted and made again, or reset, ends all leases that were \
                 granted before, at every replica."
            }
            Self::MadeAgainHeardLate => {
                "Leases that another replica grants before it hears of the change can end, too."
            }
            Self::MadeAgainNoticedLate => {
                "So leases that were granted since the change can end, too."
            }
            Self::LimitsChanged => {
                "If the ack wait of a consumer is lowered while messages are leased, the proxy \
                 learns of it at its next look."
            }
            Self::StaleSettlement => "A late `Nak` costs that message one delivery attempt.",
            Self::Suspended => "A gap ends every lease that much earlier.",
            Self::HandedOver => {
                "Deadlines are sent as remaining time, less the longest time that a part was on \
                 its way."
            }
            Self::LastMoment => {
                "A lease can end at its old end, if its Extend begins less than a round trip before \
                 that."
            }
            Self::TakenLate => {
                "If that caller gets it less than a round trip before its lease would have ended, \
                 the lease can end then."
            }
            Self::NotKeptAlive => {
                "It counts only if the answer arrives before the old end: after that end, \
                 JetStream answers too, but does nothing."
            }
        }
    }

    /// Whether it has happened to this delivery by `now`.
    fn fits(self, id: DeliveryId, one: &Delivered, ledger: &Ledger, now: Time) -> bool {
        let (consumer, troubles) = (&one.message.0, &ledger.troubles);
        let happened = |trouble| troubles.happened(trouble, consumer, one.sent, now);
        let lag = ledger.lags.get(consumer).copied().unwrap_or_default();
        let past_wait = now + lag >= one.sent + one.ack_wait;
        match self {
            Self::OwnNak => one.may_have_applied(Kind::Nak) > 0,
            Self::LeaderChanged => happened(Trouble::LeaderAway) || happened(Trouble::Restarted),
            Self::LeaderNoticedLate => {
                let unnoticed = LOOK + UNANSWERED + ledger.round_trip;
                let since = one.sent.saturating_sub(unnoticed);
                troubles.happened(Trouble::LeaderAway, consumer, since, now)
            }
            Self::AnswerMissed => {
                let hidden = ledger.config(consumer).is_some_and(|config| !config.leader_shows());
                // A message that breaks the connection also takes the answers away.
                hidden && (misses_an_answer(one, ledger, now) || happened(Trouble::Poisoned))
            }
            Self::MadeAgain => happened(Trouble::MadeAgain),
            Self::MadeAgainHeardLate => {
                let made = troubles.last_end(Trouble::MadeAgain, consumer, one.sent);
                let of = ledger.deliveries.values().filter(|other| other.message.0 == *consumer);
                // The change shows, at the latest, when a message is delivered.
                let first = made
                    .and_then(|made| of.map(|other| other.sent).filter(|sent| made <= *sent).min());
                first.is_some_and(|first| one.sent <= first + LONGEST_NEWS + ledger.round_trip)
            }
            Self::MadeAgainNoticedLate => {
                let made = |span: &&super::troubles::TroubleSpan| {
                    span.trouble == Trouble::MadeAgain && span.from <= one.sent
                };
                let all = troubles.between(consumer, Duration::ZERO, now).filter(made);
                // Somebody was cut off then, and tells the others when it is not any more.
                let mut cut_off = all.flat_map(|made| {
                    troubles.between(consumer, made.from, made.until + LONGEST_NEWS)
                });
                cut_off.any(|span| {
                    let cut =
                        matches!(span.trouble, Trouble::Wire { .. } | Trouble::Stopped { .. });
                    cut && one.sent <= span.until + LONGEST_NEWS + ledger.round_trip
                })
            }
            // "That is at most 30 s, or a third of the old ack wait, later."
            Self::LimitsChanged => {
                let since = one.sent.saturating_sub(UNTIL_LOOK);
                troubles.happened(Trouble::Configured, consumer, since, now)
            }
            Self::StaleSettlement => {
                let others = ledger.earlier(id).flat_map(|(_, other)| &other.effects);
                others.into_iter().any(|effect| effect.settled == Some(id))
            }
            Self::Suspended => {
                let span = |span: &super::troubles::TroubleSpan| {
                    let by = |side| {
                        [Trouble::Suspended { side }, Trouble::ClockOff { side }]
                            .contains(&span.trouble)
                    };
                    span.trouble.side().is_some_and(|side| by(side) && may_own(side, one, ledger))
                };
                troubles.between(consumer, one.sent, now).any(span)
            }
            Self::HandedOver => {
                let ends = one.hold.is_some_and(|hold| hold.until <= now + LONGEST_STEP);
                let drains = troubles.between(consumer, one.sent, now).filter(|span| {
                    span.trouble.side().is_some_and(|side| {
                        span.trouble == Trouble::Draining { side } && may_own(side, one, ledger)
                    })
                });
                let stalled = drains.into_iter().any(|drain| {
                    let mut met = troubles.between(consumer, drain.from, drain.until.min(now));
                    met.any(|span| {
                        matches!(span.trouble, Trouble::Wire { .. } | Trouble::Stopped { .. })
                    })
                });
                ends && stalled
            }
            Self::LastMoment => past_wait && is_extended_late(one, ledger),
            Self::TakenLate => past_wait && is_taken_late(one, ledger),
            Self::NotKeptAlive => {
                let span = |span: &super::troubles::TroubleSpan| {
                    let harms = matches!(
                        span.trouble,
                        Trouble::Wire { .. }
                            | Trouble::Reconnects { .. }
                            | Trouble::Stopped { .. }
                            | Trouble::Killed { .. }
                    );
                    harms && span.trouble.side().is_some_and(|side| may_own(side, one, ledger))
                };
                past_wait
                    && (happened(Trouble::Refused)
                        || troubles.between(consumer, one.sent, now).any(span)
                        || left_behind(one, ledger))
            }
        }
    }
}

/// Whether a client made its lease longer within a round trip before the clock of JetStream could end it. A consumer
/// with several copies answers once a majority has agreed.
fn is_extended_late(one: &Delivered, ledger: &Ledger) -> bool {
    let lag = ledger.lags.get(&one.message.0).copied().unwrap_or_default();
    let round_trip = ledger.round_trip + lag;
    let extends = one.calls_of(Kind::Extend).filter_map(|call| Some((call.began, call.ended?.0)));
    // A repeated Fetch extends the leases of its attempt.
    extends.chain(one.lent_again.iter().copied()).any(|(began, ended)| {
        let moved = one
            .effects
            .iter()
            .filter(|effect| effect.kind == Kind::Extend && effect.at + round_trip < began);
        let last = moved.map(|effect| (effect.left, effect.at)).max();
        let (from, until) = last.unwrap_or((one.sent, one.arrived.unwrap_or(one.sent)));
        let clock = one.ack_wait.saturating_sub(margin(one.ack_wait));
        began <= until + clock && from + clock <= ended + round_trip
    })
}

/// Whether a client has got a message that had waited at the proxy until the clock of JetStream could end its lease.
/// This clock counts from the pull, at most.
fn is_taken_late(one: &Delivered, ledger: &Ledger) -> bool {
    let Some(hold) = one.hold else { return false };
    let before = |effect: &super::ledger::Effect| effect.at < hold.from;
    let moved = one.effects.iter().any(|effect| effect.kind == Kind::Extend && before(effect));
    let clock = one.ack_wait.saturating_sub(margin(one.ack_wait));
    let pull = (one.ack_wait / 5).min(LONGEST_PULL);
    let first = (one.sent + clock).saturating_sub(pull + ledger.round_trip);
    !moved && (first..=one.arrived.unwrap_or(one.sent) + clock).contains(&hold.from)
}

/// Whether a process that may have the lease had no answer to a settlement of this consumer.
fn misses_an_answer(one: &Delivered, ledger: &Ledger, now: Time) -> bool {
    let of = ledger.deliveries.values().filter(|other| other.message.0 == one.message.0);
    // A client that has hung up does not see the answer, or the end of the settle timeout.
    let unnoticed = LOOK + UNANSWERED + ledger.round_trip;
    let since = one.sent.saturating_sub(unnoticed + SETTLE_TIMEOUT);
    let missed = |call: &SettleCall| match call.ended {
        Some((at, told)) => told == Told::Unknown && (since..=now).contains(&at),
        // Its client hears of that last.
        None => (since..=now).contains(&(call.began + SILENCE)),
    };
    of.filter(|other| may_own(other.side, one, ledger)).any(|other| other.calls.iter().any(missed))
}

/// Whether the process may have the lease: it was sent the message, or that process has drained.
fn may_own(side: usize, one: &Delivered, ledger: &Ledger) -> bool {
    let drained = Trouble::Draining { side: one.side };
    side == one.side || ledger.troubles.happened(drained, &one.message.0, one.sent, Time::MAX)
}

/// The process has ended without handing its leases over.
fn left_behind(one: &Delivered, ledger: &Ledger) -> bool {
    ledger.ended.contains(&one.side)
}

fn early_end(id: DeliveryId, one: &Delivered, ledger: &Ledger, now: Time) -> Option<EarlyEnd> {
    EarlyEnd::ALL.into_iter().find(|end| end.fits(id, one, ledger, now))
}

/// Whether the lease of a holder may have ended already, by any event but a Nak of its own.
pub fn ends_early(ledger: &Ledger, id: DeliveryId, now: Time) -> bool {
    let one = ledger.deliveries.get(&id);
    let mut ends = EarlyEnd::ALL.into_iter().filter(|end| *end != EarlyEnd::OwnNak);
    one.is_some_and(|one| {
        ends.any(|end| end.fits(id, one, ledger, now)) || unkept(id, one, ledger, now).is_some()
    })
}

/// The event by which the clock of JetStream has ended a lease: "Without `lease`, the lease ends shortly before JetStream
/// would redeliver the message." "On a quiet consumer, a lease is therefore up to a fifth of the ack wait shorter."
fn unkept(id: DeliveryId, one: &Delivered, ledger: &Ledger, now: Time) -> Option<EarlyEnd> {
    let soon = now + margin(one.ack_wait) + (one.ack_wait / 5).min(LONGEST_PULL);
    let mut unkept = [EarlyEnd::LastMoment, EarlyEnd::NotKeptAlive].into_iter();
    unkept.find(|end| end.fits(id, one, ledger, soon))
}

/// JetStream sends a message: nobody may hold it.
pub fn sent(ledger: &Ledger, id: DeliveryId, now: Time, report: &mut Report) {
    for (other, one) in ledger.earlier(id) {
        if !one.is_held(now) {
            continue;
        }
        match early_end(other, one, ledger, now) {
            Some(end) => report.coverage.count(format!("lease: ended early: {end:?}")),
            None => {
                let why =
                    format!("{id:?} is sent while a client holds its message: {other:?} {one:?}");
                report.fail(CHECK, now, why);
            }
        }
    }
}

/// A client receives LEASE_EXPIRED.
pub fn refused(ledger: &Ledger, id: DeliveryId, began: Time, now: Time, report: &mut Report) {
    let Some(one) = ledger.deliveries.get(&id).filter(|one| one.is_held(now)) else { return };
    let overtaken = ledger.newest(&one.message).is_some_and(|newest| newest.sent > one.sent);
    let owner_gone = ledger.troubles.between(&one.message.0, one.sent, now).any(|span| {
        matches!(span.trouble, Trouble::Killed { side } | Trouble::Wire { side } | Trouble::Stopped { side }
            if may_own(side, one, ledger))
    }) || left_behind(one, ledger);
    if overtaken || owner_gone {
        return report.coverage.count("lease: refused early, overtaken or its owner is gone");
    }
    match early_end(id, one, ledger, now).or_else(|| unkept(id, one, ledger, now)) {
        Some(end) => report.coverage.count(format!("lease: refused early: {end:?}")),
        None => {
            let why = format!("LEASE_EXPIRED from {began:?} on, and it has not: {id:?} {one:?}");
            report.fail(CHECK, now, why);
        }
    }
}

#[cfg(test)]
mod tests {
    use fetch_proxy::{broker::AckKind, pb};

    use super::{
        super::{
            super::jetstream::Config,
            lab::{ACK_WAIT, Lab, ack, extend, millis, nak, name},
        },
        *,
    };

    /// A client has the message; then `happens`; then JetStream sends it again after `time`.
    fn sent_after(time: u64, happens: impl FnOnce(&mut Lab, DeliveryId)) -> Vec<&'static str> {
        let mut lab = Lab::new();
        let id = lab.held();
        lab.wait(1_000);
        happens(&mut lab, id);
        lab.wait(time);
        lab.send(2, 2);
        lab.found()
    }

    /// A client has the message for 9 s, which is longer than the ack wait.
    fn sent_in_a_long_lease(happens: impl FnOnce(&mut Lab)) -> Vec<&'static str> {
        let mut lab = Lab::new();
        let id = lab.send(1, 1);
        lab.hand(1, id, 1, 9_000);
        happens(&mut lab);
        lab.wait(ACK_WAIT + 2_000);
        lab.send(2, 2);
        lab.found()
    }

    #[test]
    fn message_that_is_sent_within_a_lease_is_found_and_after_its_end_not() {
        assert_eq!(sent_after(1_000, |_, _| {}), [CHECK]);
        assert!(sent_after(ACK_WAIT - 1_000, |_, _| {}).is_empty());
    }

    #[test]
    fn extended_lease_holds_until_its_new_end() {
        let extended = |time| {
            sent_after(time, |lab, id| {
                let call = lab.ask(1, id, &extend(6_000));
                lab.succeed(call, pb::Outcome::Extended, 6_000);
            })
        };
        assert_eq!(extended(5_900), [CHECK]);
        assert!(extended(6_000).is_empty());
    }

    #[test]
    fn lease_that_a_client_gave_up_itself_may_end() {
        let by_nak = |lab: &mut Lab, id| {
            let call = lab.ask(1, id, &nak(0));
            lab.apply(1, AckKind::Nak(None), id, id);
            lab.confirm(call);
        };
        assert!(sent_after(10, by_nak).is_empty());
    }

    #[test]
    fn change_of_leader_and_a_consumer_made_again_end_leases() {
        for trouble in [Trouble::LeaderAway, Trouble::MadeAgain] {
            assert!(sent_after(10, |lab, _| lab.trouble(trouble, 0)).is_empty());
        }
        assert_eq!(sent_after(10, |lab, _| lab.trouble(Trouble::KeyRemoved, 0)), [CHECK]);
    }

    #[test]
    fn answer_that_is_missed_ends_leases_where_info_does_not_show_the_leader() {
        let refused = |hidden: bool, reason: &'static str| {
            let config = Config::new(millis(ACK_WAIT));
            let mut lab = Lab::with(Config { clustered: hidden, ..config });
            let id = lab.held();
            lab.trouble(Trouble::Draining { side: 3 }, 0);
            for reason in [reason, "LEASE_EXPIRED"] {
                let call = lab.ask(1, id, &ack());
                lab.refuse(call, reason);
            }
            lab.found().contains(&CHECK)
        };
        assert!(!refused(true, "SETTLE_UNCONFIRMED"));
        assert!(refused(true, "NATS_UNAVAILABLE") && refused(false, "SETTLE_UNCONFIRMED"));
    }

    #[test]
    fn settlement_that_is_still_without_an_answer_may_end_leases_after_a_moment() {
        for (waits, found) in [(240, true), (260, false)] {
            let mut lab = Lab::with(Config { clustered: true, ..Config::new(millis(ACK_WAIT)) });
            let id = lab.held();
            let other = lab.send_of(2, (1, 1), 1);
            lab.hand(1, other, 1, 3_000);
            lab.ask(1, other, &ack());
            lab.wait(waits);
            let call = lab.ask(1, id, &ack());
            lab.refuse(call, "LEASE_EXPIRED");
            assert_eq!(lab.found().contains(&CHECK), found, "{waits}");
        }
    }

    #[test]
    fn lease_from_before_the_change_of_leader_is_noticed_may_end_and_a_later_one_not() {
        for (before, found) in [(3_200, vec![]), (3_400, vec![CHECK])] {
            let mut lab = Lab::new();
            lab.trouble(Trouble::LeaderAway, 0);
            lab.wait(before);
            lab.held();
            lab.wait(1_000);
            lab.send(2, 2);
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn lease_from_before_the_news_of_a_reset_may_end_and_a_later_one_not() {
        for (before, found) in [(900, vec![]), (1_100, vec![CHECK])] {
            let mut lab = Lab::new();
            lab.trouble(Trouble::MadeAgain, 0);
            // Nobody asks for a message for a time.
            lab.wait(5_000);
            lab.send(2, 1);
            lab.wait(before);
            lab.held();
            lab.wait(1_000);
            lab.send(2, 2);
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn replica_that_was_cut_off_at_a_reset_may_end_leases_that_were_granted_since() {
        for (cut_off, before, found) in [
            (Some(0), 3_900, vec![]),
            (Some(0), 4_100, vec![CHECK]),
            (Some(900), 4_700, vec![]),
            (Some(1_100), 4_700, vec![CHECK]),
            (None, 3_900, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            lab.trouble(Trouble::MadeAgain, 0);
            lab.send(2, 1);
            let cut_off = cut_off.inspect(|after| {
                lab.wait(*after);
                lab.trouble(Trouble::Wire { side: 3 }, 3_000);
            });
            lab.wait(before - cut_off.unwrap_or_default());
            lab.held();
            lab.wait(1_000);
            lab.send(2, 2);
            assert_eq!(lab.found(), found, "{cut_off:?} {before}");
        }
    }

    #[test]
    fn long_lease_of_a_message_that_is_taken_late_may_end_and_of_another_not() {
        // A pull lasts for 800 ms at most, and the clock ends after 3.6 s.
        for (waits, found) in [(2_700, vec![CHECK]), (2_900, vec![]), (3_700, vec![CHECK])] {
            let mut lab = Lab::new();
            let id = lab.send(1, 1);
            lab.wait(waits);
            lab.hand(1, id, 1, 9_000);
            lab.wait(ACK_WAIT - waits);
            lab.send(2, 2);
            assert_eq!(lab.found(), found, "{waits}");
        }
    }

    #[test]
    fn ack_wait_of_a_consumer_with_copies_began_before_its_message_left() {
        for (lag, found) in [(0, vec![CHECK]), (200, vec![])] {
            let mut lab = Lab::new();
            lab.watch().lags(&name(), millis(lag));
            let id = lab.send(1, 1);
            lab.hand(1, id, 1, 9_000);
            lab.trouble(Trouble::Killed { side: 1 }, 0);
            lab.wait(ACK_WAIT - 150);
            lab.send(2, 2);
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn lease_that_is_extended_in_the_last_moment_may_end_and_another_not() {
        for (before, found) in [(5, vec![]), (30, vec![CHECK])] {
            let mut lab = Lab::new();
            let id = lab.held();
            lab.wait(ACK_WAIT - ACK_WAIT / 10 - before);
            let call = lab.ask(1, id, &extend(6_000));
            lab.succeed(call, pb::Outcome::Extended, 6_000);
            lab.wait(ACK_WAIT / 10 + before);
            lab.send(2, 2);
            assert_eq!(lab.found(), found);
        }
    }

    #[test]
    fn lease_that_is_extended_in_the_last_moment_may_be_refused_and_another_not() {
        for (before, lag, found) in [(5, 0, false), (30, 0, true), (30, 40, false), (80, 40, true)]
        {
            let mut lab = Lab::new();
            lab.watch().lags(&name(), millis(lag));
            let id = lab.held();
            lab.wait(ACK_WAIT - ACK_WAIT / 10 - before);
            let call = lab.ask(1, id, &extend(6_000));
            lab.succeed(call, pb::Outcome::Extended, 6_000);
            lab.wait(before);
            let call = lab.ask(1, id, &ack());
            lab.refuse(call, "LEASE_EXPIRED");
            assert_eq!(lab.found().contains(&CHECK), found);
        }
    }

    #[test]
    fn long_lease_is_kept_alive_unless_its_owner_dies_or_is_cut_off() {
        assert_eq!(sent_in_a_long_lease(|_| {}), [CHECK]);
        assert_eq!(
            sent_in_a_long_lease(|lab| lab.trouble(Trouble::Killed { side: 2 }, 0)),
            [CHECK]
        );
        for trouble in [Trouble::Killed { side: 1 }, Trouble::Wire { side: 1 }] {
            assert!(sent_in_a_long_lease(|lab| lab.trouble(trouble, 0)).is_empty());
        }
    }

    #[test]
    fn long_lease_survives_a_hand_over_and_not_a_drain_without_one() {
        let drain = |hands_over| {
            sent_in_a_long_lease(|lab| {
                lab.trouble(Trouble::Draining { side: 1 }, 1_000);
                lab.watch().drained(1, hands_over, !hands_over, lab.now);
            })
        };
        assert_eq!((drain(true), drain(false)), (vec![CHECK], vec![]));
    }

    #[test]
    fn hand_over_shortens_a_lease_by_the_way_and_by_a_stall() {
        let drained = |stalls: bool, before_the_end: u64| {
            let mut lab = Lab::new();
            lab.held();
            lab.trouble(Trouble::Draining { side: 1 }, 100);
            if stalls {
                lab.trouble(Trouble::Wire { side: 2 }, 50);
            }
            lab.wait(3_600 - before_the_end);
            lab.send(2, 2);
            lab.found()
        };
        assert_eq!((drained(false, 20), drained(false, 50)), (vec![], vec![CHECK]));
        assert_eq!((drained(true, 1_900), drained(true, 2_500)), (vec![], vec![CHECK]));
    }

    #[test]
    fn lease_within_the_ack_wait_survives_the_death_of_its_owner() {
        let killed = |lab: &mut Lab, _| lab.trouble(Trouble::Killed { side: 1 }, 0);
        assert_eq!(sent_after(1_000, killed), [CHECK]);
    }

    #[test]
    fn refusal_of_a_lease_that_has_not_expired_is_found() {
        let refused = |time, happens: fn(&mut Lab)| {
            let mut lab = Lab::new();
            let id = lab.held();
            happens(&mut lab);
            lab.wait(time);
            let call = lab.ask(1, id, &ack());
            lab.refuse(call, "LEASE_EXPIRED");
            lab.found()
        };
        assert_eq!(refused(3_500, |_| {}), [CHECK]);
        assert!(refused(3_600, |_| {}).is_empty());
        assert!(refused(10, |lab| lab.trouble(Trouble::Suspended { side: 1 }, 0)).is_empty());
        assert!(refused(10, |lab| lab.trouble(Trouble::Killed { side: 1 }, 0)).is_empty());
    }
}
