//! The log: one subscriber, on standard error. Owns its format, what is quiet by default, and that a
//! panic is a line of it like any other.

use std::{
    io::{self, IsTerminal as _},
    panic,
};

use tracing_subscriber::EnvFilter;

use crate::config::{LogArgs, LogFormat};

/// Libraries that log, by `cargo tree -i tracing`. What they find worth a warning, a connection that
/// was lost or a peer that misbehaves, is said here by whom it concerns, or is no concern.
const QUIET: &str = "async_nats=off,h2=off,hyper_util=off,tonic=off,tower=off";

/// Starts logging. `RUST_LOG` goes before what was typed.
///
/// # Errors
/// When the filter cannot be read.
pub fn init(args: &LogArgs) -> Result<(), String> {
    let (name, typed) = match std::env::var("RUST_LOG") {
        Ok(filter) if !filter.is_empty() => ("RUST_LOG", filter),
        _ => ("--log-level", format!("{QUIET},{}", args.log_level)),
    };
    let filter = EnvFilter::try_new(&typed).map_err(|error| format!("{name}: {error}"))?;
    let terminal = io::stderr().is_terminal();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(terminal)
        .with_target(false);
    match args.log_format {
        LogFormat::Auto if terminal => subscriber.init(),
        LogFormat::Text => subscriber.init(),
        LogFormat::Auto | LogFormat::Json => subscriber.json().flatten_event(true).init(),
    }
    panic::set_hook(Box::new(|what| tracing::error!(%what, "a task has panicked")));
    Ok(())
}
