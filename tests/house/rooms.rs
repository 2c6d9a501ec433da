//! The rooms of the house: the top-level modules, what each one is for, and which rooms and libraries
//! each may name. The list is exact: an arrow that is not in it fails, and so does one that is in it
//! and not in the code. `lib.rs` and ARCHITECTURE.md show what is rendered from here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
};

use super::source::{self, File};

struct Room {
    name: &'static str,
    /// One line for `lib.rs` and ARCHITECTURE.md.
    purpose: &'static str,
    /// The rooms that it names.
    rooms: &'static [&'static str],
    /// The libraries of [`LIBRARIES`] that it names.
    libraries: &'static [&'static str],
}

/// Libraries that decide what a room is: a runtime, a wire format, a log. All others are free.
const LIBRARIES: [&str; 12] = [
    "async_nats",
    "clap",
    "hyper",
    "opentelemetry",
    "opentelemetry_otlp",
    "opentelemetry_sdk",
    "prometheus_client",
    "prost",
    "rustls",
    "tokio",
    "tonic",
    "tracing",
];

/// Names that pure code does without.
const IMPURE: [&str; 10] = [
    "Mutex",
    "RwLock",
    "Atomic",
    "async fn",
    "Instant::now",
    "SystemTime",
    "crate::clock",
    "crate::metrics",
    "tokio::",
    "tracing::",
];

/// Rooms and files that decide and do nothing else. Time is an argument.
const PURE: [&str; 25] = [
    "access",
    "admin/filter",
    "admin/merge",
    "admin/page",
    "api_error",
    "credentials/refresh",
    "lease",
    "lessor/attempts",
    "lessor/consumer/monitor",
    "lessor/consumer/quarantine",
    "limits",
    "log_throttle/counting",
    "ops/page/parts",
    "ops/page/view",
    "ops/page/words",
    "pump",
    "reason",
    "refusal_log/recent",
    "tls/certificate",
    "token",
    "work/captured",
    "work/desk",
    "work/environment",
    "work/verdict",
    "work/words",
];

/// Lines of code that a file may have, without the tests at its end.
const MAX_LINES: usize = 430;

