//! The means of these tests, tried by themselves.

use std::time::Duration;

use testkit::{
    cluster::Cluster,
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    relay::{Flow, Relay},
};

#[tokio::test]
async fn relay_passes_stalls_and_cuts() {
    let server = NatsServer::shared();
    let relay = Relay::to(&server.url()).await;
    let fixture = Fixture::at(&relay.nats_url(), config()).await;
    fixture.publish_many(2).await;
    relay.flow(Flow::Stall, Flow::Pass);
    let publish = fixture.publish("n", "3");
    tokio::pin!(publish);
    let stalled = tokio::time::timeout(Duration::from_millis(300), publish.as_mut()).await;
    assert!(stalled.is_err(), "a stalled wire passed a message");
    relay.flow(Flow::Pass, Flow::Pass);
    assert_eq!(publish.await, 3);
    relay.close();
    let client = fixture.jetstream.client();
    eventually("the loss", || async {
        (client.connection_state() != async_nats::connection::State::Connected).then_some(())
    })
    .await;
    relay.open();
    eventually("the reconnect", || fixture.try_info()).await;
}

#[tokio::test]
async fn cluster_elects_leaders() {
    let cluster = Cluster::start().await;
    let fixture = cluster.fixture(config()).await;
    fixture.publish_many(3).await;
    assert!(cluster.leader(&fixture).await < 3);
}
