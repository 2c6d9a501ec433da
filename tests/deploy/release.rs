//! `scripts/release`: the artifacts that it makes, each installed as a user would, and whether the same sources give the
//! same bytes.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command};

use serde_json::Value;
use tempfile::TempDir;

use crate::{has, image, said};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The highest exposure of the service, in tenths, by `systemd-analyze security`. Without protection it is 96.
const MOST_EXPOSED: &str = "20";

#[test]
fn each_artifact_of_a_release_installs_and_works() {
    let release = Release::build("all", &[]);
    assert_eq!(release.names(), expected());
    said(release.command("sha256sum").args(["--check", "--strict", "SHA256SUMS"]));
    let sums = fs::read_to_string(release.folder.join("SHA256SUMS")).unwrap();
    assert_eq!(sums.lines().count(), release.names().len() - 1);
    archive_has_a_program_that_runs(&release);
    let root = debian_package_installs(&release);
    service_is_valid_and_closed(&root);
    red_hat_package_installs(&release);
    bill_of_materials_has_each_crate(&release);
    let image =
        said(release.command("tar").args(["-tf", &format!("fetch-proxy-image-{VERSION}.tar")]));
    assert!(image.contains("oci-layout") && image.contains("index.json"), "{image}");

    let again = Release::build("again", &["archive", "linux", "contract"]);
    for name in again.names().iter().filter(|name| *name != "SHA256SUMS") {
        let bytes = |release: &Release| fs::read(release.folder.join(name)).unwrap();
        assert!(bytes(&release) == bytes(&again), "{name} differs from one build to the next");
    }
}

#[test]
fn part_that_does_not_exist_is_refused_before_anything_is_built() {
    let folder = tempfile::tempdir().unwrap();
    let output =
        Command::new("scripts/release").arg(folder.path()).arg("all").current_dir(ROOT).output();
    let output = output.unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("PART: archive"));
}

/// The results of the script.
struct Release {
    folder: PathBuf,
    _parent: TempDir,
}

impl Release {
    /// With the program of the image, which is the same.
    fn build(name: &str, parts: &[&str]) -> Self {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join(name);
        let mut script = Command::new("scripts/release");
        script.arg(&folder).args(parts).current_dir(ROOT);
        script.env("PROGRAM", image::program());
        println!("{}", said(&mut script));
        Self { folder, _parent: parent }
    }

    fn names(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(&self.folder).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.folder);
        command
    }
}

fn target() -> String {
    let version = said(Command::new("rustc").args(["--version", "--verbose"]));
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    host.unwrap().to_owned()
}

/// The architecture, as Debian and as Red Hat name it.
fn architectures() -> (&'static str, &'static str) {
    match target().split('-').next() {
        Some("x86_64") => ("amd64", "x86_64"),
        Some("aarch64") => ("arm64", "aarch64"),
        other => panic!("no packages for {other:?}"),
    }
}

fn expected() -> BTreeSet<String> {
    let (debian, red_hat) = architectures();
    let target = target();
    let mut names = vec![
        "SHA256SUMS".to_owned(),
        format!("fetch-proxy-{VERSION}-{target}.tar.gz"),
        format!("fetch-proxy-{VERSION}-{target}.cdx.json"),
        format!("fetch-proxy_{VERSION}-1_{debian}.deb"),
        format!("fetch-proxy-{VERSION}-1.{red_hat}.rpm"),
        format!("fetch-proxy-chart-{VERSION}.tgz"),
        format!("fetch-proxy-image-{VERSION}.tar"),
        format!("fetch-proxy-proto-{VERSION}.tar.gz"),
    ];
    for (program, artifacts) in [
        ("python3", &["fetch_proxy-V-py3-none-any.whl", "fetch_proxy-V.tar.gz"][..]),
        ("cargo", &["fetchproxy-V.crate"]),
        ("npm", &["fetchproxy-typescript-V.tgz"]),
        (
            "mvn",
            &[
                "fetchproxy-client-V.jar",
                "fetchproxy-client-V-sources.jar",
                "fetchproxy-client-V-javadoc.jar",
            ],
        ),
    ] {
        if has(program) {
            names.extend(artifacts.iter().map(|name| name.replace('V', VERSION)));
        } else {
            println!("NOT TESTED: the client package that needs {program}");
        }
    }
    names.into_iter().collect()
}

fn archive_has_a_program_that_runs(release: &Release) {
    let name = format!("fetch-proxy-{VERSION}-{}", target());
    said(release.command("tar").args(["-xzf", &format!("{name}.tar.gz"), "-C", ".."]));
    let folder = release.folder.parent().unwrap().join(name);
    let version = said(Command::new(folder.join("fetch-proxy")).arg("--version"));
    assert_eq!(version, format!("fetch-proxy {VERSION}\n"));
    for file in [
        "LICENSE",
        "THIRD-PARTY.txt",
        "man/fetch-proxy-work.1",
        "completions/_fetch-proxy",
        "proto/fetchproxy/v1/fetch.proto",
        "monitoring/rules.yaml",
        "systemd/fetch-proxy.service",
    ] {
        assert!(folder.join(file).is_file(), "{file} is missing");
    }
    let licences = fs::read_to_string(folder.join("THIRD-PARTY.txt")).unwrap();
    let crates: Vec<&str> = licences.lines().skip(2).collect();
    assert!(crates.iter().any(|line| line.starts_with("tokio v")), "{licences}");
    assert!(crates.iter().all(|line| line.split('\t').nth(1).is_some_and(|l| !l.is_empty())));
}

