//! A server that comes back without its memory, and leaders that change. The last promises may be
//! forgotten, so a lease is only as good as the memory of JetStream.

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
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, extend, fetch, reason, take},
};
use tokio::sync::watch;

use super::run::{Run, all_settled, measured};

/// The worker that receives the leased messages after the server has forgotten their delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Another worker of the same proxy.
    Neighbour,
    /// A worker of another proxy, after the first proxy has seen what the server forgot.
    Replica,
    /// The same, maybe before, and not all at once.
    ReplicaAtOnce,
}

/// After the first proxy's news of a server it may take as long until a message that was given away
/// before has reached the second proxy.
const LATE: Duration = Duration::from_millis(500);

/// 50 messages are leased; the server crashes before it has stored that, and hands all of them to
/// the next. Returns two counts of the messages that were confirmed to the first worker though the
/// next worker had them. The second counts only those that the next worker received after the first
/// proxy knew that the server had forgotten.
async fn a_server_forgets(lease: Option<i64>, next: Next) -> (usize, usize) {
    let mut server = NatsServer::start();
    let fixture = Fixture::on(&server, ack_wait(30_000)).await;
    let (one, other) = (Proxy::start(&server, &[]), Proxy::start(&server, &[]));
    let first = one.client().await;
    let second = if next == Next::Neighbour { first.clone() } else { other.client().await };
    fixture.publish_many(50).await;
    // The server loses everything that it stores from here on, as when a machine crashes.
    let stores = server.store().join("$G/streams").join(&fixture.stream).join("obs");
    let state = stores.join(&fixture.consumer).join("o.dat");
    let stored = fs::read(&state).ok();
    let lease = lease.and_then(millis);
    let held = take(&first, FetchRequest { lease, ..fetch(&fixture, 50, 10_000) }).await;
    server.kill();
    match stored {
        Some(stored) => fs::write(&state, stored).unwrap(),
        None => drop(fs::remove_file(&state)),
    }
    server.restart();

    let what = format!("server without memory, {next:?}, lease {lease:?}");
    if next == Next::Replica {
        let began = Instant::now();
        join_all(held.iter().map(|message| ends(&first, message))).await;
        measured(&format!("{what}: until the leases were over"), began.elapsed());
    }
    let (portion, pause) = match next {
        Next::Neighbour | Next::Replica => (50, Duration::ZERO),
        Next::ReplicaAtOnce => (5, Duration::from_millis(40)),
    };
    let (Acked { confirmed, news }, seen) = tokio::join!(
        ack_all(first, held.into(), pause),
        take_all(second.clone(), &fixture, 50, portion, pause)
    );
    let had = |sequence, began| {
        let found = |(message, at): &&(pb::Delivery, Instant)| {
            message.stream_sequence == sequence && *at < began
        };
        seen.iter().find(found).map(|(message, _)| answered(message))
    };
    let stolen: Vec<SystemTime> =
        confirmed.iter().filter_map(|(sequence, began)| had(*sequence, *began)).collect();
    let before = confirmed.len() - stolen.len();
    measured(&format!("{what}: confirmed to the first before another had it"), before);
    measured(&format!("{what}: confirmed to the first though another had it"), stolen.len());
    let known = stolen.iter().filter(|at| news.is_none_or(|news| **at > news + LATE)).count();
    for (message, _) in seen {
        let answer = second.clone().ack(ack(&message.token)).await.unwrap().into_inner();
        assert_eq!(answer.outcome(), Outcome::Confirmed);
    }
    all_settled(&fixture).await;
    (stolen.len(), known)
}

/// The time at which the proxy answered with a message, by the proxy's own clock.
fn answered(message: &pb::Delivery) -> SystemTime {
    let over = SystemTime::try_from(message.lease_expire_time.unwrap()).unwrap();
    over - Duration::try_from(message.lease.unwrap()).unwrap()
}

/// Waits until the lease of this message is over.
pub(super) async fn ends(client: &Client, message: &pb::Delivery) {
    let status = eventually("the end of a lease", || {
        let (mut client, request) = (client.clone(), extend(&message.token, 60_000));
        async move {
            let refused = client.extend(request).await.err()?;
            // Until the consumer has been read again nobody knows.
            (reason(&refused).1 != "NATS_UNAVAILABLE").then_some(refused)
        }
    })
    .await;
    assert_eq!(reason(&status).1, "LEASE_EXPIRED");
}

/// The result of acking all.
#[derive(Default)]
pub(super) struct Acked {
    /// Which were confirmed, and when the call for it began.
    pub(super) confirmed: Vec<(u64, Instant)>,
    /// When it was first told anything but that NATS is away.
    news: Option<SystemTime>,
}

/// Acks one after the other, with a pause, again and again, until each is confirmed or over.
pub(super) async fn ack_all(
    mut client: Client,
    mut open: VecDeque<pb::Delivery>,
    pause: Duration,
) -> Acked {
    let mut acked = Acked::default();
    while let Some(message) = open.pop_front() {
        let began = Instant::now();
        match client.ack(ack(&message.token)).await {
            Ok(_) => acked.confirmed.push((message.stream_sequence, began)),
            Err(status) => match &*reason(&status).1 {
                "LEASE_EXPIRED" => {}
                "NATS_UNAVAILABLE" | "SETTLE_UNCONFIRMED" => {
                    open.push_back(message);
                    continue;
                }
                other => panic!("{other}"),
            },
        }
        acked.news.get_or_insert_with(SystemTime::now);
        tokio::time::sleep(pause).await;
    }
    acked
}

