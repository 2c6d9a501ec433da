//! The first lines of the README are a program that works.

#![cfg(unix)]

mod support;

use std::{
    env, fs,
    path::Path,
    process::{Command, Stdio},
};

use fetchproxy::testing::Settled;
use serde_json::json;
use support::{fake, in_time};

mod program {
    include!("readme/program.rs");

    pub fn run() {
        main().unwrap();
    }
}

/// The environment of the program names the proxy, so the program is a copy of this process.
#[tokio::test]
async fn program_of_the_readme_handles_messages_until_a_signal() {
    let fake = fake();
    let good = fake.publish(json!({ "to": "ann@example.com" }));
    let bad = fake.publish(json!({ "to": "" }));
    let mut program = Command::new(env::current_exe().unwrap())
        .args(["--ignored", "--exact", "program_itself"])
        .env("FETCH_PROXY_ADDR", fake.address())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    in_time(fake.settled()).await;
    let told = Command::new("kill").arg(program.id().to_string()).status().unwrap();
    assert!(told.success() && program.wait().unwrap().success());
    assert_eq!(good.settlements(), [Settled::Ack]);
    assert_eq!(bad.settlements(), [Settled::Term("a mail without an address".to_owned())]);
}

#[test]
#[ignore = "program_of_the_readme_handles_messages_until_a_signal runs it"]
fn program_itself() {
    program::run();
}

#[test]
fn readme_has_the_program() {
    let read = |file| fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    assert!(read("README.md").contains(&read("tests/readme/program.rs")));
}
