//! Promises of a consumer with copies, on a model with copies and on three real servers. Three servers need
//! some seconds to find each other, so all stories of this file share them.

use std::{cell::RefCell, collections::BTreeMap, rc::Rc};

use fetch_proxy::{
    broker::{
        AckKind, Broker, BrokerError, ConsumerInfo, Inbox, InfoError, Leader, PullEnd, PullRequest,
    },
    clock,
};
use testkit::{
    BOUND,
    cluster::Cluster,
    jetstream::{Fixture, ack_wait},
    nats_server::NatsServer,
};

use super::{
    client::{
        attempts, end, millis, one, open, pull, read, say, say_until, take, unsettled,
        until_unsettled,
    },
    worlds::{Modelled, Real, World, delegate, modelled_as, replicated},
};
use crate::simulation::jetstream::Config;

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
    first_leader: Leader,
    real: Real,
}

impl ThreeServers {
    /// A consumer with three copies. `urls` are the servers of the connection, by the place of the leader.
    async fn new(
        cluster: &Rc<Cluster>,
        fixture: Fixture,
        urls: impl Fn(&Cluster, usize) -> String,
    ) -> Self {
        let leader = cluster.leader(&fixture).await;
        let real = Real::with(fixture, &urls(cluster, leader)).await;
        let first_leader = read(&real).await.leader;
        Self { cluster: cluster.clone(), leader, first_leader, real }
    }

    fn others(&self) -> impl Iterator<Item = &NatsServer> {
        let nodes = self.cluster.nodes.iter().enumerate();
        nodes.filter(|(place, _)| *place != self.leader).map(|(_, server)| server)
    }
}

delegate!(ThreeServers);
delegate!(OneOfThree);

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
            let info = read_soon(self).await.ok()?;
            (info.leader != self.first_leader).then_some(())
        })
        .await;
    }
}

/// INFO, if it is answered in a moment.
async fn read_soon<W: World>(world: &W) -> Result<ConsumerInfo, InfoError> {
    world.broker().info(&world.name(), clock::now() + millis(300)).await
}

/// A leader leaves in order: the state that the next one has, and what it has forgotten.
async fn a_leader_that_leaves<W: Clustered>(world: &W) {
    let began = clock::now();
    for number in 0..4 {
        world.publish(vec![number]).await;
    }
    let before = read(world).await;
    assert_eq!((before.leader_shows, before.replicas), (true, 3));
    let found = take(world, 3).await;
    assert_eq!(found.len(), 3);
    say(world, &found[0], AckKind::Ack).await.unwrap();
    // The fourth message is out, too, so that a pull waits.
    assert_eq!(attempts(&take(world, 1).await), [(4, 1)]);
    let mut inbox = open(world).await;
    inbox.pull(PullRequest { expires: BOUND, ..pull(1, 1) }).await.unwrap();
    tokio::time::sleep(millis(1_000)).await;
    let progress = clock::now();
    say(world, &found[2], AckKind::Progress).await.unwrap();
    world.step_down().await;
    assert_eq!(end(&mut inbox).await, PullEnd::LeaderGone);
    let after = read(world).await;
    assert_ne!(after.leader, before.leader);
    assert_eq!((after.created, after.delivered, after.ack_pending), (before.created, 4, 3));
    say(world, &found[1], AckKind::Nak(None)).await.unwrap();
    world.step_down().await;
    assert_eq!(
        attempts(&take(world, 4).await),
        [],
        "the Nak was in the memory of the leader alone"
    );
    say(world, &found[1], AckKind::Term(String::new())).await.unwrap();
    // The fourth message counts from its publication, and the third from its progress.
    let mut left = BTreeMap::from([(4, began), (3, progress)]);
    while !left.is_empty() {
        let delivery = one(world).await;
        let since = left.remove(&delivery.stream_sequence).expect("each once");
        let waited = clock::now() - since;
        assert!(waited + millis(100) >= millis(ACK_WAIT), "{delivery:?} after {waited:?}");
        assert!(waited <= millis(ACK_WAIT) + world.slack(), "{delivery:?} after {waited:?}");
    }
    say(world, &found[2], AckKind::Ack).await.unwrap();
    assert_eq!(unsettled(world).await, 1);
}

/// A leader without a majority: everything that it answers, and everything that waits for a majority.
async fn a_leader_without_a_majority<W: Clustered>(world: &W) {
    for number in 0..3 {
        world.publish(vec![number]).await;
    }
    let before = read(world).await;
    let found = take(world, 2).await;
    let mut inbox = open(world).await;
    world.lose_majority().await;
    assert_eq!(say(world, &found[0], AckKind::Progress).await, Ok(()));
    assert_eq!(say(world, &found[1], AckKind::Nak(Some(BOUND))).await, Ok(()));
    let soon = || clock::now() + millis(500);
    let acked = say_until(world, &found[0], AckKind::Ack, soon()).await;
    assert_eq!(acked, Err(BrokerError::Unconfirmed));
    inbox.pull(pull(1, 1)).await.unwrap();
    let silence = tokio::time::timeout(millis(600), inbox.next(&mut Vec::new())).await;
    assert!(silence.is_err(), "the third message waits: {silence:?}");
    let info = read(world).await;
    assert_eq!((info.leader, info.created), (before.leader, before.created));
    world.find_majority().await;
    testkit::eventually("a majority", || async {
        say_until(world, &found[0], AckKind::Ack, soon()).await.ok()
    })
    .await;
}

