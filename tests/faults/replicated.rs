//! What a replicated consumer does differently, and no caller may notice.

use crate::support::{
    cluster::Cluster,
    jetstream::config,
    proxy::{Proxy, ack, fetch},
};

/// Such a consumer says that a batch is complete before it sends what is in it.
#[tokio::test]
async fn a_fetch_of_what_is_there_finds_it_at_its_first_attempt() {
    let cluster = Cluster::start().await;
    let fixture = cluster.fixture(config()).await;
    let proxy = Proxy::start_at(&cluster.url(), &[]);
    let mut client = proxy.client().await;
    for _ in 0..20 {
        fixture.publish_many(2).await;
        let fetched = client.fetch(fetch(&fixture, 2, 0)).await.unwrap().into_inner();
        assert_eq!(fetched.messages.len(), 2, "{:?}", fetched.empty_reason());
        for message in fetched.messages {
            assert_eq!(message.delivery_count, 1);
            client.ack(ack(&message.token)).await.unwrap();
        }
    }
}
