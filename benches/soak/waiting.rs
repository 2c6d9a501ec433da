//! How long messages were in the dark: there to be handed out, workers asking, and nobody got them.
//!
//! The wait of a first delivery begins when a later message overtakes it. The wait of a repeated
//! delivery begins at the time that a Nak named, or when the lease and JetStream's ack wait have
//! ended. Time in which NATS or workers were out of order is taken out of it, with some seconds to
//! recover. The attempt count shows deliveries that no worker saw. The proxy gave such a message
//! back, which is quick; or the message waited for the end of a lease without a holder. Only a
//! fault, or a caller that left its Fetch, explains such a wait.

use std::collections::{BTreeMap, BTreeSet};

use testkit::delivery_log::{
    At, ConsumerRecords, FaultKind, Holding, Kind, Outcome, Records, margin,
};

use crate::excuses::{Faults, GRACE, Wrong, settlement};

/// In the dark for longer is wrong.
const LONGEST: At = 5_000_000;
/// A message that the proxy gives back returns within this time. The proxy may have parked it for a
/// second.
const SOON: At = 1_300_000;
/// After a fault deliveries continue within this time.
const RECOVERY: At = 15_000_000;
/// Leases that workers ask for are shorter.
const LONGEST_LEASE: At = 13_000_000;

#[derive(Debug, Default)]
pub struct Waits {
    /// Attempts that no worker saw and that were soon back.
    pub released: u64,
    /// Attempts that had to wait, by their explanation.
    pub left_by_fault: u64,
    pub left_by_caller: u64,
    /// Fetch calls and streams whose answer nobody took.
    pub walked_away: u64,
    /// Longest in the dark, faults taken out.
    pub dark: At,
    /// Longest without any delivery though there was something, faults taken out.
    pub silent: At,
    /// Longest from the end of a fault of NATS to the next delivery.
    pub recovered: At,
}

pub fn judge(
    records: &Records,
    consumer: &ConsumerRecords,
    messages: &BTreeMap<u64, Vec<Holding>>,
    faults: Faults<'_>,
    wrong: &mut Wrong,
) -> Waits {
    let (waits, leavers) = (Waits::default(), BTreeSet::new());
    let mut watch = Watch { consumer, faults, waits, leavers, wrong };
    // From the last to the first: when the first of all later ones was handed out.
    let mut overtaken = At::MAX;
    for (sequence, (published, _)) in records.stored.iter().rev() {
        let Some(held) = messages.get(sequence).filter(|held| !held.is_empty()) else { continue };
        watch.first(*sequence, overtaken.max(*published), &held[0]);
        for pair in held.windows(2) {
            watch.next(*sequence, &pair[0], &pair[1]);
        }
        overtaken = overtaken.min(held[0].handed);
    }
    watch.silence(records, messages);
    watch.callers();
    watch.waits
}

struct Watch<'l> {
    consumer: &'l ConsumerRecords,
    faults: Faults<'l>,
    waits: Waits,
    /// Calls that were walked away from and left something behind.
    leavers: BTreeSet<At>,
    wrong: &'l mut Wrong,
}

