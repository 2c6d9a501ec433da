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

/// A first build may have to fetch and compile a gRPC library, and so may a test of a package.
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
    let mut languages = within(&root.join("examples"));
    languages.extend(packaged(&root.join("clients")));
    languages.sort_by(|one, other| one.name.cmp(&other.name));
    languages
}

/// Every folder of `folder` with a `run`, by name.
pub fn within(folder: &Path) -> Vec<Language> {
    found(folder, |language| language)
}

/// The workers of the conformance suite that are built on client packages.
fn packaged(clients: &Path) -> Vec<Language> {
    found(clients, |package| package.join("conformance"))
}

fn found(folder: &Path, worker_of: impl Fn(PathBuf) -> PathBuf) -> Vec<Language> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let languages = entries.map(|path| {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        Language { name, folder: worker_of(path) }
    });
    let mut languages: Vec<_> =
        languages.filter(|language| language.folder.join("run").is_file()).collect();
    languages.sort_by(|one, other| one.name.cmp(&other.name));
    languages
}

impl Language {
    pub async fn build(&self) -> Built {
        carry_out(&self.folder.join("build")).await
    }

    /// Runs the tests of the client package, if the language has a package.
    pub async fn test_package(&self) -> Option<Built> {
        let test = self.folder.parent()?.join("test");
        if test.is_file() { Some(carry_out(&test).await) } else { None }
    }
}

async fn carry_out(program: &Path) -> Built {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.kill_on_drop(true);
    let output = match timeout(LONGEST_BUILD, command.output()).await {
        Err(_) => return Built::Failed(format!("it takes over {LONGEST_BUILD:?}")),
        Ok(Err(error)) => return Built::Failed(error.to_string()),
        Ok(Ok(output)) => output,
    };
    let said = String::from_utf8_lossy(&output.stderr);
    // The exit code alone may be that of a compiler: its failure must not pass for a skip.
    let needs = said.lines().find(|line| line.contains(NEEDS));
    match (output.status.code(), needs) {
        (Some(0), _) => Built::Ready,
        (Some(MUST_INSTALL), Some(needs)) => Built::Lacking(needs.to_owned()),
        _ => {
            // Maven tells of a failed test on its standard output.
            let all = String::from_utf8_lossy(&output.stdout) + said;
            Built::Failed(format!("{}\n{}", output.status, last_lines(&all, 60)))
        }
    }
}

pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}
