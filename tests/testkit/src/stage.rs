//! The stage of most tests: a consumer, and a proxy whose wire to NATS can be cut, with a client.

use async_nats::jetstream::consumer::pull;

use crate::{
    jetstream::Fixture,
    nats_server::NatsServer,
    proxy::{Client, Proxy},
    relay::Relay,
};

pub struct Stage {
    pub fixture: Fixture,
    /// Between NATS and the proxy.
    pub wire: Relay,
    pub proxy: Proxy,
    /// A client of the proxy.
    pub client: Client,
}

impl Stage {
    /// A stage on the shared server.
    pub async fn new(consumer: pull::Config) -> Self {
        Self::on(NatsServer::shared(), consumer).await
    }

    pub async fn on(server: &NatsServer, consumer: pull::Config) -> Self {
        let fixture = Fixture::on(server, consumer).await;
        Self::behind(Relay::to(&server.url()).await, fixture).await
    }

    /// A stage on the shared server, with a wire that holds little.
    pub async fn narrow(consumer: pull::Config) -> Self {
        let fixture = Fixture::new(consumer).await;
        Self::behind(Relay::narrow_to(&NatsServer::shared().url()), fixture).await
    }

    async fn behind(wire: Relay, fixture: Fixture) -> Self {
        let (proxy, client) = served(&wire.nats_url()).await;
        Self { fixture, wire, proxy, client }
    }
}

/// A proxy and a client of it.
pub async fn served(nats_url: &str) -> (Proxy, Client) {
    with_client(Proxy::start_at(nats_url, &[])).await
}

/// A proxy with these flags in front of the shared server, and a client of it.
pub async fn served_with(flags: &[&str]) -> (Proxy, Client) {
    with_client(Proxy::start(NatsServer::shared(), flags)).await
}

async fn with_client(proxy: Proxy) -> (Proxy, Client) {
    let client = proxy.client().await;
    (proxy, client)
}
