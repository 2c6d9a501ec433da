//! A replica announces what it sees of a consumer before it hands out anything, and waits for the
//! others. The tests check the order, on a scripted bus.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use fetch_proxy::{
    broker::Confirmation,
    clock,
    lease::LeaseId,
    lessor::{Action, Error, SettleItem, Settled, Sighting},
    pb::peer::v1::handover_request::Step,
    token::new_key_line,
};
use testkit::fake_broker::{FakeBroker, info};

use crate::linked::{Fate, Member, Net, PATIENCE};

const ACK_WAIT: Duration = Duration::from_secs(60);
/// The longest time that a replica waits for the others.
const BOUND: Duration = Duration::from_secs(1);

async fn two() -> (Net, FakeBroker, [Member; 2]) {
    let (net, keys) = Net::new(&new_key_line().unwrap());
    let broker = FakeBroker::new(info(ACK_WAIT));
    let one = Member::join(&net, &keys, &broker, 100).await;
    let other = Member::join(&net, &keys, &broker, 100).await;
    (net, broker, [one, other])
}

/// A client may ask a replica before it is ready.
#[tokio::test(start_paused = true)]
async fn replica_that_has_just_started_tells_the_others_once_it_has_met_them() {
    let (net, keys) = Net::new(&new_key_line().unwrap());
    let broker = FakeBroker::new(info(ACK_WAIT));
    let owner = Member::join(&net, &keys, &broker, 100).await;
    let old = owner.leased(&broker, 1).await;
    broker.forget();
    net.silence(true);
    let next = Member::new(&net, &keys, &broker, 100);
    let meets = async {
        tokio::time::sleep(Duration::from_millis(10)).await;
        net.silence(false);
        next.cluster.announce().await;
    };
    let (new, ()) = tokio::join!(next.leased(&broker, 1), meets);
    assert_eq!(ack(&owner, old[0]).await, expired());
    assert!(ack(&next, new[0]).await.is_ok());
}

/// A replica starts while another one is cut off, and does not know it. A replica that starts later has no older lease.
#[tokio::test(start_paused = true)]
async fn replica_that_was_cut_off_is_told_when_it_is_heard() {
    let (net, keys) = Net::new(&new_key_line().unwrap());
    let broker = FakeBroker::new(info(ACK_WAIT));
    let owner = Member::join(&net, &keys, &broker, 100).await;
    let old = owner.leased(&broker, 1).await;
    net.silence(true);
    let next = Member::join(&net, &keys, &broker, 100).await;
    broker.forget();
    let new = next.leased(&broker, 1).await;
    let (told, of_owner) = (Arc::new(AtomicUsize::new(0)), owner.subject("sighting"));
    let others = told.clone();
    net.sightings(move |subject| {
        others.fetch_add(usize::from(subject != of_owner), Ordering::Relaxed);
        Fate::Pass
    });
    tokio::time::sleep(Duration::from_millis(10)).await;
    net.silence(false);
    let _third = Member::join(&net, &keys, &broker, 100).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(ack(&owner, old[0]).await, expired());
    assert!(ack(&next, new[0]).await.is_ok());
    assert_eq!(told.load(Ordering::Relaxed), 0);
}

/// The consumer is deleted and made again; nothing is delivered of the new one.
fn make_anew(broker: &FakeBroker) {
    broker.change(|info| info.as_mut().unwrap().created = "second".into());
    broker.forget();
}

async fn ack(member: &Member, lease: LeaseId) -> Result<Settled, Error> {
    let ask = SettleItem { lease, action: Action::Ack, by: None };
    let until = clock::now() + PATIENCE;
    member.lessor.settle(vec![ask], Confirmation::Confirmed, until).await.pop().unwrap()
}

fn expired() -> Result<Settled, Error> {
    Err(Error::LeaseExpired { forgotten: false })
}

