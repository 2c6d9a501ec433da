//! The house rules that a machine can hold: which room may name what, how large a room may be, that
//! pages are what the code says, and that prose is plain English.

mod links;
mod log;
mod pages;
mod prose;

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The names that a room must not use. `crate::` names are rooms, the others are libraries and
/// clocks.
const FORBIDDEN: &[(&str, &[&str])] = &[
    ("lease", PURE),
    ("pump", PURE),
    ("token", PURE),
    ("readiness", &["tokio", "tonic", "async_nats", "crate::pb", "crate::grpc", "crate::lessor"]),
    ("broker", &["tokio", "tonic", "async_nats", "crate::"]),
    (
        "lessor",
        &[
            "tonic",
            "async_nats",
            "prost",
            "crate::pb",
            "crate::grpc",
            "crate::nats",
            "crate::token",
            "crate::cluster",
            "crate::bus",
            "crate::app",
        ],
    ),
    (
        "nats",
        &[
            "tonic",
            "prost",
            "crate::pb",
            "crate::grpc",
            "crate::lessor",
            "crate::lease",
            "crate::pump",
            "crate::token",
            "crate::app",
        ],
    ),
    ("grpc", &["async_nats", "crate::nats", "crate::pump", "crate::app", "crate::config"]),
    ("bus", &["tokio", "tonic", "async_nats", "crate::"]),
    (
        "cluster",
        &[
            "tonic",
            "async_nats",
            "crate::nats",
            "crate::grpc",
            "crate::app",
            "crate::config",
            "crate::pump",
        ],
    ),
    ("keys", &["tonic", "async_nats", "prost", "crate::lessor", "crate::cluster", "crate::grpc"]),
    ("dev", &["tonic", "async_nats", "crate::lessor", "crate::lease", "crate::pump"]),
    ("config", &["tonic", "async_nats", "crate::app", "crate::pump"]),
    ("app", &["tonic", "async_nats", "crate::pb", "crate::pump", "crate::lease"]),
];

const PURE: &[&str] = &[
    "tokio",
    "tonic",
    "async_nats",
    "prost",
    "tracing",
    "Mutex",
    "async fn",
    "Instant::now",
    "SystemTime",
    "crate::clock",
    "crate::lessor",
    "crate::grpc",
    "crate::nats",
    "crate::broker",
    "crate::pb",
];

/// Lines of code that a room may have, tests at its end left out.
const MOST_LINES: usize = 430;
fn rooms() -> Vec<PathBuf> {
    fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, into);
            } else if path.extension().is_some_and(|end| end == "rs") {
                into.push(path);
            }
        }
    }
    let mut rooms = Vec::new();
    walk(&source(), &mut rooms);
    assert!(rooms.len() > 20, "the walk is broken");
    rooms
}

fn source() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The room's name, like `nats` for `src/nats/inbox.rs`.
fn room(file: &Path) -> String {
    let inside = file.strip_prefix(source()).unwrap();
    let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
    first.trim_end_matches(".rs").to_owned()
}

/// Code alone: no comments, and not the tests at the end.
fn code(file: &Path) -> Vec<(usize, String)> {
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]").next().unwrap();
    let lines = (1..).zip(code.lines());
    lines.map(|(number, line)| (number, line.split("//").next().unwrap().to_owned())).collect()
}

#[test]
fn every_room_names_only_what_it_may() {
    let mut wrong = Vec::new();
    for file in rooms() {
        let room = room(&file);
        let Some((_, forbidden)) = FORBIDDEN.iter().find(|(name, _)| *name == room) else {
            continue;
        };
        for (number, line) in code(&file) {
            for name in forbidden.iter().filter(|name| line.contains(**name)) {
                wrong.push(format!("{}:{number} names {name}", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn every_forbidden_room_is_there() {
    let rooms: Vec<String> = rooms().iter().map(|file| room(file)).collect();
    for (name, _) in FORBIDDEN {
        assert!(rooms.iter().any(|room| room == name), "{name} is gone: its rule guards nothing");
    }
}

#[test]
fn every_room_says_what_it_owns() {
    for file in rooms() {
        let text = fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("//! "), "{} has no head", file.display());
    }
}

#[test]
fn rooms_stay_small() {
    for file in rooms() {
        let inside = file.strip_prefix(source()).unwrap().to_str().unwrap();
        let lines = code(&file).len();
        assert!(lines <= MOST_LINES, "{inside} has {lines} lines: move a wall");
    }
}
