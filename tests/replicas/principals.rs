//! A token belongs to its principal at every replica: at another one, after a hand-over, and if its owner
//! is dead.

use std::{collections::BTreeSet, fs};

use fetch_proxy::{
    access::NewApiKey,
    pb::{
        FetchResponse, Outcome,
        peer::v1::{Beat, BeatBody},
    },
    token::{KeyRing, Sealer},
};
use futures_util::StreamExt as _;
use prost::Message as _;
use tempfile::TempDir;
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, extend, fetch, nak, reason, with_key},
};

use super::pair::new_key;

/// Two replicas with one policy: two identities of the principal `orders`, one of `other`, and one that
/// may settle all.
struct Guarded {
    folder: TempDir,
    owner: Proxy,
    _other: Proxy,
    at_owner: Client,
    at_other: Client,
    fetcher: String,
    same: String,
    foreign: String,
    dispatcher: String,
}

impl Guarded {
    async fn start(cluster: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str| folder.path().join(name);
        let names = ["orders-1", "orders-2", "other", "dispatcher"];
        let keys = names.map(|name| NewApiKey::random(name).unwrap().unwrap());
        let lines: Vec<_> = keys.iter().map(|key| key.line.clone()).collect();
        fs::write(file("api-keys"), lines.join("\n")).unwrap();
        fs::write(file("token-keys"), new_key()).unwrap();
        fs::write(
            file("policy.yaml"),
            "version: 1\n\
             authenticate: {api_keys: {file: api-keys}}\n\
             principals:\n\
             - {name: orders, match: ['key:orders-*'], limits: {max_leases: 4}}\n\
             - {name: other, match: ['key:other']}\n\
             - {name: dispatcher, match: ['key:dispatcher']}\n\
             rules:\n\
             - {principals: [orders, other], streams: ['*'], consumers: ['*'], verbs: [work]}\n\
             - {principals: [dispatcher], streams: ['*'], consumers: ['*'], verbs: [settle-any]}\n",
        )
        .unwrap();
        let (policy, token_keys) = (file("policy.yaml"), file("token-keys"));
        let flags = [
            "--policy-file",
            policy.to_str().unwrap(),
            "--token-key-file",
            token_keys.to_str().unwrap(),
            "--cluster",
            cluster,
        ];
        let [owner, other] = [(); 2].map(|()| Proxy::start(NatsServer::shared(), &flags));
        for proxy in [&owner, &other] {
            proxy.ready().await;
            let met = || async { proxy.log().contains("a replica was found").then_some(()) };
            eventually("the other replica", met).await;
        }
        let (at_owner, at_other) = (owner.client().await, other.client().await);
        let [fetcher, same, foreign, dispatcher] = keys.map(|key| key.secret);
        let _other = other;
        Self { folder, owner, _other, at_owner, at_other, fetcher, same, foreign, dispatcher }
    }

    /// Tokens of the principal `orders`, from the owner.
    async fn leased(&mut self, fixture: &Fixture, count: usize) -> Vec<String> {
        fixture.publish_many(count).await;
        let mut tokens = Vec::new();
        while tokens.len() < count {
            let request = with_key(&self.fetcher, fetch(fixture, 100, 10_000));
            let FetchResponse { messages, .. } =
                self.at_owner.fetch(request).await.unwrap().into_inner();
            tokens.extend(messages.into_iter().map(|message| message.token));
        }
        tokens
    }

    /// The other replica refuses the foreign principal, and serves its own and the dispatcher.
    async fn settles_as_it_may(&mut self, tokens: &[String]) {
        let at = &mut self.at_other;
        for token in tokens {
            let refused = [
                at.ack(with_key(&self.foreign, ack(token))).await.unwrap_err(),
                at.nak(with_key(&self.foreign, nak(token, 0))).await.unwrap_err(),
                at.extend(with_key(&self.foreign, extend(token, 60_000))).await.unwrap_err(),
                at.ack(ack(token)).await.unwrap_err(),
            ];
            let reasons = refused.map(|status| reason(&status).1);
            assert_eq!(reasons, ["NOT_ALLOWED", "NOT_ALLOWED", "NOT_ALLOWED", "UNAUTHENTICATED"]);
        }
        for (key, token) in [&self.same, &self.dispatcher].into_iter().zip(tokens) {
            let acked = eventually("an answer of a replica that knows the owner", || {
                let (mut at, request) = (at.clone(), with_key(key, ack(token)));
                async move {
                    match at.ack(request).await {
                        Ok(answer) => Some(answer.into_inner().outcome()),
                        Err(status) => {
                            let reason = reason(&status).1;
                            assert_eq!(reason, "OWNER_UNREACHABLE", "{status:?}");
                            None
                        }
                    }
                }
            });
            assert_eq!(acked.await, Outcome::Confirmed);
        }
    }
}

