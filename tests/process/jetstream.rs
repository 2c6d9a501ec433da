//! A NATS without JetStream for us, and one whose JetStream domain is another: callers, `/readyz` and
//! the log say which.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use serde_json::Value;
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    nats_server::{NatsServer, binary},
    proxy::{Client, Proxy, ack, fetch, reason},
};

/// The text of `/readyz`, without its beginning.
fn readyz(proxy: &Proxy) -> String {
    let mut peer = TcpStream::connect(&proxy.ops).unwrap();
    peer.set_read_timeout(Some(BOUND)).unwrap();
    peer.write_all(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
    let mut said = String::new();
    peer.read_to_string(&mut said).unwrap();
    said.split_once("\r\n\r\n").unwrap().1.trim().to_owned()
}

async fn becomes(proxy: &Proxy, ready: &str) {
    eventually(ready, || async { readyz(proxy).contains(ready).then_some(()) }).await;
}

/// The answer to a Fetch, once the proxy knows.
async fn refused(client: &Client, fixture: &Fixture) -> String {
    eventually("the reason", || async {
        let refused = client.clone().fetch(fetch(fixture, 1, 100)).await.unwrap_err();
        assert_eq!(reason(&refused).1, "NATS_UNAVAILABLE");
        let connected = !refused.message().contains("not connected yet");
        connected.then(|| refused.message().to_owned())
    })
    .await
}

/// How often the log says why a consumer cannot be read.
fn said(proxy: &Proxy, why: &str) -> usize {
    let lines = proxy.log();
    let lines = lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let unread = lines.filter(|line| line["message"] == "the consumer cannot be read");
    unread.filter(|line| line["why"].as_str().unwrap().contains(why)).count()
}

/// A user without JetStream, and one with it, who makes streams.
fn accounts(jetstream: &str) -> String {
    format!(
        "accounts {{\nA {{\n{jetstream}\nusers: [{{user: a, password: a}}]\n}}\n\
         B {{\njetstream: enabled\nusers: [{{user: b, password: b}}]\n}}\n}}"
    )
}

fn as_user(server: &NatsServer, user: &str) -> String {
    server.url().replace("//", &format!("//{user}:{user}@"))
}

#[tokio::test]
async fn nats_without_jetstream_is_named() {
    let fixture = Fixture::new(config()).await;
    let why = "JetStream is not enabled: nobody answers at `$JS.API`";
    let server = NatsServer::start_without_jetstream();
    let proxy = Proxy::start(&server, &[]);
    becomes(&proxy, why).await;
    let client = proxy.client().await;
    let told = refused(&client, &fixture).await;
    assert!(told.contains(why), "{told}");
    for _ in 0..3 {
        refused(&client, &fixture).await;
    }
    eventually("the log", || async { (said(&proxy, why) > 0).then_some(()) }).await;
    assert_eq!(said(&proxy, why), 1, "{}", proxy.log());
}

#[tokio::test]
async fn wrong_jetstream_domain_is_named() {
    let fixture = Fixture::new(config()).await;
    let server = NatsServer::start_with(binary(), Some("jetstream { domain: hub }".to_owned()));
    let proxy = Proxy::start(&server, &["--js-domain", "wrong"]);
    let why = "nobody answers for JetStream domain `wrong`, the value of --js-domain; the domain of \
               the connected server is `hub`";
    becomes(&proxy, why).await;
    let told = refused(&proxy.client().await, &fixture).await;
    assert!(told.contains(why), "{told}");
    eventually("the log", || async { (said(&proxy, why) == 1).then_some(()) }).await;
}

#[tokio::test]
async fn account_is_served_once_it_has_jetstream() {
    let server = NatsServer::start_with(binary(), Some(accounts("")));
    let fixture = Fixture::at(&as_user(&server, "b"), config()).await;
    let proxy = Proxy::start_at(&as_user(&server, "a"), &[]);
    let why = "JetStream not enabled for account";
    becomes(&proxy, why).await;
    let client = proxy.client().await;
    let told = refused(&client, &fixture).await;
    assert!(told.contains(why), "{told}");
    eventually("the log", || async { (said(&proxy, why) == 1).then_some(()) }).await;
    // The log says it of another consumer, too.
    let other = Fixture { consumer: "another".into(), ..fixture };
    let ask = || async {
        let _ = client.clone().fetch(fetch(&other, 1, 100)).await;
        (said(&proxy, why) == 2).then_some(())
    };
    eventually("the other consumer", ask).await;

    server.configure(&accounts("jetstream: enabled"));
    becomes(&proxy, "ok").await;
    let refused = client.clone().fetch(fetch(&other, 1, 100)).await.unwrap_err();
    assert_eq!(reason(&refused).1, "STREAM_NOT_FOUND");
}

/// The least rights do not name the account's INFO: nobody has to have it.
#[tokio::test]
async fn first_fetch_finds_a_missing_right_to_ask_for_jetstream() {
    let rights = |jetstream: &str| {
        format!(
            "accounts {{\nA {{\n{jetstream}\nusers: [\n{{user: b, password: b}}\n\
             {{user: a, password: a, permissions: {{publish: {{allow: \">\", \
             deny: \"$JS.API.INFO\"}}}}}}\n]\n}}\n}}"
        )
    };
    let server = NatsServer::start_with(binary(), Some(rights("")));
    let proxy = Proxy::start_at(&as_user(&server, "a"), &[]);
    becomes(&proxy, "ok").await;
    let (why, client) = ("JetStream not enabled for account", proxy.client().await);
    let other = Fixture::new(config()).await;
    let told = refused(&client, &other).await;
    assert!(told.contains(why), "{told}");
    becomes(&proxy, why).await;
    server.configure(&rights("jetstream: enabled"));
    becomes(&proxy, "ok").await;
    assert!(!proxy.log().contains("NATS refuses"), "{}", proxy.log());
    let fixture = Fixture::at(&as_user(&server, "b"), config()).await;
    fixture.publish("n", "x").await;
    let answer = client.clone().fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
    client.clone().ack(ack(&answer.messages[0].token)).await.unwrap();
}
