//! The alerts and the dashboard ask for families that there are, by labels that these have.

use fetch_proxy::metrics::{FAMILIES, Family, FamilyKind};

use super::pages::read;

/// Labels that Prometheus adds, and the label of buckets.
const ADDED: [&str; 5] = ["job", "instance", "namespace", "pod", "le"];

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The names in a text that look like ours, each with what follows it.
fn asked(text: &str) -> Vec<(&str, &str)> {
    let mut found = Vec::new();
    for prefix in ["fetchproxy_", "grpc_server_", "tokio_", "process_"] {
        for (at, _) in text.match_indices(prefix) {
            let (before, rest) = text.split_at(at);
            if !before.ends_with(is_name) {
                let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
                found.push(rest.split_at(end));
            }
        }
    }
    found
}

fn family(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| match family.kind {
        FamilyKind::Histogram(_) => name
            .strip_prefix(family.name)
            .is_some_and(|rest| matches!(rest, "_bucket" | "_sum" | "_count")),
        FamilyKind::Counter | FamilyKind::Gauge => family.shown() == name,
    })
}

/// The names of the labels in a selector at the beginning of `rest`, like `{how="ack"}`.
fn selected(rest: &str) -> Vec<&str> {
    let inside = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
    let pairs = inside.map_or("", |(inside, _)| inside).split(',');
    pairs.filter_map(|pair| Some(pair.split_once(['=', '!'])?.0.trim())).collect()
}

#[test]
fn alerts_and_dashboard_ask_for_families_and_labels_that_exist() {
    let (mut names, mut wrong) = (0, Vec::new());
    for page in ["deploy/monitoring/rules.yaml", "deploy/monitoring/dashboard.json"] {
        let text = read(page);
        for (name, rest) in asked(&text) {
            names += 1;
            let Some(family) = family(name) else {
                wrong.push(format!("{page}: there is no {name}"));
                continue;
            };
            let known = |label: &&str| ADDED.contains(label) || family.labels.contains(label);
            let unknown = selected(rest).into_iter().filter(|label| !known(label));
            wrong.extend(unknown.map(|label| format!("{page}: {name} has no label {label}")));
        }
    }
    assert!(names > 60, "only {names} names are found: the reading is broken");
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn wrong_name_and_wrong_label_are_found() {
    assert!(family("fetchproxy_leases").is_some());
    assert!(family("fetchproxy_leases_granted").is_none(), "a counter has a suffix");
    assert!(family("fetchproxy_fetch_seconds").is_none(), "a histogram has a suffix");
    assert!(family("fetchproxy_fetch_seconds_bucket").is_some());
    assert_eq!(selected(r#"{job=~"$job", how!="ack"}[5m])"#), ["job", "how"]);
    assert_eq!(
        asked("rate(fetchproxy_a_total{x=\"y\"}) + my_fetchproxy_b"),
        [("fetchproxy_a_total", "{x=\"y\"}) + my_fetchproxy_b")]
    );
}
