//! The log: one subscriber, whose lines go to standard error by a queue of their own (`writer`). Owns
//! its format, what is quiet by default, and that a panic is a line of it like any other.

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
use crate::config::{LogArgs, LogFormat};

/// Libraries that log, by `cargo tree -i tracing`. What they find worth a warning, a connection that
/// was lost or a peer that misbehaves, is said here by whom it concerns, or is no concern.
const SILENCED_LIBRARIES: &str = "async_nats=off,h2=off,hyper_util=off,tonic=off,tower=off";
/// The words that are a level, beside the libraries that a filter may name without one.
const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];

/// At the end, lines that are not written yet get this long: a log that nobody reads holds up no end.
const LAST_LINES: Duration = Duration::from_secs(1);
/// The same for a panic, which may be the last that this process does.
const PANIC: Duration = Duration::from_millis(100);

/// The log that was started. When it is dropped, what is still to be written gets a second.
#[derive(Debug)]
pub struct Log(Queue);

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter cannot be read, or would silence everything by a word that is no level.
    #[error("{0}: {1}")]
    Filter(&'static str, String),
    /// The system gives no thread, or no file, for it.
    #[error("cannot start the log: {0}")]
    System(#[from] io::Error),
}

impl Log {
    /// Starts logging. `RUST_LOG` goes before what was typed.
    ///
    /// # Errors
    /// See [`LogError`].
    pub fn start(args: &LogArgs) -> Result<Self, LogError> {
        let (name, typed) = match std::env::var("RUST_LOG") {
            Ok(filter) if !filter.is_empty() => ("RUST_LOG", filter),
            _ => ("--log-level", args.log_level.clone()),
        };
        check(&typed).map_err(|why| LogError::Filter(name, why))?;
        let typed =
            if name == "RUST_LOG" { typed } else { format!("{SILENCED_LIBRARIES},{typed}") };
        let filter = EnvFilter::try_new(&typed);
        let filter = filter.map_err(|error| LogError::Filter(name, error.to_string()))?;
        let terminal = io::stderr().is_terminal();
        // A file of our own: a write that hangs then holds no lock that others would wait for.
        let output = File::from(io::stderr().as_fd().try_clone_to_owned()?);
        let loss = |lines| writer::captured(|| tracing::warn!(lines, "lines of the log were lost"));
        let queue = Queue::start(output, loss)?;
        let subscriber = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(queue.clone())
            .with_ansi(terminal)
            .with_target(false)
            // It would be said on standard error, and a panic there would end the process.
            .log_internal_errors(false);
        match args.log_format {
            LogFormat::Auto if terminal => subscriber.init(),
            LogFormat::Text => subscriber.init(),
            LogFormat::Auto | LogFormat::Json => subscriber.json().flatten_event(true).init(),
        }
        let panics = queue.clone();
        panic::set_hook(Box::new(move |what| {
            tracing::error!(%what, "a task has panicked");
            panics.flush(PANIC);
        }));
        Ok(Self(queue))
    }

    /// A line that is no event: why the process ends.
    pub fn line(&self, text: &str) {
        self.0.push(format!("{text}\n").as_bytes());
    }
}

/// A word that is no level would be taken for the name of a library, and all others be silent.
///
/// # Errors
/// Which word that is, and what it could be, for people.
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
        self.0.close(LAST_LINES);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_that_is_no_level_is_refused_and_filters_are_not() {
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
