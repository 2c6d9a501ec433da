//! One trace from the publisher to the settlement, at whichever replica the message is settled: by tokens, by requests
//! between replicas, and without the owner.

use async_nats::HeaderMap;
use fetch_proxy::pb::{self, Outcome, settlement::Action};
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    millis,
    nats_server::NatsServer,
    proxy::{Client, ack, fetch, nak},
    traces::{TraceReceiver, TracedBy},
};

use super::pair::Replicas;

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PUBLISHER: &str = "00f067aa0ba902b7";

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

async fn two(receiver: &TraceReceiver, more: &[(&str, &str)]) -> Replicas {
    let server = NatsServer::shared().url();
    let soon = ("OTEL_BSP_SCHEDULE_DELAY", "50");
    let variables = [&[("OTEL_EXPORTER_OTLP_ENDPOINT", &*receiver.url), soon], more].concat();
    Replicas::start_traced(&[&server, &server], &variables).await
}

/// Publishes so many messages as parts of one trace, and fetches them.
async fn fetched(client: &mut Client, fixture: &Fixture, count: u32) -> Vec<pb::Delivery> {
    for _ in 0..count {
        let mut headers = HeaderMap::new();
        headers.insert("traceparent", format!("00-{TRACE}-{PUBLISHER}-01").as_str());
        fixture.publish_with("n", headers, "x").await;
    }
    let request = pb::FetchRequest { linger: millis(1000), ..fetch(fixture, count, 10_000) };
    let messages = client.fetch(request).await.unwrap().into_inner().messages;
    assert_eq!(messages.len(), count as usize);
    messages
}

fn assert_settles(settle: &TracedBy, fixture: &Fixture, action: &str, count: &str, route: &str) {
    assert_eq!(settle.span.kind, 3, "a client");
    for (name, value) in [
        ("messaging.system", "nats"),
        ("messaging.operation.type", "settle"),
        ("messaging.operation.name", action),
        ("messaging.destination.name", &*fixture.stream),
        ("messaging.consumer.group.name", &*fixture.consumer),
        ("messaging.batch.message_count", count),
        ("fetchproxy.route", route),
    ] {
        assert_eq!(settle.attribute(name).as_deref(), Some(value), "{name}");
    }
    assert_eq!(settle.attributes().len(), 7, "{:?}", settle.attributes());
}

#[tokio::test]
async fn settlement_at_another_replica_links_to_the_fetch_and_the_fetch_to_the_publisher() {
    let receiver = TraceReceiver::start().await;
    let fixture = Fixture::new(config()).await;
    let mut replicas = two(&receiver, &[]).await;
    let [owner, other] = &mut replicas.all[..] else { panic!() };
    let messages = fetched(&mut owner.client, &fixture, 1).await;
    let acked = other.client.ack(ack(&messages[0].token)).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed);

    let receive = &receiver.named(&format!("fetch {}", fixture.stream), 1).await[0];
    let link = &receive.span.links[0];
    assert_eq!((hex(&link.trace_id), hex(&link.span_id)), (TRACE.into(), PUBLISHER.into()));
    let settle = &receiver.named(&format!("ack {}", fixture.stream), 1).await[0];
    assert!(settle.links_to(receive), "{settle:?}");
    assert_settles(settle, &fixture, "ack", "1", "forwarded");
    let call = &receiver.named("fetchproxy.v1.FetchService/Ack", 1).await[0];
    assert!(call.is_parent_of(settle));

    // The request between the replicas is a pair of spans.
    let pair = receiver.named("settle forwarded", 2).await;
    let of_kind = |kind| pair.iter().find(|traced| traced.span.kind == kind).unwrap();
    let (asked, answered) = (of_kind(3), of_kind(2));
    assert!(call.is_parent_of(asked) && asked.is_parent_of(answered));
    let instance = |traced: &TracedBy| traced.process("service.instance.id").unwrap();
    assert_eq!(instance(answered), instance(receive), "at the owner");
    assert_eq!(instance(asked), instance(settle), "at the replica that was called");
    assert_ne!(instance(asked), instance(answered));
    assert_eq!(asked.attribute("fetchproxy.replica"), Some(instance(answered)));
}

