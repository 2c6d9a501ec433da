//! Replicas that share no key on one NATS, and messages without a seal. A replica that serves
//! continues to serve, and a newcomer with other keys does not serve.

use std::time::Duration;

use async_nats::Client as Nats;
use fetch_proxy::{
    client::probe,
    pb::peer::v1 as wire,
    token::{KeyRing, Sealer},
};
use prost::Message as _;
use tempfile::NamedTempFile;
use testkit::{BOUND, eventually, nats_server::NatsServer, proxy::Proxy};

use super::pair::{key_file, new_key};

const BEAT: &str = "_fetchproxy.c.beat";

async fn serving(proxy: &Proxy) -> bool {
    probe(&proxy.ops, "", BOUND).await.unwrap().1
}

/// A server of its own: whoever beats there is heard by all.
fn server() -> NatsServer {
    NatsServer::start()
}

fn start(server: &NatsServer, keys: Option<&NamedTempFile>) -> Proxy {
    let cluster = ["--cluster", "c"];
    match keys.map(|file| file.path().to_str().unwrap()) {
        None => Proxy::start(server, &cluster),
        Some(file) => Proxy::start(server, &[&cluster[..], &["--token-key-file", file]].concat()),
    }
}

async fn started(server: &NatsServer, keys: Option<&NamedTempFile>) -> Proxy {
    let proxy = start(server, keys);
    eventually("readiness", || async { serving(&proxy).await.then_some(()) }).await;
    proxy
}

/// Watches for a while that all of these serve: longer than a replica is remembered.
async fn all_serve_on(proxies: &[&Proxy], meanwhile: impl AsyncFn()) {
    for _ in 0..12 {
        meanwhile().await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        for proxy in proxies {
            assert!(serving(proxy).await, "{}", proxy.log());
        }
    }
    for proxy in proxies {
        assert!(!late(proxy), "{}", proxy.log());
    }
}

/// Whether it said that it is not ready after it had been ready.
fn late(proxy: &Proxy) -> bool {
    let log = proxy.log();
    let (_, after) = log.split_once("\"message\":\"ready\"").unwrap_or_default();
    after.contains("\"message\":\"not ready\"")
}

/// A replica that is heard of, with a key that nobody shares, as one of any version says it.
fn stranger(started: u64) -> Vec<u8> {
    let key = KeyRing::parse(&new_key()).unwrap();
    let (id, sealer) = (key.ids()[0], Sealer::new(key, "c"));
    let (instance, keys) = (vec![7; 8], vec![id.to_vec().into()]);
    let body = wire::BeatBody {
        instance: instance.clone().into(),
        keys: keys.clone(),
        ..wire::BeatBody::default()
    };
    let body = sealer.seal_frame(BEAT, &body.encode_to_vec(), [1; 24]);
    let beat = wire::Beat {
        instance: instance.into(),
        keys,
        started,
        body: body.into(),
        ..wire::Beat::default()
    };
    beat.encode_to_vec()
}

/// The least that was ever taken for a replica: no key, no body.
fn unsealed() -> Vec<u8> {
    let beat =
        wire::Beat { instance: vec![9; 8].into(), started: 1_000_000, ..wire::Beat::default() };
    beat.encode_to_vec()
}

async fn say(nats: &Nats, message: &[u8]) {
    nats.publish(BEAT, message.to_vec().into()).await.unwrap();
    nats.flush().await.unwrap();
}

#[tokio::test]
async fn earlier_replica_without_a_key_file_yields_to_one_with_keys() {
    let (server, keys) = (server(), key_file(&[&new_key()]));
    let laptop = started(&server, None).await;
    let production = start(&server, Some(&keys));
    eventually("readiness", || async { serving(&production).await.then_some(()) }).await;
    let said = || async { production.log().contains("shares no token key").then_some(()) };
    eventually("the line about the other", said).await;
    all_serve_on(&[&production], async || {}).await;
    drop(laptop);
}

#[tokio::test]
async fn restarted_replica_of_a_serving_group_is_ready_despite_a_stranger() {
    let (server, keys, others) = (server(), key_file(&[&new_key()]), key_file(&[&new_key()]));
    let stray = started(&server, Some(&others)).await;
    let (one, other) = (start(&server, Some(&keys)), start(&server, Some(&keys)));
    // Two are more than one.
    for proxy in [&one, &other] {
        eventually("readiness", || async { serving(proxy).await.then_some(()) }).await;
    }
    drop(one);
    let one = started(&server, Some(&keys)).await;
    all_serve_on(&[&one, &other], async || {}).await;
    drop(stray);
}

