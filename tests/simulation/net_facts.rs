//! Facts about the network of the simulation: what its accidents do, and what they leave alone.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use fetch_proxy::{
    broker::{
        AckKind, AckPublish, Arrival, Broker, BrokerError, Confirmation, ConnectionKind,
        ConsumerName, Delivery, Denial, Inbox, InboxEvent, InfoError, Leader, Link, PullRequest,
    },
    bus::{Bus as _, RequestError},
    clock,
};
use tokio::time::sleep;

use super::{
    history::History,
    jetstream::{Applied, Config, DeliveryId, Sent, Time},
    net::{Lanes, Net, Node, Right, SimBroker, Stop, Watcher, Way, Weather},
};

const ACK_WAIT: Duration = Duration::from_secs(30);

fn millis(length: u64) -> Duration {
    Duration::from_millis(length)
}

/// Keeps which acks had an effect, and how they came.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<Way>>>);

impl Watcher for Log {
    fn sent(&mut self, _: Time, _: usize, _: &Sent) {}
    fn learned(&mut self, _: Time, _: usize) {}
    fn arrived(&mut self, _: Time, _: DeliveryId) {}
    fn applied(&mut self, _: Time, _: usize, _: &Applied, way: Way) {
        self.0.lock().unwrap().push(way);
    }
}

struct World {
    net: Net,
    brokers: Vec<SimBroker>,
    log: Log,
}

impl World {
    /// A consumer with some messages, and replicas that are connected.
    async fn new(seed: u64, servers: usize, replicas: usize) -> Self {
        let net = Net::new(seed, History::new(false), servers);
        let log = Log::default();
        net.accident(|network| network.set_weather(Weather { delay: 1..4, reconnect: 50..100 }));
        net.with(|state, now| {
            state.watcher = Some(Box::new(log.clone()));
            state.model.add_stream("S");
            let copies = if servers > 1 { 3 } else { 1 };
            let config = Config { replicas: copies, ..Config::new(ACK_WAIT) };
            state.model.add_consumer(&Self::name(), config);
            for _ in 0..100 {
                state.model.publish("S", "x".into(), false, now);
            }
        });
        let driven = net.clone();
        tokio::spawn(async move { driven.drive().await });
        let brokers: Vec<_> = (0..replicas).map(|_| SimBroker::join(&net)).collect();
        for broker in &brokers {
            connected(broker).await;
        }
        Self { net, brokers, log }
    }

    fn name() -> ConsumerName {
        ConsumerName { stream: "S".into(), consumer: "worker".into() }
    }

    /// The acks that had an effect so far, and how many of them came late.
    fn applied(&self) -> (usize, usize) {
        let all = self.log.0.lock().unwrap();
        (all.len(), all.iter().filter(|way| way.late).count())
    }

    async fn take(&self, replica: usize, count: u32) -> Vec<Delivery> {
        let kind = ConnectionKind::Shared;
        let mut inbox = self.brokers[replica].open(&Self::name(), kind).await.unwrap();
        let mut arrived = Vec::new();
        inbox.pull(pull(count)).await.unwrap();
        while arrived.len() < count as usize {
            assert_eq!(inbox.next(&mut arrived).await, InboxEvent::Arrived);
        }
        let delivery = |arrival| match arrival {
            Arrival::Message(delivery) => Some(*delivery),
            Arrival::End { .. } => None,
        };
        arrived.into_iter().filter_map(delivery).collect()
    }

    async fn leader(&self, replica: usize, wait: Duration) -> Result<Leader, InfoError> {
        let until = clock::now() + wait;
        Ok(self.brokers[replica].info(&Self::name(), until).await?.leader)
    }
}

async fn connected(broker: &SimBroker) {
    let mut link = broker.link();
    while !matches!(link, Link::Up(_)) {
        link = broker.link_change(&link).await;
    }
}

fn pull(batch: u32) -> PullRequest {
    PullRequest { no: 1, batch, expires: millis(5_000), no_wait: true, max_bytes: None }
}

/// Acks in one call, which must arrive within `by`.
async fn ack(
    broker: &SimBroker,
    deliveries: &[Delivery],
    by: Duration,
) -> Vec<Result<(), BrokerError>> {
    let by = Some(clock::now() + by);
    let publish = |one: &Delivery| AckPublish {
        ack: one.ack.clone(),
        kind: AckKind::Ack,
        confirm_group: None,
        by,
    };
    let publishes = deliveries.iter().map(publish).collect();
    broker.settle(publishes, Confirmation::Confirmed, clock::now() + millis(5_000)).await
}

/// The server that the deliveries of a replica come from.
fn server(broker: &SimBroker) -> Option<String> {
    let link = broker.link();
    link.server().map(|server| server.id.split(' ').next().unwrap().to_owned())
}