#[tokio::test]
async fn each_consumer_and_action_of_a_call_has_one_span_and_one_link_for_each_fetch() {
    let receiver = TraceReceiver::start().await;
    let fixture = Fixture::new(config()).await;
    let mut replicas = two(&receiver, &[]).await;
    let client = &mut replicas.all[0].client;
    let first = fetched(client, &fixture, 2).await;
    let second = fetched(client, &fixture, 2).await;
    let settlement = |token: &str, action| pb::Settlement {
        number: 0,
        token: token.to_owned(),
        action: Some(action),
    };
    let settlements = vec![
        settlement(&first[0].token, Action::Ack(pb::AckAction {})),
        settlement(&first[1].token, Action::Ack(pb::AckAction {})),
        settlement(&second[0].token, Action::Ack(pb::AckAction {})),
        settlement(&second[1].token, Action::Nak(pb::NakAction { delay: millis(60_000) })),
    ];
    let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
    assert_eq!(client.settle(request).await.unwrap().into_inner().failed, 0);
    let acked = &receiver.named(&format!("ack {}", fixture.stream), 1).await[0];
    assert_settles(acked, &fixture, "ack", "3", "local");
    assert_eq!(acked.span.links.len(), 2, "one for each Fetch");
    let nacked = &receiver.named(&format!("nak {}", fixture.stream), 1).await[0];
    assert_settles(nacked, &fixture, "nak", "1", "local");
    assert_eq!(nacked.span.links.len(), 1);

    let refused = client.nak(nak(&first[0].token, 0)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::FailedPrecondition);
    let nacked = &receiver.named(&format!("nak {}", fixture.stream), 2).await[1];
    assert_eq!(nacked.attribute("error.type").as_deref(), Some("LEASE_SETTLED"));
}

#[tokio::test]
async fn settlement_without_the_owner_links_to_its_fetch_too() {
    let receiver = TraceReceiver::start().await;
    let fixture = Fixture::new(config()).await;
    let mut replicas = two(&receiver, &[]).await;
    let messages = fetched(&mut replicas.all[0].client, &fixture, 1).await;
    let receive = receiver.named(&format!("fetch {}", fixture.stream), 1).await.remove(0);
    replicas.all[0].proxy.signal("KILL");
    let other = replicas.all[1].client.clone();
    eventually("a settlement without the owner", || async {
        let done = other.clone().ack(ack(&messages[0].token)).await.ok()?.into_inner();
        (done.outcome() == Outcome::Confirmed).then_some(())
    })
    .await;
    let name = format!("ack {}", fixture.stream);
    let settle = eventually("a span that has gone well", || async {
        let spans = receiver.named(&name, 1).await;
        spans.into_iter().find(|traced| traced.attribute("error.type").is_none())
    })
    .await;
    assert!(settle.links_to(&receive), "{settle:?}");
    assert_settles(&settle, &fixture, "ack", "1", "ownerless");
}

#[tokio::test]
async fn leases_that_moved_keep_the_link_and_the_hand_over_has_a_span() {
    let receiver = TraceReceiver::start().await;
    let fixture = Fixture::new(config()).await;
    let mut replicas = two(&receiver, &[]).await;
    let messages = fetched(&mut replicas.all[0].client, &fixture, 1).await;
    let receive = receiver.named(&format!("fetch {}", fixture.stream), 1).await.remove(0);
    replicas.all[0].proxy.signal("TERM");
    assert!(replicas.all[0].proxy.wait().await.success());
    let hand_over = &receiver.named("hand over", 1).await[0];
    assert_eq!(hand_over.span.kind, 1, "internal");
    replicas.all[1].client.ack(ack(&messages[0].token)).await.unwrap();
    let settle = &receiver.named(&format!("ack {}", fixture.stream), 1).await[0];
    assert!(settle.links_to(&receive));
    assert_settles(settle, &fixture, "ack", "1", "local");
}

#[tokio::test]
async fn fetch_that_is_not_sampled_exports_nothing_and_its_token_stays_as_long() {
    let receiver = TraceReceiver::start().await;
    let fixture = Fixture::new(config()).await;
    let mut lengths = Vec::new();
    for sampler in ["always_off", "always_on"] {
        let mut replicas = two(&receiver, &[("OTEL_TRACES_SAMPLER", sampler)]).await;
        let message = fetched(&mut replicas.all[0].client, &fixture, 1).await.remove(0);
        replicas.all[1].client.ack(ack(&message.token)).await.unwrap();
        // The end sends what is queued.
        for replica in &mut replicas.all {
            replica.proxy.signal("TERM");
            assert!(replica.proxy.wait().await.success());
        }
        lengths.push(message.token.len());
        assert_eq!(receiver.spans().is_empty(), sampler == "always_off", "{:?}", receiver.spans());
    }
    let mut plain = Replicas::start(1).await;
    let message = fetched(&mut plain.all[0].client, &fixture, 1).await.remove(0);
    // The numbers in an ack subject grow with the messages.
    let grown = message.token.len().abs_diff(lengths[0]);
    assert!(grown <= 4, "{lengths:?} and {}", message.token.len());
    assert!(lengths[1] - lengths[0] >= 36 - 4, "{lengths:?}");
}
