//! Every object, of the chart with every set of values and of the examples, against the schemas of
//! several versions of Kubernetes. The table is printed.

use std::{env, fs, path::Path, process::Command};

use crate::{chart::INSTALLATIONS, helm};

const EXAMPLES: [&str; 3] =
    ["deploy/nats/orders.yaml", "deploy/keda/worker.yaml", "deploy/keda/worker-by-metrics.yaml"];

fn validate(files: &[String]) -> (bool, String) {
    let packages = env::var("FETCH_PROXY_TEST_PYTHONPATH");
    let output = Command::new("python3")
        .arg("tests/deploy/validate.py")
        .args(files)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("PYTHONPATH", packages.expect("run `make test-deploy`"))
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    (output.status.success(), said + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn every_object_is_valid_in_every_version() {
    let folder = tempfile::tempdir().unwrap();
    let rendered = INSTALLATIONS.iter().map(|(name, values)| {
        let file = folder.path().join(format!("{name}.yaml"));
        fs::write(&file, helm::text(values)).unwrap();
        file.display().to_string()
    });
    let files: Vec<String> = rendered.chain(EXAMPLES.map(str::to_owned)).collect();
    let (valid, table) = validate(&files);
    println!("{table}");
    assert!(valid);
}

#[test]
fn invalid_object_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let wrong = |text: &str, from: &str, to: &str| {
        assert!(text.contains(from), "{from}");
        let file = folder.path().join("wrong.yaml");
        fs::write(&file, text.replacen(from, to, 1)).unwrap();
        let (valid, said) = validate(&[file.display().to_string()]);
        assert!(!valid, "{to} was taken: {said}");
    };
    let chart = helm::text(&[helm::LEAST]);
    wrong(&chart, "enableServiceLinks:", "enableServiceLink:");
    wrong(&chart, "replicas: 3", "replicas: three");
    wrong(&chart, "kind: PodDisruptionBudget", "kind: PodBudget");
    let example = |place: usize| {
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(EXAMPLES[place])).unwrap()
    };
    wrong(&example(0), "ackWait: 30s", "ackWait: thirty");
    wrong(&example(1), "lagThreshold: \"50\"", "lagThreshold: 50");
}
