//! The cost of some work: its rate, the CPU time of the processes that do it, and the system calls of
//! the proxies among them.

use std::{
    collections::BTreeMap,
    fs,
    future::Future,
    time::{Duration, Instant},
};

use crate::system_calls;

/// Before calls are counted, the connections of earlier work are closed in this time.
const PAUSE: Duration = Duration::from_millis(300);

/// The processes that work on a message.
#[derive(Clone, Default)]
pub struct Processes {
    pub proxies: Vec<u32>,
    /// Clients, nats-server, and a service in place of the proxy.
    pub others: Vec<u32>,
}

/// How a piece of work is run.
#[derive(Clone, Copy)]
pub struct Run {
    /// The work ends when so many messages are done.
    pub messages: usize,
    /// Whether the system calls of the proxies are counted. That makes them slow.
    pub counts_calls: bool,
}

/// Some work, done.
pub struct Half {
    pub messages: f64,
    /// Messages a second.
    pub rate: f64,
    /// Microseconds of CPU time a message, of all processes.
    pub cpu: f64,
    /// The same of the proxies alone, if there are any.
    pub proxy_cpu: Option<f64>,
    /// The system calls of the proxies by name, or why they could not be counted.
    pub calls: Option<Result<BTreeMap<String, u64>, String>>,
}

/// Measures work that returns how many messages it has done.
pub async fn half<F: Future<Output = usize>>(processes: &Processes, run: Run, work: F) -> Half {
    let counts = run.counts_calls && !processes.proxies.is_empty();
    if counts {
        tokio::time::sleep(PAUSE).await;
    }
    let counter = counts.then(|| system_calls::attach(&processes.proxies));
    let before = (micros(&processes.proxies), micros(&processes.others));
    let began = Instant::now();
    let messages = work.await as f64;
    let took = began.elapsed().as_secs_f64();
    let proxies = micros(&processes.proxies) - before.0;
    let others = micros(&processes.others) - before.1;
    Half {
        messages,
        rate: messages / took,
        cpu: (proxies + others) / messages,
        proxy_cpu: (!processes.proxies.is_empty()).then_some(proxies / messages),
        calls: counter.map(|counter| counter.and_then(system_calls::Counter::stop)),
    }
}

/// CPU time of these processes so far, user and system together.
fn micros(processes: &[u32]) -> f64 {
    processes.iter().map(|pid| micros_of(*pid)).sum()
}

/// From /proc: fields 14 and 15 of `stat`, in ticks of 10 ms.
fn micros_of(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    let fields: Vec<f64> = after_name.split(' ').filter_map(|field| field.parse().ok()).collect();
    // The state letter is not a number, so utime and stime are 10 and 11 of what is.
    fields.get(10).zip(fields.get(11)).map_or(0.0, |(user, system)| (user + system) * 10_000.0)
}

/// The middle of some values, and how far they are apart.
#[derive(Clone, Copy)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    /// # Panics
    /// When there is no value.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self { median: values[values.len() / 2], least: values[0], most: values[values.len() - 1] }
    }

    /// The lowest and the highest value, as tables show them.
    pub fn range(&self) -> String {
        format!("{:.2} to {:.2}", self.least, self.most)
    }
}

/// A whole number with a comma between each three digits.
pub fn grouped(value: f64) -> String {
    let digits = format!("{value:.0}");
    let groups: Vec<&str> = digits
        .as_bytes()
        .rchunks(3)
        .rev()
        .map(|group| std::str::from_utf8(group).unwrap_or_default())
        .collect();
    groups.join(",")
}

/// Microseconds with as many digits as mean something.
pub fn short(micros: f64) -> String {
    if micros < 100.0 { format!("{micros:.1}") } else { grouped(micros) }
}
