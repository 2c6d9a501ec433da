//! Keys: shared, rotated, and not shared.

use std::{fs, time::Duration};

use fetch_proxy::grpc::probe;
use tonic::Code;

use super::pair::{Pair, key_file, new_key};
use crate::support::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch, reason},
};

async fn serving(proxy: &Proxy) -> bool {
    probe(&proxy.ops, "", Duration::from_secs(2)).await.unwrap().1
}

#[tokio::test]
async fn a_rotation_loses_no_token() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let old = fs::read_to_string(pair.keys.path()).unwrap();
    let before = pair.leased(&fixture, 2).await;
    // Added, promoted, and the old one removed, while both replicas run.
    let new = new_key();
    fs::write(pair.keys.path(), format!("{new}\n{old}\n")).unwrap();
    for proxy in [&pair.owner, &pair.other] {
        eventually("the new key", || async { proxy.log().contains("read again").then_some(()) })
            .await;
    }
    pair.at_other.ack(ack(&before[0].token)).await.unwrap();
    let between = pair.leased(&fixture, 1).await;
    pair.at_other.ack(ack(&between[0].token)).await.unwrap();
    // The new key seals once all have been heard to have it; then the old one can go.
    let sealed_anew = || async {
        let mut client = pair.at_owner.clone();
        fixture.publish("n", "x").await;
        let answer = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
        let token = &answer.messages[0].token;
        client.ack(ack(token)).await.unwrap();
        // The key's name is in front.
        (token[..8] != before[1].token[..8]).then_some(())
    };
    eventually("the new key to seal", sealed_anew).await;
    pair.at_other.ack(ack(&before[1].token)).await.unwrap();
    fs::write(pair.keys.path(), format!("{new}\n")).unwrap();
    for proxy in [&pair.owner, &pair.other] {
        let read = || async { (proxy.log().matches("read again").count() == 2).then_some(()) };
        eventually("the old key to go", read).await;
    }
    let after = pair.leased(&fixture, 1).await;
    pair.at_other.ack(ack(&after[0].token)).await.unwrap();
    let refused = pair.at_other.ack(ack(&before[1].token)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::Unavailable, "KEY_UNKNOWN".to_owned()));
}

#[tokio::test]
async fn a_wrong_key_file_is_told_and_the_old_keys_stay() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 1).await;
    fs::write(pair.keys.path(), "no key at all").unwrap();
    eventually("the error", || async { pair.other.log().contains("cannot be used").then_some(()) })
        .await;
    pair.at_other.ack(ack(&leased[0].token)).await.unwrap();
}

#[tokio::test]
async fn of_replicas_that_share_no_key_the_younger_does_not_serve_and_says_why() {
    // A server of its own: whoever beats there is heard by all.
    let server = NatsServer::start();
    let (one, other) = (key_file(&[&new_key()]), key_file(&[&new_key()]));
    let flag = |file: &tempfile::NamedTempFile| file.path().to_str().unwrap().to_owned();
    let elder = Proxy::start(&server, &["--cluster", "c", "--token-key-file", &flag(&one)]);
    eventually("readiness", || async { serving(&elder).await.then_some(()) }).await;
    let younger = Proxy::start(&server, &["--cluster", "c", "--token-key-file", &flag(&other)]);
    let keyless = Proxy::start(&server, &["--cluster", "c"]);
    for (proxy, said) in [(&younger, "shares no token key"), (&keyless, "has no --token-key-file")]
    {
        eventually("not serving", || async { (!serving(proxy).await).then_some(()) }).await;
        eventually("the reason", || async { proxy.log().contains(said).then_some(()) }).await;
    }
    assert!(serving(&elder).await, "{}", elder.log());
    // Keys that are brought in line heal it by themselves.
    fs::copy(one.path(), other.path()).unwrap();
    eventually("readiness", || async { serving(&younger).await.then_some(()) }).await;
    drop(elder);
    drop(younger);
    eventually("readiness", || async { serving(&keyless).await.then_some(()) }).await;
}

#[tokio::test]
async fn a_replica_ahead_of_the_keys_says_so() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 1).await;
    let stranger = key_file(&[&new_key()]);
    let flags = ["--token-key-file", stranger.path().to_str().unwrap()];
    let server = NatsServer::start();
    let behind = Proxy::start(&server, &flags);
    let refused = behind.client().await.ack(ack(&leased[0].token)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::Unavailable, "KEY_UNKNOWN".to_owned()));
}
