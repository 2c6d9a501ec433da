//! The settings of a run of seeds, from the environment. All names of variables stand here. `make simulate` sets
//! them.

use std::{
    env,
    fmt::Display,
    io::{Write as _, stderr},
    str::FromStr,
    thread,
    time::Duration,
};

/// Seeds of a run that is not asked for a number: a plain `cargo test`, whose code is not optimised.
const FEW: u64 = 50;

const AFTER_FAILURE: Duration = Duration::from_secs(30);

/// How seeds are run, and what is printed.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The first seed.
    pub from: u64,
    /// How many seeds, at most.
    pub seeds: u64,
    /// No seed begins later than this.
    pub time: Option<Duration>,
    /// How many runs at a time.
    pub threads: usize,
    /// After so many failures no seed begins any more.
    pub failures: usize,
    /// No seed begins later than this after the first failure. Other failures until then show how common
    /// it is.
    pub after_failure: Option<Duration>,
    /// Only the first failure is asked for, and it is not shrunk.
    pub only_first: bool,
    /// Lines of a history that are printed.
    pub lines: usize,
    /// Each seed has a line of its own.
    pub each: bool,
}

impl Settings {
    pub fn of_environment() -> Self {
        let (only_first, failures) = (is_set("FIRST"), number("FAILURES"));
        let seeds = number("SEEDS").unwrap_or_else(|| {
            // The test harness would keep what is printed to itself.
            let _ = writeln!(stderr(), "simulation: only {FEW} seeds; `make test` runs more");
            FEW
        });
        let cores = thread::available_parallelism().map_or(1, usize::from);
        Self {
            from: number("FROM").unwrap_or(0),
            seeds,
            // Not SECONDS: a shell may stand between, and bash counts that variable up.
            time: number("LIMIT_SECONDS").map(Duration::from_secs),
            threads: number("THREADS").unwrap_or(cores).max(1),
            failures: if only_first { 1 } else { failures.unwrap_or(5).max(1) },
            after_failure: failures.is_none().then_some(AFTER_FAILURE),
            only_first,
            lines: number("LINES").unwrap_or(100),
            each: is_set("PROGRESS"),
        }
    }
}

/// Whether some clients name their Fetch calls.
pub fn has_attempts() -> bool {
    is_set("ATTEMPTS")
}

/// Whether some clients work on streams.
pub fn has_streams() -> bool {
    is_set("STREAMS")
}

/// Whether the leases of some streams live as long as the streams.
pub fn has_keep() -> bool {
    is_set("KEEP")
}

/// The command that runs a seed again.
pub fn again(seed: u64) -> String {
    let attempts = if has_attempts() { " ATTEMPTS=1" } else { "" };
    let streams = if has_streams() { " STREAMS=1" } else { "" };
    let keep = if has_keep() { " KEEP=1" } else { "" };
    format!("make simulate SEEDS=1 FROM={seed}{attempts}{streams}{keep}")
}

/// The value of a variable. Make passes an empty text for a variable that is not set.
fn text(name: &str) -> Option<String> {
    env::var(name).ok().filter(|text| !text.is_empty())
}

fn is_set(name: &str) -> bool {
    text(name).is_some_and(|text| text != "0")
}

fn number<N: FromStr<Err: Display>>(name: &str) -> Option<N> {
    let text = text(name)?;
    Some(text.parse().unwrap_or_else(|error| panic!("{name}={text}: {error}")))
}
