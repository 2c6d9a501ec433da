//! A hand-over whose steps are lost, held up and said again: leases end up in one table, with no
//! time gained, and nothing is kept for those that never come.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fetch_proxy::{
    broker::{AckKind, Confirmation, Leader},
    clock,
    cluster::{LeaseLocation, Unanswered},
    lease::{LeaseError, LeaseId, SettleKind},
    lessor::{Action, Error, SettleItem},
    pb::{self, peer::v1 as wire, peer::v1::handover_request::Step},
    token::new_key_line,
};
use prost::Message as _;
use testkit::{
    eventually,
    fake_broker::{FakeBroker, Fault, info},
};

use crate::linked::{Fate, Member, Net, PATIENCE};

const ACK_WAIT: Duration = Duration::from_secs(60);

/// Replicas that have met.
async fn members<const N: usize>() -> (Net, FakeBroker, [Member; N]) {
    let (net, keys) = Net::new(&new_key_line().unwrap());
    let mut info = info(ACK_WAIT);
    info.max_ack_pending = None;
    let broker = FakeBroker::new(info);
    let mut members = Vec::new();
    for _ in 0..N {
        members.push(Member::join(&net, &keys, &broker, 5000).await);
    }
    let members = members.try_into().ok().unwrap();
    (net, broker, members)
}

#[tokio::test(start_paused = true)]
async fn no_deadline_grows_in_a_transfer_of_many_parts() {
    let (net, broker, [sender, receiver]) = members().await;
    for _ in 0..3 {
        sender.leased(&broker, 1000).await;
    }
    let steps = Arc::new(AtomicUsize::new(0));
    let counted = steps.clone();
    net.rule(move |step| {
        counted.fetch_add(1, Ordering::Relaxed);
        let part = matches!(step, Step::Prepare(_));
        if part { Fate::Late(Duration::from_millis(300)) } else { Fate::Pass }
    });
    let left = sender.lessor.leaving();
    let before = clock::now();
    let ends: HashMap<u64, _> = left
        .iter()
        .map(|lease| (lease.snapshot.sequence, before + lease.snapshot.ack_by))
        .collect();
    assert!(sender.leave().await);
    assert!(steps.load(Ordering::Relaxed) > 5, "one part alone would test nothing");
    let (now, came) = (clock::now(), receiver.lessor.leaving());
    assert_eq!(came.len(), 3000);
    for lease in came {
        let end = now + lease.snapshot.ack_by;
        let sequence = lease.snapshot.sequence;
        assert!(end <= ends[&sequence], "{sequence} gained {:?}", end - ends[&sequence]);
        // Nor is more lost than the way of one part.
        let lost = ends[&sequence] - end;
        assert!(lost < Duration::from_millis(700), "{sequence} lost {lost:?}");
    }
}

/// The receiver does not know the consumer, and reads INFO while the sender waits.
#[tokio::test(start_paused = true)]
async fn work_of_the_receiver_shortens_no_lease() {
    let (_net, broker, [sender, receiver]) = members().await;
    sender.leased(&broker, 1).await;
    broker.delay_info(Duration::from_millis(700));
    let before = clock::now() + sender.lessor.leaving()[0].snapshot.ack_by;
    assert!(sender.leave().await);
    let after = clock::now() + receiver.lessor.leaving()[0].snapshot.ack_by;
    assert!(after <= before, "gained {:?}", after - before);
    assert!(before - after < Duration::from_millis(50), "lost {:?}", before - after);
}

/// The receiver knows, and the sender does not yet.
#[tokio::test(start_paused = true)]
async fn lowered_ack_wait_ends_a_lease_sooner_at_the_receiver() {
    let (_net, broker, [sender, receiver]) = members().await;
    sender.leased(&broker, 1).await;
    let lowered = Duration::from_secs(10);
    broker.change(|info| info.as_mut().unwrap().ack_wait = lowered);
    assert!(sender.leave().await);
    let left = receiver.lessor.leaving()[0].snapshot.ack_by;
    assert!(left < lowered && left > lowered / 2, "{left:?}");
}

/// A caller that leaves lets its message go back to JetStream while it is being handed over.
#[tokio::test(start_paused = true)]
async fn delivery_that_is_given_back_during_a_hand_over_is_not_taken_over() {
    let (net, broker, [sender, receiver]) = members().await;
    sender.leased(&broker, 1).await;
    let fetched = sender.fetched(&broker, 1).await;
    net.rule(|step| match step {
        Step::Prepare(part) if !part.leases.is_empty() => Fate::Late(Duration::from_millis(200)),
        _ => Fate::Pass,
    });
    let leaves_unread = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        drop(fetched);
    };
    let (left, ()) = tokio::join!(sender.leave(), leaves_unread);
    assert!(left);
    assert_eq!(receiver.lessor.held(), 1);
    assert_eq!(broker.published().len(), 1, "the other went back");
}

