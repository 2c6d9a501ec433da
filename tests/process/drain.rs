//! What a SIGTERM does, and a second one.

use crate::support::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, fetch},
};

#[tokio::test]
async fn an_idle_proxy_ends_with_code_0() {
    for signal in ["TERM", "INT"] {
        let mut proxy = Proxy::start(NatsServer::shared(), &[]);
        proxy.signal(signal);
        assert!(proxy.wait().await.success(), "{}", proxy.log());
        assert!(proxy.log().contains("drained"));
    }
}

#[tokio::test]
async fn health_says_not_serving_during_the_delay_and_calls_are_served_on() {
    let fixture = Fixture::new(config()).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-delay", "3s"]);
    let mut client = proxy.client().await;
    fixture.publish_many(2).await;
    client.fetch(fetch(&fixture, 1, 5000)).await.unwrap();
    proxy.signal("TERM");
    eventually("NOT_SERVING", || async {
        let (status, serving) =
            fetch_proxy::grpc::probe(&proxy.ops, "", std::time::Duration::from_secs(1))
                .await
                .ok()?;
        (!serving && status == "NOT_SERVING").then_some(())
    })
    .await;
    let answer = client.fetch(fetch(&fixture, 1, 1000)).await.unwrap().into_inner();
    assert_eq!(answer.messages.len(), 1);
    drop(client);
    assert!(proxy.wait().await.success(), "{}", proxy.log());
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-delay", "60s"]);
    proxy.signal("TERM");
    eventually("the drain", || async { proxy.log().contains("draining").then_some(()) }).await;
    proxy.signal("TERM");
    // Within the bound of `wait`, far below the delay.
    proxy.wait().await;
    assert!(proxy.log().contains("second signal"));
}

#[tokio::test]
async fn a_silent_connection_does_not_hold_up_the_end_for_longer_than_the_timeout() {
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-timeout", "1s"]);
    let _silent = std::net::TcpStream::connect(&proxy.grpc).unwrap();
    proxy.signal("TERM");
    assert!(proxy.wait().await.success(), "{}", proxy.log());
}
