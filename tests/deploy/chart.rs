//! The chart: what it makes of values.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{
    helm::{self, GUARDED, LEAST, container, one},
    tool,
};

/// Installations as people want them, each with its values.
pub const INSTALLATIONS: &[(&str, &[&str])] = &[
    ("as little as possible", &[LEAST]),
    ("keys given here", &["tokenKeys.keys={first,second}", "security.insecure=true"]),
    ("credentials file", &[LEAST, "nats.auth.method=creds", "nats.auth.secret=nats"]),
    ("nkey given here", &[LEAST, "nats.auth.method=nkey", r"nats.auth.entries.nkey\.seed=SUA"]),
    ("password", &[LEAST, "nats.auth.method=password", "nats.auth.secret=nats"]),
    ("token", &[LEAST, "nats.auth.method=token", "nats.auth.secret=nats"]),
    (
        "token given here, URL not",
        &[
            LEAST,
            "nats.urlSecret.name=nats-url",
            "nats.auth.method=token",
            "nats.auth.entries.token=secret",
        ],
    ),
    (
        "TLS to NATS",
        &[
            LEAST,
            "nats.url=tls://a:4222\\,tls://b:4222",
            "nats.tls.caSecret=ca",
            "nats.tls.clientSecret=cert",
            "nats.tls.handshakeFirst=true",
        ],
    ),
    ("policy", GUARDED),
    (
        "policy given here, keys in a Secret",
        &[
            "tokenKeys.secret=fetch-proxy-token-keys",
            "tls.secret=certificate",
            "access.policy=authenticate: {api_keys: {file: api-keys}}",
            "access.apiKeysSecret=keys",
            "access.issuers.peers=[{\"ipBlock\": {\"cidr\": \"192.0.2.7/32\"}}]",
        ],
    ),
    (
        "service account tokens",
        &[
            "tokenKeys.secret=fetch-proxy-token-keys",
            "tls.secret=certificate",
            "tls.clientCAConfigMap=authorities",
            "access.policyConfigMap=policy",
            "access.apiServer.enabled=true",
            "access.apiServer.peers=[{\"ipBlock\": {\"cidr\": \"192.0.2.1/32\"}}]",
            "access.apiServer.ports=[6443]",
        ],
    ),
    ("TLS", &[LEAST, "tls.secret=certificate"]),
    ("TLS with certificates of clients", TLS),
    (
        "TLS by cert-manager",
        &[
            LEAST,
            "tls.certManager.enabled=true",
            "tls.certManager.issuer.name=ours",
            "tls.certManager.issuer.kind=ClusterIssuer",
            "tls.certManager.dnsNames={proxy.example,*.proxy.example}",
        ],
    ),
    ("autoscaled", &[LEAST, "autoscaling.enabled=true"]),
    ("monitored", MONITORED),
    ("traced", TRACED),
    (
        "bare",
        &[
            LEAST,
            "replicas=1",
            "networkPolicy.enabled=false",
            "podDisruptionBudget.enabled=false",
            "service.headless=false",
            "serviceAccount.create=false",
        ],
    ),
    (
        "much",
        &[
            LEAST,
            "image.repository=somewhere/fetch-proxy",
            "image.tag=v1",
            "image.pullSecrets={pull}",
            "service.type=LoadBalancer",
            "service.annotations.a=b",
            "settings.maxLease=2h",
            "settings.maxLeases=200000",
            "podAnnotations.a=b",
            "podLabels.a=b",
            "nodeSelector.a=b",
            "tolerations[0].operator=Exists",
            "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].key=a",
            "affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0].matchExpressions[0].operator=Exists",
            "priorityClassName=high",
            "networkPolicy.operators[0].podSelector.matchLabels.a=b",
            "networkPolicy.nats.peers[0].namespaceSelector.matchLabels.a=b",
            "topologySpreadConstraints[0].maxSkew=1",
            "topologySpreadConstraints[0].topologyKey=rack",
            "topologySpreadConstraints[0].whenUnsatisfiable=DoNotSchedule",
            "nameOverride=proxy",
        ],
    ),
];

