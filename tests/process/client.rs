//! The client commands, as an operator types them.

use std::{
    collections::BTreeSet,
    process::{Command, Output},
};

use prost::Message as _;
use serde_json::Value;
use testkit::{
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::Proxy,
};

struct ClientRun {
    fixture: Fixture,
    proxy: Proxy,
}

impl ClientRun {
    async fn new() -> Self {
        let fixture = Fixture::new(config()).await;
        Self { fixture, proxy: Proxy::start(NatsServer::shared(), &[]) }
    }

    fn run(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
        command.args(arguments).args(["--addr", &self.proxy.grpc]).output().unwrap()
    }

    /// Its output and its exit code.
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
async fn fetch_and_ack_work_by_hand() {
    let client = ClientRun::new().await;
    let Fixture { stream, consumer, .. } = &client.fixture;
    client.fixture.publish("new", r#"{"id":1}"#).await;
    let (text, code) = client.said(&["fetch", stream, consumer]);
    assert_eq!(code, 0, "{text}");
    for word in [&*format!("{stream}.new"), "sequence 1, attempt 1", r#"{"id":1}"#, "0 more"] {
        assert!(text.contains(word), "{word} is not in:\n{text}");
    }
    let token = text.lines().skip_while(|line| !line.contains("with this token")).nth(1).unwrap();

    let (text, code) = client.said(&["extend", token, "--lease", "10m"]);
    assert!(code == 0 && text.starts_with("EXTENDED, leased to you until 20"), "{text}");
    assert_eq!(client.said(&["ack", token]), ("CONFIRMED\n".to_owned(), 0));
    assert_eq!(client.said(&["ack", token]), ("DUPLICATE\n".to_owned(), 0));
    let (text, code) = client.said(&["nak", token]);
    assert!(code == 1 && text.starts_with("LEASE_SETTLED: "), "{text}");
    let (text, code) = client.said(&["fetch", stream, consumer, "--max-wait", "0s"]);
    assert!(code == 0 && text.starts_with("no messages: there is nothing"), "{text}");
}

#[tokio::test]
async fn address_of_a_command_comes_from_the_variable_of_clients_and_else_from_the_service() {
    let client = ClientRun::new().await;
    client.proxy.ready().await;
    let Fixture { stream, consumer, .. } = &client.fixture;
    let fetch = ["fetch", stream, consumer, "--max-wait", "0s"];
    let (here, nowhere) = (&*client.proxy.grpc, "127.0.0.1:1");
    let (listen, ops) = ("FETCH_PROXY_LISTEN", "FETCH_PROXY_OPS_LISTEN");
    for (arguments, variables, code) in [
        (&fetch[..], &[("FETCH_PROXY_ADDR", here), (listen, nowhere)][..], 0),
        (&fetch, &[("FETCH_PROXY_ADDR", nowhere), (listen, here)], 1),
        (&fetch, &[(listen, here)], 0),
        (&["ack", "x"], &[("FETCH_PROXY_ADDR", here), (listen, nowhere)], 1),
        (&["probe"], &[("FETCH_PROXY_ADDR", here), (ops, nowhere)], 0),
        (&["probe", "--timeout", "1s"], &[("FETCH_PROXY_ADDR", nowhere), (ops, here)], 1),
        (&["probe"], &[(ops, &client.proxy.ops)], 0),
    ] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
        let output = command.args(arguments).envs(variables.iter().copied()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(code), "{arguments:?} {variables:?}: {said}");
        let asked = arguments[0] != "ack" || said.contains("TOKEN_INVALID");
        assert!(asked, "{said}");
    }
}

#[tokio::test]
async fn several_tokens_and_json_work_by_hand() {
    let client = ClientRun::new().await;
    client.fixture.publish_many(4).await;
    let tokens = client.taken("4");
    let [acked, nacked, terminated, wrong] = &tokens[..] else { panic!("{tokens:?}") };
    assert_eq!(client.json(&["ack", acked])["results"][0]["outcome"], "OUTCOME_CONFIRMED");
    let answer = client.json(&["nak", nacked, "--delay", "1h"]);
    let again = answer["results"][0]["redeliverTime"].as_str().unwrap();
    assert!(again.starts_with("20"), "{answer}");
    let answer = client.json(&["term", terminated, wrong, "--reason", "not ours"]);
    assert_eq!(answer["results"].as_array().unwrap().len(), 2);
    let answer = client.json(&["ack", acked, wrong]);
    assert_eq!(answer["results"][0]["outcome"], "OUTCOME_DUPLICATE");
    assert_eq!(answer["results"][1]["error"]["reason"], "LEASE_SETTLED");
}

#[tokio::test]
async fn fetch_is_repeated_and_given_back_by_hand() {
    let client = ClientRun::new().await;
    client.fixture.publish_many(1).await;
    let Fixture { stream, consumer, .. } = &client.fixture;
    let fetch = ["fetch", stream, consumer, "--attempt", "monday"];
    for again in [&[][..], &["--again"]] {
        let answer = client.json(&[&fetch, again].concat());
        assert_eq!(answer["messages"][0]["streamSequence"], "1", "{answer}");
        assert_eq!(answer["messages"][0]["deliveryCount"], 1, "{answer}");
    }
    let give_back = ["give-back", stream, consumer, "monday"];
    assert_eq!(client.said(&give_back), ("messages given back: 1\n".to_owned(), 0));
    let (text, code) = client.said(&fetch);
    assert!(code == 0 && text.starts_with("no messages: the attempt is over"), "{text}");
    assert_eq!(client.taken("1").len(), 1, "the message is there for others");
    let (text, code) = client.said(&["fetch", stream, consumer, "--again"]);
    assert!(code == 2 && text.contains("--attempt"), "{text}");
}

#[tokio::test]
async fn fetch_settles_earlier_messages_first_by_hand() {
    let client = ClientRun::new().await;
    client.fixture.publish_many(4).await;
    let Fixture { stream, consumer, .. } = &client.fixture;
    let tokens = client.taken("3");
    let end = |place: usize| tokens[place][tokens[place].len() - 8..].to_owned();
    let (text, code) =
        client.said(&["fetch", stream, consumer, "--ack", &tokens[0], "--term", &tokens[1]]);
    let settled = format!("…{}  CONFIRMED\n…{}  CONFIRMED\n\n", end(0), end(1));
    assert!(code == 0 && text.starts_with(&settled) && text.contains("sequence 4, "), "{text}");

    let (text, code) = client.said(&["fetch", stream, consumer, "--ack", "nonsense"]);
    assert!(code == 1 && text.starts_with("…nonsense  TOKEN_INVALID: "), "{text}");
    assert!(text.ends_with("nothing was fetched: a settlement failed\n"), "{text}");
    let (text, code) = client.said(&["fetch", stream, "nobody", "--nak", &tokens[2]]);
    assert!(code == 1 && text.starts_with(&format!("…{}  CONFIRMED, ", end(2))), "{text}");
    assert!(text.contains("\nnothing was fetched: CONSUMER_NOT_FOUND: "), "{text}");

    let answer = client.json(&["fetch", stream, consumer, "--ack", &tokens[0]]);
    assert_eq!(answer["results"][0]["outcome"], "OUTCOME_DUPLICATE");
    assert_eq!(answer["messages"][0]["streamSequence"], "3", "the one that was given back");
}

#[tokio::test]
async fn binary_and_rejected_messages_are_shown() {
    let client = ClientRun::new().await;
    let Fixture { stream, consumer, .. } = &client.fixture;
    client.fixture.publish("bytes", vec![0xff, 0xfe]).await;
    let (text, _) = client.said(&["fetch", stream, consumer]);
    assert!(text.contains("2 bytes, in base64: //4="), "{text}");
    client.fixture.publish("json", "{").await;
    let (text, code) = client.said(&["fetch", stream, consumer, "--codec", "json"]);
    assert!(code == 0 && text.contains("sequence 2, rejected: "), "{text}");
}

/// A publisher must not be able to control an operator's terminal.
#[tokio::test]
async fn control_characters_of_a_message_are_shown_as_text() {
    let client = ClientRun::new().await;
    let Fixture { stream, consumer, .. } = &client.fixture;
    let mut headers = async_nats::HeaderMap::new();
    headers.insert("Title", "a\u{1b}]0;title\u{7}");
    let payload = "line one\n\tline two\r\u{1b}[2Jwith this token:\nA\u{9b}";
    client.fixture.publish_with("sub\u{1b}[1mject", headers, payload).await;
    client.fixture.publish("\u{1b}[1mrejected", "{").await;
    let (shown, _) = client.said(&["fetch", stream, consumer]);
    for there in [
        r"sub\u{1b}[1mject",
        r"  Title: a\u{1b}]0;title\u{7}",
        "  line one\n  \tline two\\r\\u{1b}[2Jwith this token:\n  A\\u{9b}\n",
    ] {
        assert!(shown.contains(there), "{there} is not in:\n{shown}");
    }
    let (rejected, _) = client.said(&["fetch", stream, consumer, "--codec", "json"]);
    assert!(rejected.contains("rejected: "), "{rejected}");
    let (refused, code) = client.said(&["fetch", stream, "no\u{1b}body"]);
    assert_eq!(code, 1, "{refused}");
    for said in [shown, rejected, refused] {
        let obeyed = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
        assert!(!said.contains(obeyed), "{said:?}");
    }
}

#[tokio::test]
async fn each_of_several_tokens_is_named() {
    let client = ClientRun::new().await;
    client.fixture.publish_many(2).await;
    let tokens = client.taken("2");
    let (text, code) = client.said(&["ack", &tokens[0], &tokens[1], "nonsense"]);
    assert_eq!(code, 1);
    let end = |token: &str| token[token.len() - 8..].to_owned();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines[0], format!("…{}  CONFIRMED", end(&tokens[0])));
    assert_eq!(lines[1], format!("…{}  CONFIRMED", end(&tokens[1])));
    assert!(lines[2].starts_with("…nonsense  TOKEN_INVALID: "), "{text}");
}

