//! The image. Its build stage is run here, instruction by instruction, because a base image may be
//! out of reach. Then buildah makes the last stage. The result is run in a root of its own, as a
//! kubelet would: with another user, a name server, and nothing else.

use std::{
    collections::BTreeMap,
    fs,
    net::UdpSocket,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;
use testkit::{
    BOUND,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
};

use crate::{said, tool};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const DOCKERFILE: &str = include_str!("../../deploy/Dockerfile");
/// The largest size of an image, in bytes.
const LARGEST: u64 = 20_000_000;
/// As a Service of the namespace `default` is known to its pods, and what they call it.
const NAME: (&str, &str) = ("nats.default.svc.cluster.local", "nats");
/// Loopback, and nobody's but ours. The other one answers nothing.
const NAME_SERVER: &str = "127.0.0.77";
const SILENT_NAME_SERVER: &str = "127.0.0.78";

#[test]
fn hadolint_finds_nothing() {
    let output =
        tool("FETCH_PROXY_TEST_HADOLINT").arg("deploy/Dockerfile").current_dir(ROOT).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Nothing of ours that changes often stands before them, so a builder keeps their layer.
#[test]
fn libraries_are_a_layer_of_their_own() {
    let instructions = instructions();
    let libraries = ("RUN".to_owned(), "scripts/static libraries".to_owned());
    let place = instructions.iter().position(|instruction| *instruction == libraries).unwrap();
    let copied = instructions[..place].iter().filter(|(instruction, _)| instruction == "COPY");
    let copied: Vec<&str> = copied.map(|(_, rest)| &**rest).collect();
    let manifest = "tests/testkit/Cargo.toml";
    let expected = [
        "Cargo.toml Cargo.lock ./",
        &format!("{manifest} {manifest}"),
        "scripts/static scripts/static",
    ];
    assert_eq!(copied, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn image_holds_the_program_alone_and_it_serves() {
    let storage = Storage::new();
    storage.build("fetch-proxy:test", built());
    let config = storage.config("fetch-proxy:test");
    assert_eq!(config["User"], "65532:65532");
    assert_eq!(config["Entrypoint"], serde_json::json!(["/fetch-proxy"]));
    assert_eq!(config["Cmd"], serde_json::json!(["serve"]));
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(labels(&config), expected_labels());
    let environment = environment(&config);
    assert_eq!(environment["FETCH_PROXY_LISTEN"], "[::]:50051");
    assert_eq!(environment["FETCH_PROXY_OPS_LISTEN"], "[::]:50052");

    let root = storage.mounted("fetch-proxy:test");
    let mut files = files(&root, Path::new(""));
    files.sort();
    assert_eq!(files, ["etc/ssl/certs/ca-certificates.crt", "fetch-proxy"]);
    let size: u64 = files.iter().map(|file| fs::metadata(root.join(file)).unwrap().len()).sum();
    println!(
        "the image: {:.1} MB, {:.1} MB to pull",
        size as f64 / 1e6,
        storage.pulled("fetch-proxy:test") as f64 / 1e6
    );
    assert!(size < LARGEST, "{size} bytes");

    let pod = Pod::new(root, environment);
    assert_eq!(pod.said(&["--version"]), format!("fetch-proxy {version}\n"));
    serves(pod).await;
}

/// Finds NATS by its short name, is probed, used by hand, and told to go.
async fn serves(mut pod: Pod) {
    let server = NatsServer::start();
    let fixture = Fixture::on(&server, config()).await;
    fixture.publish("n", "work").await;
    let port = server.url().rsplit(':').next().unwrap().to_owned();
    let addresses = pod.serve(&format!("nats://{}:{port}", NAME.1));
    let began = Instant::now();
    while !pod.run(&["probe", "--addr", &addresses["ops"]]).status.success() {
        assert!(began.elapsed() < BOUND, "it never serves");
        thread::sleep(Duration::from_millis(50));
    }
    let grpc = &addresses["grpc"];
    let fetched =
        pod.said(&["fetch", &fixture.stream, &fixture.consumer, "--addr", grpc, "--json"]);
    let fetched: Value = serde_json::from_str(&fetched).unwrap();
    let message = &fetched["messages"][0];
    assert_eq!(message["text"], "work", "{fetched}");
    pod.said(&["ack", message["token"].as_str().unwrap(), "--addr", grpc]);
    assert_eq!(fixture.info().await.ack_floor.stream_sequence, 1);
    pod.ends_well();
    goes_while_it_waits_for_a_name(pod);
}

/// A lookup of the address of NATS may take minutes, but a pod must end at once on SIGTERM.
fn goes_while_it_waits_for_a_name(mut pod: Pod) {
    let silent = UdpSocket::bind((SILENT_NAME_SERVER, 53)).unwrap();
    pod.resolve_by(SILENT_NAME_SERVER, "timeout:60 attempts:5");
    pod.serve(&format!("nats://{}:4222", NAME.1));
    silent.set_read_timeout(Some(BOUND)).unwrap();
    silent.recv_from(&mut [0; 512]).expect("it asks");
    pod.ends_well();
}

/// The program that the build stage has built.
pub fn program() -> PathBuf {
    built().join("build/image/fetch-proxy")
}

/// The results of the build stage, in the same folder. The stage takes minutes, so it runs once for all tests.
fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let results = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stage/build");
        let _ = fs::remove_dir_all(&results);
        fs::create_dir_all(&results).unwrap();
        let stage = build_stage();
        let image = stage.path().join("build/image");
        done(Command::new("cp").args(["-r", "--preserve=mode"]).arg(image).arg(&results));
        results.parent().unwrap().to_owned()
    })
}

/// The build stage, run outside of the project, whose settings a builder does not have.
fn build_stage() -> TempDir {
    let base = tempfile::tempdir().unwrap();
    let mut folder = base.path().to_owned();
    for (instruction, rest) in instructions() {
        match &*instruction {
            "WORKDIR" => {
                folder = base.path().join(rest.trim_start_matches('/'));
                fs::create_dir_all(&folder).unwrap();
            }
            "COPY" => {
                let mut paths: Vec<&str> = rest.split_whitespace().collect();
                let to = folder.join(paths.pop().unwrap());
                fs::create_dir_all(to.parent().unwrap()).unwrap();
                let mut copy = Command::new("cp");
                done(
                    copy.args(["-r", "--preserve=mode,timestamps"])
                        .args(paths)
                        .arg(to)
                        .current_dir(ROOT),
                );
            }
            // Kept, so that libraries are built once. The program itself is built again.
            "RUN" => done(
                Command::new("sh")
                    .args(["-c", &rest])
                    .current_dir(&folder)
                    .env("CARGO_TARGET_DIR", Path::new(ROOT).join("target/image")),
            ),
            other => panic!("the test does not know {other} in a build stage"),
        }
    }
    base
}

/// The instructions of the first stage after its FROM, each on one line.
fn instructions() -> Vec<(String, String)> {
    let text = DOCKERFILE.replace("\\\n", " ");
    let lines = text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#'));
    let first_stage = lines.skip_while(|line| !line.starts_with("FROM ")).skip(1);
    first_stage
        .take_while(|line| !line.starts_with("FROM "))
        .map(|line| line.split_once(' ').unwrap())
        .map(|(instruction, rest)| (instruction.to_owned(), rest.to_owned()))
        .collect()
}

/// buildah, with images and containers of the test's own.
struct Storage {
    folder: TempDir,
}

impl Storage {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        let storage = format!(
            "[storage]\ndriver = \"vfs\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n",
            at("images"),
            at("run")
        );
        fs::write(folder.path().join("storage.conf"), storage).unwrap();
        Self { folder }
    }

    fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("CONTAINERS_STORAGE_CONF", self.folder.path().join("storage.conf"));
        command.current_dir(ROOT);
        command
    }

    /// With the very script that people use.
    fn build(&self, name: &str, base: &Path) {
        done(self.command("scripts/image").arg(name).env("BUILDER", "buildah").env("BASE", base));
    }

    fn config(&self, name: &str) -> Value {
        let inspected = said(self.command("buildah").args(["inspect", "--type", "image", name]));
        let inspected: Value = serde_json::from_str(&inspected).unwrap();
        inspected["OCIv1"]["config"].clone()
    }

    /// The root of a container of it.
    fn mounted(&self, name: &str) -> PathBuf {
        let container = said(self.command("buildah").args(["from", "--pull-never", name]));
        said(self.command("buildah").args(["mount", container.trim()])).trim().into()
    }

    /// How many bytes whoever pulls it has to fetch.
    fn pulled(&self, name: &str) -> u64 {
        let archive = self.folder.path().join("image.tar");
        let to = format!("oci-archive:{}", archive.display());
        said(self.command("buildah").args(["push", "--quiet", name, &to]));
        fs::metadata(archive).unwrap().len()
    }
}

