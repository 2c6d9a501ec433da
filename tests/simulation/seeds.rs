//! Runs many seeds on all cores. One thread runs one seed at a time, on a runtime of its own. The threads
//! share the number of the next seed and nothing else, so they cannot change the history of a seed.

use std::{
    collections::BTreeMap,
    io::{Write as _, stderr},
    process,
    sync::{
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, Sender, channel},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    plan::Plan,
    ran::Ran,
    run::{self, Outcome},
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

/// The seeds that the threads share.
struct Next {
    place: AtomicU64,
    stopped: AtomicBool,
}

/// Runs the seeds that the settings ask for.
pub fn run(settings: &Settings) -> Ran {
    let next = Next { place: AtomicU64::new(0), stopped: AtomicBool::new(false) };
    let (tell, news) = channel();
    thread::scope(|scope| {
        for thread in 0..settings.threads {
            let (tell, next) = (tell.clone(), &next);
            scope.spawn(move || work(thread, settings, next, &tell));
        }
        drop(tell);
        collect(settings, &next, &news)
    })
}

fn work(thread: usize, settings: &Settings, next: &Next, tell: &Sender<News>) {
    while !next.stopped.load(Ordering::Relaxed) {
        let place = next.place.fetch_add(1, Ordering::Relaxed);
        if place >= settings.seeds {
            return;
        }
        let seed = settings.from + place;
        let _ = tell.send(News::Begun { thread, seed });
        let outcome = Box::new(run::run(&Plan::of(seed), false));
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
                if ran.failed.is_empty() && !outcome.watch.failures.is_empty() {
                    let soon = settings.after_failure.map(|time| Instant::now() + time);
                    end = [end, soon].into_iter().flatten().min();
                }
                ran.add(seed, *outcome);
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        let now = Instant::now();
        if ran.failed.len() >= settings.failures || end.is_some_and(|end| now >= end) {
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
    if let Some(failure) = outcome.watch.failures.first().filter(|_| !settings.only_first) {
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