const ROOMS: &[Room] = &[
    Room {
        name: "access",
        purpose: "who calls, and what each caller may do; pure",
        rooms: &[],
        libraries: &[],
    },
    Room {
        name: "admin",
        purpose: "the answers for operators: who holds what, at all replicas",
        rooms: &[
            "api_error",
            "broker",
            "bus",
            "clock",
            "cluster",
            "keys",
            "lease",
            "lessor",
            "limits",
            "net",
            "pb",
            "token",
        ],
        libraries: &["prost", "tokio"],
    },
    Room {
        name: "api_error",
        purpose: "what went wrong with a call, for its client; pure",
        rooms: &["access", "lease", "lessor", "reason"],
        libraries: &[],
    },
    Room {
        name: "app",
        purpose: "wires all rooms together and drains them in order",
        rooms: &[
            "access",
            "admin",
            "broker",
            "bus",
            "clock",
            "cluster",
            "config",
            "credentials",
            "fd_limit",
            "grpc",
            "keys",
            "lessor",
            "limits",
            "metrics",
            "nats",
            "ops",
            "readiness",
            "refusal_log",
            "signals",
            "tls",
            "token",
            "traces",
        ],
        libraries: &["tokio", "tracing"],
    },
    Room {
        name: "audit",
        purpose: "the log lines for auditors",
        rooms: &["access", "clock", "lock", "log_throttle"],
        libraries: &["tracing"],
    },
    Room {
        name: "broker",
        purpose: "the port to JetStream: a trait, its types, its errors",
        rooms: &[],
        libraries: &[],
    },
    Room {
        name: "bus",
        purpose: "the port to the other replicas: a trait, its types, its errors",
        rooms: &[],
        libraries: &[],
    },
    Room {
        name: "client",
        purpose: "the client behind the commands that call a running fetch-proxy",
        rooms: &["pb"],
        libraries: &["hyper", "prost", "tokio", "tonic"],
    },
    Room {
        name: "clock",
        purpose: "the only room that reads the time",
        rooms: &["simulated"],
        libraries: &["tokio"],
    },
    Room {
        name: "cluster",
        purpose: "the replicas: settling at any of them, hand-over, who is there",
        rooms: &[
            "access",
            "api_error",
            "audit",
            "broker",
            "bus",
            "clock",
            "keys",
            "lease",
            "lessor",
            "lock",
            "log_throttle",
            "metrics",
            "pb",
            "reason",
            "refusal_log",
            "simulated",
            "token",
            "traces",
        ],
        libraries: &["prost", "tokio", "tracing"],
    },
    Room {
        name: "commands",
        purpose: "what each subcommand does, and its exit code",
        rooms: &[
            "access",
            "app",
            "client",
            "config",
            "dev",
            "limits",
            "metrics",
            "pb",
            "secrets",
            "simulated",
            "telemetry",
            "token",
            "work",
        ],
        libraries: &["clap", "tokio"],
    },
    Room {
        name: "config",
        purpose: "flags and environment variables, checked",
        rooms: &[
            "access",
            "audit",
            "credentials",
            "keys",
            "lessor",
            "limits",
            "metrics",
            "nats",
            "request_log",
            "secrets",
            "tls",
            "traces",
        ],
        libraries: &["clap"],
    },
    Room {
        name: "credentials",
        purpose: "the policy, the API keys and the keys of issuers in use, read again when they change",
        rooms: &["access", "audit", "clock", "lock", "metrics", "secrets", "tls"],
        libraries: &["hyper", "tokio", "tracing"],
    },
    Room {
        name: "dev",
        purpose: "a private NATS server with samples, for a first look",
        rooms: &["clock", "grpc", "nats"],
        libraries: &["tokio"],
    },
    Room {
        name: "fd_limit",
        purpose: "raises the limit of open files to what the connections need",
        rooms: &["limits"],
        libraries: &[],
    },
    Room {
        name: "grpc",
        purpose: "the contract: requests are read, answers are written",
        rooms: &[
            "access",
            "admin",
            "api_error",
            "audit",
            "broker",
            "bus",
            "clock",
            "cluster",
            "credentials",
            "keys",
            "lessor",
            "limits",
            "lock",
            "metrics",
            "net",
            "pb",
            "reason",
            "refusal_log",
            "request_log",
            "simulated",
            "tls",
            "token",
            "traces",
        ],
        libraries: &["prost", "tokio", "tonic", "tracing"],
    },
    Room {
        name: "keys",
        purpose: "the token keys, read again when their file changes",
        rooms: &["metrics", "secrets", "token"],
        libraries: &["tokio", "tracing"],
    },
    Room { name: "lease", purpose: "the lease table; pure", rooms: &[], libraries: &[] },
    Room {
        name: "lessor",
        purpose: "leases deliveries to callers: pulls, grants, settles, sweeps",
        rooms: &[
            "broker",
            "clock",
            "lease",
            "lock",
            "log_throttle",
            "metrics",
            "pump",
            "simulated",
        ],
        libraries: &["tokio", "tracing"],
    },
    Room {
        name: "limits",
        purpose: "limits of the contract and of a listener: numbers; pure",
        rooms: &[],
        libraries: &[],
    },
    Room {
        name: "lock",
        purpose: "takes a lock in spite of an earlier panic",
        rooms: &[],
        libraries: &[],
    },
    Room {
        name: "log_throttle",
        purpose: "how often a log line that strangers cause may be written",
        rooms: &["lock"],
        libraries: &[],
    },
    Room {
        name: "main",
        purpose: "parses the command line, runs a command, returns the exit code",
        rooms: &["commands", "config"],
        libraries: &["clap"],
    },
    Room {
        name: "metrics",
        purpose: "the metrics: families, series, and their page",
        rooms: &[],
        libraries: &["prometheus_client"],
    },
    Room {
        name: "nats",
        purpose: "the broker and the bus on NATS",
        rooms: &[
            "broker",
            "bus",
            "clock",
            "lock",
            "log_throttle",
            "metrics",
            "secrets",
            "simulated",
            "tls",
        ],
        libraries: &["async_nats", "tokio", "tracing"],
    },
    Room {
        name: "net",
        purpose: "connections of clients: accepted, bounded, closed",
        rooms: &["access", "clock", "limits", "lock", "log_throttle", "metrics", "tls"],
        libraries: &["hyper", "tokio", "tracing"],
    },
    Room {
        name: "ops",
        purpose: "the listener for operators: health, metrics, and a page for people",
        rooms: &[
            "admin",
            "api_error",
            "clock",
            "grpc",
            "limits",
            "metrics",
            "net",
            "pb",
            "readiness",
            "reason",
            "refusal_log",
        ],
        libraries: &["tokio", "tonic"],
    },
    Room {
        name: "pb",
        purpose: "code generated from the contract, and its times",
        rooms: &[],
        libraries: &["prost", "tonic"],
    },
    Room {
        name: "pump",
        purpose: "decides pulls and answers for one consumer; pure",
        rooms: &[],
        libraries: &[],
    },
    Room {
        name: "readiness",
        purpose: "whether this replica may serve, and why not; pure",
        rooms: &["broker"],
        libraries: &[],
    },
    Room {
        name: "reason",
        purpose: "the one table of refusals: code, promise, wait; pure",
        rooms: &[],
        libraries: &[],
    },
    Room {
        name: "refusal_log",
        purpose: "the seldom log line of a refused call or token",
        rooms: &["api_error", "broker", "clock", "lock", "log_throttle", "metrics", "request_log"],
        libraries: &["tracing"],
    },
    Room {
        name: "request_log",
        purpose: "the log line of a call that has ended",
        rooms: &["lock", "log_throttle", "reason"],
        libraries: &["tracing"],
    },
    Room {
        name: "secrets",
        purpose: "reads files that hold secrets, within a time limit",
        rooms: &[],
        libraries: &["tokio", "tracing"],
    },
    Room {
        name: "signals",
        purpose: "the signals that begin an orderly end, and end it early",
        rooms: &["clock"],
        libraries: &["tokio"],
    },
    Room {
        name: "simulated",
        purpose: "a machine for tests: clocks, random bytes, tasks",
        rooms: &["lock"],
        libraries: &["tokio"],
    },
    Room {
        name: "telemetry",
        purpose: "the log: format, level and the thread that writes it",
        rooms: &["clock", "config", "lock", "metrics"],
        libraries: &["tracing"],
    },
    Room {
        name: "tls",
        purpose: "TLS of the client port: its files, handshakes, and who a certificate names",
        rooms: &["access", "clock", "log_throttle", "metrics", "secrets"],
        libraries: &["rustls", "tokio", "tracing"],
    },
    Room { name: "token", purpose: "tokens: sealed claims; pure", rooms: &[], libraries: &[] },
    Room {
        name: "traces",
        purpose: "spans of calls, and the thread that sends them",
        rooms: &["clock", "log_throttle"],
        libraries: &[
            "opentelemetry",
            "opentelemetry_otlp",
            "opentelemetry_sdk",
            "tokio",
            "tracing",
        ],
    },
    Room {
        name: "work",
        purpose: "a worker that runs a command for each message, or posts it to a URL",
        rooms: &["client", "clock", "limits", "pb", "signals", "simulated", "tls"],
        libraries: &["hyper", "tokio"],
    },
];

