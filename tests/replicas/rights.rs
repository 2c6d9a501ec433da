//! `deploy/nats` lists the rights that replicas need. With them everything works, and without any
//! one of them a call is refused. The page says which other rights a domain needs.

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::Outcome;
use futures_util::future::join_all;
use testkit::{
    eventually,
    jetstream::{Fixture, ack_wait, config},
    nats_server::{NatsServer, binary},
    proxy::{Client, Proxy, ack, extend, fetch, reason},
};
use tonic::Status;
use tonic_types::StatusExt as _;

use super::pair::{Replicas, key_file, new_key};

const ONE: &str = include_str!("../../deploy/nats/one-consumer.conf");
const MANY: &str = include_str!("../../deploy/nats/many-consumers.conf");
const PAGE: &str = include_str!("../../docs/reference/nats-rights.md");
/// The names of the users of these tests, and of their clusters.
const CLUSTER: &str = "fetch-proxy";

/// A header that our NATS client cannot parse.
const UNREADABLE: &[u8] = b"NATS/1.0\r\nA: a lone\rCR\r\n\r\n";

/// A server with a stream, and users of it.
struct NatsWithUsers {
    server: NatsServer,
    fixture: Fixture,
}

impl NatsWithUsers {
    /// NatsWithUsers are named as their clusters are. `more` is more configuration.
    async fn new(users: &[(&str, &str)], consumer: pull::Config, more: &str) -> Self {
        let server = NatsServer::start_with(binary(), Some(format!("{more}\n{}", allowed(""))));
        let fixture = Fixture::at(&as_user(&server, "admin"), consumer).await;
        server.configure(&format!("{more}\n{}", allowed(&listed(users, &fixture))));
        let last = users[users.len() - 1].0.to_owned();
        eventually("the server to know its users", || async {
            let options = async_nats::ConnectOptions::new();
            options.user_and_password(last.clone(), last.clone()).connect(server.url()).await.ok()
        })
        .await;
        Self { server, fixture }
    }

    fn url(&self, user: &str) -> String {
        as_user(&self.server, user)
    }

    fn proxy(&self, user: &str, flags: &[&str]) -> Proxy {
        Proxy::start_at(&self.url(user), &[&["--cluster", user], flags].concat())
    }
}

/// An admin, and those who are listed.
fn allowed(listed: &str) -> String {
    format!("authorization {{ users: [\n{{ user: admin, password: admin }}\n{listed}] }}")
}

/// Each user with their rights, at the stream of this test.
fn listed(users: &[(&str, &str)], fixture: &Fixture) -> String {
    let user = |(name, rights): &(&str, &str)| {
        let rights = rights
            .replace("ORDERS.worker", &format!("{}.{}", fixture.stream, fixture.consumer))
            .replace("ORDERS", &fixture.stream)
            .replace("_fetchproxy.fetch-proxy.", &format!("_fetchproxy.{name}."));
        format!("{{ user: {name}, password: {name}, permissions: {{\n{rights}}} }}\n")
    };
    users.iter().map(user).collect()
}

fn as_user(server: &NatsServer, user: &str) -> String {
    server.url().replace("//", &format!("//{user}:{user}@"))
}

#[test]
fn page_shows_the_file() {
    let block = PAGE.split("```conf\n").nth(1).unwrap().split("```").next().unwrap();
    assert_eq!(block, ONE);
}

#[tokio::test]
async fn rights_for_many_consumers_serve_their_stream_only() {
    let nats = NatsWithUsers::new(&[(CLUSTER, MANY)], config(), "").await;
    let fixture = &nats.fixture;
    let second = pull::Config { durable_name: Some("second".to_owned()), ..config() };
    fixture.jetstream.create_consumer_on_stream(second, &fixture.stream).await.unwrap();
    let other = Fixture::at(&nats.url("admin"), config()).await;
    let proxy = nats.proxy(CLUSTER, &[]);
    let mut client = proxy.client().await;
    fixture.publish("n", "x").await;
    for consumer in ["worker", "second"] {
        let mut request = fetch(fixture, 1, 10_000);
        request.consumer = consumer.to_owned();
        let answer = client.fetch(request).await.unwrap().into_inner();
        confirmed(&mut client, &answer.messages[0].token).await;
    }
    let denied = client.fetch(fetch(&other, 1, 10_000)).await.unwrap_err();
    assert_eq!(reason(&denied).1, "NATS_PERMISSION");
}

