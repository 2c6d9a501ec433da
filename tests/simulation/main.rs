//! Whole clusters under chosen accidents, in one process, on paused time. One seed is one history: replicas
//! of the real code from the service down, a model of JetStream, a network, clients and an operator.
//!
//! `make simulate SEEDS=10000 FROM=0` runs more of them. `PROGRESS=1` prints each, `LINES=500` more of the
//! history of the first that fails.

#![allow(clippy::disallowed_methods, reason = "tests measure real time, and outlive their tasks")]

mod clients;
mod facts;
mod history;
mod jetstream;
mod net;
mod plan;
mod replica;
mod watch;
mod world;

use std::{collections::BTreeMap, env, time::Instant};

use self::plan::Plan;

fn number(name: &str, default: u64) -> u64 {
    env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

#[test]
fn the_same_seed_gives_the_same_history() {
    for seed in 0..number("TWICE", 5) {
        let (first, second) =
            (world::run(&Plan::of(seed), true), world::run(&Plan::of(seed), true));
        for (place, (one, other)) in
            first.history.lines().iter().zip(second.history.lines()).enumerate()
        {
            assert_eq!(one, other, "seed {seed}, line {place}");
        }
        assert_eq!(first.history.digest(), second.history.digest(), "seed {seed}");
        assert_eq!(first.watch.counts, second.watch.counts, "seed {seed}");
    }
}

#[test]
fn seeds() {
    let (from, count) = (number("FROM", 0), number("SEEDS", 20));
    let began = Instant::now();
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    let mut failed = Vec::new();
    for seed in from..from + count {
        let started = Instant::now();
        let outcome = world::run(&Plan::of(seed), false);
        if env::var_os("PROGRESS").is_some() {
            let (digest, lines) = outcome.history.digest();
            println!("seed {seed}: {:?}, {lines} lines, {digest:016x}", started.elapsed());
        }
        if (seed + 1 - from).is_multiple_of(500) {
            println!("{} seeds, {} failed, {:?}", seed + 1 - from, failed.len(), began.elapsed());
        }
        for (what, count) in outcome.watch.counts {
            *counts.entry(what).or_default() += count;
        }
        if let Some(first) = outcome.watch.failures.first() {
            println!("seed {seed} fails: {first}");
            failed.push(seed);
            if env::var_os("FIRST").is_some() {
                panic!("found after {} seeds", seed + 1 - from);
            }
        }
    }
    for (what, count) in &counts {
        println!("{count:>9} {what}");
    }
    let rate = count as f64 / began.elapsed().as_secs_f64();
    println!("{count} seeds, {rate:.1} a second, {} failed: {failed:?}", failed.len());
    if let Some(seed) = failed.first() {
        println!("{:?}", Plan::of(*seed));
        let (plan, outcome) = world::shrink(&Plan::of(*seed));
        println!("{plan:?}");
        let lines = outcome.history.lines();
        let last = number("LINES", 200) as usize;
        lines.iter().skip(lines.len().saturating_sub(last)).for_each(|line| println!("{line}"));
        panic!("seed {seed}: {:#?}", outcome.watch.failures);
    }
}
