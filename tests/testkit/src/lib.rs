//! The harness that tests and benches share: real nats-servers, real proxies in front of them, wires
//! that can be cut, and ways to wait for a condition with a bound. Nothing here asserts anything about
//! the product.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

pub mod authority;
pub mod backlog;
pub mod cluster;
pub mod consume;
pub mod delivery_log;
pub mod dice;
pub mod examples;
pub mod fake_broker;
pub mod issuer;
pub mod jetstream;
pub mod measure;
pub mod nats_server;
pub mod pairs;
pub mod proxy;
pub mod raw_nats;
pub mod relay;
pub mod scrape;
pub mod stage;
pub mod system_calls;
pub mod traces;

use std::{
    env, fmt, fs,
    future::Future,
    path::PathBuf,
    process::Command,
    time::{Duration, Instant},
};

/// Long enough for a loaded machine of two cores; a test that waits this long has failed.
pub const BOUND: Duration = Duration::from_secs(20);

/// The program under test, of the profile that this test or bench was built with.
///
/// Cargo names the program when it runs a test. A test that is started by hand finds the program
/// next to its own folder `deps`, where Cargo puts both.
pub fn program() -> PathBuf {
    env::var_os("CARGO_BIN_EXE_fetch-proxy").map_or_else(
        || {
            let test = env::current_exe().expect("the path of this test");
            let profile = test.ancestors().nth(2).expect("the folder of the profile");
            profile.join("fetch-proxy")
        },
        PathBuf::from,
    )
}

/// Asks again and again until the answer is there.
///
/// # Panics
/// When it is not there within [`BOUND`]; `what` says what was waited for.
pub async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, ask: impl FnMut() -> F) -> T {
    let answer = until(BOUND, ask).await;
    answer.unwrap_or_else(|| panic!("waited {BOUND:?} for {what}"))
}

/// Like [`eventually`], for a request that may be made twice. A failure says what the last request said.
///
/// # Panics
/// If no request succeeds within [`BOUND`].
pub async fn eventually_ok<T, E: fmt::Display, F: Future<Output = Result<T, E>>>(
    what: &str,
    mut ask: impl FnMut() -> F,
) -> T {
    let began = Instant::now();
    loop {
        match ask().await {
            Ok(answer) => return answer,
            Err(error) if began.elapsed() > BOUND => panic!("waited {BOUND:?} for {what}: {error}"),
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

/// Asks again and again, for this time at most.
pub async fn until<T, F: Future<Output = Option<T>>>(
    within: Duration,
    mut ask: impl FnMut() -> F,
) -> Option<T> {
    let began = Instant::now();
    loop {
        if let Some(answer) = ask().await {
            return Some(answer);
        }
        if began.elapsed() > within {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Sends a process a signal by name, like `TERM`. A `STOP` has stopped all of its threads when this
/// returns: on a busy machine they run on for a while.
///
/// # Panics
/// When the process is not there, or does not stop within [`BOUND`].
pub fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args(["-s", name, &pid.to_string()]).status().unwrap();
    assert!(sent.success(), "kill -s {name} {pid}");
    let began = Instant::now();
    while name == "STOP" && !stopped(pid) {
        assert!(began.elapsed() < BOUND, "{pid} does not stop");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether all threads of a process have stopped, as far as the system tells.
fn stopped(pid: u32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return true };
    let states =
        threads.flatten().filter_map(|one| fs::read_to_string(one.path().join("stat")).ok());
    // The state stands behind the name, which is in parentheses.
    states
        .into_iter()
        .all(|stat| stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" T")))
}

/// The usual time of a call on this machine at this moment: the median of seven calls, one after the
/// other. `took` makes one call and returns its time.
///
/// A bound that is a multiple of the usual time holds on a busy machine too.
pub async fn usual(mut took: impl AsyncFnMut() -> Duration) -> Duration {
    let mut times = Vec::new();
    for _ in 0..7 {
        times.push(took().await);
    }
    median(times)
}

/// The time in the middle.
///
/// # Panics
/// When there is none.
pub fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A protobuf duration of so many milliseconds.
pub fn millis(millis: i64) -> Option<prost_types::Duration> {
    let nanos = i32::try_from(millis % 1000 * 1_000_000).unwrap();
    Some(prost_types::Duration { seconds: millis / 1000, nanos })
}