/// A file of values, as people write it.
const SETTINGS: &str =
    "settings: { maxLease: 2h, maxLeases: 1000000, reflection: off, audit: off, adminSocket: off }";

/// All of TLS that values can say, with a certificate of one's own.
const TLS: &[&str] = &[
    LEAST,
    "tls.secret=certificate",
    "tls.clientCASecret=authorities",
    "tls.clientAuth=optional",
    "tls.minVersion=1.2",
    "access.policySecret=policy",
    "security.plaintext=true",
];

/// Metrics, alerts and the dashboard, for the operators of Prometheus and Grafana.
pub const MONITORED: &[&str] = &[
    LEAST,
    "metrics.podMonitor.enabled=true",
    "metrics.podMonitor.labels.release=prometheus",
    "metrics.podMonitor.relabelings=[{\"action\": \"labeldrop\", \"regex\": \"endpoint\"}]",
    "metrics.rules.enabled=true",
    "metrics.rules.disabled={FetchProxyInsecure}",
    "metrics.rules.extra=[{\"record\": \"a:b\", \"expr\": \"sum(fetchproxy_leases)\"}]",
    "metrics.rules.runbooks=https://runbooks.example/page",
    "metrics.dashboard.enabled=true",
    "networkPolicy.operators[0].namespaceSelector.matchLabels.name=monitoring",
];

/// Traces, with headers for the receiver.
const TRACED: &[&str] = &[
    LEAST,
    "otel.endpoint=http://collector.monitoring:4317",
    "otel.headersSecret=receiver",
    "otel.peers=[{\"namespaceSelector\": {\"matchLabels\": {\"name\": \"monitoring\"}}}]",
];

#[test]
fn helm_lint_finds_nothing() {
    for (name, values) in INSTALLATIONS {
        let mut helm = tool("FETCH_PROXY_TEST_HELM");
        helm.args(["lint", "--strict", "--quiet"]).arg(helm::chart()).args(helm::flags(values));
        let output = helm.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{name}: {said}");
    }
}

#[test]
fn changed_password_or_token_of_the_chart_rolls_the_pods() {
    let checksum = |values: &[&str]| {
        let objects = helm::objects(values);
        one(&objects, "Deployment")["spec"]["template"]["metadata"]["annotations"].to_string()
    };
    let with = |method, entry: &str, value: &str| {
        let method = format!("nats.auth.method={method}");
        let user = "nats.auth.entries.username=a";
        let entry = format!("nats.auth.entries.{entry}={value}");
        checksum(
            &[LEAST, &method, &entry]
                .into_iter()
                .chain((method.ends_with("password")).then_some(user))
                .collect::<Vec<_>>(),
        )
    };
    for (method, entry) in [("password", "password"), ("token", "token")] {
        assert_ne!(with(method, entry, "one"), with(method, entry, "two"), "{method}");
        assert_eq!(with(method, entry, "one"), with(method, entry, "one"), "{method}");
        assert!(!with(method, entry, "hunter2").contains("hunter2"));
    }
    // Read again from its file.
    assert_eq!(with("nkey", r"nkey\.seed", "one"), with("nkey", r"nkey\.seed", "two"));
}

#[test]
fn other_values_of_a_parent_chart_are_ignored() {
    let values = [LEAST, "enabled=true", "global.a=b"];
    assert_eq!(helm::text(&values), helm::text(&[LEAST]));
}

/// A URL with a password in it is nothing for the manifest.
#[test]
fn url_of_nats_may_come_from_a_secret() {
    let objects = helm::objects(&[LEAST, "nats.urlSecret.name=nats", "nats.urlSecret.key=where"]);
    let env = container(&objects)["env"].as_array().unwrap();
    let from = json!({ "secretKeyRef": { "name": "nats", "key": "where" } });
    assert!(env.contains(&json!({ "name": "NATS_URL", "valueFrom": from })), "{env:?}");
}

