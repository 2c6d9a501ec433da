//! A worker, while its proxy or NATS is away.

use testkit::{
    eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::Proxy,
};

use super::{Worker, outcomes};

#[tokio::test]
async fn worker_loses_nothing_when_its_proxy_drains_and_comes_back() {
    let fixture = Fixture::new(config()).await;
    let key = tempfile::NamedTempFile::new().unwrap();
    let made = std::process::Command::new(env!("CARGO_BIN_EXE_fetch-proxy")).arg("keygen").output();
    std::fs::write(key.path(), made.unwrap().stdout).unwrap();
    let key = key.path().to_str().unwrap();
    let flags = ["--token-key-file", key, "--cluster", &fixture.stream, "--drain-timeout", "1s"];
    let mut proxy = Proxy::start(NatsServer::shared(), &flags);
    fixture.publish_many(3).await;
    let script = "echo begin $FETCH_PROXY_SEQUENCE >> log
        while ! test -e go; do sleep 0.02; done; echo end >> log";
    let mut worker = Worker::start(&proxy, &fixture, &["-j", "2", "--grace", "60s"], script);
    worker.lines("log", 2).await;
    let address = proxy.grpc.clone();
    proxy.signal("TERM");
    proxy.wait().await;
    let _proxy = Proxy::start_on(&address, &NatsServer::shared().url(), &flags);
    // A third message proves that the next stream is there.
    worker.write("go");
    let said = worker.settled(3).await;
    assert_eq!(
        outcomes(&said),
        [(1, "acked"), (2, "acked"), (3, "acked")],
        "{}",
        worker.read("err")
    );
    assert_eq!(worker.read("log").matches("begin").count(), 3, "nothing ran twice");
    worker.signal("TERM");
    worker.ended().await;
    assert_eq!(fixture.info().await.num_ack_pending, 0);
}

#[tokio::test]
async fn worker_settles_everything_after_nats_has_restarted() {
    let mut server = NatsServer::start();
    let fixture = Fixture::on(&server, config()).await;
    let proxy = Proxy::start(&server, &[]);
    fixture.publish_many(4).await;
    let script = "echo begin >> log; while ! test -e go; do sleep 0.02; done";
    let mut worker = Worker::start(&proxy, &fixture, &["-j", "2"], script);
    worker.lines("log", 2).await;
    server.stop();
    worker.write("go");
    server.restart();
    eventually("all messages to be settled", || async {
        let info = fixture.try_info().await?;
        (info.num_pending == 0 && info.num_ack_pending == 0).then_some(())
    })
    .await;
    worker.signal("TERM");
    let said = worker.ended().await;
    let acked = outcomes(&said).into_iter().filter(|(_, outcome)| *outcome == "acked");
    let acked: Vec<u64> = acked.map(|(sequence, _)| sequence).collect();
    for sequence in 1..=4 {
        assert!(acked.contains(&sequence), "{sequence} is not in {said:?}");
    }
}

#[tokio::test]
async fn worker_waits_for_its_proxy() {
    let fixture = Fixture::new(config()).await;
    fixture.publish_many(1).await;
    let address = {
        let mut gone = Proxy::start(NatsServer::shared(), &[]);
        gone.signal("KILL");
        gone.wait().await;
        gone
    };
    let mut worker = Worker::start(&address, &fixture, &["--max", "1"], "exit 0");
    eventually("a note", || async {
        worker.read("err").contains("note: UNAVAILABLE: cannot connect").then_some(())
    })
    .await;
    let _proxy = Proxy::start_on(&address.grpc, &NatsServer::shared().url(), &[]);
    assert_eq!(outcomes(&worker.ended().await), [(1, "acked")]);
}
