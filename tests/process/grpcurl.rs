//! By hand, with grpcurl: describe, fetch, settle, and errors that can be read.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Output, Stdio},
};

use testkit::{
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::Proxy,
};

fn grpcurl(proxy: &Proxy, arguments: &[&str], target: &[&str]) -> Output {
    let binary = std::env::var_os("FETCH_PROXY_TEST_GRPCURL").unwrap_or_else(|| "grpcurl".into());
    let mut command = Command::new(binary);
    command.arg("-plaintext").args(arguments).arg(&proxy.grpc).args(target);
    command.output().expect("grpcurl, which `make test` installs")
}

fn call(proxy: &Proxy, method: &str, request: &serde_json::Value) -> serde_json::Value {
    let method = format!("fetchproxy.v1.FetchService/{method}");
    let output = grpcurl(proxy, &["-d", &request.to_string()], &[&method]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test]
async fn grpcurl_describes_fetches_and_settles() {
    let fixture = Fixture::new(config()).await;
    fixture.publish("a", "hello").await;
    fixture.publish("b", "again").await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);

    let listed = grpcurl(&proxy, &[], &["list"]);
    let listed = String::from_utf8(listed.stdout).unwrap();
    for service in ["fetchproxy.v1.FetchService", "grpc.health.v1.Health"] {
        assert!(listed.contains(service), "{service} is not in:\n{listed}");
    }
    let described = grpcurl(&proxy, &[], &["describe", "fetchproxy.v1.FetchRequest"]);
    let described = String::from_utf8(described.stdout).unwrap();
    assert!(
        described.contains("max_wait") && described.contains("//"),
        "no comments:\n{described}"
    );

    let request = serde_json::json!({
        "stream": fixture.stream, "consumer": fixture.consumer, "n": 2, "codec": "CODEC_AUTO",
        "max_wait": "5s", "lease": "600s",
    });
    let answer = call(&proxy, "Fetch", &request);
    let messages = answer["messages"].as_array().unwrap();
    assert_eq!(messages[0]["text"], "hello");
    let token = |place: usize| messages[place]["token"].as_str().unwrap();

    let acked = call(&proxy, "Ack", &serde_json::json!({ "token": token(0) }));
    assert_eq!(acked["outcome"], "OUTCOME_CONFIRMED");
    let extended =
        call(&proxy, "Extend", &serde_json::json!({ "token": token(1), "lease": "60s" }));
    assert!(extended["leaseExpireTime"].is_string());
    let nacked = call(&proxy, "Nak", &serde_json::json!({ "token": token(1), "delay": "1s" }));
    assert!(nacked["redeliverTime"].is_string());
    let health = grpcurl(&proxy, &[], &["grpc.health.v1.Health/Check"]);
    assert!(String::from_utf8(health.stdout).unwrap().contains("SERVING"));
}

/// Frames are written while the stream is open, as a person would.
#[tokio::test]
async fn grpcurl_drives_a_stream_by_hand() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(2).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let binary = std::env::var_os("FETCH_PROXY_TEST_GRPCURL").unwrap_or_else(|| "grpcurl".into());
    let mut grpcurl = Command::new(binary)
        .args(["-plaintext", "-d", "@", &proxy.grpc, "fetchproxy.v1.FetchService/Consume"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = grpcurl.stdin.take().unwrap();
    let mut output = BufReader::new(grpcurl.stdout.take().unwrap()).lines();
    let mut until = |text: &str| {
        let found = output.by_ref().map(Result::unwrap).any(|line| line.contains(text));
        assert!(found, "no {text}");
    };
    let start = serde_json::json!({ "stream": fixture.stream, "consumer": fixture.consumer });
    writeln!(input, "{}", serde_json::json!({ "start": start })).unwrap();
    for number in ["1", "2"] {
        until(&format!("\"number\": \"{number}\""));
        let settlements = serde_json::json!([{ "number": number, "ack": {} }]);
        let settle = serde_json::json!({ "settle": { "id": number, "settlements": settlements } });
        writeln!(input, "{settle}").unwrap();
    }
    until("OUTCOME_CONFIRMED");
    drop(input);
    output.for_each(drop);
    assert!(grpcurl.wait().unwrap().success());
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[test]
fn grpcurl_decodes_error_details() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let target = ["fetchproxy.v1.FetchService/Ack"];
    let output = grpcurl(&proxy, &["-d", r#"{"token":"nonsense"}"#], &target);
    assert_eq!(output.status.code(), Some(64 + 3), "INVALID_ARGUMENT");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("google.rpc.ErrorInfo") && said.contains("TOKEN_INVALID"), "{said}");
}
