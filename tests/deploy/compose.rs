//! `deploy/compose.yaml`: valid by the specification's own reader; and what it says of its services is
//! run here, as processes.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use serde_json::Value;
use testkit::{
    jetstream::Fixture,
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch},
};

use crate::{nats, tool};

/// The file as Compose understands it.
fn services() -> BTreeMap<String, Value> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
    let mut reader = tool("FETCH_PROXY_TEST_COMPOSE_SPEC");
    let output = reader.args(["-format", "json", "compose.yaml"]).current_dir(folder).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut model: Value = serde_json::from_slice(&output.stdout).unwrap();
    serde_json::from_value(model["services"].take()).unwrap()
}

fn words(value: &Value) -> Vec<&str> {
    value.as_array().unwrap().iter().map(|word| word.as_str().unwrap()).collect()
}

/// The settings of a proxy, as flags; its key file is here, not in a container.
fn flags(service: &Value, keys: &str) -> Vec<String> {
    let environment = service["environment"].as_object().unwrap();
    assert_eq!(environment["NATS_URL"], "nats://nats:4222");
    let secret = &service["secrets"][0];
    assert_eq!(environment["FETCH_PROXY_TOKEN_KEY_FILE"], secret["target"]);
    let settings = environment.iter().filter_map(|(name, value)| {
        let name = name.strip_prefix("FETCH_PROXY_")?;
        let value = if name == "TOKEN_KEY_FILE" { keys } else { value.as_str().unwrap() };
        Some([format!("--{}", name.to_lowercase().replace('_', "-")), value.to_owned()])
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
        let flags = flags(&services[name], keys.path().to_str().unwrap());
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
