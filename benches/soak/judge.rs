//! The judge reads the delivery log of the run and finds what must not have happened.
//!
//! A lease promises its holder that nobody else has the message. That promise depends on NATS, so a
//! breach is *excused*, and counted separately, if a fault explains it:
//! - nats-server crashed while the lease was held. An unreplicated stream forgets what it confirmed
//!   last.
//! - The message was delivered while NATS was out of order. JetStream's clock then started before the
//!   proxy could know.
//! - The lease needed progress that a fault stopped.
//!
//! No fault excuses a token that works for a worker who has lost the message to another worker, or
//! whose lease has ended.

use std::collections::BTreeMap;

use testkit::delivery_log::{At, ConsumerRecords, FaultKind, Holding, Kind, Outcome, Records, Try};

use crate::{
    excuses::{Faults, GRACE, Wrong, settlement},
    waiting::{self, Waits},
};

/// Clocks of processes on a busy machine are read at slightly different moments.
const SLACK: At = 100_000;
/// A killed server may not have stored confirmations that are younger than this.
const UNSTORED: At = 2_000_000;
/// A settlement that a fault delayed comes at most this long after the fault.
const LATE: At = 1_000_000;

/// One consumer's line of the table.
#[derive(Debug, Default)]
pub struct Row {
    pub name: &'static str,
    pub handed: u64,
    /// Handed over on a later attempt than the first.
    pub redelivered: u64,
    /// Handed over though a worker had settled it for good, or still relied on its lease: what a
    /// worker sees as a duplicate, whatever excuses it.
    pub duplicates: u64,
    pub acked: u64,
    pub terminated: u64,
    pub rejected: u64,
    pub nacked: u64,
    pub lapsed: u64,
    pub expired: u64,
    /// Leases that were over before their time, by what excuses it.
    pub broken_by_crash: u64,
    pub broken_unknown: u64,
    pub broken_unheard: u64,
    pub broken: u64,
    /// Delivered again by a Nak that a fault held up, after another had settled the message.
    pub hit_late: u64,
    /// Only sent when NATS was out of order, and lost.
    pub sent_in_vain: u64,
    pub undone: u64,
    pub accepted_from_two: u64,
    pub lost: u64,
    pub given_up: u64,
    pub waits: Waits,
}

/// Something that must not be.
#[derive(Debug)]
pub struct Finding {
    pub consumer: usize,
    pub sequence: u64,
    pub what: String,
}

#[derive(Debug, Default)]
pub struct Verdict {
    pub rows: Vec<Row>,
    pub findings: Vec<Finding>,
    /// PubAcks that a crash undid.
    pub unpublished: u64,
    /// Leases that faults broke, for those who want to look at them.
    pub excused: Vec<Finding>,
}

pub fn judge(records: &Records) -> Verdict {
    let mut verdict = Verdict::default();
    let stored = |id: &u64, sequence: &u64| {
        records.stored.get(sequence).is_some_and(|(_, stored)| stored == id)
    };
    let gone = records.confirmed.iter().filter(|(id, sequence)| !stored(id, sequence));
    verdict.unpublished = gone.count() as u64;
    for (index, consumer) in records.consumers.iter().enumerate() {
        let faults = Faults(&records.faults);
        let mut judge =
            Judge { consumer, faults, row: Row::default(), wrong: Vec::new(), excused: Vec::new() };
        judge.row.name = consumer.terms.name;
        let messages: BTreeMap<u64, Vec<Holding>> = consumer
            .messages
            .iter()
            .map(|(sequence, held)| (*sequence, faults.sorted(held)))
            .collect();
        for sequence in records.stored.keys() {
            let held = messages.get(sequence).map_or(&[][..], Vec::as_slice);
            judge.count(held);
            judge.duplicates(held);
            judge.fence(*sequence, held);
            judge.promises(*sequence, held);
            judge.ends(*sequence, held);
        }
        judge.row.waits = waiting::judge(records, consumer, &messages, faults, &mut judge.wrong);
        let finding = |(sequence, what)| Finding { consumer: index, sequence, what };
        verdict.findings.extend(judge.wrong.into_iter().map(finding));
        verdict.excused.extend(judge.excused.into_iter().map(finding));
        verdict.rows.push(judge.row);
    }
    verdict
}

struct Judge<'l> {
    consumer: &'l ConsumerRecords,
    faults: Faults<'l>,
    row: Row,
    wrong: Wrong,
    excused: Wrong,
}