/// Its client reads slowly, and then not at all. The receiver of the leases cannot know that.
#[tokio::test(start_paused = true)]
async fn answer_that_is_not_written_after_a_hand_over_is_given_back_by_the_receiver() {
    for written in [true, false] {
        let (_net, broker, [sender, receiver]) = members().await;
        sender.leased(&broker, 1).await;
        let fetched = sender.fetched(&broker, 2).await;
        assert!(sender.leave().await);
        assert_eq!(receiver.lessor.held(), 3);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(receiver.lessor.held(), 3, "the answer is still being written");
        if written {
            fetched.delivered();
        } else {
            drop(fetched);
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
        let (held, went_back) = if written { (3, 0) } else { (1, 2) };
        assert_eq!((receiver.lessor.held(), broker.published().len()), (held, went_back));
        assert!(broker.published().iter().all(|kind| matches!(kind, AckKind::Nak(_))));
    }
}

/// Nobody could have it any more.
#[tokio::test(start_paused = true)]
async fn last_attempt_of_an_answer_that_is_not_written_is_not_given_back() {
    let (_net, broker, [sender, receiver]) = members().await;
    broker.change(|info| info.as_mut().unwrap().max_deliver = Some(1));
    let fetched = sender.fetched(&broker, 1).await;
    assert!(sender.leave().await);
    drop(fetched);
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!((receiver.lessor.held(), broker.published().len()), (1, 0));
}

/// The sender knows a new leader, and the receiver cannot ask for it.
#[tokio::test(start_paused = true)]
async fn receiver_looks_for_leaders_half_a_second_for_all_parts_together() {
    let (_net, broker, [sender, receiver]) = members().await;
    receiver.lessor.know(&broker.name(), None, clock::now() + PATIENCE).await.unwrap();
    broker.change(|info| info.as_mut().unwrap().leader = Leader(2));
    for _ in 0..3 {
        sender.leased(&broker, 1000).await;
    }
    broker.silence(true);
    let began = clock::now();
    assert!(sender.leave().await);
    let took = clock::now() - began;
    assert!(took < Duration::from_millis(700), "{took:?}");
    assert_eq!(sender.lessor.held(), 0);
}

/// Whether this step only asks if its hearer is there.
fn asks_who_is_there(step: &Step) -> bool {
    matches!(step, Step::Prepare(part) if part.leases.is_empty() && part.memories.is_empty())
}

#[tokio::test(start_paused = true)]
async fn every_staying_replica_is_tried() {
    let (net, broker, [sender, receivers @ ..]) = members::<7>().await;
    sender.leased(&broker, 3).await;
    // Five hang.
    let mut asked = 0;
    net.rule(move |step| {
        asked += u32::from(asks_who_is_there(step));
        if asks_who_is_there(step) && asked <= 5 { Fate::Lost } else { Fate::Pass }
    });
    assert!(sender.leave().await);
    assert_eq!(sender.lessor.held(), 0);
    assert_eq!(receivers.iter().map(|receiver| receiver.lessor.held()).sum::<usize>(), 3);
}

#[tokio::test(start_paused = true)]
async fn slow_receiver_is_asked_patiently_after_all_others() {
    let (net, broker, [sender, receiver]) = members().await;
    sender.leased(&broker, 3).await;
    net.rule(|step| match asks_who_is_there(step) {
        true => Fate::Late(Duration::from_secs(1)),
        false => Fate::Pass,
    });
    assert!(sender.leave().await);
    assert_eq!((sender.lessor.held(), receiver.lessor.held()), (0, 3));
}

#[tokio::test(start_paused = true)]
async fn aborted_hand_over_keeps_no_reservation() {
    let (net, broker, [sender, receiver]) = members().await;
    for _ in 0..2 {
        sender.leased(&broker, 1000).await;
    }
    // The first parts arrive; another one never does, and the last one comes after all was given up.
    let mut parts = 0;
    net.rule(move |step| {
        parts += usize::from(matches!(step, Step::Prepare(_)));
        if parts == 4 && matches!(step, Step::Prepare(_)) {
            return Fate::Late(PATIENCE);
        }
        Fate::Pass
    });
    assert!(!sender.leave().await, "there is no other receiver");
    assert_eq!(sender.lessor.held(), 2000);
    assert!(receiver.is_empty(), "{} places are left", receiver.lessor.room());
    tokio::time::sleep(2 * PATIENCE).await;
    assert!(receiver.is_empty(), "late: {} places are left", receiver.lessor.room());
}

#[tokio::test(start_paused = true)]
async fn prepared_leases_of_a_dead_sender_are_dropped() {
    let (net, broker, [sender, receiver]) = members().await;
    sender.leased(&broker, 10).await;
    // From Commit on nothing is heard of it any more.
    net.rule(|step| if matches!(step, Step::Prepare(_)) { Fate::Pass } else { Fate::Lost });
    let leaving = tokio::spawn(async move { sender.leave().await });
    eventually("places to be kept", || async { (receiver.lessor.room() < 5000).then_some(()) })
        .await;
    leaving.abort();
    tokio::time::sleep(Duration::from_secs(32)).await;
    assert!(receiver.is_empty(), "{} places are left", receiver.lessor.room());
}

#[tokio::test(start_paused = true)]
async fn commit_without_an_answer_is_repeated_until_it_is_known() {
    let (net, broker, [one, other, receiver]) = members().await;
    // Each has leases, both leave at once, and of each Commit the first answer is lost.
    let leases = [one.leased(&broker, 10).await, other.leased(&broker, 10).await];
    let mut commits = 0;
    net.rule(move |step| {
        commits += u32::from(matches!(step, Step::Commit(_)));
        if matches!(step, Step::Commit(_)) && commits <= 2 { Fate::Unanswered } else { Fate::Pass }
    });
    assert_eq!(tokio::join!(one.leave(), other.leave()), (true, true));
    assert_eq!((one.lessor.held(), other.lessor.held(), receiver.lessor.held()), (0, 0, 20));
    let still = receiver.cluster.lock_ownership().await;
    for (sender, leases) in [&one, &other].into_iter().zip(leases) {
        for lease in leases {
            let whose = still.locate(sender.us, lease);
            assert!(matches!(whose, LeaseLocation::Local(_)), "{whose:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn hand_over_waits_for_a_settlement_without_its_caller() {
    let (_net, broker, [sender, receiver]) = members().await;
    let lease = sender.leased(&broker, 1).await[0];
    broker.script([Fault::Slow(Duration::from_secs(3))]);
    let ask = vec![SettleItem { lease, action: Action::Ack, by: None }];
    let until = clock::now() + PATIENCE;
    let acking = sender.lessor.settle(ask, Confirmation::Confirmed, until);
    let gone = tokio::time::timeout(Duration::from_millis(100), acking).await;
    assert!(gone.is_err());
    assert!(sender.leave().await);
    let whose = receiver.cluster.lock_ownership().await.locate(sender.us, lease);
    assert_eq!(whose, LeaseLocation::Ended(LeaseError::Settled { by: SettleKind::Ack }));
}

#[tokio::test(start_paused = true)]
async fn principal_moves_with_its_leases() {
    let (_net, broker, [sender, receiver]) = members().await;
    let leases = sender.leased(&broker, 50).await;
    assert!(sender.leave().await);
    let settle = async |by: &str| {
        let asks = leases.iter().map(|lease| match heir_s(&receiver, &sender, *lease) {
            LeaseLocation::Local(lease) => {
                SettleItem { lease, action: Action::Ack, by: Some(by.into()) }
            }
            whose => panic!("{whose:?}"),
        });
        let until = clock::now() + PATIENCE;
        receiver.lessor.settle(asks.collect(), Confirmation::Confirmed, until).await
    };
    let foreign = settle("other").await;
    assert!(foreign.iter().all(|result| *result == Err(Error::NotHolder)), "{foreign:?}");
    let own = settle("anonymous").await;
    assert!(own.iter().all(Result::is_ok), "{own:?}");
}

#[tokio::test(start_paused = true)]
async fn repeated_hand_over_steps_do_nothing() {
    let (net, broker, [sender, receiver]) = members().await;
    let leases = sender.leased(&broker, 10).await;
    assert!(sender.leave().await);
    let asks = leases.iter().map(|lease| match heir_s(&receiver, &sender, *lease) {
        LeaseLocation::Local(lease) => SettleItem { lease, action: Action::Ack, by: None },
        whose => panic!("{whose:?}"),
    });
    let until = clock::now() + PATIENCE;
    receiver.lessor.settle(asks.collect(), Confirmation::Confirmed, until).await;
    assert!(receiver.is_empty());
    net.repeat_all();
    tokio::time::sleep(PATIENCE).await;
    assert!(receiver.is_empty(), "{} leases rose again", receiver.lessor.held());
    let whose = heir_s(&receiver, &sender, leases[0]);
    assert!(matches!(whose, LeaseLocation::Local(_) | LeaseLocation::Ended(_)), "{whose:?}");
}

/// The place of a lease at the receiver.
fn heir_s(receiver: &Member, sender: &Member, lease: LeaseId) -> LeaseLocation {
    let still = futures_util::FutureExt::now_or_never(receiver.cluster.lock_ownership());
    still.expect("nothing is in the way").locate(sender.us, lease)
}

#[tokio::test(start_paused = true)]
async fn replica_that_cannot_read_the_consumer_receives_no_leases() {
    let (_net, broker, [sender, receiver]) = members().await;
    sender.leased(&broker, 3).await;
    broker.silence(true);
    assert!(!sender.leave().await);
    assert_eq!(sender.lessor.held(), 3);
    assert!(receiver.is_empty());
}

#[tokio::test(start_paused = true)]
async fn leases_of_a_consumer_recreated_in_transit_are_refused() {
    let (net, broker, [sender, receiver]) = members().await;
    sender.leased(&broker, 3).await;
    // All is prepared, and Commit takes a while.
    net.rule(|step| match step {
        Step::Commit(_) => Fate::Late(Duration::from_secs(1)),
        Step::Prepare(_) | Step::Abort(_) => Fate::Pass,
    });
    let leaving = sender.leave();
    let meanwhile = async {
        eventually("places to be kept", || async { (receiver.lessor.room() < 5000).then_some(()) })
            .await;
        broker.change(|info| info.as_mut().unwrap().created = "second".into());
        broker.replace_shared();
        // A Fetch makes the replica look at the consumer.
        receiver.leased(&broker, 1).await;
    };
    tokio::join!(leaving, meanwhile);
    assert_eq!(receiver.lessor.held(), 1, "the leases of the new consumer");
}

#[tokio::test(start_paused = true)]
async fn replica_without_capacity_receives_no_leases() {
    let (net, keys) = Net::new(&new_key_line().unwrap());
    let broker = FakeBroker::new(info(ACK_WAIT));
    let sender = Member::join(&net, &keys, &broker, 100).await;
    let receiver = Member::join(&net, &keys, &broker, 10).await;
    sender.leased(&broker, 20).await;
    assert!(!sender.leave().await);
    assert_eq!(sender.lessor.held(), 20);
    assert!(receiver.is_empty());
}

/// A request to the replica that has this lease.
pub fn question(owner: &Member, lease: LeaseId, action: pb::settlement::Action) -> Vec<u8> {
    let settlement = pb::Settlement { number: 0, token: String::new(), action: Some(action) };
    let question = wire::SettleRequest {
        owner: owner.us.0.to_vec().into(),
        leases: vec![lease.get()],
        settlements: vec![settlement],
        confirmation: pb::Confirmation::Confirmed.into(),
        budget: 3000,
        ..wire::SettleRequest::default()
    };
    question.encode_to_vec()
}

#[tokio::test(start_paused = true)]
async fn late_request_at_the_sender_is_answered_once_by_the_receiver() {
    let (_net, broker, [sender, _heir, asker]) = members().await;
    let lease = sender.leased(&broker, 1).await[0];
    assert!(sender.leave().await);
    let nak = pb::settlement::Action::Nak(pb::NakAction::default());
    let question = question(&sender, lease, nak);
    // Both listen on this name, for a while; a second question would find the lease busy.
    broker.script([Fault::Slow(Duration::from_secs(1))]);
    let until = clock::now() + PATIENCE;
    let answer = asker.cluster.ask_to_settle(sender.us, &question, until).await.unwrap();
    let answer = wire::SettleResponse::decode(&*answer).unwrap();
    assert_eq!(answer.results[0].outcome(), pb::Outcome::Confirmed, "{answer:?}");
    tokio::time::sleep(PATIENCE).await;
    assert_eq!(broker.published(), [AckKind::Nak(None)]);
}

#[tokio::test(start_paused = true)]
async fn sender_forwards_requests_that_the_receiver_cannot_hear_yet() {
    let (net, broker, [sender, _heir, asker]) = members().await;
    let lease = sender.leased(&broker, 1).await[0];
    assert!(sender.leave().await);
    net.deafen(&sender.us);
    let ack = pb::settlement::Action::Ack(pb::AckAction {});
    let question = question(&sender, lease, ack);
    let until = clock::now() + PATIENCE;
    let answer = asker.cluster.ask_to_settle(sender.us, &question, until).await.unwrap();
    let answer = wire::SettleResponse::decode(&*answer).unwrap();
    assert_eq!(answer.results[0].outcome(), pb::Outcome::Confirmed, "{answer:?}");
    sender.vanish().await;
    let nobody = asker.cluster.ask_to_settle(sender.us, &question, until).await;
    assert_eq!(nobody, Err(Unanswered::Nobody), "the receiver cannot hear this name");
}
