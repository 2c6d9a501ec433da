//! Runs many seeds on all cores. One thread runs one seed at a time, on a runtime of its own. The threads
//! share the next seed and the number of failures, so they cannot change the history of a seed.

use std::{
    collections::BTreeMap,
    io::{Write as _, stderr},
    process,
    sync::{
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    ran::Ran,
    run::Outcome,
    settings::{Settings, again},
};

/// Time between two lines of progress.
const PROGRESS: Duration = Duration::from_secs(5);

/// A run needs a fraction of a second. A run that takes so long does not let its time pass, and never ends.
const HANGS: Duration = Duration::from_secs(180);

enum News {
    Begun { thread: usize, seed: u64 },
    Ended { thread: usize, seed: u64, outcome: Box<Outcome> },
}

/// The threads share this, and nothing else.
#[derive(Default)]
struct Next {
    /// The place of the next seed.
    place: AtomicU64,
    failed: AtomicUsize,
    /// Time is up.
    stopped: AtomicBool,
}

impl Next {
    fn seed(&self, settings: &Settings) -> Option<u64> {
        let failed = self.failed.load(Ordering::Relaxed);
        if self.stopped.load(Ordering::Relaxed) || failed >= settings.failures {
            return None;
        }
        let place = self.place.fetch_add(1, Ordering::Relaxed);
        (place < settings.seeds).then_some(settings.from + place)
    }
}

/// Runs the seeds that the settings ask for. `run` runs one of them.
pub fn run_all(settings: &Settings, run: impl Fn(u64) -> Outcome + Sync) -> Ran {
    let next = Next::default();
    let (tell, news) = channel();
    thread::scope(|scope| {
        for thread in 0..settings.threads {
            let (tell, next, run) = (tell.clone(), &next, &run);
            scope.spawn(move || work(thread, settings, next, &tell, run));
        }
        drop(tell);
        collect(settings, &next, &news)
    })
}

fn work(
    thread: usize,
    settings: &Settings,
    next: &Next,
    tell: &Sender<News>,
    run: impl Fn(u64) -> Outcome,
) {
    while let Some(seed) = next.seed(settings) {
        let _ = tell.send(News::Begun { thread, seed });
        let outcome = Box::new(run(seed));
        if !outcome.watch.findings().is_empty() {
            next.failed.fetch_add(1, Ordering::Relaxed);
        }
        let _ = tell.send(News::Ended { thread, seed, outcome });
    }
}

/// Sums up the results, and says when no other seed begins.
fn collect(settings: &Settings, next: &Next, news: &Receiver<News>) -> Ran {
    let (began, cpu) = (Instant::now(), cpu_time());
    let mut end = settings.time.map(|time| began + time);
    let mut printed = began;
    let mut running: BTreeMap<usize, (u64, Instant)> = BTreeMap::new();
    let mut ran = Ran::default();
    loop {
        match news.recv_timeout(Duration::from_secs(1)) {
            Ok(News::Begun { thread, seed }) => {
                running.insert(thread, (seed, Instant::now()));
            }
            Ok(News::Ended { thread, seed, outcome }) => {
                let since = running.remove(&thread).map_or(began, |(_, since)| since);
                print(settings, seed, &outcome, since.elapsed());
                if ran.failed.is_empty() && !outcome.watch.findings().is_empty() {
                    let soon = settings.after_failure.map(|time| Instant::now() + time);
                    end = [end, soon].into_iter().flatten().min();
                }
                ran.add(seed, *outcome);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        let now = Instant::now();
        if end.is_some_and(|end| now >= end) {
            next.stopped.store(true, Ordering::Relaxed);
        }
        if now - printed >= PROGRESS {
            printed = now;
            println!("{}", ran.progress(settings, now - began, end.map(|end| end - now)));
        }
        if let Some((seed, _)) = running.values().find(|(_, since)| now - *since >= HANGS) {
            give_up(*seed);
        }
    }
    ran.took = began.elapsed();
    ran.cpu = cpu_time().saturating_sub(cpu);
    ran
}

fn print(settings: &Settings, seed: u64, outcome: &Outcome, took: Duration) {
    if settings.each {
        let (digest, lines) = outcome.history.digest();
        println!("seed {seed}: {took:?}, {lines} lines, {digest:016x}");
    }
    // An earlier seed may still be under way, and be the first that fails.
    if let Some(failure) = outcome.watch.findings().first().filter(|_| !settings.only_first) {
        println!("seed {seed} fails: {failure}\n  again: {}", again(seed));
    }
}

/// A thread cannot be ended, so the process ends. The test harness would keep what is printed to itself.
fn give_up(seed: u64) -> ! {
    let why = format!("it does not end within {HANGS:?} of real time");
    let _ = writeln!(stderr(), "seed {seed} fails: {why}\n  again: {}", again(seed));
    process::exit(101)
}

/// CPU time of this process so far.
fn cpu_time() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.try_into().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            from: 10,
            seeds: 1_000,
            time: None,
            threads: 4,
            failures: 3,
            after_failure: None,
            only_first: false,
            lines: 0,
            each: false,
        }
    }

    fn outcome(failure: Option<&str>) -> Outcome {
        let mut outcome = Outcome::default();
        outcome.watch.panicked(failure.map(str::to_owned).into_iter().collect());
        outcome.watch.count("a thing");
        outcome
    }

    #[test]
    fn each_seed_is_run_once() {
        let seen = std::sync::Mutex::new(Vec::new());
        let ran = run_all(&settings(), |seed| {
            seen.lock().unwrap().push(seed);
            outcome(None)
        });
        let mut seen = seen.into_inner().unwrap();
        seen.sort_unstable();
        assert_eq!(seen, (10..1_010).collect::<Vec<u64>>());
        assert_eq!((ran.seeds, ran.failed.len()), (1_000, 0));
        let summary = ran.summary(&settings());
        assert!(summary.contains("| a thing | 1000 |"), "{summary}");
    }

    #[test]
    fn no_seed_begins_after_the_last_failure() {
        let ran = run_all(&settings(), |_| outcome(Some("it breaks")));
        assert!((3..3 + 4).contains(&ran.failed.len()), "{ran:?}");
        assert_eq!(ran.failed.len() as u64, ran.seeds);
    }

    #[test]
    fn first_failure_is_that_of_the_lowest_seed() {
        let slow = |seed| {
            if seed == 10 {
                thread::sleep(Duration::from_millis(100));
            }
            outcome((seed < 30).then_some("it breaks"))
        };
        let ran = run_all(&Settings { failures: 1, ..settings() }, slow);
        assert_eq!(ran.failed.first_key_value().unwrap().0, &10);
    }

    #[test]
    fn no_seed_begins_after_the_time() {
        let slow = |_| {
            thread::sleep(Duration::from_millis(10));
            outcome(None)
        };
        let ran = run_all(&Settings { time: Some(Duration::ZERO), ..settings() }, slow);
        assert!((1..1_000).contains(&ran.seeds), "{ran:?}");
    }
}
