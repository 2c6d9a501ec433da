//! The chart as helm renders it. Judges nothing.

use std::{
    path::PathBuf,
    process::{Command, Output},
};

use serde::Deserialize as _;
use serde_json::Value;

use crate::tool;

/// The values that every installation must set: the keys, and a word on who may call.
pub const LEAST: &str = "tokenKeys.secret=fetch-proxy-token-keys,security.insecure=true";

/// The values of the plain manifests: callers need credentials, and something in front speaks TLS.
pub const GUARDED: &[&str] = &[
    "tokenKeys.secret=fetch-proxy-token-keys",
    "access.policySecret=fetch-proxy-policy",
    "security.plaintext=true",
];

pub fn chart() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("deploy/helm/fetch-proxy")
}

/// The command that renders the release `fetch-proxy` with these values.
pub fn template_command(values: &[&str]) -> Command {
    let mut helm = tool("FETCH_PROXY_TEST_HELM");
    helm.args(["template", "fetch-proxy"]).arg(chart()).args(flags(values));
    helm
}

/// Values as `--set` takes them, or as `--set-json` does where `=[` tells that one is JSON.
pub fn flags<'v>(values: &[&'v str]) -> Vec<&'v str> {
    let flag = |value: &str| if value.contains("=[") { "--set-json" } else { "--set" };
    values.iter().flat_map(|value| [flag(value), value]).collect()
}

pub fn template(values: &[&str]) -> Output {
    template_command(values).output().unwrap()
}

/// The same as text.
///
/// # Panics
/// When helm refuses.
pub fn text(values: &[&str]) -> String {
    let output = template(values);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{values:?}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

/// The same as objects.
pub fn objects(values: &[&str]) -> Vec<Value> {
    parsed(&text(values))
}

pub fn parsed(yaml: &str) -> Vec<Value> {
    yaml_serde::Deserializer::from_str(yaml)
        .map(|document| Value::deserialize(document).unwrap())
        .filter(|object| !object.is_null())
        .collect()
}

/// The only one of its kind; `tests` of the chart are none of it.
pub fn one<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let mut found = objects.iter().filter(|object| object["kind"] == kind && !is_hook(object));
    let one = found.next().unwrap_or_else(|| panic!("no {kind}"));
    assert!(found.next().is_none(), "more than one {kind}");
    one
}

/// Whether it is there for a `helm test` alone.
pub fn is_hook(object: &Value) -> bool {
    object["metadata"]["annotations"]["helm.sh/hook"].is_string()
}

/// The container of the Deployment.
pub fn container(objects: &[Value]) -> &Value {
    &one(objects, "Deployment")["spec"]["template"]["spec"]["containers"][0]
}