impl Judge<'_> {
    fn count(&mut self, held: &[Holding]) {
        let row = &mut self.row;
        for holding in held {
            row.handed += 1;
            row.redelivered += u64::from(holding.attempt > 1);
            row.rejected += u64::from(holding.rejected);
            let settled = |kind| {
                holding.tries.iter().any(|tried| tried.kind == kind && tried.outcome.accepted())
            };
            row.acked += u64::from(settled(Kind::Ack));
            row.terminated += u64::from(settled(Kind::Term) && !holding.rejected);
            row.nacked += u64::from(settled(Kind::Nak));
            row.lapsed += u64::from(settlement(holding).is_none());
            row.expired += u64::from(holding.tries.iter().any(expired));
        }
    }

    fn duplicates(&mut self, held: &[Holding]) {
        let twice = |later: &Holding, earlier: &Holding| {
            let done = done_with(earlier).is_some_and(|done| later.handed > done);
            done || later.handed < left(earlier, None) - SLACK
        };
        for (index, later) in held.iter().enumerate() {
            let duplicate = held[..index].iter().any(|earlier| twice(later, earlier));
            self.row.duplicates += u64::from(duplicate);
        }
    }

    /// A token works for nobody who has lost the message, or whose lease has ended.
    fn fence(&mut self, sequence: u64, held: &[Holding]) {
        for (index, holding) in held.iter().enumerate() {
            let next = held[index + 1..].iter().map(|later| later.handed).min();
            for (number, tried) in holding.tries.iter().enumerate() {
                if !tried.outcome.accepted() || holding.rejected {
                    continue;
                }
                let (kind, attempt) = (tried.kind, holding.attempt);
                if next.is_some_and(|next| tried.sent > next) {
                    self.row.accepted_from_two += 1;
                    let what =
                        format!("{kind:?} of attempt {attempt} accepted, though another had it");
                    self.wrong.push((sequence, what));
                }
                // An unconfirmed settlement may be repeated during the ack wait.
                let again = holding.tries[..number].iter().any(|earlier| earlier.kind == kind);
                if tried.sent > latest_end(holding, tried) + SLACK && !again {
                    let what = format!("{kind:?} of attempt {attempt} accepted after its lease");
                    self.wrong.push((sequence, what));
                }
            }
        }
    }

    /// While a lease lasts its holder is the only one, and can settle.
    fn promises(&mut self, sequence: u64, held: &[Holding]) {
        for (index, holding) in held.iter().enumerate() {
            for later in &held[index + 1..] {
                self.alone(sequence, &held[..index], holding, later);
            }
            for tried in holding.tries.iter().filter(|tried| expired(tried)) {
                let answered = tried.answered.unwrap_or(tried.sent);
                if answered < left(holding, Some(tried)) - SLACK {
                    self.broken(sequence, holding, answered, "its lease had ended early");
                }
            }
            let mut earlier: Vec<&Try> = Vec::new();
            for tried in &holding.tries {
                let refused = tried.outcome == Outcome::Refused("LEASE_SETTLED".to_owned());
                let settled = earlier.iter().any(|earlier| earlier.kind != Kind::Extend);
                let told = tried.outcome == Outcome::Duplicate || refused;
                if told && !settled && !holding.rejected {
                    let what = format!("{:?} answered {:?} at first", tried.kind, tried.outcome);
                    self.wrong.push((sequence, what));
                }
                earlier.push(tried);
            }
        }
    }

    fn alone(&mut self, sequence: u64, before: &[Holding], holding: &Holding, later: &Holding) {
        if let Some(answered) = done_with(holding)
            && later.handed > answered
        {
            let sent = holding.tries.iter().any(|tried| tried.outcome == Outcome::Sent);
            if self.faults.crashed(answered - UNSTORED, later.handed) {
                self.row.undone += 1;
            } else if sent && self.faults.nats(answered - GRACE, answered + GRACE) {
                // Sent, and nothing more was promised.
                self.row.sent_in_vain += 1;
            } else if before.iter().any(|before| self.held_up(before, answered)) {
                self.row.hit_late += 1;
            } else if self.began_unheard(holding, answered) {
                self.row.broken_unknown += 1;
            } else {
                let what = format!("came back though attempt {} was settled", holding.attempt);
                self.wrong.push((sequence, what));
            }
        } else if later.handed < left(holding, None) - SLACK {
            self.broken(sequence, holding, later.handed, "another was handed it meanwhile");
        }
    }

    /// A fault may delay a delivery. JetStream's clock for it then started as early as the fault.
    /// At the end of that clock JetStream may give the message away while the proxy still accepts
    /// its holder.
    fn began_unheard(&self, holding: &Holding, now: At) -> bool {
        let wait = self.consumer.terms.ack_wait_of(holding.attempt);
        self.faults.0.iter().any(|fault| {
            let to = fault.to.unwrap_or(At::MAX / 2) + LATE;
            let held_up = fault.from <= holding.handed && holding.handed <= to;
            fault.kind != FaultKind::Workers && held_up && now > fault.from + wait - LATE
        })
    }

    fn in_a_fault(&self, handed: At) -> bool {
        self.faults.nats(handed + GRACE - LATE, handed)
    }

    /// A fault of NATS that has just ended delayed a Nak of this delivery. The Nak came from the
    /// holder, or from the proxy at the end of the lease.
    fn held_up(&self, holding: &Holding, now: At) -> bool {
        let naks = holding.tries.iter().filter(|tried| tried.kind == Kind::Nak);
        let sent = naks.map(|nak| nak.sent).fold(holding.least, At::max);
        self.faults.0.iter().any(|fault| {
            let to = fault.to.unwrap_or(At::MAX / 2) + LATE;
            let just_now = fault.from <= now && now <= to;
            fault.kind != FaultKind::Workers && just_now && fault.from - LATE <= sent
        })
    }

    /// A lease was over before its time.
    fn broken(&mut self, sequence: u64, holding: &Holding, when: At, how: &str) {
        let (handed, faults) = (holding.handed, self.faults);
        let in_a_fault = self.in_a_fault(handed);
        let row = &mut self.row;
        let (count, excuse) = if faults.crashed(handed - UNSTORED, when) {
            (&mut row.broken_by_crash, "a crash")
        } else if holding.needs_progress && faults.nats(handed, when) {
            (&mut row.broken_unheard, "progress kept by a fault")
        } else if in_a_fault {
            (&mut row.broken_unknown, "handed over in a fault")
        } else {
            row.broken += 1;
            return self.wrong.push((sequence, format!("attempt {}: {how}", holding.attempt)));
        };
        *count += 1;
        self.excused.push((sequence, format!("attempt {}: {how}: {excuse}", holding.attempt)));
    }

    /// Nothing is lost: each message was settled by somebody, or given up by JetStream.
    fn ends(&mut self, sequence: u64, held: &[Holding]) {
        let most = self.consumer.terms.max_deliver;
        let tried = held.iter().flat_map(|holding| &holding.tries);
        let settles = |tried: &Try| {
            matches!(tried.kind, Kind::Ack | Kind::Term) && !tried.outcome.not_applied()
        };
        if tried.clone().any(settles) || self.consumer.terminated.contains(&sequence) {
            return;
        }
        let exhausted = held.iter().any(|holding| Some(holding.attempt) == most);
        if self.consumer.given_up.contains(&sequence) || exhausted {
            self.row.given_up += 1;
            return;
        }
        self.row.lost += 1;
        self.wrong.push((sequence, "lost: settled by nobody, and not there any more".to_owned()));
    }
}

