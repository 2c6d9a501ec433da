//! A consumer whose settlements NATS refuses to the proxy, or does not answer: that costs no other.

use std::time::Duration;

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::{
    self, AckAction, FetchRequest, NakAction, Outcome, Settlement, settlement::Action,
};
use testkit::{
    eventually,
    jetstream::{Fixture, SHORTEST_KEPT, ack_wait},
    millis,
    nats_server::{NatsServer, binary},
    proxy::{Client, Proxy, ack, extend, fetch, reason, take},
};

/// A server where the proxy may do everything, but settle for the consumer `refused`.
struct Refusing {
    server: NatsServer,
    fixture: Fixture,
}

impl Refusing {
    async fn new(wait: u64) -> Self {
        let users = |more: &str| {
            format!("authorization {{ users: [\n{{ user: admin, password: admin }}\n{more}] }}")
        };
        let server = NatsServer::start_with(binary(), Some(users("")));
        let admin = server.url().replace("//", "//admin:admin@");
        let fixture = Fixture::at(&admin, ack_wait(wait)).await;
        let refused = pull::Config { durable_name: Some("refused".to_owned()), ..ack_wait(wait) };
        fixture.jetstream.create_consumer_on_stream(refused, &fixture.stream).await.unwrap();
        let denied = format!("$JS.ACK.{}.refused.>", fixture.stream);
        let rights = format!("publish: {{ allow: [\">\"], deny: [\"{denied}\"] }}");
        let proxy = "{ user: proxy, password: proxy, permissions: {\n";
        server.configure(&users(&format!("{proxy}{rights} }} }}")));
        eventually("the server to know the user", || async {
            let proxy = async_nats::ConnectOptions::new();
            let proxy = proxy.user_and_password("proxy".to_owned(), "proxy".to_owned());
            proxy.connect(server.url()).await.ok()
        })
        .await;
        Self { server, fixture }
    }

    async fn proxy(&self) -> (Proxy, Client) {
        let proxy = Proxy::start_at(&self.server.url().replace("//", "//proxy:proxy@"), &[]);
        proxy.ready().await;
        let client = proxy.client().await;
        (proxy, client)
    }

    /// A Fetch of so many from the consumer that may be settled for, or from the other.
    async fn fetch(&self, client: &Client, refused: bool, n: u32) -> Vec<pb::Delivery> {
        let mut request = FetchRequest { lease: millis(20_000), ..fetch(&self.fixture, n, 10_000) };
        if refused {
            "refused".clone_into(&mut request.consumer);
        }
        take(client, request).await
    }
}

fn settlement(token: &str, action: Action) -> Settlement {
    Settlement { number: 0, token: token.to_owned(), action: Some(action) }
}

const NAK: Action = Action::Nak(NakAction { delay: None });

#[tokio::test]
async fn refusal_of_one_consumer_does_not_affect_another() {
    let refusing = Refusing::new(30_000).await;
    let (_proxy, mut client) = refusing.proxy().await;
    refusing.fixture.publish_many(200).await;
    let refused = refusing.fetch(&client, true, 1).await;
    let served = refusing.fetch(&client, false, 200).await;
    let naks = || served.iter().map(|message| settlement(&message.token, NAK));
    let first = settlement(&refused[0].token, Action::Ack(AckAction {}));
    let settlements = [first].into_iter().chain(naks()).collect();
    let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
    let answer = client.settle(request).await.unwrap().into_inner();
    assert_eq!(answer.results[0].error.as_ref().unwrap().reason, "NATS_PERMISSION");
    for result in &answer.results[1..] {
        assert_eq!(result.outcome(), Outcome::Confirmed, "{result:?}");
    }
    // The next holders keep what they get, whoever nacks again.
    let second = refusing.fetch(&client, false, 200).await;
    let settlements = naks().collect();
    let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
    let again = client.settle(request).await.unwrap().into_inner();
    for result in &again.results {
        assert_eq!(result.outcome(), Outcome::Duplicate, "{result:?}");
    }
    let third = client.fetch(fetch(&refusing.fixture, 200, 300)).await.unwrap().into_inner();
    assert!(third.messages.is_empty(), "a Nak was published twice");
    for message in second {
        client.ack(ack(&message.token)).await.unwrap();
    }
}

