//! The log: one subscriber, on standard error. Owns its format, what is quiet by default, and that a
//! panic is a line of it like any other.

use std::{
    io::{self, IsTerminal as _},
    panic,
};

use tracing_subscriber::EnvFilter;

use crate::config::{LogArgs, LogFormat};

/// The NATS library reports every lost connection as an error of its own; what it means here is
/// said by `nats`.
const QUIET: &str = "async_nats=off";

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