async fn confirmed(client: &mut Client, token: &str) {
    let acked = client.ack(ack(token)).await.unwrap().into_inner();
    assert_eq!(acked.outcome(), Outcome::Confirmed);
}

#[tokio::test]
async fn listed_rights_allow_forwarding_and_hand_over() {
    let nats = NatsWithUsers::new(&[(CLUSTER, ONE)], config(), "").await;
    let (url, fixture) = (nats.url(CLUSTER), &nats.fixture);
    let mut replicas = Replicas::start_in(CLUSTER, &[&url, &url]).await;
    let leased = replicas.leased(0, fixture, 2).await;
    let [sender, receiver] = &mut replicas.all[..] else { panic!() };
    confirmed(&mut receiver.client, &leased[0].token).await;
    sender.proxy.signal("TERM");
    assert!(sender.proxy.wait().await.success());
    confirmed(&mut receiver.client, &leased[1].token).await;
    assert_eq!(fixture.info().await.num_redelivered, 0);
    for replica in &replicas.all {
        let log = replica.proxy.log();
        assert!(!log.contains("NATS refuses"), "{log}");
    }
}

/// Publishes one, and waits until a Fetch, which is answered as it may be, has got rid of it.
async fn rid_of_what_cannot_be_read(nats: &NatsWithUsers, proxy: &Proxy) {
    let fixture = &nats.fixture;
    fixture.publish_raw(&nats.url("admin"), UNREADABLE).await;
    let client = proxy.client().await;
    eventually("it to be terminated", || async {
        let _ = client.clone().fetch(fetch(fixture, 1, 200)).await;
        let info = fixture.info().await;
        (info.num_pending == 0 && info.num_ack_pending == 0).then_some(())
    })
    .await;
    let log = proxy.log();
    assert!(log.contains("an unreadable message was terminated"), "{log}");
    assert!(!log.contains("NATS refuses"), "{log}");
}

#[tokio::test]
async fn listed_rights_allow_terminating_an_unreadable_message() {
    let nats = NatsWithUsers::new(&[(CLUSTER, ONE)], ack_wait(1000), "").await;
    rid_of_what_cannot_be_read(&nats, &nats.proxy(CLUSTER, &[])).await;
}

/// The refusal without each of the listed rights, in their order, and the first words of the
/// subject that the server refuses then.
const LOST: [(&str, &str); 8] = [
    ("Fetch: NATS_PERMISSION", "$JS.API.CONSUMER.INFO."),
    ("Fetch: NATS_PERMISSION", "$JS.API.CONSUMER.MSG.NEXT."),
    ("Ack: NATS_PERMISSION", "$JS.ACK."),
    ("Fetch of what cannot be read: CONSUMER_SUSPECTED", "$JS.API.STREAM.MSG.GET."),
    ("Extend at another: OWNER_UNREACHABLE", "_fetchproxy."),
    ("Extend at another: OWNER_UNREACHABLE", "_INBOX."),
    ("Fetch: NATS_PERMISSION", "_INBOX."),
    ("Extend at another: OWNER_UNREACHABLE", "_fetchproxy."),
];

#[tokio::test]
async fn missing_listed_right_refuses_something() {
    let rights: Vec<(String, String)> =
        (0..LOST.len()).map(|place| (format!("without-{place}"), without(place))).collect();
    let users: Vec<(&str, &str)> = rights.iter().map(|(user, list)| (&**user, &**list)).collect();
    let nats = NatsWithUsers::new(&users, ack_wait(5000), "").await;
    let rounds = join_all(users.iter().map(|(user, _)| round(&nats, user))).await;
    for ((lost, subject), (owner, refused)) in LOST.iter().zip(rounds) {
        let refused = match refused {
            Some(refused) => refused,
            None => suspected(&nats, &owner).await,
        };
        assert_eq!(refused, *lost, "{subject}\n{}", owner.log());
        let subject = format!("\"subject\":\"{subject}");
        let mut words = vec!["NATS refuses this subject"];
        words.extend(subject.contains("_fetchproxy").then_some("this replica serves alone"));
        eventually("the log to name the subject", || async {
            let log = owner.log();
            let said = |word: &&str| {
                log.lines().any(|line| line.contains(word) && line.contains(&subject))
            };
            words.iter().all(said).then_some(())
        })
        .await;
    }
}

