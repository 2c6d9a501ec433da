//! `deploy/keda`: the number that KEDA scales by is where the example says, and means what the page says.

use std::{
    io::{Read as _, Write as _},
    net::TcpStream,
};

use serde_json::Value;
use testkit::{
    jetstream::Fixture,
    nats_server::{NatsServer, binary},
    proxy::{Proxy, ack, fetch},
};

use crate::{
    helm::{one, parsed},
    nats,
};

/// The request of KEDA's scaler, and the fields that it adds up (nats_jetstream_scaler.go).
fn lag(monitoring: &str, trigger: &Value) -> u64 {
    let account = trigger["account"].as_str().unwrap();
    let path = format!("/jsz?acc={account}&consumers=true&config=true");
    let mut connection = TcpStream::connect(monitoring).unwrap();
    write!(connection, "GET {path} HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    connection.read_to_string(&mut answer).unwrap();
    let answer: Value = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
    let named = |all: &Value, name: &Value| {
        let found = all.as_array().unwrap().iter().find(|one| one["name"] == *name);
        found.unwrap_or_else(|| panic!("no {name} in {all}")).clone()
    };
    let account = named(&answer["account_details"], &trigger["account"]);
    let stream = named(&account["stream_detail"], &trigger["stream"]);
    let consumer = named(&stream["consumer_detail"], &trigger["consumer"]);
    consumer["num_pending"].as_u64().unwrap() + consumer["num_ack_pending"].as_u64().unwrap()
}

#[tokio::test]
async fn lag_counts_pending_and_leased_messages() {
    let objects = parsed(include_str!("../../deploy/keda/worker.yaml"));
    let trigger = &one(&objects, "ScaledObject")["spec"]["triggers"][0]["metadata"];
    let server = NatsServer::start_with(binary(), Some("http: \"127.0.0.1:-1\"".to_owned()));
    nats::make_orders(&server);
    let jetstream = async_nats::jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let fixture = Fixture { jetstream, stream: "ORDERS".into(), consumer: "worker".into() };
    for _ in 0..10 {
        fixture.jetstream.publish("orders.new", "1".into()).await.unwrap().await.unwrap();
    }
    let monitoring = server.monitoring();
    assert_eq!(lag(monitoring, trigger), 10);
    let proxy = Proxy::start(&server, &[]);
    let mut client = proxy.client().await;
    let leased = client.fetch(fetch(&fixture, 4, 10_000)).await.unwrap().into_inner().messages;
    assert_eq!(lag(monitoring, trigger), 10, "leased messages count");
    for message in &leased {
        client.ack(ack(&message.token)).await.unwrap();
    }
    assert_eq!(lag(monitoring, trigger), 10 - leased.len() as u64, "settled messages do not count");
}
