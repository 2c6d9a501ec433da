//! Readiness and liveness, by gRPC and by HTTP, with NATS there, away, and back.

use std::io::{Read as _, Write as _};

use fetch_proxy::{grpc::SERVICE, ops::LIVENESS};
use testkit::{eventually, nats_server::NatsServer, proxy::Proxy};
use tonic::transport::Channel;
use tonic_health::pb::{
    HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
};

async fn status(addr: &str, service: &str) -> ServingStatus {
    let channel = Channel::from_shared(format!("http://{addr}")).unwrap().connect().await.unwrap();
    let request = HealthCheckRequest { service: service.to_owned() };
    HealthClient::new(channel).check(request).await.unwrap().into_inner().status()
}

/// Status code and body of a plain HTTP/1.1 GET.
fn get(addr: &str, path: &str) -> (u16, String) {
    let mut stream = std::net::TcpStream::connect(addr).unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let code = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (code, answer.rsplit("\r\n\r\n").next().unwrap().trim().to_owned())
}

#[tokio::test]
async fn proxy_with_nats_is_ready_on_both_listeners() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    eventually("readiness", || async {
        (status(&proxy.ops, "").await == ServingStatus::Serving).then_some(())
    })
    .await;
    for addr in [&proxy.grpc, &proxy.ops] {
        for service in ["", SERVICE, LIVENESS] {
            assert_eq!(status(addr, service).await, ServingStatus::Serving, "{service}");
        }
    }
    assert_eq!(get(&proxy.ops, "/livez"), (200, "ok".to_owned()));
    assert_eq!(get(&proxy.ops, "/readyz"), (200, "ok".to_owned()));
    assert_eq!(get(&proxy.ops, "/nothing").0, 404);
}

/// As the protocol has it: the stream stays, in case that the name will be known.
#[tokio::test]
async fn watch_of_an_unknown_service_answers_unknown() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    for addr in [&proxy.grpc, &proxy.ops] {
        let channel = Channel::from_shared(format!("http://{addr}")).unwrap();
        let mut health = HealthClient::new(channel.connect().await.unwrap());
        let mut watch = async |service: &str| {
            let request = HealthCheckRequest { service: service.to_owned() };
            let mut watching = health.watch(request).await.unwrap().into_inner();
            let status = watching.message().await.unwrap().unwrap().status();
            let short = std::time::Duration::from_millis(200);
            let next = tokio::time::timeout(short, watching.message()).await;
            assert!(next.is_err(), "{service}: {next:?}");
            status
        };
        assert_eq!(watch("nobody").await, ServingStatus::ServiceUnknown);
        assert_eq!(watch(LIVENESS).await, ServingStatus::Serving);
        assert_eq!(watch(SERVICE).await, ServingStatus::Serving);
        let request = HealthCheckRequest { service: "nobody".to_owned() };
        let refused = health.check(request).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::NotFound);
    }
}

#[tokio::test]
async fn proxy_without_nats_is_alive_and_becomes_ready_later() {
    let mut server = NatsServer::start();
    server.kill();
    let proxy = Proxy::start(&server, &[]);
    assert_eq!(status(&proxy.ops, LIVENESS).await, ServingStatus::Serving);
    assert_eq!(status(&proxy.ops, "").await, ServingStatus::NotServing);
    assert_eq!(status(&proxy.grpc, SERVICE).await, ServingStatus::NotServing);
    assert_eq!(get(&proxy.ops, "/livez").0, 200);
    let why = eventually("the reason", || async {
        let (code, why) = get(&proxy.ops, "/readyz");
        assert_eq!(code, 503);
        why.contains("NATS cannot be reached").then_some(why)
    })
    .await;
    assert!(!why.is_empty());
    server.restart();
    eventually("readiness", || async { (get(&proxy.ops, "/readyz").0 == 200).then_some(()) }).await;
    assert_eq!(status(&proxy.grpc, "").await, ServingStatus::Serving);
}

#[tokio::test]
async fn proxy_without_nats_for_ten_seconds_is_unready_and_alive() {
    let mut server = NatsServer::start();
    let proxy = Proxy::start(&server, &[]);
    eventually("readiness", || async { (get(&proxy.ops, "/readyz").0 == 200).then_some(()) }).await;
    let began = std::time::Instant::now();
    server.kill();
    eventually("unreadiness", || async { (get(&proxy.ops, "/readyz").0 == 503).then_some(()) })
        .await;
    assert!(began.elapsed() >= fetch_proxy::readiness::OUTAGE_GRACE);
    assert_eq!(status(&proxy.ops, LIVENESS).await, ServingStatus::Serving);
    server.restart();
    eventually("readiness", || async { (get(&proxy.ops, "/readyz").0 == 200).then_some(()) }).await;
}