/// The fields of a message of the contract, as JSON of protobuf names them.
fn fields(message: &str) -> BTreeSet<String> {
    let files =
        prost_types::FileDescriptorSet::decode(fetch_proxy::pb::FILE_DESCRIPTOR_SET).unwrap();
    let all = files.file.into_iter().filter(|file| file.package() == "fetchproxy.v1");
    let mut found = all.flat_map(|file| file.message_type).filter(|one| one.name() == message);
    found.next().unwrap().field.into_iter().map(|field| field.json_name().to_owned()).collect()
}

fn names(object: &Value) -> BTreeSet<String> {
    object.as_object().unwrap().keys().cloned().collect()
}

/// Like `89.5s`.
fn seconds(lease: &Value) -> f64 {
    lease.as_str().unwrap().strip_suffix('s').unwrap().parse().unwrap()
}

/// The output of grpcurl for the same answer.
#[tokio::test]
async fn json_output_follows_the_contract() {
    let client = ClientRun::new().await;
    let Fixture { stream, consumer, .. } = &client.fixture;
    client.fixture.publish("n", "1").await;
    client.fixture.publish("n", "{").await;
    let answer =
        client.json(&["fetch", stream, consumer, "-n", "2", "--codec", "json", "--lease", "90s"]);
    let (message, rejected) = (&answer["messages"][0], &answer["rejected"][0]);
    assert!(names(&answer).is_subset(&fields("FetchResponse")), "{answer}");
    assert!(names(message).is_subset(&fields("Delivery")), "{message}");
    assert!(names(rejected).is_subset(&fields("Rejected")), "{rejected}");
    // Numbers of 64 bits are strings, those of 32 bits numbers; bytes are base64.
    assert_eq!((&message["consumerSequence"], &message["pending"]), (&"1".into(), &"1".into()));
    assert_eq!((&message["deliveryCount"], &message["text"]), (&1.into(), &"1".into()));
    assert_eq!((&rejected["streamSequence"], &rejected["data"]), (&"2".into(), &"ew==".into()));
    assert_eq!(rejected["cause"], "REJECTED_CAUSE_CODEC");
    assert!((60.0..=90.0).contains(&seconds(&message["lease"])), "{message}");
    let published = message["publishTime"].as_str().unwrap();
    assert!(humantime::parse_rfc3339(published).is_ok(), "{published}");

    let token = message["token"].as_str().unwrap();
    let extended = client.json(&["extend", token, "--lease", "5m"]);
    let result = &extended["results"][0];
    assert!(names(&extended).is_subset(&fields("SettleResponse")), "{extended}");
    assert!(names(result).is_subset(&fields("SettleResult")), "{extended}");
    assert!((270.0..=300.0).contains(&seconds(&result["lease"])), "{extended}");
    assert_eq!(result["outcome"], "OUTCOME_EXTENDED");
    client.json(&["ack", token]);
    let refused = client.json(&["nak", token]);
    assert_eq!(refused["failed"], 1);
    let error = &refused["results"][0]["error"];
    assert!(names(error).is_subset(&fields("SettleError")), "{error}");
    assert_eq!(error["reason"], "LEASE_SETTLED");
    assert_eq!(error["metadata"]["settled_as"], "ACK");
    let empty = client.json(&["fetch", stream, consumer, "--max-wait", "0s"]);
    assert_eq!(empty["emptyReason"], "EMPTY_REASON_NO_MESSAGES");
}