/// To trace every call costs more than to serve it, so the ratio is always there.
#[test]
fn endpoint_of_traces_brings_a_sampler_and_a_way_through_the_network_policy() {
    let objects = helm::objects(TRACED);
    let env = container(&objects)["env"].as_array().unwrap();
    let headers = json!({ "secretKeyRef": { "name": "receiver", "key": "headers" } });
    for variable in [
        json!({ "name": "OTEL_EXPORTER_OTLP_ENDPOINT", "value": "http://collector.monitoring:4317" }),
        json!({ "name": "OTEL_EXPORTER_OTLP_HEADERS", "valueFrom": headers }),
        json!({ "name": "OTEL_TRACES_SAMPLER", "value": "parentbased_traceidratio" }),
        json!({ "name": "OTEL_TRACES_SAMPLER_ARG", "value": "0.01" }),
    ] {
        assert!(env.contains(&variable), "{variable}");
    }
    let egress = |values: &[&str]| {
        let objects = helm::objects(values);
        one(&objects, "NetworkPolicy")["spec"]["egress"].as_array().unwrap().clone()
    };
    let peers = json!([{ "namespaceSelector": { "matchLabels": { "name": "monitoring" } } }]);
    assert!(egress(TRACED).contains(&json!({ "ports": [{ "port": 4317 }], "to": peers })));
    for (endpoint, more, port) in [
        ("http://collector:4317", "otel.port=0", 4317),
        ("http://collector", "otel.port=0", 80),
        ("https://collector/", "otel.port=0", 443),
        ("https://collector", "otel.port=4318", 4318),
    ] {
        let endpoint = format!("otel.endpoint={endpoint}");
        let anywhere = json!({ "ports": [{ "port": port }] });
        assert!(egress(&[LEAST, &endpoint, more]).contains(&anywhere), "{endpoint}");
    }
    assert_eq!(egress(&[LEAST]).len(), 2, "DNS and NATS alone");
    assert!(!helm::text(&[LEAST]).contains("OTEL_"));
}

/// Some clusters choose the user of a pod, or answer names at another port.
#[test]
fn settings_of_unusual_clusters_can_be_chosen() {
    let objects = helm::objects(&[
        LEAST,
        "podSecurityContext.runAsUser=null",
        "containerSecurityContext.privileged=false",
        "networkPolicy.dnsPorts=[53,5353]",
    ]);
    let pod = &one(&objects, "Deployment")["spec"]["template"]["spec"];
    assert_eq!(pod["securityContext"]["runAsUser"], Value::Null);
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    assert_eq!(container(&objects)["securityContext"]["privileged"], false);
    let egress = &one(&objects, "NetworkPolicy")["spec"]["egress"][0]["ports"];
    let ports: Vec<_> = egress.as_array().unwrap().iter().map(|port| &port["port"]).collect();
    assert_eq!(ports, [53, 53, 5353, 5353]);
}

