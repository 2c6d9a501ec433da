//! Calls for operators: at the admin socket always, at the client port with a policy alone. And whether tools
//! can read the contract.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, net::UnixListener},
    process::Command,
};

use fetch_proxy::{
    access::NewApiKey,
    pb::{WhoAmIRequest, admin_service_client::AdminServiceClient},
};
use serde_json::Value;
use tempfile::TempDir;
use testkit::{
    nats_server::NatsServer,
    proxy::{Proxy, reason, with_key},
};
use tonic::Code;

/// A policy file with the principal `orders`, and two keys: one of it, and one of nobody.
struct Policy {
    folder: TempDir,
    orders: String,
    nobody: String,
}

impl Policy {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [orders, nobody] =
            ["orders-1", "nobody"].map(|name| NewApiKey::random(name).unwrap().unwrap());
        let ends = format!("{} expires=2100-01-31T00:00:00Z", orders.line);
        fs::write(folder.path().join("keys"), format!("{ends}\n{}\n", nobody.line)).unwrap();
        let policy = "version: 1\n\
                      authenticate: {api_keys: {file: keys}}\n\
                      principals: [{name: orders, match: ['key:orders-*']}]\n\
                      rules:\n\
                      - {principals: [orders], streams: [A], consumers: ['*'], verbs: [work]}\n\
                      - {principals: ['*'], streams: [B], consumers: ['*'], verbs: [inspect]}\n";
        fs::write(folder.path().join("policy"), policy).unwrap();
        fs::write(folder.path().join("orders"), &orders.secret).unwrap();
        Self { folder, orders: orders.secret, nobody: nobody.secret }
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }
}

/// Whether `whoami` succeeded, and what it wrote.
fn who_am_i(flags: &[&str]) -> (bool, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
    let output = command.arg("whoami").args(flags).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// Starts a replica that ends at once. Returns its exit code and its log.
fn refused(flags: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
    command.args(["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"]);
    let output = command.args(flags).output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

fn own_identity() -> String {
    format!("local:{}", rustix::process::geteuid().as_raw())
}

#[tokio::test]
async fn admin_socket_answers_the_own_user_without_a_policy() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let (well, text) = who_am_i(&["--ops-listen", &proxy.ops]);
    assert!(well, "{text}");
    for line in [&*format!("identity   {}", own_identity()), "verbs      inspect, admin"] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
    let (well, text) = who_am_i(&["--ops-listen", &proxy.ops, "--json"]);
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert!(well && answer["identity"] == own_identity().as_str(), "{answer}");
    assert_eq!(answer["policyDigest"], Value::Null);
}

#[tokio::test]
async fn client_port_answers_operators_with_a_policy_alone() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let channel = async |proxy: &Proxy| {
        AdminServiceClient::connect(format!("http://{}", proxy.grpc)).await.unwrap()
    };
    let refused = channel(&proxy).await.who_am_i(WhoAmIRequest {}).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::PermissionDenied, "NOT_ALLOWED".to_owned()));

    let policy = Policy::new();
    let proxy = Proxy::start(NatsServer::shared(), &["--policy-file", &policy.path("policy")]);
    let mut client = channel(&proxy).await;
    let refused = client.who_am_i(WhoAmIRequest {}).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::Unauthenticated, "UNAUTHENTICATED".to_owned()));
    let mut ask = async |key: &str| {
        client.who_am_i(with_key(key, WhoAmIRequest {})).await.unwrap().into_inner()
    };
    let orders = ask(&policy.orders).await;
    assert_eq!((&*orders.identity, &*orders.principal), ("key:orders-1", "orders"));
    assert_eq!(orders.verbs, ["fetch", "settle", "extend", "inspect"]);
    assert_eq!(orders.credential_expire_time.unwrap().seconds, 4_105_036_800);
    assert_eq!(orders.policy_digest.len(), 16);
    let nobody = ask(&policy.nobody).await;
    assert_eq!((&*nobody.identity, &*nobody.principal), ("key:nobody", ""));
    assert_eq!((nobody.verbs, nobody.credential_expire_time), (Vec::new(), None));
}

#[tokio::test]
async fn whoami_shows_what_a_credential_may_do() {
    let policy = Policy::new();
    let proxy = Proxy::start(NatsServer::shared(), &["--policy-file", &policy.path("policy")]);
    let (well, text) = who_am_i(&["--addr", &proxy.grpc, "--token-file", &policy.path("orders")]);
    assert!(well, "{text}");
    for line in [
        "identity   key:orders-1",
        "principal  orders",
        "verbs      fetch, settle, extend, inspect",
        "good until 2100-01-31T00:00:00.000Z",
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
    let (well, text) = who_am_i(&["--addr", &proxy.grpc]);
    assert!(!well && text.contains("UNAUTHENTICATED"), "{text}");
}

#[tokio::test]
async fn admin_socket_is_a_file_of_its_user_and_goes_with_the_process() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("admin");
    let name = file.to_str().unwrap();
    // A process that was killed leaves its file behind.
    drop(UnixListener::bind(&file).unwrap());
    let mut proxy = Proxy::start(NatsServer::shared(), &["--admin-socket", name]);
    let (well, text) = who_am_i(&["--admin-socket", name]);
    assert!(well, "{text}");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let (code, log) = refused(&["--admin-socket", name]);
    assert!(code == Some(1) && log.contains("cannot listen on the admin socket"), "{log}");
    proxy.signal("TERM");
    assert!(proxy.wait().await.success());
    assert!(!file.exists());
}

#[tokio::test]
async fn socket_that_is_off_or_taken_ends_nothing() {
    let off = Proxy::start(NatsServer::shared(), &["--admin-socket", "off"]);
    let (well, text) = who_am_i(&["--ops-listen", &off.ops]);
    assert!(!well && text.contains("cannot connect to the admin socket"), "{text}");
    let (code, log) = refused(&["--admin-socket", "@"]);
    assert!(code == Some(2) && log.contains("a name is missing"), "{log}");
}

#[test]
fn contract_is_shown_to_tools_unless_reflection_is_off() {
    let binary = std::env::var_os("FETCH_PROXY_TEST_GRPCURL").unwrap_or_else(|| "grpcurl".into());
    let list = |proxy: &Proxy| {
        let mut command = Command::new(&binary);
        let output = command.args(["-plaintext", &proxy.grpc, "list"]).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(text).unwrap())
    };
    let (well, text) = list(&Proxy::start(NatsServer::shared(), &[]));
    assert!(well && text.contains("fetchproxy.v1.AdminService"), "{text}");
    let (well, text) = list(&Proxy::start(NatsServer::shared(), &["--reflection", "off"]));
    assert!(!well && text.contains("does not support the reflection API"), "{text}");
}
