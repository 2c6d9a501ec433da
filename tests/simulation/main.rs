//! Whole clusters under chosen accidents, in one process, on paused time. One seed is one history: replicas
//! of the real code from the service down, a model of JetStream, a network, clients and an operator.
//!
//! `make simulate SEEDS=10000 FROM=0` runs seeds. docs/explanation/simulation.md explains how, and how to read a
//! failure. `settings` has all variables of the environment.

#![allow(clippy::disallowed_methods, reason = "tests measure real time, and outlive their tasks")]

mod accidents;
mod clients;
mod facts;
mod failure;
mod found;
mod history;
mod jetstream;
mod net;
mod net_facts;
mod outages;
mod panics;
mod plan;
mod policies;
mod ran;
mod repeat;
mod replica;
mod roads;
mod run;
mod seeds;
mod settings;
mod shrink;
mod signs;
mod watch;
mod world;

use self::{
    plan::Plan,
    settings::Settings,
    watch::{DEMANDED, DEMANDED_OF_ATTEMPTS, DEMANDED_OF_KEEP, DEMANDED_OF_STREAMS},
};

/// So many seeds exercise everything that is demanded.
const STANDARD: u64 = 2_000;

#[test]
fn seeds() {
    let settings = Settings::of_environment();
    // The test harness has begun a line.
    println!();
    let ran = seeds::run_all(&settings, |seed| run::run(&Plan::of(seed), false));
    println!("\n{}", ran.summary(&settings));
    if let Some(why) = failure::explain(&ran, &settings) {
        panic!("{why}");
    }
    let of_attempts = if settings::has_attempts() { DEMANDED_OF_ATTEMPTS } else { &[] };
    let of_streams = if settings::has_streams() { DEMANDED_OF_STREAMS } else { &[] };
    let of_keep = if settings::has_keep() { DEMANDED_OF_KEEP } else { &[] };
    let demanded = [DEMANDED, of_attempts, of_streams, of_keep].concat();
    let missing = ran.coverage.missing(&demanded);
    assert!(ran.seeds < STANDARD || missing.is_empty(), "not exercised: {missing:#?}");
    let implausible = ran.coverage.implausible();
    assert!(implausible.is_empty(), "excused too often: {implausible:#?}");
}