impl Watch<'_> {
    fn first(&mut self, sequence: u64, free: At, holding: &Holding) {
        let unseen = holding.attempt.saturating_sub(1);
        self.wait(sequence, free, holding.handed, unseen, false, holding.attempt);
    }

    fn next(&mut self, sequence: u64, before: &Holding, after: &Holding) {
        let unseen = after.attempt.saturating_sub(before.attempt + 1);
        let (free, doubtful) = self.free_again(before);
        self.wait(sequence, free, after.handed, unseen, doubtful, after.attempt);
    }

    /// When a message that was handed out can be handed out again, and whether a fault may have
    /// made it later.
    fn free_again(&self, holding: &Holding) -> (At, bool) {
        let wait = self.consumer.terms.ack_wait_of(holding.attempt);
        let mut lapses = holding.most + 2 * margin(wait);
        // A crash may undo this delivery and keep the one before: then that one's ack wait counts,
        // and nobody has a lease whose end would cut it short.
        if self.faults.crashed(holding.handed, holding.most) {
            lapses = lapses.max(holding.handed + wait);
        }
        match settlement(holding) {
            Some(nak) if nak.kind == Kind::Nak && nak.outcome == Outcome::Confirmed => {
                (nak.again.or(nak.answered).unwrap_or(nak.sent), false)
            }
            Some(sent) => (lapses.max(sent.sent + sent.delay + wait), true),
            None => {
                let naks = holding.tries.iter().filter(|tried| tried.kind == Kind::Nak);
                let delayed = naks.map(|nak| nak.sent + nak.delay + wait).max();
                (lapses.max(delayed.unwrap_or(0)), true)
            }
        }
    }

    fn wait(&mut self, sequence: u64, from: At, to: At, unseen: u32, doubtful: bool, attempt: u32) {
        if from >= to {
            return self.waits.released += u64::from(unseen);
        }
        let patience = self.consumer.terms.longest_ack_wait().max(LONGEST_LEASE) + GRACE;
        let (faults, walks) = (self.faults, &self.consumer.walked_away);
        let shaken = faults.nats(from - GRACE, to) || faults.workers(from - GRACE, to);
        let crashed = faults.crashed(from - GRACE, to);
        // A delivery that a fault lost comes back after the ack wait.
        let swallowed = shaken && (unseen > 0 || doubtful || crashed);
        let dark = self.without_faults(from, to, if swallowed { patience } else { GRACE });
        let least = (1..=attempt).map(|attempt| self.consumer.terms.ack_wait_of(attempt)).min();
        let quick = dark < (least.unwrap_or(0) / 2).min(SOON);
        if swallowed && unseen > 0 && to - from > least.unwrap_or(0) / 2 {
            self.waits.left_by_fault += u64::from(unseen);
        } else if unseen == 0 || quick {
            self.waits.released += u64::from(unseen);
            self.waits.dark = self.waits.dark.max(dark);
            if dark > LONGEST {
                self.dark(sequence, dark, attempt);
            }
        } else if let Some(walk) = walks.iter().find(|walk| (from - SOON..to).contains(walk)) {
            self.waits.left_by_caller += 1;
            self.leavers.insert(*walk);
        } else {
            self.dark(sequence, dark, attempt);
        }
        let beyond = dark - At::from(unseen) * patience;
        if unseen > 0 && beyond > LONGEST {
            self.dark(sequence, dark, attempt);
        }
    }

    fn dark(&mut self, sequence: u64, dark: At, attempt: u32) {
        let seconds = dark as f64 / 1e6;
        self.wrong
            .push((sequence, format!("attempt {attempt} came after {seconds:.1} s in the dark")));
    }

    /// How much of this time has no fault in it, nor the time after one.
    fn without_faults(&self, from: At, to: At, after: At) -> At {
        let (mut free, mut until) = (0, from);
        for fault in self.faults.0 {
            let (begins, ends) = (fault.from - 500_000, fault.to.unwrap_or(At::MAX / 2) + after);
            if ends <= until {
                continue;
            }
            free += (begins.min(to) - until).max(0);
            until = ends;
            if until >= to {
                return free;
            }
        }
        free + to - until
    }

    /// An answer that crosses with its caller's leaving waits for its lease; most do not cross.
    fn callers(&mut self) {
        let (left, walks) = (self.leavers.len(), self.consumer.walked_away.len());
        self.waits.walked_away = walks as u64;
        if left > walks / 10 + 2 {
            let what = format!("{left} of {walks} callers that went away left something behind");
            self.wrong.push((0, what));
        }
    }

    /// Times without any delivery, though the next had long been there.
    fn silence(&mut self, records: &Records, messages: &BTreeMap<u64, Vec<Holding>>) {
        let mut handed: Vec<(At, u64)> = Vec::new();
        for (sequence, held) in messages {
            handed.extend(held.iter().map(|holding| (holding.handed, *sequence)));
        }
        handed.sort_unstable();
        for pair in handed.windows(2) {
            let ((last, _), (next, sequence)) = (pair[0], pair[1]);
            let stored = records.stored.get(&sequence).map_or(next, |(at, _)| *at);
            // It is not known since when an older message was free.
            let first = messages[&sequence].iter().all(|holding| holding.handed >= next);
            if first {
                let silent = self.without_faults(last.max(stored), next, GRACE);
                self.waits.silent = self.waits.silent.max(silent);
                if silent > LONGEST {
                    self.dark(sequence, silent, 1);
                }
            }
        }
        for fault in self.faults.0.iter().filter(|fault| fault.kind != FaultKind::Workers) {
            let Some(end) = fault.to else { continue };
            let next = handed.partition_point(|(at, _)| *at < end);
            let Some((next, sequence)) = handed.get(next) else { continue };
            self.waits.recovered = self.waits.recovered.max(next - end);
            if next - end > RECOVERY {
                let after = (next - end) as f64 / 1e6;
                let what = format!("the first for {after:.1} s after {}", fault.name);
                self.wrong.push((*sequence, what));
            }
        }
    }
}
