//! The pages for operators: their command lines are typed, and their flags and defaults are those
//! of the program.

use std::{
    collections::BTreeMap,
    fs,
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::Command,
};

use async_nats::jetstream::stream;
use nkeys::KeyPair;
use serde_json::Value;
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    nats_server::{NatsServer, binary},
    proxy::{Proxy, ack, fetch},
};

use super::page::{self, Terminal};

const PROGRAM: &str = env!("CARGO_BIN_EXE_fetch-proxy");
/// In front of every line that a pod is to run.
const IN_A_POD: &str = "kubectl exec deploy/fetch-proxy -- /fetch-proxy";

fn text(name: &str) -> String {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
    fs::read_to_string(page).unwrap()
}

/// The stream and the consumer of the page.
async fn orders(server: &NatsServer) -> Fixture {
    let Fixture { jetstream, consumer, .. } = Fixture::on(server, config()).await;
    let orders = stream::Config {
        name: "ORDERS".to_owned(),
        subjects: vec!["ORDERS.>".to_owned()],
        ..stream::Config::default()
    };
    jetstream.create_stream(orders).await.unwrap();
    jetstream.create_consumer_on_stream(config(), "ORDERS").await.unwrap();
    Fixture { jetstream, stream: "ORDERS".to_owned(), consumer }
}

/// The commands of an operator, with the tokens that they have seen.
fn translate(command: &str, proxy: &Proxy, tokens: &[String]) -> String {
    assert!(command.starts_with(IN_A_POD) || command.starts_with("grpcurl "), "{command}");
    let Proxy { grpc, ops, .. } = proxy;
    let here = format!("FETCH_PROXY_LISTEN={grpc} FETCH_PROXY_OPS_LISTEN={ops} '{PROGRAM}'");
    let command = command.replace(IN_A_POD, &here).replace("127.0.0.1:50051", grpc);
    page::paste(&command, tokens)
}

#[tokio::test]
async fn every_line_for_an_operator_does_what_the_page_says() {
    let typed = page::read(&text("how-to/operate.md"));
    assert!(typed.len() >= 8, "only {} commands are found: the reading is broken", typed.len());
    let server = NatsServer::start();
    let fixture = orders(&server).await;
    for number in 1..=5 {
        fixture.publish("new", format!(r#"{{"order":{number}}}"#)).await;
    }
    let proxy = Proxy::start(&server, &[]);
    proxy.ready().await;
    let (mut terminal, mut held) = (Terminal::open(), Vec::new());
    for typed in typed {
        assert!(!typed.shown.is_empty(), "nothing is shown for: {}", typed.command);
        let said = terminal.type_in(&translate(&typed.command, &proxy, &held));
        typed.compare(&said);
        held.extend(page::tokens(&said));
    }
}

/// The text of `--help` for each flag of all commands.
fn flags() -> BTreeMap<String, String> {
    let mut flags = BTreeMap::new();
    let commands =
        ["serve", "dev", "probe", "consumer", "fetch", "ack", "nak", "term", "extend", "keygen"];
    let commands = commands.into_iter().chain(["work"]);
    let operators = ["replicas", "consumers", "leases", "connections", "release"];
    let inner = ["policy check", "policy diff", "dev publish"];
    for command in commands.chain(operators).chain(inner) {
        let words = command.split(' ').chain(["--help"]);
        let help = Command::new(PROGRAM).args(words).output().unwrap();
        let help = String::from_utf8(help.stdout).unwrap();
        for (_, rest) in help.match_indices("--").map(|(at, _)| help[at..].split_at(2)) {
            let name: String =
                rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect();
            let own = rest.split("\n      --").next().unwrap();
            flags.entry(format!("--{name}")).or_insert_with(|| own.to_owned());
        }
    }
    flags
}

#[test]
fn pages_name_existing_flags_only() {
    let flags = flags();
    let mut count = 0;
    for folder in ["how-to", "reference", "explanation"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(folder);
        for file in fs::read_dir(folder).unwrap() {
            let page = fs::read_to_string(file.unwrap().path()).unwrap();
            let named = page.split('`').skip(1).step_by(2).filter(|code| code.starts_with("--"));
            for code in named {
                let flag = code.split([' ', '=']).next().unwrap();
                assert!(flags.contains_key(flag), "{code} is no flag");
                count += 1;
            }
        }
    }
    assert!(count > 40, "the reading is broken");
}

#[test]
fn defaults_on_the_page_match_the_program() {
    let (flags, limits) = (flags(), text("reference/limits.md"));
    let mut count = 0;
    for row in limits.lines().filter(|line| line.starts_with("| `--")) {
        let cells: Vec<&str> = row.split(" | ").collect();
        let flag = cells[0].trim_start_matches("| ").trim_matches('`');
        let mut default = cells[1].replace(',', "");
        if let Some(mebibytes) = default.strip_suffix(" MiB") {
            default = (mebibytes.parse::<u64>().unwrap() << 20).to_string();
        }
        // The help is wrapped at the width of a terminal.
        let help = flags[flag].split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(help.contains(&format!("[default: {default}]")), "{row}\n{help}");
        count += 1;
    }
    assert!(count > 6, "the reading is broken");
}

/// A server that lets in an admin, and this nkey.
fn only(nkey: &KeyPair) -> String {
    let nkey = nkey.public_key();
    format!("authorization {{ users = [ {{user: admin, password: x}}, {{nkey: {nkey}}} ] }}")
}

#[tokio::test]
async fn rotated_nkey_is_used_without_a_restart() {
    let (old, new) = (KeyPair::new_user(), KeyPair::new_user());
    let server = NatsServer::start_with(binary(), Some(only(&old)));
    let admin = server.url().replace("//", "//admin:x@");
    let fixture = Fixture::at(&admin, config()).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), old.seed().unwrap()).unwrap();
    let proxy = Proxy::start(&server, &["--nats-nkey", file.path().to_str().unwrap()]);
    let mut client = proxy.client().await;
    fixture.publish("n", "x").await;
    let held = client.fetch(fetch(&fixture, 1, 10_000)).await.unwrap().into_inner().messages;

    fs::write(file.path(), new.seed().unwrap()).unwrap();
    server.configure(&only(&new));
    let connected = || async {
        let made = proxy.log().matches("connected to NATS").count();
        (made == 4).then_some(())
    };
    eventually("both connections to be replaced", connected).await;
    let acked = || {
        let mut client = client.clone();
        let ack = ack(&held[0].token);
        async move { client.ack(ack).await.ok() }
    };
    eventually("the lease to be settled", acked).await;
}

