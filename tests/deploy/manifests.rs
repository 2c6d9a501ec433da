//! `deploy/kubernetes`: what the chart makes of a policy and its defaults, for those who do without helm.
//! `UPDATE_DOCS=1 make test-deploy ARGS=manifests` writes it again.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use crate::{helm, tool};

/// Labels that say helm made it.
const OF_HELM: [&str; 2] = ["helm.sh/chart:", "app.kubernetes.io/managed-by:"];

#[test]
fn plain_manifests_are_rendered_from_the_chart() {
    let folder = folder();
    let rendered = rendered();
    if env::var_os("UPDATE_DOCS").is_some() {
        for (name, text) in &rendered {
            fs::write(folder.join(name), text).unwrap();
        }
    }
    let there: BTreeMap<String, String> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|file| file.extension().is_some_and(|kind| kind == "yaml"))
        .map(|file| (file.file_name().unwrap().to_str().unwrap().to_owned(), file))
        .filter(|(name, _)| name != "kustomization.yaml")
        .map(|(name, file)| (name, fs::read_to_string(file).unwrap()))
        .collect();
    assert!(there == rendered, "they differ: UPDATE_DOCS=1 make test-deploy ARGS=manifests");
}

#[test]
fn kustomize_accepts_all_plain_manifests() {
    let output = tool("FETCH_PROXY_TEST_KUSTOMIZE").arg("build").arg(folder()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let built = helm::parsed(&String::from_utf8(output.stdout).unwrap());
    let names = |objects: &[serde_json::Value]| {
        let name = |object: &serde_json::Value| {
            format!("{} {}", object["kind"], object["metadata"]["name"])
        };
        objects.iter().map(name).collect::<std::collections::BTreeSet<_>>()
    };
    let rendered: String = rendered().into_values().map(|text| format!("---\n{text}")).collect();
    assert_eq!(names(&built), names(&helm::parsed(&rendered)));
    let image = &helm::container(&built)["image"];
    assert_eq!(image, concat!("fetch-proxy:", env!("CARGO_PKG_VERSION")));
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy/kubernetes")
}

/// The chart with a policy and else its defaults, a file for each template.
fn rendered() -> BTreeMap<String, String> {
    let mut files = BTreeMap::new();
    for document in helm::text(helm::GUARDED).split("---\n").filter(|text| !text.trim().is_empty())
    {
        let (source, object) = document.split_once('\n').unwrap();
        let name = source.rsplit('/').next().unwrap().to_owned();
        if !source.contains("/tests/") {
            files.insert(name, plain(object));
        }
    }
    files
}

fn plain(object: &str) -> String {
    let of_helm = |line: &&str| OF_HELM.iter().any(|label| line.trim_start().starts_with(label));
    let lines = object.trim_end().lines().filter(|line| !of_helm(line));
    lines.map(|line| format!("{line}\n")).collect()
}
