//! Consumers whose leader is a server that the proxy is not connected to. No connection is lost
//! when the leader changes, or restarts. Without copies, INFO names the same leader as before.

use std::{
    collections::VecDeque,
    fs,
    time::{Duration, Instant, SystemTime},
};

use fetch_proxy::pb::{self, FetchRequest, Outcome};
use futures_util::future::join_all;
use testkit::{
    cluster::Cluster,
    eventually,
    jetstream::{Fixture, ack_wait},
    millis,
    proxy::{Client, Proxy, ack, extend, fetch, reason, take},
};

use super::{
    restarts::{Acked, ack_all, ends, take_all},
    run::{all_settled, measured},
};

/// The server that leads the consumer. The two proxies are connected to the others.
const LEADER: usize = 2;
const COUNT: usize = 50;

struct RemoteLeader {
    cluster: Cluster,
    fixture: Fixture,
    _proxies: [Proxy; 2],
    first: Client,
    second: Client,
}

async fn stage(consumer: u64) -> RemoteLeader {
    let cluster = Cluster::start().await;
    let placed = cluster.fixture_on(LEADER, ack_wait(consumer)).await;
    let client = async_nats::connect(cluster.nodes[0].url()).await.unwrap();
    let fixture = Fixture { jetstream: async_nats::jetstream::new(client), ..placed };
    assert_eq!(cluster.leader(&fixture).await, LEADER);
    RemoteLeader::of(cluster, fixture).await
}

impl RemoteLeader {
    async fn of(cluster: Cluster, fixture: Fixture) -> Self {
        let proxies = [0, 1].map(|place| Proxy::start(&cluster.nodes[place], &[]));
        let [first, second] = [proxies[0].client().await, proxies[1].client().await];
        Self { cluster, fixture, _proxies: proxies, first, second }
    }

    /// All that is there, in the first worker's hands.
    async fn leased(&self, lease: Option<i64>) -> Vec<pb::Delivery> {
        let n = u32::try_from(COUNT).unwrap();
        let lease = lease.and_then(millis);
        take(&self.first, FetchRequest { lease, ..fetch(&self.fixture, n, 5000) }).await
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
async fn remote_leader_that_forgets_ends_its_leases() {
    for lease in [None, Some(60_000)] {
        let mut stage = stage(30_000).await;
        stage.fixture.publish_many(COUNT).await;
        let held = stage.leased(lease).await;
        stage.crash();
        stage.recover();
        let began = Instant::now();
        // A look each second, which may wait for its answer for two. The bound of this wait, 20 s, is
        // below the 27 s after which a lease is over by itself.
        join_all(held.iter().map(|message| ends(&stage.first, message))).await;
        measured("leader elsewhere without memory: until the leases were over", began.elapsed());
        let seen = take_all(stage.second.clone(), &stage.fixture, COUNT, 50, Duration::ZERO).await;
        assert!(
            ack_all(stage.first.clone(), held.into(), Duration::ZERO).await.confirmed.is_empty()
        );
        stage.rest(seen).await;
    }
}

/// The restarted leader delivers a message that is older than the ack wait at once, here to another
/// replica, while its holder acks all the time.
#[tokio::test(flavor = "multi_thread")]
async fn redelivery_by_a_returned_remote_leader_ends_the_old_lease() {
    const ACK_WAIT: u64 = 12_000;
    let mut stage = stage(ACK_WAIT).await;
    stage.fixture.publish_many(COUNT).await;
    // Age is what matters here.
    tokio::time::sleep(Duration::from_millis(ACK_WAIT)).await;
    let held = stage.leased(None).await;
    stage.crash();
    eventually("the doubt", || {
        let (mut first, request) = (stage.first.clone(), extend(&held[0].token, 60_000));
        async move {
            let told = first.extend(request).await.err()?;
            (reason(&told).1 == "NATS_UNAVAILABLE").then_some(())
        }
    })
    .await;
    stage.recover();
    let (Acked { confirmed, .. }, seen) = tokio::join!(
        ack_all(stage.first.clone(), held.into(), Duration::ZERO),
        take_all(stage.second.clone(), &stage.fixture, COUNT, 50, Duration::ZERO)
    );
    assert!(confirmed.is_empty(), "{} were still believed", confirmed.len());
    stage.rest(seen).await;
}

/// A proxy learns of the change only by its own refresh if it pulls nothing and all its settlements
/// are answered. Until then the tokens of both holders work.
#[tokio::test(flavor = "multi_thread")]
async fn stale_lease_after_a_leader_change_ends_within_one_refresh() {
    // There is a look each second. Without it there would be one after a third of the ack wait.
    const ACK_WAIT: u64 = 20_000;
    const LOOK: Duration = Duration::from_secs(5);
    let cluster = Cluster::start().await;
    let fixture = cluster.fixture(ack_wait(ACK_WAIT)).await;
    let stage = RemoteLeader::of(cluster, fixture).await;
    stage.fixture.publish_many(COUNT).await;
    tokio::time::sleep(Duration::from_millis(ACK_WAIT)).await;
    let held = stage.leased(None).await;
    let over = held.iter().map(|message| message.lease_expire_time.unwrap());
    let over = over.map(|over| SystemTime::try_from(over).unwrap()).min().unwrap();
    stage.cluster.step_down(&stage.fixture).await;
    let seen = take_all(stage.second.clone(), &stage.fixture, COUNT, 50, Duration::ZERO).await;
    let taken = Instant::now();
    // One ack after the other, until the look: all later ones are refused.
    let mut held = VecDeque::from(held);
    let (mut stolen, mut first) = (0, stage.first.clone());
    let looked = loop {
        let message = held.pop_front().expect("no refresh has come");
        match first.ack(ack(&message.token)).await {
            Ok(_) => stolen += 1,
            Err(status) => match &*reason(&status).1 {
                "LEASE_EXPIRED" => break SystemTime::now(),
                "NATS_UNAVAILABLE" | "SETTLE_UNCONFIRMED" => held.push_front(message),
                other => panic!("{other}"),
            },
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    measured("new leader: settled though another had it", stolen);
    let took = taken.elapsed();
    measured("new leader: refused, after the next worker had all", took);
    assert!(looked < over, "they are over anyway");
    assert!(took < LOOK, "{took:?}");
    let later = ack_all(first, held, Duration::ZERO).await.confirmed;
    assert!(later.is_empty(), "{} were believed after the look", later.len());
    stage.rest(seen).await;
}
