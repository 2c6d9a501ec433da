//! The identity of the proxy for NATS, in each form on a real server: a user and a password, a
//! token, credentials. Replaced credentials are used without a restart, as the page for operators
//! says.

use std::{collections::BTreeMap, fs};

use async_nats::ConnectOptions;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use nkeys::KeyPair;
use serde_json::{Value, json};
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::{NatsServer, binary},
    proxy::{Proxy, ack, fetch},
};

/// As soon as it is ready.
pub async fn fetches_and_acks(proxy: &Proxy, fixture: &Fixture) {
    proxy.ready().await;
    fixture.publish("n", "x").await;
    let mut client = proxy.client().await;
    let answer = client.fetch(fetch(fixture, 1, 10_000)).await.unwrap().into_inner();
    client.ack(ack(&answer.messages[0].token)).await.unwrap();
}

async fn refused(proxy: &Proxy) {
    eventually("the refusal", || async { proxy.log().contains("cannot be reached").then_some(()) })
        .await;
    let log = proxy.log();
    assert!(log.contains("authorization violation"), "{log}");
    assert!(!log.contains("secret"), "{log}");
}

/// A Secret that was made of a file has the file's last line break.
#[tokio::test]
async fn user_is_known_by_the_password() {
    let config = "authorization { users: [ { user: proxy, password: \"a secret\" } ] }";
    let server = NatsServer::start_with(binary(), Some(config.to_owned()));
    let options = ConnectOptions::with_user_and_password("proxy".into(), "a secret".into());
    let client = options.connect(server.url()).await.unwrap();
    let fixture = Fixture::of(client, self::config()).await;
    for password in ["a secret", "a secret\n", "a secret\r\n"] {
        let variables = [("NATS_USER", "proxy\n"), ("NATS_PASSWORD", password)];
        fetches_and_acks(&Proxy::start_with(&server.url(), &[], &variables), &fixture).await;
    }
    let url = server.url().replace("//", "//proxy:a%20secret@");
    fetches_and_acks(&Proxy::start_at(&url, &[]), &fixture).await;
    let variables = [("NATS_USER", "proxy"), ("NATS_PASSWORD", "another secret")];
    refused(&Proxy::start_with(&server.url(), &[], &variables)).await;
}

#[tokio::test]
async fn token_is_enough() {
    let config = "authorization { token: \"secret\" }";
    let server = NatsServer::start_with(binary(), Some(config.to_owned()));
    let client = ConnectOptions::with_token("secret".into()).connect(server.url()).await.unwrap();
    let fixture = Fixture::of(client, self::config()).await;
    for token in ["secret", "secret\n"] {
        let proxy = Proxy::start_with(&server.url(), &[], &[("NATS_TOKEN", token)]);
        fetches_and_acks(&proxy, &fixture).await;
    }
    let url = server.url().replace("//", "//secret@");
    fetches_and_acks(&Proxy::start_at(&url, &[]), &fixture).await;
    refused(&Proxy::start_with(&server.url(), &[], &[("NATS_TOKEN", "another secret")])).await;
}

/// When all JWTs were made, in seconds since the Unix epoch: an operator's may not change.
const ISSUED: u64 = 1_700_000_000;

/// An operator, and an account with JetStream.
struct Operator {
    operator: KeyPair,
    system: KeyPair,
    account: KeyPair,
}

impl Operator {
    fn new() -> Self {
        let account = KeyPair::new_account;
        Self { operator: KeyPair::new_operator(), system: account(), account: account() }
    }

