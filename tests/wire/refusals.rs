//! Every row of the table of errors that one replica can give, by status and, where it concerns a
//! token, by `SettleError` too: the same reason both ways.

use async_nats::jetstream::consumer::{AckPolicy, pull, push};
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use fetch_proxy::{
    pb::{self, AckAction, Settlement, settlement::Action},
    reason::Reason,
};
use testkit::{
    jetstream::{Fixture, ack_wait, config},
    millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, extend, fetch, nak, reason, term, waiting},
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

async fn client() -> (Proxy, Client) {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let client = proxy.client().await;
    (proxy, client)
}

fn is(status: &Status, expected: Reason) {
    assert_eq!(
        reason(status),
        (Code::from(expected.code() as i32), expected.name().to_owned()),
        "{status:?}"
    );
    let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
    assert_eq!(retry, expected.retry_after());
    assert_eq!(status.metadata().contains_key("grpc-retry-pushback-ms"), retry.is_some());
}

/// Acks the token by both paths; both must give the same reason.
async fn both(client: &mut Client, token: &str, expected: Reason) {
    is(&client.ack(ack(token)).await.unwrap_err(), expected);
    in_a_settle(client, token, Action::Ack(AckAction {}), expected).await;
}

async fn in_a_settle(client: &mut Client, token: &str, action: Action, expected: Reason) {
    let settlements = vec![Settlement { number: 0, token: token.to_owned(), action: Some(action) }];
    let request = pb::SettleRequest { settlements, ..Default::default() };
    let answer = client.settle(request).await.unwrap().into_inner();
    assert_eq!((answer.failed, answer.results[0].outcome), (1, 0));
    let error = answer.results[0].error.clone().unwrap();
    assert_eq!(error.reason, expected.name());
    let delay = expected.retry_after().map(|delay| delay.try_into().unwrap());
    assert_eq!(error.retry_delay, delay);
}

async fn lease(client: &mut Client, fixture: &Fixture) -> pb::Delivery {
    fixture.publish("x", "1").await;
    client.fetch(fetch(fixture, 1, 5000)).await.unwrap().into_inner().messages.remove(0)
}

#[tokio::test]
async fn missing_stream_and_missing_consumer_are_distinguished() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = client().await;
    let mut request = fetch(&fixture, 1, 5000);
    request.consumer = "nobody".into();
    let refused = client.fetch(request.clone()).await.unwrap_err();
    is(&refused, Reason::ConsumerNotFound);
    assert_eq!(refused.get_details_resource_info().unwrap().resource_type, "consumer");
    request.stream = "NOWHERE".into();
    let refused = client.fetch(request).await.unwrap_err();
    is(&refused, Reason::StreamNotFound);
    assert_eq!(refused.get_details_resource_info().unwrap().resource_name, "NOWHERE");
}

#[tokio::test]
async fn unsuitable_consumers_are_refused_with_a_reason() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = client().await;
    let named = |name: &str| pull::Config { durable_name: Some(name.to_owned()), ..config() };
    let jetstream = &fixture.jetstream;
    for consumer in [
        pull::Config { ack_policy: AckPolicy::None, ..named("none") },
        pull::Config { ack_policy: AckPolicy::All, ..named("all") },
        pull::Config { ack_wait: std::time::Duration::from_millis(400), ..named("short") },
    ] {
        jetstream.create_consumer_on_stream(consumer, &fixture.stream).await.unwrap();
    }
    let push = push::Config {
        durable_name: Some("push".into()),
        deliver_subject: "somewhere".into(),
        ack_policy: AckPolicy::Explicit,
        ..push::Config::default()
    };
    jetstream.create_consumer_on_stream(push, &fixture.stream).await.unwrap();
    for (consumer, property) in
        [("none", "ack_policy"), ("all", "ack_policy"), ("short", "ack_wait"), ("push", "push")]
    {
        let mut request = fetch(&fixture, 1, 5000);
        request.consumer = consumer.into();
        let refused = client.fetch(request).await.unwrap_err();
        is(&refused, Reason::ConsumerUnsuitable);
        assert_eq!(refused.get_details_error_info().unwrap().metadata["property"], property);
        assert!(refused.get_details_precondition_failure().is_some());
    }
}

#[tokio::test]
async fn foreign_tokens_are_invalid() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = client().await;
    let token = lease(&mut client, &fixture).await.token;
    let mut bytes = URL_SAFE_NO_PAD.decode(&token).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let forged = URL_SAFE_NO_PAD.encode(&bytes);
    for bad in ["x", "not base64 !", &token[..token.len() - 4], &forged, &"A".repeat(100_000)] {
        both(&mut client, bad, Reason::TokenInvalid).await;
    }
    bytes[1] ^= 1;
    both(&mut client, &URL_SAFE_NO_PAD.encode(&bytes), Reason::KeyUnknown).await;
    // Nothing of this touched the lease.
    client.ack(ack(&token)).await.unwrap();
}

