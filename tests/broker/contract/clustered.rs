//! Promises of a consumer with copies, on a model with copies and on three real servers. Three servers need
//! some seconds to find each other, so all stories of this file share them.

use std::{collections::BTreeMap, rc::Rc, time::Duration};

use fetch_proxy::{
    broker::{AckKind, BrokerError, ConsumerName, Inbox, PullEnd, PullRequest},
    clock,
};
use testkit::{BOUND, cluster::Cluster, jetstream::ack_wait, nats_server::NatsServer};

use super::{
    client::{
        attempts, end, millis, one, open, pull, read, say, say_until, take, unsettled,
        until_unsettled,
    },
    worlds::{Modelled, Real, World, modelled_as, replicated},
};

/// Long enough to step down in, on a busy machine, in milliseconds.
const ACK_WAIT: u64 = 4_000;

/// A world whose consumer has copies.
trait Clustered: World {
    /// The leader leaves, and another has come.
    async fn step_down(&self);
    /// From now on the other servers do not answer the leader.
    async fn lose_majority(&self);
    async fn find_majority(&self);
    async fn crash_leader(&self);
    /// Another leader has come.
    async fn next_leader(&self);
}

impl Clustered for Modelled {
    async fn step_down(&self) {
        self.net.with(|state, now| state.model.step_down(&self.name(), now));
        self.next_leader().await;
    }
    async fn lose_majority(&self) {
        let sides = [self.broker().side()];
        self.net.with(|state, now| state.isolate_leader(&self.name(), &sides, now));
    }
    async fn find_majority(&self) {
        self.net.with(|state, now| state.model.heal(&self.name(), now));
    }
    async fn crash_leader(&self) {
        self.net.with(|state, now| state.model.lose_leader(&self.name(), now));
    }
    async fn next_leader(&self) {
        self.net.with(|state, now| state.model.change_leader(&self.name(), millis(0), now));
        tokio::time::sleep(millis(1)).await;
    }
}

struct ThreeServers {
    cluster: Rc<Cluster>,
    leader: usize,
    real: Real,
}

impl ThreeServers {
    /// A consumer with three copies. `urls` are the servers of the connection, by the place of the leader.
    async fn new(cluster: &Rc<Cluster>, urls: impl Fn(&Cluster, usize) -> String) -> Self {
        let fixture = cluster.fixture(ack_wait(ACK_WAIT)).await;
        let leader = cluster.leader(&fixture).await;
        let real = Real::with(fixture, &urls(cluster, leader)).await;
        Self { cluster: cluster.clone(), leader, real }
    }

    fn others(&self) -> impl Iterator<Item = &NatsServer> {
        let nodes = self.cluster.nodes.iter().enumerate();
        nodes.filter(|(place, _)| *place != self.leader).map(|(_, server)| server)
    }
}

