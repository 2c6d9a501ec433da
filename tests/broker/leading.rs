//! A replicated consumer may change its leader at any time, and the new leader may give away leased
//! messages. After a sign of a change nothing is settled until INFO names the leader.

use std::time::Duration;

use fetch_proxy::{
    broker::{Confirmation, ConsumerInfo, Leader, PullEnd},
    clock,
    lease::LeaseId,
    lessor::{
        Action, Error, FetchParams, IncomingLease, LeaseLimits, Lessor, OutgoingLease, SettleItem,
        Settled,
    },
};
use testkit::fake_broker::{FakeBroker, Fault, info, limits};

use super::faults::{ask, confirmed, one, settle};

const BOUND: Duration = Duration::from_secs(2);

fn start(replicas: u32) -> (FakeBroker, Lessor<FakeBroker>) {
    start_with(ConsumerInfo { replicas, ..info(Duration::from_secs(30)) })
}

/// INFO shows neither another leader in between nor a restart of the same leader.
fn start_unshown(replicas: u32) -> (FakeBroker, Lessor<FakeBroker>) {
    start_with(ConsumerInfo { replicas, leader_shows: false, ..info(Duration::from_secs(30)) })
}

fn start_with(info: ConsumerInfo) -> (FakeBroker, Lessor<FakeBroker>) {
    let broker = FakeBroker::new(info);
    let limits = LeaseLimits { settle_timeout: BOUND, ..limits() };
    (broker.clone(), Lessor::start(broker, limits))
}

async fn ack(lessor: &Lessor<FakeBroker>, lease: LeaseId) -> Result<Settled, Error> {
    settle(lessor, lease, Action::Ack).await
}

