//! The differences of a replicated consumer, which no caller may notice.

use testkit::{
    cluster::Cluster,
    jetstream::config,
    proxy::{Proxy, ack, fetch},
};

/// Such a consumer says that a batch is complete before it sends what is in it.
#[tokio::test]
async fn fetch_of_an_available_message_finds_it() {
    let cluster = Cluster::start().await;
    let fixture = cluster.fixture(config()).await;
    let proxy = Proxy::start_at(&cluster.url(), &[]);
    let mut client = proxy.client().await;
    let mut missed = 0;
    for _ in 0..20 {
        fixture.publish("n", "1").await;
        let mut fetched = client.fetch(fetch(&fixture, 1, 0)).await.unwrap().into_inner();
        if fetched.messages.is_empty() {
            // The quorum may take longer than such a call waits, but not as a rule.
            missed += 1;
            fetched = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
        }
        client.ack(ack(&fetched.messages[0].token)).await.unwrap();
    }
    // A proxy that believed the status would find nothing at all. A busy machine misses some.
    assert!(missed < 18, "{missed} of 20 calls found nothing");
}
