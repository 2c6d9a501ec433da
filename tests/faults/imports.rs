//! JetStream in another account, by services that the proxy's account imports. If such a service
//! answers once, all messages of a pull but the first are lost in silence.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::FetchRequest;
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait, config},
    millis,
    nats_server::{NatsServer, binary},
    proxy::{Proxy, ack, fetch},
};

const WARNING: &str = "only the first message of each pull arrives";

/// The JetStream API is exported with this.
fn accounts(answers: &str) -> String {
    format!(
        "accounts {{
          APP: {{
            jetstream: enabled, users: [{{ user: admin, password: admin }}]
            exports: [{{ service: \"$JS.API.>\" {answers} }}, {{ service: \"$JS.ACK.>\" }}]
          }}
          PROXY: {{
            users: [{{ user: proxy, password: proxy }}]
            imports: [
              {{ service: {{ account: APP, subject: \"$JS.API.>\" }} }}
              {{ service: {{ account: APP, subject: \"$JS.ACK.>\" }} }}
            ]
          }}
        }}"
    )
}

async fn proxy_with(answers: &str, messages: usize) -> (NatsServer, Fixture, Proxy) {
    let server = NatsServer::start_with(binary(), Some(accounts(answers)));
    let at = |user: &str| server.url().replace("//", &format!("//{user}:{user}@"));
    let fixture = Fixture::at(&at("admin"), ack_wait(60_000)).await;
    fixture.publish_many(messages).await;
    let proxy = Proxy::start_at(&at("proxy"), &[]);
    (server, fixture, proxy)
}

#[tokio::test]
async fn export_with_single_answers_is_named_in_the_log() {
    let (_server, fixture, proxy) = proxy_with("", 60).await;
    let client = proxy.client().await;
    eventually("the warning", || async {
        let request = FetchRequest { max_wait: millis(500), ..fetch(&fixture, 5, 500) };
        let _ = client.clone().fetch(request).await;
        proxy.log().contains(WARNING).then_some(())
    })
    .await;
    assert_eq!(proxy.log().matches(WARNING).count(), 1, "{}", proxy.log());
}

#[tokio::test]
async fn export_with_streamed_answers_works_like_an_own_account() {
    const COUNT: usize = 60;
    let (_server, fixture, proxy) = proxy_with(", response_type: stream", COUNT).await;
    let mut client = proxy.client().await;
    for _ in 0..COUNT / 10 {
        let request = FetchRequest { linger: millis(5000), ..fetch(&fixture, 10, 10_000) };
        let answer = client.fetch(request).await.unwrap().into_inner();
        assert_eq!(answer.messages.len(), 10);
        for message in &answer.messages {
            client.ack(ack(&message.token)).await.unwrap();
        }
    }
    assert!(!proxy.log().contains(WARNING), "{}", proxy.log());
}

/// Each pull brings one message there, the next one is the other replica's, and its end comes late.
#[tokio::test]
async fn shared_consumer_at_its_limit_is_not_suspected() {
    const LIMIT: u64 = 4;
    let server = NatsServer::start_with(binary(), None);
    let limited = pull::Config { max_ack_pending: 4, ..config() };
    let fixture = Fixture::on(&server, limited).await;
    fixture.publish_many(400).await;
    let proxies = [0, 1].map(|_| Proxy::start(&server, &["--cluster", "limited"]));
    let until = Instant::now() + Duration::from_secs(12);
    let worker = async |proxy: &Proxy| {
        let (mut client, mut held) = (proxy.client().await, VecDeque::new());
        while Instant::now() < until {
            let request = FetchRequest { max_wait: millis(300), ..fetch(&fixture, 5, 300) };
            let answer = client.fetch(request).await.unwrap().into_inner();
            held.extend(answer.messages.into_iter().map(|message| message.token));
            // One place at a time becomes free.
            if let Some(token) = held.pop_front() {
                client.ack(ack(&token)).await.unwrap();
            }
        }
    };
    tokio::join!(worker(&proxies[0]), worker(&proxies[1]));
    let info = fixture.info().await;
    assert!(info.delivered.consumer_sequence > 5 * LIMIT, "{info:?}");
    for proxy in &proxies {
        assert!(!proxy.log().contains(WARNING), "{}", proxy.log());
    }
}