/// The rooms that `file`'s code names, and its libraries.
fn named(file: &File) -> (BTreeSet<String>, BTreeSet<&'static str>) {
    let rooms = source::uses(file).into_iter().filter_map(|path| path.into_iter().next());
    let library = |name: &&str| {
        let is_used = |(_, line): &(usize, String)| {
            line.contains(&format!("{name}::")) || line.contains(&format!("use {name}"))
        };
        file.code.iter().any(is_used)
    };
    (rooms.collect(), LIBRARIES.into_iter().filter(library).collect())
}

#[test]
fn rooms_name_exactly_what_the_list_allows() {
    let files = source::files();
    let all: BTreeSet<&str> = files.iter().map(File::room).collect();
    let mut actual: BTreeMap<&str, (BTreeSet<String>, BTreeSet<&str>)> = BTreeMap::new();
    for file in files.iter().filter(|file| file.room() != "lib") {
        let (rooms, libraries) = named(file);
        let entry = actual.entry(file.room()).or_default();
        let other = |room: &String| all.contains(room.as_str()) && room != file.room();
        entry.0.extend(rooms.into_iter().filter(other));
        entry.1.extend(libraries);
    }
    let mut wrong = String::new();
    for (name, (rooms, libraries)) in &actual {
        let listed = ROOMS.iter().find(|room| room.name == *name);
        let same = listed.is_some_and(|room| {
            rooms.iter().map(String::as_str).eq(room.rooms.iter().copied())
                && libraries.iter().eq(room.libraries)
        });
        if !same {
            let _ = writeln!(wrong, "{name} names rooms {rooms:?} and libraries {libraries:?}");
        }
    }
    for room in ROOMS.iter().filter(|room| !actual.contains_key(room.name)) {
        let _ = writeln!(wrong, "{} is in the list and not in src", room.name);
    }
    assert!(wrong.is_empty(), "the code and the list of rooms differ:\n{wrong}");
}

#[test]
fn rooms_do_not_form_a_circle() {
    let arrows = ROOMS.iter().map(|room| (room.name, room.rooms.iter().copied().collect()));
    assert_eq!(source::circles(&arrows.collect()), Vec::<BTreeSet<&str>>::new());
}