/// The chart can set every setting of the program, except those that follow from the way of
/// deploying.
#[test]
fn every_setting_of_the_program_is_a_value_of_the_chart() {
    let of_the_chart: BTreeSet<String> = variables(&container(&helm::objects(TLS))["env"])
        .into_iter()
        .chain(["LISTEN", "OPS_LISTEN"].map(|of_the_image| format!("FETCH_PROXY_{of_the_image}")))
        // Nobody is there to read it.
        .chain(["FETCH_PROXY_PORTS_FILE".to_owned()])
        .filter(|name| name.starts_with("FETCH_PROXY_"))
        .collect();
    let schema = std::fs::read_to_string(helm::chart().join("values.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&schema).unwrap();
    let settings = schema["properties"]["settings"]["properties"].as_object().unwrap();
    let settings: BTreeSet<String> = settings.keys().map(|name| variable_of(name)).collect();
    assert_eq!(settings.intersection(&of_the_chart).next(), None, "one too many ways to say it");

    let help = std::process::Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
        .args(["serve", "--help"])
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let of_the_program: BTreeSet<String> = help
        .split("[env: ")
        .skip(1)
        .map(|text| text.split(['=', ']']).next().unwrap().to_owned())
        .filter(|name| name.starts_with("FETCH_PROXY_"))
        .collect();
    assert_eq!(&settings | &of_the_chart, of_the_program);
}

/// FETCH_PROXY_MAX_LEASE of maxLease.
pub fn variable_of(setting: &str) -> String {
    let mut name = "FETCH_PROXY_".to_owned();
    for letter in setting.chars() {
        if letter.is_ascii_uppercase() {
            name.push('_');
        }
        name.push(letter.to_ascii_uppercase());
    }
    name
}

fn variables(env: &Value) -> Vec<String> {
    let all = env.as_array().unwrap().iter();
    all.map(|variable| variable["name"].as_str().unwrap().to_owned()).collect()
}

/// In a file of values, a large number is a float to helm, and must not reach the program as 1e+06. A
/// switch is a boolean, and must not reach the program as false.
#[test]
fn settings_reach_the_program_by_their_variables() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), SETTINGS).unwrap();
    let mut helm = helm::template_command(&[LEAST]);
    let output = helm.arg("--values").arg(file.path()).output().unwrap();
    let objects = helm::parsed(&String::from_utf8(output.stdout).unwrap());
    let env = container(&objects)["env"].as_array().unwrap();
    for (name, value) in [
        ("FETCH_PROXY_MAX_LEASE", "2h"),
        ("FETCH_PROXY_MAX_LEASES", "1000000"),
        ("FETCH_PROXY_REFLECTION", "off"),
        ("FETCH_PROXY_AUDIT", "off"),
        ("FETCH_PROXY_ADMIN_SOCKET", "off"),
    ] {
        assert!(env.contains(&json!({ "name": name, "value": value })), "{env:?}");
    }
}

#[test]
fn values_of_security_reach_the_program() {
    let env = |values: &[&str]| container(&helm::objects(values))["env"].clone();
    let has = |env: &Value, name: &str, value: &str| {
        env.as_array().unwrap().contains(&json!({ "name": name, "value": value }))
    };
    let guarded = env(GUARDED);
    assert!(has(&guarded, "FETCH_PROXY_POLICY_FILE", "/etc/fetch-proxy/policy/policy.yaml"));
    assert!(has(&guarded, "FETCH_PROXY_PLAINTEXT", "true"));
    assert!(!has(&guarded, "FETCH_PROXY_INSECURE", "true"), "{guarded}");
    let least = env(&[LEAST]);
    assert!(has(&least, "FETCH_PROXY_INSECURE", "true"));
    assert!(!has(&least, "FETCH_PROXY_PLAINTEXT", "true"), "{least}");
}

#[test]
fn values_of_tls_reach_the_program() {
    let objects = helm::objects(TLS);
    let env = container(&objects)["env"].as_array().unwrap();
    for (name, value) in [
        ("FETCH_PROXY_TLS_CERT", "/etc/fetch-proxy/tls/tls.crt"),
        ("FETCH_PROXY_TLS_KEY", "/etc/fetch-proxy/tls/tls.key"),
        ("FETCH_PROXY_TLS_CLIENT_CA", "/etc/fetch-proxy/tls-client-ca/ca.crt"),
        ("FETCH_PROXY_TLS_CLIENT_AUTH", "optional"),
        ("FETCH_PROXY_TLS_MIN", "1.2"),
    ] {
        assert!(env.contains(&json!({ "name": name, "value": value })), "{name}: {env:?}");
    }
    let plain = variables(&container(&helm::objects(&[LEAST]))["env"]);
    assert!(plain.iter().all(|name| !name.contains("TLS")), "{plain:?}");
}

