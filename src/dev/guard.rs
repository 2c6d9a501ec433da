//! `fetch-proxy guard`: runs a command that must not outlive its parent, however the parent dies.
//!
//! The parent holds the other end of our standard input. It closes when the parent exits, crashes or is
//! killed. Then the guard stops the command, and removes its folder if the folder is temporary. This is
//! portable, and a parent-death signal is not. Owns only that process.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    path::Path,
    process::{Child, Command, ExitCode, Stdio},
    thread,
    time::Duration,
};

/// How long a server may take to stop by itself.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
const STOP_POLL: Duration = Duration::from_millis(20);

/// Runs `server` with `arguments` until the server or our standard input ends. Then removes `folder`.
pub fn run(server: &Path, arguments: &[String], folder: Option<&Path>) -> ExitCode {
    let spawned =
        Command::new(server).args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
    let code = match spawned {
        Ok(child) => watch(server, child),
        Err(error) => {
            // There is no log here. If standard error is closed, the message has no reader.
            let _ = writeln!(io::stderr(), "error: {}: {error}", server.display());
            ExitCode::FAILURE
        }
    };
    if let Some(folder) = folder {
        // The message has no reader.
        let _ = fs::remove_dir_all(folder);
    }
    code
}

fn watch(server: &Path, mut child: Child) -> ExitCode {
    let parent = thread::spawn(|| {
        // Nobody writes to this input: the read ends when the parent ends.
        let _ = io::stdin().read(&mut [0]);
    });
    while !parent.is_finished() {
        if let Ok(Some(status)) = child.try_wait() {
            return if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
        thread::sleep(STOP_POLL);
    }
    stop(server, &mut child);
    ExitCode::SUCCESS
}

/// Stops the server by its own command, and kills it if it does not stop in time.
fn stop(server: &Path, child: &mut Child) {
    let signal = format!("stop={}", child.id());
    let _ = Command::new(server).args(["--signal", &signal]).stderr(Stdio::null()).status();
    let polls = STOP_TIMEOUT.as_millis() / STOP_POLL.as_millis();
    for _ in 0..polls {
        if let Ok(Some(_)) = child.try_wait() {
            return;
        }
        thread::sleep(STOP_POLL);
    }
    let _ = child.kill();
    let _ = child.wait();
}
