//! Why a seed failed: its shortest plan, and the end of its history.

use std::{fs, path::Path};

use super::{
    plan::Plan,
    ran::Ran,
    settings::{Settings, again},
    shrink,
};

/// Most failed checks of one run that are printed.
const FAILURES: usize = 5;

/// Shrinks the plan of the first seed that failed. Prints what remains of the plan and the end of its
/// history, and writes all of it to a file. Returns the last words.
pub fn explain(ran: &Ran, settings: &Settings) -> Option<String> {
    let (seed, failure) = ran.failed.first_key_value()?;
    if settings.only_first {
        println!("seed {seed} fails: {failure}");
        return Some(format!("found after {} seeds: {failure}", seed + 1 - settings.from));
    }
    let whole = Plan::of(*seed);
    println!("\nThe plan of seed {seed}, which failed first:\n{whole}");
    let (plan, outcome) = shrink::shrink(&whole);
    println!("The shortest plan that still fails:\n{plan}");
    let failures: Vec<_> = outcome.watch.findings().iter().map(ToString::to_string).collect();
    for failure in failures.iter().take(FAILURES) {
        println!("It fails: {failure}");
    }
    let lines = outcome.history.lines();
    let last = &lines[lines.len().saturating_sub(settings.lines)..];
    println!("\nThe last {} of {} lines of its history:", last.len(), lines.len());
    last.iter().for_each(|line| println!("{line}"));
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("simulation-seed-{seed}.txt"));
    let text = format!(
        "{whole}\n\nThe shortest plan that still fails:\n{plan}\n\n{}\n\n{}\n",
        failures.join("\n"),
        lines.join("\n")
    );
    fs::write(&file, text).unwrap();
    println!("\nThe plans and the whole history: {}", file.display());
    let others: Vec<_> = ran.failed.keys().skip(1).collect();
    if !others.is_empty() {
        println!("Other seeds that failed: {others:?}");
    }
    Some(format!("seed {seed} fails: {failure}\nagain: {}", again(*seed)))
}