/// A client checks the name that it connects to.
#[test]
fn certificate_of_cert_manager_names_the_services_and_fills_the_mounted_secret() {
    let (_, values) =
        INSTALLATIONS.iter().find(|(name, _)| *name == "TLS by cert-manager").unwrap();
    let objects = helm::objects(values);
    let spec = &one(&objects, "Certificate")["spec"];
    let volumes = &one(&objects, "Deployment")["spec"]["template"]["spec"]["volumes"];
    let mounted = volumes.as_array().unwrap().iter().find(|volume| volume["name"] == "tls");
    assert_eq!(mounted.unwrap()["secret"]["secretName"], spec["secretName"]);
    assert_eq!(spec["issuerRef"]["name"], "ours");
    assert_eq!(spec["issuerRef"]["kind"], "ClusterIssuer");
    let names: Vec<&str> =
        spec["dnsNames"].as_array().unwrap().iter().map(|name| name.as_str().unwrap()).collect();
    for name in ["", ".default", ".default.svc"] {
        for service in objects.iter().filter(|object| object["kind"] == "Service") {
            let name = format!("{}{name}", service["metadata"]["name"].as_str().unwrap());
            assert!(names.contains(&&*name), "{name}: {names:?}");
        }
    }
    assert!(names.ends_with(&["proxy.example", "*.proxy.example"]), "{names:?}");
}

/// Nobody may set a variable twice: the last one counts, and nobody sees which that is.
#[test]
fn no_variable_is_set_twice() {
    for (name, values) in INSTALLATIONS {
        let all = variables(&container(&helm::objects(values))["env"]);
        let once: BTreeSet<&String> = all.iter().collect();
        assert_eq!(once.len(), all.len(), "{name}: {all:?}");
    }
}

