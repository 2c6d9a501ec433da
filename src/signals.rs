//! The signals that begin an orderly end and end it early: SIGTERM, SIGINT and SIGHUP alike.

use std::{
    fs, io,
    time::{Duration, Instant},
};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::clock;

/// Signals that follow the first within this time count as the same signal: supervisors signal a process
/// and its group within a moment.
const DOUBLE_SIGNAL_WINDOW: Duration = Duration::from_secs(1);

/// The signals, from now on.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// `None` if SIGHUP was switched off before the start, as `nohup` does.
    hang_up: Option<Signal>,
}

impl Signals {
    /// Listens from now on: no signal ends the process any more.
    ///
    /// # Errors
    /// The system refuses.
    pub fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: match ignores_hang_up() {
                true => None,
                false => Some(signal(SignalKind::hangup())?),
            },
        })
    }

    /// Waits for a signal.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = received(&mut self.hang_up) => {}
        }
    }

    /// Waits for a second signal after the first, which came at `first_at`.
    pub async fn second(&mut self, first_at: Instant) {
        self.next().await;
        while clock::now() < first_at + DOUBLE_SIGNAL_WINDOW {
            self.next().await;
        }
    }
}

async fn received(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// Whether this process was started with SIGHUP switched off. Without /proc, it was not.
fn ignores_hang_up() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // The lowest bit is signal 1.
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 == 1)
}
