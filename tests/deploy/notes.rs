//! The notes that helm prints after an installation: each line works when it is pasted.

use std::{env, process::Command};

use testkit::{
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::Proxy,
};

use crate::{
    helm::{self, LEAST},
    tool,
};

fn notes(values: &[&str]) -> String {
    let mut helm = tool("FETCH_PROXY_TEST_HELM");
    helm.args(["install", "tasks", "--namespace", "work", "--dry-run=client"]).arg(helm::chart());
    helm.args(helm::flags(values));
    let output = String::from_utf8(helm.output().unwrap().stdout).unwrap();
    output.split_once("NOTES:").unwrap().1.to_owned()
}

#[test]
fn notes_name_the_objects_of_the_release() {
    let notes = notes(&[LEAST, "service.port=8080"]);
    for there in [
        "tasks-fetch-proxy.work.svc:8080",
        "dns:///tasks-fetch-proxy-headless.work.svc:50051",
        "service/tasks-fetch-proxy 50051:8080",
        "deploy/tasks-fetch-proxy",
    ] {
        assert!(notes.contains(there), "{there}: {notes}");
    }
}

#[test]
fn notes_warn_of_dangers_only() {
    const ALONE: &str = "nobody to hand leases to";
    const OPEN: &str = "no authentication";
    const UNREACHED: &str = "networkPolicy.clients";
    for (values, said) in [
        (&[LEAST][..], &[][..]),
        (&[LEAST, "replicas=1", "networkPolicy.enabled=false"], &[ALONE, OPEN]),
        (&[LEAST, "replicas=1", "autoscaling.enabled=true"], &[]),
        (&[LEAST, "autoscaling.enabled=true", "autoscaling.minReplicas=1"], &[ALONE]),
        (&[LEAST, "service.type=LoadBalancer"], &[UNREACHED]),
        (&[LEAST, "service.type=NodePort"], &[UNREACHED]),
        (
            &[
                LEAST,
                "service.type=LoadBalancer",
                "networkPolicy.clients[0].ipBlock.cidr=192.0.2.0/24",
            ],
            &[],
        ),
        (&[LEAST, "service.type=LoadBalancer", "networkPolicy.enabled=false"], &[OPEN]),
        (&[LEAST, "tls.secret=a", "networkPolicy.enabled=false"], &[OPEN]),
        (&[LEAST, "access.policySecret=a", "networkPolicy.enabled=false"], &[]),
        (&[LEAST, "access.policy=a: b", "networkPolicy.enabled=false"], &[]),
        (&[LEAST, "tls.secret=a", "tls.clientCASecret=b", "networkPolicy.enabled=false"], &[]),
        (&[LEAST, "tls.secret=a", "tls.clientCAConfigMap=b", "networkPolicy.enabled=false"], &[]),
    ] {
        let notes = notes(values);
        for warning in [ALONE, OPEN, UNREACHED] {
            let expected = said.contains(&warning);
            assert_eq!(notes.contains(warning), expected, "{values:?}: {warning}: {notes}");
        }
        // An update has somebody: one pod more, then one less.
        assert!(!notes.contains("update"), "{notes}");
    }
}

#[tokio::test]
async fn lines_of_the_notes_fetch_a_message() {
    let server = NatsServer::start();
    let proxy = Proxy::start(&server, &[]);
    let fixture = Fixture::on(&server, config()).await;
    let notes = notes(&[LEAST]);
    let here = |line: &str| {
        line.replace("127.0.0.1:50051", &proxy.grpc)
            .replace("ORDERS", &fixture.stream)
            .replace("worker", &fixture.consumer)
    };
    let grpcurl = notes.split("grpcurl ").nth(1).unwrap().split("\n\n").next().unwrap();
    let grpcurl = format!("{} {}", env::var("FETCH_PROXY_TEST_GRPCURL").unwrap(), here(grpcurl));
    let by_hand = notes.split("-- /fetch-proxy ").nth(1).unwrap().lines().next().unwrap();
    let by_hand =
        format!("{} {} --addr {}", env!("CARGO_BIN_EXE_fetch-proxy"), here(by_hand), proxy.grpc);
    for (line, payload) in [(grpcurl, "by grpcurl"), (by_hand, "by hand")] {
        fixture.publish("n", payload).await;
        let output = Command::new("sh").args(["-c", &line]).output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains(payload), "{line}: {output:?}");
    }
}
