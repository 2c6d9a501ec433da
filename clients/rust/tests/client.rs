//! Single calls: their results, their errors, and their repeats.

mod support;

use std::{env, fs, process::Command, time::Duration};

use fetchproxy::{
    Client, Code, Credentials, Effect, FetchOptions, Fetched, Settlement,
    testing::{FakeProxy, Settled},
};
use serde_json::json;
use support::{SECOND, fake, in_time};

async fn fetch(client: &Client, n: u32) -> Fetched {
    let options = FetchOptions { n, max_wait: Duration::ZERO, ..FetchOptions::default() };
    client.fetch("TASKS", "workers", options).await.unwrap()
}

fn publish(fake: &FakeProxy, count: u32) {
    (0..count).for_each(|number| drop(fake.publish(number)));
}

#[tokio::test]
async fn calls_settle_by_token() {
    let fake = fake();
    publish(&fake, 3);
    let client = fake.client();
    let fetched = fetch(&client, 3).await;
    let [one, two, three] = &fetched.messages[..] else { panic!("{fetched:?}") };
    assert_eq!((&one.payload[..], fetched.empty_reason.as_str()), (&b"0"[..], ""));
    assert_eq!(client.extend(&one.token, Some(20 * SECOND)).await.unwrap().as_secs(), 20);
    assert_eq!(client.ack(&one.token).await.unwrap(), Effect::Confirmed);
    assert_eq!(client.ack(&one.token).await.unwrap(), Effect::Duplicate);
    assert_eq!(client.nak(&two.token, Duration::MAX).await.unwrap(), Effect::Confirmed);
    assert_eq!(client.term(&three.token, &"r".repeat(2000)).await.unwrap(), Effect::Confirmed);
    let settled: Vec<_> = fake.messages().iter().map(|record| record.settlements()).collect();
    let day = Duration::from_secs(24 * 3600);
    assert_eq!(settled, [[Settled::Ack], [Settled::Nak(day)], [Settled::Term("r".repeat(1024))]]);
}

#[tokio::test]
async fn settle_has_a_result_for_each_settlement() {
    let fake = fake();
    publish(&fake, 2);
    let client = fake.client();
    let fetched = fetch(&client, 2).await;
    let tokens: Vec<String> =
        fetched.messages.iter().map(|message| message.token.clone()).collect();
    let results = client
        .settle(&[
            Settlement::Ack(tokens[0].clone()),
            Settlement::Ack("no token".to_owned()),
            Settlement::Extend(tokens[1].clone(), None),
            Settlement::Nak(tokens[1].clone(), SECOND),
            Settlement::Term(tokens[1].clone(), "too late".to_owned()),
        ])
        .await
        .unwrap();
    let reasons: Vec<_> = results
        .iter()
        .map(|result| result.as_ref().map_err(|error| error.reason.as_str()))
        .collect();
    assert_eq!(
        reasons,
        [
            Ok(&Effect::Confirmed),
            Err("TOKEN_INVALID"),
            Ok(&Effect::Extended),
            Ok(&Effect::Confirmed),
            Err("LEASE_SETTLED")
        ]
    );
}

#[tokio::test]
async fn error_has_the_reason_of_the_proxy() {
    let error = fake().client().ack("no token").await.unwrap_err();
    assert_eq!((error.reason.as_str(), error.code), ("TOKEN_INVALID", Code::InvalidArgument));
    assert_eq!(error.retry_delay, None);
    assert!(error.to_string().starts_with("TOKEN_INVALID: this is not a token"), "{error}");
}

#[tokio::test]
async fn call_is_made_five_times_at_most() {
    let fake = fake();
    publish(&fake, 1);
    (0..4).for_each(|_| fake.fail("Fetch", "NATS_UNAVAILABLE"));
    assert_eq!(fetch(&fake.client(), 1).await.messages.len(), 1);
    (0..5).for_each(|_| fake.fail("Ack", "DRAINING"));
    let error = fake.client().ack("any").await.unwrap_err();
    assert_eq!(
        (error.reason.as_str(), error.retry_delay),
        ("DRAINING", Some(Duration::from_millis(10)))
    );
}

#[tokio::test]
async fn fetch_whose_answer_is_lost_has_the_same_messages() {
    let fake = fake();
    publish(&fake, 2);
    fake.lose_answer("Fetch");
    let fetched = fetch(&fake.client(), 1).await;
    assert_eq!(fetched.messages[0].stream_sequence, 1);
    assert_eq!(fake.messages().iter().map(|record| record.attempts()).collect::<Vec<_>>(), [1, 0]);
}

