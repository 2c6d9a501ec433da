//! Consumers that are led by a server of a cluster that the proxy is not connected to: when there is
//! another leader, or the same one starts anew, no connection is lost. Where there are no copies, INFO
//! names the same leader as before.

use std::{
    fs,
    time::{Duration, Instant},
};

use fetch_proxy::pb::{self, FetchRequest, Outcome};
use futures_util::future::join_all;

use super::{
    books::{all_settled, measured},
    restarts::{Acked, ack_all, ends, take_all},
};
use crate::support::{
    cluster::Cluster,
    eventually,
    jetstream::{Fixture, ack_wait},
    millis,
    proxy::{Client, Proxy, ack, extend, fetch, reason},
};

/// Where the consumer is led, and where the two proxies are connected.
const LEADER: usize = 2;
const COUNT: usize = 50;

struct Scene {
    cluster: Cluster,
    fixture: Fixture,
    _proxies: [Proxy; 2],
    first: Client,
    second: Client,
}

async fn scene(consumer: u64) -> Scene {
    let cluster = Cluster::start().await;
    let placed = cluster.fixture_on(LEADER, ack_wait(consumer)).await;
    let client = async_nats::connect(cluster.nodes[0].url()).await.unwrap();
    let fixture = Fixture { jetstream: async_nats::jetstream::new(client), ..placed };
    assert_eq!(cluster.leader(&fixture).await, LEADER);
    Scene::of(cluster, fixture).await
}

impl Scene {
    async fn of(cluster: Cluster, fixture: Fixture) -> Self {
        let proxies = [0, 1].map(|place| Proxy::start(&cluster.nodes[place], &[]));
        let [first, second] = [proxies[0].client().await, proxies[1].client().await];
        Self { cluster, fixture, _proxies: proxies, first, second }
    }

    /// All that is there, in the first worker's hands.
    async fn leased(&mut self, lease: Option<i64>) -> Vec<pb::Delivery> {
        let n = u32::try_from(COUNT).unwrap();
        let request =
            FetchRequest { lease: lease.and_then(millis), ..fetch(&self.fixture, n, 5000) };
        let held = self.first.fetch(request).await.unwrap().into_inner().messages;
        assert_eq!(held.len(), COUNT);
        held
    }

    /// The leader crashes, and forgets all deliveries.
    fn crash(&mut self) {
        let leader = &mut self.cluster.nodes[LEADER];
        let stores = leader.store().join("$G/streams").join(&self.fixture.stream).join("obs");
        leader.kill();
        fs::remove_file(stores.join(&self.fixture.consumer).join("o.dat")).unwrap();
    }

    fn recover(&mut self) {
        self.cluster.nodes[LEADER].restart();
    }

    /// The second worker takes and acks all.
    async fn rest(mut self, seen: Vec<(pb::Delivery, Instant)>) {
        for (message, _) in seen {
            let answer = self.second.ack(ack(&message.token)).await.unwrap().into_inner();
            assert_eq!(answer.outcome(), Outcome::Confirmed);
        }
        all_settled(&self.fixture).await;
    }
}

/// It is back so soon that nobody has met it away.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_elsewhere_that_forgets_takes_its_leases_along() {
    for lease in [None, Some(60_000)] {
        let mut scene = scene(30_000).await;
        scene.fixture.publish_many(COUNT).await;
        let held = scene.leased(lease).await;
        scene.crash();
        scene.recover();
        let began = Instant::now();
        join_all(held.iter().map(|message| ends(&scene.first, message))).await;
        let took = began.elapsed();
        measured("leader elsewhere without memory: until the leases were over", took);
        // A look each second, which may wait for its answer for two.
        assert!(took < Duration::from_secs(8), "{took:?}");
        let seen = take_all(scene.second.clone(), &scene.fixture, COUNT, 50, Duration::ZERO).await;
        assert!(
            ack_all(scene.first.clone(), held.into(), Duration::ZERO).await.confirmed.is_empty()
        );
        scene.rest(seen).await;
    }
}

/// What is older than the ack wait, the leader hands out the moment it is back, here to another
/// replica, while its holder acks all the time.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_leader_elsewhere_gives_away_when_it_is_back_is_not_its_holder_s_any_more() {
    const ACK_WAIT: u64 = 12_000;
    let mut scene = scene(ACK_WAIT).await;
    scene.fixture.publish_many(COUNT).await;
    // Age is what matters here.
    tokio::time::sleep(Duration::from_millis(ACK_WAIT)).await;
    let held = scene.leased(None).await;
    scene.crash();
    eventually("the doubt", || {
        let (mut first, request) = (scene.first.clone(), extend(&held[0].token, 60_000));
        async move {
            let told = first.extend(request).await.err()?;
            (reason(&told).1 == "NATS_UNAVAILABLE").then_some(())
        }
    })
    .await;
    scene.recover();
    let (Acked { confirmed, .. }, seen) = tokio::join!(
        ack_all(scene.first.clone(), held.into(), Duration::ZERO),
        take_all(scene.second.clone(), &scene.fixture, COUNT, 50, Duration::ZERO)
    );
    assert!(confirmed.is_empty(), "{} were still believed", confirmed.len());
    scene.rest(seen).await;
}

/// Nobody tells a proxy that pulls nothing, and whose settlements are all answered, so it has to
/// look: until then both holders are believed.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_new_leader_gives_away_is_its_holder_s_until_the_next_look_and_no_longer() {
    const ACK_WAIT: u64 = 12_000;
    const LOOK: Duration = Duration::from_secs(1);
    let cluster = Cluster::start().await;
    let fixture = cluster.fixture(ack_wait(ACK_WAIT)).await;
    let mut scene = Scene::of(cluster, fixture).await;
    scene.fixture.publish_many(COUNT).await;
    tokio::time::sleep(Duration::from_millis(ACK_WAIT)).await;
    let (held, leased) = (scene.leased(None).await, Instant::now());
    scene.cluster.step_down(&scene.fixture).await;
    let changed = Instant::now();
    let seen = take_all(scene.second.clone(), &scene.fixture, COUNT, 50, Duration::ZERO).await;
    let pause = Duration::from_millis(150);
    let stolen = ack_all(scene.first.clone(), held.into(), pause).await.confirmed;
    let until = stolen.last().map(|(_, began)| *began - changed);
    measured("new leader: settled though another had it", stolen.len());
    measured("new leader: the last of them, after the change", until);
    assert!(leased.elapsed() < Duration::from_millis(ACK_WAIT * 9 / 10), "they are over anyway");
    assert!(until.is_none_or(|until| until < LOOK + Duration::from_secs(1)), "{until:?}");
    scene.rest(seen).await;
}
