//! The promise of a consumer with copies whose leader leaves in order: a model with copies, and three real
//! servers. It is one story, because three servers need some seconds to find each other.

use std::collections::BTreeMap;

use fetch_proxy::{
    broker::{AckKind, Inbox, PullEnd, PullRequest},
    clock,
};
use testkit::{BOUND, cluster::Cluster, jetstream::ack_wait};

use super::{
    client::{attempts, end, millis, one, open, pull, read, say, take, unsettled},
    worlds::{Modelled, Real, World, modelled_as, replicated},
};

/// Long enough to step down in, on a busy machine.
const ACK_WAIT: u64 = 4_000;

/// A world whose consumer has copies.
trait Clustered: World {
    /// The leader leaves, and another has come.
    async fn step_down(&self);
}

impl Clustered for Modelled {
    async fn step_down(&self) {
        self.net.with(|state, now| {
            state.model.step_down(&self.name(), now);
            state.model.change_leader(&self.name(), millis(0), now);
        });
        tokio::time::sleep(millis(1)).await;
    }
}

struct ThreeServers {
    cluster: Cluster,
    real: Real,
}

impl World for ThreeServers {
    type Broker = <Real as World>::Broker;
    fn broker(&self) -> &Self::Broker {
        self.real.broker()
    }
    fn name(&self) -> fetch_proxy::broker::ConsumerName {
        self.real.name()
    }
    fn slack(&self) -> std::time::Duration {
        self.real.slack()
    }
    async fn publish(&self, payload: Vec<u8>) {
        self.real.publish(payload).await;
    }
    async fn publish_poison(&self) {
        self.real.publish_poison().await;
    }
    async fn delete_consumer(&self) {
        self.real.delete_consumer().await;
    }
    async fn set_ack_wait(&self, ack_wait: std::time::Duration) {
        self.real.set_ack_wait(ack_wait).await;
    }
}

impl Clustered for ThreeServers {
    async fn step_down(&self) {
        self.cluster.step_down(&self.real.fixture).await;
    }
}

async fn a_leader_that_leaves<W: Clustered>(world: W) {
    let began = clock::now();
    for number in 0..4 {
        world.publish(vec![number]).await;
    }
    let before = read(&world).await;
    assert_eq!((before.leader_shows, before.replicas), (true, 3));
    let found = take(&world, 3).await;
    assert_eq!(found.len(), 3);
    say(&world, &found[0], AckKind::Ack).await.unwrap();
    let mut inbox = open(&world).await;
    // The fourth message is taken first, so that the pull waits.
    assert_eq!(attempts(&take(&world, 1).await), [(4, 1)]);
    inbox.pull(PullRequest { expires: BOUND, ..pull(1, 1) }).await.unwrap();
    tokio::time::sleep(millis(1_000)).await;
    let progress = clock::now();
    say(&world, &found[2], AckKind::Progress).await.unwrap();
    world.step_down().await;
    assert_eq!(end(&mut inbox).await, PullEnd::LeaderGone);
    let after = read(&world).await;
    assert_ne!(after.leader, before.leader);
    assert_eq!((after.created, after.delivered, after.ack_pending), (before.created, 4, 3));
    // Known to the leader alone, and so lost with it.
    say(&world, &found[1], AckKind::Nak(None)).await.unwrap();
    world.step_down().await;
    assert_eq!(attempts(&take(&world, 4).await), [], "the Nak is forgotten");
    // The old subjects settle at the new leader.
    say(&world, &found[1], AckKind::Term(String::new())).await.unwrap();
    // The fourth message counts from its publication, and the third from its progress.
    let mut left = BTreeMap::from([(4, began), (3, progress)]);
    while !left.is_empty() {
        let delivery = one(&world).await;
        let since = left.remove(&delivery.stream_sequence).expect("each once");
        let waited = clock::now() - since;
        assert!(waited + millis(100) >= millis(ACK_WAIT), "{delivery:?} after {waited:?}");
        assert!(waited <= millis(ACK_WAIT) + world.slack(), "{delivery:?} after {waited:?}");
    }
    say(&world, &found[2], AckKind::Ack).await.unwrap();
    assert_eq!(unsettled(&world).await, 1);
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_leaves_keeps_its_promises_on_the_model() {
    a_leader_that_leaves(modelled_as(replicated(millis(ACK_WAIT))).await).await;
}

#[tokio::test]
async fn a_leader_that_leaves_keeps_its_promises_on_three_real_servers() {
    let cluster = Cluster::start().await;
    let fixture = cluster.fixture(ack_wait(ACK_WAIT)).await;
    let real = Real::with(fixture, &cluster.url()).await;
    a_leader_that_leaves(ThreeServers { cluster, real }).await;
}