#[test]
fn files_do_not_form_a_circle() {
    let files = source::files();
    let circles = source::circles(&source::arrows(&files));
    assert!(circles.is_empty(), "these files import each other: {circles:#?}");
}

fn is_pure(file: &File) -> bool {
    let rest = |pure: &&str| file.path.strip_prefix(*pure);
    PURE.iter().filter_map(rest).any(|rest| rest == ".rs" || rest.starts_with('/'))
}

#[test]
fn pure_rooms_have_no_clock_no_lock_and_no_runtime() {
    let mut wrong = String::new();
    for file in source::files().iter().filter(|file| is_pure(file)) {
        for (number, line) in &file.code {
            for name in IMPURE.iter().filter(|name| line.contains(**name)) {
                let _ = writeln!(wrong, "{}:{number} names {name}", file.path);
            }
        }
    }
    assert!(wrong.is_empty(), "\n{wrong}");
}

#[test]
fn every_file_says_what_it_owns() {
    for file in source::files() {
        assert!(file.text.starts_with("//! "), "{} has no head", file.path);
    }
}

#[test]
fn files_stay_small() {
    for file in source::files() {
        let lines = file.code.len();
        assert!(lines <= MAX_LINES, "{} has {lines} lines: move a wall", file.path);
    }
}

/// Names that are defined at the left margin by one of these words, with the files.
/// Private ones count only if `private`.
fn defined(words: &[&str], private: bool) -> BTreeMap<String, Vec<String>> {
    let mut defined: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in source::files() {
        for (_, line) in &file.code {
            let Some((before, after)) = words.iter().find_map(|word| line.split_once(word)) else {
                continue;
            };
            let at_margin = before.starts_with("pub") || private && before.is_empty();
            let at_margin = at_margin && !before.contains("fn ");
            if at_margin && after.starts_with(char::is_alphabetic) && !after.starts_with("fn ") {
                let name = after.split(|c: char| !(c.is_alphanumeric() || c == '_')).next();
                defined.entry(name.unwrap().to_owned()).or_default().push(file.path.clone());
            }
        }
    }
    defined
}

#[test]
fn no_two_types_and_no_two_constants_share_a_name() {
    let types = defined(&["struct ", "enum ", "trait ", "union "], false);
    let constants = defined(&["const ", "static "], true);
    assert!(types.len() > 100 && constants.len() > 100, "the search is broken");
    let twice = types.iter().chain(&constants).filter(|(_, files)| files.len() > 1);
    let twice: Vec<_> = twice.collect();
    assert!(twice.is_empty(), "defined more than once: {twice:#?}");
}

/// Floors from the top: a room stands above all rooms that it names.
fn by_floor() -> Vec<&'static Room> {
    fn floor(room: &Room) -> usize {
        let below = room.rooms.iter().filter_map(|name| ROOMS.iter().find(|it| it.name == *name));
        below.map(floor).max().map_or(0, |floor| floor + 1)
    }
    let mut rooms: Vec<&Room> = ROOMS.iter().collect();
    rooms.sort_by_key(|room| (std::cmp::Reverse(floor(room)), room.name));
    rooms
}

/// Puts `text` between the two marks in a file, or checks that it is there.
fn hold(file: &str, begin: &str, end: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
    let page = fs::read_to_string(&path).unwrap();
    let (before, rest) = page.split_once(begin).unwrap_or_else(|| panic!("{file} has no {begin}"));
    let (_, after) = rest.split_once(end).unwrap_or_else(|| panic!("{file} has no {end}"));
    let wanted = format!("{before}{begin}{text}{end}{after}");
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, &wanted).unwrap();
    } else {
        assert!(page == wanted, "{file} does not show the rooms: UPDATE_DOCS=1 writes them");
    }
}

#[test]
fn lib_and_architecture_show_the_rooms() {
    let (mut lib, mut table) = (String::new(), String::new());
    for room in by_floor() {
        let _ = writeln!(lib, "//! {:13} {}", room.name, room.purpose);
        let names: Vec<String> = room.rooms.iter().map(|name| format!("`{name}`")).collect();
        let names = if names.is_empty() { "-".to_owned() } else { names.join(", ") };
        let _ = writeln!(table, "| `{}` | {} | {names} |", room.name, room.purpose);
    }
    hold("src/lib.rs", "//! ```text\n", "//! ```\n", &lib);
    let head = "\n| room | purpose | may name |\n| --- | --- | --- |\n";
    let (begin, end) = ("<!-- rooms: rendered by tests/house -->\n", "<!-- end of rooms -->");
    hold("ARCHITECTURE.md", begin, end, &format!("{head}{table}\n"));
}
