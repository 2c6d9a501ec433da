//! `deploy/monitoring`: the alerts fire when they should and not otherwise, and the chart installs what
//! lies there.

use std::{collections::BTreeSet, path::PathBuf, process::Command};

use serde_json::Value;

use crate::{
    chart::MONITORED,
    helm::{self, one},
    tool,
};

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy/monitoring")
}

/// What promtool says, if it is content.
fn promtool(arguments: &[&str]) -> String {
    let mut promtool: Command = tool("FETCH_PROXY_TEST_PROMTOOL");
    let output = promtool.args(arguments).current_dir(folder()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    said.into_owned()
}

fn yaml(name: &str) -> Value {
    helm::parsed(&std::fs::read_to_string(folder().join(name)).unwrap()).remove(0)
}

fn rules(groups: &Value) -> &[Value] {
    groups["groups"][0]["rules"].as_array().unwrap()
}

fn names(rules: &[Value]) -> BTreeSet<&str> {
    rules.iter().filter_map(|rule| rule["alert"].as_str()).collect()
}

#[test]
fn alerts_fire_in_their_cases_and_only_there() {
    promtool(&["check", "rules", "rules.yaml"]);
    promtool(&["test", "rules", "rules-test.yaml"]);
}

/// A firing case, and a case or a series that does not fire, of each alert.
#[test]
fn each_alert_has_a_case_that_fires_and_a_case_that_does_not() {
    let (rules_file, cases) = (yaml("rules.yaml"), yaml("rules-test.yaml"));
    let (mut firing, mut silent) = (BTreeSet::new(), BTreeSet::new());
    for case in cases["tests"].as_array().unwrap() {
        // promtool demands all that fires, so each series beyond these is silent.
        let series = case["input_series"].as_array().map_or(0, Vec::len);
        for expected in case["alert_rule_test"].as_array().unwrap() {
            let alert = expected["alertname"].as_str().unwrap();
            let fired = expected["exp_alerts"].as_array().map_or(0, Vec::len);
            if fired > 0 {
                firing.insert(alert);
            }
            if fired < series || fired == 0 {
                silent.insert(alert);
            }
        }
    }
    let all = names(rules(&rules_file));
    assert_eq!(firing, all);
    assert_eq!(silent, all);
}

#[test]
fn chart_installs_the_alerts_and_the_dashboard() {
    let objects = helm::objects(MONITORED);
    let installed = rules(&one(&objects, "PrometheusRule")["spec"]);
    let mut expected =
        names(rules(&yaml("rules.yaml"))).into_iter().map(str::to_owned).collect::<BTreeSet<_>>();
    assert!(expected.remove("FetchProxyInsecure"), "disabled in this installation");
    assert_eq!(names(installed).into_iter().map(str::to_owned).collect::<BTreeSet<_>>(), expected);
    assert_eq!(
        installed[0]["annotations"]["runbook_url"],
        "https://runbooks.example/page#fetchproxydown"
    );
    assert_eq!(installed.last().unwrap()["record"], "a:b");
    let dashboards = objects.iter().find_map(|object| object["data"]["fetch-proxy.json"].as_str());
    let installed: Value = serde_json::from_str(dashboards.unwrap()).unwrap();
    let ours = std::fs::read_to_string(folder().join("dashboard.json")).unwrap();
    assert_eq!(installed, serde_json::from_str::<Value>(&ours).unwrap());
}

/// A chart cannot read files outside of its folder.
#[test]
fn chart_has_copies_of_the_same_files() {
    for name in ["rules.yaml", "dashboard.json"] {
        let read = |path: PathBuf| std::fs::read_to_string(path).unwrap();
        let copy = read(helm::chart().join("files").join(name));
        assert!(
            copy == read(folder().join(name)),
            "copy deploy/monitoring/{name} into the chart's files/"
        );
    }
}

#[test]
fn pod_monitor_scrapes_the_pods_at_the_operators_port() {
    let objects = helm::objects(MONITORED);
    let monitor = one(&objects, "PodMonitor");
    assert_eq!(monitor["metadata"]["labels"]["release"], "prometheus");
    let endpoint = &monitor["spec"]["podMetricsEndpoints"][0];
    let ports = helm::container(&objects)["ports"].as_array().unwrap();
    assert!(ports.iter().any(|port| port["name"] == endpoint["port"]), "{endpoint}");
    let labels = &one(&objects, "Deployment")["spec"]["template"]["metadata"]["labels"];
    for (label, value) in monitor["spec"]["selector"]["matchLabels"].as_object().unwrap() {
        assert_eq!(&labels[label], value);
    }
}
