//! The policy commands: they read policy files, and answer in words and by exit code. Files with secrets are
//! only looked at, never shown.

use std::{io::Write as _, path::Path};

use super::{Outcome, say, usage};
use crate::{
    access::{self, AskedRight, Issuer, Policy},
    config::{PolicyCheckArgs, PolicyCommand, PolicyDiffArgs},
    secrets,
};

/// Runs a policy command. The exit code is 1 for denied, or for files that differ.
pub(super) fn run(command: PolicyCommand) -> Outcome<u8> {
    match command {
        PolicyCommand::Check(args) => check(args),
        PolicyCommand::Diff(args) => diff(&args),
    }
}

fn check(args: PolicyCheckArgs) -> Outcome<u8> {
    let PolicyCheckArgs { file, identity, verb, stream, consumer, offline } = args;
    let policy = read(&file)?;
    if !offline {
        look_at_files(&file, &policy)?;
    }
    let Some(identity) = identity else {
        for warning in access::warnings(&policy) {
            let warning = format!("warning: {}:{warning}", file.display());
            // If standard error is closed, the warning has no reader.
            let _ = writeln!(std::io::stderr(), "{warning}");
        }
        let (principals, rules) = policy.counts();
        let digest = policy.digest();
        say(&format!("ok: principals {principals}, rules {rules}, digest {digest}"))?;
        for issuer in policy.issuers() {
            say(&format!("issuer {}: {}", issuer.name, issuer.in_words()))?;
        }
        return Ok(0);
    };
    let question = verb.zip(stream).zip(consumer);
    let question = question.map(|((verb, stream), consumer)| AskedRight { verb, stream, consumer });
    let explained = policy.explain(&identity, question.as_ref());
    say(explained.to_string().trim_end())?;
    Ok(u8::from(!explained.is_allowed))
}

fn diff(args: &PolicyDiffArgs) -> Outcome<u8> {
    let lines = access::diff(&read(&args.old)?, &read(&args.new)?);
    for line in &lines {
        say(line)?;
    }
    Ok(u8::from(!lines.is_empty()))
}

fn read(file: &Path) -> Outcome<Policy> {
    let unreadable = |error| usage(format!("cannot read {}: {error}", file.display()));
    let (text, _) = secrets::read_at_start(file).map_err(unreadable)?;
    Policy::parse(&text).map_err(|error| usage(format!("{}:{error}", file.display())))
}

/// Checks that the files are there which a policy file names. No server is asked.
fn look_at_files(file: &Path, policy: &Policy) -> Outcome<()> {
    let issuers = policy.issuers().iter().flat_map(|Issuer { keys, .. }| {
        [
            ("keys of an issuer", keys.key_file(file)),
            ("authorities", keys.ca_file(file)),
            ("bearer", keys.bearer_file(file)),
        ]
    });
    let keys = ("API keys", policy.authenticate().api_keys_file(file));
    for (what, path) in [keys].into_iter().chain(issuers) {
        let Some(path) = path else { continue };
        secrets::look_at_start(&path).map_err(|error| {
            let (file, path) = (file.display(), path.display());
            usage(format!(
                "{file}: cannot read the {what} in {path}: {error}; --offline skips this"
            ))
        })?;
    }
    Ok(())
}
