//! The files of TLS: at the start, and when a later version of them cannot be used.

use std::{
    process::Command,
    time::{SystemTime, UNIX_EPOCH},
};

use testkit::{eventually, scrape::Scrape, until};

use super::*;

const UNUSABLE: &str = "the TLS files cannot be used: the certificate stays as it was";
const USABLE: &str = "the TLS files can be used again";
const READ_AGAIN: &str = "the TLS files were read again";

/// The exit code and the text of a `serve` that does not start.
fn refused(flags: &[&str]) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fetch-proxy"));
    command.args(["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"]);
    let output = command.args(["--nats-url", NOWHERE]).args(flags).output().unwrap();
    let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
    (output.status.code().unwrap(), text)
}

#[test]
fn wrong_file_at_the_start_is_exit_2_with_its_path_and_the_cause() {
    let ca = Authority::new("ca");
    let (one, other) = (ca.server(), ca.server());
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (cert, key) = (file("cert", &one.cert), file("key", &one.key));
    let (empty, garbage) = (file("empty", ""), file("garbage", "-----BEGIN CERTIFICATE-----\nx"));
    let broken = file("broken", &one.cert.replacen('M', "/", 1));
    let no_key = file("no key", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n");
    let (foreign, nowhere) = (file("foreign", &other.key), nowhere().display().to_string());
    for (cert, key, client_ca, flag, path, cause) in [
        (&nowhere, &key, None, "--tls-cert", &nowhere, "cannot read"),
        (&cert, &nowhere, None, "--tls-key", &nowhere, "cannot read"),
        (&cert, &key, Some(&nowhere), "--tls-client-ca", &nowhere, "cannot read"),
        (&empty, &key, None, "--tls-cert", &empty, "no certificate in PEM"),
        (&garbage, &key, None, "--tls-cert", &garbage, "not valid PEM"),
        (&broken, &key, None, "--tls-cert", &broken, "invalid peer certificate"),
        (&cert, &empty, None, "--tls-key", &empty, "no private key in PEM"),
        (&cert, &cert, None, "--tls-key", &cert, "no private key in PEM"),
        (&cert, &no_key, None, "--tls-key", &no_key, "cannot be used"),
        (&cert, &foreign, None, "--tls-key", &foreign, "is not the key of the certificate in"),
        (&cert, &key, Some(&empty), "--tls-client-ca", &empty, "no certificate in PEM"),
        (&cert, &key, Some(&broken), "--tls-client-ca", &broken, "certificate 1"),
    ] {
        let mut flags = vec!["--tls-cert", cert, "--tls-key", key];
        flags.extend(client_ca.iter().flat_map(|file| ["--tls-client-ca", file]));
        let (code, text) = refused(&flags);
        assert_eq!(code, 2, "{flags:?}: {text}");
        let line = text.lines().find(|line| line.contains("error: ")).unwrap_or_default();
        for word in [flag, path, cause] {
            assert!(line.contains(word), "{flags:?} without {word:?}: {text}");
        }
    }
}

#[tokio::test]
async fn broken_pair_keeps_the_old_one_and_is_told_once() {
    let ca = Authority::new("ca");
    let (one, other, third) = (ca.server(), ca.server(), ca.server());
    let mut files = Mounted::new(&one, ca.pem());
    let proxy = start(NOWHERE, &files.flags(), &[]);
    let config = h2(&ca, None);
    files.swap("no certificate", &one.key, ca.pem());
    eventually("the line", || async { (said(&proxy, UNUSABLE) == 1).then_some(()) }).await;
    assert_eq!(leaf(&proxy, &config).await, one.der);
    // A key of another rotation is told too, and not at the first two looks.
    files.swap(&other.cert, &one.key, ca.pem());
    let told = || async { (said(&proxy, UNUSABLE) == 2).then_some(()) };
    assert!(until(Duration::from_secs(3), told).await.is_none(), "{}", proxy.log());
    eventually("the other line", told).await;
    assert!(proxy.log().contains("is not the key of the certificate in"), "{}", proxy.log());
    assert_eq!(leaf(&proxy, &config).await, one.der);
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(said(&proxy, UNUSABLE), 2, "each fault is told once: {}", proxy.log());
    files.swap(&third.cert, &third.key, ca.pem());
    let new = || async { (leaf(&proxy, &config).await == third.der).then_some(()) };
    assert!(until(SEEN, new).await.is_some(), "{}", proxy.log());
    eventually("the end", || async { (said(&proxy, USABLE) == 1).then_some(()) }).await;
    assert_eq!(said(&proxy, READ_AGAIN), 1, "{}", proxy.log());
}

/// One file after the other, as a person copies them.
#[tokio::test]
async fn certificate_before_its_key_and_key_before_its_certificate_are_no_fault() {
    let ca = Authority::new("ca");
    let folder = tempfile::tempdir().unwrap();
    let first = ca.server();
    first.write(folder.path(), "tls");
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let flags = ["--tls-cert".to_owned(), path("tls.crt"), "--tls-key".to_owned(), path("tls.key")];
    let (proxy, config) = (start(NOWHERE, &flags, &[]), h2(&ca, None));
    for key_first in [false, true] {
        let next = ca.server();
        let mut parts = [("tls.crt", &next.cert), ("tls.key", &next.key)];
        if key_first {
            parts.reverse();
        }
        fs::write(path(parts[0].0), parts[0].1).unwrap();
        tokio::time::sleep(Duration::from_millis(2500)).await;
        assert_ne!(leaf(&proxy, &config).await, next.der, "half a rotation is not used");
        fs::write(path(parts[1].0), parts[1].1).unwrap();
        let new = || async { (leaf(&proxy, &config).await == next.der).then_some(()) };
        assert!(until(SEEN, new).await.is_some(), "{}", proxy.log());
    }
    assert_eq!(said(&proxy, UNUSABLE), 0, "{}", proxy.log());
}

#[tokio::test]
async fn certificate_that_ends_soon_is_told_in_time() {
    const SOON: &str = "the certificate of the client port ends soon";
    let day = Duration::from_secs(24 * 3600);
    let ca = Authority::new("ca");
    let lasting = |before: u32, after: u32| {
        ca.server_by(|params| {
            params.not_before = (SystemTime::now() - before * day).into();
            params.not_after = (SystemTime::now() + after * day).into();
        })
    };
    // The second has a short life, of which most is left.
    let (late, short, soon) = (lasting(82, 8), lasting(1, 2), lasting(84, 6));
    let mut files = Mounted::new(&late, ca.pem());
    let proxy = start(NOWHERE, &files.flags(), &[]);
    let days_left = || {
        let which = "fetchproxy_certificate_not_after_timestamp_seconds{which=\"server\"}";
        let end = Duration::from_secs_f64(Scrape::of(&proxy.ops).value(which));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        end.saturating_sub(now).as_secs_f64() / day.as_secs_f64()
    };
    assert!((7.9..8.1).contains(&days_left()), "{}", days_left());
    tokio::time::sleep(Duration::from_secs(5)).await;
    files.swap(&short.cert, &short.key, ca.pem());
    eventually("the next", || async { (said(&proxy, READ_AGAIN) == 1).then_some(()) }).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(said(&proxy, SOON), 0, "{}", proxy.log());
    files.swap(&soon.cert, &soon.key, ca.pem());
    eventually("the line", || async { (said(&proxy, SOON) == 1).then_some(()) }).await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(said(&proxy, SOON), 1, "once a day: {}", proxy.log());
    assert!((5.9..6.1).contains(&days_left()), "{}", days_left());
}
