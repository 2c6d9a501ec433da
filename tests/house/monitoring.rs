//! Alerts, dashboard and scaling name only metrics and labels that the program has. Each alert has a runbook.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use fetch_proxy::metrics::{FAMILIES, Family, FamilyKind};
use serde_json::Value;

use super::{links::anchors, pages::read, source};

/// Labels that Prometheus adds to each series of a target, and the label of a bucket.
const OF_PROMETHEUS: [&str; 5] = ["instance", "job", "namespace", "pod", "le"];

/// The family that a word of a query names, if the word begins as our families do.
fn family(word: &str) -> Option<Result<&'static Family, String>> {
    let prefixes = ["fetchproxy_", "grpc_server_", "process_", "tokio_"];
    prefixes.iter().any(|prefix| word.starts_with(prefix)).then(|| {
        let named = FAMILIES.iter().find(|family| match family.kind {
            FamilyKind::Histogram(_) => ["_bucket", "_sum", "_count"]
                .iter()
                .any(|suffix| word.strip_suffix(suffix) == Some(family.name)),
            FamilyKind::Counter | FamilyKind::Gauge => word == family.shown(),
        });
        named.ok_or_else(|| format!("{word} is no metric"))
    })
}

/// The query in pieces: words, and texts in quotes as `""`.
fn words(query: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for c in query.chars() {
        if c == '"' {
            quoted = !quoted;
        } else if !quoted && (c.is_ascii_alphanumeric() || c == '_' || c == '$') {
            words.last_mut().unwrap().push(c);
        } else if !quoted {
            if !c.is_whitespace() {
                words.push(c.to_string());
            }
            words.push(String::new());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// What a query names that the program does not have.
pub(super) fn faults(query: &str) -> Vec<String> {
    let words = words(query);
    let mut faults = Vec::new();
    let (mut named, mut grouped) = (Vec::new(), BTreeSet::new());
    for (at, word) in words.iter().enumerate() {
        let inside = |open: &str, close: &str| {
            let end = words[at..].iter().position(|word| word == close).map_or(0, |end| at + end);
            (words.get(at + 1).is_some_and(|next| next == open)).then(|| &words[at + 2..end])
        };
        match family(word) {
            Some(Ok(family)) => {
                let labels = inside("{", "}").unwrap_or_default();
                for (label, _) in labels
                    .iter()
                    .zip(&labels[1.min(labels.len())..])
                    .filter(|(_, next)| is_match(next))
                {
                    if !family.labels.contains(&label.as_str())
                        && !OF_PROMETHEUS.contains(&label.as_str())
                    {
                        faults.push(format!("{word} has no label {label}"));
                    }
                }
                named.push(family);
            }
            Some(Err(fault)) => faults.push(fault),
            None if ["by", "without", "on", "ignoring"].contains(&word.as_str()) => {
                let labels = inside("(", ")").unwrap_or_default().iter();
                grouped.extend(labels.filter(|label| *label != ","));
            }
            None => {}
        }
    }
    if named.is_empty() {
        faults.push("it names no metric".to_owned());
    }
    for label in grouped {
        if !OF_PROMETHEUS.contains(&label.as_str())
            && !named.iter().any(|family| family.labels.contains(&label.as_str()))
        {
            faults.push(format!("no metric in it has the label {label}"));
        }
    }
    faults
}

/// Whether this piece stands between a label and its value.
fn is_match(piece: &str) -> bool {
    ["=", "!"].contains(&piece)
}

/// The values of each field of this name, anywhere in an object.
fn fields<'v>(value: &'v Value, name: &str, into: &mut Vec<&'v str>) {
    match value {
        Value::Object(object) => {
            for (field, value) in object {
                if let (true, Some(text)) = (field == name, value.as_str()) {
                    into.push(text);
                }
                fields(value, name, into);
            }
        }
        Value::Array(all) => all.iter().for_each(|value| fields(value, name, into)),
        _ => {}
    }
}

fn rules() -> Value {
    yaml_serde::from_str(&read("deploy/monitoring/rules.yaml")).unwrap()
}

fn dashboard() -> Value {
    serde_json::from_str(&read("deploy/monitoring/dashboard.json")).unwrap()
}

/// The titles of the panels of the dashboard.
pub(super) fn panels() -> BTreeSet<String> {
    let dashboard = dashboard();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    panels.map(|panel| panel["title"].as_str().unwrap().to_owned()).collect()
}

fn scaling() -> Value {
    yaml_serde::from_str(&read("deploy/keda/worker-by-metrics.yaml")).unwrap()
}

#[test]
fn queries_name_only_metrics_and_labels_that_the_program_has() {
    let (rules, dashboard) = (rules(), dashboard());
    let mut queries = Vec::new();
    fields(&rules, "expr", &mut queries);
    fields(&dashboard, "expr", &mut queries);
    let variables = dashboard["templating"]["list"].as_array().unwrap().iter();
    queries.extend(variables.filter_map(|variable| variable["definition"].as_str()));
    let scaling = scaling();
    fields(&scaling, "query", &mut queries);
    assert!(queries.last().unwrap().contains("pending"), "the query of KEDA is among them");
    assert!(queries.len() > 50, "{}", queries.len());
    let wrong: BTreeMap<_, _> = queries
        .iter()
        .map(|query| (query, faults(query)))
        .filter(|(_, faults)| !faults.is_empty())
        .collect();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn wrong_names_in_a_query_are_found() {
    let of = |query| faults(query).join("; ");
    assert_eq!(of("fetchproxy_ready == 0"), "");
    assert_eq!(of("fetchproxy_redy == 0"), "fetchproxy_redy is no metric; it names no metric");
    assert_eq!(of("fetchproxy_panics"), "fetchproxy_panics is no metric; it names no metric");
    assert_eq!(
        of(r#"fetchproxy_ready{job="a", colour=~"red"}"#),
        "fetchproxy_ready has no label colour"
    );
    assert_eq!(
        of("sum by (job, colour) (fetchproxy_ready)"),
        "no metric in it has the label colour"
    );
    assert_eq!(of("up == 0"), "it names no metric");
}

#[test]
fn each_alert_has_a_runbook_and_each_runbook_an_alert() {
    let (rules, page) = (rules(), read("docs/how-to/runbooks.md"));
    let mut alerts = Vec::new();
    fields(&rules, "alert", &mut alerts);
    let titles = page.lines().filter_map(|line| line.strip_prefix("### ")).collect::<Vec<_>>();
    assert_eq!(titles.iter().collect::<BTreeSet<_>>(), alerts.iter().collect());
    let anchors = anchors(&page);
    for alert in alerts {
        assert!(
            anchors.contains(&alert.to_lowercase()),
            "{alert}: no anchor as the chart links it"
        );
    }
    for section in page.split("\n### ").skip(1) {
        for part in ["**Means:**", "**Workers see:**", "**Look:**", "**Do:**", "**Give up:**"] {
            assert!(
                section.contains(part),
                "{part} is missing in {}",
                section.lines().next().unwrap()
            );
        }
    }
}

/// A dashboard with a data source or an id of somebody's Grafana cannot be provisioned.
#[test]
fn dashboard_fits_into_any_grafana() {
    let dashboard = dashboard();
    assert_eq!(dashboard["id"], Value::Null);
    assert_eq!(dashboard["uid"], "fetch-proxy");
    assert!(dashboard.get("__inputs").is_none());
    let mut sources = Vec::new();
    fields(&dashboard, "uid", &mut sources);
    sources.retain(|uid| *uid != "fetch-proxy");
    assert!(sources.iter().all(|uid| *uid == "${datasource}"), "{sources:?}");
    let panels = dashboard["panels"].as_array().unwrap();
    let ids: BTreeSet<_> = panels.iter().map(|panel| panel["id"].as_u64().unwrap()).collect();
    assert_eq!(ids.len(), panels.len(), "two panels share an id");
    let kinds = ["row", "stat", "timeseries", "table"];
    for panel in panels {
        assert!(kinds.contains(&panel["type"].as_str().unwrap()), "{panel}: a panel of a plugin");
        assert!(
            panel["type"] == "row"
                || panel["description"].as_str().is_some_and(|text| text.ends_with('.'))
        );
    }
}

/// The system and the runtime move these. A test looks at some of them in a fresh process.
const OF_THE_PROCESS: [&str; 2] = ["process_", "tokio_"];

/// A family that no test looks at may count anything.
#[test]
fn each_family_is_looked_at_by_a_test() {
    let mut sources = String::new();
    for target in ["broker", "faults", "process", "replicas", "wire"] {
        sources +=
            &source::texts(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(target));
    }
    let missing: Vec<_> = FAMILIES
        .iter()
        .filter(|family| !OF_THE_PROCESS.iter().any(|prefix| family.name.starts_with(prefix)))
        .filter(|family| {
            let tail = family.name.trim_start_matches("fetchproxy_");
            // A test names a family in full, or without its prefix at the start of a text.
            ![
                format!("fetchproxy_{tail}"),
                format!("\"{tail}_"),
                format!("\"{tail}{{"),
                format!("\"{tail}\""),
            ]
            .iter()
            .any(|name| sources.contains(name))
        })
        .map(|family| family.name)
        .collect();
    assert_eq!(missing, [""; 0], "no test looks at these");
}