/// A root in which the program runs, and the program.
struct Pod {
    root: PathBuf,
    environment: BTreeMap<String, String>,
    serving: Option<Child>,
}

impl Pod {
    fn new(root: PathBuf, environment: BTreeMap<String, String>) -> Self {
        // A volume, so that the test learns the ports.
        fs::create_dir(root.join("ports")).unwrap();
        fs::set_permissions(root.join("ports"), fs::Permissions::from_mode(0o777)).unwrap();
        let name_server = UdpSocket::bind((NAME_SERVER, 53)).unwrap();
        thread::spawn(move || answer_names(&name_server));
        let pod = Self { root, environment, serving: None };
        pod.resolve_by(NAME_SERVER, "ndots:5");
        pod
    }

    fn resolve_by(&self, name_server: &str, options: &str) {
        let search = "default.svc.cluster.local svc.cluster.local cluster.local";
        let resolver = format!("nameserver {name_server}\nsearch {search}\noptions {options}\n");
        fs::write(self.root.join("etc/resolv.conf"), resolver).unwrap();
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("chroot");
        command.arg("--userspec=65532:65532").arg(&self.root).arg("/fetch-proxy");
        command.args(arguments).env_clear().envs(&self.environment);
        command
    }

    fn run(&self, arguments: &[&str]) -> std::process::Output {
        self.command(arguments).output().unwrap()
    }

