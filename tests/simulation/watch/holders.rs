//! Check: no settlement of a holder reaches the delivery of another holder, except in a window that the
//! documentation admits. Pure.

use super::{
    super::jetstream::DeliveryId,
    coverage::row_of,
    ledger::{Effect, Kind, Ledger},
    report::Report,
    windows::{Stale, Window},
};

pub const CHECK: &str = "holders";

/// An ack of the delivery `of` has had its effect.
pub fn applied(ledger: &Ledger, of: DeliveryId, effect: &Effect, report: &mut Report) {
    let Some(settled) = effect.settled.filter(|settled| *settled != of) else { return };
    let found = (ledger.deliveries.get(&of), ledger.deliveries.get(&settled));
    let (Some(stale), Some(victim)) = found else { return };
    // Progress that comes late does no more than to make the next ack wait longer.
    if !victim.is_held(effect.at) || effect.kind == Kind::Extend {
        let kind = effect.kind;
        return report.coverage.count(format!("stale: {kind:?} that hurt nobody"));
    }
    let stale = Stale { effect, of_id: of, of: stale, victim };
    let mut too_long = Vec::new();
    for window in Window::ALL {
        let Some(opened) = window.opened(&stale, ledger) else { continue };
        let length = effect.at.saturating_sub(opened.since);
        if length <= opened.bound {
            return report.coverage.lasted(row_of(window), length);
        }
        too_long.push(format!("{window:?} for {length:?}, at most {:?}", opened.bound));
    }
    let why = format!(
        "a settlement reaches the delivery of another holder, and no window is open; open for too \
         long: {too_long:?}\n  settlement {effect:?}\n  of {of:?} {:?}\n  hits {settled:?} {:?}",
        stale.of, stale.victim
    );
    report.fail(CHECK, effect.at, why);
}

#[cfg(test)]
mod tests {
    use fetch_proxy::broker::AckKind;

    use super::{
        super::{
            super::jetstream::Config,
            Trouble,
            lab::{ACK_WAIT, Lab, ack, millis, nak, name},
        },
        *,
    };

    /// A client has the message, its ack wait passes, and another client has it from process 2.
    fn passed_on(lab: &mut Lab) -> (DeliveryId, DeliveryId) {
        let old = lab.held();
        lab.wait(ACK_WAIT);
        let new = lab.send(2, 2);
        lab.hand(2, new, 2, 3_600);
        (old, new)
    }

    fn found_and_excused(lab: &Lab, window: Window) -> (Vec<&'static str>, u64) {
        (lab.found(), lab.count(&row_of(window)))
    }

    #[test]
    fn settlement_of_another_holder_is_found() {
        let mut lab = Lab::new();
        let (old, new) = passed_on(&mut lab);
        lab.ask(1, old, &ack());
        lab.apply(1, AckKind::Ack, old, new);
        assert_eq!(lab.found(), [CHECK]);
    }

    #[test]
    fn settlement_of_a_message_that_nobody_holds_hurts_nobody() {
        let mut lab = Lab::new();
        let (old, new) = passed_on(&mut lab);
        lab.watch().dropped(new, lab.now);
        lab.ask(1, old, &ack());
        lab.apply(1, AckKind::Ack, old, new);
        assert!(lab.found().is_empty());
    }

