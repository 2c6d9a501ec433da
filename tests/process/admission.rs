//! No unsafe default: each row of the table, by starting the program. A replica that other machines can
//! reach needs credentials and TLS, or one word of admission for each.

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use tempfile::TempDir;
use testkit::{authority::Authority, nats_server::NatsServer, proxy::Proxy};

const POLICY: &str = "\
version: 1
authenticate: {api_keys: {file: keys}}
principals: [{name: a, match: ['*']}]
rules: [{principals: [a], streams: ['*'], consumers: ['*'], verbs: [work]}]
";

/// A folder with policies, each under its name.
fn policies() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("keys", "");
    write("keyed", POLICY);
    write("open", &POLICY.replace("{file: keys}", "{file: keys}, anonymous: true"));
    write("anonymous", &POLICY.replace("api_keys: {file: keys}", "anonymous: true"));
    let authority = Authority::new("ours");
    let server = authority.server();
    write("ca", authority.pem());
    write("cert", &server.cert);
    write("key", &server.key);
    write("nobody", &POLICY.replace("api_keys: {file: keys}", ""));
    folder
}

/// The flags of a row. `TLS` and `CA` are files of this test.
fn flags(folder: &Path, policy: Option<&str>, words: &[&str]) -> Vec<String> {
    let file = policy.map(|name| folder.join(name).to_str().unwrap().to_owned());
    let file = file.into_iter().flat_map(|file| ["--policy-file".to_owned(), file]);
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let words = words.iter().flat_map(|word| match *word {
        "TLS" => vec!["--tls-cert".into(), path("cert"), "--tls-key".into(), path("key")],
        "CA" => vec!["--tls-client-ca".into(), path("ca")],
        word => vec![word.to_owned()],
    });
    file.chain(words).collect()
}

const WITHOUT_CREDENTIALS: &str = "listening beyond loopback without credentials (--insecure)";
const ALL_MAY: &str =
    "there is no policy: each client with a certificate of --tls-client-ca may do everything";
const WITHOUT_TLS: &str = "listening beyond loopback without TLS (--plaintext)";

#[tokio::test]
async fn replica_serves_where_its_protection_or_its_admission_is_enough() {
    let (folder, nats) = (policies(), NatsServer::shared().url());
    for (listen, policy, words, warning) in [
        ("127.0.0.1:0", None, &[][..], None),
        ("127.0.0.1:0", Some("keyed"), &[], None),
        ("127.0.0.1:0", Some("open"), &[], None),
        ("127.0.0.1:0", Some("anonymous"), &[], None),
        ("[::1]:0", None, &[], None),
        ("127.0.0.1:0", None, &["--insecure"], None),
        ("0.0.0.0:0", Some("keyed"), &["--plaintext"], Some(WITHOUT_TLS)),
        ("0.0.0.0:0", Some("keyed"), &["--insecure"], Some(WITHOUT_TLS)),
        (":0", None, &["--insecure"], Some(WITHOUT_CREDENTIALS)),
        ("0.0.0.0:0", Some("keyed"), &["TLS"], None),
        ("0.0.0.0:0", Some("keyed"), &["TLS", "CA"], None),
        ("0.0.0.0:0", None, &["TLS", "CA"], None),
        ("0.0.0.0:0", Some("nobody"), &["TLS", "CA"], None),
        ("0.0.0.0:0", Some("nobody"), &["TLS", "CA", "--tls-client-auth", "optional"], None),
        ("0.0.0.0:0", Some("keyed"), &["TLS", "CA", "--tls-client-auth", "optional"], None),
        ("0.0.0.0:0", None, &["TLS", "--insecure"], Some(WITHOUT_CREDENTIALS)),
        ("0.0.0.0:0", Some("open"), &["--insecure"], Some(WITHOUT_CREDENTIALS)),
    ] {
        let flags = flags(folder.path(), policy, words);
        let flags: Vec<_> = flags.iter().map(String::as_str).collect();
        let proxy = Proxy::start_on(listen, &nats, &flags);
        proxy.ready().await;
        let log = proxy.log();
        for line in [WITHOUT_CREDENTIALS, WITHOUT_TLS] {
            assert_eq!(log.contains(line), warning == Some(line), "{listen} {flags:?}: {log}");
        }
        let all_may = policy.is_none() && words == ["TLS", "CA"];
        assert_eq!(log.contains(ALL_MAY), all_may, "{listen} {flags:?}: {log}");
    }
}

#[test]
fn replica_that_strangers_could_reach_ends_with_code_2_and_the_ways_out() {
    let folder = policies();
    let insecure = ["--policy-file", "127.0.0.1", "--insecure"];
    let plaintext = ["--tls-cert", "127.0.0.1", "--plaintext"];
    for (listen, policy, words, said) in [
        ("0.0.0.0:0", None, &[][..], &insecure[..]),
        (":0", None, &[], &insecure),
        ("0.0.0.0:0", None, &["--plaintext"], &insecure),
        ("0.0.0.0:0", Some("open"), &["--plaintext"], &insecure),
        ("0.0.0.0:0", Some("anonymous"), &["--plaintext"], &insecure),
        ("0.0.0.0:0", Some("keyed"), &[], &plaintext),
        ("0.0.0.0:0", None, &["TLS"], &insecure),
        ("0.0.0.0:0", Some("open"), &["TLS"], &insecure),
        (
            "0.0.0.0:0",
            None,
            &["TLS", "CA", "--tls-client-auth", "optional", "--plaintext"],
            &insecure,
        ),
        ("some.name:0", Some("keyed"), &[], &plaintext),
        ("0.0.0.0:0", Some("open"), &["TLS", "CA", "--tls-client-auth", "optional"], &insecure),
        ("127.0.0.1:0", Some("nobody"), &[], &["its rules are for nobody", "--tls-client-ca"]),
        ("127.0.0.1:0", Some("nobody"), &["TLS"], &["its rules are for nobody"]),
        ("0.0.0.0:0", Some("nobody"), &["--insecure"], &["its rules are for nobody"]),
        ("127.0.0.1:0", Some("missing"), &[], &["--policy-file: cannot read"]),
    ] {
        let output = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"))
            .args(["serve", "--listen", listen, "--ops-listen", "127.0.0.1:0"])
            .args(flags(folder.path(), policy, words))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{listen} {policy:?} {words:?}: {errors}");
        let last = errors.lines().last().unwrap();
        assert!(last.starts_with("error: "), "{errors}");
        assert!(said.iter().all(|said| last.contains(said)), "{listen} {policy:?}: {errors}");
    }
}