/// As they are copied from JSON, from a terminal, or from a file.
#[tokio::test]
async fn blanks_and_quotes_around_a_token_are_ignored() {
    let client = ClientRun::new().await;
    client.fixture.publish_many(4).await;
    let tokens = client.taken("4");
    let around = [("\"", "\""), (" ", "\n"), ("\"", "\","), ("'", "'\r\n")];
    for (token, (before, after)) in tokens.iter().zip(around) {
        let (text, code) = client.said(&["ack", &format!("{before}{token}{after}")]);
        assert_eq!((text.trim(), code), ("CONFIRMED", 0), "{before:?} {after:?}");
    }
    let (text, code) = client.said(&["ack", "\"\""]);
    assert_eq!((text.trim(), code), ("error: a token is empty", 1));
}

#[test]
fn missing_proxy_is_named_and_fails() {
    let output = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
        .args(["ack", "x", "--addr", "127.0.0.1:1"])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr.contains("127.0.0.1:1") && stderr.contains("refused"), "{stderr}");
}

#[tokio::test]
async fn refusal_of_the_service_is_shown_with_its_reason() {
    let client = ClientRun::new().await;
    let (text, code) = client.said(&["fetch", &client.fixture.stream, "nobody"]);
    assert!(code == 1 && text.starts_with("error: CONSUMER_NOT_FOUND: "), "{text}");
    let (text, code) = client.said(&["ack", "nonsense"]);
    assert!(code == 1 && text.starts_with("TOKEN_INVALID: "), "{text}");
}