    fn said(&self, arguments: &[&str]) -> String {
        said(&mut self.command(arguments))
    }

    /// Its addresses.
    fn serve(&mut self, nats_url: &str) -> BTreeMap<String, String> {
        let child = self
            .command(&["serve"])
            .env("NATS_URL", nats_url)
            .env("FETCH_PROXY_LISTEN", "127.0.0.1:0")
            .env("FETCH_PROXY_OPS_LISTEN", "127.0.0.1:0")
            .env("FETCH_PROXY_DRAIN_DELAY", "0s")
            .env("FETCH_PROXY_PORTS_FILE", "/ports/file")
            .stderr(Stdio::inherit())
            .spawn();
        self.serving = Some(child.unwrap());
        let (file, began) = (self.root.join("ports/file"), Instant::now());
        loop {
            if let Ok(ports) = fs::read(&file) {
                return serde_json::from_slice(&ports).unwrap();
            }
            assert!(began.elapsed() < BOUND, "it does not listen");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Told to go, it goes: `chroot` has become the program, whose signals are its own.
    fn ends_well(&mut self) {
        let serving = self.serving.as_mut().unwrap();
        done(Command::new("kill").args(["-s", "TERM", &serving.id().to_string()]));
        let began = Instant::now();
        let status = loop {
            if let Some(status) = serving.try_wait().unwrap() {
                break status;
            }
            assert!(began.elapsed() < BOUND, "it does not go");
            thread::sleep(Duration::from_millis(20));
        };
        assert!(status.success());
        fs::remove_file(self.root.join("ports/file")).unwrap();
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        if let Some(mut serving) = self.serving.take() {
            let _ = serving.kill();
            let _ = serving.wait();
        }
    }
}

/// Knows one name, and the address of it.
fn answer_names(socket: &UdpSocket) {
    let mut question = [0; 512];
    while let Ok((length, from)) = socket.recv_from(&mut question) {
        let question = &question[..length];
        let end = 12 + question[12..].iter().position(|byte| *byte == 0).unwrap() + 5;
        let name: String = question[12..end - 5]
            .iter()
            .map(|byte| if byte.is_ascii_graphic() { *byte as char } else { '.' })
            .collect();
        let (known, address) = (name.ends_with(NAME.0), question[end - 4..end - 2] == [0, 1]);
        let no_such_name = if known { 0 } else { 3 };
        let answers = u8::from(known && address);
        let mut answer = question[..2].to_vec();
        answer.extend([0x81, 0x80 | no_such_name, 0, 1, 0, answers, 0, 0, 0, 0]);
        answer.extend(&question[12..end]);
        if answers == 1 {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        let _ = socket.send_to(&answer, from);
    }
}

/// The labels of the Open Containers Initiative. The builder adds one label of its own.
fn labels(config: &Value) -> BTreeMap<String, String> {
    let all = config["Labels"].as_object().unwrap().iter();
    let ours = all.filter_map(|(name, value)| {
        let name = name.strip_prefix("org.opencontainers.image.")?;
        Some((name.to_owned(), value.as_str().unwrap().to_owned()))
    });
    ours.collect()
}

fn expected_labels() -> BTreeMap<String, String> {
    let chart = include_str!("../../deploy/helm/fetch-proxy/Chart.yaml");
    let chart = &crate::helm::parsed(chart)[0];
    let revision = said(Command::new("git").args(["rev-parse", "HEAD"]).current_dir(ROOT));
    let labels = [
        ("title", env!("CARGO_PKG_NAME")),
        ("description", chart["description"].as_str().unwrap()),
        ("licenses", env!("CARGO_PKG_LICENSE")),
        ("version", env!("CARGO_PKG_VERSION")),
        ("revision", revision.trim()),
    ];
    labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

fn environment(config: &Value) -> BTreeMap<String, String> {
    let all = config["Env"].as_array().unwrap().iter();
    let pairs = all.map(|pair| pair.as_str().unwrap().split_once('=').unwrap());
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

/// All files below, by their paths.
fn files(root: &Path, below: &Path) -> Vec<String> {
    let entries = fs::read_dir(root.join(below)).unwrap().map(Result::unwrap);
    entries
        .flat_map(|entry| {
            let path = below.join(entry.file_name());
            match entry.file_type().unwrap().is_dir() {
                true => files(root, &path),
                false => vec![path.display().to_string()],
            }
        })
        .collect()
}

fn done(command: &mut Command) {
    let status = command.stdin(Stdio::null()).status().unwrap();
    assert!(status.success(), "{command:?}: {status}");
}