#[tokio::test]
async fn expired_and_settled_leases_are_distinguished() {
    let (fixture, brief) = (Fixture::new(config()).await, Fixture::new(ack_wait(1000)).await);
    let (_proxy, mut client) = client().await;
    let settled = lease(&mut client, &fixture).await.token;
    client.term(term(&settled, "no")).await.unwrap();
    both(&mut client, &settled, Reason::LeaseSettled).await;
    let expired = lease(&mut client, &brief).await.token;
    tokio::time::sleep(std::time::Duration::from_millis(1000)).await;
    both(&mut client, &expired, Reason::LeaseExpired).await;
    is(&client.extend(extend(&expired, 5000)).await.unwrap_err(), Reason::LeaseExpired);
}

#[tokio::test]
async fn deleted_consumer_denies_by_both_paths() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = client().await;
    let tokens =
        [lease(&mut client, &fixture).await.token, lease(&mut client, &fixture).await.token];
    fixture.jetstream.delete_stream(&fixture.stream).await.unwrap();
    is(&client.ack(ack(&tokens[0])).await.unwrap_err(), Reason::JetstreamDenied);
    let action = Some(Action::Ack(AckAction {}));
    let settlements = vec![Settlement { number: 0, token: tokens[1].clone(), action }];
    let request = pb::SettleRequest { settlements, ..Default::default() };
    let answer = client.settle(request).await.unwrap().into_inner();
    let reason = &answer.results[0].error.as_ref().unwrap().reason;
    // The proxy may have noticed by itself in between, and ended the lease.
    assert!(
        [Reason::JetstreamDenied.name(), Reason::LeaseExpired.name()].contains(&reason.as_str())
    );
}

#[tokio::test]
async fn token_from_before_a_restart_has_an_unreachable_owner() {
    let fixture = Fixture::new(config()).await;
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), fetch_proxy::token::new_key_line().unwrap()).unwrap();
    let flags = ["--token-key-file", keys.path().to_str().unwrap(), "--cluster", "restarted"];
    let token = {
        let proxy = Proxy::start(NatsServer::shared(), &flags);
        lease(&mut proxy.client().await, &fixture).await.token
    };
    let proxy = Proxy::start(NatsServer::shared(), &flags);
    proxy.ready().await;
    let mut client = proxy.client().await;
    // It could move the lease's end only at its owner.
    let refused = client.extend(extend(&token, 60_000)).await.unwrap_err();
    is(&refused, Reason::OwnerUnreachable);
    assert_eq!(refused.get_details_error_info().unwrap().metadata["applied"], "no");
    let longer = Action::Extend(pb::ExtendAction { lease: millis(60_000) });
    in_a_settle(&mut client, &token, longer, Reason::OwnerUnreachable).await;
    // Another cluster, with the same keys, knows nothing of it.
    let other =
        Proxy::start(NatsServer::shared(), &[&flags[..2], &["--cluster", "other"]].concat());
    both(&mut other.client().await, &token, Reason::TokenInvalid).await;
}

#[tokio::test]
async fn wrong_field_is_named_and_nothing_is_settled() {
    let fixture = Fixture::new(config()).await;
    let (_proxy, mut client) = client().await;
    let token = lease(&mut client, &fixture).await.token;
    let field = |status: &Status| {
        is(status, Reason::InvalidField);
        status.get_details_bad_request().unwrap().field_violations[0].field.clone()
    };
    assert_eq!(field(&client.ack(ack("")).await.unwrap_err()), "token");
    assert_eq!(field(&client.nak(nak(&token, 90_000_000)).await.unwrap_err()), "delay");
    assert_eq!(field(&client.extend(extend(&token, 10)).await.unwrap_err()), "lease");
    let mut wrong = ack(&token);
    wrong.confirmation = 9;
    assert_eq!(field(&client.ack(wrong).await.unwrap_err()), "confirmation");
    let good =
        Settlement { number: 0, token: token.clone(), action: Some(Action::Ack(AckAction {})) };
    let nothing = Settlement { number: 0, token: token.clone(), action: None };
    let late = pb::NakAction { delay: millis(-1) };
    let late = Settlement { number: 0, token: token.clone(), action: Some(Action::Nak(late)) };
    for (settlements, named) in [
        (vec![], "settlements"),
        (vec![good.clone(); 1001], "settlements"),
        (vec![good.clone(), nothing], "settlements[1].action"),
        (vec![good.clone(), late], "settlements[1].nak.delay"),
    ] {
        let request = pb::SettleRequest { settlements, ..Default::default() };
        assert_eq!(field(&client.settle(request).await.unwrap_err()), named);
    }
    assert_eq!(fixture.info().await.num_ack_pending, 1, "something was settled after all");
}

