//! `deploy/compose.yaml`, and `deploy/compose.tls.yaml` on top of it: valid by the specification's own
//! reader; and what they say of their services is run here, as processes.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use serde_json::Value;
use testkit::{
    authority::Authority,
    eventually,
    jetstream::Fixture,
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch},
};

use crate::{nats, tool};

/// The file as Compose understands it.
fn services() -> BTreeMap<String, Value> {
    merged(&["compose.yaml"])
}

/// These files as Compose understands them, each on top of the one before.
fn merged(files: &[&str]) -> BTreeMap<String, Value> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    let mut reader = tool("FETCH_PROXY_TEST_COMPOSE_SPEC");
    let output = reader.args(["-format", "json"]).args(files).current_dir(folder).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut model: Value = serde_json::from_slice(&output.stdout).unwrap();
    serde_json::from_value(model["services"].take()).unwrap()
}

fn words(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect()
}

/// The variables of a service. Where files are merged, the reader writes a list.
fn variables(service: &Value) -> BTreeMap<String, String> {
    let environment = &service["environment"];
    let pair = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
    match environment.as_array() {
        Some(list) => {
            list.iter().map(|line| pair(line.as_str().unwrap().split_once('=').unwrap())).collect()
        }
        None => {
            let variables = environment.as_object().unwrap().iter();
            variables.map(|(name, value)| pair((name, value.as_str().unwrap()))).collect()
        }
    }
}

/// The settings of a proxy, as flags. The files are here, not in a container: `here` is a path in the
/// container, and the path that takes its place.
fn flags(service: &Value, here: &[(&str, &str)]) -> Vec<String> {
    let variables = variables(service);
    assert_eq!(variables["NATS_URL"], "nats://nats:4222");
    let secret = &service["secrets"][0];
    assert_eq!(variables["FETCH_PROXY_TOKEN_KEY_FILE"], secret["target"].as_str().unwrap());
    let settings = variables.iter().filter_map(|(name, value)| {
        let name = name.strip_prefix("FETCH_PROXY_")?;
        let value = here.iter().fold(value.clone(), |value, (from, to)| value.replace(from, to));
        let flag = format!("--{}", name.to_lowercase().replace('_', "-"));
        Some(match &*value {
            "true" => vec![flag],
            "false" => Vec::new(),
            _ => vec![flag, value],
        })
    });
    settings.flatten().collect()
}

#[tokio::test]
async fn compose_services_run_and_share_their_tokens() {
    let services = services();
    let nats = words(&services["nats"]["command"]);
    // The flags of every test server, apart from its folder and its port.
    assert_eq!(nats, ["--jetstream", "--store_dir", "/data", "--http_port", "8222"]);
    let server = NatsServer::start();
    let [sh, ec, lines] = words(&services["tasks"]["command"])[..] else {
        panic!("not three words")
    };
    assert_eq!((sh, ec), ("sh", "-ec"));
    // Twice, as when the laptop has been closed in between.
    nats::run(lines, &server);
    nats::run(lines, &server);

    let keys = tempfile::NamedTempFile::new().unwrap();
    let made = Command::new(env!("CARGO_BIN_EXE_fetch-proxy")).arg("keygen").output().unwrap();
    fs::write(keys.path(), made.stdout).unwrap();
    let start = |name: &str| {
        let keys = ("/run/secrets/token-keys", keys.path().to_str().unwrap());
        let flags = flags(&services[name], &[keys]);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Proxy::start(&server, &flags)
    };
    let proxies = [start("fetch-proxy-1"), start("fetch-proxy-2")];
    for proxy in &proxies {
        proxy.ready().await;
    }

    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    jetstream.publish("tasks.first", "1".into()).await.unwrap().await.unwrap();
    let fixture = Fixture { jetstream, stream: "TASKS".into(), consumer: "batch-worker".into() };
    let mut first = proxies[0].client().await;
    let answer = first.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
    let mut second = proxies[1].client().await;
    second.ack(ack(&answer.messages[0].token)).await.unwrap();
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

/// Nothing of it is for others on the network, and a proxy has time to drain.
#[test]
fn compose_proxies_listen_on_loopback_and_end_cleanly() {
    for (name, service) in services() {
        let none = Vec::new();
        for port in service["ports"].as_array().unwrap_or(&none) {
            assert_eq!(port["host_ip"], "127.0.0.1", "{name}");
        }
        if name.starts_with("fetch-proxy") {
            assert_eq!(service["stop_grace_period"], "30s", "{name}: 20 s and 8 s to end");
            assert_eq!(words(&service["healthcheck"]["test"]), ["CMD", "/fetch-proxy", "probe"]);
            assert_eq!(
                (&service["read_only"], words(&service["cap_drop"])),
                (&true.into(), vec!["ALL"])
            );
        }
    }
}

#[tokio::test]
async fn compose_proxies_with_tls_ask_for_a_certificate() {
    let services = merged(&["compose.yaml", "compose.tls.yaml"]);
    let folder = tempfile::tempdir().unwrap();
    let ca = Authority::new("ca");
    fs::write(folder.path().join("ca.crt"), ca.pem()).unwrap();
    ca.server().write(folder.path(), "server");
    ca.client("worker").write(folder.path(), "worker");
    let file = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let made = Command::new(env!("CARGO_BIN_EXE_fetch-proxy")).arg("keygen").output().unwrap();
    fs::write(file("token-keys"), made.stdout).unwrap();
    for name in ["fetch-proxy-1", "fetch-proxy-2"] {
        let mount = &services[name]["volumes"][0];
        assert_eq!((&mount["target"], &mount["read_only"]), (&"/run/tls".into(), &true.into()));
        assert!(mount["source"].as_str().unwrap().ends_with("/deploy/tls"), "{mount}");
        let (keys, tls) = (file("token-keys"), file(""));
        let here = [("/run/secrets/token-keys", &*keys), ("/run/tls/", &*tls)];
        let flags = flags(&services[name], &here);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let server = NatsServer::start();
        let proxy = Proxy::start(&server, &flags);
        let probe = |identity: bool| {
            let mut probe = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
            probe.args(["probe", "--timeout", "1s", "--addr", &format!("https://{}", proxy.grpc)]);
            probe.args(["--ca", &file("ca.crt")]);
            if identity {
                probe.args(["--cert", &file("worker.crt"), "--key", &file("worker.key")]);
            }
            String::from_utf8(probe.output().unwrap().stdout).unwrap()
        };
        eventually("health", || async { (probe(true).trim() == "SERVING").then_some(()) }).await;
        assert_eq!(probe(false), "", "{name} serves a client without a certificate");
    }
}