/// Fetches, with a pause in between, until so many have come, and tells when each did.
pub(super) async fn take_all(
    client: Client,
    fixture: &Fixture,
    count: usize,
    portion: u32,
    pause: Duration,
) -> Vec<(pb::Delivery, Instant)> {
    let mut seen = Vec::new();
    while seen.len() < count {
        let more = eventually("the forgotten messages", || {
            let (mut client, request) = (client.clone(), fetch(fixture, portion, 1000));
            async move { Some(client.fetch(request).await.ok()?.into_inner().messages) }
        })
        .await;
        seen.extend(more.into_iter().map(|message| (message, Instant::now())));
        tokio::time::sleep(pause).await;
    }
    seen
}

#[tokio::test(flavor = "multi_thread")]
async fn server_that_forgets_ends_its_leases() {
    let kinds = [Next::Neighbour, Next::Replica].into_iter();
    let kinds = kinds.flat_map(|next| [(None, next), (Some(60_000), next)]);
    let runs: Vec<_> =
        kinds.map(|(lease, next)| tokio::spawn(a_server_forgets(lease, next))).collect();
    for run in runs {
        assert_eq!(run.await.unwrap().0, 0, "a token settled another worker's delivery");
    }
}

#[tokio::test]
async fn other_replica_may_settle_before_a_lost_state_is_known() {
    // The one thing that cannot be fenced on an unreplicated stream: what another was given before
    // the first could look. A message that is delivered later is settled by no other worker.
    let (_, known) = a_server_forgets(None, Next::ReplicaAtOnce).await;
    assert_eq!(known, 0, "settled after the proxy knew that the server had forgotten them");
}

/// Fetches and acks until all is over, and repeats the calls that may be repeated.
async fn work(
    worker: usize,
    mut client: Client,
    fixture: &Fixture,
    run: &Run,
    mut over: watch::Receiver<bool>,
) {
    loop {
        let answer = tokio::select! {
            answer = client.fetch(fetch(fixture, 5, 10_000)) => answer,
            _ = over.wait_for(|over| *over) => return,
        };
        let Ok(answer) = answer else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        for message in answer.into_inner().messages {
            let holding = run.handed(worker, &message);
            // Work, so that the leader goes in the midst of it.
            tokio::time::sleep(Duration::from_millis(10)).await;
            run.ack(holding, &mut client, &message).await;
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    StepDown,
    Kill,
}

/// Four workers at two proxies go through 200 messages, while the consumer loses its leader.
async fn a_leader_goes(cluster: &mut Cluster, fault: Fault) {
    let fixture = cluster.fixture(ack_wait(3000)).await;
    fixture.publish_many(200).await;
    let proxies = [0, 1].map(|_| Proxy::start_at(&cluster.url(), &[]));
    let (run, over) = (Run::new(Duration::from_secs(1)), watch::channel(false).0);
    let clients = join_all((0..4).map(|worker| proxies[worker % 2].client())).await;
    let workers = clients.into_iter().enumerate();
    let workers =
        workers.map(|(worker, client)| work(worker, client, &fixture, &run, over.subscribe()));
    let course = async {
        eventually("some work", || async { (run.confirmed() >= 70).then_some(()) }).await;
        let lost = Instant::now();
        lose_the_leader(cluster, &fixture, fault).await;
        // As long as an election takes, beyond the bound of the rest.
        cluster.leader(&fixture).await;
        let led = lost.elapsed();
        all_settled(&fixture).await;
        over.send_replace(true);
        led
    };
    let (_, led) = tokio::join!(join_all(workers), course);
    let summary = run.close(&fixture, 200).await;
    let what = format!("leader lost by {fault:?}");
    measured(&format!("{what}: handed out again of 200"), summary.duplicates);
    measured(&format!("{what}: confirmed to two"), summary.twice.len());
    measured(&format!("{what}: longest time in which nothing was handed out"), summary.dark);
    measured(&format!("{what}: until there was another leader"), led);
    // An election takes its time; what was under way comes back after its ack wait of 3 s.
    assert!(summary.dark < led + Duration::from_secs(3 + 10), "{summary:?}, led after {led:?}");
    assert!(summary.twice.is_empty(), "{summary:?}");
}

async fn lose_the_leader(cluster: &mut Cluster, fixture: &Fixture, fault: Fault) {
    match fault {
        Fault::StepDown => cluster.step_down(fixture).await,
        Fault::Kill => {
            let leader = cluster.leader(fixture).await;
            cluster.nodes[leader].kill();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_with_a_leader() {
    let mut cluster = Cluster::start().await;
    for fault in [Fault::StepDown, Fault::Kill] {
        a_leader_goes(&mut cluster, fault).await;
    }
}
