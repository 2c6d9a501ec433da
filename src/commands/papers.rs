//! The commands `completions` and `man`: texts that are made from the command line as it is.

use std::{fs, io::Write as _, path::Path};

use clap::CommandFactory as _;
use clap_complete::aot::{Shell, generate};

use super::{Outcome, failed};
use crate::config::{Cli, ShellArg};

/// The name of the program that shells complete.
const PROGRAM: &str = "fetch-proxy";

/// Prints the completions for a shell.
pub(super) fn completions(shell: ShellArg) -> Outcome<u8> {
    let shell = match shell {
        ShellArg::Bash => Shell::Bash,
        ShellArg::Fish => Shell::Fish,
        ShellArg::Zsh => Shell::Zsh,
    };
    // The completions of bash would offer hidden commands, too.
    let all = Cli::command();
    let shown = all.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let mut program =
        clap::Command::new(PROGRAM).version(env!("CARGO_PKG_VERSION")).subcommands(shown);
    let mut text = Vec::new();
    generate(shell, &mut program, PROGRAM, &mut text);
    let printed = std::io::stdout().write_all(&text);
    printed.map(|()| 0).map_err(|error| failed(format!("cannot print: {error}")))
}

/// Writes one man page for the program and one for each command.
pub(super) fn man(folder: &Path) -> Outcome<u8> {
    let written =
        fs::create_dir_all(folder).and_then(|()| clap_mangen::generate_to(Cli::command(), folder));
    let wrong = |error| failed(format!("cannot write to {}: {error}", folder.display()));
    written.map(|()| 0).map_err(wrong)
}
