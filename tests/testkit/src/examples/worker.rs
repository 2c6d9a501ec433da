//! One worker process: started, held up, told to stop, and never outliving this. Its output is
//! recorded; this module judges nothing.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use tempfile::NamedTempFile;

use super::{
    language::{Language, last_lines},
    reports::Reports,
};

pub struct Worker {
    pub name: String,
    child: Child,
    errors: NamedTempFile,
}

impl Worker {
    pub fn start(
        name: &str,
        language: &Language,
        env: &BTreeMap<String, String>,
        reports: &Arc<Reports>,
    ) -> Self {
        let errors = NamedTempFile::new().unwrap();
        let mut child = Command::new(language.folder.join("run"))
            .envs(env)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::from(errors.reopen().unwrap()))
            // So that what a script starts can be ended with it.
            .process_group(0)
            .spawn()
            .unwrap();
        let name = format!("{}/{name}", language.name);
        let (said, reader, reports) = (child.stdout.take().unwrap(), name.clone(), reports.clone());
        thread::spawn(move || {
            for line in BufReader::new(said).lines().map_while(Result::ok) {
                reports.note(&reader, &line);
            }
        });
        Self { name, child, errors }
    }

    /// Tells it alone to stop, as a cluster would.
    pub fn stop(&self) {
        kill("TERM", &self.child.id().to_string());
    }

    /// Holds up all that it consists of, until [`Worker::thaw`].
    pub fn freeze(&self) {
        kill("STOP", &self.group());
    }

    pub fn thaw(&self) {
        kill("CONT", &self.group());
    }

    fn group(&self) -> String {
        format!("-{}", self.child.id())
    }

    /// Its exit code, if it ends in time.
    pub async fn ended(&mut self, within: Duration) -> Option<ExitStatus> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return Some(status);
            }
            if began.elapsed() > within {
                return None;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Whether it has ended by itself, and not well.
    pub fn has_failed(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some_and(|status| !status.success())
    }

    /// The end of what it said to people.
    pub fn errors(&self) -> String {
        last_lines(&fs::read_to_string(self.errors.path()).unwrap_or_default(), 15)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        kill("KILL", &self.group());
        // If the command is missing, this one is used, so that the wait has an end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn kill(signal: &str, whom: &str) {
    let _ = Command::new("kill").args(["-s", signal, "--", whom]).stderr(Stdio::null()).status();
}
