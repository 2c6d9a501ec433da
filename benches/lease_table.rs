//! The lease table alone: the time and memory of a lease, and the longest single call with a
//! million leases. They are granted, lent, kept alive, doubted, and expire on time.
//!
//! Time inside the table is made up, so nothing waits. Memory is the growth of the resident set,
//! which counts what the allocator adds; it is read from `/proc`, so this runs on Linux only. The
//! longest calls are of the wall clock: they mean something on a machine that does nothing else.

#![allow(clippy::disallowed_methods, reason = "a benchmark reads the clock")]

use std::{
    fs,
    hint::black_box,
    time::{Duration, Instant},
};

use fetch_proxy::lease::{
    BeginResult, ConsumerEnd, ConsumerId, Due, LeaseId, LeaseTable, PublishOutcome, SettleKind,
    Terms,
};

/// Leases held at once.
const HELD: u64 = 1_000_000;
/// Settled one after the other to time a cycle.
const CYCLES: u64 = 200_000;
/// How many ends are remembered.
const REMEMBERED: usize = 4 << 20;
/// Leases looked at in one call.
const STEP: usize = 1024;
/// Consumers that share the leases.
const CONSUMERS: u32 = 10;
const ACK_WAIT: Duration = Duration::from_secs(30);
/// Longer than the ack wait, so that progress is due at half of it.
const LEASE: Duration = Duration::from_secs(40);
/// The longest lease, longer than any here.
const LONGEST: Duration = Duration::from_secs(3600);
/// Bytes of a page, on every machine that this is built for.
const PAGE: u64 = 4096;

/// As large as what the proxy keeps: a reply subject on the heap, of the usual 80 bytes.
struct Hold(#[expect(dead_code, reason = "it is there to take memory")] String);

fn main() {
    let origin = Instant::now();
    let mut table = LeaseTable::new(origin, LONGEST, REMEMBERED);
    print("cycle, empty table", format!("{} ns", cycles(&mut table, 0, origin)));

    let before = resident();
    let ids = grant(&mut table, origin);
    print("memory of a lease", format!("{} bytes", (resident() - before) / HELD));
    print("cycle, a million held", format!("{} ns", cycles(&mut table, HELD, origin)));

    lend(&mut table, &ids, origin);
    let half = origin + ACK_WAIT / 2;
    sweep(&mut table, "sweep, a million progresses", half);
    progressed(&mut table, &ids, half);
    walk(&mut table, "distrust", |table, id, after| table.distrust(id, half, after, STEP));
    walk(&mut table, "retune", |table, id, after| table.retune(id, |_| ACK_WAIT, after, STEP));
    sweep(&mut table, "sweep, a million lapses", origin + LEASE);
    assert!(table.is_empty(), "{} did not lapse on time", table.len());

    grant(&mut table, origin + LEASE);
    for consumer in 0..CONSUMERS {
        table.end_consumer(ConsumerId(consumer), ConsumerEnd::Gone);
    }
    sweep(&mut table, "sweep, a million of ended consumers", origin + LEASE);
    assert!(table.is_empty(), "{} outlived their consumer", table.len());
}

/// The mean time, in nanoseconds, of granting, lending, and settling one lease.
fn cycles(table: &mut LeaseTable<Hold>, first: u64, now: Instant) -> u128 {
    let began = Instant::now();
    for number in first..first + CYCLES {
        let (terms, hold) = delivery(number, now);
        let (id, _) = table.grant(terms, hold);
        black_box(table.assign(id, None, now)).expect("just granted");
        let begun = table.begin(id, SettleKind::Ack, now).expect("just lent");
        assert!(matches!(begun, BeginResult::Publish(_)));
        black_box(table.finish(id, PublishOutcome::Confirmed, now));
    }
    began.elapsed().as_nanos() / u128::from(CYCLES)
}

fn grant(table: &mut LeaseTable<Hold>, now: Instant) -> Vec<LeaseId> {
    let mut calls = Calls::new("grant");
    let mut ids = Vec::new();
    for number in 0..HELD {
        let (terms, hold) = delivery(number, now);
        ids.push(calls.time(|| table.grant(terms, hold)).0);
    }
    ids
}

fn lend(table: &mut LeaseTable<Hold>, ids: &[LeaseId], now: Instant) {
    let mut calls = Calls::new("lend");
    for id in ids {
        calls.time(|| table.assign(*id, Some(LEASE), now)).expect("just granted");
    }
}

fn progressed(table: &mut LeaseTable<Hold>, ids: &[LeaseId], sent_at: Instant) {
    let mut calls = Calls::new("progressed");
    for id in ids {
        calls.time(|| table.progressed(*id, sent_at, true, sent_at));
    }
}

fn sweep(table: &mut LeaseTable<Hold>, name: &'static str, now: Instant) {
    let mut calls = Calls::new(name);
    let mut swept = 0;
    while table.next_due().is_some_and(|due| due <= now) {
        let due: Vec<Due<Hold>> = calls.time(|| table.sweep(now, STEP));
        swept += due.len() as u64;
    }
    assert_eq!(swept, HELD, "{name}");
}

fn walk(
    table: &mut LeaseTable<Hold>,
    name: &'static str,
    mut stride: impl FnMut(&mut LeaseTable<Hold>, ConsumerId, Option<u64>) -> Option<u64>,
) {
    let mut calls = Calls::new(name);
    for consumer in (0..CONSUMERS).map(ConsumerId) {
        let mut after = None;
        loop {
            after = calls.time(|| stride(table, consumer, after));
            if after.is_none() {
                break;
            }
        }
    }
}

fn delivery(number: u64, received: Instant) -> (Terms, Hold) {
    let consumer = u32::try_from(number % u64::from(CONSUMERS)).expect("below a u32");
    let terms = Terms {
        consumer: ConsumerId(consumer),
        sequence: number,
        consumer_sequence: number,
        last_attempt: false,
        received,
        sent_after: None,
        age: Duration::ZERO,
        ack_wait: ACK_WAIT,
        delivery_count: 1,
    };
    let mut subject =
        format!("$JS.ACK.TASKS.batch-worker.1.{number:012}.{number:012}.1234567890123456789.0");
    subject.shrink_to_fit();
    (terms, Hold(subject))
}

/// Bytes of this process that are in memory.
fn resident() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").expect("Linux");
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("the second number is resident pages") * PAGE
}

/// Calls of one kind; says when it is dropped how many there were, and how long they took.
struct Calls {
    name: &'static str,
    count: u32,
    total: Duration,
    longest: Duration,
}

impl Calls {
    fn new(name: &'static str) -> Self {
        Self { name, count: 0, total: Duration::ZERO, longest: Duration::ZERO }
    }

    fn time<R>(&mut self, call: impl FnOnce() -> R) -> R {
        let began = Instant::now();
        let result = black_box(call());
        let took = began.elapsed();
        self.count += 1;
        self.total += took;
        self.longest = self.longest.max(took);
        result
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        let mean = self.total / self.count.max(1);
        print(self.name, format!("mean {mean:>9.1?}   longest {:>9.1?}", self.longest));
    }
}

fn print(name: &str, figure: String) {
    println!("{name:<36} {figure}");
}