#[tokio::test(start_paused = true)]
async fn a_stopped_process_writes_its_last_settlements_late_and_confirms_none() {
    let mut late = 0;
    for seed in 0..20 {
        let world = World::new(seed, 1, 1).await;
        let delivery = world.take(0, 1).await;
        let broker = world.brokers[0].clone();
        let settled = tokio::spawn(async move { ack(&broker, &delivery, millis(300)).await });
        tokio::task::yield_now().await;
        world.net.accident(|network| network.stop_process(0));
        sleep(millis(2_000)).await;
        assert_eq!(world.applied().1, 0, "seed {seed}: a stopped process writes nothing");
        world.net.accident(|network| network.resume_process(0));
        let result = settled.await.unwrap().remove(0);
        sleep(millis(2_000)).await;
        let (applied, came_late) = world.applied();
        late += came_late;
        assert!(applied <= 1);
        let confirmed = !matches!(result, Err(BrokerError::Late | BrokerError::Unconfirmed));
        assert!(!confirmed, "seed {seed}: {result:?}");
    }
    assert!((3..18).contains(&late), "{late} of 20 came late");
}

#[tokio::test(start_paused = true)]
async fn a_restart_of_one_server_cuts_its_wires_alone() {
    for seed in 0..10 {
        let world = World::new(seed, 3, 6).await;
        let before: Vec<_> = world.brokers.iter().map(|one| (one.link(), server(one))).collect();
        let victim = server(&world.brokers[0]).unwrap();
        let place = victim[1..].parse::<usize>().unwrap() - 1;
        world.net.accident(|network| network.stop_server(place, Stop::Killed));
        sleep(millis(5)).await;
        let mut kept = 0;
        for (broker, (link, server)) in world.brokers.iter().zip(&before) {
            if server.as_ref() == Some(&victim) {
                assert!(matches!(broker.link(), Link::Down(_)), "seed {seed}");
            } else {
                kept += usize::from(broker.link() == *link);
            }
        }
        let elsewhere = before.iter().filter(|(_, server)| server.as_ref() != Some(&victim));
        // A settling wire may have been at that server.
        assert!(kept > 0 || elsewhere.count() < 3, "seed {seed}: {kept} kept");
        sleep(millis(3_000)).await;
        for broker in &world.brokers {
            assert_ne!(server(broker).expect("it has found another server"), victim);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_leader_that_is_cut_off_answers_until_it_steps_down() {
    let mut seen_old = 0;
    for seed in 0..10 {
        let world = World::new(seed, 3, 6).await;
        let first = world.leader(0, millis(1_000)).await.unwrap();
        // Each server alone: nobody has a majority, and a replica hears of its own server at most.
        let until = world.net.now() + millis(30_000);
        for (one, other) in [(0, 1), (0, 2)] {
            world.net.accident(|network| {
                network.part(Node::Server(one), Node::Server(other), until);
            });
        }
        sleep(millis(9_500)).await;
        let mut leaders = Vec::new();
        for replica in 0..6 {
            leaders.extend(world.leader(replica, millis(400)).await);
        }
        leaders.sort_by_key(|leader| leader.0);
        leaders.dedup();
        assert!(leaders.len() <= 2, "seed {seed}: {leaders:?}");
        if leaders.len() == 2 {
            assert!(leaders.contains(&first), "seed {seed}");
            seen_old += 1;
        }
        sleep(millis(30_000)).await;
        let mut after = Vec::new();
        for replica in 0..6 {
            after.push(world.leader(replica, millis(1_000)).await.unwrap());
        }
        assert!(after.iter().all(|one| *one == after[0]), "seed {seed}: {after:?}");
    }
    assert!(seen_old > 0, "an old leader was never heard");
}

#[tokio::test(start_paused = true)]
async fn a_short_partition_delays_what_needs_a_majority_and_changes_no_leader() {
    for seed in 0..10 {
        let world = World::new(seed, 3, 3).await;
        let first = world.leader(0, millis(1_000)).await.unwrap();
        let deliveries = world.take(0, 1).await;
        let until = world.net.now() + millis(3_000);
        for (one, other) in [(0, 1), (0, 2), (1, 2)] {
            world.net.accident(|network| {
                network.part(Node::Server(one), Node::Server(other), until);
            });
        }
        let results = ack(&world.brokers[0], &deliveries, ACK_WAIT).await;
        assert_eq!(results, [Ok(())]);
        assert!(world.net.now() >= until, "seed {seed}: confirmed without a majority");
        assert_eq!(world.leader(0, millis(1_000)).await, Ok(first));
    }
}

#[tokio::test(start_paused = true)]
async fn a_stall_past_the_deadline_ends_the_settling_wire() {
    let (mut late, mut never) = (0, 0);
    for seed in 0..30 {
        let world = World::new(seed, 1, 1).await;
        let deliveries = world.take(0, 1).await;
        let until = world.net.now() + millis(5_000);
        let up = Lanes { up: true, down: false };
        world.net.accident(|network| network.stall(0, up, until));
        let results = ack(&world.brokers[0], &deliveries, millis(1_000)).await;
        assert_eq!(results, [Err(BrokerError::Unconfirmed)]);
        assert!(matches!(world.brokers[0].link(), Link::Down(_)), "seed {seed}");
        sleep(millis(6_000)).await;
        match world.applied() {
            (1, 1) => late += 1,
            (0, 0) => never += 1,
            other => panic!("seed {seed}: {other:?}"),
        }
    }
    // The kernel has it, or the library has it.
    assert!(late > 3 && never > 3, "{late} late, {never} never");
}

#[tokio::test(start_paused = true)]
async fn the_library_takes_a_bounded_number_of_settlements_while_its_wire_is_stalled() {
    let mut bounded = 0;
    for seed in 0..20 {
        let world = World::new(seed, 1, 1).await;
        let deliveries = world.take(0, 100).await;
        let until = world.net.now() + millis(20_000);
        world.net.accident(|network| network.stall(0, Lanes { up: true, down: false }, until));
        let results = ack(&world.brokers[0], &deliveries, millis(2_000)).await;
        let left = results.iter().filter(|one| **one == Err(BrokerError::Unconfirmed)).count();
        let unsent = results.iter().filter(|one| matches!(one, Err(BrokerError::Unsent(_))));
        assert_eq!(left + unsent.count(), 100, "seed {seed}: {results:?}");
        // The kernel takes none, 2, 16 or all of them. The probe has a place, too.
        assert!(left == 100 || left <= 16 + 32, "seed {seed}: {left}");
        bounded += usize::from(left < 100);
    }
    assert!(bounded > 5, "{bounded}");
}

#[tokio::test(start_paused = true)]
async fn a_refused_ack_is_denied_until_the_right_is_granted() {
    let world = World::new(1, 1, 1).await;
    let deliveries = world.take(0, 1).await;
    world.net.accident(|network| network.refuse(Right::Ack));
    let denied = ack(&world.brokers[0], &deliveries, ACK_WAIT).await.remove(0);
    assert!(matches!(denied, Err(BrokerError::Denied(Denial::Permission(_)))), "{denied:?}");
    assert!(world.leader(0, millis(1_000)).await.is_ok(), "only acks are refused");
    world.net.accident(|network| network.grant(Right::Ack));
    assert_eq!(ack(&world.brokers[0], &deliveries, ACK_WAIT).await, [Ok(())]);
    assert_eq!(world.applied(), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_broken_route_hides_replicas_from_each_other_until_it_is_made_again() {
    let mut apart = 0;
    for seed in 0..10 {
        let world = World::new(seed, 3, 2).await;
        world.brokers[1].subscribe(vec!["here".to_owned()]);
        sleep(millis(100)).await;
        let until = world.net.now() + millis(2_000);
        for (one, other) in [(0, 1), (0, 2), (1, 2)] {
            world.net.accident(|network| network.cut_route(one, other, until));
        }
        let asked =
            |subject, wait| world.brokers[0].request(subject, "?".into(), clock::now() + wait);
        // The server on the other side hears of this when the route is made again.
        world.brokers[1].subscribe(vec!["here".to_owned(), "there".to_owned()]);
        match asked("here", millis(500)).await {
            Err(RequestError::Nobody) => apart += 1,
            Err(RequestError::Silent) => {}
            other => panic!("seed {seed}: {other:?}"),
        }
        sleep(millis(2_000)).await;
        // Nobody answers here, but somebody listens.
        for subject in ["here", "there"] {
            let answer = asked(subject, millis(500)).await;
            assert_eq!(answer, Err(RequestError::Silent), "seed {seed}: {subject}");
        }
    }
    assert!((1..10).contains(&apart), "{apart} of 10 were at two servers");
}

#[tokio::test(start_paused = true)]
async fn a_route_that_is_stalled_one_way_delays_what_takes_it() {
    let mut delayed = 0;
    for seed in 0..10 {
        let world = World::new(seed, 3, 1).await;
        assert!(world.leader(0, millis(1_000)).await.is_ok());
        let (began, until) = (world.net.now(), world.net.now() + millis(1_500));
        for (from, to) in [(0, 1), (1, 2), (2, 0)] {
            world.net.accident(|network| network.stall_route(from, to, until));
        }
        assert!(world.leader(0, millis(3_000)).await.is_ok(), "seed {seed}");
        delayed += usize::from(world.net.now() - began > millis(1_000));
    }
    assert!((1..10).contains(&delayed), "{delayed} of 10");
}