/// The longest time from SIGTERM to the end of the program. `app` takes the delay, the timeout, and
/// four times 2 s for the last steps.
#[test]
fn grace_period_is_longer_than_any_drain() {
    let longest_flush = 8;
    for (delay, timeout) in [(5, 20), (0, 1), (30, 600)] {
        let (delay_value, timeout_value) =
            (format!("drain.delaySeconds={delay}"), format!("drain.timeoutSeconds={timeout}"));
        let objects = helm::objects(&[LEAST, &delay_value, &timeout_value]);
        let grace = &one(&objects, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"];
        assert!(grace.as_i64().unwrap() > delay + timeout + longest_flush, "{grace}");
        let env = container(&objects)["env"].as_array().unwrap();
        for (name, seconds) in
            [("FETCH_PROXY_DRAIN_DELAY", delay), ("FETCH_PROXY_DRAIN_TIMEOUT", timeout)]
        {
            assert!(env.contains(&json!({ "name": name, "value": format!("{seconds}s") })));
        }
    }
}

#[test]
fn update_removes_no_pod_before_another_serves() {
    let objects = helm::objects(&[LEAST]);
    let spec = &one(&objects, "Deployment")["spec"];
    assert_eq!(spec["replicas"], 3);
    assert_eq!(spec["strategy"]["rollingUpdate"], json!({ "maxUnavailable": 0, "maxSurge": 1 }));
    // Until it has run for 3 s, a replica has not heard of all others.
    assert!(spec["minReadySeconds"].as_u64() > Some(3));
    assert_eq!(one(&objects, "PodDisruptionBudget")["spec"]["maxUnavailable"], 1);
    // An update must not set a scaled deployment back to three replicas.
    let scaled = helm::objects(&[LEAST, "autoscaling.enabled=true"]);
    assert_eq!(one(&scaled, "Deployment")["spec"]["replicas"], Value::Null);
}

/// The `restricted` profile of the Pod Security Standards, and what is as cheap beyond it.
#[test]
fn pods_keep_to_the_restricted_standard() {
    for (name, values) in INSTALLATIONS {
        let objects = helm::objects(values);
        let pods = objects.iter().filter_map(|object| match object["kind"].as_str().unwrap() {
            "Deployment" => Some(&object["spec"]["template"]["spec"]),
            "Pod" => Some(&object["spec"]),
            _ => None,
        });
        let mut checked = 0;
        for pod in pods {
            checked += 1;
            for field in ["hostNetwork", "hostPID", "hostIPC", "initContainers"] {
                assert_eq!(pod[field], Value::Null, "{name}: {field}");
            }
            assert_eq!(pod["automountServiceAccountToken"], false, "{name}");
            assert_eq!(pod["enableServiceLinks"], false, "{name}");
            let security = &pod["securityContext"];
            assert_eq!(security["runAsNonRoot"], true, "{name}");
            assert!(security["runAsUser"].as_i64().unwrap() > 0, "{name}");
            assert_eq!(security["seccompProfile"]["type"], "RuntimeDefault", "{name}");
            for volume in pod["volumes"].as_array().unwrap_or(&Vec::new()) {
                let kinds = ["secret", "configMap", "projected"];
                assert!(kinds.iter().any(|kind| volume[kind].is_object()), "{name}: {volume}");
            }
            for container in pod["containers"].as_array().unwrap() {
                let expected = json!({
                    "allowPrivilegeEscalation": false,
                    "readOnlyRootFilesystem": true,
                    "capabilities": { "drop": ["ALL"] },
                });
                assert_eq!(container["securityContext"], expected, "{name}");
                assert!(container["resources"]["limits"]["memory"].is_string(), "{name}");
            }
        }
        assert_eq!(checked, 2, "{name}: the Deployment and the test");
    }
}

/// Everything that selects pods selects these, and every port has somebody behind it.
#[test]
fn selectors_match_the_pods_of_the_deployment() {
    for (name, values) in INSTALLATIONS {
        let objects = helm::objects(values);
        let deployment = one(&objects, "Deployment");
        let labels = &deployment["spec"]["template"]["metadata"]["labels"];
        let ports = container(&objects)["ports"].as_array().unwrap();
        let ports: Vec<&Value> = ports.iter().map(|port| &port["name"]).collect();
        let spec = |object: &Value| object["spec"].clone();
        let selectors =
            objects.iter().filter_map(|object| match object["kind"].as_str().unwrap() {
                "Service" => Some(spec(object)["selector"].clone()),
                "Deployment" | "PodDisruptionBudget" => {
                    Some(spec(object)["selector"]["matchLabels"].clone())
                }
                "NetworkPolicy" => Some(spec(object)["podSelector"]["matchLabels"].clone()),
                _ => None,
            });
        for selector in selectors {
            for (label, value) in selector.as_object().unwrap() {
                assert_eq!(&labels[label], value, "{name}");
            }
        }
        let targets = objects.iter().flat_map(|object| match object["kind"].as_str().unwrap() {
            "Service" => object["spec"]["ports"]
                .as_array()
                .unwrap()
                .iter()
                .map(|port| &port["targetPort"])
                .collect(),
            "NetworkPolicy" => {
                let rules = object["spec"]["ingress"].as_array().unwrap().iter();
                rules
                    .flat_map(|rule| rule["ports"].as_array().unwrap())
                    .map(|port| &port["port"])
                    .collect()
            }
            _ => Vec::new(),
        });
        for target in targets {
            assert!(ports.contains(&target), "{name}: {target}");
        }
        let mounted: BTreeSet<String> = names(&container(&objects)["volumeMounts"]);
        let there = names(&deployment["spec"]["template"]["spec"]["volumes"]);
        assert_eq!(mounted, there, "{name}");
    }
}

fn names(all: &Value) -> BTreeSet<String> {
    all.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

/// The ops port tells more than clients need to know, and has no cap on who may ask.
#[test]
fn network_policy_closes_the_ops_port_by_default() {
    let objects = helm::objects(&[LEAST]);
    let ingress = one(&objects, "NetworkPolicy")["spec"]["ingress"].as_array().unwrap();
    assert_eq!(ingress.len(), 1);
    assert_eq!(ingress[0]["ports"], json!([{ "port": "grpc" }]));
    assert_eq!(ingress[0]["from"], json!([{ "podSelector": {} }]));
}

#[test]
fn chart_has_the_version_of_the_program() {
    let chart = std::fs::read_to_string(helm::chart().join("Chart.yaml")).unwrap();
    let chart = &helm::parsed(&chart)[0];
    assert_eq!(chart["appVersion"], env!("CARGO_PKG_VERSION"));
}
