//! The languages that there are workers in: found as folders, built once. Starts no worker.
//!
//! A worker is a folder with two programs, `build` and `run`. The worker of a client package is
//! `clients/LANGUAGE/conformance`. A worker without a package is `examples/LANGUAGE`.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{process::Command, time::timeout};

/// A first build may have to fetch and compile a gRPC library.
const LONGEST_BUILD: Duration = Duration::from_secs(600);
/// The exit code of `build` if something must be installed first. Its output names what.
const MUST_INSTALL: i32 = 3;
const NEEDS: &str = ": needs ";

#[derive(Clone, PartialEq, Eq)]
pub struct Language {
    pub name: String,
    pub folder: PathBuf,
}

pub enum Built {
    Ready,
    /// The toolchain is not there: what must be installed.
    Lacking(String),
    Failed(String),
}

/// Every worker of the project whose folder is `root`, by name.
pub fn all(root: &Path) -> Vec<Language> {
    let named = |folder: PathBuf| {
        let name = folder.file_name().unwrap().to_str().unwrap().to_owned();
        (name, folder)
    };
    let bare = folders(&root.join("examples")).map(named);
    let packaged =
        folders(&root.join("clients")).map(named).map(|(name, of)| (name, of.join("conformance")));
    let mut languages: Vec<_> = bare
        .chain(packaged)
        .filter(|(_, folder)| folder.join("run").is_file())
        .map(|(name, folder)| Language { name, folder })
        .collect();
    languages.sort_by(|one, other| one.name.cmp(&other.name));
    languages
}

fn folders(of: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(of).into_iter().flatten().flatten().map(|entry| entry.path())
}

impl Language {
    pub async fn build(&self) -> Built {
        let mut command = Command::new(self.folder.join("build"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.kill_on_drop(true);
        let output = match timeout(LONGEST_BUILD, command.output()).await {
            Err(_) => return Built::Failed(format!("build takes over {LONGEST_BUILD:?}")),
            Ok(Err(error)) => return Built::Failed(format!("build: {error}")),
            Ok(Ok(output)) => output,
        };
        let said = String::from_utf8_lossy(&output.stderr);
        // The exit code alone may be that of a compiler: its failure must not pass for a skip.
        let needs = said.lines().find(|line| line.contains(NEEDS));
        match (output.status.code(), needs) {
            (Some(0), _) => Built::Ready,
            (Some(MUST_INSTALL), Some(needs)) => Built::Lacking(needs.to_owned()),
            _ => Built::Failed(format!("build: {}\n{}", output.status, last_lines(&said, 30))),
        }
    }
}

pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