/// The list without its right at this place.
fn without(place: usize) -> String {
    let lines: Vec<&str> = ONE.lines().collect();
    let rights = (0..lines.len()).filter(|line| lines[*line].trim().starts_with('"'));
    let rights: Vec<usize> = rights.collect();
    assert_eq!(rights.len(), LOST.len());
    let others = (0..lines.len()).filter(|line| *line != rights[place]);
    others.map(|line| format!("{}\n", lines[line])).collect()
}

/// Two replicas of this user; a Fetch at one, an Extend at the other, an Ack at the first; and the
/// first of it that was refused.
async fn round(nats: &NatsWithUsers, user: &str) -> (Proxy, Option<String>) {
    let keys = key_file(&[&new_key()]);
    let flags = ["--token-key-file", keys.path().to_str().unwrap()];
    let (owner, other) = (nats.proxy(user, &flags), nats.proxy(user, &flags));
    owner.ready().await;
    other.ready().await;
    let (mut at_owner, mut at_other) = (owner.client().await, other.client().await);
    nats.fixture.publish("n", "x").await;
    let refused = async {
        let fetched = at_owner.fetch(fetch(&nats.fixture, 1, 10_000)).await;
        let token =
            fetched.map_err(|error| ("Fetch", error))?.into_inner().messages.remove(0).token;
        let extended = at_other.extend(extend(&token, 60_000)).await;
        extended.map_err(|error| ("Extend at another", error))?;
        at_owner.ack(ack(&token)).await.map_err(|error| ("Ack", error))
    };
    let refused = refused.await.err().map(|(call, error)| told(call, &error));
    (owner, refused)
}

fn told(call: &str, error: &Status) -> String {
    format!("{call}: {}", reason(error).1)
}

async fn suspected(nats: &NatsWithUsers, proxy: &Proxy) -> String {
    nats.fixture.publish_raw(&nats.url("admin"), UNREADABLE).await;
    let client = proxy.client().await;
    let refused = eventually("the suspicion", || async {
        match client.clone().fetch(fetch(&nats.fixture, 1, 2000)).await {
            Err(status) => (reason(&status).1 == "CONSUMER_SUSPECTED").then_some(status),
            // A leftover of another user's proxy would clear the consumer each time it comes.
            Ok(answer) => {
                for message in answer.into_inner().messages {
                    let _ = client.clone().ack(ack(&message.token)).await;
                }
                None
            }
        }
    })
    .await;
    assert!(
        refused.get_details_error_info().unwrap().metadata["subject"]
            .starts_with("$JS.API.STREAM.MSG.GET.")
    );
    told("Fetch of what cannot be read", &refused)
}

const DOMAIN: &str = "jetstream { domain: D }\n";
/// The log line if acks reach all domains.
const NO_DOMAIN: &str = "acks name no JetStream domain";
const IN_DOMAIN: [&str; 2] = ["--js-domain", "D"];

#[tokio::test]
async fn server_of_the_domain_needs_the_usual_rights() {
    let nats = NatsWithUsers::new(&[(CLUSTER, ONE)], ack_wait(1000), DOMAIN).await;
    let proxy = nats.proxy(CLUSTER, &IN_DOMAIN);
    nats.fixture.publish("n", "x").await;
    fetched_and_acked(&nats.fixture, &proxy).await;
    assert_eq!(proxy.log().matches(NO_DOMAIN).count(), 1, "{}", proxy.log());
    nats.fixture.publish("n", "x").await;
    fetched_and_acked(&nats.fixture, &proxy).await;
    assert_eq!(proxy.log().matches(NO_DOMAIN).count(), 1, "{}", proxy.log());
    rid_of_what_cannot_be_read(&nats, &proxy).await;
}