/// A peer's mistake is a warning of the HTTP/2 library, and no line of the page.
#[tokio::test]
async fn libraries_write_nothing_to_the_log() {
    const PING: u8 = 6;
    let frame = |kind: u8, flags: u8, payload: &[u8]| {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, 0], payload].concat()
    };
    let (settings, unasked) = (frame(4, 0, b""), frame(PING, 1, b"unasked!"));
    let sent =
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", &*settings, &unasked, &frame(PING, 0, b"answer!!")];
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    for address in [&proxy.grpc, &proxy.ops] {
        let mut peer = TcpStream::connect(address).unwrap();
        peer.set_read_timeout(Some(BOUND)).unwrap();
        peer.write_all(&sent.concat()).unwrap();
        let mut heard: Vec<u8> = Vec::new();
        while !heard.windows(8).any(|part| part == b"answer!!") {
            let mut part = [0; 1024];
            let length = peer.read(&mut part).unwrap();
            assert!(length > 0, "it hung up");
            heard.extend(&part[..length]);
        }
    }
    let page = text("reference/log-lines.md");
    for line in proxy.log().lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
        let known = page.contains(&format!("\n### `{}`\n", line["message"].as_str().unwrap()));
        assert!(known || line["level"] == "INFO", "{line}");
    }
}

#[tokio::test]
async fn log_names_the_listener_without_free_connections() {
    let proxy = Proxy::start(NatsServer::shared(), &["--max-connections", "3"]);
    for (listener, address, most) in [("grpc", &proxy.grpc, 3), ("ops", &proxy.ops, 256)] {
        let taken: Vec<_> = (0..=most).map(|_| TcpStream::connect(address).unwrap()).collect();
        let field = format!("\"listener\":\"{listener}\"");
        let said = |line: &str| line.contains("all connections are taken") && line.contains(&field);
        eventually(listener, || async { proxy.log().lines().any(said).then_some(()) }).await;
        drop(taken);
    }
}
