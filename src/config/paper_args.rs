//! The command line of `completions` and `man`, as clap parses it.
//!
//! The doc comments are the `--help` texts and `docs/reference/flags.md`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

const COMPLETIONS: &str = "\
Examples:
  fetch-proxy completions bash > /usr/share/bash-completion/completions/fetch-proxy
  fetch-proxy completions fish > ~/.config/fish/completions/fetch-proxy.fish
  fetch-proxy completions zsh > /usr/local/share/zsh/site-functions/_fetch-proxy";

const PAGES: &str = "\
Example:
  fetch-proxy man /usr/local/share/man/man1
      Then `man fetch-proxy-work` shows the page of `fetch-proxy work`.";

/// The shell to complete for.
#[derive(Debug, Args)]
#[command(after_help = COMPLETIONS)]
pub struct CompletionsArgs {
    /// The shell.
    pub shell: ShellArg,
}

/// The shells that completions are made for.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ShellArg {
    /// bash.
    Bash,
    /// fish.
    Fish,
    /// zsh.
    Zsh,
}

/// The place of the man pages.
#[derive(Debug, Args)]
#[command(after_help = PAGES)]
pub struct ManArgs {
    /// Folder for the pages. It is made if it is not there.
    pub dir: PathBuf,
}