/// A leader crashes: nobody listens until the next one comes.
async fn a_leader_that_crashes<W: Clustered>(world: &W) {
    for number in 0..2 {
        world.publish(vec![number]).await;
    }
    let before = read(world).await;
    let found = take(world, 2).await;
    say(world, &found[1], AckKind::Ack).await.unwrap();
    let (mut waiting, mut late) = (open(world).await, open(world).await);
    waiting.pull(PullRequest { expires: 3 * BOUND, ..pull(1, 1) }).await.unwrap();
    // An answer on the same connection: the servers have the pull, and a moment to tell each other.
    read(world).await;
    tokio::time::sleep(millis(200)).await;
    world.crash_leader().await;
    let soon = clock::now() + millis(500);
    let said = say_until(world, &found[0], AckKind::Progress, soon).await;
    // In the first moment it may have reached the leader, or be under way to it.
    assert!(matches!(said, Err(BrokerError::Leaderless(_) | BrokerError::Unconfirmed)), "{said:?}");
    late.pull(pull(1, 1)).await.unwrap();
    assert_eq!(end(&mut late).await, PullEnd::ConsumerGone);
    world.next_leader().await;
    assert_eq!(end(&mut waiting).await, PullEnd::LeaderGone);
    assert_ne!(read(world).await.leader, before.leader);
    until_unsettled(world, 1).await;
    say(world, &found[0], AckKind::Ack).await.unwrap();
    assert_eq!(unsettled(world).await, 0);
}

/// A consumer without copies, whose server is one of several.
trait Single: World {
    async fn kill(&self);
    async fn start(&self);
}

impl Single for Modelled {
    async fn kill(&self) {
        self.crash_leader().await;
    }
    async fn start(&self) {
        self.next_leader().await;
    }
}

/// A consumer without copies on one of the servers, over a connection to another one.
struct OneOfThree {
    cluster: RefCell<Cluster>,
    real: Real,
}

impl OneOfThree {
    async fn new(cluster: Cluster, fixture: Fixture) -> Self {
        let real = Real::with(fixture, &cluster.nodes[1].url()).await;
        Self { cluster: RefCell::new(cluster), real }
    }
}

impl Single for OneOfThree {
    async fn kill(&self) {
        self.cluster.borrow_mut().nodes[0].kill();
    }
    async fn start(&self) {
        self.cluster.borrow_mut().nodes[0].restart();
        testkit::eventually("the consumer to be there", || async { read_soon(self).await.ok() })
            .await;
    }
}

/// The server of a consumer without copies is away, and the connection of its clients is to another server.
async fn a_server_that_is_one_of_several<W: Single>(world: &W) {
    for number in 0..2 {
        world.publish(vec![number]).await;
    }
    let found = take(world, 2).await;
    say(world, &found[0], AckKind::Ack).await.unwrap();
    let before = read(world).await;
    assert_eq!((before.leader_shows, before.replicas), (false, 1));
    let (mut waiting, mut late) = (open(world).await, open(world).await);
    waiting.pull(PullRequest { expires: 3 * BOUND, ..pull(1, 1) }).await.unwrap();
    read(world).await;
    // The server writes its disk at most every 100 ms.
    tokio::time::sleep(millis(500)).await;
    world.kill().await;
    let soon = || clock::now() + millis(500);
    let said = say_until(world, &found[1], AckKind::Progress, soon()).await;
    assert!(matches!(said, Err(BrokerError::Leaderless(_) | BrokerError::Unconfirmed)), "{said:?}");
    let info = read_soon(world).await;
    assert!(matches!(info, Err(InfoError::Unavailable(_))), "{info:?}");
    late.pull(pull(1, 1)).await.unwrap();
    assert_eq!(end(&mut late).await, PullEnd::ConsumerGone);
    world.start().await;
    assert_eq!(read(world).await, ConsumerInfo { ack_pending: 1, ..before }, "nothing shows");
    let silence = tokio::time::timeout(millis(300), waiting.next(&mut Vec::new())).await;
    assert!(silence.is_err(), "its pulls are gone with it: {silence:?}");
    say(world, &found[1], AckKind::Ack).await.unwrap();
    assert_eq!(unsettled(world).await, 0);
}

#[tokio::test(start_paused = true)]
async fn leaders_keep_their_promises_on_the_model() {
    let world = || modelled_as(replicated(millis(ACK_WAIT)));
    a_leader_that_leaves(&world().await).await;
    a_leader_without_a_majority(&world().await).await;
    let single = Config { clustered: true, ..Config::new(millis(ACK_WAIT)) };
    a_server_that_is_one_of_several(&modelled_as(single).await).await;
    a_leader_that_crashes(&world().await).await;
}

#[tokio::test]
async fn leaders_keep_their_promises_on_three_real_servers() {
    let cluster = Rc::new(Cluster::start().await);
    // All at the beginning, because servers that come and go make it slow.
    let mut fixtures = Vec::new();
    for _ in 0..3 {
        fixtures.push(cluster.fixture(ack_wait(ACK_WAIT)).await);
    }
    let single = cluster.fixture_on(0, ack_wait(ACK_WAIT)).await;
    let mut next = || fixtures.pop().expect("a consumer for each");
    let all = |cluster: &Cluster, _: usize| cluster.url();
    a_leader_that_leaves(&ThreeServers::new(&cluster, next(), all).await).await;
    let leader = |cluster: &Cluster, leader: usize| cluster.nodes[leader].url();
    a_leader_without_a_majority(&ThreeServers::new(&cluster, next(), leader).await).await;
    let cluster = Rc::into_inner(cluster).expect("no world is left");
    let single = OneOfThree::new(cluster, single).await;
    a_server_that_is_one_of_several(&single).await;
    let cluster = Rc::new(single.cluster.into_inner());
    let other = |cluster: &Cluster, leader: usize| cluster.nodes[(leader + 1) % 3].url();
    a_leader_that_crashes(&ThreeServers::new(&cluster, next(), other).await).await;
}