#[tokio::test]
async fn missing_nats_rights_are_named_to_the_caller() {
    let config = r#"authorization { users: [
        { user: admin, password: admin },
        { user: proxy, password: proxy, permissions: {
            publish: ["$JS.API.CONSUMER.INFO.*.worker", "$JS.API.CONSUMER.MSG.NEXT.*.worker"],
            subscribe: ["_INBOX.>"] } } ] }"#;
    let server = NatsServer::start_with(testkit::nats_server::binary(), Some(config.into()));
    let fixture = Fixture::at(&server.url().replace("//", "//admin:admin@"), self::config()).await;
    let proxy = Proxy::start_at(&server.url().replace("//", "//proxy:proxy@"), &[]);
    let mut client = proxy.client().await;
    let message = lease(&mut client, &fixture).await;
    let refused = client.ack(ack(&message.token)).await.unwrap_err();
    is(&refused, Reason::NatsPermission);
    let subject = refused.get_details_error_info().unwrap().metadata["subject"].clone();
    assert!(subject.starts_with("$JS.ACK."), "{subject}");
    let mut request = fetch(&fixture, 1, 5000);
    request.consumer = "other".into();
    is(&client.fetch(request).await.unwrap_err(), Reason::NatsPermission);
}

#[tokio::test]
async fn forbidden_inbox_is_named_at_once() {
    let config = r#"authorization { users: [
        { user: admin, password: admin },
        { user: proxy, password: proxy, permissions: { publish: ["$JS.>"], subscribe: ["_MINE.>"] } }
    ] }"#;
    let server = NatsServer::start_with(testkit::nats_server::binary(), Some(config.into()));
    let fixture = Fixture::at(&server.url().replace("//", "//admin:admin@"), self::config()).await;
    let url = server.url().replace("//", "//proxy:proxy@");
    let proxy = Proxy::start_at(&url, &[]);
    let refused = testkit::eventually("the refusal", || async {
        let refused = proxy.client().await.fetch(fetch(&fixture, 1, 5000)).await.unwrap_err();
        (reason(&refused).1 == "NATS_PERMISSION").then_some(refused)
    })
    .await;
    let subject = refused.get_details_error_info().unwrap().metadata["subject"].clone();
    assert!(subject.starts_with("_INBOX."), "{subject}");
    // With the prefix that it may use, everything works.
    let proxy = Proxy::start_at(&url, &["--inbox-prefix", "_MINE"]);
    let mut client = proxy.client().await;
    let message = lease(&mut client, &fixture).await;
    client.ack(ack(&message.token)).await.unwrap();
}

#[tokio::test]
async fn lease_survives_a_settlement_refused_without_nats() {
    let mut server = NatsServer::start();
    let fixture = Fixture::on(&server, config()).await;
    let proxy = Proxy::start(&server, &[]);
    let mut client = proxy.client().await;
    let token = lease(&mut client, &fixture).await.token;
    server.kill();
    let away = testkit::eventually("the loss to be noticed", || {
        let mut client = client.clone();
        let request = ack(&token);
        async move {
            let refused = client.ack(request).await.unwrap_err();
            (reason(&refused).1 == "NATS_UNAVAILABLE").then_some(refused)
        }
    })
    .await;
    is(&away, Reason::NatsUnavailable);
    is(&client.fetch(fetch(&fixture, 1, 10_000)).await.unwrap_err(), Reason::NatsUnavailable);
    server.restart();
    let outcome = testkit::eventually("the ack to go through", || {
        let mut client = client.clone();
        let request = ack(&token);
        async move { client.ack(request).await.ok() }
    })
    .await;
    assert_ne!(outcome.into_inner().outcome, 0);
}

#[tokio::test]
async fn draining_proxy_refuses_fetches_and_still_settles() {
    let fixture = Fixture::new(config()).await;
    let mut proxy = Proxy::start(NatsServer::shared(), &["--drain-timeout", "15s"]);
    let mut client = proxy.client().await;
    let token = lease(&mut client, &fixture).await.token;
    // One call that waits, so that the drain has something to wait for.
    let open = waiting(&client, &fixture, fetch(&fixture, 1, 60_000)).await;
    proxy.signal("TERM");
    let refused = testkit::eventually("the drain", || {
        let mut client = client.clone();
        let request = fetch(&fixture, 1, 0);
        async move { client.fetch(request).await.err() }
    })
    .await;
    is(&refused, Reason::Draining);
    client.ack(ack(&token)).await.unwrap();
    let last = open.await.unwrap().unwrap().into_inner();
    assert_eq!(last.empty_reason(), pb::EmptyReason::Draining);
    drop(client);
    assert!(proxy.wait().await.success(), "{}", proxy.log());
}

#[tokio::test]
async fn unknown_methods_are_unsupported() {
    let (_proxy, client) = client().await;
    drop(client);
    let channel =
        tonic::transport::Endpoint::from_shared(format!("http://{}", _proxy.grpc)).unwrap();
    let channel = channel.connect().await.unwrap();
    for path in ["/fetchproxy.v1.FetchService/Steal", "/fetchproxy.v9.Other/Fetch"] {
        let mut grpc = tonic::client::Grpc::new(channel.clone());
        grpc.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<pb::AckRequest, pb::AckResponse>::default();
        let request = tonic::Request::new(ack("x"));
        let refused = grpc.unary(request, path.parse().unwrap(), codec).await.unwrap_err();
        is(&refused, Reason::Unsupported);
    }
    assert_eq!(Code::from(Reason::Unsupported.code() as i32), Code::Unimplemented);
}
