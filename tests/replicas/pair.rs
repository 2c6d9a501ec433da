//! Two replicas that share a key, and a client of each.

use std::sync::atomic::{AtomicU32, Ordering};

use fetch_proxy::pb;
use tempfile::NamedTempFile;

use crate::support::{
    jetstream::Fixture,
    nats_server::NatsServer,
    proxy::{Client, Proxy, fetch},
};

pub struct Pair {
    /// Grants the leases.
    pub owner: Proxy,
    /// Is asked to settle them.
    pub other: Proxy,
    pub at_owner: Client,
    pub at_other: Client,
    pub keys: NamedTempFile,
}

/// A key file, and the flag that names it.
pub fn key_file(keys: &[&str]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), keys.join("\n")).unwrap();
    file
}

pub fn new_key() -> String {
    fetch_proxy::token::new_key_line().unwrap()
}

impl Pair {
    pub async fn start() -> Self {
        Self::start_at(&NatsServer::shared().url(), &NatsServer::shared().url()).await
    }

    /// The two may reach NATS by different ways.
    pub async fn start_at(owner_nats: &str, other_nats: &str) -> Self {
        let keys = key_file(&[&new_key()]);
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let cluster = format!("pair{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let flags = ["--token-key-file", keys.path().to_str().unwrap(), "--cluster", &cluster];
        let owner = Proxy::start_at(owner_nats, &flags);
        let other = Proxy::start_at(other_nats, &flags);
        let (at_owner, at_other) = (owner.client().await, other.client().await);
        Self { owner, other, at_owner, at_other, keys }
    }

    /// Publishes and leases so many messages at the owner.
    pub async fn leased(&mut self, fixture: &Fixture, count: usize) -> Vec<pb::Delivery> {
        fixture.publish_many(count).await;
        let n = u32::try_from(count).unwrap();
        let linger = crate::support::millis(5000);
        let all = pb::FetchRequest { linger, ..fetch(fixture, n, 10_000) };
        let answer = self.at_owner.fetch(all).await.unwrap().into_inner();
        assert_eq!(answer.messages.len(), count);
        answer.messages
    }
}
