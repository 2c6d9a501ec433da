//! Replicas that share a key, and a client of each.

use std::sync::atomic::{AtomicU32, Ordering};

use fetch_proxy::pb;
use tempfile::NamedTempFile;
use testkit::{
    eventually,
    jetstream::Fixture,
    nats_server::NatsServer,
    proxy::{Client, Proxy, fetch, take},
};

/// A key file.
pub fn key_file(keys: &[&str]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), keys.join("\n")).unwrap();
    file
}

pub fn new_key() -> String {
    fetch_proxy::token::new_key_line().unwrap()
}

/// One of several.
pub struct Replica {
    pub proxy: Proxy,
    pub client: Client,
}

pub struct Replicas {
    pub all: Vec<Replica>,
    pub keys: NamedTempFile,
    cluster: String,
    /// Variables of each, for what has no flag.
    variables: Vec<(String, String)>,
}

impl Replicas {
    pub async fn start(count: usize) -> Self {
        let server = NatsServer::shared().url();
        Self::start_at(&vec![server.as_str(); count]).await
    }

    /// Each may reach NATS by another way. Waits until all have heard of all.
    pub async fn start_at(nats: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        Self::start_in(&format!("replicas{}", COUNT.fetch_add(1, Ordering::Relaxed)), nats).await
    }

    /// The same, of a cluster of this name.
    pub async fn start_in(cluster: &str, nats: &[&str]) -> Self {
        Self::start_all(cluster, nats, &[]).await
    }

    /// With these variables.
    pub async fn start_traced(nats: &[&str], variables: &[(&str, &str)]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let cluster = format!("traced{}", COUNT.fetch_add(1, Ordering::Relaxed));
        Self::start_all(&cluster, nats, variables).await
    }

    async fn start_all(cluster: &str, nats: &[&str], variables: &[(&str, &str)]) -> Self {
        let (keys, cluster) = (key_file(&[&new_key()]), cluster.to_owned());
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        let variables = variables.iter().map(owned).collect();
        let mut replicas = Self { all: Vec::new(), keys, cluster, variables };
        for nats in nats {
            replicas.add(nats).await;
        }
        replicas
    }

    /// One more, that knows the others when this returns, and they it.
    pub async fn add(&mut self, nats: &str) -> &Replica {
        let keys = self.keys.path().to_str().unwrap();
        let log = ["--log-level", "info,fetch_proxy=debug"];
        let flags = ["--token-key-file", keys, "--cluster", &self.cluster, log[0], log[1]];
        let variables = self.variables.iter().map(|(name, value)| (&**name, &**value));
        let proxy = Proxy::start_with(nats, &flags, &variables.collect::<Vec<_>>());
        let client = proxy.client().await;
        self.all.push(Replica { proxy, client });
        let living = || self.all.iter().filter(|replica| !replica.proxy.has_ended());
        let others = living().count() - 1;
        for replica in living() {
            eventually("replicas to hear of each other", || async {
                let heard = replica.proxy.log().matches("a replica was found").count();
                (heard >= others).then_some(())
            })
            .await;
        }
        self.all.last().unwrap()
    }

    /// Publishes and leases so many messages at one of them.
    pub async fn leased(
        &mut self,
        at: usize,
        fixture: &Fixture,
        count: usize,
    ) -> Vec<pb::Delivery> {
        fixture.publish_many(count).await;
        let n = u32::try_from(count).unwrap();
        take(&self.all[at].client, fetch(fixture, n, 10_000)).await
    }
}

pub struct Pair {
    /// Grants the leases.
    pub owner: Proxy,
    /// Is asked to settle them.
    pub other: Proxy,
    pub at_owner: Client,
    pub at_other: Client,
    pub keys: NamedTempFile,
}

impl Pair {
    pub async fn start() -> Self {
        Self::start_at(&NatsServer::shared().url(), &NatsServer::shared().url()).await
    }

    /// The two may reach NATS by different ways.
    pub async fn start_at(owner_nats: &str, other_nats: &str) -> Self {
        let Replicas { all, keys, .. } = Replicas::start_at(&[owner_nats, other_nats]).await;
        let [owner, other] = <[Replica; 2]>::try_from(all).ok().unwrap();
        Self {
            owner: owner.proxy,
            other: other.proxy,
            at_owner: owner.client,
            at_other: other.client,
            keys,
        }
    }

    /// Publishes and leases so many messages at the owner.
    pub async fn leased(&mut self, fixture: &Fixture, count: usize) -> Vec<pb::Delivery> {
        fixture.publish_many(count).await;
        let n = u32::try_from(count).unwrap();
        take(&self.at_owner, fetch(fixture, n, 10_000)).await
    }
}