impl World for ThreeServers {
    type Broker = <Real as World>::Broker;
    fn broker(&self) -> &Self::Broker {
        self.real.broker()
    }
    fn name(&self) -> ConsumerName {
        self.real.name()
    }
    fn slack(&self) -> Duration {
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
    async fn set_ack_wait(&self, ack_wait: Duration) {
        self.real.set_ack_wait(ack_wait).await;
    }
}

impl Clustered for ThreeServers {
    async fn step_down(&self) {
        self.cluster.step_down(&self.real.fixture).await;
    }
    async fn lose_majority(&self) {
        self.others().for_each(|server| server.signal("STOP"));
    }
    async fn find_majority(&self) {
        self.others().for_each(|server| server.signal("CONT"));
    }
    async fn crash_leader(&self) {
        self.cluster.nodes[self.leader].signal("KILL");
    }
    async fn next_leader(&self) {
        testkit::eventually("another leader", || async {
            let info = self.real.fixture.try_info().await?;
            let leader = info.cluster?.leader?;
            (leader != format!("n{}", self.leader)).then_some(())
        })
        .await;
    }
}

/// A leader leaves in order: the state that the next one has, and what it has forgotten.
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
    // The fourth message is out, too, so that a pull waits.
    assert_eq!(attempts(&take(&world, 1).await), [(4, 1)]);
    let mut inbox = open(&world).await;
    inbox.pull(PullRequest { expires: BOUND, ..pull(1, 1) }).await.unwrap();
    tokio::time::sleep(millis(1_000)).await;
    let progress = clock::now();
    say(&world, &found[2], AckKind::Progress).await.unwrap();
    world.step_down().await;
    assert_eq!(end(&mut inbox).await, PullEnd::LeaderGone);
    let after = read(&world).await;
    assert_ne!(after.leader, before.leader);
    assert_eq!((after.created, after.delivered, after.ack_pending), (before.created, 4, 3));
    say(&world, &found[1], AckKind::Nak(None)).await.unwrap();
    world.step_down().await;
    assert_eq!(
        attempts(&take(&world, 4).await),
        [],
        "the Nak was in the memory of the leader alone"
    );
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

/// A leader without a majority: everything that it answers, and everything that waits for a majority.
async fn a_leader_without_a_majority<W: Clustered>(world: W) {
    for number in 0..3 {
        world.publish(vec![number]).await;
    }
    let before = read(&world).await;
    let found = take(&world, 2).await;
    let mut inbox = open(&world).await;
    world.lose_majority().await;
    assert_eq!(say(&world, &found[0], AckKind::Progress).await, Ok(()));
    assert_eq!(say(&world, &found[1], AckKind::Nak(Some(BOUND))).await, Ok(()));
    let soon = || clock::now() + millis(500);
    let acked = say_until(&world, &found[0], AckKind::Ack, soon()).await;
    assert_eq!(acked, Err(BrokerError::Unconfirmed));
    inbox.pull(pull(1, 1)).await.unwrap();
    let silence = tokio::time::timeout(millis(600), inbox.next(&mut Vec::new())).await;
    assert!(silence.is_err(), "the third message waits: {silence:?}");
    let info = read(&world).await;
    assert_eq!((info.leader, info.created), (before.leader, before.created));
    world.find_majority().await;
    testkit::eventually("a majority", || async {
        say_until(&world, &found[0], AckKind::Ack, soon()).await.ok()
    })
    .await;
}

/// A leader crashes: nobody listens until the next one comes.
async fn a_leader_that_crashes<W: Clustered>(world: W) {
    for number in 0..2 {
        world.publish(vec![number]).await;
    }
    let before = read(&world).await;
    let found = take(&world, 2).await;
    say(&world, &found[1], AckKind::Ack).await.unwrap();
    let (mut waiting, mut late) = (open(&world).await, open(&world).await);
    waiting.pull(PullRequest { expires: 3 * BOUND, ..pull(1, 1) }).await.unwrap();
    // An answer on the same connection: the servers have the pull, and a moment to tell each other.
    read(&world).await;
    tokio::time::sleep(millis(200)).await;
    world.crash_leader().await;
    let soon = clock::now() + millis(500);
    let said = say_until(&world, &found[0], AckKind::Progress, soon).await;
    // In the first moment it may have reached the leader, or be under way to it.
    assert!(matches!(said, Err(BrokerError::Unsent(_) | BrokerError::Unconfirmed)), "{said:?}");
    late.pull(pull(1, 1)).await.unwrap();
    assert_eq!(end(&mut late).await, PullEnd::ConsumerGone);
    world.next_leader().await;
    assert_eq!(end(&mut waiting).await, PullEnd::LeaderGone);
    assert_ne!(read(&world).await.leader, before.leader);
    until_unsettled(&world, 1).await;
    say(&world, &found[0], AckKind::Ack).await.unwrap();
    assert_eq!(unsettled(&world).await, 0);
}

#[tokio::test(start_paused = true)]
async fn leaders_keep_their_promises_on_the_model() {
    let world = || modelled_as(replicated(millis(ACK_WAIT)));
    a_leader_that_leaves(world().await).await;
    a_leader_without_a_majority(world().await).await;
    a_leader_that_crashes(world().await).await;
}

#[tokio::test]
async fn leaders_keep_their_promises_on_three_real_servers() {
    let cluster = Rc::new(Cluster::start().await);
    a_leader_that_leaves(ThreeServers::new(&cluster, |all, _| all.url()).await).await;
    let leader = |all: &Cluster, leader: usize| all.nodes[leader].url();
    a_leader_without_a_majority(ThreeServers::new(&cluster, leader).await).await;
    let other = |all: &Cluster, leader: usize| all.nodes[(leader + 1) % 3].url();
    a_leader_that_crashes(ThreeServers::new(&cluster, other).await).await;
}
