//! Three replicas in front of three NATS servers with three copies of everything, and clients that
//! choose a replica at random for every call. Run by `make test-cluster`; the table is the result.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

mod fleet;
mod verdict;
mod workers;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use async_nats::jetstream::{consumer::pull, stream};
use bytes::Bytes;
use futures_util::future::join_all;
use testkit::{
    cluster::Cluster,
    dice::Dice,
    eventually,
    jetstream::{Fixture, config},
};
use tokio::sync::watch;

use self::{
    fleet::{Fleet, Replica},
    verdict::{Verdict, disputes},
    workers::{BATCH, Log, Worker},
};

const WORKERS: u64 = 24;
const SEED: u64 = 4;
/// Troubles, of three kinds.
const ROUNDS: usize = 15;
/// Nothing is worked on for longer than this after the last was published.
const LONGEST: Duration = Duration::from_secs(300);
/// Between one trouble and the next.
const CALM: Duration = Duration::from_millis(700);

#[tokio::test]
async fn fifty_thousand_messages_through_kills_drains_and_restarts() {
    let messages = 50_000;
    let mut run = Run::start(messages, Duration::from_secs(8), 9000..11_000).await;
    let (rounds, verdict) = run.played(async |trouble, round| trouble.round(round).await).await;
    println!("{rounds} troubles: kills, drains and NATS restarts in turn\n{verdict}");
    print!("{}", disputes(&run.log.deliveries.read()));
    assert!(rounds >= 6, "the run ended before enough troubles");
    assert_eq!(verdict.lost, 0);
    assert_eq!(verdict.accepted_late, 0);
    // The window that is admitted: a settlement that was begun while the lease was alive, and did
    // not arrive before its server went.
    assert!(verdict.accepted_in_flight <= 100, "one in 500 is more than an exception");
    assert!(verdict.settled_twice <= verdict.accepted_in_flight);
}

#[tokio::test]
async fn drains_alone_cost_no_redelivery() {
    let messages = 30_000;
    // Some work lasts longer than an ack wait: long after what a token alone could vouch for.
    let mut run = Run::start(messages, Duration::from_secs(5), 6000..9000).await;
    let (rounds, verdict) = run.played(async |trouble, round| trouble.drain(round).await).await;
    println!("{rounds} drains, NATS steady\n{verdict}");
    assert!(rounds >= 3, "the run ended before enough drains");
    assert_eq!((verdict.lost, verdict.refused), (0, 0));
    // A machine that is too slow for a call loses its answer, and the messages in it come back.
    let unanswered = verdict.retried.get("Cancelled").copied().unwrap_or_default();
    assert!(verdict.redelivered <= unanswered * BATCH as usize, "{unanswered} without an answer");
    assert_eq!((verdict.accepted_late, verdict.settled_twice, verdict.unknown), (0, 0, 0));
    assert!(!verdict.retried.contains_key("CALL_LIMIT"), "it is leaving, not full");
}

/// All that runs, and who makes trouble.
struct Run {
    log: Arc<Log>,
    messages: usize,
    playing: tokio::task::JoinSet<()>,
    trouble: Trouble,
}

struct Trouble {
    cluster: Cluster,
    fleet: Arc<Fleet>,
    replicas: Vec<Replica>,
    stream: String,
}

impl Run {
    async fn start(messages: usize, ack_wait: Duration, long: std::ops::Range<u64>) -> Self {
        let cluster = Cluster::start().await;
        let consumer = pull::Config { ack_wait, max_ack_pending: 5000, ..config() };
        let fixture = Arc::new(cluster.fixture(consumer).await);
        let fleet = Arc::new(Fleet::new(cluster.url()));
        let mut replicas = Vec::new();
        for _ in 0..3 {
            replicas.push(fleet.start().await);
        }
        let log = Arc::new(Log::default());
        let mut playing = tokio::task::JoinSet::new();
        let (over, watched) = watch::channel(false);
        playing.spawn(publish(fixture.clone(), messages, over));
        for player in 0..WORKERS {
            let worker = Worker {
                fleet: fleet.clone(),
                log: log.clone(),
                fixture: fixture.clone(),
                dice: Dice::new(SEED, player),
                over: watched.clone(),
                ack_wait,
                long: long.clone(),
            };
            playing.spawn(worker.work());
        }
        let stream = fixture.stream.clone();
        Self { log, messages, playing, trouble: Trouble { cluster, fleet, replicas, stream } }
    }