#[tokio::test(start_paused = true)]
async fn nothing_is_delivered_before_the_others_have_answered() {
    let (net, broker, [owner, next]) = two().await;
    let old = owner.leased(&broker, 2).await;
    make_anew(&broker);
    let late = BOUND / 2;
    net.sightings(move |_| Fate::Late(late));
    let began = clock::now();
    let new = next.leased(&broker, 1).await;
    assert!(clock::now() - began >= late, "{:?}", clock::now() - began);
    assert_eq!(ack(&owner, old[0]).await, expired());
    assert!(ack(&next, new[0]).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn silent_replica_is_waited_for_one_second() {
    let (net, broker, [owner, next]) = two().await;
    owner.leased(&broker, 1).await;
    make_anew(&broker);
    net.sightings(|_| Fate::Lost);
    let began = clock::now();
    next.leased(&broker, 1).await;
    let took = clock::now() - began;
    // One announcement is for the consumer, and one for its first delivery. Apart from that the
    // replica collects for a second.
    assert!(took < BOUND * 4, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn reset_consumer_voids_the_leases_of_every_replica() {
    let (_net, broker, [owner, next]) = two().await;
    // It knows the consumer, and that nothing was delivered.
    next.lessor.know(&broker.name(), None, clock::now() + PATIENCE).await.unwrap();
    let old = owner.leased(&broker, 3).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    broker.forget();
    let new = next.leased(&broker, 1).await;
    for lease in old {
        assert_eq!(ack(&owner, lease).await, expired());
    }
    assert!(ack(&next, new[0]).await.is_ok());
    assert_eq!(broker.published().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn second_reset_within_a_moment_voids_the_leases_of_every_replica() {
    let (_net, broker, [owner, next]) = two().await;
    next.lessor.know(&broker.name(), None, clock::now() + PATIENCE).await.unwrap();
    owner.leased(&broker, 1).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    broker.forget();
    let old = owner.leased(&broker, 1).await;
    broker.forget();
    let new = next.leased(&broker, 1).await;
    assert_eq!(ack(&owner, old[0]).await, expired());
    assert!(ack(&next, new[0]).await.is_ok());
    assert_eq!(broker.published().len(), 1);
}

/// The receiver has ended its own leases by then, and knows nothing of those that come.
#[tokio::test(start_paused = true)]
async fn leases_that_a_reset_ends_during_a_hand_over_are_not_taken_over() {
    let (net, keys) = Net::new(&new_key_line().unwrap());
    let broker = FakeBroker::new(info(ACK_WAIT));
    let sender = Member::join(&net, &keys, &broker, 100).await;
    let next = Member::join(&net, &keys, &broker, 100).await;
    let receiver = Member::join(&net, &keys, &broker, 200).await;
    for member in [&receiver, &next] {
        member.lessor.know(&broker.name(), None, clock::now() + PATIENCE).await.unwrap();
    }
    let old = sender.leased(&broker, 3).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    broker.forget();
    let to_sender = format!(".{}.", sender.us);
    net.sightings(move |subject| {
        let late = subject.contains(&to_sender);
        if late { Fate::Late(Duration::from_millis(10)) } else { Fate::Pass }
    });
    net.rule(|step| match step {
        Step::Prepare(part) if !part.leases.is_empty() => Fate::Late(Duration::from_millis(30)),
        _ => Fate::Pass,
    });
    let until = clock::now() + PATIENCE;
    let (new, handed_over) = tokio::join!(next.leased(&broker, 1), sender.cluster.hand_over(until));
    assert!(handed_over, "what is left goes to the same receiver");
    assert_eq!(receiver.lessor.held(), 0, "{old:?} have ended");
    assert!(ack(&next, new[0]).await.is_ok());
}

/// The others receive one announcement of a consumer, and not one for each Fetch.
#[tokio::test(start_paused = true)]
async fn unchanged_consumer_costs_no_more_announcements() {
    let (net, broker, [one, _other]) = two().await;
    let told = Arc::new(AtomicUsize::new(0));
    let count = told.clone();
    net.sightings(move |_| {
        count.fetch_add(1, Ordering::Relaxed);
        Fate::Pass
    });
    for _ in 0..5 {
        for lease in one.leased(&broker, 3).await {
            assert!(ack(&one, lease).await.is_ok());
        }
        tokio::time::sleep(Duration::from_secs(20)).await;
    }
    // The consumer, and its first delivery.
    assert_eq!(told.load(Ordering::Relaxed), 2);
}

/// A consumer that cannot be used any more has no feed; what was leased of it is still watched over.
#[tokio::test(start_paused = true)]
async fn leases_of_an_unsuitable_consumer_end_when_it_is_recreated() {
    let (_net, broker, [owner, _next]) = two().await;
    let old = owner.leased(&broker, 1).await;
    broker.change(|info| info.as_mut().unwrap().push = true);
    // Long after the next look at it.
    tokio::time::sleep(ACK_WAIT / 2).await;
    broker.change(|info| info.as_mut().unwrap().push = false);
    make_anew(&broker);
    let sighting = Sighting {
        name: broker.name(),
        created: "second".into(),
        delivered: 0,
        began: false,
        again: false,
        counting: 0,
    };
    owner.lessor.heard_of(sighting).await;
    assert_eq!(ack(&owner, old[0]).await, expired());
    assert!(broker.published().is_empty());
}