/// The time at which its holder learned that it is acked or terminated.
fn done_with(holding: &Holding) -> Option<At> {
    settlement(holding).filter(|tried| tried.kind != Kind::Nak)?.answered
}

fn expired(tried: &Try) -> bool {
    tried.outcome == Outcome::Refused("LEASE_EXPIRED".to_owned())
}

/// The latest end of the lease at the time of this attempt.
fn latest_end(holding: &Holding, tried: &Try) -> At {
    if tried.kind == Kind::Extend { tried.before.1 } else { holding.most }
}

/// Until when its holder relies on the lease: it may give it up sooner than it ends. `but` is left
/// out of consumer.
pub fn left(holding: &Holding, but: Option<&Try>) -> At {
    let gives_up = |tried: &&Try| match (tried.kind, &tried.outcome) {
        _ if but.is_some_and(|but| std::ptr::eq(but, *tried)) => false,
        (Kind::Extend, _) => false,
        (_, outcome) if outcome.not_applied() => {
            *outcome == Outcome::Refused("LEASE_EXPIRED".into())
        }
        (Kind::Nak, _) => true,
        // Only sent: over at once. Confirmed: the message is done with.
        (_, outcome) => tried.fast || outcome.accepted() || *outcome == Outcome::Duplicate,
    };
    let sooner = holding.tries.iter().filter(gives_up).map(|tried| tried.sent).min();
    sooner.map_or(holding.least, |sooner| sooner.min(holding.least))
}
