//! An issuer that is away, slow or wrong, and one that changes its keys.

use std::{net::TcpListener, time::Instant};

use fetch_proxy::access::NewApiKey;
use serde_json::json;
use testkit::{
    eventually,
    issuer::{IssuerAnswer, IssuerServer, TokenKey, key_set},
    jetstream::{Fixture, config},
    proxy::{Client, fetch, reason, with_key},
    scrape::Scrape,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use super::serving::{Corp, detail};

/// The refusal of a Fetch with this bearer, or none.
async fn refusal(client: &mut Client, fixture: &Fixture, bearer: &str) -> Option<Status> {
    client.fetch(with_key(bearer, fetch(fixture, 1, 0))).await.err()
}

/// Waits until the bearer is accepted.
async fn is_accepted(client: &Client, fixture: &Fixture, bearer: &str) {
    eventually("the token to be accepted", || {
        let mut client = client.clone();
        async move { refusal(&mut client, fixture, bearer).await.is_none().then_some(()) }
    })
    .await;
}

/// Waits until the bearer is refused for this reason.
async fn is_refused(client: &Client, fixture: &Fixture, bearer: &str, why: &str) {
    eventually(why, || {
        let mut client = client.clone();
        async move {
            let refused = refusal(&mut client, fixture, bearer).await?;
            (detail(&refused, "why").as_deref() == Some(why)).then_some(())
        }
    })
    .await;
}

fn is_unavailable(status: &Status) {
    assert_eq!(reason(status), (Code::Unavailable, "AUTH_UNAVAILABLE".to_owned()));
    assert_eq!(detail(status, "issuer").as_deref(), Some("corp"));
    let retry = status.get_details_retry_info().unwrap().retry_delay.unwrap();
    assert_eq!(retry.as_secs(), 1);
}

#[tokio::test]
async fn issuer_that_is_down_at_the_start_stops_only_its_own_tokens() {
    let fixture = Fixture::new(config()).await;
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap();
    drop(free);
    let corp = Corp::new(&fixture, &format!("{{url: 'http://{address}/keys'}}"));
    let key = NewApiKey::random("laptop").unwrap().unwrap();
    corp.with_api_key(&key.line);
    let proxy = corp.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    let (signer, token) = corp.token("svc");
    is_unavailable(&refusal(&mut client, &fixture, &token).await.unwrap());
    let audited = || async {
        let log = proxy.log();
        let fields = "\"event\":\"unauthenticated\",\"why\":\"keys_away\",\"detail\":\"corp\"";
        log.contains(fields).then_some(())
    };
    eventually("the line for auditors", audited).await;
    assert!(refusal(&mut client, &fixture, &key.secret).await.is_none(), "another credential");
    let _server = IssuerServer::start_at(address, IssuerAnswer::Text(key_set(&[&signer])));
    let age = || {
        let seen = Scrape::of(&proxy.ops);
        seen.series.get("fetchproxy_issuer_keys_age_seconds{issuer=\"corp\"}").copied()
    };
    assert_eq!(age(), None, "there are no keys yet");
    is_accepted(&client, &fixture, &token).await;
    assert!(age().is_some_and(|age| (0.0..600.0).contains(&age)), "{:?}", age());
    let log = proxy.log();
    assert_eq!(log.matches("the keys of an issuer cannot be fetched").count(), 1, "{log}");
    assert!(log.contains("the keys of an issuer can be fetched again"), "{log}");
}

#[tokio::test]
async fn silent_issuer_delays_no_call_and_no_start() {
    let fixture = Fixture::new(config()).await;
    let server = IssuerServer::start(IssuerAnswer::Silence);
    let corp = Corp::new(&fixture, &format!("{{url: '{}/keys'}}", server.url()));
    let proxy = corp.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    let (signer, token) = corp.token("svc");
    eventually("the request", || async { (!server.requests().is_empty()).then_some(()) }).await;
    let begun = Instant::now();
    for _ in 0..20 {
        is_unavailable(&refusal(&mut client, &fixture, &token).await.unwrap());
    }
    assert!(begun.elapsed().as_secs() < 4, "a fetch takes 5 s to give up");
    assert_eq!(server.requests().len(), 1, "no call asks the issuer");
    server.set(IssuerAnswer::Text(key_set(&[&signer])));
    is_accepted(&client, &fixture, &token).await;
}

#[tokio::test]
async fn unknown_keys_ask_the_issuer_once() {
    let fixture = Fixture::new(config()).await;
    let known = TokenKey::p256("known");
    let server = IssuerServer::start(IssuerAnswer::Text(key_set(&[&known])));
    let corp = Corp::new(&fixture, &format!("{{url: '{}/keys'}}", server.url()));
    let proxy = corp.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    is_accepted(&client, &fixture, &corp.token_by(&known, "svc")).await;
    assert_eq!(server.requests().len(), 1);
    let stranger = TokenKey::p256("stranger");
    is_unavailable(&refusal(&mut client, &fixture, &corp.token_by(&stranger, "x")).await.unwrap());
    is_refused(&client, &fixture, &corp.token_by(&stranger, "x"), "unknown_key").await;
    for number in 0..50 {
        // A connection ends after some refusals in a row, and a call on it may meet its end.
        let mut client = proxy.client().await;
        let stranger = TokenKey::p256(&format!("stranger-{number}"));
        let refused = refusal(&mut client, &fixture, &corp.token_by(&stranger, "x")).await.unwrap();
        assert_eq!(reason(&refused), (Code::Unauthenticated, "UNAUTHENTICATED".to_owned()));
        assert_eq!(detail(&refused, "why").as_deref(), Some("unknown_key"));
    }
    assert_eq!(server.requests().len(), 2);
}

#[tokio::test]
async fn key_that_left_the_set_is_gone_at_once_and_a_new_key_counts() {
    let fixture = Fixture::new(config()).await;
    let [old, new] = ["old", "new"].map(TokenKey::p256);
    let server = IssuerServer::start(IssuerAnswer::Text(key_set(&[&old])));
    let corp = Corp::new(&fixture, &format!("{{url: '{}/keys'}}", server.url()));
    let proxy = corp.serve();
    proxy.ready().await;
    // All on one connection, which knows the old token.
    let client = proxy.client().await;
    let [by_old, by_new] = [&old, &new].map(|key| corp.token_by(key, "svc"));
    is_accepted(&client, &fixture, &by_old).await;
    let (mut waiting, held) = (client.clone(), by_old.clone());
    let request = with_key(&held, fetch(&fixture, 1, 20_000));
    let call = tokio::spawn(async move { waiting.fetch(request).await });
    fixture.pulled().await;
    server.set(IssuerAnswer::Text(key_set(&[&new])));
    is_accepted(&client, &fixture, &by_new).await;
    let refused = refusal(&mut client.clone(), &fixture, &by_old).await.unwrap();
    assert_eq!(detail(&refused, "why").as_deref(), Some("unknown_key"));
    // A call that waits since before hands out nothing any more.
    fixture.publish("n", "x").await;
    let refused = call.await.unwrap().unwrap_err();
    assert_eq!(reason(&refused).1, "UNAUTHENTICATED");
    let request = with_key(&by_new, fetch(&fixture, 1, 10_000));
    let answer = client.clone().fetch(request).await.unwrap().into_inner();
    assert_eq!(answer.messages.len(), 1, "the message went to the next caller");
}

#[tokio::test]
async fn garbage_from_an_issuer_leaves_its_last_keys_in_use() {
    let fixture = Fixture::new(config()).await;
    let [old, new] = ["old", "new"].map(TokenKey::p256);
    let server = IssuerServer::start(IssuerAnswer::Text(key_set(&[&old])));
    let corp = Corp::new(&fixture, &format!("{{url: '{}/keys'}}", server.url()));
    let proxy = corp.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    let [by_old, by_new] = [&old, &new].map(|key| corp.token_by(key, "svc"));
    is_accepted(&client, &fixture, &by_old).await;
    server.set(IssuerAnswer::Text("<html>hunter2</html>".to_owned()));
    is_unavailable(&refusal(&mut client, &fixture, &by_new).await.unwrap());
    let said = || async { proxy.log().contains("it is not a key set").then_some(()) };
    eventually("the fault in the log", said).await;
    assert!(!proxy.log().contains("hunter2"), "nothing of the answer is shown");
    assert!(refusal(&mut client, &fixture, &by_old).await.is_none());
    is_unavailable(&refusal(&mut client, &fixture, &by_new).await.unwrap());
    server.set(IssuerAnswer::Text(key_set(&[&old, &new])));
    is_accepted(&client, &fixture, &by_new).await;
    assert!(refusal(&mut client, &fixture, &by_old).await.is_none());
}

#[tokio::test]
async fn keys_in_a_file_are_read_again_and_a_wrong_file_changes_nothing() {
    let fixture = Fixture::new(config()).await;
    let corp = Corp::new(&fixture, "{file: keys.json}");
    let [old, new] = ["old", "new"].map(TokenKey::p256);
    corp.write("keys.json", &key_set(&[&old]));
    let proxy = corp.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    let [by_old, by_new] = [&old, &new].map(|key| corp.token_by(key, "svc"));
    assert!(refusal(&mut client, &fixture, &by_old).await.is_none());
    let refused = refusal(&mut client, &fixture, &by_new).await.unwrap();
    assert_eq!(detail(&refused, "why").as_deref(), Some("unknown_key"), "there is no one to ask");
    corp.write("keys.json", "{}");
    let said = || async { proxy.log().contains("it is not a key set").then_some(()) };
    eventually("the fault in the log", said).await;
    assert!(refusal(&mut client, &fixture, &by_old).await.is_none());
    corp.write("keys.json", &key_set(&[&new]));
    is_accepted(&client, &fixture, &by_new).await;
    is_refused(&client, &fixture, &by_old, "unknown_key").await;
}

#[tokio::test]
async fn changed_policy_keeps_the_keys_of_the_issuers_that_stay() {
    let fixture = Fixture::new(config()).await;
    let key = TokenKey::p256("k");
    let server = IssuerServer::start(IssuerAnswer::Text(key_set(&[&key])));
    let place = format!("{{url: '{}/keys'}}", server.url());
    let corp = Corp::new(&fixture, &place);
    let proxy = corp.serve();
    proxy.ready().await;
    let client = proxy.client().await;
    let token = corp.token_by(&key, "svc");
    is_accepted(&client, &fixture, &token).await;
    server.set(IssuerAnswer::Silence);
    let text = corp.policy(&fixture, &place);
    corp.write("policy.yaml", &text.replace("audiences: [fetch-proxy]", "audiences: [other]"));
    is_refused(&client, &fixture, &token, "audience").await;
    corp.write("policy.yaml", &text);
    is_accepted(&client, &fixture, &token).await;
    assert_eq!(server.requests().len(), 1);
    // Keys at another place are others, until they are there.
    let elsewhere = format!("{{url: '{}/elsewhere'}}", server.url());
    corp.write("policy.yaml", &corp.policy(&fixture, &elsewhere));
    eventually("the keys to be away", || {
        let (mut client, fixture, token) = (client.clone(), &fixture, &token);
        async move {
            let refused = refusal(&mut client, fixture, token).await?;
            (reason(&refused).1 == "AUTH_UNAVAILABLE").then_some(())
        }
    })
    .await;
}

#[tokio::test]
async fn keys_of_a_cluster_are_fetched_by_tls_with_the_token_of_the_pod() {
    let fixture = Fixture::new(config()).await;
    let authority = testkit::authority::Authority::new("cluster");
    let key = TokenKey::rsa("k");
    let answer = IssuerAnswer::Paths(vec![("/openid/v1/jwks", key_set(&[&key]))]);
    let server = IssuerServer::start_tls(answer, &authority.server());
    let url = format!("https://{}/openid/v1/jwks", server.address());
    let keys = format!("{{url: '{url}', ca_file: ca.crt, bearer_file: token}}");
    let corp = Corp::new(&fixture, "{file: keys.json}");
    corp.write("keys.json", &key_set(&[]));
    corp.write("ca.crt", authority.pem());
    corp.write("token", "hunter2\n");
    let kubernetes = format!("\n  kubernetes: {{issuer: cluster, audiences: [a], keys: {keys}}}");
    let text = corp.policy(&fixture, "{file: keys.json}");
    corp.write("policy.yaml", &text.replace("\nprincipals", &format!("{kubernetes}\nprincipals")));
    let proxy = corp.serve();
    proxy.ready().await;
    let client = proxy.client().await;
    let mut claims = testkit::issuer::claims(
        "cluster",
        "system:serviceaccount:orders:worker",
        std::time::Duration::from_secs(600),
    );
    claims["aud"] = json!(["a"]);
    claims["kubernetes.io"] =
        json!({ "namespace": "orders", "serviceaccount": { "name": "worker" } });
    is_accepted(&client, &fixture, &key.token("RS256", &claims)).await;
    let [request] = &server.requests()[..] else { panic!("{:?}", server.requests()) };
    assert!(request.contains("authorization: Bearer hunter2\r\n"), "{request}");
    assert!(!proxy.log().contains("hunter2"));
}