#[tokio::test]
async fn token_of_another_replica_is_settled_by_its_principal() {
    let fixture = Fixture::new(config()).await;
    let mut guarded = Guarded::start("principals-remote").await;
    let tokens = guarded.leased(&fixture, 2).await;
    guarded.settles_as_it_may(&tokens).await;
}

#[tokio::test]
async fn token_is_settled_by_its_principal_after_a_hand_over() {
    let fixture = Fixture::new(config()).await;
    let mut guarded = Guarded::start("principals-moved").await;
    let tokens = guarded.leased(&fixture, 2).await;
    guarded.owner.signal("TERM");
    let ended = tokio::time::timeout(BOUND, guarded.owner.wait()).await.unwrap();
    assert!(ended.success(), "{}", guarded.owner.log());
    guarded.settles_as_it_may(&tokens).await;
}

#[tokio::test]
async fn token_of_a_dead_owner_is_settled_by_its_principal() {
    let fixture = Fixture::new(config()).await;
    let mut guarded = Guarded::start("principals-ownerless").await;
    let tokens = guarded.leased(&fixture, 2).await;
    guarded.owner.signal("KILL");
    let _ = guarded.owner.wait().await;
    guarded.settles_as_it_may(&tokens).await;
}

#[tokio::test]
async fn leases_count_for_their_principal_at_the_replica_that_takes_them_over() {
    let fixture = Fixture::new(config()).await;
    let mut guarded = Guarded::start("principals-limited").await;
    let tokens = guarded.leased(&fixture, 4).await;
    fixture.publish_many(1).await;
    // Each replica has limits of its own.
    let request = with_key(&guarded.same, fetch(&fixture, 1, 10_000));
    let elsewhere = guarded.at_other.fetch(request).await.unwrap().into_inner().messages.remove(0);
    guarded.at_other.ack(with_key(&guarded.same, ack(&elsewhere.token))).await.unwrap();
    guarded.owner.signal("TERM");
    let ended = tokio::time::timeout(BOUND, guarded.owner.wait()).await.unwrap();
    assert!(ended.success(), "{}", guarded.owner.log());
    fixture.publish_many(1).await;
    let request = || with_key(&guarded.same, fetch(&fixture, 10, 10_000));
    let refused = guarded.at_other.fetch(request()).await.unwrap_err();
    assert_eq!(reason(&refused).1, "LEASE_LIMIT");
    guarded.at_other.ack(with_key(&guarded.same, ack(&tokens[0]))).await.unwrap();
    let answer = guarded.at_other.fetch(request()).await.unwrap().into_inner();
    assert_eq!(answer.messages.len(), 1);
}

#[tokio::test]
async fn heartbeat_has_the_digest_of_the_policy_in_use() {
    let cluster = "policies-in-heartbeats";
    let guarded = Guarded::start(cluster).await;
    let file = |name: &str| guarded.folder.path().join(name);
    let ring = KeyRing::parse(&fs::read_to_string(file("token-keys")).unwrap()).unwrap();
    let (sealer, subject) = (Sealer::new(ring, cluster), format!("_fetchproxy.{cluster}.beat"));
    let nats = async_nats::connect(NatsServer::shared().url()).await.unwrap();
    let mut beats = nats.subscribe(subject.clone()).await.unwrap();
    let mut of_both_replicas = async |count: usize| {
        let in_use = || async {
            let log = guarded.owner.log();
            let told: Vec<_> =
                log.lines().filter(|line| line.contains("a policy is in use")).collect();
            (told.len() == count).then(|| told[count - 1].to_owned())
        };
        let line: serde_json::Value =
            serde_json::from_str(&eventually("the policy", in_use).await).unwrap();
        let expected = line["digest"].as_str().unwrap();
        let mut told = BTreeSet::new();
        while told.len() < 2 {
            let beat = Beat::decode(beats.next().await.unwrap().payload).unwrap();
            let (_, body) = sealer.open_frame(&subject, &beat.body).unwrap();
            let policy = BeatBody::decode(&*body).unwrap().policy.unwrap();
            let digest: String = policy.iter().map(|byte| format!("{byte:02x}")).collect();
            if digest == expected {
                told.insert(beat.instance);
            }
        }
        expected.to_owned()
    };
    let before = tokio::time::timeout(BOUND, of_both_replicas(1)).await.unwrap();
    let policy = fs::read_to_string(file("policy.yaml")).unwrap();
    fs::write(file("part"), policy.replace("max_leases: 4", "max_leases: 5")).unwrap();
    fs::rename(file("part"), file("policy.yaml")).unwrap();
    let after = tokio::time::timeout(BOUND, of_both_replicas(2)).await.unwrap();
    assert_ne!(before, after);
}
