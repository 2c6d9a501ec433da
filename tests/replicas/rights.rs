//! The rights that `deploy/nats` lists are those that replicas need: with them everything works, and
//! without those between replicas each serves alone.

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::Outcome;

use super::pair::{Replicas, key_file, new_key};
use crate::support::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::{NatsServer, binary},
    proxy::{Proxy, ack, fetch, reason},
};

const ONE: &str = include_str!("../../deploy/nats/one-consumer.conf");
const MANY: &str = include_str!("../../deploy/nats/many-consumers.conf");

const ADMIN: &str = "{ user: admin, password: admin }";

/// A server with a stream, and a user for the proxy who may do to it what is listed.
async fn server(rights: &str, cluster: &str) -> (NatsServer, Fixture) {
    let users = |more: &str| format!("authorization {{ users: [\n{ADMIN}\n{more}] }}");
    let server = NatsServer::start_with(binary(), Some(users("")));
    let fixture = Fixture::at(&as_user(&server, "admin"), config()).await;
    let rights = rights
        .replace("ORDERS.worker", &format!("{}.{}", fixture.stream, fixture.consumer))
        .replace("ORDERS", &fixture.stream)
        .replace("_fetchproxy.fetch-proxy.", &format!("_fetchproxy.{cluster}."));
    let proxy = format!("{{ user: proxy, password: proxy, permissions: {{\n{rights}}} }}");
    server.configure(&users(&proxy));
    eventually("the server to know the user", || async {
        let proxy =
            async_nats::ConnectOptions::new().user_and_password("proxy".into(), "proxy".into());
        proxy.connect(server.url()).await.ok()
    })
    .await;
    (server, fixture)
}

fn as_user(server: &NatsServer, user: &str) -> String {
    server.url().replace("//", &format!("//{user}:{user}@"))
}

#[test]
fn the_page_shows_the_file() {
    let page = include_str!("../../docs/nats-rights.md");
    let block = page.split("```conf\n").nth(1).unwrap().split("```").next().unwrap();
    assert_eq!(block, ONE);
}

#[tokio::test]
async fn with_the_rights_for_many_all_consumers_of_a_stream_are_served_and_no_other() {
    let (server, fixture) = server(MANY, "many").await;
    let second = pull::Config { durable_name: Some("second".to_owned()), ..config() };
    fixture.jetstream.create_consumer_on_stream(second, &fixture.stream).await.unwrap();
    let other = Fixture::at(&as_user(&server, "admin"), config()).await;
    let proxy = Proxy::start_at(&as_user(&server, "proxy"), &["--cluster", "many"]);
    let mut client = proxy.client().await;
    fixture.publish("n", "x").await;
    for consumer in ["worker", "second"] {
        let mut request = fetch(&fixture, 1, 10_000);
        request.consumer = consumer.to_owned();
        let answer = client.fetch(request).await.unwrap().into_inner();
        let acked = client.ack(ack(&answer.messages[0].token)).await.unwrap().into_inner();
        assert_eq!(acked.outcome(), Outcome::Confirmed, "{consumer}");
    }
    let denied = client.fetch(fetch(&other, 1, 10_000)).await.unwrap_err();
    assert_eq!(reason(&denied).1, "NATS_PERMISSION");
}

#[tokio::test]
async fn with_the_listed_rights_replicas_forward_and_hand_over() {
    // What replicas of a test call their cluster is known when they run.
    let (server, fixture) = server(ONE, "*").await;
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
    let alone = |line: &&str| !line.contains("_fetchproxy");
    let rights: String = ONE.lines().filter(alone).map(|line| format!("{line}\n")).collect();
    let (server, fixture) = server(&rights, "alone").await;
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
