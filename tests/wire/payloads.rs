//! Messages that are not as they were published: without their payload, or under another subject. No
//! codec judges what was not delivered.

use async_nats::{HeaderMap, jetstream::consumer::pull};
use fetch_proxy::pb::{self, EmptyReason, Outcome, delivery::Payload};
use testkit::{
    jetstream::{Fixture, config},
    millis,
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch},
};

async fn all(client: &mut Client, fixture: &Fixture, codec: pb::Codec) -> pb::FetchResponse {
    let all = pb::FetchRequest { linger: millis(500), ..fetch(fixture, 100, 10_000) };
    client.fetch(pb::FetchRequest { codec: codec.into(), ..all }).await.unwrap().into_inner()
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    pairs.iter().for_each(|(name, value)| headers.append(*name, *value));
    headers
}

#[tokio::test]
async fn missing_payload_of_a_headers_only_consumer_is_not_judged() {
    let fixture = Fixture::new(pull::Config { headers_only: true, ..config() }).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut client = proxy.client().await;
    for codec in [pb::Codec::Json, pb::Codec::Text, pb::Codec::Auto] {
        fixture.publish_with("x", headers(&[("Colour", "red")]), "{\"a\":1}").await;
        fixture.publish("x", "no JSON").await;
        fixture.publish("x", "").await;
        let answer = all(&mut client, &fixture, codec).await;
        assert_eq!((answer.rejected.len(), answer.messages.len()), (0, 3), "{answer:?}");
        let sizes = answer.messages.iter().map(|message| &message.headers["Nats-Msg-Size"]);
        let sizes: Vec<_> = sizes.map(|size| size.values.join(",")).collect();
        assert_eq!(sizes, ["7", "7", "0"]);
        assert_eq!(answer.messages[0].headers["Colour"].values, ["red"]);
        for message in answer.messages {
            assert_eq!(message.payload, Some(Payload::Text(String::new())));
            let acked = client.ack(ack(&message.token)).await.unwrap().into_inner();
            assert_eq!(acked.outcome(), Outcome::Confirmed);
        }
    }
}

#[tokio::test]
async fn tombstones_are_not_judged_and_an_empty_payload_is() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut client = proxy.client().await;
    for (header, judged) in [
        (("KV-Operation", "DEL"), false),
        (("KV-Operation", "PURGE"), false),
        (("KV-Operation", "PUT"), true),
        (("Colour", "red"), true),
    ] {
        fixture.publish_with("x", headers(&[header]), "").await;
        let answer = all(&mut client, &fixture, pb::Codec::Json).await;
        assert_eq!(answer.messages.is_empty(), judged, "{header:?}: {answer:?}");
        for message in answer.messages {
            assert_eq!(message.headers[header.0].values, [header.1]);
            client.ack(ack(&message.token)).await.unwrap();
        }
    }
    // The delivered bytes are judged, whatever their headers say.
    fixture.publish_with("x", headers(&[("KV-Operation", "DEL")]), "no JSON").await;
    let answer = all(&mut client, &fixture, pb::Codec::Json).await;
    assert_eq!(answer.empty_reason(), EmptyReason::Rejected, "{answer:?}");
}

#[tokio::test]
async fn marker_of_a_removed_subject_is_not_judged() {
    let fixture = Fixture::new(config()).await;
    let second = 1_000_000_000_u64;
    let marked = serde_json::json!({
        "name": fixture.stream,
        "subjects": [format!("{}.>", fixture.stream)],
        "max_age": second,
        "allow_msg_ttl": true,
        "subject_delete_marker_ttl": 600 * second,
    });
    let update = format!("STREAM.UPDATE.{}", fixture.stream);
    let updated: serde_json::Value = fixture.jetstream.request(update, &marked).await.unwrap();
    assert!(updated["error"].is_null(), "{updated}");
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut client = proxy.client().await;
    fixture.publish("x", "{}").await;
    let mut answer = all(&mut client, &fixture, pb::Codec::Json).await;
    client.ack(ack(&answer.messages.remove(0).token)).await.unwrap();
    // The message ages, and JetStream stores a marker in its place.
    let marker = all(&mut client, &fixture, pb::Codec::Json).await;
    assert_eq!((marker.rejected.len(), marker.messages.len()), (0, 1), "{marker:?}");
    assert_eq!(marker.messages[0].headers["Nats-Marker-Reason"].values, ["MaxAge"]);
    client.ack(ack(&marker.messages[0].token)).await.unwrap();
}

/// `Delivery.subject` on a stream that changes subjects.
#[tokio::test]
async fn subject_is_the_one_in_the_stream() {
    let fixture = Fixture::new(config()).await;
    let (from, to) = (format!("{}.>", fixture.stream), format!("stored.{}.>", fixture.stream));
    let changed = serde_json::json!({
        "name": fixture.stream,
        "subjects": [from],
        "subject_transform": { "src": from, "dest": to },
    });
    let update = format!("STREAM.UPDATE.{}", fixture.stream);
    let updated: serde_json::Value = fixture.jetstream.request(update, &changed).await.unwrap();
    assert!(updated["error"].is_null(), "{updated}");
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let mut client = proxy.client().await;
    fixture.publish("x", "{}").await;
    let answer = all(&mut client, &fixture, pb::Codec::Json).await;
    assert_eq!(answer.messages[0].subject, format!("stored.{}.x", fixture.stream));
    assert!(answer.messages[0].headers.is_empty(), "{answer:?}");
}
