//! Certificates of clients as identities: the rights of their principals, and which credential counts.

use std::time::SystemTime;

use fetch_proxy::access::NewApiKey;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyUsagePurpose, SanType};
use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{ack, fetch, reason, waiting, with_key},
};
use tonic::Status;
use tonic_types::StatusExt as _;

use super::*;

const ORDERS: &str = "spiffe://prod.example/ns/orders/sa/worker";

/// A proxy that demands rights of its clients, and the authority of their certificates.
struct Guarded {
    fixture: Fixture,
    ca: Authority,
    files: Mounted,
    key: String,
    proxy: Proxy,
}

impl Guarded {
    /// The principal `orders` may work at the consumer of the fixture, and `other` may do nothing.
    async fn start(authenticate: &str, more: &[&str]) -> Self {
        let fixture = Fixture::new(config()).await;
        let ca = Authority::new("ca");
        let files = Mounted::new(&ca.server(), ca.pem());
        let key = NewApiKey::random("other").unwrap().unwrap();
        fs::write(files.file("keys"), key.line).unwrap();
        write(&files, &policy(&fixture, authenticate));
        let policy = files.file("policy.yaml");
        let flags = [&["--policy-file", &policy][..], more].concat();
        let proxy = start(&NatsServer::shared().url(), &files.client_flags(), &flags);
        proxy.ready().await;
        Self { fixture, ca, files, key: key.secret, proxy }
    }

    async fn client(&self, identity: Option<&Signed>) -> Client {
        client(&self.proxy, self.ca.pem(), identity).await.unwrap()
    }

    /// The answer to a Fetch of a client with this certificate: the reason of a refusal, and its detail.
    async fn fetches(&self, identity: Option<&Signed>, bearer: Option<&str>) -> Result<(), String> {
        let request = fetch(&self.fixture, 1, 0);
        let request = match bearer {
            Some(bearer) => with_key(bearer, request),
            None => tonic::Request::new(request),
        };
        let answer = self.client(identity).await.fetch(request).await;
        answer.map(|_| ()).map_err(|status| refusal(&status))
    }
}

fn policy(fixture: &Fixture, authenticate: &str) -> String {
    let (stream, consumer) = (&fixture.stream, &fixture.consumer);
    format!(
        "version: 1\n\
         authenticate: {{{authenticate}}}\n\
         principals:\n\
         - {{name: orders, match: ['spiffe://prod.example/ns/orders/*', 'dns:*.orders.example']}}\n\
         - {{name: other, match: ['key:other', 'dns:other.example', 'spiffe://prod.example/ns/other/*']}}\n\
         rules:\n\
         - {{principals: [orders], streams: [{stream}], consumers: [{consumer}], verbs: [work]}}\n"
    )
}

fn write(files: &Mounted, policy: &str) {
    let part = files.file("part");
    fs::write(&part, policy).unwrap();
    fs::rename(part, files.file("policy.yaml")).unwrap();
}

/// The reason of a refusal, with `why`, `detail` or `principal`.
fn refusal(status: &Status) -> String {
    let metadata = status.get_details_error_info().unwrap().metadata;
    let detail = ["why", "detail", "principal"].iter().find_map(|name| metadata.get(*name));
    format!("{} {}", reason(status).1, detail.map_or("", |detail| &**detail))
}

