//! `helm test`: its pod runs where the others may, is let in by the policy, and what it runs works.

use std::{net::TcpListener, process::Command};

use serde_json::{Value, json};
use testkit::{nats_server::NatsServer, proxy::Proxy};

use crate::helm::{self, LEAST, one};

/// The objects that the chart makes for `helm test` alone.
fn hook<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let of_tests = |object: &&Value| helm::is_hook(object) && object["kind"] == kind;
    objects.iter().find(of_tests).unwrap_or_else(|| panic!("no {kind} for the test"))
}

#[test]
fn helm_test_pod_runs_where_other_pods_may() {
    let placed = ["nodeSelector.pool=here", "tolerations[0].operator=Exists"];
    let objects = helm::objects(&[LEAST, placed[0], placed[1]]);
    let others = &one(&objects, "Deployment")["spec"]["template"]["spec"];
    for field in ["nodeSelector", "tolerations"] {
        assert!(!others[field].is_null());
        assert_eq!(hook(&objects, "Pod")["spec"][field], others[field]);
    }
}

/// However few are let in else, and only for as long as the test runs.
#[test]
fn helm_test_pod_passes_the_network_policy() {
    let clients = "networkPolicy.clients[0].podSelector.matchLabels.role=worker";
    let objects = helm::objects(&[LEAST, clients]);
    let (pod, policy) = (hook(&objects, "Pod"), hook(&objects, "NetworkPolicy"));
    let standing = one(&objects, "NetworkPolicy");
    assert_eq!(policy["spec"]["podSelector"], standing["spec"]["podSelector"]);
    let labels = json!({ "podSelector": { "matchLabels": pod["metadata"]["labels"] } });
    let rule = json!({ "ports": [{ "port": "grpc" }], "from": [labels] });
    assert_eq!(policy["spec"]["ingress"], json!([rule]));
    assert_eq!(policy["spec"]["policyTypes"], json!(["Ingress"]));
    let weight = |object: &Value| {
        let weight = object["metadata"]["annotations"]["helm.sh/hook-weight"].as_str();
        weight.map_or(0, |weight| weight.parse::<i32>().unwrap())
    };
    assert!(weight(policy) < weight(pod), "it is there first");
}

/// The test has no certificate, and the ops port has no TLS.
#[test]
fn helm_test_of_a_proxy_with_tls_asks_the_port_of_probes() {
    let objects = helm::objects(&[LEAST, "tls.secret=a"]);
    let arguments = &hook(&objects, "Pod")["spec"]["containers"][0]["args"];
    assert_eq!(arguments[2], "fetch-proxy-headless:50052");
    assert_eq!(one_named(&objects, "fetch-proxy-headless")["spec"]["clusterIP"], "None");
    let policy = &hook(&objects, "NetworkPolicy")["spec"]["ingress"][0]["ports"];
    assert_eq!(policy, &json!([{ "port": "ops" }]));
    let objects = helm::objects(&[LEAST, "tls.secret=a", "service.headless=false"]);
    assert!(!objects.iter().any(|object| object["kind"] == "Pod"), "it would reach nobody");
}

/// Also when the Service has nobody yet.
#[tokio::test]
async fn helm_test_command_finds_a_fetch_proxy() {
    let objects = helm::objects(&[LEAST]);
    let pod = hook(&objects, "Pod");
    let service = one_named(&objects, "fetch-proxy");
    let address = format!("fetch-proxy:{}", service["spec"]["ports"][0]["port"]);
    let free = TcpListener::bind("127.0.0.1:0").unwrap();
    let here = free.local_addr().unwrap().to_string();
    drop(free);
    let arguments = pod["spec"]["containers"][0]["args"].as_array().unwrap().iter();
    let arguments: Vec<&str> = arguments
        .map(|word| word.as_str().unwrap())
        .map(|word| if word == address { &*here } else { word })
        .collect();
    assert!(arguments.contains(&&*here), "{arguments:?}");
    let mut probe =
        Command::new(env!("CARGO_BIN_EXE_fetch-proxy")).args(arguments).spawn().unwrap();
    let server = NatsServer::start();
    let proxy = Proxy::start(&server, &[]);
    proxy.ready().await;
    let service = tokio::net::TcpListener::bind(&here).await.unwrap();
    let (mut client, _) = service.accept().await.unwrap();
    let mut pod = tokio::net::TcpStream::connect(&proxy.grpc).await.unwrap();
    tokio::spawn(async move { tokio::io::copy_bidirectional(&mut client, &mut pod).await });
    let asked = tokio::task::spawn_blocking(move || probe.wait().unwrap());
    assert!(asked.await.unwrap().success());
}

fn one_named<'a>(objects: &'a [Value], name: &str) -> &'a Value {
    let named = |object: &&Value| object["kind"] == "Service" && object["metadata"]["name"] == name;
    objects.iter().find(named).unwrap()
}
