//! `docs/tutorial.md`, by a newcomer with one terminal.

use std::process;

use testkit::nats_server;

use super::page::{Terminal, walk};

/// The folder of the built program, as the page has it.
const BUILT: &str = "$PWD/target/debug";
/// How a newcomer gets a nats-server. The tests have theirs already.
const SERVER: &str = "$(scripts/tools nats-server)";

/// An address of the loopback interface that only this process uses, so that the ports of the page
/// are free.
fn own_address() -> String {
    let [.., high, low] = process::id().to_be_bytes();
    format!("127.1.{high}.{}", low.clamp(1, 254))
}

#[test]
fn every_command_of_the_tutorial_does_what_the_page_says() {
    let own = own_address();
    let (folder, _) = env!("CARGO_BIN_EXE_fetch-proxy").rsplit_once('/').unwrap();
    let server = nats_server::binary();
    let ports = [50051, 50052, 50061, 50062].map(|port| format!(":{port}"));
    let addresses = ports.each_ref().map(|port| (format!("127.0.0.1{port}"), own.clone() + port));
    let mut names: Vec<_> = addresses.iter().map(|(page, here)| (&**page, &**here)).collect();
    names.extend([(BUILT, folder), (SERVER, server.to_str().unwrap())]);
    let mut terminal = Terminal::open();
    // The defaults of the program name an address that other processes may use.
    for (name, port) in ["FETCH_PROXY_LISTEN", "FETCH_PROXY_OPS_LISTEN"].iter().zip(&ports) {
        terminal.type_in(&format!("export {name}={own}{port}"));
    }
    terminal.type_in("export FETCH_PROXY_DEV_NATS_PORT=0");
    walk("docs/tutorial.md", &mut terminal, &names);
}
