//! A client of a broker: pulls, and says what it has done.

use std::time::{Duration, Instant};

use fetch_proxy::{
    broker::{
        AckKind, AckPublish, Arrival, Broker, BrokerError, Confirmation, ConnectionKind,
        ConsumerInfo, Delivery, Inbox, InboxEvent, InfoError, PullEnd, PullRequest,
    },
    clock,
};
use testkit::BOUND;

use super::worlds::World;

/// An inbox of a world's broker.
pub type InboxOf<W> = <<W as World>::Broker as Broker>::Inbox;

pub fn millis(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

/// A pull that brings the available messages, and waits for the first of them.
pub fn pull(no: u64, batch: u32) -> PullRequest {
    let expires = Duration::from_millis(300);
    PullRequest { no, batch, expires, no_wait: true, max_bytes: None }
}

pub fn until() -> Instant {
    clock::now() + BOUND
}

pub async fn open<W: World>(world: &W) -> InboxOf<W> {
    world.broker().open(&world.name(), ConnectionKind::Shared).await.unwrap()
}

/// Collects arrivals until so many messages are there, or the pull has ended.
pub async fn arrivals(inbox: &mut impl Inbox, messages: usize) -> (Vec<Delivery>, Option<PullEnd>) {
    let (mut found, mut buffer) = (Vec::new(), Vec::new());
    while found.len() < messages {
        let news = tokio::time::timeout(BOUND, inbox.next(&mut buffer)).await.expect("it hangs");
        assert_eq!(news, InboxEvent::Arrived);
        for arrival in buffer.drain(..) {
            match arrival {
                Arrival::Message(delivery) => found.push(*delivery),
                Arrival::End { end, .. } => return (found, Some(end)),
            }
        }
    }
    (found, None)
}

/// Waits for the end of the open pull.
pub async fn end(inbox: &mut impl Inbox) -> PullEnd {
    let (found, end) = arrivals(inbox, 1).await;
    end.unwrap_or_else(|| panic!("a message comes before the end: {found:?}"))
}

/// The next message, after as many pulls as it takes.
pub async fn one<W: World>(world: &W) -> Delivery {
    let mut inbox = open(world).await;
    loop {
        inbox.pull(pull(1, 1)).await.unwrap();
        if let Some(delivery) = arrivals(&mut inbox, 1).await.0.pop() {
            return delivery;
        }
    }
}

/// One pull of so many messages, and everything that it brings.
pub async fn take<W: World>(world: &W, batch: u32) -> Vec<Delivery> {
    let mut inbox = open(world).await;
    inbox.pull(pull(1, batch)).await.unwrap();
    arrivals(&mut inbox, batch as usize).await.0
}

pub fn sequences(found: &[Delivery]) -> Vec<u64> {
    found.iter().map(|one| one.stream_sequence).collect()
}

/// The stream sequence and the attempt of each.
pub fn attempts(found: &[Delivery]) -> Vec<(u64, u64)> {
    found.iter().map(|one| (one.stream_sequence, one.delivery_count)).collect()
}

pub async fn say<W: World>(
    world: &W,
    delivery: &Delivery,
    kind: AckKind,
) -> Result<(), BrokerError> {
    say_until(world, delivery, kind, until()).await
}

pub async fn say_until<W: World>(
    world: &W,
    delivery: &Delivery,
    kind: AckKind,
    until: Instant,
) -> Result<(), BrokerError> {
    let orders =
        vec![AckPublish { ack: delivery.ack.clone(), kind, confirm_group: None, by: None }];
    world.broker().settle(orders, Confirmation::Confirmed, until).await.remove(0)
}

/// On a busy machine, three servers may elect a leader again, and nobody answers for a while.
pub async fn read<W: World>(world: &W) -> ConsumerInfo {
    let read = || async {
        match world.broker().info(&world.name(), until()).await {
            Err(InfoError::Unavailable(_)) => None,
            read => Some(read.unwrap()),
        }
    };
    testkit::eventually("INFO", read).await
}

pub async fn unsettled<W: World>(world: &W) -> u64 {
    read(world).await.ack_pending
}

/// Waits until so many deliveries are unsettled.
pub async fn until_unsettled<W: World>(world: &W, count: u64) {
    testkit::eventually("deliveries to be settled", || async {
        (unsettled(world).await == count).then_some(())
    })
    .await;
}

/// A delivery comes so long after `began`. On a busy machine it may come later, and never earlier. A tenth
/// of a second is the longest way of the last message to the client.
pub async fn comes_after<W: World>(world: &W, wait: Duration, began: Instant) -> Delivery {
    let delivery = one(world).await;
    let waited = clock::now() - began;
    assert!(waited + millis(100) >= wait, "{waited:?} is earlier than {wait:?}");
    assert!(waited <= wait + world.slack(), "{waited:?} is later than {wait:?}");
    delivery
}

/// Lets more time pass than the ack wait of a second, so that everything that is out has expired.
pub async fn expire() {
    tokio::time::sleep(super::worlds::ACK_WAIT + millis(200)).await;
}
