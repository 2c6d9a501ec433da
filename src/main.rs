//! Parses the command line, runs the command, and ends with its exit code.

use std::process::ExitCode;

use clap::Parser as _;
use fetch_proxy::{commands, config::Cli};

/// The C library's allocator would cost a fifth of our time: answers are buffers of a hundred kilobytes,
/// allocated and freed by the thousand.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    commands::run(Cli::parse().command)
}
