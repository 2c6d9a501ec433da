//! A NATS server that goes in good order (lame duck mode) is left in good order.

use testkit::{
    BOUND,
    cluster::Cluster,
    eventually,
    jetstream::{Fixture, config},
    proxy::{Client, Proxy, ack, fetch},
};

/// Fetches one message that is published meanwhile, and acks it.
async fn round(client: &mut Client, fixture: &Fixture, proxy: &Proxy) {
    let published = async {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        fixture.publish("n", "1").await
    };
    let (fetched, _) = tokio::join!(client.fetch(fetch(fixture, 1, 5000)), published);
    let fetched =
        fetched.unwrap_or_else(|status| panic!("{status}:\n{}", proxy.log())).into_inner();
    client.ack(ack(&fetched.messages[0].token)).await.unwrap();
}

#[tokio::test]
async fn no_call_notices_a_server_that_leaves() {
    let cluster = Cluster::start().await;
    // The leaders of stream and consumer stay: an election would be noticed, whoever serves.
    let fixture = cluster.fixture(config()).await;
    let stream = fixture.jetstream.get_stream(&fixture.stream).await.unwrap();
    let stream = stream.cached_info().cluster.clone().unwrap().leader.unwrap();
    let leader = cluster.leader(&fixture).await;
    let leads = |node: &usize| *node == leader || stream == format!("n{node}");
    let (leaving, staying) = ((0..3).find(|node| !leads(node)).unwrap(), &cluster.nodes[leader]);
    let urls = format!("{},{}", cluster.nodes[leaving].url(), staying.url());
    let client = async_nats::connect(staying.url()).await.unwrap();
    let fixture = Fixture { jetstream: async_nats::jetstream::new(client), ..fixture };
    let leaver = async_nats::connect(cluster.nodes[leaving].url()).await.unwrap();
    let leaver = leaver.server_info().server_id;
    // Which of the two it takes is chance.
    let (proxy, on_the_leaver) = loop {
        let proxy = Proxy::start_at(&urls, &[]);
        eventually("two connections", || async {
            (proxy.log().matches("connected to NATS").count() == 2).then_some(())
        })
        .await;
        let log = proxy.log();
        let connected = log.lines().filter(|line| line.contains("connected to NATS"));
        let on_the_leaver = connected.filter(|line| line.contains(&leaver)).count();
        if on_the_leaver > 0 {
            break (proxy, on_the_leaver);
        }
    };
    let mut client = proxy.client().await;
    round(&mut client, &fixture, &proxy).await;

    cluster.nodes[leaving].signal("USR2");
    let began = std::time::Instant::now();
    let connected = || proxy.log().matches("connected to NATS").count();
    while connected() < 2 + on_the_leaver {
        assert!(began.elapsed() < BOUND, "it stays where it is:\n{}", proxy.log());
        round(&mut client, &fixture, &proxy).await;
    }
    for _ in 0..20 {
        round(&mut client, &fixture, &proxy).await;
    }
    assert!(!proxy.log().contains("lost"), "{}", proxy.log());
}
