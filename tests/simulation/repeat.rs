//! The same seed gives the same history: in one process, on another thread, and in another process.

use std::{collections::BTreeMap, env, process::Command, thread};

use super::{plan::Plan, run};

#[test]
fn the_same_seed_gives_the_same_history() {
    const SEEDS: u64 = 8;
    let run = |seed| run::run(&Plan::of(seed), true);
    let first: Vec<_> = (0..SEEDS).map(|seed| (seed, run(seed))).collect();
    // In another order, and at the same time as another run.
    thread::scope(|scope| {
        scope.spawn(|| (SEEDS..2 * SEEDS).for_each(|seed| drop(run(seed))));
        for (seed, first) in first.iter().rev() {
            let second = run(*seed);
            let pairs = first.history.lines().iter().zip(second.history.lines());
            for (place, (one, other)) in pairs.enumerate() {
                assert_eq!(one, other, "seed {seed}, line {place}");
            }
            assert_eq!(first.history.digest(), second.history.digest(), "seed {seed}");
            assert_eq!(first.watch.coverage(), second.watch.coverage(), "seed {seed}");
            assert_eq!(first.watch.findings(), second.watch.findings(), "seed {seed}");
        }
    });
}

/// Each process has other addresses, and its hash maps another order.
#[test]
fn the_same_seed_gives_the_same_history_in_another_process() {
    const SEEDS: u64 = 16;
    let other = Command::new(env::current_exe().unwrap())
        .args(["--exact", "seeds", "--nocapture", "--test-threads=1"])
        .envs([("FROM", "0"), ("SEEDS", &SEEDS.to_string()), ("PROGRESS", "1"), ("FIRST", "")])
        .envs([("FAILURES", "1000"), ("LIMIT_SECONDS", ""), ("THREADS", "2"), ("LINES", "")])
        .output()
        .unwrap();
    let printed = String::from_utf8(other.stdout).unwrap();
    let there: BTreeMap<u64, &str> = printed.lines().filter_map(digest_of).collect();
    assert_eq!(there.len() as u64, SEEDS, "{printed}");
    for (seed, there) in there {
        let (digest, lines) = run::run(&Plan::of(seed), false).history.digest();
        assert_eq!(format!("{lines} lines, {digest:016x}"), there, "seed {seed}");
    }
}

/// The seed, the lines and the digest in `seed 7: 20ms, 1408 lines, 18a3261129c200d9`.
fn digest_of(line: &str) -> Option<(u64, &str)> {
    let (seed, rest) = line.strip_prefix("seed ")?.split_once(": ")?;
    let (_, digest) = rest.split_once(", ")?;
    digest.contains(" lines, ").then_some((seed.parse().ok()?, digest))
}
