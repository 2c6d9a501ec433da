//! The messages for a person who lacks something. `scripts/tools` and `make demo` name each missing
//! tool with the package that brings it, and end with code 2.
//!
//! Each test makes a folder with the few commands of every system and stand-ins for the tools in
//! question, and makes it the whole PATH. Nothing is fetched, and nothing of the machine that runs
//! the tests matters.

use std::{
    env, fs,
    os::unix::fs::{PermissionsExt as _, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The programs that the scripts expect everywhere.
const BASICS: &[&str] = &[
    "bash", "cat", "chmod", "dirname", "env", "head", "make", "mkdir", "mktemp", "mv", "rm", "sed",
    "sh", "sort", "tail",
];

const CARGO: (&str, &str) = ("cargo", "echo 'cargo 1.999.0 (0123abcde 2030-01-01)'");
const CC: (&str, &str) = ("cc", "exit 0");
const PYTHON: (&str, &str) = ("python3", "exit 0");
const PYTHON_WITHOUT_PIP_AND_VENV: (&str, &str) = ("python3", "exit 1");
const GO: (&str, &str) = ("go", "exit 0");
const NATS_SERVER: (&str, &str) = ("nats-server", "echo 'nats-server: v2.10.16'");
const OLD_NATS_SERVER: (&str, &str) = ("nats-server", "echo 'nats-server: v2.10.15'");

/// A machine with the basics and the stand-ins that it is given.
struct Machine {
    path: PathBuf,
    tools: PathBuf,
}

impl Machine {
    /// `name` is that of the test: each has folders of its own.
    fn with(name: &str, stand_ins: &[(&str, &str)]) -> Self {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("setup").join(name);
        let _ = fs::remove_dir_all(&folder);
        let machine = Self { path: folder.join("bin"), tools: folder.join("tools") };
        fs::create_dir_all(&machine.path).unwrap();
        for basic in BASICS {
            symlink(found(basic), machine.path.join(basic)).unwrap();
        }
        for (name, script) in stand_ins {
            let file = machine.path.join(name);
            fs::write(&file, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        }
        machine
    }

    fn tools(&self, arguments: &[&str]) -> Answer {
        self.run(Path::new(ROOT).join("scripts/tools").to_str().unwrap(), arguments)
    }

    fn run(&self, program: &str, arguments: &[&str]) -> Answer {
        let output = Command::new(program)
            .args(arguments)
            .current_dir(ROOT)
            .env_clear()
            .env("PATH", &self.path)
            .env("TOOLS_DIR", &self.tools)
            .output()
            .unwrap();
        Answer::from(output)
    }
}

#[derive(Debug)]
struct Answer {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Answer {
    fn is_fine(&self) {
        assert_eq!((self.code, &*self.err), (Some(0), ""), "{self:?}");
    }

    /// Ended with code 2, and named these packages and none of the others.
    fn misses(&self, packages: &[&str]) {
        assert_eq!(self.code, Some(2), "{self:?}");
        for package in ["rustup", "build-essential", "python3-venv", "golang-go"] {
            let named = self.err.contains(&format!("Debian: {package})"));
            assert_eq!(named, packages.contains(&package), "{package}: {self:?}");
        }
    }
}

/// The path of a program on this machine.
fn found(program: &str) -> PathBuf {
    let folders = env::var_os("PATH").unwrap();
    let mut files = env::split_paths(&folders).map(|folder| folder.join(program));
    files.find(|file| file.is_file()).unwrap_or_else(|| panic!("{program} is not on the PATH"))
}

#[test]
fn complete_machine_passes_the_check() {
    let machine = Machine::with("everything", &[CARGO, CC, PYTHON, GO, NATS_SERVER]);
    machine.tools(&["check"]).is_fine();
}

#[test]
fn one_way_to_a_nats_server_is_enough() {
    for way in [PYTHON, GO, NATS_SERVER] {
        Machine::with(&format!("way-{}", way.0), &[CARGO, CC, way]).tools(&["check"]).is_fine();
    }
}

#[test]
fn missing_tool_is_named_with_its_package_and_code_2() {
    let ways = &["python3-venv", "golang-go"];
    Machine::with("no-cargo", &[CC, PYTHON]).tools(&["check"]).misses(&["rustup"]);
    Machine::with("no-cc", &[CARGO, PYTHON]).tools(&["check"]).misses(&["build-essential"]);
    Machine::with("no-way", &[CARGO, CC]).tools(&["check"]).misses(ways);
}

#[test]
fn demo_names_missing_tools_before_it_begins() {
    let ways = &["python3-venv", "golang-go"];
    let demo = |machine: Machine| machine.run("make", &["demo", "DEMO_EXIT=1"]);
    demo(Machine::with("demo-no-cargo", &[CC, PYTHON])).misses(&["rustup"]);
    demo(Machine::with("demo-no-cc", &[CARGO, PYTHON])).misses(&["build-essential"]);
    demo(Machine::with("demo-no-way", &[CARGO, CC])).misses(ways);
}

#[test]
fn all_missing_tools_are_named_at_once() {
    let all = &["rustup", "build-essential", "python3-venv", "golang-go"];
    Machine::with("nothing", &[]).tools(&["check"]).misses(all);
}

#[test]
fn python_without_pip_and_venv_is_not_enough() {
    let machine = Machine::with("bare-python", &[CARGO, CC, PYTHON_WITHOUT_PIP_AND_VENV]);
    machine.tools(&["check"]).misses(&["python3-venv", "golang-go"]);
}

#[test]
fn old_nats_server_is_not_enough() {
    let machine = Machine::with("old-nats-server", &[CARGO, CC, OLD_NATS_SERVER]);
    machine.tools(&["check"]).misses(&["python3-venv", "golang-go"]);
    machine.tools(&["nats-server"]).misses(&["python3-venv", "golang-go"]);
}

#[test]
fn old_rust_is_named_with_the_needed_version() {
    let old = ("cargo", "echo 'cargo 1.63.0 (fd9c4297c 2022-07-01)'");
    let said = Machine::with("old-rust", &[old, CC, PYTHON]).tools(&["check"]);
    said.misses(&["rustup"]);
    let needed = env!("CARGO_PKG_RUST_VERSION");
    assert!(said.err.contains(&format!("{needed} or newer: cargo is 1.63.0")), "{said:?}");
}

#[test]
fn nats_server_on_the_path_is_used_if_none_can_be_fetched() {
    let machine = Machine::with("only-nats-server", &[NATS_SERVER]);
    let said = machine.tools(&["nats-server"]);
    assert_eq!(said.code, Some(0), "{said:?}");
    assert_eq!(Path::new(said.out.trim_end()), machine.path.join("nats-server"), "{said:?}");
    assert_eq!(fs::read_dir(&machine.tools).unwrap().count(), 0, "nothing half done is left");
}

#[test]
fn failed_download_is_not_a_missing_tool() {
    let broken = ("go", "echo 'go: no such module' >&2; exit 1");
    let machine = Machine::with("broken-go", &[broken]);
    let said = machine.tools(&["grpcurl"]);
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(said.err.contains("go: no such module"), "{said:?}");
    assert_eq!(fs::read_dir(&machine.tools).unwrap().count(), 0, "nothing half done is left");
}

#[test]
fn worker_without_its_toolchain_ends_with_code_3() {
    let machine = Machine::with("no-toolchains", &[]);
    let workers = testkit::examples::language::all(Path::new(ROOT));
    assert!(workers.len() >= 6, "the workers are gone");
    for worker in workers {
        let build = worker.folder.join("build");
        let said = machine.run(build.to_str().unwrap(), &[]);
        assert_eq!(said.code, Some(3), "{}: {said:?}", build.display());
        assert!(said.err.contains("needs") && said.err.contains("Debian:"), "{said:?}");
    }
}
