//! The catalogue of mended faults that the simulation must find when they are put back. A fault that no
//! longer applies to the code would be skipped in silence, so a change of the code must change it too.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// The headings of the text before the difference: what users see, the change that mended the fault, and
/// the situation that brings it out.
const HEADINGS: [&str; 3] = ["\nEffect: ", "\nMended by: ", "\nSituation: "];

/// All faults, by the names of their files.
fn catalogue() -> Vec<(String, String)> {
    let folder = root().join("tests/simulation/faults");
    let mut files: Vec<PathBuf> =
        fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    files.sort();
    let read = |file: PathBuf| {
        let name = file.file_name().unwrap().to_str().unwrap().to_owned();
        (name, fs::read_to_string(file).unwrap())
    };
    files.into_iter().map(read).collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Whether the difference can be made to the files of the project. Changes no file.
fn applies(patch: &str) -> Result<(), String> {
    let mut git = Command::new("git")
        .args(["apply", "--check", "-"])
        .current_dir(root())
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    git.stdin.take().unwrap().write_all(patch.as_bytes()).unwrap();
    let ended = git.wait_with_output().unwrap();
    let why = String::from_utf8_lossy(&ended.stderr).into_owned();
    if ended.status.success() { Ok(()) } else { Err(why) }
}

/// The files that a difference changes.
fn changed(patch: &str) -> Vec<&str> {
    patch.lines().filter_map(|line| line.strip_prefix("+++ b/")).collect()
}

#[test]
fn every_mended_fault_can_be_put_back() {
    let catalogue = catalogue();
    assert!(catalogue.len() >= 20, "the catalogue has {} faults", catalogue.len());
    let mut rotten = String::new();
    for (name, patch) in &catalogue {
        assert!(name.ends_with(".patch"), "{name} is no fault");
        for heading in HEADINGS {
            assert!(patch.contains(heading), "{name} has no line{heading}");
        }
        let files = changed(patch);
        assert!(!files.is_empty(), "{name} changes nothing");
        for file in files {
            assert!(file.starts_with("src/"), "{name} changes {file}, which is no code");
        }
        if let Err(why) = applies(patch) {
            rotten += &format!("{name}: {why}");
        }
    }
    assert!(
        rotten.is_empty(),
        "faults that the code has left behind, to be written again:\n{rotten}"
    );
}

#[test]
fn fault_does_not_apply_to_other_code() {
    for (name, patch) in catalogue() {
        let (text, changes) = patch.split_once("\n@@").unwrap();
        let is_there_now = |line: &&str| line.starts_with('-') || line.starts_with(' ');
        let line = changes.lines().skip(1).find(is_there_now).unwrap();
        let changes = changes.replacen(line, &format!("{line} of other code"), 1);
        let other = format!("{text}\n@@{changes}");
        assert!(applies(&other).is_err(), "{name} applies whatever the code is");
    }
}
