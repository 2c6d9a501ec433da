//! The policy commands and the keys for clients: what they print, and their exit codes.

use std::{
    fs,
    process::{Command, Output},
};

use tempfile::TempDir;

const POLICY: &str = "\
version: 1
authenticate:
  api_keys: {file: api-keys}
principals:
  - name: orders
    match: [\"key:orders-*\"]
rules:
  - principals: [orders]
    streams: [ORDERS]
    consumers: [worker, \"worker-*\"]
    verbs: [work]
";

/// A folder with a policy file and an empty file of API keys.
fn folder() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("policy.yaml"), POLICY).unwrap();
    fs::write(folder.path().join("api-keys"), "").unwrap();
    folder
}

fn run(folder: &TempDir, arguments: &[&str]) -> (i32, String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
    let output: Output = command.current_dir(folder).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn good_policy_is_summed_up_in_one_line() {
    let (code, out, errors) = run(&folder(), &["policy", "check", "policy.yaml"]);
    assert_eq!((code, &*errors), (0, ""));
    assert!(out.starts_with("ok: principals 1, rules 1, digest "), "{out}");
    assert_eq!(out.lines().count(), 1);
}

#[test]
fn mistake_ends_with_code_2_and_its_place() {
    let folder = folder();
    fs::write(folder.path().join("policy.yaml"), POLICY.replace("[ORDERS]", "[*]")).unwrap();
    for command in [&["check", "policy.yaml"][..], &["diff", "policy.yaml", "policy.yaml"]] {
        let (code, out, errors) = run(&folder, &[&["policy"], command].concat());
        assert_eq!((code, &*out), (2, ""));
        assert!(errors.starts_with("error: policy.yaml:9:16: "), "{errors}");
        assert!(errors.contains("quote a pattern that begins with a star"), "{errors}");
        assert_eq!(errors.lines().count(), 1);
    }
    let (code, _, errors) = run(&folder, &["policy", "check", "nowhere.yaml"]);
    assert_eq!(code, 2);
    assert!(errors.contains("cannot read nowhere.yaml"), "{errors}");
}

#[test]
fn file_of_keys_is_looked_at_unless_offline() {
    let folder = folder();
    fs::remove_file(folder.path().join("api-keys")).unwrap();
    let (code, _, errors) = run(&folder, &["policy", "check", "policy.yaml"]);
    assert_eq!(code, 2);
    assert!(errors.contains("cannot read the API keys in api-keys"), "{errors}");
    let (code, ..) = run(&folder, &["policy", "check", "policy.yaml", "--offline"]);
    assert_eq!(code, 0);
}

#[test]
fn decision_is_explained_by_its_line() {
    let folder = folder();
    let ask = |identity: &str, rest: &[&str]| {
        let command = ["policy", "check", "policy.yaml", "--as", identity];
        run(&folder, &[&command[..], rest].concat())
    };
    let about = |verb: &'static str, consumer: &'static str| {
        ["--verb", verb, "--stream", "ORDERS", "--consumer", consumer]
    };
    for (identity, rest, code, said) in [
        (
            "key:orders-1",
            &[][..],
            0,
            "may        fetch, settle, extend on ORDERS / worker, worker-*",
        ),
        ("key:other", &[], 1, "principal  none"),
        ("key:orders-1", &about("fetch", "worker-2"), 0, "by the rule in line 8"),
        ("key:orders-1", &about("fetch", "other"), 1, "denied"),
        ("key:orders-1", &about("admin", "worker"), 1, "denied"),
        ("anonymous", &about("fetch", "worker"), 1, "denied"),
    ] {
        let (ended, out, errors) = ask(identity, rest);
        assert_eq!((ended, &*errors), (code, ""), "{identity} {rest:?}: {out}");
        assert!(out.contains(said), "{identity} {rest:?}: {out}");
    }
    for (identity, rest) in [
        ("orders", &[][..]),
        ("spiffe://", &[]),
        ("dns:Worker.example", &[]),
        ("key:a", &["--verb", "eat", "--stream", "S", "--consumer", "c"]),
        ("key:a", &["--verb", "fetch", "--stream", "S"]),
        ("key:a", &["--stream", "S"]),
    ] {
        assert_eq!(ask(identity, rest).0, 2, "{identity} {rest:?}");
    }
}

#[test]
fn identity_of_a_certificate_is_explained_by_its_line() {
    let folder = folder();
    let of_certificates = POLICY
        .replace("authenticate:\n  api_keys: {file: api-keys}\n", "")
        .replace("\"key:orders-*\"", "\"spiffe://prod.example/*\", \"dns:*.orders.example\"");
    fs::write(folder.path().join("policy.yaml"), of_certificates).unwrap();
    let (code, out, errors) = run(&folder, &["policy", "check", "policy.yaml"]);
    assert_eq!((code, &*errors), (0, ""), "{out}");
    let asked = ["--verb", "fetch", "--stream", "ORDERS", "--consumer", "worker"];
    for (identity, code, said) in [
        ("spiffe://prod.example/ns/orders/sa/worker", 0, "by the rule in line 6"),
        ("dns:worker.orders.example", 0, "by the rule in line 6"),
        ("spiffe://test.example/ns/orders/sa/worker", 1, "principal  none"),
        ("dns:worker.example", 1, "principal  none"),
    ] {
        let command = ["policy", "check", "policy.yaml", "--as", identity];
        let (ended, out, errors) = run(&folder, &[&command[..], &asked].concat());
        assert_eq!((ended, &*errors), (code, ""), "{identity}: {out}");
        assert!(out.contains(said), "{identity}: {out}");
    }
}

#[test]
fn differing_policies_end_with_code_1() {
    let folder = folder();
    fs::write(folder.path().join("new.yaml"), POLICY.replace("[work]", "[fetch]")).unwrap();
    let (code, out, _) = run(&folder, &["policy", "diff", "policy.yaml", "new.yaml"]);
    assert_eq!(code, 1);
    let [gone, new] = out.lines().collect::<Vec<_>>()[..] else { panic!("{out}") };
    assert!(gone.starts_with("- rule in line 8") && new.starts_with("+ rule in line 8"), "{out}");
    let (code, out, _) = run(&folder, &["policy", "diff", "policy.yaml", "policy.yaml"]);
    assert_eq!((code, &*out), (0, ""));
}

#[test]
fn new_api_key_has_a_line_for_the_client_and_a_line_for_the_file() {
    let folder = folder();
    let (code, out, errors) = run(&folder, &["keygen", "--api-key", "laptop-anna"]);
    assert_eq!((code, &*errors), (0, ""));
    let [key, line] = out.lines().collect::<Vec<_>>()[..] else { panic!("{out}") };
    assert!(key.starts_with("fpk_") && key.len() == 47, "{key}");
    assert!(line.starts_with("laptop-anna sha256:") && line.len() == 83, "{line}");
    let (code, out, errors) = run(&folder, &["keygen", "--api-key", "Anna"]);
    assert_eq!((code, &*out), (2, ""));
    assert!(errors.contains("a name has 1 to 64"), "{errors}");
}

#[test]
fn page_shows_a_policy_and_its_decision_as_they_are() {
    let folder = folder();
    let page = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/how-to/access.md"));
    let page = page.unwrap();
    let block = |kind: &str| {
        let (_, rest) = page.split_once(&format!("```{kind}\n")).unwrap();
        rest.split_once("```").unwrap().0.to_owned()
    };
    fs::write(folder.path().join("policy.yaml"), block("yaml")).unwrap();
    let (code, out, errors) = run(&folder, &["policy", "check", "policy.yaml"]);
    assert_eq!((code, &*errors), (0, ""), "{out}");
    let others: Vec<_> = page.split("```yaml\n").skip(2).collect();
    assert!(!others.is_empty(), "the page has a policy of certificates");
    for other in others {
        fs::write(folder.path().join("other.yaml"), other.split("```").next().unwrap()).unwrap();
        let (code, out, errors) = run(&folder, &["policy", "check", "other.yaml", "--offline"]);
        assert_eq!((code, &*errors), (0, ""), "{out}");
    }
    let console = block("console");
    let (typed, shown) = console.split_once('\n').unwrap();
    let typed = typed.strip_prefix("$ fetch-proxy ").unwrap();
    let (code, out, _) = run(&folder, &typed.split(' ').collect::<Vec<_>>());
    assert_eq!((code, &*out), (0, shown));
}

#[test]
fn policy_in_the_help_is_a_policy() {
    let folder = folder();
    let (_, help, _) = run(&folder, &["policy", "--help"]);
    let (_, example) = help.split_once("\n\n  version: 1\n").unwrap();
    let example = format!("version: 1\n{}", example.split("\n\n").next().unwrap());
    fs::write(folder.path().join("help.yaml"), example.replace("\n  ", "\n")).unwrap();
    let (code, out, errors) = run(&folder, &["policy", "check", "help.yaml"]);
    assert_eq!((code, &*errors), (0, ""), "{example}");
    assert!(out.starts_with("ok: principals 1, rules 1"), "{out}");
}

#[test]
fn issuer_of_an_identity_and_the_place_of_its_keys_are_shown() {
    let folder = folder();
    let issuers = "\
authenticate:
  jwt:
  - {name: corp, issuer: 'https://login.example/', audiences: [a], keys: {discovery: true}}
  - {name: lab, issuer: lab, audiences: [a], keys: {file: lab.json}}
  kubernetes:
    issuer: cluster
    audiences: [a]
    keys: {url: 'https://10.0.0.1/keys', ca_file: ca.crt}
";
    let (_, rest) = POLICY.split_once("principals:").unwrap();
    let text =
        format!("version: 1\n{issuers}principals:{rest}").replace("key:orders", "jwt:corp/orders");
    fs::write(folder.path().join("policy.yaml"), text).unwrap();
    let check = |rest: &[&str]| run(&folder, &[&["policy", "check", "policy.yaml"], rest].concat());
    let (code, _, errors) = check(&[]);
    assert_eq!(code, 2);
    assert!(errors.contains("cannot read the keys of an issuer in lab.json"), "{errors}");
    fs::write(folder.path().join("lab.json"), "").unwrap();
    let (code, _, errors) = check(&[]);
    assert_eq!(code, 2);
    assert!(errors.contains("cannot read the authorities in ca.crt"), "{errors}");
    let (code, out, errors) = check(&["--offline"]);
    assert_eq!((code, &*errors), (0, ""));
    for line in [
        "issuer corp: https://login.example/, keys from the URL that \
         https://login.example/.well-known/openid-configuration names",
        "issuer lab: lab, keys from the file lab.json",
        "issuer kubernetes: cluster, keys from https://10.0.0.1/keys",
    ] {
        assert!(out.lines().any(|shown| shown == line), "{line}: {out}");
    }
    for (identity, code, shown) in [
        ("jwt:corp/orders-1", 0, "issuer     https://login.example/, keys from the URL"),
        ("k8s:orders/worker", 1, "issuer     cluster, keys from https://10.0.0.1/keys"),
        ("jwt:other/orders-1", 1, "issuer     none: `authenticate` has no issuer `other`"),
    ] {
        let (ended, out, errors) = check(&["--offline", "--as", identity]);
        assert_eq!((ended, &*errors), (code, ""), "{identity}: {out}");
        assert!(out.contains(shown), "{identity}: {out}");
    }
    let (_, out, _) = check(&["--offline", "--as", "key:orders-1"]);
    assert!(!out.contains("issuer"), "{out}");
}