    #[test]
    fn settlement_from_before_a_stall_is_excused_and_without_the_stall_found() {
        for (stalls, found) in [(true, vec![]), (false, vec![CHECK])] {
            let mut lab = Lab::new();
            let old = lab.held();
            lab.ask(1, old, &ack());
            if stalls {
                lab.trouble(Trouble::Wire { side: 1 }, 6_000);
            }
            lab.wait(ACK_WAIT);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 3_600);
            lab.apply_late(1, AckKind::Ack, (old, new), ACK_WAIT, true);
            assert_eq!(found_and_excused(&lab, Window::LateOnTheWire), (found, stalls.into()));
        }
    }

    #[test]
    fn settlement_is_excused_after_two_stalls_that_meet_and_not_after_the_first_of_two() {
        for (second_at, found) in [(20_000, vec![]), (26_000, vec![CHECK])] {
            let mut lab = Lab::new();
            let old = lab.held();
            lab.ask(1, old, &ack());
            lab.trouble(Trouble::Wire { side: 1 }, 24_000);
            lab.wait(second_at);
            lab.trouble(Trouble::Wire { side: 1 }, 40_000 - second_at);
            lab.wait(40_000 - second_at);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 3_600);
            lab.apply_late(1, AckKind::Ack, (old, new), 40_000, true);
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            assert_eq!(holders, found, "{second_at}");
        }
    }

    #[test]
    fn slow_delivery_excuses_nothing() {
        let mut lab = Lab::new();
        let old = lab.send_slowly(1, 1, 1_000);
        lab.hand(1, old, 1, 3_600);
        lab.wait(ACK_WAIT - 1_000);
        let new = lab.send(2, 2);
        lab.hand(2, new, 2, 3_600);
        lab.ask(1, old, &ack());
        lab.wait(300);
        lab.apply(1, AckKind::Ack, old, new);
        assert!(lab.found().contains(&CHECK));
    }

    #[test]
    fn change_of_leader_is_excused_until_the_next_look_or_a_sign() {
        for (alone, after, learns, found) in [
            (true, 1_200, false, vec![]),
            (true, 1_400, false, vec![CHECK]),
            (false, 900, true, vec![CHECK]),
            // Its connection alone tells that a server has started again which has no other next to it.
            (true, 900, true, vec![]),
        ] {
            let replicas = if alone { 1 } else { 3 };
            let config = Config { replicas, ..Config::new(millis(ACK_WAIT)) };
            let mut lab = Lab::with(config);
            let old = lab.held();
            lab.wait(500);
            lab.trouble(Trouble::LeaderAway, 0);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 3_600);
            lab.ask(1, old, &ack());
            lab.wait(100);
            if learns {
                lab.learn_by_info(1);
            }
            lab.wait(after - 100);
            lab.apply(1, AckKind::Ack, old, new);
            let excused = found.is_empty().into();
            assert_eq!(found_and_excused(&lab, Window::LeaderChanged), (found, excused));
        }
    }

    #[test]
    fn start_of_a_server_that_is_alone_is_excused_until_the_connection_is_there_again() {
        for (linked, found) in [(0, vec![]), (1, vec![CHECK])] {
            let mut lab = Lab::new();
            let old = lab.held();
            lab.wait(500);
            lab.trouble(Trouble::LeaderAway, 0);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 3_600);
            lab.wait(100);
            lab.learn(1);
            lab.wait(linked);
            lab.ask(1, old, &ack());
            lab.apply_late(1, AckKind::Ack, (old, new), 0, false);
            let excused = found.is_empty().into();
            assert_eq!(found_and_excused(&lab, Window::LeaderChanged), (found, excused));
        }
    }

    #[test]
    fn change_of_leader_is_excused_for_a_settlement_that_left_before_the_next_look_into_a_stall() {
        for (stalls, leaves_after, found) in
            [(true, 100, vec![]), (false, 100, vec![CHECK]), (true, 4_000, vec![CHECK])]
        {
            let mut lab = Lab::new();
            let old = lab.send(1, 1);
            lab.hand(1, old, 1, 20_000);
            lab.wait(500);
            lab.trouble(Trouble::LeaderAway, 0);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 20_000);
            lab.wait(leaves_after);
            lab.ask(1, old, &ack());
            if stalls {
                lab.trouble(Trouble::Wire { side: 1 }, 5_000);
            }
            lab.wait(5_000);
            lab.apply_late(1, AckKind::Ack, (old, new), 5_000, false);
            let excused = found.is_empty().into();
            let case = (stalls, leaves_after);
            assert_eq!(
                (case, found_and_excused(&lab, Window::LeaderChanged)),
                (case, (found, excused))
            );
        }
    }

    #[test]
    fn change_of_leader_that_info_does_not_show_is_excused_until_the_lease_ends() {
        for (shows, found) in [(false, vec![]), (true, vec![CHECK])] {
            let config = Config::new(millis(ACK_WAIT));
            let mut lab = Lab::with(Config { replicas: 3, tells_since: shows, ..config });
            let old = lab.send(1, 1);
            lab.hand(1, old, 1, 9_000);
            lab.wait(500);
            lab.trouble(Trouble::LeaderAway, 0);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 9_000);
            lab.ask(1, old, &ack());
            lab.wait(4_000);
            lab.apply(1, AckKind::Ack, old, new);
            let excused = found.is_empty().into();
            assert_eq!(found_and_excused(&lab, Window::LeaderUnseen), (found, excused));
        }
    }

    #[test]
    fn replica_in_doubt_settles_nothing_until_it_knows_the_leader() {
        for (answered, found) in [(None, vec![]), (Some(false), vec![CHECK]), (Some(true), vec![])]
        {
            let mut lab = Lab::with(Config { replicas: 3, ..Config::new(millis(ACK_WAIT)) });
            let old = lab.held();
            if let Some(answered) = answered {
                lab.look_up(1, false);
                lab.wait(10);
                lab.look_up(1, answered);
            }
            lab.wait(500);
            lab.trouble(Trouble::LeaderAway, 0);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 3_600);
            lab.ask(1, old, &ack());
            lab.wait(100);
            lab.apply(1, AckKind::Ack, old, new);
            assert_eq!(lab.found(), found, "{answered:?}");
        }
    }

    #[test]
    fn missed_answer_is_a_change_of_leader_where_info_does_not_show_it() {
        for (missed, found) in [(false, vec![]), (true, vec![CHECK])] {
            let config = Config { clustered: true, ..Config::new(millis(ACK_WAIT)) };
            let mut lab = Lab::with(config);
            let old = lab.held();
            lab.trouble(Trouble::LeaderAway, 400);
            if missed {
                lab.look_up(1, false);
            }
            lab.wait(4_000);
            lab.look_up(1, true);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 3_600);
            lab.wait(10);
            lab.hand(1, old, 1, 60_000);
            lab.ask(1, old, &ack());
            lab.wait(10);
            lab.apply(1, AckKind::Ack, old, new);
            assert_eq!(lab.found(), found, "{missed}");
        }
    }

    #[test]
    fn lowered_ack_wait_is_excused_until_the_next_look_and_a_raised_one_never() {
        for (wait, after, found) in
            [(1_000, 3_500, vec![]), (1_000, 3_700, vec![CHECK]), (9_000, 1_200, vec![CHECK])]
        {
            let mut lab = Lab::new();
            let old = lab.held();
            let config = Config::new(millis(wait));
            lab.watch().configured(&name(), &config, lab.now);
            lab.wait(1_000);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 900);
            lab.ask(1, old, &ack());
            lab.wait(after - 1_000);
            // A third of the old ack wait is 1.3 s, and a look without an answer takes 2.25 s.
            lab.hand(2, new, 2, 900);
            lab.apply(1, AckKind::Ack, old, new);
            let excused = found.is_empty().into();
            assert_eq!(found_and_excused(&lab, Window::WaitLowered), (found, excused));
        }
    }

    #[test]
    fn consumer_made_again_is_excused_for_a_replica_that_was_stopped_then() {
        for (stopped, after, found) in
            [(1, 500, vec![]), (1, 1_500, vec![CHECK]), (2, 500, vec![CHECK])]
        {
            let mut lab = Lab::new();
            let old = lab.held();
            lab.trouble(Trouble::Stopped { side: stopped }, 1_500);
            lab.wait(100);
            lab.trouble(Trouble::MadeAgain, 0);
            lab.wait(1_400);
            let new = lab.send(2, 1);
            lab.hand(2, new, 1, 3_600);
            lab.wait(after);
            lab.ask(1, old, &ack());
            lab.apply(1, AckKind::Ack, old, new);
            let excused = found.is_empty().into();
            assert_eq!(found_and_excused(&lab, Window::MadeAgainWhileStopped), (found, excused));
        }
    }

    /// The wire of process 1 stalls, and the consumer is made again 100 ms later. An Ack of an old lease, which
    /// begins before or after that, reaches the next holder `after` that.
    fn made_again_in_a_stall(stall: u64, begins: u64, after: u64) -> (Vec<&'static str>, u64) {
        let mut lab = Lab::new();
        let old = lab.send(1, 1);
        // The lease ends long before the clock of JetStream does.
        lab.hand(1, old, 1, 1_000);
        if begins == 0 {
            lab.ask(1, old, &ack());
        }
        if stall > 0 {
            lab.trouble(Trouble::Wire { side: 1 }, stall);
        }
        lab.wait(100);
        lab.trouble(Trouble::MadeAgain, 0);
        lab.wait(begins);
        if begins > 0 {
            lab.ask(1, old, &ack());
        }
        let new = lab.send(2, 1);
        lab.hand(2, new, 1, 9_000);
        lab.wait(after - begins - 1);
        let way = after - begins + if begins == 0 { 100 } else { 0 };
        lab.apply_late(1, AckKind::Ack, (old, new), way, false);
        found_and_excused(&lab, Window::MadeAgainWhileStalled)
    }

    /// Process 2 was called, and asks process 1, which has the lease.
    #[test]
    fn request_of_another_replica_in_a_stalled_wire_is_excused_after_a_reset_and_a_later_one_found()
    {
        for (after, found) in [(500, vec![]), (2_500, vec![CHECK])] {
            let mut lab = Lab::new();
            let old = lab.send(1, 1);
            lab.hand(1, old, 1, 9_000);
            lab.trouble(Trouble::Wire { side: 1 }, 2_000);
            lab.wait(100);
            lab.trouble(Trouble::MadeAgain, 0);
            let new = lab.send(2, 1);
            lab.hand(2, new, 1, 9_000);
            lab.wait(after);
            lab.ask(2, old, &ack());
            lab.wait(1_400);
            lab.apply(1, AckKind::Ack, old, new);
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            assert_eq!(holders, found, "{after}");
        }
    }

    #[test]
    fn settlement_in_a_stalled_wire_is_excused_after_a_reset_until_jetstream_ends_its_lease() {
        for begins in [0, 500] {
            assert_eq!(made_again_in_a_stall(9_000, begins, 3_900), (vec![], 1), "{begins}");
            assert_eq!(made_again_in_a_stall(9_000, begins, 3_930), (vec![CHECK], 0), "{begins}");
            assert_eq!(made_again_in_a_stall(0, begins, 1_000), (vec![CHECK], 0), "{begins}");
        }
        // After the end of the stall, the news have come.
        assert_eq!(made_again_in_a_stall(400, 500, 1_000), (vec![CHECK], 0));
    }

    #[test]
    fn token_from_before_a_reset_is_excused_once_its_owner_has_gone_and_of_a_new_consumer_never() {
        enum Gone {
            Died,
            Alone,
            HandedOver,
            Not,
        }
        for (trouble, gone, found) in [
            (Trouble::Reset, Gone::Died, vec![]),
            (Trouble::Reset, Gone::Alone, vec![]),
            (Trouble::Reset, Gone::HandedOver, vec![CHECK]),
            (Trouble::Reset, Gone::Not, vec![CHECK]),
            (Trouble::MadeAgain, Gone::Died, vec![CHECK]),
            (Trouble::MadeAgain, Gone::Alone, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let old = lab.held();
            lab.trouble(Trouble::MadeAgain, 0);
            lab.trouble(trouble, 0);
            match gone {
                Gone::Died => lab.trouble(Trouble::Killed { side: 1 }, 0),
                // The reset has ended all its leases.
                Gone::Alone => lab.watch().drained(1, false, false, lab.now),
                Gone::HandedOver => lab.watch().drained(1, true, false, lab.now),
                Gone::Not => {}
            }
            let new = lab.send(2, 1);
            lab.hand(2, new, 1, 9_000);
            lab.ask(2, old, &ack());
            lab.wait(100);
            lab.apply(2, AckKind::Ack, old, new);
            let excused = found.is_empty().into();
            assert_eq!(found_and_excused(&lab, Window::ResetWithoutOwner), (found, excused));
        }
    }

    /// The first message after the reset is sent to process 3, and the second one to process 2.
    #[test]
    fn reset_is_excused_until_the_next_look_if_the_first_message_after_it_is_stalled() {
        for (stalls, told, after, found) in [
            (true, false, 1_000, vec![]),
            (true, false, 4_000, vec![CHECK]),
            (false, false, 1_000, vec![CHECK]),
            (true, true, 1_000, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let old = lab.send(1, 1);
            lab.hand(1, old, 1, 9_000);
            if stalls {
                lab.trouble(Trouble::Wire { side: 3 }, 9_000);
            }
            lab.wait(10);
            lab.trouble(Trouble::MadeAgain, 0);
            lab.trouble(Trouble::Reset, 9_000);
            lab.wait(10);
            lab.send_slowly(3, 1, 0);
            lab.wait(10);
            if told {
                lab.look_up_knowing(1, 0);
            }
            let new = lab.send(2, 1);
            lab.hand(2, new, 1, 9_000);
            lab.ask(1, old, &ack());
            lab.wait(after);
            lab.apply(1, AckKind::Ack, old, new);
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            assert_eq!(holders, found, "{stalls} {told} {after}");
        }
    }

    #[test]
    fn clock_of_nats_that_is_ahead_is_excused_after_a_change_of_leader() {
        for (behind, found) in [(1, vec![]), (2, vec![CHECK])] {
            let mut lab = Lab::new();
            lab.trouble(Trouble::ClockBehind { side: behind }, 60_000);
            let old = lab.held();
            lab.trouble(Trouble::LeaderAway, 0);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 9_000);
            lab.ask(1, old, &ack());
            lab.learn(1);
            lab.wait(2_000);
            lab.apply(1, AckKind::Ack, old, new);
            let excused = found.is_empty().into();
            assert_eq!(found_and_excused(&lab, Window::ClockBehind), (found, excused));
        }
    }

    /// Process 1 dies. By its clock, its token ends with the ack wait.
    #[test]
    fn token_of_an_owner_that_was_never_heard_is_excused_for_the_difference_of_the_clocks() {
        for (ahead, behind, heard, after, found) in [
            (0, 3_000, false, 6_700, vec![]),
            (0, 3_000, false, 6_800, vec![CHECK]),
            (1_000, 3_000, false, 7_700, vec![]),
            (1_000, 3_000, false, 7_800, vec![CHECK]),
            (0, 3_000, true, 6_700, vec![CHECK]),
            (0, 250, false, ACK_WAIT, vec![]),
            (0, 249, false, ACK_WAIT, vec![CHECK]),
            (3_000, 0, false, 6_700, vec![]),
            (-3_000, 0, false, ACK_WAIT, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            lab.trouble(Trouble::ClockOff { side: 1 }, 100_000);
            lab.watch().clock_set(1, ahead);
            lab.watch().clock_set(2, -behind);
            if !heard {
                lab.wait(5_000);
            }
            lab.trouble(Trouble::Wire { side: 2 }, 100);
            if heard {
                lab.wait(5_000);
            }
            let old = lab.held();
            lab.trouble(Trouble::Killed { side: 1 }, 0);
            lab.wait(ACK_WAIT - 1);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 9_000);
            lab.ask(2, old, &ack());
            lab.wait(after - ACK_WAIT);
            lab.apply(2, AckKind::Ack, old, new);
            let excused = lab.count(&row_of(Window::OwnerNeverHeard));
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            let case = (ahead, behind, heard, after);
            let expected = (found.clone(), u64::from(found.is_empty()));
            assert_eq!((case, (holders, excused)), (case, expected));
        }
    }

    /// The stream of a client has ended, and its grace of a second counts.
    #[test]
    fn token_of_a_kept_lease_is_excused_by_the_clocks_from_its_grace_on() {
        for (after, found) in [(3_700, vec![]), (3_800, vec![CHECK])] {
            let mut lab = Lab::new();
            lab.trouble(Trouble::ClockOff { side: 1 }, 100_000);
            lab.watch().clock_set(2, -3_000);
            lab.wait(5_000);
            lab.trouble(Trouble::Wire { side: 2 }, 100);
            let (_, old) = lab.kept(1, 1_000);
            lab.trouble(Trouble::Killed { side: 1 }, 0);
            lab.wait(2_000);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 9_000);
            lab.ask(2, old, &ack());
            lab.wait(after - 2_001);
            lab.apply(2, AckKind::Ack, old, new);
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            assert_eq!(holders, found, "{after}");
        }
    }

    #[test]
    fn delivery_that_was_overtaken_on_a_stalled_route_is_excused_for_its_lease() {
        for (stalls, after, found) in
            [(true, 500, vec![]), (true, 4_100, vec![CHECK]), (false, 500, vec![CHECK])]
        {
            let mut lab = Lab::new();
            if stalls {
                lab.trouble(Trouble::Wire { side: 1 }, 3_000);
            }
            lab.trouble(Trouble::LeaderAway, 0);
            let old = lab.send_slowly(1, 1, 0);
            lab.wait(100);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 9_000);
            lab.wait(1_900);
            lab.arrive(old);
            lab.wait(after);
            lab.learn(1);
            lab.apply(1, AckKind::Nak(None), old, new);
            let excused = found.is_empty().into();
            assert_eq!(found_and_excused(&lab, Window::OvertakenDelivery), (found, excused));
        }
    }

    #[test]
    fn delivery_of_an_old_leader_that_arrives_first_is_excused_for_its_lease() {
        for (stalls, changes, found) in
            [(true, true, vec![]), (false, true, vec![CHECK]), (true, false, vec![CHECK])]
        {
            let mut lab = Lab::new();
            if stalls {
                lab.trouble(Trouble::Wire { side: 1 }, 3_000);
            }
            let old = lab.send_slowly(1, 1, 0);
            lab.wait(100);
            if changes {
                lab.trouble(Trouble::LeaderAway, 0);
            }
            lab.wait(1_900);
            lab.arrive(old);
            lab.learn(1);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 9_000);
            lab.wait(1_500);
            lab.apply(1, AckKind::Nak(None), old, new);
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            assert_eq!(holders, found, "{stalls} {changes}");
        }
    }

    /// A server without copies forgets the delivery, and gives the message to another replica as the same attempt.
    #[test]
    fn forgotten_delivery_is_excused_until_its_lease_ends_unless_info_shows_it() {
        for (before, attempt, told, after, found) in [
            (100, 1, false, 0, vec![]),
            (100, 1, false, 8_000, vec![CHECK]),
            (300, 1, false, 0, vec![CHECK]),
            (100, 2, false, 0, vec![CHECK]),
            (100, 1, true, 0, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let old = lab.send(1, 1);
            lab.hand(1, old, 1, 9_000);
            lab.wait(before);
            lab.trouble(Trouble::Restarted, 50);
            lab.wait(1_000);
            if told {
                lab.look_up_knowing(1, 0);
                lab.wait(10);
            }
            let new = lab.send(2, attempt);
            lab.hand(2, new, attempt as u32, 20_000);
            lab.wait(500 + after);
            lab.ask(1, old, &ack());
            lab.apply(1, AckKind::Ack, old, new);
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            assert_eq!(holders, found, "{before} {attempt} {told} {after}");
        }
    }

    #[test]
    fn two_holders_after_a_late_nak_are_excused_and_after_a_nak_without_a_window_found() {
        for (late, found) in [(true, vec![]), (false, vec![CHECK, CHECK])] {
            let mut lab = Lab::new();
            let old = lab.held();
            lab.ask(1, old, &nak(0));
            if late {
                lab.trouble(Trouble::Wire { side: 1 }, 9_000);
            }
            lab.wait(ACK_WAIT);
            let second = lab.send(2, 2);
            lab.hand(2, second, 2, 3_600);
            lab.apply_late(1, AckKind::Nak(None), (old, second), ACK_WAIT, late);
            let third = lab.send(3, 3);
            lab.hand(3, third, 3, 3_600);
            lab.ask(2, second, &ack());
            lab.wait(1_000);
            lab.apply(2, AckKind::Ack, second, third);
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            assert_eq!(holders, found);
            assert_eq!(lab.count(&row_of(Window::AfterStaleNak)), u64::from(late));
        }
    }

    #[test]
    fn progress_after_a_lowered_ack_wait_is_excused_until_its_lease_ends() {
        for (keeps, found) in [(true, vec![]), (false, vec![CHECK])] {
            let mut lab = Lab::new();
            let old = lab.send(1, 1);
            lab.hand(1, old, 1, 9_000);
            lab.wait(1_000);
            lab.watch().configured(&name(), &Config::new(millis(900)), lab.now);
            lab.wait(500);
            if keeps {
                lab.apply(1, AckKind::Progress, old, old);
            }
            lab.wait(3_000);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 9_000);
            lab.ask(1, old, &ack());
            lab.wait(1_000);
            lab.apply(1, AckKind::Ack, old, new);
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            assert_eq!(holders, found);
        }
    }

    #[test]
    fn progress_that_an_old_leader_confirms_is_excused_until_its_lease_ends() {
        for (confirmed, after, found) in [
            (true, 0, vec![]),
            (true, 4_000, vec![]),
            (true, 6_000, vec![CHECK]),
            (false, 0, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let old = lab.send(1, 1);
            lab.hand(1, old, 1, 9_000);
            lab.trouble(Trouble::LeaderAway, 100);
            lab.wait(2_000);
            if confirmed {
                lab.progress_that_nobody_keeps(old);
            }
            lab.wait(2_100);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 20_000);
            lab.wait(after);
            lab.ask(1, old, &ack());
            lab.apply(1, AckKind::Ack, old, new);
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            assert_eq!(holders, found, "{confirmed} {after}");
        }
    }

    #[test]
    fn token_from_before_the_ack_wait_was_lowered_is_excused_without_its_owner_for_the_old_one() {
        type Gone = Option<bool>;
        let (killed, drained): (Gone, Gone) = (Some(true), Some(false));
        for (gone, sent, after, found) in [
            (killed, 0, 3_900, vec![]),
            (killed, 0, 4_100, vec![CHECK]),
            (drained, 0, 3_900, vec![]),
            (None, 0, 3_900, vec![CHECK]),
            // The owner looks every 1.3 s. A look without an answer takes 2.25 s.
            (killed, 3_500, 7_400, vec![]),
            (killed, 3_500, 7_600, vec![CHECK]),
            (killed, 3_700, 7_600, vec![CHECK]),
        ] {
            let mut lab = Lab::new();
            let first = (sent == 0).then(|| lab.held());
            lab.wait(1);
            lab.watch().configured(&name(), &Config::new(millis(900)), lab.now);
            lab.wait(sent);
            let old = first.unwrap_or_else(|| lab.held());
            match gone {
                Some(true) => lab.trouble(Trouble::Killed { side: 1 }, 0),
                Some(false) => lab.watch().drained(1, false, false, lab.now),
                None => {}
            }
            lab.wait(after - sent - 100);
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 9_000);
            lab.ask(2, old, &ack());
            lab.wait(100);
            lab.apply(2, AckKind::Ack, old, new);
            let holders: Vec<_> = lab.found().into_iter().filter(|one| *one == CHECK).collect();
            let excused = lab.count(&row_of(Window::WaitLoweredWithoutOwner));
            assert_eq!(
                (holders, excused),
                (found.clone(), found.is_empty().into()),
                "{sent} {after}"
            );
        }
    }

    #[test]
    fn ack_wait_that_is_raised_again_before_the_next_look_is_still_a_lowered_one() {
        let mut lab = Lab::new();
        let old = lab.held();
        for wait in [1_000, 2_000] {
            lab.watch().configured(&name(), &Config::new(millis(wait)), lab.now);
            lab.wait(600);
        }
        let new = lab.send(2, 2);
        lab.hand(2, new, 2, 900);
        lab.ask(1, old, &ack());
        lab.apply(1, AckKind::Ack, old, new);
        assert_eq!(found_and_excused(&lab, Window::WaitLowered), (vec![], 1));
    }

    #[test]
    fn ack_after_a_nak_is_misuse_once_the_owner_has_died_for_one_ack_wait() {
        for (dies, after, found) in
            [(true, 1_000, vec![]), (true, ACK_WAIT, vec![CHECK]), (false, 1_000, vec![CHECK])]
        {
            let mut lab = Lab::new();
            let old = lab.held();
            lab.ask(1, old, &nak(0));
            lab.apply(1, AckKind::Nak(None), old, old);
            if dies {
                lab.trouble(Trouble::Killed { side: 1 }, 0);
            }
            let new = lab.send(2, 2);
            lab.hand(2, new, 2, 9_000);
            lab.wait(after);
            lab.ask(2, old, &ack());
            lab.apply(2, AckKind::Ack, old, new);
            let excused = found.is_empty().into();
            assert_eq!(found_and_excused(&lab, Window::Misuse), (found, excused));
        }
    }
}
