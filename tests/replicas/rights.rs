//! The rights that `docs/nats-rights.md` lists are those that replicas need: with them everything
//! works, and without those between replicas each serves alone.

use fetch_proxy::pb::Outcome;

use super::pair::{Replicas, key_file, new_key};
use crate::support::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::{NatsServer, binary},
    proxy::{Proxy, ack, fetch, reason},
};

/// The block of the page, for any stream and for the cluster of the test.
fn listed(cluster: &str) -> String {
    let page = include_str!("../../docs/nats-rights.md");
    let block = page.split("```conf").nth(1).unwrap().split("```").next().unwrap();
    block
        .replace("ORDERS", "*")
        .replace("_fetchproxy.fetch-proxy.", &format!("_fetchproxy.{cluster}."))
}

/// A server with an administrator, and a user for the proxy who may do what the page lists.
fn server(permissions: &str) -> NatsServer {
    let users = format!(
        "authorization {{ users: [\n{{ user: admin, password: admin }}\n\
         {{ user: proxy, password: proxy, {permissions} }} ] }}"
    );
    NatsServer::start_with(binary(), Some(users))
}

fn as_user(server: &NatsServer, user: &str) -> String {
    server.url().replace("//", &format!("//{user}:{user}@"))
}

#[tokio::test]
async fn with_the_listed_rights_replicas_forward_and_hand_over() {
    let server = server(&listed("*"));
    let fixture = Fixture::at(&as_user(&server, "admin"), config()).await;
    let url = as_user(&server, "proxy");
    let mut replicas = Replicas::start_at(&[&url, &url]).await;
    let leased = replicas.leased(0, &fixture, 2).await;
    let [leaver, heir] = &mut replicas.all[..] else { panic!() };
    let forwarded = heir.client.ack(ack(&leased[0].token)).await.unwrap().into_inner();
    assert_eq!(forwarded.outcome(), Outcome::Confirmed);
    leaver.proxy.signal("TERM");
    assert!(leaver.proxy.wait().await.success());
    let taken = heir.client.ack(ack(&leased[1].token)).await.unwrap().into_inner();
    assert_eq!(taken.outcome(), Outcome::Confirmed);
    assert_eq!(fixture.info().await.num_redelivered, 0);
    for replica in &replicas.all {
        assert!(!replica.proxy.log().contains("Permissions Violation"), "{}", replica.proxy.log());
    }
}

#[tokio::test]
async fn without_those_between_replicas_each_serves_alone_and_says_so() {
    let permissions: String = listed("*")
        .lines()
        .filter(|line| !line.contains("_fetchproxy"))
        .collect::<Vec<_>>()
        .join("\n");
    let server = server(&permissions);
    let fixture = Fixture::at(&as_user(&server, "admin"), config()).await;
    let keys = key_file(&[&new_key()]);
    let flags = ["--token-key-file", keys.path().to_str().unwrap(), "--cluster", "alone"];
    let url = as_user(&server, "proxy");
    let proxies = [Proxy::start_at(&url, &flags), Proxy::start_at(&url, &flags)];
    for (place, proxy) in proxies.iter().enumerate() {
        fixture.publish("n", "x").await;
        let mut client = proxy.client().await;
        let answer = client.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
        let token = &answer.messages[0].token;
        // At the other there is no way to ask the owner, but there is one to JetStream.
        let mut other = proxies[1 - place].client().await;
        let refused = other.extend(crate::support::proxy::extend(token, 60_000)).await.unwrap_err();
        assert_eq!(reason(&refused).1, "OWNER_UNREACHABLE");
        let acked = client.ack(ack(token)).await.unwrap().into_inner();
        assert_eq!(acked.outcome(), Outcome::Confirmed);
        eventually("the log to say that it serves alone", || async {
            proxy.log().contains("_fetchproxy.alone").then_some(())
        })
        .await;
    }
}
