//! The house rules that a machine can hold: which room may name what, how large a room may be, and
//! that the page of errors is what the code says.

mod log;
mod prose;

use std::{
    fs,
    path::{Path, PathBuf},
};

use fetch_proxy::grpc::{DOMAIN, Reason};

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

#[test]
fn the_page_of_errors_is_what_the_code_says() {
    let mut page = format!(
        "# Errors\n\n\
         Every status of the service carries a `google.rpc.ErrorInfo` with domain `{DOMAIN}` and one of\n\
         these reasons, and the same reason in the trailer `{}`. In a `Settle`, each\n\
         settlement that failed has the same reason in its `SettleError`.\n\n\
         A reason is a promise about what has and has not happened. A bare `UNAVAILABLE`, without a\n\
         reason, comes from the transport and promises nothing.\n\n\
         This page is rendered from `src/grpc/status.rs` by a test; `UPDATE_DOCS=1 cargo test --test\n\
         house` writes it.\n\n\
         | reason | code | the promise | repeat after |\n| --- | --- | --- | --- |\n",
        fetch_proxy::grpc::REASON_TRAILER
    );
    for reason in Reason::ALL {
        let retry = reason.retry_after().map_or("-".to_owned(), |delay| format!("{delay:?}"));
        let code = format!("{:?}", reason.code());
        page += &format!("| `{}` | {code} | {} | {retry} |\n", reason.name(), reason.promise());
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/errors.md");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&file, &page).unwrap();
    }
    let written = fs::read_to_string(&file).unwrap_or_default();
    assert!(written == page, "docs/errors.md is not what the code says: UPDATE_DOCS=1 writes it");
}

#[test]
fn every_reason_is_explained_to_those_who_write_workers() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/clients.md");
    let page = fs::read_to_string(page).unwrap();
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    let (_, rest) = page.split_once("| reason | in a Fetch |").unwrap();
    let (table, _) = rest.split_once("\n\n").unwrap();
    let rows: Vec<_> = rows.filter(|(name, _)| table.contains(&format!("`{name}` |"))).collect();
    assert_eq!(rows.len(), Reason::ALL.len(), "a row for each, and for nothing else");
    for reason in Reason::ALL {
        let (_, advice) = rows.iter().find(|(name, _)| *name == reason.name()).unwrap();
        let repeats = advice.contains("repeat");
        let should = reason.retry_after().is_some() || *reason == Reason::SettleUnconfirmed;
        assert_eq!(repeats, should, "{}: {advice}", reason.name());
    }
}

#[test]
fn the_retry_policy_covers_what_is_worth_repeating() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/clients.md");
    let page = fs::read_to_string(page).unwrap();
    let json = page.split("```json").nth(1).unwrap().split("```").next().unwrap();
    let config: serde_json::Value = serde_json::from_str(json).unwrap();
    let codes = |method: &str| -> String {
        let all = config["methodConfig"].as_array().unwrap();
        let names = |one: &&serde_json::Value| one["name"].to_string().contains(method);
        let codes = &all.iter().find(names).unwrap()["retryPolicy"]["retryableStatusCodes"];
        codes.to_string().replace('_', "").to_lowercase()
    };
    let (fetch, settle) = (codes("\"Fetch\""), codes("\"Settle\""));
    for reason in Reason::ALL {
        let row = page.lines().find(|line| line.starts_with(&format!("| `{}` |", reason.name())));
        let columns: Vec<_> = row.unwrap().split('|').collect();
        let code = format!("\"{:?}\"", reason.code()).to_lowercase();
        for (advice, codes) in [(columns[2], &fetch), (columns[3], &settle)] {
            let covered = !advice.contains("repeat") || codes.contains(&code);
            assert!(covered, "{}:{advice}is not done by a library for {code}", reason.name());
        }
    }
}

#[test]
fn every_reason_is_explained_in_the_contract() {
    let contract = Path::new(env!("CARGO_MANIFEST_DIR")).join("proto/fetchproxy/v1/fetch.proto");
    let contract = fs::read_to_string(contract).unwrap();
    for reason in Reason::ALL {
        assert!(contract.contains(reason.name()), "{} is not in the contract", reason.name());
    }
}
