//! Runs one command for one message, and ends it with its whole process group. Owns that group.

use std::{
    env,
    ffi::OsString,
    io,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use bytes::Bytes;
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, Command},
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    captured::Captured,
    environment::HEADER_PREFIX,
    job::{JobEnd, JobOrder, ordered},
    verdict::WorkEnd,
};

/// How long the output of a command is read after its end. A process that it has left behind may hold it open.
const OUTPUT_AFTER_END: Duration = Duration::from_millis(500);
/// The time from one look at a group that must end to the next.
const GROUP_POLL: Duration = Duration::from_millis(20);
/// The most bytes of one read.
const READ_BYTES: usize = 16 * 1024;

/// A command that may run, for any message.
#[derive(Debug, Clone)]
pub struct WorkCommand {
    program: OsString,
    arguments: Vec<OsString>,
    /// Variables that are taken away: those of an outer message.
    removed: Vec<OsString>,
    /// How long it may run. `None`: as long as its lease lives.
    timeout: Option<Duration>,
    /// The time from SIGTERM to SIGKILL.
    kill_after: Duration,
    /// The most bytes that are kept of each output.
    output_bytes: usize,
}

impl WorkCommand {
    /// Checks that there is such a program.
    ///
    /// # Errors
    /// No file of this name can be run, as text.
    pub fn new(
        command: Vec<OsString>,
        timeout: Option<Duration>,
        kill_after: Duration,
        output_bytes: usize,
    ) -> Result<Self, String> {
        let mut words = command.into_iter();
        let program = words.next().ok_or_else(|| "no command is given".to_owned())?;
        find(&program)?;
        let is_outer = |name: &OsString| name.to_string_lossy().starts_with(HEADER_PREFIX);
        let removed = env::vars_os().map(|(name, _)| name).filter(is_outer).collect();
        Ok(Self { program, arguments: words.collect(), removed, timeout, kill_after, output_bytes })
    }

    /// Runs the command with this input until it ends, until its time is over, or until `orders` ends it.
    ///
    /// # Errors
    /// The command cannot be started.
    pub(super) async fn run(
        &self,
        input: Bytes,
        variables: Vec<(String, String)>,
        mut orders: watch::Receiver<JobOrder>,
    ) -> io::Result<JobEnd> {
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        self.removed.iter().for_each(|name| _ = command.env_remove(name));
        let mut child = command
            .env_remove("FETCH_PROXY_HEADERS")
            .env_remove("FETCH_PROXY_HEADERS_CUT")
            .envs(variables)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // A signal for the worker must not reach it, and a signal for it must reach all of it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        let group = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw);
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (mut said, mut complained) =
            (Captured::new(self.output_bytes), Captured::new(self.output_bytes));
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A command need not read its input.
                let _ = stdin.write_all(&input).await;
            }
            std::future::pending::<()>().await;
        };
        let read = async {
            tokio::join!(keep_end(stdout, &mut said), keep_end(stderr, &mut complained));
        };
        let (mut is_ended, mut is_timed_out) = (false, false);
        let status = {
            let run = async {
                let time_is_up = async {
                    match self.timeout {
                        Some(timeout) => sleep(timeout).await,
                        None => std::future::pending().await,
                    }
                };
                tokio::select! {
                    status = child.wait() => return status,
                    () = ordered(&mut orders, JobOrder::End) => is_ended = true,
                    () = time_is_up => is_timed_out = true,
                }
                end(&mut child, group, self.kill_after, &mut orders).await
            };
            tokio::pin!(run, feed, read);
            let mut is_read = false;
            let status = loop {
                tokio::select! {
                    status = &mut run => break status,
                    () = &mut feed => {}
                    () = &mut read, if !is_read => is_read = true,
                }
            };
            if !is_read {
                let _ = timeout(OUTPUT_AFTER_END, read).await;
            }
            status?
        };
        let end = match (is_timed_out, self.timeout, status.code(), status.signal()) {
            (true, Some(timeout), ..) => WorkEnd::TimedOut(timeout),
            (_, _, Some(code), _) => {
                WorkEnd::Exit { code, said: said.last_line(), complained: complained.last_line() }
            }
            (_, _, None, signal) => WorkEnd::Signal(signal.unwrap_or_default()),
        };
        Ok(JobEnd { end, is_ended, is_reached: None, output: Some((said, complained)) })
    }
}

/// Ends the whole group: by SIGTERM, and by SIGKILL after a time or an order.
async fn end(
    child: &mut Child,
    group: Option<Pid>,
    kill_after: Duration,
    orders: &mut watch::Receiver<JobOrder>,
) -> io::Result<std::process::ExitStatus> {
    signal(group, Signal::TERM);
    let mut status = None;
    let gone = async {
        status = Some(child.wait().await);
        // Its children may need the time as well.
        while group.is_some_and(|group| test_kill_process_group(group).is_ok()) {
            sleep(GROUP_POLL).await;
        }
    };
    tokio::select! {
        () = gone => {}
        () = sleep(kill_after) => {}
        () = ordered(orders, JobOrder::Kill) => {}
    }
    signal(group, Signal::KILL);
    match status {
        Some(status) => status,
        None => child.wait().await,
    }
}

fn signal(group: Option<Pid>, signal: Signal) {
    if let Some(group) = group {
        // A group that is gone needs no signal.
        let _ = kill_process_group(group, signal);
    }
}

async fn keep_end(output: Option<impl AsyncRead + Unpin>, captured: &mut Captured) {
    let Some(mut output) = output else { return };
    let mut piece = vec![0; READ_BYTES];
    while let Ok(read @ 1..) = output.read(&mut piece).await {
        captured.take(&piece[..read]);
    }
}

/// Looks for a program as the system would.
fn find(program: &OsString) -> Result<(), String> {
    let name = Path::new(program);
    let is_path = name.components().count() > 1 || name.is_absolute();
    let place = |folder: PathBuf| folder.join(name);
    let places: Vec<PathBuf> = if is_path {
        vec![name.to_owned()]
    } else {
        let path = env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
        env::split_paths(&path).map(place).collect()
    };
    let runs = |file: &PathBuf| {
        let found = file.metadata();
        found.is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    if places.iter().any(runs) {
        return Ok(());
    }
    let why = match (is_path, places.iter().any(|file| file.exists())) {
        (_, true) => "it is not a program that may be run",
        (true, false) => "there is no such file",
        (false, false) => "there is no such program on the PATH",
    };
    Err(format!("cannot run {}: {why}", name.display()))
}
