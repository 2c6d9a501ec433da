//! Calls with tokens at a whole proxy, and a policy with one issuer for these tests.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use fetch_proxy::pb::Outcome;
use tempfile::TempDir;
use testkit::{
    eventually,
    issuer::{TokenKey, claims, key_set},
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch, reason, with_key},
};
use tonic::Status;
use tonic_types::StatusExt as _;

const ISSUER: &str = "https://login.example/";

pub(super) fn detail(status: &Status, name: &str) -> Option<String> {
    status.get_details_error_info().unwrap().metadata.get(name).cloned()
}

/// A folder with a policy that accepts tokens of one issuer.
pub(super) struct Corp(TempDir);

impl Corp {
    /// The keys of the issuer are there.
    pub(super) fn new(fixture: &Fixture, keys: &str) -> Self {
        let corp = Self(tempfile::tempdir().unwrap());
        corp.write("api-keys", "");
        corp.write("policy.yaml", &corp.policy(fixture, keys));
        corp
    }

    /// All tokens are of one principal, which may do everything.
    pub(super) fn policy(&self, fixture: &Fixture, keys: &str) -> String {
        let (stream, consumer) = (&fixture.stream, &fixture.consumer);
        format!(
            "version: 1\n\
             authenticate:\n  \
             api_keys: {{file: api-keys}}\n  \
             jwt:\n  \
             - name: corp\n    \
             issuer: {ISSUER}\n    \
             audiences: [fetch-proxy]\n    \
             keys: {keys}\n    \
             clock_skew: 0s\n\
             principals: [{{name: all, match: ['*']}}]\n\
             rules: [{{principals: [all], streams: [{stream}], consumers: [{consumer}], verbs: [work]}}]\n"
        )
    }

    pub(super) fn write(&self, name: &str, text: &str) {
        let part = self.0.path().join("part");
        fs::write(&part, text).unwrap();
        fs::rename(part, self.0.path().join(name)).unwrap();
    }

    pub(super) fn with_api_key(&self, line: &str) {
        self.write("api-keys", line);
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("policy.yaml")
    }

    pub(super) fn serve(&self) -> Proxy {
        Proxy::start(NatsServer::shared(), &["--policy-file", self.file().to_str().unwrap()])
    }

    /// A new key, and a token by it.
    pub(super) fn token(&self, subject: &str) -> (TokenKey, String) {
        let key = TokenKey::p256("k");
        let token = self.token_by(&key, subject);
        (key, token)
    }

    pub(super) fn token_by(&self, key: &TokenKey, subject: &str) -> String {
        key.token("ES256", &claims(ISSUER, subject, Duration::from_secs(600)))
    }
}

#[tokio::test]
async fn worker_with_a_token_fetches_and_settles_and_its_token_is_never_shown() {
    let fixture = Fixture::new(config()).await;
    let corp = Corp::new(&fixture, "{file: keys.json}");
    let (key, token) = corp.token("svc");
    corp.write("keys.json", &key_set(&[&key]));
    let text = corp.policy(&fixture, "{file: keys.json}");
    corp.write("policy.yaml", &text.replace("['*']", "['jwt:corp/svc']"));
    let proxy = corp.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    fixture.publish("n", "x").await;
    let answer = client.fetch(with_key(&token, fetch(&fixture, 1, 10_000))).await.unwrap();
    let held = answer.into_inner().messages[0].token.clone();
    // A new token of the same subject is the same principal.
    let renewed = corp.token_by(&key, "svc");
    let acked = client.ack(with_key(&renewed, ack(&held))).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed);
    let other = corp.token_by(&key, "other");
    let refused = client.fetch(with_key(&other, fetch(&fixture, 1, 0))).await.unwrap_err();
    assert_eq!(reason(&refused).1, "NOT_ALLOWED");
    let log = proxy.log();
    for token in [token, renewed, other] {
        let (_, signature) = token.rsplit_once('.').unwrap();
        assert!(!log.contains(signature), "a token is in the log");
    }
}

#[tokio::test]
async fn fetch_ends_with_its_token_and_so_does_the_connection_that_knows_it() {
    let fixture = Fixture::new(config()).await;
    let corp = Corp::new(&fixture, "{file: keys.json}");
    let key = TokenKey::p256("k");
    corp.write("keys.json", &key_set(&[&key]));
    let proxy = corp.serve();
    proxy.ready().await;
    let mut client = proxy.client().await;
    let token = key.token("ES256", &claims(ISSUER, "svc", Duration::from_secs(4)));
    client.fetch(with_key(&token, fetch(&fixture, 1, 0))).await.unwrap();
    let begun = Instant::now();
    let answer = client.fetch(with_key(&token, fetch(&fixture, 1, 60_000))).await.unwrap();
    assert!(answer.into_inner().messages.is_empty());
    // Long before its wait is over.
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    eventually("the end of the token", || {
        let (mut client, request) = (client.clone(), with_key(&token, fetch(&fixture, 1, 0)));
        async move {
            let refused = client.fetch(request).await.err()?;
            (detail(&refused, "why").as_deref() == Some("expired")).then_some(())
        }
    })
    .await;
}
