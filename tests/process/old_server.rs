//! Debian's nats-server 2.9 ignores a Term with a reason, and answers OK. It is refused.

use std::{io::Write as _, path::PathBuf};

use fetch_proxy::client;
use testkit::{
    BOUND, eventually,
    nats_server::NatsServer,
    proxy::{Proxy, fetch, reason},
};

#[tokio::test]
async fn old_nats_server_is_refused_and_never_hangs() {
    let Some(binary) = std::env::var_os("FETCH_PROXY_TEST_OLD_NATS_SERVER") else {
        // Not by a macro: what those print of a test that passes is not shown.
        let told = "NOT TESTED: no old nats-server; FETCH_PROXY_TEST_OLD_NATS_SERVER names none";
        return writeln!(std::io::stderr(), "{told}").unwrap();
    };
    let server = NatsServer::start_with(PathBuf::from(binary), None);
    let fixture = testkit::jetstream::Fixture::on(&server, testkit::jetstream::config()).await;
    let proxy = Proxy::start(&server, &[]);
    eventually("the verdict", || async { proxy.log().contains("is too old").then_some(()) }).await;
    let (status, serving) = client::probe(&proxy.ops, "", BOUND).await.unwrap();
    assert_eq!((status.as_str(), serving), ("NOT_SERVING", false));
    let mut client = proxy.client().await;
    let refused = tokio::time::timeout(BOUND, client.fetch(fetch(&fixture, 1, 60_000)));
    let refused = refused.await.expect("it hangs").unwrap_err();
    assert_eq!(reason(&refused).1, "NATS_UNAVAILABLE");
    assert!(refused.message().contains("too old"), "{}", refused.message());
}
