//! The output: a line every ten seconds, then a table, then the findings.

use std::{
    fs,
    sync::Arc,
    time::{Duration, Instant},
};

use testkit::delivery_log::{DeliveryLog, Records, seconds};
use tokio::time::sleep;

use crate::{
    judge::{Finding, Row, Verdict},
    process::Footprint,
};

/// A line of the table: its name, and what it says of a consumer.
type Line = (&'static str, fn(&Row) -> String);

/// The number of findings that are printed with their history.
const MOST: usize = 20;

pub async fn progress(log: Arc<DeliveryLog>, began: Instant) {
    loop {
        sleep(Duration::from_secs(10)).await;
        let records = log.read();
        let fault = records.faults.last().map_or("none", |fault| &fault.name);
        println!(
            "{:>4} s: {} published, {} settled, {} faults, last: {fault}",
            began.elapsed().as_secs(),
            records.confirmed.len(),
            records.settled,
            records.faults.len(),
        );
    }
}

/// Prints the table. Returns whether nothing is wrong.
pub fn table(records: &Records, verdict: &Verdict, before: Footprint, after: Footprint) -> bool {
    let (stored, confirmed) = (records.stored.len(), records.confirmed.len());
    println!(
        "\n{stored} messages stored, {confirmed} by their PubAck; {} PubAcks",
        records.unconfirmed
    );
    println!(
        "did not come, {} were undone by a crash; {} calls",
        verdict.unpublished, records.calls
    );
    let lines: [Line; 26] = [
        ("handed to workers", |row| row.handed.to_string()),
        ("redelivered", |row| row.redelivered.to_string()),
        ("duplicates seen by workers", |row| row.duplicates.to_string()),
        ("acked", |row| row.acked.to_string()),
        ("terminated", |row| row.terminated.to_string()),
        ("rejected for their codec", |row| row.rejected.to_string()),
        ("nacked", |row| row.nacked.to_string()),
        ("lapsed, or nobody knows", |row| row.lapsed.to_string()),
        ("told that the lease is over", |row| row.expired.to_string()),
        ("released: given back unseen", |row| row.waits.released.to_string()),
        ("attempts lost by a fault", |row| row.waits.left_by_fault.to_string()),
        ("calls walked away from", |row| row.waits.walked_away.to_string()),
        ("attempts left by a caller", |row| row.waits.left_by_caller.to_string()),
        ("given up at max_deliver", |row| row.given_up.to_string()),
        ("settled, undone by a crash", |row| row.undone.to_string()),
        ("sent in a fault, in vain", |row| row.sent_in_vain.to_string()),
        ("settled, hit by a late Nak", |row| row.hit_late.to_string()),
        ("lease broken by a crash", |row| row.broken_by_crash.to_string()),
        ("  handed over in a fault", |row| row.broken_unknown.to_string()),
        ("  progress kept by a fault", |row| row.broken_unheard.to_string()),
        ("  by nothing that excuses it", |row| row.broken.to_string()),
        ("accepted from two", |row| row.accepted_from_two.to_string()),
        ("lost", |row| row.lost.to_string()),
        ("longest in the dark, s", |row| seconds(row.waits.dark)),
        ("longest silence, s", |row| seconds(row.waits.silent)),
        ("longest recovery, s", |row| seconds(row.waits.recovered)),
    ];
    print!("\n{:<30}", "");
    verdict.rows.iter().for_each(|row| print!("{:>13}", row.name));
    println!();
    for (name, value) in lines {
        print!("{name:<30}");
        verdict.rows.iter().for_each(|row| print!("{:>13}", value(row)));
        println!();
    }
    println!("{} faults", records.faults.len());
    println!(
        "proxy: memory {:.1} MiB became {:.1} MiB, descriptors {} became {}\n",
        before.memory, after.memory, before.descriptors, after.descriptors
    );
    let balances = records.wrong.is_empty() && verdict.findings.is_empty();
    if balances {
        println!("nothing is wrong");
    } else {
        complain(records, &verdict.findings);
    }
    balances
}

fn complain(records: &Records, findings: &[Finding]) {
    println!("{} findings", records.wrong.len() + findings.len());
    for wrong in records.wrong.iter().take(MOST) {
        println!("  {wrong}");
    }
    tell(records, findings.iter().step_by(findings.len() / MOST + 1));
}

/// Some of what faults excuse, from all over the run.
pub fn excuses(records: &Records, verdict: &Verdict) {
    println!("leases that faults broke:");
    tell(records, verdict.excused.iter().step_by(verdict.excused.len() / (2 * MOST) + 1));
}

fn tell<'f>(records: &Records, findings: impl Iterator<Item = &'f Finding>) {
    let start = records.stored.values().next().map_or(0, |(at, _)| *at);
    for finding in findings {
        let consumer = &records.consumers[finding.consumer];
        println!("  {}: message {}: {}", consumer.terms.name, finding.sequence, finding.what);
        let held = consumer.messages.get(&finding.sequence);
        let held = held.map_or(&[][..], Vec::as_slice);
        print!("{}", records.history(finding.sequence, held, start));
    }
}

/// Keeps the proxy's log, and says where.
pub fn keep_log(seed: u64, log: &str) -> String {
    let file = std::env::temp_dir().join(format!("fetch-proxy-soak-{seed}.log"));
    fs::write(&file, log).unwrap();
    file.display().to_string()
}