/// The answer to an Ack when the doubt is over, and how long that took.
async fn told_in_the_end(
    lessor: &Lessor<FakeBroker>,
    lease: LeaseId,
) -> (Result<Settled, Error>, Duration) {
    let began = clock::now();
    loop {
        match ack(lessor, lease).await {
            Err(Error::Unavailable(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
            told => return (told, clock::now() - began),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn missing_delivery_puts_its_consumer_in_doubt_until_info() {
    for fault in [Fault::Unsent, Fault::Lost] {
        let (broker, lessor) = start(3);
        let (first, second) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
        broker.silence(true);
        broker.script([fault]);
        ack(&lessor, first).await.unwrap_err();
        let published = broker.published().len();
        let doubted = ack(&lessor, second).await;
        assert!(matches!(doubted, Err(Error::Unavailable(_))), "{doubted:?}");
        assert_eq!(broker.published().len(), published, "nothing leaves us in doubt");
        broker.silence(false);
        let (told, took) = told_in_the_end(&lessor, second).await;
        assert!(confirmed(&told), "the same leader: {told:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn lease_handed_over_in_doubt_is_trusted_for_less_time() {
    let (broker, lessor) = start(3);
    let (first, second) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    let left = || {
        let leaving = lessor.leaving();
        leaving.iter().find(|lease| lease.id == second).map(|lease| lease.snapshot.ack_by).unwrap()
    };
    let sure = left();
    broker.silence(true);
    broker.script([Fault::Unsent]);
    ack(&lessor, first).await.unwrap_err();
    let doubted = left();
    assert!(doubted + Duration::from_secs(1) <= sure, "{doubted:?} of {sure:?}");
}

#[tokio::test(start_paused = true)]
async fn new_leader_voids_leases_older_than_the_ack_wait() {
    let (broker, lessor) = start(3);
    let (first, second) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    broker.change(|info| info.as_mut().unwrap().leader = Leader(2));
    broker.script([Fault::Unsent]);
    ack(&lessor, first).await.unwrap_err();
    for lease in [first, second] {
        let told = told_in_the_end(&lessor, lease).await.0;
        assert_eq!(told, Err(Error::LeaseExpired { forgotten: false }));
    }
    assert!(broker.published().is_empty());
}

/// A new leader counts from when the message was published, by its own clock, which it cuts to whole
/// seconds and which may be 250 ms ahead of ours.
#[tokio::test(start_paused = true)]
async fn new_leader_voids_younger_leases_when_they_reach_the_ack_wait() {
    // The ack wait less its margin, the age, a second and a quarter.
    const ENDS: u64 = 30_000 - 2000 - 10_000 - 1250;
    for (after, alive) in [(ENDS - 100, true), (ENDS + 10, false)] {
        let (broker, lessor) = start(3);
        broker.age(Duration::from_secs(10));
        let first = one(&broker, &lessor).await;
        let (second, began) = (one(&broker, &lessor).await, clock::now());
        broker.change(|info| info.as_mut().unwrap().leader = Leader(2));
        broker.script([Fault::Unsent]);
        ack(&lessor, first).await.unwrap_err();
        tokio::time::sleep_until((began + Duration::from_millis(after)).into()).await;
        let told = ack(&lessor, second).await;
        assert_eq!(confirmed(&told), alive, "after {after} ms: {told:?}");
        assert!(alive || told == EXPIRED, "{told:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn receiver_doubts_leases_of_another_leader() {
    for (leader, known) in [(Leader(1), true), (Leader(2), false)] {
        let (broker, lessor) = start(3);
        one(&broker, &lessor).await;
        broker.change(|info| info.as_mut().unwrap().leader = leader);
        let limits = LeaseLimits { max_leases: 1, settle_timeout: BOUND, ..limits() };
        let heir = Lessor::start(broker.clone(), limits);
        let at = clock::now();
        let [OutgoingLease { ack, snapshot, leader, .. }] = lessor.leaving().try_into().unwrap();
        let spec = heir.know(&broker.name(), None, at + BOUND).await.unwrap();
        let mut places = heir.reserve_leases(1).unwrap();
        let coming = IncomingLease {
            spec,
            leader,
            ack,
            principal: None,
            caller: None,
            held: None,
            snapshot,
            at,
        };
        let [Some(here)] = heir.adopt(vec![coming], &mut places)[..] else { panic!() };
        assert_eq!(confirmed(&self::ack(&heir, here).await), known, "{leader:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn receiver_of_a_lease_looks_who_leads_although_it_was_idle() {
    let (broker, lessor) = start(3);
    let limits = LeaseLimits { settle_timeout: BOUND, ..limits() };
    let heir = Lessor::start(broker.clone(), limits);
    let spec = heir.know(&broker.name(), None, clock::now() + BOUND).await.unwrap();
    // Nobody needs to know who leads.
    tokio::time::sleep(Duration::from_secs(60)).await;
    one(&broker, &lessor).await;
    let [OutgoingLease { ack, snapshot, leader, .. }] = lessor.leaving().try_into().unwrap();
    let coming = IncomingLease {
        spec,
        leader,
        ack,
        principal: None,
        caller: None,
        held: None,
        snapshot,
        at: clock::now(),
    };
    let mut places = heir.reserve_leases(1).unwrap();
    let [Some(here)] = heir.adopt(vec![coming], &mut places)[..] else { panic!() };
    tokio::time::sleep(Duration::from_millis(100)).await;
    broker.change(|info| info.as_mut().unwrap().leader = Leader(2));
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(self::ack(&heir, here).await, EXPIRED);
}

#[tokio::test(start_paused = true)]
async fn receiver_that_knows_an_older_leader_than_the_sender_reads_info_first() {
    for silent in [false, true] {
        let (broker, lessor) = start(3);
        let heir = Lessor::start(broker.clone(), limits());
        heir.know(&broker.name(), None, clock::now() + BOUND).await.unwrap();
        // Nobody there needs to know who leads.
        tokio::time::sleep(Duration::from_secs(60)).await;
        broker.change(|info| info.as_mut().unwrap().leader = Leader(2));
        one(&broker, &lessor).await;
        let leaving = lessor.leaving().pop().unwrap();
        broker.silence(silent);
        let (at, known) = (clock::now(), (leaving.created, leaving.leader));
        let by = (at + Duration::from_millis(500), at + BOUND);
        let spec = heir.know_for_handover(&broker.name(), known, by).await.unwrap();
        assert!(clock::now() <= by.0, "the clocks of the sender stand still");
        broker.silence(false);
        let OutgoingLease { leader, ack, snapshot, .. } = leaving;
        let coming = IncomingLease {
            spec,
            leader,
            ack,
            principal: None,
            caller: None,
            held: None,
            snapshot,
            at,
        };
        let mut places = heir.reserve_leases(1).unwrap();
        let [Some(here)] = heir.adopt(vec![coming], &mut places)[..] else { panic!() };
        let told = told_in_the_end(&heir, here).await.0;
        assert_eq!(confirmed(&told), !silent, "{told:?}");
    }
}

/// Otherwise the leases that another replica hands over would count as leases of an older consumer.
#[tokio::test(start_paused = true)]
async fn receiver_reads_a_consumer_that_the_sender_knows_and_it_does_not() {
    let (broker, lessor) = start(1);
    let old = lessor.know(&broker.name(), None, clock::now() + BOUND).await.unwrap();
    broker.change(|info| info.as_mut().unwrap().created = "another".into());
    let made_again = Some("another".into());
    let new = lessor.know(&broker.name(), made_again, clock::now() + BOUND).await.unwrap();
    assert_eq!((&*new.created, &*old.created != "another"), ("another", true));
}

/// The sender does not know of the reset yet, so its lease is of the time before.
#[tokio::test(start_paused = true)]
async fn receiver_that_announces_a_reset_takes_no_lease_over() {
    let (broker, lessor) = start(1);
    let first = one(&broker, &lessor).await;
    settle(&lessor, first, Action::Nak(Duration::ZERO)).await.unwrap();
    // Its second delivery has a higher consumer sequence than its first delivery after the reset.
    lessor.fetch(ask(&broker, BOUND)).await.unwrap().delivered();
    let heir = Lessor::start(broker.clone(), limits());
    let mut sightings = heir.sightings().unwrap();
    heir.know(&broker.name(), None, clock::now() + BOUND).await.unwrap();
    let [OutgoingLease { ack, snapshot, leader, .. }] = lessor.leaving().try_into().unwrap();
    broker.forget();
    let adopting = async {
        let announced = loop {
            let telling = sightings.recv().await.unwrap();
            if telling.sighting.began || telling.sighting.again {
                break telling;
            }
        };
        let (until, at) = (clock::now() + BOUND, clock::now());
        let spec = heir.know(&broker.name(), None, until).await.unwrap();
        let mut places = heir.reserve_leases(1).unwrap();
        let coming = IncomingLease {
            spec,
            leader,
            ack,
            principal: None,
            caller: None,
            held: None,
            snapshot,
            at,
        };
        assert_eq!(heir.adopt(vec![coming], &mut places), [None]);
        drop(announced);
    };
    let (fetched, ()) = tokio::join!(heir.fetch(ask(&broker, BOUND)), adopting);
    assert_eq!(fetched.unwrap().messages().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn lease_with_a_possible_settlement_is_never_called_untouched() {
    let (broker, lessor) = start(3);
    let lease = one(&broker, &lessor).await;
    broker.silence(true);
    broker.script([Fault::Lost]);
    for _ in 0..2 {
        assert_eq!(ack(&lessor, lease).await, Err(Error::Unconfirmed));
    }
}

#[tokio::test(start_paused = true)]
async fn lease_is_not_kept_alive_while_the_leader_is_in_doubt() {
    let (broker, lessor) = start(3);
    let (first, long) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    settle(&lessor, long, Action::Extend(Some(Duration::from_secs(60)))).await.unwrap();
    broker.silence(true);
    broker.script([Fault::Unsent]);
    ack(&lessor, first).await.unwrap_err();
    tokio::time::sleep(Duration::from_secs(40)).await;
    assert!(broker.published().is_empty(), "{:?}", broker.published());
}

/// A Nak would be the next holder's, if there is another leader.
#[tokio::test(start_paused = true)]
async fn nothing_is_released_while_the_leader_is_in_doubt() {
    let (broker, lessor) = start(3);
    let (first, short) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    settle(&lessor, short, Action::Extend(Some(Duration::from_secs(5)))).await.unwrap();
    // One that nobody takes, and that is given back after a second.
    broker.publish("surplus");
    drop(lessor.fetch(ask(&broker, Duration::from_secs(10))).await.unwrap());
    broker.silence(true);
    broker.script([Fault::Unsent]);
    ack(&lessor, first).await.unwrap_err();
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert!(broker.published().is_empty(), "{:?}", broker.published());
    assert_eq!(lessor.held(), 1, "they are over anyway");
}

#[tokio::test(start_paused = true)]
async fn draining_replica_still_watches_the_leader() {
    let (broker, lessor) = start(3);
    let lease = one(&broker, &lessor).await;
    lessor.drain();
    lessor.drained().await;
    broker.change(|info| info.as_mut().unwrap().leader = Leader(2));
    tokio::time::sleep(Duration::from_secs(11)).await;
    assert_eq!(ack(&lessor, lease).await, Err(Error::LeaseExpired { forgotten: false }));
}

#[tokio::test(start_paused = true)]
async fn drain_does_not_end_a_doubt() {
    let (broker, lessor) = start(3);
    let (first, second) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    broker.silence(true);
    broker.script([Fault::Unsent]);
    ack(&lessor, first).await.unwrap_err();
    lessor.drain();
    lessor.drained().await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let doubted = ack(&lessor, second).await;
    assert!(matches!(doubted, Err(Error::Unavailable(_))), "{doubted:?}");
    broker.silence(false);
    assert!(confirmed(&told_in_the_end(&lessor, second).await.0));
}

#[tokio::test(start_paused = true)]
async fn consumer_of_the_one_connected_server_is_never_in_doubt() {
    let (broker, lessor) = start(1);
    let (first, second) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    broker.silence(true);
    broker.script([Fault::Unsent]);
    ack(&lessor, first).await.unwrap_err();
    assert!(confirmed(&ack(&lessor, second).await));
}

/// Long after the next look at the consumer.
async fn look() {
    tokio::time::sleep(Duration::from_secs(11)).await;
}

const EXPIRED: Result<Settled, Error> = Err(Error::LeaseExpired { forgotten: false });

#[tokio::test(start_paused = true)]
async fn lost_delivery_on_another_server_is_found_by_the_next_info() {
    for replicas in [1, 3] {
        let (broker, lessor) = start(replicas);
        let lease = one(&broker, &lessor).await;
        broker.forget();
        look().await;
        assert_eq!(ack(&lessor, lease).await, EXPIRED);
        assert!(broker.published().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn delivery_during_an_info_does_not_count_as_forgotten() {
    let (broker, lessor) = start(1);
    let first = one(&broker, &lessor).await;
    broker.delay_info(Duration::from_secs(1));
    // It was asked 10 s after the first, and is answered a second later.
    tokio::time::sleep(Duration::from_millis(10_500)).await;
    let second = one(&broker, &lessor).await;
    look().await;
    for lease in [first, second] {
        assert!(confirmed(&ack(&lessor, lease).await));
    }
}

#[tokio::test(start_paused = true)]
async fn absent_leader_is_distrusted_unless_info_would_show_a_change() {
    for replicas in [1, 3] {
        for shows in [false, true] {
            let (broker, lessor) = if shows { start(replicas) } else { start_unshown(replicas) };
            let lease = one(&broker, &lessor).await;
            broker.silence(true);
            tokio::time::sleep(Duration::from_secs(13)).await;
            broker.silence(false);
            tokio::time::sleep(Duration::from_secs(3)).await;
            let told = told_in_the_end(&lessor, lease).await.0;
            assert_eq!(confirmed(&told), shows, "{replicas} copies: {told:?}");
            assert!(shows || told == EXPIRED, "{told:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn leader_silent_on_a_settlement_is_distrusted_if_info_shows_no_change() {
    for fault in [Fault::Leaderless, Fault::Lost] {
        for replicas in [1, 3] {
            let (broker, lessor) = start_unshown(replicas);
            let (first, second) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
            broker.script([fault]);
            ack(&lessor, first).await.unwrap_err();
            let doubted = ack(&lessor, second).await;
            assert!(matches!(doubted, Err(Error::Unavailable(_))), "{doubted:?}");
            assert_eq!(told_in_the_end(&lessor, second).await.0, EXPIRED);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn leader_silent_on_a_pull_is_distrusted_if_info_shows_no_change() {
    for end in [PullEnd::ConsumerGone, PullEnd::LeaderGone] {
        let (broker, lessor) = start_unshown(1);
        let lease = one(&broker, &lessor).await;
        broker.refuse_a_pull(end.clone());
        let next = one(&broker, &lessor).await;
        assert_eq!(ack(&lessor, lease).await, EXPIRED, "{end:?}");
        assert!(confirmed(&ack(&lessor, next).await));
    }
}

#[tokio::test(start_paused = true)]
async fn leader_is_looked_up_every_second() {
    let (broker, lessor) = start(3);
    let lease = one(&broker, &lessor).await;
    broker.change(|info| info.as_mut().unwrap().leader = Leader(2));
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(ack(&lessor, lease).await, EXPIRED);
}

/// The next look at the leader is a second away.
#[tokio::test(start_paused = true)]
async fn new_leader_that_is_read_for_something_else_is_noticed_at_once() {
    for fetches in [true, false] {
        let (broker, lessor) = start(3);
        let lease = one(&broker, &lessor).await;
        broker.change(|info| info.as_mut().unwrap().leader = Leader(2));
        if fetches {
            let fetched = lessor.fetch(ask(&broker, Duration::from_millis(20))).await.unwrap();
            assert!(fetched.messages().is_empty());
        } else {
            lessor.info(&broker.name(), clock::now() + BOUND).await.unwrap();
        }
        tokio::task::yield_now().await;
        assert_eq!(told_in_the_end(&lessor, lease).await.0, EXPIRED, "{fetches}");
        assert!(broker.published().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn absent_leader_is_noticed_within_a_second() {
    let (broker, lessor) = start_unshown(1);
    let lease = one(&broker, &lessor).await;
    broker.silence(true);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    broker.silence(false);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(ack(&lessor, lease).await, EXPIRED);
}

#[tokio::test(start_paused = true)]
async fn deliveries_of_a_new_leader_are_trusted() {
    let (broker, lessor) = start(3);
    let before = one(&broker, &lessor).await;
    assert!(confirmed(&ack(&lessor, before).await));
    // Nobody holds anything, nobody asks for anything, and nobody looks.
    tokio::time::sleep(Duration::from_secs(60)).await;
    broker.change(|info| info.as_mut().unwrap().leader = Leader(2));
    let lease = one(&broker, &lessor).await;
    look().await;
    assert!(confirmed(&ack(&lessor, lease).await));
}

/// The announcement that a consumer was created again may come while no replica listens.
#[tokio::test(start_paused = true)]
async fn replica_that_missed_announcements_settles_nothing_before_info() {
    for made_anew in [false, true] {
        let (broker, lessor) = start(1);
        let lease = one(&broker, &lessor).await;
        if made_anew {
            broker.change(|info| info.as_mut().unwrap().created = "second".into());
        }
        broker.silence(true);
        broker.hear_anew();
        tokio::task::yield_now().await;
        let doubted = ack(&lessor, lease).await;
        assert!(matches!(doubted, Err(Error::Unavailable(_))), "{doubted:?}");
        broker.silence(false);
        let (told, took) = told_in_the_end(&lessor, lease).await;
        assert_eq!(confirmed(&told), !made_anew, "{told:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
    }
}

/// Only a reset makes the same leader count deliveries from one again. Its stored state is then
/// worthless.
#[tokio::test(start_paused = true)]
async fn lower_count_of_the_same_leader_means_a_reset() {
    let (broker, lessor) = start(1);
    let (first, second) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    broker.forget();
    let third = one(&broker, &lessor).await;
    for lease in [first, second] {
        assert_eq!(ack(&lessor, lease).await, EXPIRED);
    }
    assert!(confirmed(&ack(&lessor, third).await));
}

#[tokio::test(start_paused = true)]
async fn consumer_is_read_again_although_every_caller_was_refused() {
    let (broker, lessor) = start(3);
    let lease = one(&broker, &lessor).await;
    assert!(confirmed(&ack(&lessor, lease).await));
    broker.silence(true);
    let fetch = || lessor.fetch(ask(&broker, Duration::from_secs(1)));
    // Once the consumer counts as away, a caller is refused at once. Nobody waits, and no lease is held.
    for _ in 0..100 {
        let _ = fetch().await;
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    broker.silence(false);
    broker.publish("x");
    let answered = tokio::time::timeout(Duration::from_secs(3), async {
        while fetch().await.is_err() {
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    });
    answered.await.expect("callers are refused although the consumer can be read");
}

/// The task of the consumer ends while leases are held, and another one follows.
async fn without_a_task(
    broker: &FakeBroker,
    lessor: &Lessor<FakeBroker>,
    meanwhile: impl FnOnce(&FakeBroker),
) {
    broker.change(|info| info.as_mut().unwrap().push = true);
    // Longer than until the next look.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let refused = lessor.fetch(ask(broker, Duration::ZERO)).await;
    assert!(matches!(refused, Err(Error::ConsumerUnsuitable { .. })), "{refused:?}");
    meanwhile(broker);
    broker.change(|info| info.as_mut().unwrap().push = false);
}

#[tokio::test(start_paused = true)]
async fn hidden_restart_between_two_tasks_of_a_consumer_is_reckoned_with() {
    let (broker, lessor) = start_unshown(1);
    let lease = one(&broker, &lessor).await;
    without_a_task(&broker, &lessor, |_| {}).await;
    let next = one(&broker, &lessor).await;
    assert_eq!(ack(&lessor, lease).await, EXPIRED);
    assert!(confirmed(&ack(&lessor, next).await));
}

#[tokio::test(start_paused = true)]
async fn reset_between_two_tasks_of_a_consumer_is_noticed() {
    let (broker, lessor) = start(1);
    let (first, second) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    without_a_task(&broker, &lessor, FakeBroker::forget).await;
    // The first message comes again, and the second one does not.
    let again = lessor.fetch(FetchParams { n: 1, ..ask(&broker, BOUND) }).await.unwrap();
    assert_eq!(again.messages().len(), 1);
    for lease in [first, second] {
        assert_eq!(ack(&lessor, lease).await, EXPIRED);
    }
}

/// A leader that answers too late was there. Nothing else shows whether it was away.
#[tokio::test(start_paused = true)]
async fn answer_after_the_end_of_one_lease_costs_no_other_lease() {
    for (fault, costs) in [
        (Fault::AnsweredAfter(Duration::from_millis(1_900)), false),
        (Fault::AnsweredAfter(Duration::from_secs(60)), true),
    ] {
        let (broker, lessor) = start_unshown(3);
        let ending = one(&broker, &lessor).await;
        tokio::time::sleep(Duration::from_millis(27_000)).await;
        let other = one(&broker, &lessor).await;
        broker.script([fault]);
        assert_eq!(ack(&lessor, ending).await, Err(Error::Unconfirmed));
        let (told, _) = told_in_the_end(&lessor, other).await;
        assert_eq!(told == EXPIRED, costs, "{fault:?}: {told:?}");
    }
}

/// Another caller has no time. The leader may be well.
#[tokio::test(start_paused = true)]
async fn caller_in_a_hurry_puts_no_leader_in_doubt() {
    let (broker, lessor) = start_unshown(3);
    let (hurried, other) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    broker.script([Fault::AnsweredAfter(Duration::from_millis(100))]);
    let ask = vec![SettleItem { lease: hurried, action: Action::Ack, by: None }];
    let until = clock::now() + Duration::from_millis(20);
    let told = lessor.settle(ask, Confirmation::Confirmed, until).await;
    assert_eq!(told, [Err(Error::Unconfirmed)]);
    assert!(confirmed(&ack(&lessor, other).await));
}

#[tokio::test(start_paused = true)]
async fn look_without_an_answer_stops_settling_within_a_moment() {
    let (broker, lessor) = start(3);
    let (first, second) = (one(&broker, &lessor).await, one(&broker, &lessor).await);
    broker.silence(true);
    tokio::time::sleep(Duration::from_millis(1_300)).await;
    let doubted = ack(&lessor, first).await;
    assert!(matches!(doubted, Err(Error::Unavailable(_))), "{doubted:?}");
    broker.silence(false);
    assert!(confirmed(&told_in_the_end(&lessor, first).await.0));
    // An answer that usually takes longer is waited for.
    broker.delay_info(Duration::from_millis(400));
    tokio::time::sleep(Duration::from_secs(5)).await;
    for _ in 0..30 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let held = settle(&lessor, second, Action::Extend(None)).await;
        assert!(held.is_ok(), "{held:?}");
    }
}
