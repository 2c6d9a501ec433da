//! `deploy/nats`: its command lines make what fetch-proxy can serve, its objects for NACK say the same,
//! and its configuration is one for nats-server.

use std::{fs, process::Command};

use async_nats::jetstream::stream::{DiscardPolicy, RetentionPolicy};
use serde_json::json;
use testkit::{
    jetstream::Fixture,
    nats_server::{NatsServer, binary},
    proxy::{Proxy, ack, fetch},
};

use crate::{
    helm::{one, parsed},
    tool,
};

const PAGE: &str = include_str!("../../deploy/nats/README.md");
const OBJECTS: &str = include_str!("../../deploy/nats/orders.yaml");

/// The first block of this kind on the page.
fn block(kind: &str) -> &'static str {
    PAGE.split(&format!("```{kind}\n")).nth(1).unwrap().split("```").next().unwrap()
}

/// The stream ORDERS with its consumer.
pub fn make_orders(server: &NatsServer) {
    run(block("sh"), server);
}

/// Runs the lines as they are, but for three servers, which are not here.
pub fn run(lines: &str, server: &NatsServer) {
    let cli = tool("FETCH_PROXY_TEST_NATS_CLI");
    let lines = lines
        .replace("--replicas 3", "--replicas 1")
        .replace("nats stream", "\"$CLI\" stream")
        .replace("nats consumer", "\"$CLI\" consumer");
    let mut shell = Command::new("sh");
    shell.args(["-ec", &lines]).env("CLI", cli.get_program()).env("NATS_URL", server.url());
    let output = shell.output().unwrap();
    assert!(output.status.success(), "{lines}\n{output:?}");
}

#[tokio::test]
async fn nats_commands_make_the_consumers_that_the_objects_describe() {
    let server = NatsServer::start();
    make_orders(&server);
    // Once more does no harm.
    make_orders(&server);

    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let fixture = Fixture { jetstream, stream: "ORDERS".into(), consumer: "worker".into() };
    fixture.jetstream.publish("orders.new", "1".into()).await.unwrap().await.unwrap();
    let proxy = Proxy::start(&server, &[]);
    let mut client = proxy.client().await;
    let answer = client.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner();
    client.ack(ack(&answer.messages[0].token)).await.unwrap();

    let objects = parsed(OBJECTS);
    let consumer = fixture.info().await.config;
    let made = json!({
        "streamName": "ORDERS",
        "durableName": consumer.durable_name,
        "deliverPolicy": "all",
        "ackPolicy": "explicit",
        "ackWait": format!("{}s", consumer.ack_wait.as_secs()),
        "maxDeliver": consumer.max_deliver,
        "maxAckPending": consumer.max_ack_pending,
    });
    assert_eq!(one(&objects, "Consumer")["spec"], made);
    let stream = fixture.jetstream.get_stream("ORDERS").await.unwrap().cached_info().config.clone();
    assert_eq!(stream.retention, RetentionPolicy::WorkQueue);
    assert_eq!(stream.discard, DiscardPolicy::New);
    let made = json!({
        "name": "ORDERS",
        "subjects": stream.subjects,
        "storage": "file",
        // A test with one server.
        "replicas": 3,
        "retention": "workqueue",
        "discard": "new",
        "maxAge": format!("{}h", stream.max_age.as_secs() / 3600),
        "duplicateWindow": format!("{}m", stream.duplicate_window.as_secs() / 60),
    });
    assert_eq!(one(&objects, "Stream")["spec"], made);
}

#[test]
fn configuration_is_valid_for_nats_server() {
    let folder = tempfile::tempdir().unwrap();
    let main = folder.path().join("nats.conf");
    for rights in ["one-consumer.conf", "many-consumers.conf"] {
        let text = block("conf").replace("one-consumer.conf", rights);
        fs::write(&main, text).unwrap();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/nats/");
        fs::copy(format!("{source}{rights}"), folder.path().join(rights)).unwrap();
        let mut server = Command::new(binary());
        server.arg("-t").arg("-c").arg(&main).env("FETCH_PROXY_PASSWORD", "secret");
        let output = server.output().unwrap();
        assert!(output.status.success(), "{rights}: {output:?}");
    }
}
