//! A nats-server for tests: its own, or one shared by all tests of a binary.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::OnceLock,
    time::{Duration, Instant},
};

use tempfile::TempDir;

use crate::{BOUND, program, signal};

/// The server binary: as `make test` names it, or the one on the PATH.
pub fn binary() -> PathBuf {
    env::var_os("FETCH_PROXY_NATS_SERVER_BIN").map_or_else(|| "nats-server".into(), PathBuf::from)
}

/// A server that lives as long as this, on a port that it keeps over restarts.
pub struct NatsServer {
    binary: PathBuf,
    folder: TempDir,
    port: u16,
    config: Option<String>,
    jetstream: bool,
    guard: Option<Child>,
    pid: u32,
    monitoring: Option<String>,
    /// Until the end of this test process, which drops nothing: its guard removes the folder.
    lasts: bool,
}

impl NatsServer {
    /// Starts the server of [`binary`].
    pub fn start() -> Self {
        Self::start_with(binary(), None)
    }

    /// Starts another binary, or one with more configuration.
    pub fn start_with(binary: PathBuf, config: Option<String>) -> Self {
        Self::try_start_with(binary, config).unwrap_or_else(|log| panic!("{log}"))
    }

    /// Starts the server of [`binary`], with no JetStream at all.
    pub fn start_without_jetstream() -> Self {
        let mut server = Self::new(binary(), None);
        server.jetstream = false;
        server.launch();
        server
    }

    /// The same, where it may be that it does not come up.
    ///
    /// # Errors Its log.
    pub fn try_start_with(binary: PathBuf, config: Option<String>) -> Result<Self, String> {
        let mut server = Self::new(binary, config);
        server.try_launch().map(|()| server)
    }

    fn new(binary: PathBuf, config: Option<String>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self {
            binary,
            folder,
            port: 0,
            config,
            jetstream: true,
            guard: None,
            pid: 0,
            monitoring: None,
            lasts: false,
        }
    }

    /// The server that all tests of this binary share; each test makes streams of its own.
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<NatsServer> = OnceLock::new();
        SHARED.get_or_init(|| {
            let mut server = Self::new(binary(), None);
            server.lasts = true;
            server.launch();
            server
        })
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The address of its monitoring port.
    ///
    /// # Panics
    /// When it was not configured to.
    pub fn monitoring(&self) -> &str {
        self.monitoring.as_ref().expect("no monitoring port")
    }

    /// The folder of its stored data.
    pub fn store(&self) -> PathBuf {
        self.folder.path().join("jetstream")
    }

    /// Kills it as a crash would, and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal("KILL");
        if let Some(mut guard) = self.guard.take() {
            guard.wait().unwrap();
        }
    }

    /// Stops it as an operator would, and waits until it is gone.
    pub fn stop(&mut self) {
        self.signal("TERM");
        if let Some(mut guard) = self.guard.take() {
            guard.wait().unwrap();
        }
    }

    /// Starts it again on the same port and data.
    pub fn restart(&mut self) {
        assert!(self.guard.is_none(), "it still runs");
        self.launch();
    }

    /// Replaces what it was started with beyond the defaults, and has it read at once.
    pub fn configure(&self, config: &str) {
        fs::write(self.extra(), config).unwrap();
        self.signal("HUP");
    }

    fn extra(&self) -> PathBuf {
        self.folder.path().join("extra.conf")
    }

    /// Sends it a signal by name, like `STOP`; see [`signal`].
    pub fn signal(&self, name: &str) {
        signal(self.pid, name);
    }

    fn launch(&mut self) {
        self.try_launch().unwrap_or_else(|log| panic!("nats-server did not come up:\n{log}"));
    }

    /// Runs behind the proxy's own guard, so that it ends with this test process however that ends.
    fn try_launch(&mut self) -> Result<(), String> {
        let ports = tempfile::tempdir().unwrap();
        let mut guard = Command::new(program());
        guard.arg("guard");
        if self.lasts {
            guard.arg("--remove").arg(self.folder.path());
        }
        guard.arg("--").arg(&self.binary);
        let port = if self.port == 0 { "-1".to_owned() } else { self.port.to_string() };
        guard.args(["-a", "127.0.0.1", "-p", &port]);
        if self.jetstream {
            guard.args(["-js", "-sd"]).arg(self.folder.path());
        }
        guard.arg("--ports_file_dir").arg(ports.path());
        guard.arg("-l").arg(self.folder.path().join("log"));
        if let Some(config) = &self.config {
            fs::write(self.extra(), config).unwrap();
            guard.arg("-c").arg(self.extra());
        }
        let mut guard = guard.stdin(Stdio::piped()).spawn().unwrap();
        let ports = wait_for_ports(ports.path(), self.folder.path(), &mut guard)?;
        (self.pid, self.port, self.monitoring) = (ports.pid, ports.nats, ports.monitoring);
        self.guard = Some(guard);
        Ok(())
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        if let Some(mut guard) = self.guard.take() {
            drop(guard.stdin.take());
            let _ = guard.wait();
        }
    }
}

struct Ports {
    pid: u32,
    nats: u16,
    monitoring: Option<String>,
}

/// The server's process id is in the name of the file that it writes, its address inside.
fn wait_for_ports(ports: &Path, folder: &Path, guard: &mut Child) -> Result<Ports, String> {
    let began = Instant::now();
    loop {
        let files = fs::read_dir(ports).unwrap().flatten();
        if let Some(found) = files.filter_map(|entry| read_ports(&entry.path())).next() {
            return Ok(found);
        }
        let ended = guard.try_wait().unwrap().is_some();
        if ended || began.elapsed() > BOUND {
            return Err(fs::read_to_string(folder.join("log")).unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn read_ports(file: &Path) -> Option<Ports> {
    let name = file.file_stem()?.to_str()?;
    let pid = name.rsplit('_').next()?.parse().ok()?;
    let ports: serde_json::Value = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
    let nats = ports["nats"][0].as_str()?.rsplit(':').next()?.parse().ok()?;
    let monitoring = ports["monitoring"][0].as_str();
    let monitoring = monitoring.map(|url| url.trim_start_matches("http://").to_owned());
    Some(Ports { pid, nats, monitoring })
}