#[tokio::test]
async fn server_without_a_domain_logs_nothing_of_domains() {
    let nats = NatsWithUsers::new(&[(CLUSTER, ONE)], config(), "").await;
    let proxy = nats.proxy(CLUSTER, &[]);
    nats.fixture.publish("n", "x").await;
    fetched_and_acked(&nats.fixture, &proxy).await;
    assert!(!proxy.log().contains(NO_DOMAIN), "{}", proxy.log());
}

#[tokio::test]
async fn missing_right_at_a_server_of_the_domain_is_named() {
    let line = "\"$JS.API.CONSUMER.INFO.ORDERS.worker\"";
    let less = ONE.replace(line, "");
    assert_ne!(less, ONE);
    let nats = NatsWithUsers::new(&[(CLUSTER, &less)], config(), DOMAIN).await;
    let proxy = nats.proxy(CLUSTER, &IN_DOMAIN);
    let client = proxy.client().await;
    let told = eventually("NATS", || async {
        let refused = client.clone().fetch(fetch(&nats.fixture, 1, 10_000)).await.unwrap_err();
        let told = reason(&refused).1;
        (told != "NATS_UNAVAILABLE").then_some(told)
    });
    assert_eq!(told.await, "NATS_PERMISSION");
}

#[tokio::test]
async fn leaf_node_outside_the_domain_changes_the_api_and_not_acks() {
    assert!(PAGE.contains("`$JS.D.API.`"));
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let leafnodes = format!("leafnodes {{ listen: \"127.0.0.1:{port}\" }}\n");
    let hub = NatsServer::start_with(binary(), Some(leafnodes + DOMAIN + &allowed("")));
    let fixture = Fixture::at(&as_user(&hub, "admin"), config()).await;
    let rights = ONE.replace("$JS.API.", "$JS.D.API.");
    let remote = format!("nats-leaf://admin:admin@127.0.0.1:{port}");
    let leaf = format!(
        "jetstream {{ domain: L }}\nleafnodes {{ remotes: [ {{ url: \"{remote}\" }} ] }}\n{}",
        allowed(&listed(&[(CLUSTER, &rights)], &fixture))
    );
    let leaf = NatsServer::start_with(binary(), Some(leaf));
    let proxy = Proxy::start_at(&as_user(&leaf, CLUSTER), &IN_DOMAIN);
    fixture.publish("n", "x").await;
    fetched_and_acked(&fixture, &proxy).await;
}

/// As soon as NATS is there.
async fn fetched_and_acked(fixture: &Fixture, proxy: &Proxy) {
    let client = proxy.client().await;
    let answer = eventually("a message", || async {
        client.clone().fetch(fetch(fixture, 1, 10_000)).await.ok()
    })
    .await;
    confirmed(&mut client.clone(), &answer.get_ref().messages[0].token).await;
}

/// Servers can be configured to name the domain and the account in the subjects of acks.
#[tokio::test]
async fn long_ack_subjects_need_one_more_right() {
    let line = "$JS.ACK.*.*.ORDERS.worker.>";
    let flag = "feature_flags { js_ack_fc_v2: true }";
    for told in [line, flag] {
        assert!(PAGE.contains(&format!("`{told}`")));
    }
    let more = ONE.replacen("publish: [", &format!("publish: [\n  \"{line}\""), 1);
    let users = [("without", ONE), ("with", &more)];
    let nats = NatsWithUsers::new(&users, ack_wait(1000), &format!("{DOMAIN}{flag}")).await;
    let [without, with] = ["without", "with"].map(|user| nats.proxy(user, &IN_DOMAIN));
    let mut client = without.client().await;
    nats.fixture.publish("n", "x").await;
    let answer = client.fetch(fetch(&nats.fixture, 1, 10_000)).await.unwrap().into_inner();
    let denied = client.ack(ack(&answer.messages[0].token)).await.unwrap_err();
    assert_eq!(told("Ack", &denied), "Ack: NATS_PERMISSION");
    drop(without);
    fetched_and_acked(&nats.fixture, &with).await;
    assert!(!with.log().contains(NO_DOMAIN), "{}", with.log());
    rid_of_what_cannot_be_read(&nats, &with).await;
}
