//! The client commands, as an operator types them.

use std::process::{Command, Output};

use serde_json::Value;

use crate::support::{
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::Proxy,
};

struct Hand {
    fixture: Fixture,
    proxy: Proxy,
}

impl Hand {
    async fn new() -> Self {
        let fixture = Fixture::new(config()).await;
        Self { fixture, proxy: Proxy::start(NatsServer::shared(), &[]) }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
        command.args(arguments).args(["--addr", &self.proxy.grpc]).output().unwrap()
    }

    /// What it printed, and its exit code.
    fn said(&self, arguments: &[&str]) -> (String, i32) {
        let output = self.run(arguments);
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (text, output.status.code().unwrap())
    }

    fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The tokens of so many messages.
    fn taken(&self, count: &str) -> Vec<String> {
        let Fixture { stream, consumer, .. } = &self.fixture;
        let answer = self.json(&["fetch", stream, consumer, "-n", count, "--lease", "5m"]);
        let messages = answer["messages"].as_array().unwrap();
        messages.iter().map(|message| message["token"].as_str().unwrap().to_owned()).collect()
    }
}

#[tokio::test]
async fn a_round_by_hand() {
    let hand = Hand::new().await;
    let Fixture { stream, consumer, .. } = &hand.fixture;
    hand.fixture.publish("new", r#"{"id":1}"#).await;
    let (text, code) = hand.said(&["fetch", stream, consumer]);
    assert_eq!(code, 0, "{text}");
    for word in [&*format!("{stream}.new"), "sequence 1, attempt 1", r#"{"id":1}"#, "0 more"] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
    let token = text.lines().skip_while(|line| !line.contains("by this token")).nth(1).unwrap();

    let (text, code) = hand.said(&["extend", token, "--lease", "10m"]);
    assert!(code == 0 && text.starts_with("EXTENDED, yours until 20"), "{text}");
    assert_eq!(hand.said(&["ack", token]), ("CONFIRMED\n".to_owned(), 0));
    assert_eq!(hand.said(&["ack", token]), ("DUPLICATE\n".to_owned(), 0));
    let (text, code) = hand.said(&["nak", token]);
    assert!(code == 1 && text.starts_with("LEASE_SETTLED: "), "{text}");
    let (text, code) = hand.said(&["fetch", stream, consumer, "--max-wait", "0s"]);
    assert!(code == 0 && text.starts_with("no messages: there is nothing"), "{text}");
}

#[tokio::test]
async fn several_at_once_and_for_programs() {
    let hand = Hand::new().await;
    hand.fixture.publish_many(4).await;
    let tokens = hand.taken("4");
    let [acked, nacked, terminated, wrong] = &tokens[..] else { panic!("{tokens:?}") };
    assert_eq!(hand.json(&["ack", acked])[0]["outcome"], "CONFIRMED");
    let answer = hand.json(&["nak", nacked, "--delay", "1h"]);
    assert!(answer[0]["redeliver_time"].as_str().unwrap().starts_with("20"), "{answer}");
    let answer = hand.json(&["term", terminated, wrong, "--reason", "not ours"]);
    assert_eq!(answer.as_array().unwrap().len(), 2);
    let answer = hand.json(&["ack", acked, wrong]);
    assert_eq!(answer[0]["outcome"], "DUPLICATE");
    assert_eq!(answer[1]["error"], "LEASE_SETTLED");
}

#[tokio::test]
async fn bytes_that_are_no_text_and_what_fails_its_codec_are_shown() {
    let hand = Hand::new().await;
    let Fixture { stream, consumer, .. } = &hand.fixture;
    hand.fixture.publish("bytes", vec![0xff, 0xfe]).await;
    let (text, _) = hand.said(&["fetch", stream, consumer]);
    assert!(text.contains("2 bytes, in base64: //4="), "{text}");
    hand.fixture.publish("json", "{").await;
    let (text, code) = hand.said(&["fetch", stream, consumer, "--codec", "json"]);
    assert!(code == 0 && text.contains("sequence 2: rejected, "), "{text}");
}

#[test]
fn nobody_there_is_said_and_fails() {
    let output = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
        .args(["ack", "x", "--addr", "127.0.0.1:1"])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.contains("127.0.0.1:1") && stderr.contains("refused"), "{stderr}");
}

#[tokio::test]
async fn what_the_service_refuses_is_said_by_its_reason() {
    let hand = Hand::new().await;
    let (text, code) = hand.said(&["fetch", &hand.fixture.stream, "nobody"]);
    assert!(code == 1 && text.starts_with("error: CONSUMER_NOT_FOUND: "), "{text}");
    let (text, code) = hand.said(&["ack", "nonsense"]);
    assert!(code == 1 && text.starts_with("TOKEN_INVALID: "), "{text}");
}
