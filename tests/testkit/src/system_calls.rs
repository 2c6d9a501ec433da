//! Counts the system calls of running processes by `strace`, which stops a process at each call.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
};

use tempfile::NamedTempFile;

use crate::signal;

/// Counts until it is stopped.
pub struct Counter {
    strace: Child,
    table: NamedTempFile,
}

/// Begins to count the calls of these processes and all of their threads.
///
/// # Errors
/// Why they cannot be counted: strace is missing, or may not attach.
pub fn attach(processes: &[u32]) -> Result<Counter, String> {
    let table = NamedTempFile::new().map_err(|error| error.to_string())?;
    let mut command = Command::new("strace");
    command.args(["-c", "-f", "-o"]).arg(table.path());
    for pid in processes {
        command.args(["-p", &pid.to_string()]);
    }
    let strace = command.stderr(Stdio::piped()).spawn();
    let mut strace = strace.map_err(|error| format!("strace: {error}"))?;
    let mut said = BufReader::new(strace.stderr.as_mut().expect("a pipe")).lines();
    for _ in processes {
        let line = said.next().and_then(Result::ok).unwrap_or_default();
        if !line.contains(" attached") {
            drop(said);
            let _ = strace.kill();
            let _ = strace.wait();
            return Err(line);
        }
    }
    drop(said);
    Ok(Counter { strace, table })
}

impl Counter {
    /// The calls so far, by name.
    ///
    /// # Errors
    /// Why there is no table of them.
    pub fn stop(mut self) -> Result<BTreeMap<String, u64>, String> {
        signal(self.strace.id(), "INT");
        self.strace.wait().map_err(|error| error.to_string())?;
        let table = fs::read_to_string(self.table.path()).map_err(|error| error.to_string())?;
        let calls: BTreeMap<String, u64> = table.lines().filter_map(calls_of).collect();
        if calls.is_empty() { Err("strace printed no table".into()) } else { Ok(calls) }
    }
}

/// A line of the table: share, seconds, microseconds a call, calls, perhaps errors, and the name.
fn calls_of(line: &str) -> Option<(String, u64)> {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let (count, name) = (fields.get(3)?.parse().ok()?, fields.get(4..)?.last()?);
    (*name != "total").then(|| ((*name).to_owned(), count))
}
