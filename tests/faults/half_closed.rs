//! A connection of which one direction is over, and the other is not: whoever has said its last may
//! still listen, and may not.

use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch, waiting},
    relay::Relay,
    stage::Stage,
};

#[tokio::test]
async fn proxy_half_closed_by_nats_reconnects_and_keeps_its_leases() {
    let Stage { fixture, wire: nats, proxy, mut client } = Stage::new(config()).await;
    fixture.publish("n", "held").await;
    let held = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
    let open = waiting(&client, &fixture, fetch(&fixture, 1, 20_000)).await;
    nats.half_close();
    let connected = || proxy.log().matches("connected to NATS").count();
    eventually("new connections", || async { (connected() == 4).then_some(()) }).await;
    eventually("a confirmation", || {
        let (mut client, request) = (client.clone(), ack(&held.messages[0].token));
        async move { client.ack(request).await.ok() }
    })
    .await;
    fixture.publish("n", "next").await;
    let next = open.await.unwrap().unwrap().into_inner();
    assert_eq!(next.messages[0].delivery_count, 1, "the waiting call did not notice");
    client.ack(ack(&next.messages[0].token)).await.unwrap();
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

/// HTTP/2 knows no half: whoever has said its last is gone, and what was meant for it is the next
/// caller's.
#[tokio::test]
async fn half_closed_client_takes_no_message() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let relay = Relay::to(&proxy.grpc).await;
    let far = relay.client().await;
    let mut near = proxy.client().await;
    let gone = waiting(&far, &fixture, fetch(&fixture, 1, 20_000)).await;
    relay.half_close();
    gone.await.unwrap().unwrap_err();
    fixture.publish("n", "x").await;
    let message =
        near.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner().messages.remove(0);
    assert_eq!(message.delivery_count, 1);
    near.ack(ack(&message.token)).await.unwrap();
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}