    /// Makes trouble until every message is done and every worker has come home.
    async fn played(&mut self, make: impl AsyncFn(&mut Trouble, usize)) -> (usize, Verdict) {
        let Self { log, messages, playing, trouble } = self;
        let mut rounds = 0;
        let mut end = std::pin::pin!(async {
            while let Some(ended) = playing.join_next().await {
                ended.unwrap();
            }
        });
        loop {
            tokio::select! {
                () = &mut end => return (rounds, log.verdict(*messages)),
                () = make(trouble, rounds) => rounds += 1,
            }
        }
    }
}

/// Publishes all, each until it is stored, and waits until all are done by JetStream's account. A
/// message's number is its sequence, so none may be stored twice.
async fn publish(fixture: Arc<Fixture>, messages: usize, over: watch::Sender<bool>) {
    let numbers: Vec<usize> = (0..messages).collect();
    for some in numbers.chunks(200) {
        join_all(some.iter().map(|number| stored(&fixture, *number))).await;
    }
    // Twice, for a leader may be new to it.
    let (count, began) = (messages as u64, Instant::now());
    while !(done(&fixture, count).await && done(&fixture, count).await) {
        assert!(began.elapsed() < LONGEST, "not done: {:?}", fixture.try_info().await);
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    over.send_replace(true);
}

async fn done(fixture: &Fixture, messages: u64) -> bool {
    let info = fixture.try_info().await;
    info.is_some_and(|info| {
        let left = (info.num_pending, info.num_ack_pending);
        left == (0, 0) && info.ack_floor.stream_sequence == messages
    })
}

async fn stored(fixture: &Fixture, number: usize) {
    loop {
        let mut headers = async_nats::HeaderMap::new();
        headers.insert("Nats-Msg-Id", number.to_string());
        let (subject, payload) = (format!("{}.n", fixture.stream), Bytes::from_static(b"work"));
        let sent = fixture.jetstream.publish_with_headers(subject, headers, payload).await;
        if let Ok(sent) = sent
            && sent.await.is_ok()
        {
            return;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

impl Trouble {
    /// One of each kind in turn; then no more, or what NATS does after each would never end.
    async fn round(&mut self, round: usize) {
        if round == ROUNDS {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(CALM).await;
        match round % 3 {
            0 => self.replace(round, "KILL").await,
            1 => self.replace(round, "TERM").await,
            _ => self.restart_nats(round / 3).await,
        }
    }

    async fn drain(&mut self, round: usize) {
        tokio::time::sleep(CALM).await;
        self.replace(round, "TERM").await;
    }

    /// As a rolling update does: the new one first.
    async fn replace(&mut self, round: usize, signal: &str) {
        let new = self.fleet.start().await;
        let place = round % self.replicas.len();
        let old = std::mem::replace(&mut self.replicas[place], new);
        tokio::time::sleep(CALM).await;
        let log = self.fleet.end(old, signal).await;
        if signal == "TERM" {
            assert!(log.contains("leases handed over"), "{log}");
        }
    }

    /// One server at a time, and the next only when all copies are whole again.
    async fn restart_nats(&mut self, turn: usize) {
        let node = &mut self.cluster.nodes[turn % 3];
        node.kill();
        tokio::time::sleep(Duration::from_secs(1)).await;
        node.restart();
        let servers: Vec<String> = self.cluster.nodes.iter().map(|node| node.url()).collect();
        eventually("all copies to be whole", || whole(&servers, &self.stream)).await;
    }
}

async fn whole(servers: &[String], stream: &str) -> Option<()> {
    let client = async_nats::connect(servers).await.ok()?;
    let jetstream = async_nats::jetstream::new(client);
    let mut stream = jetstream.get_stream(stream).await.ok()?;
    let info: &stream::Info = stream.info().await.ok()?;
    let copies = &info.cluster.as_ref()?.replicas;
    (copies.len() == 2 && copies.iter().all(|copy| copy.current && !copy.offline)).then_some(())
}
