//! What the simulation needs of the code below the service: one seed gives one history. So tasks, random
//! bytes and choices of that code come from places that the simulation can decide.
//!
//! Types do not show here. Clippy forbids to iterate over a hash map in all rooms, and to read the time.

use std::fmt::Write as _;

use super::source::{self, File};

/// The rooms that run on a simulated machine, and the service itself.
const SIMULATED: [&str; 7] =
    ["broker", "bus", "cluster", "grpc/service", "lease", "lessor", "pump"];

/// Code that the simulation cannot decide, and the place to ask instead.
const FOREIGN: [(&str, &str); 8] = [
    (".spawn(", "simulated::spawn: a task stays on the machine of its parent"),
    ("::spawn(", "simulated::spawn: a task stays on the machine of its parent"),
    ("spawn_blocking", "simulated::spawn: a thread runs in real time"),
    ("JoinSet", "simulated::spawn: a task stays on the machine of its parent"),
    ("thread::", "simulated::spawn: a thread runs in real time"),
    ("getrandom::fill", "simulated::fill_random"),
    ("RandomState", "a number that the caller passes in: the seed does not decide it"),
    ("allow(clippy::disallowed_methods", "the rule that clippy.toml names"),
];

fn is_simulated(path: &str) -> bool {
    let rest = |room: &&str| path.strip_prefix(*room);
    SIMULATED.iter().filter_map(rest).any(|rest| rest == ".rs" || rest.starts_with('/'))
}

/// The lines of a file that the simulation could not repeat.
fn unrepeatable(file: &File) -> Vec<String> {
    let mut wrong = Vec::new();
    let ours = source::uses(file).iter().any(|path| *path == ["simulated", "spawn"]);
    for (place, (number, line)) in file.code.iter().enumerate() {
        let mut say = |why: &str| wrong.push(format!("{}:{number}: {why}", file.path));
        for (foreign, instead) in FOREIGN.iter().filter(|(foreign, _)| line.contains(foreign)) {
            say(&format!("`{foreign}` instead of {instead}"));
        }
        let bare = line.match_indices("spawn(").any(|(at, _)| {
            !line[..at].ends_with(|c: char| c.is_alphanumeric() || "_.:".contains(c))
        });
        if bare && !ours {
            say("`spawn` is not the one of `simulated`");
        }
        let mut after = file.code[place + 1..].iter().map(|(_, line)| line.trim());
        let next = after.find(|line| !line.is_empty());
        if line.contains("select!") && next != Some("biased;") {
            say("`select!` without `biased;` takes its branches in a random order");
        }
    }
    wrong
}

#[test]
fn code_below_the_service_is_repeatable() {
    let files = source::files();
    let files = files.iter().filter(|file| is_simulated(&file.path));
    let (mut count, mut wrong) = (0, String::new());
    for file in files {
        count += 1;
        for line in unrepeatable(file) {
            let _ = writeln!(wrong, "{line}");
        }
    }
    assert!(count > 30, "the walk is broken: {count} files");
    assert!(wrong.is_empty(), "the simulation cannot repeat this:\n{wrong}");
}

#[test]
fn each_unrepeatable_line_is_found() {
    let of = |code: &str| {
        let code = (1..).zip(code.lines().map(str::to_owned)).collect();
        let (path, module) = ("lessor/new.rs".to_owned(), vec!["lessor".into(), "new".into()]);
        unrepeatable(&File { path, module, text: String::new(), code }).len()
    };
    for wrong in [
        "tasks.spawn(run());",
        "    tokio::spawn(async move {",
        "use tokio::spawn;\nspawn(run());",
        "tokio::task::spawn_blocking(read);",
        "std::thread::sleep(time);",
        "getrandom::fill(&mut bytes)?;",
        "tokio::select! {\n    () = first => {}",
        "tokio::select! {\n\n    () = biased => {}",
        "let map = HashMap::with_hasher(RandomState::new());",
        "#[allow(clippy::disallowed_methods, reason = \"it is quick\")]",
    ] {
        assert_eq!(of(wrong), 1, "{wrong}");
    }
    for right in [
        "use crate::simulated::spawn;\nspawn(&self.tasks, run());",
        "use crate::{lock, simulated::{fill_random, spawn}};\n    spawn(&tasks, run());",
        "fn respawn(one: u32) {}\nself.respawn(1);",
        "tokio::select! {\n\n    biased;\n    () = first => {}",
        "simulated::fill_random(&mut bytes)?;",
    ] {
        assert_eq!(of(right), 0, "{right}");
    }
}