#[tokio::test]
async fn one_of_two_simultaneous_groups_serves() {
    let (server, keys) = (server(), [key_file(&[&new_key()]), key_file(&[&new_key()])]);
    let all: Vec<_> = (0..4).map(|place| start(&server, Some(&keys[place % 2]))).collect();
    let agreed = || async {
        let mut serve = Vec::new();
        for proxy in &all {
            serve.push(serving(proxy).await);
        }
        matches!(serve[..], [one, other, one_too, other_too]
            if one != other && one == one_too && other == other_too)
        .then_some(usize::from(serve[0]))
    };
    let yields = eventually("one group to serve", agreed).await;
    for proxy in [&all[yields], &all[yields + 2]] {
        let told = || async { proxy.log().contains("--cluster of its own").then_some(()) };
        eventually("the advice", told).await;
    }
    all_serve_on(&[&all[1 - yields], &all[3 - yields]], async || {}).await;
    assert_eq!(agreed().await, Some(yields), "the decision stays");
}

#[tokio::test]
async fn wrong_key_of_a_serving_replica_stops_that_replica_alone() {
    let server = server();
    let key = new_key();
    let files = [key_file(&[&key]), key_file(&[&key]), key_file(&[&key])];
    let mut replicas = Vec::new();
    for file in &files {
        replicas.push(started(&server, Some(file)).await);
    }
    std::fs::write(files[0].path(), new_key()).unwrap();
    let stopped = || async { (!serving(&replicas[0]).await).then_some(()) };
    eventually("the replica with the wrong key to yield", stopped).await;
    all_serve_on(&[&replicas[1], &replicas[2]], async || {}).await;
    std::fs::write(files[0].path(), &key).unwrap();
    eventually("readiness", || async { serving(&replicas[0]).await.then_some(()) }).await;
}

#[tokio::test]
async fn log_names_a_replica_that_comes_leaves_or_is_lost() {
    let (server, keys) = (server(), key_file(&[&new_key()]));
    let watcher = started(&server, Some(&keys)).await;
    let named = |name: &'static str| {
        let file = keys.path().to_str().unwrap();
        let flags = ["--cluster", "c", "--replica-name", name, "--token-key-file", file];
        Proxy::start(&server, &flags)
    };
    let said = async |message: &str, name: &str| {
        let (message, name) = (format!("\"{message}\""), format!("\"name\":\"{name}\""));
        let line = || async {
            let log = watcher.log();
            log.lines().any(|line| line.contains(&message) && line.contains(&name)).then_some(())
        };
        eventually(&message, line).await;
    };
    let (mut leaves, mut dies) = (named("pod-1 on node-7"), named("pod-2 on node-8"));
    for name in ["pod-1 on node-7", "pod-2 on node-8"] {
        said("a replica was found", name).await;
    }
    leaves.signal("TERM");
    assert!(leaves.wait().await.success());
    dies.signal("KILL");
    dies.wait().await;
    said("a replica has left", "pod-1 on node-7").await;
    said("a replica is no longer heard", "pod-2 on node-8").await;
}

#[tokio::test]
async fn newcomer_with_other_keys_yields_whatever_its_clock_says() {
    let (server, keys) = (server(), key_file(&[&new_key()]));
    let mut replicas = Vec::new();
    for _ in 0..3 {
        replicas.push(started(&server, Some(&keys)).await);
    }
    let nats = async_nats::connect(server.url()).await.unwrap();
    // One that says that it started long ago.
    let beat = stranger(1);
    let all: Vec<_> = replicas.iter().collect();
    all_serve_on(&all, async || say(&nats, &beat).await).await;
    let wrong = start(&server, Some(&key_file(&[&new_key()])));
    let why = || async { wrong.log().contains("--token-key-file").then_some(()) };
    eventually("the reason", why).await;
    assert!(!serving(&wrong).await);
    all_serve_on(&all, async || assert!(!serving(&wrong).await)).await;
    assert!(!wrong.log().contains("\"message\":\"ready\""), "{}", wrong.log());
}

#[tokio::test]
async fn unsealed_messages_change_nothing() {
    let (server, keys) = (server(), key_file(&[&new_key()]));
    let nats = async_nats::connect(server.url()).await.unwrap();
    let alone = started(&server, Some(&keys)).await;
    let forged = unsealed();
    all_serve_on(&[&alone], async || say(&nats, &forged).await).await;
    drop(alone);
    // Nor does it hold up one that has just started.
    say(&nats, &forged).await;
    let alone = start(&server, Some(&keys));
    let ready = || async {
        say(&nats, &forged).await;
        serving(&alone).await.then_some(())
    };
    eventually("readiness", ready).await;
    assert!(!alone.log().contains("shares no token key"), "{}", alone.log());
}