    /// The server's configuration, with users of the account that are not let in any more.
    fn server(&self, revoked: &[&KeyPair]) -> String {
        let Self { operator, system, account } = self;
        let limits: Value = ["subs", "data", "payload", "imports", "exports", "conn", "leaf"]
            .into_iter()
            .chain(["mem_storage", "disk_storage", "streams", "consumer"])
            .map(|what| (what.to_owned(), json!(-1)))
            .collect();
        let mut without_storage = limits.clone();
        for what in ["mem_storage", "disk_storage", "streams", "consumer"] {
            without_storage.as_object_mut().unwrap().remove(what);
        }
        let revocations: BTreeMap<String, u64> =
            revoked.iter().map(|user| (user.public_key(), ISSUED)).collect();
        let ours = json!({ "type": "account", "version": 2, "limits": limits,
            "revocations": revocations });
        let theirs = json!({ "type": "account", "version": 2, "limits": without_storage });
        format!(
            "operator: {}\nsystem_account: {sys}\nresolver: MEMORY\n\
             resolver_preload: {{\n{sys}: {}\n{}: {}\n}}\n",
            jwt(operator, &operator.public_key(), &json!({ "type": "operator", "version": 2 })),
            jwt(operator, &system.public_key(), &theirs),
            account.public_key(),
            jwt(operator, &account.public_key(), &ours),
            sys = system.public_key(),
        )
    }

    /// The text of a credentials file.
    fn credentials(&self, user: &KeyPair) -> String {
        let rights = json!({ "type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1 });
        let jwt = jwt(&self.account, &user.public_key(), &rights);
        let seed = user.seed().unwrap();
        format!(
            "-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        )
    }
}

/// A signed statement of `issuer` about `subject`.
fn jwt(issuer: &KeyPair, subject: &str, nats: &Value) -> String {
    let claims = json!({ "jti": "test", "iat": ISSUED, "iss": issuer.public_key(), "name": "test",
        "sub": subject, "nats": nats });
    let header = json!({ "typ": "JWT", "alg": "ed25519-nkey" });
    let encoded = |part: &[u8]| URL_SAFE_NO_PAD.encode(part);
    let text = [&header, &claims].map(|part| encoded(part.to_string().as_bytes())).join(".");
    let signature = encoded(&issuer.sign(text.as_bytes()).unwrap());
    format!("{text}.{signature}")
}

#[tokio::test]
async fn replaced_credentials_are_used_without_a_restart() {
    let operator = Operator::new();
    let [admin, old, new] = [0; 3].map(|_| KeyPair::new_user());
    let server = NatsServer::start_with(binary(), Some(operator.server(&[])));
    let options = ConnectOptions::with_credentials(&operator.credentials(&admin)).unwrap();
    let client = options.connect(server.url()).await.unwrap();
    let fixture = Fixture::of(client, config()).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), operator.credentials(&old)).unwrap();
    let proxy = Proxy::start(&server, &["--nats-creds", file.path().to_str().unwrap()]);
    fetches_and_acks(&proxy, &fixture).await;

    fs::write(file.path(), operator.credentials(&new)).unwrap();
    server.configure(&operator.server(&[&old]));
    let connected = || async {
        let made = proxy.log().matches("connected to NATS").count();
        (made == 4).then_some(())
    };
    eventually("both connections to be replaced", connected).await;
    fetches_and_acks(&proxy, &fixture).await;
}

/// A read of such a file never ends. The one thread of the process would do nothing else.
#[tokio::test]
async fn hanging_seed_file_delays_the_connection_only() {
    let (folder, pair) = (tempfile::tempdir().unwrap(), KeyPair::new_user());
    let (file, pipe) = (folder.path().join("nkey"), folder.path().join("pipe"));
    fs::write(&file, pair.seed().unwrap()).unwrap();
    let config = format!("authorization {{ users: [ {{ nkey: {} }} ] }}", pair.public_key());
    let mut server = NatsServer::start_with(binary(), Some(config));
    let flags = ["--nats-nkey", file.to_str().unwrap()];
    let proxy = Proxy::start_at(&server.url(), &flags);
    proxy.ready().await;
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    fs::rename(&pipe, &file).unwrap();
    server.stop();
    server.restart();
    let told = || async { proxy.log().contains("it is not a regular file").then_some(()) };
    eventually("the reason", told).await;
    let patience = std::time::Duration::from_secs(5);
    assert!(fetch_proxy::client::probe(&proxy.ops, "liveness", patience).await.unwrap().1);
    let well = folder.path().join("well");
    fs::write(&well, pair.seed().unwrap()).unwrap();
    fs::rename(&well, &file).unwrap();
    let connected = || proxy.log().matches("connected to NATS").count();
    eventually("both connections", || async { (connected() >= 4).then_some(()) }).await;
}