#[tokio::test]
async fn line_for_auditors_has_the_digest_of_the_certificate() {
    let guarded = Guarded::start("", &[]).await;
    let identity = guarded.ca.workload("spiffe://prod.example/ns/other/sa/a");
    guarded.fetches(Some(&identity), None).await.unwrap_err();
    let digest = ::ring::digest::digest(&::ring::digest::SHA256, &identity.der);
    let digits: String = digest.as_ref()[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let certificate = format!("\"certificate\":\"{digits}\"");
    let told = || async {
        let log = guarded.proxy.log();
        let mut denied = log.lines().filter(|line| line.contains("\"event\":\"denied\""));
        denied.any(|line| line.contains(&certificate)).then_some(())
    };
    eventually("the line", told).await;
}

#[tokio::test]
async fn certificate_has_the_rights_of_the_principal_that_matches_it() {
    // Nothing but the certificates identifies a caller.
    let guarded = Guarded::start("", &[]).await;
    let ca = &guarded.ca;
    let none = Err("NOT_ALLOWED no_principal".to_owned());
    let other = Err("NOT_ALLOWED other".to_owned());
    let missing = Err("UNAUTHENTICATED missing".to_owned());
    let named = |names: &[&str]| {
        ca.client_by("unnamed", |params| {
            let name = |name: &&str| SanType::DnsName((*name).try_into().unwrap());
            params.subject_alt_names = names.iter().map(name).collect();
        })
    };
    let common_name = ca.client_by("unnamed", |params| {
        params.subject_alt_names = Vec::new();
        params.distinguished_name.push(DnType::CommonName, "worker.orders.example");
    });
    let long = format!("spiffe://prod.example/ns/orders/{}", "p".repeat(1900));
    for (who, identity, answer) in [
        ("a workload", ca.workload(ORDERS), Ok(())),
        ("a workload with a long id", ca.workload(&long), Ok(())),
        ("another workload", ca.workload("spiffe://prod.example/ns/other/sa/a"), other.clone()),
        ("an unknown workload", ca.workload("spiffe://test.example/ns/orders/sa/a"), none.clone()),
        ("a DNS name", named(&["a.orders.example"]), Ok(())),
        ("a DNS name in capitals", named(&["A.Orders.Example"]), Ok(())),
        ("the second of two names", named(&["x.example", "a.orders.example"]), Ok(())),
        ("the first that matches", named(&["other.example", "a.orders.example"]), other),
        ("an unknown name", named(&["x.example"]), none),
        ("no name", named(&[]), missing.clone()),
        ("a common name alone", common_name, missing),
    ] {
        assert_eq!(guarded.fetches(Some(&identity), None).await, answer, "{who}");
    }
    let fixture = &guarded.fixture;
    fixture.publish("n", "x").await;
    let mut client = guarded.client(Some(&ca.workload(ORDERS))).await;
    let answer = client.fetch(fetch(fixture, 1, 10_000)).await.unwrap().into_inner();
    let token = &answer.messages[0].token;
    let mut foreign = guarded.client(Some(&named(&["other.example"]))).await;
    assert_eq!(reason(&foreign.ack(ack(token)).await.unwrap_err()).1, "NOT_ALLOWED");
    // Another identity of the same principal.
    let mut own = guarded.client(Some(&named(&["b.orders.example"]))).await;
    own.ack(ack(token)).await.unwrap();
}

#[tokio::test]
async fn certificate_that_is_no_whole_svid_opens_no_connection() {
    let guarded = Guarded::start("", &[]).await;
    let svid = |uris: &[&str], change: fn(&mut CertificateParams)| {
        guarded.ca.client_by("unnamed", |params| {
            let uri = |uri: &&str| SanType::URI((*uri).try_into().unwrap());
            params.subject_alt_names = uris.iter().map(uri).collect();
            change(params);
        })
    };
    let plain: fn(&mut CertificateParams) = |_| {};
    for (who, identity) in [
        ("two URIs", svid(&[ORDERS, "spiffe://prod.example/ns/orders/sa/b"], plain)),
        ("the root path", svid(&["spiffe://prod.example/"], plain)),
        ("a trust domain alone", svid(&["spiffe://prod.example"], plain)),
        ("capitals in the trust domain", svid(&["spiffe://PROD.example/ns/orders/sa/a"], plain)),
        (
            "an authority",
            svid(&[ORDERS], |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
        ),
        (
            "a right to sign",
            svid(&[ORDERS], |params| params.key_usages.push(KeyUsagePurpose::KeyCertSign)),
        ),
    ] {
        let seen = is_served(&guarded.proxy, &h2(&guarded.ca, Some(&identity))).await;
        assert!(seen.is_err(), "{who}");
    }
    let whole = svid(&[ORDERS], |params| params.key_usages.push(KeyUsagePurpose::DigitalSignature));
    assert_eq!(guarded.fetches(Some(&whole), None).await, Ok(()));
}

#[tokio::test]
async fn bearer_decides_alone_and_a_bad_bearer_never_falls_back_to_the_certificate() {
    let guarded = Guarded::start("api_keys: {file: keys}", &[]).await;
    let worker = guarded.ca.workload(ORDERS);
    let unknown = NewApiKey::random("orders").unwrap().unwrap().secret;
    for (bearer, answer) in [
        (None, Ok(())),
        (Some(&*guarded.key), Err("NOT_ALLOWED other")),
        (Some(&*unknown), Err("UNAUTHENTICATED api_key")),
        (Some("fpk_short"), Err("UNAUTHENTICATED api_key")),
        (Some("something"), Err("UNAUTHENTICATED malformed")),
        (Some(""), Err("UNAUTHENTICATED malformed")),
    ] {
        let seen = guarded.fetches(Some(&worker), bearer).await;
        assert_eq!(seen, answer.map_err(str::to_owned), "{bearer:?}");
    }
    let mut twice = with_key(&guarded.key, fetch(&guarded.fixture, 1, 0));
    twice.metadata_mut().append("authorization", "Bearer x".parse().unwrap());
    let refused = guarded.client(Some(&worker)).await.fetch(twice).await.unwrap_err();
    assert_eq!(refusal(&refused), "UNAUTHENTICATED malformed");
}

#[tokio::test]
async fn client_may_come_without_a_certificate_if_a_bearer_names_it() {
    let optional = ["--tls-client-auth", "optional"];
    let guarded = Guarded::start("api_keys: {file: keys}", &optional).await;
    let worker = guarded.ca.workload(ORDERS);
    assert_eq!(guarded.fetches(Some(&worker), None).await, Ok(()));
    let missing = guarded.fetches(None, None).await.unwrap_err();
    assert_eq!(missing, "UNAUTHENTICATED missing");
    let other = guarded.fetches(None, Some(&guarded.key)).await.unwrap_err();
    assert_eq!(other, "NOT_ALLOWED other");

    // Without another way to identify callers, the certificate is the only one.
    let guarded = Guarded::start("", &optional).await;
    assert_eq!(guarded.fetches(Some(&guarded.ca.workload(ORDERS)), None).await, Ok(()));
    let missing = guarded.fetches(None, None).await.unwrap_err();
    assert_eq!(missing, "UNAUTHENTICATED missing");

    // A caller may be anonymous: a certificate that no principal matches is not.
    let guarded = Guarded::start("anonymous: true", &optional).await;
    let open = policy(&guarded.fixture, "anonymous: true").replace("'key:other'", "anonymous");
    write(&guarded.files, &open.replace("[orders], ", "['*'], "));
    let anonymous = || async { guarded.fetches(None, None).await.ok() };
    eventually("the new policy", anonymous).await;
    let stranger = guarded.ca.workload("spiffe://test.example/ns/orders/sa/a");
    let refused = guarded.fetches(Some(&stranger), None).await.unwrap_err();
    assert_eq!(refused, "NOT_ALLOWED no_principal");
}

#[tokio::test]
async fn open_fetch_ends_before_the_certificate_of_its_client() {
    let guarded = Guarded::start("", &[]).await;
    let end = SystemTime::now() + Duration::from_secs(4);
    let short = guarded.ca.client_by("w.orders.example", |params| params.not_after = end.into());
    let mut client = guarded.client(Some(&short)).await;
    let answer = client.fetch(fetch(&guarded.fixture, 1, 60_000)).await.unwrap().into_inner();
    assert!(answer.messages.is_empty());
    assert!(SystemTime::now() < end + Duration::from_secs(3), "the call outlived its certificate");
}

#[tokio::test]
async fn identity_that_leaves_the_policy_loses_its_rights_on_an_open_connection() {
    let guarded = Guarded::start("", &[]).await;
    let Guarded { fixture, files, proxy, .. } = &guarded;
    let mut client = guarded.client(Some(&guarded.ca.workload(ORDERS))).await;
    let open = waiting(&client, fixture, fetch(fixture, 1, 20_000)).await;
    write(
        files,
        &policy(fixture, "").replace("spiffe://prod.example/ns/orders/*", "spiffe://gone/*"),
    );
    let loaded = || async { (said(proxy, "a policy is in use") == 2).then_some(()) };
    eventually("the new policy", loaded).await;
    fixture.publish("n", "x").await;
    let refused = open.await.unwrap().unwrap_err();
    assert_eq!(reason(&refused).1, "NOT_ALLOWED");
    let refused = client.fetch(fetch(fixture, 1, 0)).await.unwrap_err();
    assert_eq!(refusal(&refused), "NOT_ALLOWED no_principal");
    let heir = guarded.ca.client("w.orders.example");
    let answer = guarded.client(Some(&heir)).await.fetch(fetch(fixture, 1, 10_000)).await.unwrap();
    assert_eq!(answer.into_inner().messages.len(), 1, "the message went to the next caller");
}
