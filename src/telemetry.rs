//! The log: one subscriber, whose lines go to standard error through a queue (`writer`). Owns the format and
//! the libraries that log nothing by default. A panic is a line of the log.

mod writer;

use std::{
    fs::File,
    io::{self, IsTerminal as _},
    os::fd::AsFd as _,
    panic,
    time::Duration,
};

use tracing_subscriber::EnvFilter;

use self::writer::Queue;
use crate::{
    config::{LogArgs, LogFormat},
    metrics::LogMeter,
};

/// Libraries that log, by `cargo tree -i tracing`. They are silenced: their warnings are about lost
/// connections and wrong peers, which the modules of this program log themselves if they matter.
const SILENCED_LIBRARIES: &str = "async_nats=off,h2=off,hyper_util=off,tonic=off,tower=off";
/// The lines for auditors. `--audit` says which are written.
const AUDIT: &str = "audit=info";
/// The words that are a level. A filter may also name a library without a level.
const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];

/// Longest wait for unwritten lines at the end. A log without a reader must not delay the end.
const LAST_LINES: Duration = Duration::from_secs(1);
/// The same after a panic, which may be the last act of this process.
const PANIC: Duration = Duration::from_millis(100);

/// The started log. When it is dropped, it waits up to a second for unwritten lines.
#[derive(Debug)]
pub struct Log {
    queue: Queue,
    meter: LogMeter,
}

/// The reason why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is malformed, or has a word that is not a level and would silence everything.
    #[error("{0}: {1}")]
    Filter(&'static str, String),
    /// The system provides no thread or no file for the log.
    #[error("cannot start the log: {0}")]
    System(#[from] io::Error),
}

impl Log {
    /// Starts the log. `RUST_LOG` takes precedence over the arguments.
    ///
    /// # Errors
    /// See [`LogError`].
    pub fn start(args: &LogArgs) -> Result<Self, LogError> {
        let (name, typed) = match std::env::var("RUST_LOG") {
            Ok(filter) if !filter.is_empty() => ("RUST_LOG", filter),
            _ => ("--log-level", args.log_level.clone()),
        };
        check(&typed).map_err(|why| LogError::Filter(name, why))?;
        let typed = if name == "RUST_LOG" {
            typed
        } else {
            format!("{SILENCED_LIBRARIES},{AUDIT},{typed}")
        };
        let filter = EnvFilter::try_new(&typed);
        let filter = filter.map_err(|error| LogError::Filter(name, error.to_string()))?;
        let terminal = io::stderr().is_terminal();
        // A separate file: a write that hangs then holds no lock that others need.
        let output = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let loss = |lines| writer::captured(|| tracing::warn!(lines, "lines of the log were lost"));
        let meter = LogMeter::default();
        let queue = Queue::start(output, loss, meter.clone())?;
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(queue.clone())
            .with_ansi(terminal)
            .with_target(false)
            // These errors would go to standard error, and a panic there would end the process.
            .log_internal_errors(false);
        match args.log_format {
            LogFormat::Auto if terminal => subscriber.init(),
            LogFormat::Text => subscriber.init(),
            LogFormat::Auto | LogFormat::Json => subscriber.json().flatten_event(true).init(),
        }
        let (panics, counted) = (queue.clone(), meter.clone());
        panic::set_hook(Box::new(move |what| {
            counted.panicked();
            tracing::error!(%what, "a task has panicked");
            panics.flush(PANIC);
        }));
        Ok(Self { queue, meter })
    }

    /// The meter of its lines.
    pub fn meter(&self) -> &LogMeter {
        &self.meter
    }

    /// Writes a line that is not an event: why the process ends.
    pub fn line(&self, text: &str) {
        self.queue.push(format!("{text}\n").as_bytes());
    }
}

/// Checks the words of a filter. The library would treat an unknown word as the name of a library, and
/// silence all others.
///
/// # Errors
/// The wrong word and the valid words, for people.
fn check(filter: &str) -> Result<(), String> {
    let library = |word: &str| {
        let quiet = SILENCED_LIBRARIES.split(',').filter_map(|one| one.split('=').next());
        word.starts_with("fetch_proxy") || quiet.into_iter().any(|known| word.starts_with(known))
    };
    let level = |word: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word));
    for word in filter.split(',').map(str::trim) {
        if !(word.contains(['=', '[']) || level(word) || library(word)) {
            return Err(format!(
                "`{word}` is not a level. Use error, warn, info, debug or trace, off for no log, or \
                 filters such as info,h2=debug"
            ));
        }
    }
    Ok(())
}

impl Drop for Log {
    fn drop(&mut self) {
        self.queue.close(LAST_LINES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_accepted_and_words_that_are_no_level_refused() {
        for filter in [
            "info",
            "WARN",
            "off",
            "info,h2=debug",
            "h2",
            "fetch_proxy::nats",
            "debug, tower=off",
            "fetch_proxy[span]=info",
        ] {
            assert_eq!(check(filter), Ok(()), "{filter}");
        }
        for filter in ["warning", "err", "infoo", "", "info,", "verbose,h2=debug", "3"] {
            let why = check(filter).unwrap_err();
            for level in LEVELS {
                assert!(why.contains(level), "{filter}: {why}");
            }
        }
    }
}