/// The root that has the package. Nothing of this machine changes.
fn debian_package_installs(release: &Release) -> TempDir {
    let root = tempfile::tempdir().unwrap();
    let at = root.path();
    for folder in ["info", "updates", "triggers"] {
        fs::create_dir_all(at.join("var/lib/dpkg").join(folder)).unwrap();
    }
    for file in ["status", "available"] {
        fs::write(at.join("var/lib/dpkg").join(file), "").unwrap();
    }
    let dpkg = || {
        let mut dpkg = release.command("dpkg");
        dpkg.arg(format!("--root={}", at.display()));
        dpkg
    };
    let package = format!("fetch-proxy_{VERSION}-1_{}.deb", architectures().0);
    said(dpkg().args(["--install", &package]));
    let version = said(Command::new(at.join("usr/bin/fetch-proxy")).arg("--version"));
    assert_eq!(version, format!("fetch-proxy {VERSION}\n"));
    assert!(at.join("usr/share/man/man1/fetch-proxy-serve.1.gz").is_file());
    // An operator's settings outlive the package.
    fs::write(at.join("etc/fetch-proxy/fetch-proxy.env"), "NATS_URL=nats://n:4222\n").unwrap();
    said(dpkg().args(["--remove", "fetch-proxy"]));
    assert!(!at.join("usr/bin/fetch-proxy").exists());
    assert!(at.join("etc/fetch-proxy/fetch-proxy.env").is_file());
    said(dpkg().args(["--force-confold", "--install", &package]));
    let settings = fs::read_to_string(at.join("etc/fetch-proxy/fetch-proxy.env")).unwrap();
    assert_eq!(settings, "NATS_URL=nats://n:4222\n");
    root
}

/// The unit names a program that this machine does not have, so the check gets that of the package.
fn service_is_valid_and_closed(root: &TempDir) {
    if !has("systemd-analyze") {
        println!("NOT TESTED: the unit of systemd needs systemd-analyze");
        return;
    }
    let unit = root.path().join("usr/lib/systemd/system/fetch-proxy.service");
    let text = fs::read_to_string(&unit).unwrap();
    let program = root.path().join("usr/bin/fetch-proxy");
    let text = text.replace("/usr/bin/fetch-proxy", program.to_str().unwrap());
    fs::write(&unit, text).unwrap();
    let analyze = || Command::new("systemd-analyze");
    said(analyze().args(["verify", "--man=no"]).arg(&unit));
    said(analyze().args(["security", "--offline=yes", "--threshold", MOST_EXPOSED]).arg(&unit));
}

fn red_hat_package_installs(release: &Release) {
    if !has("rpm") {
        println!("NOT TESTED: the package for Red Hat needs rpm (Debian: rpm)");
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let package = format!("fetch-proxy-{VERSION}-1.{}.rpm", architectures().1);
    let rpm = || {
        let mut rpm = release.command("rpm");
        rpm.arg("--root").arg(root.path()).args(["--dbpath", "/var/lib/rpm"]);
        rpm
    };
    said(rpm().args(["--install", "--nodeps", "--ignorearch", &package]));
    let version = said(Command::new(root.path().join("usr/bin/fetch-proxy")).arg("--version"));
    assert_eq!(version, format!("fetch-proxy {VERSION}\n"));
    let settings = said(rpm().args(["--query", "--configfiles", "fetch-proxy"]));
    assert_eq!(settings, "/etc/fetch-proxy/fetch-proxy.env\n");
}

fn bill_of_materials_has_each_crate(release: &Release) {
    let file = release.folder.join(format!("fetch-proxy-{VERSION}-{}.cdx.json", target()));
    let bill: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let listed = bill["components"].as_array().unwrap().iter();
    let listed: BTreeSet<_> =
        listed.map(|part| format!("{} v{}", text(&part["name"]), text(&part["version"]))).collect();
    let mut tree = Command::new("cargo");
    tree.args(["tree", "--locked", "--edges", "normal", "--prefix", "none", "--format", "{p}"]);
    let tree = said(tree.args(["--target", &target()]).current_dir(ROOT));
    let words = |line: &str| line.split(' ').take(2).collect::<Vec<_>>().join(" ");
    let crates: BTreeSet<_> = tree.lines().map(words).collect();
    assert!(crates.len() > 100, "{tree}");
    let ours = format!("fetch-proxy v{VERSION}");
    let missing: Vec<_> =
        crates.difference(&listed).filter(|name| **name != ours && !name.is_empty()).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
