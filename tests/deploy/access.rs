//! Who may call a release: the policy and its files, as the pods find them.

use std::{fs, process::Command};

use fetch_proxy::access::NewApiKey;
use serde_json::{Value, json};
use testkit::{
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Proxy, fetch, with_key},
};

use crate::{
    chart::INSTALLATIONS,
    helm::{self, container, one},
};

/// The policy that run-on-kubernetes.md shows.
fn policy_of_the_page() -> &'static str {
    let page = include_str!("../../docs/how-to/run-on-kubernetes.md");
    let block = page.split("```yaml\n# policy.yaml\n").nth(1).expect("a block with the policy");
    block.split("```").next().unwrap()
}

/// The chart with the policy of this text, as `--set-file` gives it.
fn objects_with(policy: &str) -> Vec<Value> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), policy).unwrap();
    let set = format!("access.policy={}", file.path().display());
    let values = ["tokenKeys.secret=a", "tls.secret=b", "access.apiKeysSecret=c"];
    let output = helm::template_command(&values).args(["--set-file", &set]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    helm::parsed(&String::from_utf8(output.stdout).unwrap())
}

fn volume<'a>(objects: &'a [Value], name: &str) -> &'a Value {
    let volumes = &one(objects, "Deployment")["spec"]["template"]["spec"]["volumes"];
    volumes.as_array().unwrap().iter().find(|volume| volume["name"] == name).unwrap()
}

/// Lines of rules are named in the log and by `policy check`, so they must be those of the file.
#[tokio::test]
async fn policy_of_the_chart_is_the_file_and_the_program_obeys_it() {
    let server = NatsServer::start();
    let fixture = Fixture::on(&server, config()).await;
    let text = policy_of_the_page()
        .replace("ORDERS", &fixture.stream)
        .replace("\"worker\"", &format!("{:?}", fixture.consumer));
    let objects = objects_with(&text);
    let rendered = one(&objects, "ConfigMap")["data"]["policy.yaml"].as_str().unwrap();
    assert_eq!(rendered, text);
    let names: Vec<Value> = vec![
        json!({ "configMap": { "name": one(&objects, "ConfigMap")["metadata"]["name"] } }),
        json!({ "secret": { "name": "c" } }),
    ];
    assert_eq!(volume(&objects, "policy")["projected"]["sources"], json!(names));

    // The folder of the volume.
    let folder = tempfile::tempdir().unwrap();
    let key = NewApiKey::random("orders-1").unwrap().unwrap();
    fs::write(folder.path().join("policy.yaml"), rendered).unwrap();
    fs::write(folder.path().join("api-keys"), &key.line).unwrap();
    let file = folder.path().join("policy.yaml");
    let mut check = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
    let checked = check.args(["policy", "check"]).arg(&file).output().unwrap();
    assert!(checked.status.success(), "{}", String::from_utf8_lossy(&checked.stderr));
    let proxy = Proxy::start(&server, &["--policy-file", file.to_str().unwrap()]);
    proxy.ready().await;
    let mut client = proxy.client().await;
    client.fetch(with_key(&key.secret, fetch(&fixture, 1, 0))).await.unwrap();
    client.fetch(fetch(&fixture, 1, 0)).await.unwrap_err();
}

/// A token of the pod opens doors at the API server. So pods have it only if somebody asks.
#[test]
fn token_for_the_api_server_is_mounted_only_when_asked_for() {
    let mut with = 0;
    for (name, values) in INSTALLATIONS {
        let objects = helm::objects(values);
        let text = one(&objects, "Deployment").to_string();
        let asked = values.contains(&"access.apiServer.enabled=true");
        assert_eq!(text.contains("serviceAccountToken\":{"), asked, "{name}: {text}");
        with += usize::from(asked);
        if asked {
            let sources = json!([
                { "serviceAccountToken": { "path": "token", "expirationSeconds": 3600 } },
                { "configMap": { "name": "kube-root-ca.crt" } },
            ]);
            assert_eq!(volume(&objects, "api-server")["projected"]["sources"], sources);
            let mounts = container(&objects)["volumeMounts"].as_array().unwrap().iter();
            let paths: Vec<_> = mounts.map(|mount| mount["mountPath"].as_str().unwrap()).collect();
            assert!(paths.contains(&"/var/run/secrets/fetch-proxy/api"), "{paths:?}");
        }
    }
    assert_eq!(with, 1);
}

/// DNS, NATS, and nothing else, unless the values name issuers or a receiver of traces.
#[test]
fn pods_reach_an_issuer_and_a_receiver_only_where_the_values_name_it() {
    for (name, values) in INSTALLATIONS {
        let objects = helm::objects(values);
        if values.contains(&"networkPolicy.enabled=false") {
            continue;
        }
        let egress = one(&objects, "NetworkPolicy")["spec"]["egress"].as_array().unwrap();
        let more = match *name {
            "policy given here, keys in a Secret" => json!([{
                "ports": [{ "port": 443 }],
                "to": [{ "ipBlock": { "cidr": "192.0.2.7/32" } }],
            }]),
            "service account tokens" => json!([{
                "ports": [{ "port": 6443 }],
                "to": [{ "ipBlock": { "cidr": "192.0.2.1/32" } }],
            }]),
            "traced" => json!([{
                "ports": [{ "port": 4317 }],
                "to": [{ "namespaceSelector": { "matchLabels": { "name": "monitoring" } } }],
            }]),
            _ => json!([]),
        };
        assert_eq!(json!(egress[2..]), more, "{name}");
    }
}

#[test]
fn authorities_of_clients_come_from_a_secret_or_a_config_map() {
    for (value, source) in [
        ("tls.clientCASecret=a", json!({ "secret": { "secretName": "a", "defaultMode": 0o440 } })),
        ("tls.clientCAConfigMap=a", json!({ "configMap": { "name": "a", "defaultMode": 0o440 } })),
    ] {
        let objects = helm::objects(&["tokenKeys.secret=k", "tls.secret=b", value]);
        let mut volume = volume(&objects, "tls-client-ca").clone();
        volume.as_object_mut().unwrap().remove("name");
        assert_eq!(volume, source);
    }
}