#[tokio::test]
async fn fetch_that_is_dropped_is_given_back() {
    let fake = fake();
    let record = fake.publish(json!({}));
    let client = fake.client();
    (0..5).for_each(|_| fake.lose_answer("Fetch"));
    let fetching = client.fetch("TASKS", "workers", FetchOptions::default());
    tokio::select! {
        fetched = fetching => panic!("{fetched:?}"),
        () = async { while record.attempts() == 0 { tokio::task::yield_now().await } } => {}
    }
    in_time(async {
        while record.attempts() > 0 {
            tokio::task::yield_now().await
        }
    })
    .await;
}

#[tokio::test]
async fn messages_of_an_attempt_are_given_back() {
    let fake = fake();
    publish(&fake, 2);
    let client = fake.client();
    let fetched = fetch(&client, 2).await;
    client.ack(&fetched.messages[0].token).await.unwrap();
    assert_eq!(client.give_back("TASKS", "workers", &fetched.attempt_id).await.unwrap(), 1);
    assert_eq!(fetch(&client, 2).await.messages[0].stream_sequence, 2);
}

#[tokio::test]
async fn fetch_of_an_empty_stream_says_why_it_is_empty() {
    assert_eq!(fetch(&fake().client(), 1).await.empty_reason, "NO_MESSAGES");
}

#[test]
fn credential_is_not_sent_to_another_machine_without_tls() {
    let files = || Credentials { bearer_file: Some("key".into()), ..Credentials::default() };
    for address in ["proxy.example:50051", "dns:///proxy.example:50051", "localhost.example:50051"]
    {
        let error = Client::new(address, files()).unwrap_err();
        assert!(error.message.contains("without TLS: use https://"), "{error}");
    }
    for address in ["https://proxy.example:50051", "localhost:50051", "127.0.0.1:50051", "[::1]:1"]
    {
        Client::new(address, files()).unwrap();
    }
}

#[test]
fn files_that_have_no_use_are_refused() {
    let cert = Some("cert.pem".into());
    let ca = Credentials { ca: cert.clone(), ..Credentials::default() };
    assert!(Client::new("localhost:50051", ca).unwrap_err().message.contains("is not TLS"));
    let alone = Credentials { cert, ..Credentials::default() };
    assert!(Client::new("https://localhost:1", alone).unwrap_err().message.contains("go together"));
    let nonsense = Client::new("not an address", Credentials::default());
    assert_eq!(nonsense.unwrap_err().reason, "INVALID_ARGUMENT");
}

#[tokio::test]
async fn bearer_is_read_again_for_each_call() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("key");
    let fake = fake();
    let files = Credentials { bearer_file: Some(file.clone()), ..Credentials::default() };
    let client = Client::new(fake.address(), files).unwrap();
    let options = || FetchOptions { max_wait: Duration::ZERO, ..FetchOptions::default() };
    // Without the file, the call is repeated until there is a file.
    let writing = async {
        tokio::time::sleep(Duration::from_millis(150)).await;
        fs::write(&file, "first\n").unwrap();
    };
    let (fetched, ()) = tokio::join!(client.fetch("TASKS", "workers", options()), writing);
    fetched.unwrap();
    fs::write(&file, "second\n").unwrap();
    client.fetch("TASKS", "workers", options()).await.unwrap();
    assert_eq!(fake.bearers(), ["Bearer first", "Bearer second"]);
}

/// A test cannot change its own environment, so it starts a copy of itself.
#[test]
fn environment_names_the_proxy_and_the_files() {
    if env::var_os("FETCH_PROXY_BEARER_FILE").is_some() {
        return drop(Client::from_env().unwrap());
    }
    assert!(format!("{:?}", Client::from_env().unwrap()).contains("127.0.0.1:50051"));
    let is_well = |address: &str| {
        let mut copy = Command::new(env::current_exe().unwrap());
        copy.args(["--exact", "environment_names_the_proxy_and_the_files"]);
        copy.env("FETCH_PROXY_ADDR", address).env("FETCH_PROXY_BEARER_FILE", "key");
        copy.output().unwrap().status.success()
    };
    assert!(is_well("https://proxy.example:50051"));
    assert!(!is_well("proxy.example:50051"));
}