#[tokio::test]
async fn refused_progress_costs_no_other_consumer_its_leases() {
    let refusing = Refusing::new(SHORTEST_KEPT).await;
    let (_proxy, mut client) = refusing.proxy().await;
    refusing.fixture.publish_many(100).await;
    let (served, refused) =
        tokio::join!(refusing.fetch(&client, false, 100), refusing.fetch(&client, true, 100));
    tokio::time::sleep(Duration::from_millis(5 * SHORTEST_KEPT / 2)).await;
    for message in served {
        let acked = client.ack(ack(&message.token)).await.expect("its long lease was not kept");
        assert_eq!(acked.into_inner().outcome(), Outcome::Confirmed);
    }
    let status = client.ack(ack(&refused[0].token)).await.unwrap_err();
    assert_eq!(reason(&status).1, "LEASE_EXPIRED", "nothing can keep these");
}

#[tokio::test]
async fn long_lease_is_not_promised_without_the_right_to_settle() {
    let refusing = Refusing::new(30_000).await;
    let (_proxy, mut client) = refusing.proxy().await;
    refusing.fixture.publish_many(3).await;
    let first = refusing.fetch(&client, true, 1).await.remove(0);
    let status = client.ack(ack(&first.token)).await.unwrap_err();
    assert_eq!(reason(&status).1, "NATS_PERMISSION");
    let status = client.extend(extend(&first.token, 60_000)).await.unwrap_err();
    assert_eq!(reason(&status).1, "NATS_PERMISSION", "nothing keeps the lease for a minute");
    let consumer = "refused".to_owned();
    let long =
        FetchRequest { consumer, lease: millis(300_000), ..fetch(&refusing.fixture, 1, 10_000) };
    let answer = client.fetch(long.clone()).await.unwrap().into_inner();
    let lease = answer.messages[0].lease.unwrap().seconds;
    assert!(lease < 30, "a lease of {lease} s with an ack wait of 30 s");
    let served = FetchRequest { consumer: refusing.fixture.consumer.clone(), ..long };
    let answer = client.fetch(served).await.unwrap().into_inner();
    let lease = answer.messages[0].lease.unwrap().seconds;
    assert!(lease > 200, "the other consumer may be acked, and its lease is {lease} s");
}

/// As when its leader is away: nobody answers, and nobody says that there is nobody.
#[tokio::test]
async fn silent_consumer_costs_no_other_consumer_its_leases() {
    let server = NatsServer::start_with(binary(), Some(String::new()));
    let fixture = Fixture::on(&server, ack_wait(SHORTEST_KEPT)).await;
    let silent =
        pull::Config { durable_name: Some("refused".to_owned()), ..ack_wait(SHORTEST_KEPT) };
    fixture.jetstream.create_consumer_on_stream(silent, &fixture.stream).await.unwrap();
    let client = async_nats::connect(server.url()).await.unwrap();
    let _nobody = client.subscribe("nowhere.>").await.unwrap();
    client.flush().await.unwrap();
    let acks = format!("$JS.ACK.{}.refused.>", fixture.stream);
    server.configure(&format!("mappings {{ \"{acks}\": \"nowhere.>\" }}"));
    let refusing = Refusing { server, fixture };
    let proxy = Proxy::start(&refusing.server, &[]);
    let mut client = proxy.client().await;
    refusing.fixture.publish_many(100).await;
    let (served, _silent) =
        tokio::join!(refusing.fetch(&client, false, 100), refusing.fetch(&client, true, 100));
    tokio::time::sleep(Duration::from_millis(5 * SHORTEST_KEPT / 2)).await;
    for message in served {
        let acked = client.ack(ack(&message.token)).await.expect("its long lease was not kept");
        assert_eq!(acked.into_inner().outcome(), Outcome::Confirmed);
    }
}

/// NATS refuses each of them, and the proxy remembers the last refusals only.
#[tokio::test]
async fn each_of_many_refused_settlements_gets_its_reason_repeatedly() {
    const COUNT: usize = 600;
    let refusing = Refusing::new(60_000).await;
    let (_proxy, mut client) = refusing.proxy().await;
    refusing.fixture.publish_many(COUNT).await;
    let held = refusing.fetch(&client, true, u32::try_from(COUNT).unwrap()).await;
    for _ in 0..2 {
        let settlements = held.iter().map(|message| settlement(&message.token, NAK)).collect();
        let request = pb::SettleRequest { settlements, ..pb::SettleRequest::default() };
        let answer = client.settle(request).await.unwrap().into_inner();
        let mut told = std::collections::BTreeMap::<String, usize>::new();
        for result in answer.results {
            let told = told.entry(result.error.map_or_else(String::new, |error| error.reason));
            *told.or_default() += 1;
        }
        assert_eq!(told, [("NATS_PERMISSION".to_owned(), COUNT)].into());
    }
}
