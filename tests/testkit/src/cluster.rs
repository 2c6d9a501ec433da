//! Three nats-servers that keep copies for each other.

use std::net::TcpListener;

use async_nats::jetstream::{
    self,
    consumer::{Info, pull},
    stream,
};

use crate::{
    BOUND, eventually,
    jetstream::Fixture,
    nats_server::{NatsServer, binary},
    until,
};

pub struct Cluster {
    pub nodes: Vec<NatsServer>,
}

impl Cluster {
    /// Starts three servers, and waits until JetStream of all three is one.
    pub async fn start() -> Self {
        let mut cluster = Self::try_start();
        for _ in 0..4 {
            // Somebody else may take one of their ports before they do.
            cluster = cluster.or_else(|_| Self::try_start());
        }
        let cluster = cluster.unwrap_or_else(|log| panic!("no three servers come up:\n{log}"));
        let ready = until(3 * BOUND, || cluster.ready()).await;
        ready.expect("three servers that know each other");
        cluster
    }

    fn try_start() -> Result<Self, String> {
        // Held together until all are known, so that they differ.
        let free: Vec<TcpListener> =
            (0..3).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let ports: Vec<u16> =
            free.iter().map(|listener| listener.local_addr().unwrap().port()).collect();
        drop(free);
        let routes: Vec<String> =
            ports.iter().map(|port| format!("nats-route://127.0.0.1:{port}")).collect();
        let config = |place: usize| {
            format!(
                "server_name: n{place}\nserver_tags: [n{place}]\ncluster {{ name: test, listen: \"127.0.0.1:{}\", \
                 routes: [{}] }}\n",
                ports[place],
                routes.join(", ")
            )
        };
        let start = |place| NatsServer::try_start_with(binary(), Some(config(place)));
        Ok(Self { nodes: (0..3).map(start).collect::<Result<_, _>>()? })
    }

    /// All three, for a client that goes from one to the next.
    pub fn url(&self) -> String {
        self.nodes.iter().map(NatsServer::url).collect::<Vec<_>>().join(",")
    }

    /// A stream with three copies, and a consumer as asked for, with three too.
    pub async fn fixture(&self, consumer: pull::Config) -> Fixture {
        Fixture::replicated(&self.url(), consumer, 3).await
    }

    /// A stream without copies on this server, and such a consumer.
    pub async fn fixture_on(&self, place: usize, consumer: pull::Config) -> Fixture {
        Fixture::placed(&self.url(), consumer, &format!("n{place}")).await
    }

    /// The server that leads this fixture's consumer.
    pub async fn leader(&self, fixture: &Fixture) -> usize {
        let leader = eventually("a leader of the consumer", || async {
            let info: Info = fixture.try_info().await?;
            info.cluster?.leader
        })
        .await;
        leader.trim_start_matches('n').parse().unwrap()
    }

    /// Gives the lead of this fixture's consumer to another server.
    pub async fn step_down(&self, fixture: &Fixture) {
        let leader = self.leader(fixture).await;
        let consumer = format!("{}.{}", fixture.stream, fixture.consumer);
        let call = format!("$JS.API.CONSUMER.LEADER.STEPDOWN.{consumer}");
        fixture.jetstream.client().request(call, "".into()).await.expect("an answer to STEPDOWN");
        eventually("another leader", || async {
            (self.leader(fixture).await != leader).then_some(())
        })
        .await;
    }

    async fn ready(&self) -> Option<()> {
        let servers: Vec<String> = self.nodes.iter().map(NatsServer::url).collect();
        let client = async_nats::connect(servers).await.ok()?;
        let jetstream = jetstream::new(client);
        let config = stream::Config {
            name: "READY".to_owned(),
            num_replicas: 3,
            ..stream::Config::default()
        };
        jetstream.create_stream(config).await.ok()?;
        jetstream.delete_stream("READY").await.ok()?;
        Some(())
    }
}
